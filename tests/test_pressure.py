"""Little memory, and settings at their limits: what gives way, for whom, and what is refused."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import nn

from comfyui_qvg.benchmarks.planes import PLANES
from comfyui_qvg.qvg.attention.rope import Rope
from comfyui_qvg.qvg.backends.memory import ran_out
from comfyui_qvg.qvg.cache.forecast import forecast
from comfyui_qvg.qvg.cache.geometry import Geometry
from comfyui_qvg.qvg.cache.kv_cache import KVCache, shrink
from comfyui_qvg.qvg.settings import CODECS, PRESETS, QVGSettings, TensorSettings
from comfyui_qvg.qvg.units import GIB
from comfyui_qvg.qvg.video import Adapted, CachedNetwork, ChunkDone, Condition, Run, Sampler, guided

HEADS, DIM = 8, 64
SETTINGS = replace(PLANES["quality"].both(centroids=4), sink_frames=1, iterations=1)


def too_much() -> torch.Tensor:
    """What no machine has, of torch's own allocator."""
    return torch.empty(1 << 60, dtype=torch.uint8)


class Attends(nn.Module):
    """A layer of self-attention over latents [B, 16, F, 2, 2] as tokens. full: numbers of the passes that find no memory."""

    def __init__(self, full=(), allocate=too_much):
        super().__init__()
        self.full, self.allocate, self.passes = set(full), allocate, 0

    def forward(self, x, timestep, context, attend):
        self.passes += 1
        if self.passes in self.full:
            self.allocate()
        tokens = x.permute(0, 2, 3, 4, 1).flatten(1, 3).unflatten(-1, (1, 16)).repeat(1, 1, HEADS, DIM // 16) * context
        out = attend(0, tokens, tokens, tokens).mean(2)[..., :16]
        return out.unflatten(1, x.shape[2:]).permute(0, 4, 1, 2, 3).contiguous()


def cache(settings=SETTINGS) -> KVCache:
    return KVCache(settings, layers=1, heads=HEADS, head_dim=DIM, grid=(2, 2), rope=Rope, dtype=torch.float32, max_frames=8, chunk_frames=2)


def state(kept: KVCache) -> tuple:
    return kept.workspace.group, [[(entry.first, entry.frames, entry.key_bits, entry.value_bits) for entry in layer.entries]
                                  for layer in kept.layers]


def run_of(network: Attends):
    """Events of a video with guidance, and the states of both caches after each."""
    model = CachedNetwork(network, guided(1.0, cache(), 0.5, cache(), 2.0))
    events = [(event, [state(kept) for kept in model.caches])
              for event in Sampler(model, Run(frames=8, chunk_frames=2, sigmas=(1.0, 0.5, 0.0)), (1, 16, 2, 2))]
    return model, events


def test_conditions_of_a_run_give_up_the_same():
    """Step by step until nothing is left: guidance compares predictions, which must not differ by what the caches forgot."""
    model, _ = run_of(Attends())
    said = []
    while (message := model.shrink()) is not None:
        said.append(message)
        assert state(model.caches[0]) == state(model.caches[1]), message
    assert "decoded 1 at a time" in said[0] and "fewer bits" in said[1] and "older half" in said[-1]
    # alone, a cache gives up as much
    single, one = CachedNetwork(Attends(), [Condition(1.0, cache())]), []
    for event in Sampler(single, Run(frames=8, chunk_frames=2, sigmas=(1.0, 0.5, 0.0)), (1, 16, 2, 2)):
        assert isinstance(event, ChunkDone) or event.first >= 0
    while (message := shrink(single.caches)) is not None:
        one.append(message)
    assert one == said


# of the six passes of a chunk, three for each condition, one that reads and the second one that stores
@pytest.mark.parametrize("full", [(14,), (18,), (24, 26), (17, 20, 22, 23, 24, 25)], ids=str)
def test_a_cpu_without_memory_gives_up_something_too(full):
    """torch's own error on a CPU is no torch.OutOfMemoryError. The video is finished, and both conditions hold the same."""
    events = run_of(Attends(full))[1]
    assert sum(isinstance(event, ChunkDone) for event, _ in events) == 4
    assert sum(isinstance(event, Adapted) for event, _ in events) == len(full)
    for event, (first, second) in events:
        # in a pass that stores, the first condition is ahead of the second one until it is tried again
        assert first == second or isinstance(event, Adapted), event


def test_other_errors_end_the_run():
    def broken():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        run_of(Attends((3,), broken))


@pytest.mark.parametrize(("error", "expected"), [
    (MemoryError(), True), (torch.OutOfMemoryError("full"), True), (RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"), True),
    (RuntimeError("Triton Error [CUDA]: out of memory"), True), (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), True),
    (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"), True),
    (RuntimeError("expected scalar type Half"), False), (ValueError("out of memory"), False), (OSError("Cannot allocate memory"), False)])
def test_what_says_that_memory_ran_out(error, expected):
    assert ran_out(error) == expected


def test_this_machine_says_so():
    with pytest.raises(RuntimeError) as raised:
        too_much()
    assert ran_out(raised.value)


def trained(seed: int) -> torch.Tensor:
    x = torch.randn(1, 200, HEADS, DIM, generator=torch.Generator().manual_seed(1))
    kept = KVCache(replace(SETTINGS, seed=seed, sink_frames=0, recent_frames=0), layers=1, heads=HEADS, head_dim=DIM, grid=(10, 20),
                   rope=Rope, dtype=torch.float32)
    kept.layers[0].append(x, x, 1)
    return kept.layers[0].entries[0].spans[0].codebook.centroids


def test_every_seed_that_is_allowed_serves():
    seeds = (0, 1, 2**44 + 2, 2**62 + 3, 2**63 - 1)  # torch's own generators look at the lowest 32 bits
    found = [trained(seed) for seed in seeds]
    assert all(not torch.equal(a, b) for n, a in enumerate(found) for b in found[:n])
    assert torch.equal(trained(seeds[-1]), found[-1])


@pytest.mark.parametrize("seed", [2**63 - 1, 2**64 - 1])
def test_seeds_of_comfyui_serve_core_noise(seed):
    """Its widgets go up to 2 ** 64 - 1."""
    model = CachedNetwork(Attends(), [Condition(1.0, cache())])
    run = Run(frames=4, chunk_frames=2, sigmas=(1.0, 0.5, 0.0), seed=seed, noise="core")
    done = [event.latents for event in Sampler(model, run, (1, 16, 2, 2)) if isinstance(event, ChunkDone)]
    assert len(done) == 2 and all(latents.isfinite().all() for latents in done)


@pytest.mark.parametrize(("name", "bits"), [*product(("key", "value"), (1, 2, 3, 4))])
def test_the_plain_codec_has_no_planes(name, bits):
    off = PRESETS["off"]
    with pytest.raises(ValueError, match=f"{name} is to hold {bits} bits, but the plain codec"):
        replace(off, **{name: replace(getattr(off, name), bits=bits)})


def test_settings_that_are_accepted_hold_what_they_say():
    """All codecs with all bits of K, V, sinks and recent frames: refused with a sentence, or kept by a cache to the letter."""
    kept = 0
    widths = (1, 2, 4, 8, 16)
    for codec, key, value, sink, recent in product(CODECS, widths, (2, 16), (2, 16), (0, 4, 8)):
        tensors = {"key": TensorSettings(bits=key, centroids=2, group=64), "value": TensorSettings(bits=value, centroids=2, group=64)}
        try:
            settings = QVGSettings(codec=codec, **tensors, sink_frames=1, sink_bits=sink, recent_frames=int(bool(recent)),
                                   recent_bits=recent or 4, iterations=1)
        except ValueError as error:
            assert str(error).endswith(".") and len(str(error)) > 40
            continue
        made = KVCache(settings, layers=1, heads=1, head_dim=DIM, grid=(5, 8), rope=Rope, dtype=torch.float32)
        for frame in range(3):
            x = torch.randn(1, 40, 1, DIM, generator=torch.Generator().manual_seed(frame))
            made.layers[0].append(x, x, 1)
        least = [(max(sink, key), max(sink, value)), (key, value), (max(recent, key), max(recent, value))]
        assert all(entry.key_bits >= a and entry.value_bits >= b for entry, (a, b) in zip(made.layers[0].entries, least, strict=True))
        for entry in made.layers[0].entries:
            for span in entry.spans:
                coded = {"qvg": "PlaneSpan", "paper": "PaperSpan", "transform": "TransformSpan"}.get(codec)
                assert type(span).__name__ in {"PlainSpan", coded}
        kept += 1
    assert kept >= 80


@pytest.mark.parametrize(("change", "expected"), [
    ({}, True), ({"window_frames": 4}, False), ({"budget_gib": 2.0}, False), ({"offload": True}, False),
    ({"value": TensorSettings(bits=8, stages=0)}, False), ({"sink_frames": 3}, True)])
def test_off_changes_nothing_unless_it_is_told_to(change, expected):
    """Where it does, a cache of ours does the work; core's own knows neither windows nor budgets."""
    assert replace(PRESETS["off"], **change).changes_nothing == expected
    assert not PRESETS["balanced"].changes_nothing


@pytest.mark.parametrize(("chunk", "offload", "gib"), [*product((1, 3, 5), (False, True), (4, 12)), (2, False, 4)])
def test_the_paper_codec_uses_its_budget(chunk, offload, gib):
    """Its codebooks are trained by the chunk, whatever frames that has. What fits is kept, and no more."""
    geometry = Geometry(30, 12, 128, (30, 52), buffers=2)
    planned = forecast(replace(PRESETS["paper"], budget_gib=gib, offload=offload), geometry, 1500, chunk)
    assert 0.9 * gib * GIB < planned.peak_bytes <= gib * GIB
    for first in (1, 2):
        assert forecast(replace(PRESETS["paper"], budget_gib=gib, offload=offload), geometry, 1500, chunk, first).peak_bytes <= gib * GIB
