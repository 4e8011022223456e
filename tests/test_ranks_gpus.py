"""One video by two GPUs, which NCCL connects, against the same by one of them: the cases of test_ranks and of test_ranks_segments."""

from __future__ import annotations

import pytest
import torch
from ranks_worker import SEGMENTS as RUN
from ranks_worker import SETTINGS, SHAPE, segments_of
from several_gpus import TWO_GPUS
from test_ranks import FLIPS, alone, together, video

from comfyui_qvg.qvg.video import ChunkDone, Sampler, session
from comfyui_qvg.qvg.video.segment_model import SegmentModel

pytestmark = TWO_GPUS
# sums of float32 in another order, and of bfloat16, by the standard deviation of the latents
ROUNDING, COARSE = 1e-4, 0.1
GPU = {"device": "cuda"}


@pytest.mark.parametrize("settings", ["off", "balanced", "paper", "offload", "budget"])
def test_ranks_make_the_video_of_one_process(settings, tmp_path):
    sampler = alone(SETTINGS[settings], **GPU)
    exact, made = video(sampler), together(tmp_path, 2, settings=settings, **GPU)
    assert (made["latents"] - exact).abs().max() < (ROUNDING if settings == "off" else FLIPS)
    stats = sampler.model.stats()
    assert made["bits"].keys() == stats.by_bits.keys()
    assert stats.stored_bytes / 2 <= made["stored"] <= stats.stored_bytes / 2 + 200


@pytest.mark.parametrize("settings", ["off", "balanced", "paper", "offload"])
def test_in_bfloat16(settings, tmp_path):
    """By the kernels, and in two streams."""
    exact = video(alone(SETTINGS[settings], dtype=torch.bfloat16, **GPU))
    made = together(tmp_path, 2, settings=settings, dtype="bfloat16", **GPU)["latents"]
    assert (made - exact).square().mean().sqrt() < COARSE * exact.std()


def test_guidance(tmp_path):
    exact = video(alone(SETTINGS["balanced"], cfg=2.0, **GPU))
    assert (together(tmp_path, 2, settings="balanced", cfg=2.0, **GPU)["latents"] - exact).abs().max() < FLIPS


@pytest.mark.parametrize("settings", ["balanced", "paper"])
def test_a_session_of_two_gpus_is_continued_by_one_and_the_other_way_round(settings, tmp_path):
    whole = video(alone(SETTINGS[settings], **GPU))
    begun = together(tmp_path, 2, settings=settings, save="two", save_at=6, stop_at=6, **GPU)
    one = alone(SETTINGS[settings], **GPU)
    session.load(tmp_path / "two").restore(one, "tiny")
    assert (torch.cat([begun["latents"], video(one)], 2) - whole).abs().max() < FLIPS
    one = alone(SETTINGS[settings], **GPU)
    for event in one:
        if isinstance(event, ChunkDone) and one.frames_done == 6:
            break
    session.save(tmp_path / "one", one, fingerprint="tiny")
    rest = together(tmp_path, 2, settings=settings, resume="one", **GPU)
    assert (rest["latents"] - whole[:, :, 6:]).abs().max() < FLIPS


@pytest.mark.parametrize(("settings", "cfg"), [("off", 4.0), ("balanced", 1.0), ("paper", 4.0)])
def test_segments(settings, cfg, tmp_path):
    exact = video(Sampler(segments_of(SETTINGS[settings], SegmentModel, cfg, "cuda"), RUN, SHAPE, device="cuda"))
    made = together(tmp_path, 2, settings=settings, segments=cfg, **GPU)["latents"]
    assert made.shape == exact.shape and (made - exact).abs().max() < (ROUNDING if settings == "off" else FLIPS)
