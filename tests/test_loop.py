"""The chunk loop step by step: what a model is asked, in which order, with which noise, and what happens when a pass fails."""

import hashlib
from dataclasses import replace
from itertools import product

import pytest
import torch

from comfyui_qvg.qvg.settings import QVGSettings
from comfyui_qvg.qvg.video import (
    SELF_FORCING_SIGMAS,
    Adapted,
    ChunkDone,
    Run,
    Sampler,
    StepDone,
    check_positions,
)

# large enough that a mean of squares of noise is 1 within a few percent
SHAPE = (1, 4, 32, 32)


class Script:
    """A model that writes down what it is asked. It predicts a tenth of what it is given, plus its frame. `prompts`: the frames at which
    they change; `failing`: numbers of calls that run out of memory; `spare`: how often it can give something up."""

    caches = ()

    def __init__(self, prompts=(), failing=(), spare=0):
        self.prompts, self.failing, self.spare = prompts, set(failing), spare
        self.calls, self.inputs, self.said = [], [], []

    def denoise(self, x, sigma, first, *, prompt_frame, store):
        self.calls.append((first, x.shape[2], round(sigma, 6), prompt_frame, store))
        self.inputs.append(x.clone())
        if len(self.calls) - 1 in self.failing:
            raise torch.OutOfMemoryError("full")
        return 0.1 * x + first

    def prompt(self, frame):
        return str(sum(frame >= change for change in self.prompts))

    def rewind(self, first):
        self.calls.append(("rewind", first))
        self.inputs.append(None)

    def shrink(self):
        self.spare -= 1
        return "less" if self.spare >= 0 else None

    def stats(self):
        return None


def played(run, model=None, **options):
    model = model or Script()
    sampler = Sampler(model, run, SHAPE, **options)
    return model, sampler, list(sampler)


def assert_noise(x):
    """Standard noise, of at least about 4,000 elements."""
    assert abs(x.mean().item()) < 0.06 and x.std().item() == pytest.approx(1, abs=0.06)


def test_the_calls_of_a_run():
    """Every chunk: a pass at each sigma but the last, and the clean pass that stores."""
    model, sampler, events = played(Run(frames=5, sigmas=(1, 0.75, 0.5, 0)))
    assert model.calls == [(0, 3, 1.0, 0, False), (0, 3, 0.75, 0, False), (0, 3, 0.5, 0, False), (0, 3, 0.0, 0, True),
                           (3, 2, 1.0, 3, False), (3, 2, 0.75, 3, False), (3, 2, 0.5, 3, False), (3, 2, 0.0, 3, True)]
    steps = [event for event in events if isinstance(event, StepDone)]
    assert [(event.chunk, event.chunks, event.step, event.steps, event.first) for event in steps] == [
        (0, 2, 0, 3, 0), (0, 2, 1, 3, 0), (0, 2, 2, 3, 0), (1, 2, 0, 3, 3), (1, 2, 1, 3, 3), (1, 2, 2, 3, 3)]
    done = [event for event in events if isinstance(event, ChunkDone)]
    assert [(event.chunk, event.chunks, event.first, event.latents.shape[2]) for event in done] == [(0, 2, 0, 3), (1, 2, 3, 2)]
    assert (sampler.frames_done, sampler.chunk, sampler.chunks, sampler.settled) == (5, 2, 2, True)


def test_the_values_of_a_run():
    """x = noise * first sigma; then (1 - sigma) * denoised + sigma * new noise; what is stored and returned is the last prediction."""
    model, _, events = played(Run(frames=6, sigmas=(0.8, 0.25, 0)))
    drawn = []
    for first, (begin, middle, stored) in ((0, model.inputs[:3]), (3, model.inputs[3:])):
        assert begin.shape == (1, 4, 3, 32, 32) and begin.dtype == torch.float32
        drawn += [begin / 0.8, (middle - 0.75 * (0.1 * begin + first)) / 0.25]
        torch.testing.assert_close(stored, 0.1 * middle + first)
    for noise in drawn:
        assert_noise(noise)
    together = torch.stack([noise.flatten() for noise in drawn])
    assert (torch.corrcoef(together) - torch.eye(4)).abs().max() < 0.06
    done = [event.latents for event in events if isinstance(event, ChunkDone)]
    assert torch.equal(done[0], model.inputs[2]) and torch.equal(done[1], model.inputs[5])
    steps = [event.denoised for event in events if isinstance(event, StepDone)]
    assert torch.equal(steps[0], 0.1 * model.inputs[0]) and torch.equal(steps[3], 0.1 * model.inputs[4] + 3)


def test_renoise_is_the_callers():
    """A function of the caller's adds the noise, between two steps and for context noise, with the noise of the default."""
    calls = []

    def edm(denoised, sigma, noise):
        calls.append((denoised, sigma, noise))
        return denoised + sigma * noise

    run = Run(frames=6, sigmas=(80, 2, 0.5, 0), context_noise=0.25)
    model, _, events = played(run, renoise=edm)
    assert [sigma for _, sigma, _ in calls] == 2 * [2, 0.5, 0.25]
    steps = [event.denoised for event in events if isinstance(event, StepDone)]
    assert [id(denoised) for denoised, _, _ in calls] == [id(steps[index]) for index in (0, 1, 2, 3, 4, 5)]
    assert all(torch.equal(x, denoised + sigma * noise) for x, (denoised, sigma, noise) in zip(
        [model.inputs[index] for index in (1, 2, 3, 5, 6, 7)], calls))
    assert_noise(model.inputs[0] / 80)
    for noise in (noise for _, _, noise in calls):
        assert_noise(noise)
    drawn = []
    played(replace(run, sigmas=(1, 0.8, 0.5, 0)), renoise=lambda denoised, _, noise: drawn.append(noise) or denoised)
    assert all(torch.equal(noise, same) for (_, _, noise), same in zip(calls, drawn, strict=True))


def test_the_default_renoise_is_that_of_flow_matching():
    run = Run(frames=6, sigmas=(1, 0.75, 0.5, 0), context_noise=0.1)
    plain, _, _ = played(run)
    same, _, _ = played(run, renoise=lambda denoised, sigma, noise: (1.0 - sigma) * denoised + sigma * noise)
    assert all(torch.equal(a, b) for a, b in zip(plain.inputs, same.inputs, strict=True))


def test_a_flow_model_has_sigmas_of_at_most_one():
    with pytest.raises(ValueError, match=r"The sigmas are 1\.1, 0; .*pass its renoise"):
        Sampler(Script(), Run(frames=3, sigmas=(1.1, 0)), SHAPE)


@pytest.mark.parametrize("grad", [True, False])
def test_the_callers_grad_mode_is_its_own(grad):
    """The model runs without gradients, and between two events the caller has the mode that it chose."""
    modes = []

    class Watched(Script):
        def denoise(self, *args, **kwargs):
            modes.append(torch.is_grad_enabled())
            return super().denoise(*args, **kwargs)

    with torch.set_grad_enabled(grad):
        for event in Sampler(Watched(failing=[1], spare=1), Run(frames=6, sigmas=(1, 0)), SHAPE):
            assert torch.is_grad_enabled() == grad, event
        assert torch.is_grad_enabled() == grad
        for _ in Sampler(Watched(), Run(frames=6), SHAPE):
            break
        assert torch.is_grad_enabled() == grad
    assert modes and not any(modes)


@pytest.mark.parametrize("level", [0.1, 0.5])
def test_context_noise(level):
    """The pass that stores sees (1 - level) * clean + level * noise and is told this level; what is returned stays clean."""
    model, _, events = played(Run(frames=6, sigmas=(1, 0), context_noise=level))
    assert [call[2] for call in model.calls] == [1.0, level, 1.0, level]
    clean = [event.latents for event in events if isinstance(event, ChunkDone)]
    noises = [(stored - (1 - level) * latents) / level for stored, latents in zip(model.inputs[1::2], clean)]
    for noise in noises:
        assert_noise(noise)
    others = [*noises, *model.inputs[::2]]
    assert (torch.corrcoef(torch.stack([noise.flatten() for noise in others])) - torch.eye(4)).abs().max() < 0.06


def test_context_noise_of_given_frames():
    start = torch.full((1, 4, 4, 32, 32), 5.0)
    model, _, events = played(Run(frames=4, context_noise=0.2), start=start)
    assert [call[:3] for call in model.calls] == [(0, 1, 0.2), (1, 3, 0.2)]
    assert_noise((model.inputs[0] - 4) / 0.2)
    assert all((event.latents == 5).all() and event.chunk is None for event in events)


def test_noise_depends_on_seed_chunk_and_step():
    def first(seed, noise="private"):
        return played(Run(frames=6, sigmas=(1, 0.5, 0), seed=seed, noise=noise))[0].inputs

    assert all(torch.equal(a, b) for a, b in zip(first(4), first(4)))
    assert all(not torch.equal(a, b) for a, b in zip(first(4), first(5)))
    assert not torch.equal(first(4)[0], first(4)[3])


def test_noise_is_the_same_in_every_release():
    """A session of an earlier release continues with the noise that it would have had: of a torch generator seeded with 63 bits of a
    hash of seed, chunk and step."""
    model, _, _ = played(Run(frames=6, sigmas=(1, 0.5, 0), seed=12))
    for chunk, step, found in ((0, "start", model.inputs[0]), (0, 0, 2 * (model.inputs[1] - 0.05 * model.inputs[0])),
                               (1, "start", model.inputs[3])):
        digest = hashlib.blake2b(f"12/{chunk}/{step}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") // 2)
        torch.testing.assert_close(found, torch.randn(1, 4, 3, 32, 32, generator=generator), rtol=1e-4, atol=1e-5)


def test_noise_of_core():
    """ComfyUI seeds torch with seed + 1000 * chunk + step and draws on the device; the first noise of a chunk is given or ours."""
    given = torch.randn(1, 4, 6, 32, 32)
    model, _, _ = played(Run(frames=6, sigmas=(1, 0.5, 0.25, 0), seed=7, noise="core"), noise=given)
    for chunk in range(2):
        begin, *later = model.inputs[4 * chunk:4 * chunk + 3]
        assert torch.equal(begin, given[:, :, 3 * chunk:3 * chunk + 3])
        for step, (x, sigma) in enumerate(zip(later, (0.5, 0.25))):
            expected = torch.randn(1, 4, 3, 32, 32, generator=torch.Generator().manual_seed(7 + 1000 * chunk + step))
            before = model.inputs[4 * chunk + step]
            torch.testing.assert_close(x, (1 - sigma) * (0.1 * before + 3 * chunk) + sigma * expected)


def test_sigmas_that_do_not_end_in_zero():
    """What is returned has noise of the last sigma; what is stored is clean."""
    model, _, events = played(Run(frames=3, sigmas=(1, 0.5)))
    (done,) = (event for event in events if isinstance(event, ChunkDone))
    assert torch.equal(model.inputs[1], 0.1 * model.inputs[0]) and model.calls[1][2:] == (0.0, 0, True)
    assert_noise((done.latents - 0.5 * model.inputs[1]) / 0.5)


@pytest.mark.parametrize(("frames", "chunk", "alone", "lengths"), [
    (7, 3, False, [3, 3, 1]), (7, 3, True, [1, 3, 3]), (1, 3, True, [1]), (4, 1, True, [1, 1, 1, 1]), (6, 3, False, [3, 3]),
    (2, 5, False, [2])])
def test_lengths_of_chunks(frames, chunk, alone, lengths):
    run = Run(frames=frames, chunk_frames=chunk, first_alone=alone, sigmas=(1, 0))
    assert list(run.chunk_lengths(0, frames)) == lengths and run.steps == 1
    model, sampler, _ = played(run)
    assert [call[1] for call in model.calls if call[-1]] == lengths and sampler.chunk == len(lengths)


def test_pieces_from_the_middle():
    """The first frame is alone only where it is the first."""
    assert list(Run(frames=9, first_alone=True).chunk_lengths(4, 9)) == [3, 2]
    assert list(Run(frames=9).chunk_lengths(9, 9)) == []
    assert [Run(frames=9).start_chunk_lengths(frames) for frames in (0, 1, 3, 4, 8)] == [[], [1], [3], [1, 3], [2, 3, 3]]


def test_given_frames_are_stored_and_then_others_are_made():
    start = torch.arange(4.0).view(1, 1, 4, 1, 1).expand(1, 4, 4, 32, 32)
    model, sampler, events = played(Run(frames=8, sigmas=(1, 0), first_alone=True), start=start)
    assert model.calls == [(0, 1, 0.0, 0, True), (1, 3, 0.0, 1, True), (4, 3, 1.0, 4, False), (4, 3, 0.0, 4, True),
                           (7, 1, 1.0, 7, False), (7, 1, 0.0, 7, True)]
    assert torch.equal(torch.cat(model.inputs[:2], 2), start)
    done = [event for event in events if isinstance(event, ChunkDone)]
    assert [event.chunk for event in done] == [None, None, 0, 1] and {event.chunks for event in done} == {2}
    assert sampler.chunk == 2


@pytest.mark.parametrize(("recache", "again"), [(0, []), (1, [(3, 3)]), (3, [(3, 3)]), (4, [(0, 3), (3, 3)]), (99, [(0, 3), (3, 3)])])
def test_a_new_prompt_stores_the_newest_frames_again(recache, again):
    """Whole chunks, as many as hold so many frames, from their clean latents and under the new prompt; the history before them is kept."""
    model, sampler, events = played(Run(frames=9, sigmas=(1, 0), recache_frames=recache), Script(prompts=(6,)))
    stored = [(first, length, 0.0, 6, True) for first, length in again]
    assert model.calls == [(0, 3, 1.0, 0, False), (0, 3, 0.0, 0, True), (3, 3, 1.0, 3, False), (3, 3, 0.0, 3, True),
                           *([("rewind", again[0][0])] if again else []), *stored, (6, 3, 1.0, 6, False), (6, 3, 0.0, 6, True)]
    clean = {event.first: event.latents for event in events if isinstance(event, ChunkDone)}
    for (first, _), x in zip(again, model.inputs[5:]):
        assert torch.equal(x, clean[first])
    assert sampler.last_prompt == "1" and sampler.settled


def test_the_same_prompt_stores_nothing_again():
    model, _, _ = played(Run(frames=9, sigmas=(1, 0), recache_frames=3), Script(prompts=(4, 9)))
    # frame 4 begins in the middle of a chunk: the prompt counts from frame 6 on, and that at 9 never does
    assert [call for call in model.calls if call[0] == "rewind"] == [("rewind", 3)]


def test_noise_of_what_is_stored_again_is_new():
    model, _, events = played(Run(frames=9, sigmas=(1, 0), recache_frames=3, context_noise=0.5), Script(prompts=(6,)))
    clean = {event.first: event.latents for event in events if isinstance(event, ChunkDone)}
    assert model.calls[5] == (3, 3, 0.5, 6, True)
    assert_noise(2 * (model.inputs[5] - 0.5 * clean[3]))


@pytest.mark.parametrize("failing", [0, 1, 2, 5])
def test_a_pass_that_runs_out_of_memory_is_made_again(failing):
    """With less memory; a pass that stores is rewound first, because some layers may have stored already."""
    run = Run(frames=6, sigmas=(1, 0.5, 0))
    whole = played(run)[0]
    model, _, events = played(run, Script(failing=[failing], spare=1))
    again = whole.calls[failing]
    rewound = [("rewind", again[0])] if again[-1] else []
    assert model.calls == [*whole.calls[:failing + 1], *rewound, again, *whole.calls[failing + 1:]]
    assert [event.message for event in events if isinstance(event, Adapted)] == ["less"]
    inputs = [x for x in model.inputs if x is not None]
    assert torch.equal(inputs[failing], inputs[failing + 1])
    assert all(torch.equal(a, b) for a, b in zip(inputs[failing + 1:], whole.inputs[failing:]))


def test_a_pass_that_fails_again_gives_up_more_until_nothing_is_left():
    model = Script(failing=[0, 1, 2], spare=3)
    assert sum(isinstance(event, Adapted) for event in played(Run(frames=3), model)[2]) == 3
    with pytest.raises(torch.OutOfMemoryError):
        played(Run(frames=3), Script(failing=[0, 1, 2], spare=2))


def test_a_run_that_broke_off_while_it_stored_begins_with_that_chunk():
    """What was stored of it is rewound."""
    model = Script(failing=[3])
    sampler = Sampler(model, Run(frames=6, sigmas=(1, 0)), SHAPE)
    with pytest.raises(torch.OutOfMemoryError):
        list(sampler)
    assert (sampler.frames_done, sampler.chunk, sampler.settled) == (3, 1, False)
    failed = len(model.calls)
    list(sampler)
    assert model.calls[failed:] == [("rewind", 3), (3, 3, 1.0, 3, False), (3, 3, 0.0, 3, True)]
    assert sampler.settled and sampler.frames_done == 6


@pytest.mark.parametrize(("window", "sink", "frames", "limit", "allowed"), [
    # three sinks, six of the window and five that overhang it: 14 frames
    (6, 3, 30, 14, None), (6, 3, 30, 13, 13 - 3 - 6 + 1), (0, 3, 30, 30, None), (0, 3, 30, 29, 29 - 3 - 6 + 1), (6, 3, 12, 12, None),
    (6, 3, 30, 0, None), (6, 3, 30, 5, 0)])
def test_positions_that_a_network_can_tell_apart(window, sink, frames, limit, allowed):
    settings = QVGSettings(window_frames=window, sink_frames=sink)
    if allowed is None:
        check_positions(settings, Run(frames=frames), limit)
    else:
        with pytest.raises(ValueError, match=rf"positions are limited to {limit}\. Set a window of at most {allowed} frames"):
            check_positions(settings, Run(frames=frames), limit)


def test_what_runs_default_to():
    run = Run(frames=3)
    assert run.sigmas == SELF_FORCING_SIGMAS == (1.0, 0.9375, 0.8333333333333334, 0.625, 0.0) and run.steps == 4
    assert (run.chunk_frames, run.seed, run.first_alone, run.noise) == (3, 0, False, "private")
    assert (run.context_noise, run.recache_frames) == (0, 0)


@pytest.mark.parametrize(("changes", "words"), [
    ({"frames": 0}, "frames is 0"), ({"chunk_frames": 0}, "chunk_frames is 0"), ({"recache_frames": -1}, "recache_frames is -1"),
    ({"sigmas": (1e5, 0)}, "The sigmas are 100000, 0"), ({"sigmas": (1, -0.1)}, "at least 0"), ({"sigmas": ()}, "The sigmas are empty"),
    ({"sigmas": (0.5, 0.5)}, "that fall"), ({"context_noise": -0.1}, "at least 0"), ({"context_noise": 1}, "below 1")])
def test_runs_that_cannot_be(changes, words):
    with pytest.raises(ValueError, match=words):
        Run(**{"frames": 3} | changes)


SIGMAS = [1 - step / 20_000 for step in range(10_001)]


@pytest.mark.parametrize("changes", [
    {"frames": 1}, {"frames": 1_000_000}, {"chunk_frames": 1}, {"chunk_frames": 256}, {"sigmas": (1, 0.5)}, {"sigmas": SIGMAS},
    {"sigmas": (1e4, 0)}, {"context_noise": 0.99}, {"recache_frames": 0}, {"recache_frames": 1_000_000}, {"seed": 0}, {"seed": 2**64 - 1}])
def test_runs_that_just_can_be(changes):
    Run(**{"frames": 3} | changes)


@pytest.mark.parametrize(("changes", "words"), [
    ({"frames": 1_000_001}, "frames is 1000001"), ({"chunk_frames": 257}, "chunk_frames is 257"),
    ({"sigmas": [*SIGMAS, 0]}, "give 2 to 10001"),
    ({"recache_frames": 1_000_001}, "at most 1000000"), ({"seed": -1}, "seed is -1"), ({"seed": 2**64}, "seed is 18446744073709551616"),
    ({"frames": 3.0}, "frames is 3.0"), ({"frames": True}, "frames is True"), ({"seed": "1"}, "seed is '1'"),
    ({"first_alone": 1}, "first_alone is 1"), ({"noise": "gpu"}, "choose one of private, core")])
def test_runs_that_just_cannot_be(changes, words):
    with pytest.raises(ValueError, match=words):
        Run(**{"frames": 3} | changes)


def test_how_many_chunks_there_are():
    for chunk, alone, first, stop in product((1, 3, 4), (False, True), range(9), range(9)):
        run = Run(frames=9, chunk_frames=chunk, first_alone=alone)
        assert run.chunk_count(first, stop) == len(list(run.chunk_lengths(first, stop)))


@pytest.mark.parametrize("level", [-0.1, 1.0, 1.5, float("nan")])
def test_context_noise_is_a_part(level):
    with pytest.raises(ValueError, match="context_noise"):
        Run(frames=3, context_noise=level)
    assert Run(frames=3, context_noise=0.99).context_noise == 0.99
