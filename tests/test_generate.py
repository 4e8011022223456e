"""`qvg generate`: resume, interrupt, prompts over time, flat memory, killed processes; the tiny model where its weights are."""

import os
import shutil
from contextlib import closing
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from comfyui_qvg.benchmarks import soak
from comfyui_qvg.qvg.demo import NETWORK_PATH, VAE_PATH
from comfyui_qvg.qvg.files import InUse
from comfyui_qvg.qvg.models.latent_scale import to_vae
from comfyui_qvg.qvg.settings import PRESETS
from comfyui_qvg.qvg.video import ChunkDone, Run, Schedule, StepDone
from comfyui_qvg.qvg.video import session as storage
from comfyui_qvg.qvg.video.decode import ChunkDecoder, encode_stream
from comfyui_qvg.qvg.video.generate import Notice, generate
from comfyui_qvg.qvg.video.job import resumed
from comfyui_qvg.qvg.video.prepare import prepare
from comfyui_qvg.qvg.video.recorder import OVERHEAD_BYTES, session_bytes

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


def transformed(todo, attention):
    """The job with few bits, so that attention in eight has something to attend to."""
    return replace(todo, settings=replace(PRESETS["balanced"], attention=attention))


def test_another_attention_is_resumed(tmp_path, small):
    """Fast up to a stop and exact after it: the session holds what fast stored, and says so until the resumed run says otherwise."""
    todo = transformed(job(tmp_path / "moved", small), "fast")
    made = run(small, replace(todo, run=replace(todo.run, frames=9)))
    session = storage.load(todo.session)
    assert session.settings[0].attention == "fast"
    again = resumed(session, todo.out)
    assert again.settings == todo.settings
    again = replace(again, run=todo.run)
    made |= run(small, replace(again, settings=replace(again.settings, attention="exact")), resume=session)
    wholes = {attention: run(small, transformed(job(tmp_path / attention, small), attention)) for attention in ("fast", "exact", "auto")}
    assert storage.load(todo.session).settings[0].attention == "exact"
    assert all(torch.equal(wholes["exact"][first], part) for first, part in wholes["auto"].items())
    assert all(torch.equal(made[first], wholes["fast"][first]) for first in (0, 3, 6))
    # from the third chunk on, there is something in few bits
    assert not any(torch.equal(wholes["fast"][first], wholes["exact"][first]) or torch.equal(made[first], whole[first])
                   for first in (9, 12, 15) for whole in wholes.values())


def test_sessions_from_before_there_was_a_choice_are_auto(tmp_path, small):
    todo = transformed(job(tmp_path, small, chunks=2), "auto")
    run(small, todo)
    assert "attention" not in todo.values()["settings"]
    assert resumed(storage.load(todo.session), todo.out).settings.attention == "auto"


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
    # storing the history again under the new prompt makes a difference of its own
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


def test_a_checkpoint_that_fails_does_not_end_the_video(tmp_path, small, monkeypatch):
    """The session's disk is full for a while: it is reported, the video continues, and the last session is whole."""
    todo, calls, save = job(tmp_path, small), [], storage.save_file

    def full_at_first(*args, **kwargs):
        calls.append(args)
        if len(calls) < 3:
            raise OSError(28, "No space left on device")
        save(*args, **kwargs)

    monkeypatch.setattr(storage, "save_file", full_at_first)
    events = [event for event, _ in generate(*small[:3], todo)]
    said = [event.message for event in events if isinstance(event, Notice)]
    assert len(said) == 2 and all(f"{todo.session} could not be written (No space left on device)" in message for message in said)
    assert len(frames(todo.out)) == 12 * 6 - 3
    assert storage.load(todo.session).frames_done == 18
    assert sorted(path.name for path in tmp_path.iterdir()) == [todo.out.name, todo.session.name]


def test_a_last_session_that_fails_leaves_a_whole_video(tmp_path, small, monkeypatch):
    todo = job(tmp_path, small, chunks=3)
    monkeypatch.setattr(storage, "save_file", lambda *args, **kwargs: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"session\.safetensors could not be written"):
        run(small, todo)
    assert len(frames(todo.out)) == 33 and [path.name for path in tmp_path.iterdir()] == [todo.out.name]


@pytest.mark.parametrize("ending", [".mp4", ".png", ".latent"])
@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "interrupt"])
def test_no_session_counts_frames_that_are_not_in_the_file(tmp_path, small, monkeypatch, ending, failure):
    """The video's disk is full, or Ctrl-C comes, in the moment of the second checkpoint and ever after; then the run is resumed."""
    whole = run(small, job(tmp_path / "whole", small))
    todo = job(tmp_path / "broken", small)
    todo = replace(todo, out=todo.out.with_suffix(ending))
    fsync = os.fsync

    def fails(number):
        if todo.session.is_file():
            raise failure
        return fsync(number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        with pytest.raises(type(failure)):
            run(small, todo)
    session = storage.load(todo.session)
    assert session.frames_done == 6 and session.extra["video_frames"] == (6 if ending == ".latent" else 21)
    made = run(small, resumed(session, todo.out), resume=session)
    assert sorted(made) == [6, 9, 12, 15] and all(torch.equal(made[first], whole[first]) for first in made)
    if ending == ".latent":
        assert torch.equal(load_file(todo.out)["latent_tensor"], to_vae(torch.cat([whole[first] for first in sorted(whole)], 2)))
        return
    count = len(frames(todo.out)) if ending == ".mp4" else len(list(todo.out.parent.glob("*.png")))
    assert count == 12 * 6 - 3


def test_a_chunk_that_reached_no_file_is_made_again(tmp_path, small, monkeypatch):
    """An interrupt while the newest chunk is decoded: the sampler counts it, the session does not."""
    todo, decode, calls = job(tmp_path / "broken", small), ChunkDecoder.__call__, []

    def interrupted(self, latents):
        calls.append(latents)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return decode(self, latents)

    with monkeypatch.context() as patch:
        patch.setattr(ChunkDecoder, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(small, todo)
    session = storage.load(todo.session)
    assert session.frames_done == 6 and len(frames(todo.out)) == 33
    made, whole = run(small, resumed(session, todo.out), resume=session), run(small, job(tmp_path / "whole", small))
    assert all(torch.equal(made[first], whole[first]) for first in made) and len(frames(todo.out)) == 69


def test_places_are_tried_before_the_first_step(tmp_path, small, monkeypatch):
    todo = job(tmp_path, small)
    other = replace(todo, out=tmp_path / "other.mp4")
    for wrong, words in ((replace(todo, session=tmp_path / "no" / "session"), "no folder"),
                         (replace(todo, session=todo.out), "both the video and the"),
                         (replace(todo, out=tmp_path / "a:b.mp4"), "has a ':'"), (replace(todo, out=tmp_path / "a.gif"), "use .mp4"),
                         (replace(todo, session=tmp_path / ("x" * 250)), "too long")):
        with pytest.raises(ValueError, match=words):
            next(generate(*small[:3], wrong))
    disk = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda place: disk._replace(free=64 << 20))
        with pytest.raises(ValueError, match=r"video\.session\.safetensors will take up to .*, but its disk has 64\.0 MiB left"):
            next(generate(*small[:3], todo))
    assert list(tmp_path.iterdir()) == []
    # and held while the run lasts
    with closing(generate(*small[:3], todo)) as events:
        next(events)
        for same in (todo, other, replace(todo, session=tmp_path / "other")):
            with pytest.raises(InUse, match="being written by another run"):
                next(generate(*small[:3], replace(same, overwrite=True)))
    assert list(tmp_path.iterdir()) == []


def test_a_session_takes_about_what_was_estimated(tmp_path, small):
    todo = job(tmp_path, small, chunks=40)
    sampler = prepare(*small[:3:2], todo)
    estimated = session_bytes(sampler) - OVERHEAD_BYTES
    run(small, todo)
    assert todo.session.stat().st_size - OVERHEAD_BYTES < estimated < 3 * todo.session.stat().st_size


@pytest.mark.parametrize("change", [
    {"checkpoint": 0}, {"checkpoint": 1.5}, {"cfg": float("nan")}, {"cfg": float("inf")}, {"position_limit": -1}, {"frame_rate": 0},
    {"latent": (3, 4)}, {"latent": (2, 5)}, {"latent": (0, 4)}])
def test_what_a_session_cannot_hold_is_refused(tmp_path, small, change):
    with pytest.raises(ValueError, match=next(iter(change))):
        job(tmp_path, small, **change)


@pytest.mark.parametrize("change", [
    {"seed": -1}, {"seed": 2**64}, {"seed": 1.0}, {"seed": True}, {"frames": 3.0}, {"chunk_frames": True}, {"recache_frames": None},
    {"first_alone": 1}, {"frames": 10**9}])
def test_a_run_that_a_session_cannot_hold_is_refused(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))} is "):
        Run(**{"frames": 3} | change)
