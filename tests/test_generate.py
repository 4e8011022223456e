"""`qvg generate`: resume, interrupt, prompts over time, flat memory, killed processes; the tiny model where its weights are."""

from contextlib import closing
from dataclasses import replace

import av
import numpy as np
import pytest
import torch

from comfyui_qvg.benchmarks import soak
from comfyui_qvg.qvg import storage
from comfyui_qvg.qvg.demo import NETWORK_PATH, VAE_PATH
from comfyui_qvg.qvg.generate import generate, resumed
from comfyui_qvg.qvg.sampler import ChunkDone, StepDone
from comfyui_qvg.qvg.schedule import Schedule
from comfyui_qvg.qvg.stream import encode_stream

trained = pytest.mark.skipif(not (NETWORK_PATH.is_file() and VAE_PATH.is_file()), reason="the tiny model's weights are not here")


@pytest.fixture(scope="module")
def small():
    return soak.small_model()


def job(folder, small, chunks=6, **changes):
    folder.mkdir(exist_ok=True)
    made = soak.job(folder, small[3], chunks, steps=1, budget_mib=1, checkpoint=2)
    return replace(made, **changes)


def run(small, todo, **kwargs):
    """All latents of a job, by first frame."""
    return {event.first: event.latents for event, _ in generate(*small[:3], todo, **kwargs) if isinstance(event, ChunkDone)}


def frames(path):
    with av.open(str(path)) as video:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])


@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_an_interrupted_run_is_resumed_bit_for_bit(tmp_path, small, cfg):
    whole = run(small, job(tmp_path / "whole", small, cfg=cfg, negative="b"))
    todo, made = job(tmp_path / "broken", small, cfg=cfg, negative="b"), {}
    with closing(generate(*small[:3], todo)) as events:
        for event, _ in events:
            if isinstance(event, ChunkDone):
                made[event.first] = event.latents
            if isinstance(event, StepDone) and event.chunk == 3:
                break
    # what was made until then is there to be watched
    assert len(frames(todo.out)) == 12 * 3 - 3
    session = storage.load(todo.session)
    assert session.frames_done == 9
    again = resumed(session, todo.out)
    assert again == todo
    made |= run(small, again, resume=session)
    assert made.keys() == whole.keys() and all(torch.equal(made[first], whole[first]) for first in whole)
    assert len(frames(todo.out)) == 12 * 6 - 3


def test_offloaded_and_resident_runs_are_one(tmp_path, small):
    """With the cache in host memory until a stop and on the device after it: the video of a run that was resident and whole."""
    whole = run(small, job(tmp_path / "whole", small))
    todo = job(tmp_path / "moved", small)
    todo = replace(todo, settings=replace(todo.settings, offload=True, host_gib=0.1))
    made = run(small, replace(todo, run=replace(todo.run, frames=9)))
    session = storage.load(todo.session)
    assert session.settings[0].offload
    again = resumed(session, todo.out)
    again = replace(again, run=todo.run, settings=replace(again.settings, offload=False, host_gib=0.0))
    made |= run(small, again, resume=session)
    assert made.keys() == whole.keys() and all(torch.equal(made[first], whole[first]) for first in whole)


def test_an_error_while_a_chunk_is_stored_leaves_the_checkpoint_before_it(tmp_path, small):
    todo, latents = job(tmp_path, small), {}
    calls = 0

    def failing(network):
        def forward(x, timestep, context, attend):
            nonlocal calls
            calls += not timestep.any()
            if calls == 4:
                attend(0, *torch.randn(3, 1, 6, 2, 128))
                raise KeyboardInterrupt
            return network(x, timestep, context, attend)

        return forward

    class Failing(torch.nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network, self.forward, self.sizes, self.dtype = network, failing(network), network.sizes, network.dtype

        def state_dict(self, *args, **kwargs):
            return self.network.state_dict(*args, **kwargs)

        def project_context(self, context):
            return self.network.project_context(context)

    with pytest.raises(KeyboardInterrupt):
        for event, _ in generate(Failing(small[0]), *small[1:3], todo):
            if isinstance(event, ChunkDone):
                latents[event.first] = event.latents
    session = storage.load(todo.session)
    assert session.frames_done == 6 and len(frames(todo.out)) == 33
    latents |= run(small, resumed(session, todo.out), resume=session)
    whole = run(small, job(tmp_path / "whole", small))
    assert all(torch.equal(latents[first], whole[first]) for first in whole)


def test_a_finished_video_goes_on_under_another_prompt(tmp_path, small):
    todo = job(tmp_path, small, chunks=2)
    first = run(small, todo)
    before = frames(todo.out)
    session = storage.load(todo.session)
    longer = resumed(session, todo.out)
    longer = replace(longer, run=replace(longer.run, frames=12), schedule=Schedule.parse("another"))
    second = run(small, longer, resume=session)
    assert sorted(second) == [6, 9] and sorted(first) == [0, 3]
    shown = frames(todo.out)
    assert len(shown) == 45 and np.array_equal(shown[:21], before)


def test_prompts_change_the_video_from_their_time_on(tmp_path, small):
    one = run(small, job(tmp_path / "one", small, schedule=Schedule.parse("0s: a")))
    two = run(small, job(tmp_path / "two", small, schedule=Schedule.parse("0s: a\n2s: b")))
    kept = run(small, replace(job(tmp_path / "kept", small, schedule=Schedule.parse("0s: a\n2s: b")), run=replace(
        job(tmp_path, small).run, recache_frames=0)))
    # 2 s is video frame 32, which is in latent frame 8; the next chunk begins at 9
    assert all(torch.equal(one[first], two[first]) and torch.equal(one[first], kept[first]) for first in (0, 3, 6))
    assert not torch.equal(one[9], two[9])
    # storing the history anew under the new prompt makes a difference of its own
    assert not torch.equal(kept[9], two[9])


def test_going_on_from_a_video(tmp_path, small):
    video = torch.rand(1, 3, 13, 16, 32) * 2 - 1
    start = encode_stream(small[1], video)
    made = run(small, job(tmp_path, small), start=start)
    # four latent frames: one alone, then a chunk of three
    assert sorted(made) == [0, 1, 4, 7, 10, 13, 16]
    assert torch.equal(torch.cat([made[0], made[1]], 2), start)
    assert len(frames(tmp_path / "video.mp4")) == 69


def test_memory_is_flat(tmp_path):
    """150 chunks with a window and a budget that costs planes. benchmarks/soak.py runs 2,000 of the tiny model."""
    found = soak.flat("small", chunks=150, steps=1, budget_mib=0.06, settled=50)
    assert found["growth_percent"] < 1
    assert 0.5 * found["budget"] < found["cache_peak"] <= found["budget"]
    assert found["frames"] == found["expected_frames"]


def test_killed_processes(tmp_path):
    """Five kills at random moments. benchmarks/soak.py does fifty."""
    found = soak.kill("small", chunks=40, steps=1, times=5, seed=1)
    assert found["killed"] == 5 and found["equal"] and not found["unreadable_files"] and not found["orphans"]


def test_positions_must_hold_the_window(tmp_path, small):
    with pytest.raises(ValueError, match=r"limited to 12\. Set a window of at most 4 frames"):
        run(small, job(tmp_path, small, position_limit=12))


def test_other_sessions_are_refused(tmp_path, small):
    todo = job(tmp_path, small, chunks=1)
    run(small, todo)
    session = storage.load(todo.session)
    del session.extra["cfg"]
    with pytest.raises(storage.SessionError, match="was not saved by `qvg generate`"):
        resumed(session, todo.out)
