"""The chunk loop: its arithmetic against ComfyUI's, its chunks, guidance, memory shortage and prompt changes, over real caches."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from comfyui_qvg.qvg.attention.functions import sdpa
from comfyui_qvg.qvg.attention.rope import Rope
from comfyui_qvg.qvg.cache.kv_cache import KVCache
from comfyui_qvg.qvg.cache.stats import CacheStats
from comfyui_qvg.qvg.models.wan import CausalWan, WanSizes
from comfyui_qvg.qvg.settings import QVGSettings
from comfyui_qvg.qvg.video import Adapted, CachedNetwork, ChunkDone, Condition, Run, Sampler, StepDone, guided

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
# set where a test runs in a process of its own
ALONE = "QVG_TEST_ALONE"
GRID = (2, 3)
SHAPE = (1, 16, 4, 6)
SMALL = replace(QVGSettings.preset("balanced").both(centroids=8, stages=1), sink_frames=1, iterations=2)
OFF = QVGSettings.preset("off")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return CausalWan(WanSizes(dim=256, ffn_dim=64, layers=2, text_dim=8)).requires_grad_(False).eval()


def context(network, seed=0):
    return network.project_context(torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(seed)))


def cache(settings=SMALL, frames=None, batch=1, chunk=3):
    return KVCache(settings, layers=2, heads=2, head_dim=128, grid=GRID, rope=Rope, batch=batch, dtype=torch.float32, max_frames=frames,
                   chunk_frames=chunk)


def make(network, run, settings=SMALL, shape=SHAPE, **kwargs):
    return Sampler(CachedNetwork(network, [Condition(context(network), cache(settings, run.frames, shape[0]))]), run, shape, **kwargs)


def video(sampler):
    return torch.cat([event.latents for event in sampler if isinstance(event, ChunkDone)], dim=2)


def test_equals_the_loop_of_comfyui(network):
    """ComfyUI's sample_ar_video, written down with plain attention over a growing list of keys: start frame, re-noise seeds, short last
    chunk."""
    run = Run(frames=8, seed=5, noise="core")
    draw = torch.Generator().manual_seed(1)
    start, noise = torch.randn(1, 16, 1, 4, 6, generator=draw), torch.randn(1, 16, 8, 4, 6, generator=draw)
    prompt, rope, kept = context(network), cache(OFF).rope, {}

    def denoise(x, sigma, first, store):
        def attend(layer, q, k, v):
            q, k = (rope.apply(t, first, x.shape[2]) for t in (q, k))
            k, v = (torch.cat(pair, 1) for pair in zip(kept[layer], (k, v))) if layer in kept else (k, v)
            if store:
                kept[layer] = k, v
            return sdpa(q, k, v)

        return x - sigma * network(x, torch.full((1, x.shape[2]), 1000 * sigma), prompt, attend)

    denoise(start, 0.0, 0, True)
    expected, first = [start], 1
    before = torch.get_rng_state()
    for block, length in enumerate((3, 3, 1)):
        x = noise[:, :, first:first + length]
        for step, (sigma, following) in enumerate(zip(run.sigmas, run.sigmas[1:])):
            x = denoise(x, sigma, first, False)
            if following:
                torch.manual_seed(5 + block * 1000 + step)
                x = (1 - following) * x + following * torch.randn_like(x)
        denoise(x, 0.0, first, True)
        expected.append(x)
        first += length

    torch.set_rng_state(before)
    made = video(make(network, run, OFF, start=start, noise=noise))
    assert torch.equal(torch.get_rng_state(), before)
    assert (made - torch.cat(expected, 2)).abs().max() < 1e-5


@pytest.mark.parametrize(("frames", "start", "alone", "lengths"), [
    (7, 0, False, [3, 3, 1]), (7, 0, True, [1, 3, 3]), (8, 4, False, [1, 3, 3, 1]), (6, 6, False, [3, 3]), (2, 0, False, [2])])
def test_chunks_and_events(network, frames, start, alone, lengths):
    given = torch.randn(1, 16, start, 4, 6) if start else None
    sampler = make(network, Run(frames=frames, first_alone=alone, sigmas=(1, 0.5, 0)), start=given)
    planned = sampler.chunks
    events = list(sampler)
    done = [event for event in events if isinstance(event, ChunkDone)]
    assert [event.latents.shape[2] for event in done] == lengths
    assert [event.first for event in done] == [sum(lengths[:index]) for index in range(len(lengths))]
    generated = [event for event in done if event.chunk is not None]
    assert [event.chunk for event in generated] == list(range(planned))
    assert {event.chunks for event in events} == {planned}
    assert sum(isinstance(event, StepDone) for event in events) == 2 * planned
    assert done[-1].stats.frames == frames
    if start:
        assert torch.equal(torch.cat([event.latents for event in done if event.chunk is None], 2), given)


def test_stopping_and_going_on_changes_nothing(network):
    run = Run(frames=9, seed=3)
    whole = video(make(network, run))
    sampler, parts, leave = make(network, run), [], [(1, 2), (2, 0)]
    while sampler.frames_done < run.frames:
        for event in sampler:
            if isinstance(event, ChunkDone):
                parts.append(event.latents)
            elif (event.chunk, event.step) in leave:
                # between two steps, as an interrupt does
                leave.remove((event.chunk, event.step))
                break
    assert not leave
    assert torch.equal(torch.cat(parts, 2), whole)


def test_seed_and_batch(network):
    one, again, other = (video(make(network, Run(frames=4, seed=seed))) for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert (one - other).abs().mean() > 0.1
    both = video(make(network, Run(frames=4), shape=(2, *SHAPE[1:])))
    assert both.shape[0] == 2 and (both[0] - both[1]).abs().mean() > 0.1


def test_batch_equals_videos_alone(network):
    noise = torch.randn(2, 16, 6, 4, 6)
    run = Run(frames=6, sigmas=(1, 0))
    both = video(make(network, run, OFF, shape=(2, *SHAPE[1:]), noise=noise))
    for index in range(2):
        alone = video(make(network, run, OFF, noise=noise[index:index + 1]))
        assert (both[index:index + 1] - alone).abs().max() < 1e-5


def test_guidance_keeps_a_cache_for_each_prompt(network):
    """cfg 1 equals no guidance; at another cfg both histories count, as two networks beside each other say."""
    run = Run(frames=6)
    plain = video(make(network, run))
    caches = [cache(frames=6) for _ in range(2)]
    negative = context(network, 1)
    same = video(Sampler(CachedNetwork(network, guided(context(network), caches[0], negative, caches[1], 1.0)), run, SHAPE))
    assert (same - plain).abs().max() < 1e-4
    caches = [cache(frames=6) for _ in range(2)]
    strong = video(Sampler(CachedNetwork(network, guided(context(network), caches[0], negative, caches[1], 3.0)), run, SHAPE))
    assert (strong - plain).abs().mean() > 1e-3
    assert caches[0].frames == caches[1].frames == 6
    both, parts = CacheStats.total([one.stats() for one in caches]), [one.stats() for one in caches]
    assert both.stored_bytes == sum(part.stored_bytes for part in parts) == sum(both.by_kind.values()) == sum(both.by_layer)
    assert sum(both.by_bits.values()) == both.stored_bytes - both.by_kind["codebooks"]


def test_conditions_that_cannot_be(network):
    shared = cache()
    with pytest.raises(ValueError, match="share a KV cache"):
        CachedNetwork(network, guided(context(network), shared, context(network, 1), shared, 2.0))
    with pytest.raises(ValueError, match=r"add up to 2"):
        CachedNetwork(network, [Condition(context(network), cache()), Condition(context(network, 1), cache())])


def test_unfinished_sigmas_split_a_run_in_two(network):
    """The first pass leaves each chunk at the last sigma; a second pass continues from there."""
    first = video(make(network, Run(frames=6, sigmas=(1, 0.8, 0.5))))
    finished = video(make(network, Run(frames=6, sigmas=(0.5, 0.0)), noise=first))
    whole = video(make(network, Run(frames=6, sigmas=(1, 0.8, 0.5, 0.0))))
    # the first chunk has no history, so it is the same chain of steps; the next ones see another history
    assert torch.equal(finished[:, :, :3], whole[:, :, :3])
    assert (first - finished).abs().mean() > 0.1


def test_euler_steps_along_the_flow_without_noise(network):
    run = Run(frames=3, sigmas=(1.0, 0.96, 0.7, 0.0), solver="euler", seed=2)
    x = noise = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    model = CachedNetwork(network, [Condition(context(network), cache(OFF, 3))])
    for sigma, following in zip(run.sigmas, run.sigmas[1:]):
        flow = (x - model.denoise(x, sigma, 0, prompt_frame=0, store=False)) / sigma
        x = x + (following - sigma) * flow
    assert (video(make(network, run, OFF, noise=noise)) - x).abs().max() < 1e-5
    with pytest.raises(ValueError, match="solver is 'heun'; choose one of renoise, euler"):
        Run(frames=3, solver="heun")


def test_context_noise_changes_the_history_alone(network):
    clean, noisy = (video(make(network, Run(frames=6, context_noise=level))) for level in (0.0, 0.3))
    assert torch.equal(clean[:, :, :3], noisy[:, :, :3])
    assert (clean[:, :, 3:] - noisy[:, :, 3:]).abs().mean() > 1e-4


class ScarceMemory:
    """Attention on a device whose allocator allocates no more than `elements` for keys, like a full GPU."""

    def __init__(self, elements):
        self.elements = elements

    def __call__(self, q, k, v):
        if k.numel() > self.elements:
            raise torch.OutOfMemoryError("Tried to allocate more than there is.")
        return sdpa(q, k, v)


def test_memory_shortage_is_survived(network):
    """With memory for one head and six frames, heads are halved, then planes and then history are dropped; the video is still finished."""
    wide = CausalWan(WanSizes(dim=1024, ffn_dim=64, layers=2, text_dim=8)).requires_grad_(False).eval()
    settings = replace(SMALL, sink_frames=0, recent_frames=0)
    store = KVCache(settings, layers=2, heads=8, head_dim=128, grid=GRID, rope=Rope, dtype=torch.float32, chunk_frames=3)
    assert store.workspace.group == 2
    # the chunk alone attends with all eight heads, so this much must be there
    model = CachedNetwork(wide, [Condition(context(wide), store)], attention=ScarceMemory(3 * 6 * 1024))
    events = list(Sampler(model, Run(frames=120, sigmas=(1, 0)), SHAPE))
    said = [event.message for event in events if isinstance(event, Adapted)]
    assert "1 at a time" in said[0] and "hold fewer bits" in said[1] and "older half" in said[-1]
    assert store.frames == 120 and 0 < store.stats().held_frames < 60
    assert len({layer.held_frames for layer in store.layers}) == 1


def test_memory_shortage_without_a_way_out(network):
    model = CachedNetwork(network, [Condition(context(network), cache())], attention=ScarceMemory(10))
    with pytest.raises(torch.OutOfMemoryError):
        list(Sampler(model, Run(frames=3), SHAPE))


def test_rewinding_a_failed_pass_leaves_no_trace(network):
    """A pass that stores and fails half-way is repeated from the state before it."""
    store = cache(replace(SMALL, sink_frames=0), 9)
    model = CachedNetwork(network, [Condition(context(network), store)])
    sampler = Sampler(model, Run(frames=9), SHAPE)
    for event in sampler:
        if isinstance(event, ChunkDone) and event.chunk == 1:
            break
    held, nbytes = store.stats().held_frames, store.stats().stored_bytes
    k, v = torch.randn(2, 1, 18, 2, 128)
    store.layers[0].append(k, v, 3)
    store.rewind(6)
    assert (store.stats().held_frames, store.frames) == (held, 6)
    assert store.stats().stored_bytes <= nbytes


def test_a_window_and_a_position_limit(network):
    """Up to the limit, positions are absolute; beyond, a long run attends at the same distances and stays finite."""
    settings = replace(SMALL, window_frames=6)

    def made(limit, frames):
        model = CachedNetwork(network, [Condition(context(network), cache(settings, frames))], position_limit=limit)
        return video(Sampler(model, Run(frames=frames, sigmas=(1, 0)), SHAPE))

    free, limited = made(0, 30), made(15, 30)
    assert torch.equal(free[:, :, :15], limited[:, :, :15])
    assert limited.isfinite().all()
    assert not torch.equal(free[:, :, 15:], limited[:, :, 15:])


def test_relative_positions_are_a_shift_of_absolute_ones(network):
    """Without sinks, attention depends on distances alone, so a limit changes nothing but rounding."""
    settings = replace(OFF, window_frames=6)

    def made(limit):
        model = CachedNetwork(network, [Condition(context(network), cache(settings, 30))], position_limit=limit)
        return video(Sampler(model, Run(frames=30, sigmas=(1, 0)), SHAPE))

    assert (made(0) - made(12)).abs().max() < 1e-3


@pytest.mark.parametrize(("change", "words"), [
    ({"sigmas": (1, 0.5, 0.5)}, "that fall"), ({"sigmas": (1.0,)}, "give 2 to"), ({"frames": 0}, "at least 1"),
    ({"context_noise": 1.0}, "below 1"), ({"noise": "gpu"}, "private, core")])
def test_impossible_runs_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        Run(**{"frames": 3} | change)


def test_start_and_noise_must_fit(network):
    with pytest.raises(ValueError, match="does not fit a video of 3 latent frames"):
        make(network, Run(frames=3), start=torch.zeros(1, 16, 4, 4, 6))
    with pytest.raises(ValueError, match="The noise has shape"):
        make(network, Run(frames=3), noise=torch.zeros(1, 16, 2, 4, 6))


class TestOnGPU:
    pytestmark = on_gpu

    @pytest.mark.parametrize("step", ["start", 0, 3])
    def test_noise_is_that_of_the_cpu(self, network, step):
        cpu, gpu = (Sampler(CachedNetwork(network, [Condition(context(network), cache())]), Run(frames=3), SHAPE, device=device)
                    for device in ("cpu", "cuda"))
        assert torch.equal(cpu._draw(3, step), gpu._draw(3, step).cpu())

    def test_a_full_gpu_is_survived(self):
        """In a process of its own, because blocks that other tests leave in the allocator would change what is free."""
        test = f"{__file__}::TestOnGPU::test_with_less_memory_than_needed"
        found = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test], capture_output=True, text=True,
                               env={**os.environ, ALONE: "1"})
        assert found.returncode == 0 and "1 passed" in found.stdout, found.stdout[-3000:]

    @pytest.mark.skipif(ALONE not in os.environ, reason="run by the test before, in a process of its own")
    def test_with_less_memory_than_needed(self):
        """The same run with two fifths less for its cache than it took before: something is given up, and the video is finished."""
        network = CausalWan(WanSizes(dim=1024, ffn_dim=64, layers=2, text_dim=8)).requires_grad_(False).eval().cuda()
        prompt = network.project_context(torch.randn(1, 3, 8, device="cuda"))

        def made(frames):
            store = KVCache(QVGSettings.preset("quality"), layers=2, heads=8, head_dim=128, grid=(16, 24), rope=Rope, device="cuda",
                            dtype=torch.float32)
            try:
                return list(Sampler(CachedNetwork(network, [Condition(prompt, store)]), Run(frames=frames, sigmas=(1, 0)),
                                    (1, 16, 32, 48), device="cuda"))
            finally:
                store.free()

        made(6)  # what libraries allocate once and keep is no part of the measured run
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        events = made(90)
        assert not any(isinstance(event, Adapted) for event in events)
        # The run needed `needed`, of which `held` was its cache (both are most at the end) and the rest what a pass computes with, which
        # giving up cannot lessen. With less than `needed` something must be given up. A history of a few frames and a workspace of one
        # head come to a tenth of `held`, so that with 60 % of it a half of `held` is left to an allocator that wastes some.
        needed, held = torch.cuda.max_memory_allocated() - before, events[-1].stats.peak_bytes
        assert held < needed
        torch.cuda.empty_cache()
        limit = torch.cuda.memory_allocated() + needed - 0.4 * held
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
        try:
            events = made(90)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert any(isinstance(event, Adapted) for event in events)
        assert sum(event.latents.shape[2] for event in events if isinstance(event, ChunkDone)) == 90
        assert events[-1].stats.peak_bytes < held


@pytest.mark.parametrize("first_alone", [False, True])
@pytest.mark.parametrize("chunk_frames", [1, 3, 4])
def test_chunks_are_counted_without_making_them(chunk_frames, first_alone):
    run = Run(frames=9, chunk_frames=chunk_frames, first_alone=first_alone)
    for first in range(10):
        for stop in range(10):
            assert run.chunk_count(first, stop) == len(list(run.chunk_lengths(first, stop)))


def test_an_error_after_a_chunk_does_not_lose_it(network, monkeypatch):
    """Statistics fail once for start frames and once for a chunk: the position stays, and who iterates again gets every frame."""
    run, given = Run(frames=10, seed=3, sigmas=(1, 0.5, 0)), torch.randn(1, 16, 4, 4, 6)
    whole = video(make(network, run, start=given))
    sampler, stats, calls, parts = make(network, run, start=given), CachedNetwork.stats, [], {}

    def failing(self):
        calls.append(sampler.frames_done)
        if len(calls) in (2, 4):
            raise ArithmeticError("no statistics")
        return stats(self)

    monkeypatch.setattr(CachedNetwork, "stats", failing)
    for expected in (1, 4, None):
        try:
            for event in sampler:
                if isinstance(event, ChunkDone):
                    assert event.first not in parts
                    parts[event.first] = event.latents
        except ArithmeticError:
            assert sampler.frames_done == sum(part.shape[2] for part in parts.values()) == expected and not sampler.settled
        else:
            assert expected is None
    made = torch.cat([parts[first] for first in sorted(parts)], 2)
    # what is stored twice trains its codebooks from other random numbers
    assert torch.equal(made[:, :, :4], given) and made.shape == whole.shape and (made - whole).abs().mean() < 0.1
