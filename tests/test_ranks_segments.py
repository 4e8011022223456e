"""A video in segments by the sampling loop, by one process against `SegmentLoop`, and by several against one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ranks_worker import GIVEN, GRID, SEGMENTS, SETTINGS, SHAPE, longcat, random_text, segments_of, start_of
from test_ranks import FLIPS, ROUNDING, together, video

from comfyui_qvg.qvg.measure.loop import SegmentLoop
from comfyui_qvg.qvg.settings import PRESETS
from comfyui_qvg.qvg.video import ChunkDone, Run, Sampler, segments
from comfyui_qvg.qvg.video.segment_model import SegmentModel
from comfyui_qvg.qvg.video.session import SessionError


def alone(settings="balanced", cfg=1.0, run=SEGMENTS, **case) -> Sampler:
    return Sampler(segments_of(SETTINGS[settings], SegmentModel, cfg), run, SHAPE, start=start_of(case))


@pytest.mark.parametrize(("settings", "apart"), [("off", ROUNDING), ("balanced", FLIPS)])
@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_the_sampling_loop_makes_what_the_closed_loop_makes(cfg, settings, apart):
    loop = SegmentLoop(longcat(), random_text(0), SEGMENTS, SHAPE, given=GIVEN, negative=None if cfg == 1 else random_text(1), cfg=cfg)
    sampler = alone(settings, cfg, run=replace(SEGMENTS, first_frames=GIVEN + SEGMENTS.chunk_frames))
    lengths = [event.latents.shape[2] for event in sampler if isinstance(event, ChunkDone)]
    assert lengths == loop.lengths == [7, 3, 2]
    assert (torch.cat(sampler.model.latents, 2) - loop.make(PRESETS[settings]).latents).abs().max() < apart
    assert sampler.model.stats().held_frames == GIVEN


def test_chunks_of_a_run_whose_first_is_longer():
    run = Run(frames=20, chunk_frames=4, first_frames=6)
    assert list(run.chunk_lengths(0, 20)) == [6, 4, 4, 4, 2] and run.chunk_count(0, 20) == 5
    assert list(run.chunk_lengths(5, 20)) == [4, 4, 4, 3] and run.chunk_count(5, 20) == 4
    assert list(run.chunk_lengths(0, 5)) == [5] and run.chunk_count(0, 5) == 1
    assert Run(frames=9, first_alone=True, first_frames=6).chunk_count(0, 9) == 4
    with pytest.raises(ValueError, match="first_frames is -1; it must be a whole number, at least 0"):
        Run(frames=9, first_frames=-1)


@pytest.mark.parametrize(("settings", "cfg", "size", "start"), [("off", 4.0, 4, 0), ("balanced", 1.0, 2, 5), ("paper", 4.0, 2, 1)])
def test_ranks_make_the_segments_of_one_process(settings, cfg, size, start, tmp_path):
    """From text, from a video and from an image."""
    sampler = alone(settings, cfg, start=start)
    exact, made = video(sampler), together(tmp_path, size, settings=settings, segments=cfg, start=start)
    assert made["latents"].shape == exact.shape
    assert (made["latents"] - exact).abs().max() < (ROUNDING if settings == "off" else FLIPS)
    stored = sampler.model.stats().stored_bytes
    assert stored / size <= made["stored"] <= stored / size + 200


@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1), (1, 1)])
def test_segments_are_continued_by_any_number_of_ranks(first, then, tmp_path):
    """What a session holds are latents, so what follows is the same for one process, and equal to within rounding for several."""
    whole, done = video(alone(cfg=4.0, start=5)), 5 + 3
    if first == 1:
        sampler = alone(cfg=4.0, start=5)
        for event in sampler:
            if isinstance(event, ChunkDone) and sampler.frames_done == done:
                break
        segments.save_sampler(tmp_path / "made", sampler, fingerprint="tiny", extra={"x": 1}, tensors={"y": torch.ones(3)})
    else:
        together(tmp_path, first, settings="balanced", segments=4.0, start=5, save="made", save_at=done, stop_at=done)
    loaded = segments.load(tmp_path / "made")
    assert (loaded.frames_done, loaded.shape, loaded.extra, loaded.made.new) == (done, SHAPE, {"x": 1}, [done])
    assert torch.equal(loaded.tensors["y"], torch.ones(3))
    if then == 1:
        sampler = alone(cfg=4.0)
        loaded.restore(sampler, "tiny")
        rest = video(sampler)
    else:
        rest = together(tmp_path, then, settings="balanced", segments=4.0, resume="made")["latents"]
    assert rest.shape[2] == SEGMENTS.frames - done
    difference = (rest - whole[:, :, done:]).abs().max()
    assert difference == 0 if first == then == 1 else difference < FLIPS


def test_what_cannot_be_continued_is_refused(tmp_path):
    sampler = alone()
    with pytest.raises(ValueError, match="cannot be saved"):
        segments.save_sampler(tmp_path / "made", sampler, fingerprint="tiny")
    video(sampler)
    segments.save_sampler(tmp_path / "made", sampler, fingerprint="tiny")
    loaded, other = segments.load(tmp_path / "made"), alone()
    with pytest.raises(SessionError, match="another model"):
        loaded.restore(other, "large")
    shorter = alone(run=Run(frames=9, chunk_frames=3, sigmas=SEGMENTS.sigmas, solver="euler"))
    with pytest.raises(SessionError, match="holds 12 latent frames already, but the run is 9 long"):
        loaded.restore(shorter, "tiny")
    assert not other.frames_done and not other.model.latents and other.model.cache.geometry.grid == GRID


def test_a_rank_that_ends_in_the_middle_of_a_segment(tmp_path):
    """In the pass over the given frames of the second segment."""
    made = together(tmp_path, 2, settings="balanced", segments=1.0, dies=True, save="made", save_at=6)
    assert made["latents"].shape[2] == 6
    assert made["said"].startswith("Another rank of this video ended (") and made["said"].endswith("start all ranks again.")
    assert segments.load(tmp_path / "made").frames_done == 6
