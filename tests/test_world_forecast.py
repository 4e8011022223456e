"""What a walk will need, against what its caches hold, and the memory that released sizes need."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from comfyui_qvg.benchmarks.planes import PLANES
from comfyui_qvg.qvg.attention import Rope
from comfyui_qvg.qvg.cache import codebook_lifetime
from comfyui_qvg.qvg.cache.geometry import Geometry, on_device
from comfyui_qvg.qvg.commands import cli
from comfyui_qvg.qvg.models.catalogue import MODELS
from comfyui_qvg.qvg.models.worldplay_wan import WorldWan, WorldWanSizes
from comfyui_qvg.qvg.report.plan import left_for_cache, longest, predict
from comfyui_qvg.qvg.settings import PRESETS
from comfyui_qvg.qvg.units import GIB
from comfyui_qvg.qvg.video import ChunkDone, Run, Sampler
from comfyui_qvg.qvg.video.camera_moves import walk
from comfyui_qvg.qvg.video.view_memory import WORLDPLAY_8B, ViewMemory
from comfyui_qvg.qvg.video.world import CHUNK, DISTILLED, MEMORIES, WanScene, WorldCondition, WorldModel, walk_cache
from comfyui_qvg.qvg.video.world_forecast import forecast_walk

GRID, LAYERS, HEADS, DIM = (4, 6), 2, 2, 128
SHAPE = (1, 48, 2 * GRID[0], 2 * GRID[1])
GEOMETRY = Geometry(LAYERS, HEADS, DIM, GRID)
VIEWS = ViewMemory(recent=4, retrieved=4)
PATH = walk("right-11, left-12")  # 24 cameras
ONE_STEP = (DISTILLED[0], 0.0)

SETTINGS = {name: PRESETS[name] for name in ("quality", "balanced", "smallest", "off")} | {
    "planes": PLANES["balanced"], "window": replace(PRESETS["balanced"], window_frames=8),
    "budget": replace(PRESETS["balanced"], budget_gib=1_800_000 / GIB), "tight": replace(PRESETS["quality"], budget_gib=1_900_000 / GIB)}
SETTINGS |= {f"{name}, offloaded": replace(SETTINGS[name], offload=True) for name in ("balanced", "off", "planes", "window")}
SETTINGS |= {"on the host": replace(PRESETS["balanced"], offload=True, host_gib=300_000 / GIB),
             "on both": replace(PRESETS["quality"], offload=True, host_gib=600_000 / GIB, budget_gib=2_600_000 / GIB)}


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    made = WorldWan(WorldWanSizes(dim=HEADS * DIM, ffn_dim=64, layers=LAYERS, text_dim=8))
    for parameter in made.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.08)
    return made.requires_grad_(False).eval()


def stats_of(network, settings, memory, frames, limit=0):
    prompt = network.project_context(torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(1)))
    cache = walk_cache(settings, GEOMETRY, memory=memory, views=VIEWS, frames=frames, dtype=torch.float32, workspace_limit=limit)
    model = WorldModel([WorldCondition(WanScene(network, prompt, PATH.actions), cache)], PATH, memory=memory, views=VIEWS, rope=Rope)
    run = Run(frames=frames, chunk_frames=CHUNK, sigmas=ONE_STEP, solver="euler", seed=3)
    assert sum(isinstance(event, ChunkDone) for event in Sampler(model, run, SHAPE)) == frames // CHUNK
    return cache.stats()


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_forecast_is_what_a_walk_takes(network, monkeypatch, name, memory):
    settings = SETTINGS[name]
    for frames, misfit in ((24, False), (24, True), (12, False)):
        monkeypatch.setattr(codebook_lifetime, "LARGEST_MISFIT", 0.0 if misfit else math.inf)
        planned = forecast_walk(settings, GEOMETRY, memory=memory, views=VIEWS, frames=frames, itemsize=4, misfit=misfit)
        stats = stats_of(network, settings, memory, frames)
        for part in ("stored_bytes", "workspace_bytes", "peak_bytes", "host_bytes", "held_frames"):
            assert getattr(stats, part) == getattr(planned, part), (part, frames, misfit)
        if settings.budget_gib:
            assert stats.peak_bytes <= settings.budget_gib * GIB
        if settings.host_gib:
            assert stats.host_bytes <= settings.host_gib * GIB


# K and V of one head over one frame, in both branches, float32
PLACE = 2 * 2 * GRID[0] * GRID[1] * DIM * 4


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("frames", [6, 5, 2])
@pytest.mark.parametrize("name", ["balanced", "off", "tight", "balanced, offloaded", "on both"])
def test_a_forecast_of_a_walk_in_pieces(network, monkeypatch, name, frames, memory):
    """With two frames at a time, which is less than a span has, the longest span is decoded whole."""
    monkeypatch.setattr(codebook_lifetime, "LARGEST_MISFIT", math.inf)
    settings, limit = SETTINGS[name], frames * PLACE
    planned = forecast_walk(settings, on_device(replace(GEOMETRY, branches=2), "cpu", limit), memory=memory, views=VIEWS, frames=24,
                            itemsize=4)
    stats = stats_of(network, settings, memory, 24, limit)
    for part in ("stored_bytes", "workspace_bytes", "peak_bytes", "host_bytes", "held_frames"):
        assert getattr(stats, part) == getattr(planned, part), part
    longest = 5 if memory == "rebuild" and name != "off" else 8 if memory == "rebuild" else CHUNK
    assert stats.workspace_bytes == max(frames, longest) * PLACE
    if settings.budget_gib:
        assert stats.peak_bytes <= settings.budget_gib * GIB


def needed(settings, memory, frames, **more):
    return forecast_walk(settings, MODELS["hy-worldplay-8b"].geometry(), memory=memory, views=WORLDPLAY_8B, frames=frames, **more)


def test_a_context_of_20_frames_at_480p():
    """The original keeps both branches of it, 25.7 GiB."""
    for frames in (24, 240):
        assert needed(PRESETS["balanced"], "rebuild", frames).peak_bytes < 2.6 * GIB
    assert needed(PRESETS["off"], "rebuild", 24).bf16_bytes == 54 * 2 * 2 * 20 * 1560 * 2048
    assert needed(PRESETS["balanced"], "append", 24, misfit=True).peak_bytes < 2.6 * GIB


@pytest.mark.parametrize(("preset", "offload"), [("smallest", False), ("balanced", True), ("off", True)])
def test_a_bank_of_240_frames_beside_fp8_weights_on_24_gb(preset, offload):
    """40 seconds of what a camera saw, 154 GiB in bf16."""
    left = left_for_cache("hy-worldplay-8b", 24, "fp8") * GIB
    found = needed(replace(PRESETS[preset], offload=offload), "bank", 240, misfit=True)
    assert found.bf16_bytes > 154 * GIB
    assert found.peak_bytes <= left and (found.host_bytes > 0) == offload


@pytest.mark.parametrize("offload", [False, True])
def test_a_bank_within_a_budget(offload):
    """Of what is offloaded, the device holds only what is read, however long the walk is."""
    settings = replace(PRESETS["balanced"], budget_gib=4.0, offload=offload)
    found = [needed(settings, "bank", frames, misfit=True) for frames in (240, 960)]
    assert all(one.peak_bytes <= 4 * GIB for one in found)
    # fewer bits, then fewer frames; offloaded, codebooks alone are in the way
    assert found[0].held_frames == 240 if offload else found[0].held_frames < 240
    assert found[1].held_frames >= found[0].held_frames
    small = 0.1 if offload else 0.4
    said = rf"A memory budget of {small} GiB is too small.* need [0-9.]+ GiB"
    with pytest.raises(ValueError, match=said + (r"\. Raise" if offload else " at the fewest bits")):
        needed(replace(settings, budget_gib=small), "bank", 240)


def test_plan_shows_the_memories(capsys):
    assert cli.main(["plan", "--model", "hy-worldplay-8b", "--latent-frames", "240", "--weights", "fp8", "--card", "24", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["memories"]
    assert list(found) == list(MEMORIES) == [one["memory"] for one in found.values()]
    for memory, one in found.items():
        row = one["presets"]["balanced"]
        planned = needed(PRESETS["balanced"], memory, 240)
        assert (row["peak_bytes"], one["original_bytes"]) == (planned.peak_bytes, 2 * planned.bf16_bytes)
    assert round(found["rebuild"]["original_bytes"] / GIB, 1) == 25.7
    assert found["bank"]["presets"]["smallest"]["fits"] and not found["bank"]["presets"]["balanced"]["fits"]
    options = ["plan", "--model", "hy-worldplay-5b", "--latent-frames", "64", "--vram", "4"]
    assert cli.main([*options, "--memory", "bank"]) == 0
    one = capsys.readouterr().out
    assert cli.main(options) == 0
    every = capsys.readouterr().out
    assert one.strip() in every and [every.count(f"memory {memory}:") for memory in MEMORIES] == [1, 1, 1]
    assert "memory bank: 19.34 GiB in bf16, 38.67 GiB with both branches of attention, as the original keeps them" in one
    # a context that is rebuilt fits at any length
    assert not [line for line in every.split("memory append")[0].splitlines() if "fits; at most" in line]
    assert cli.main(["plan", "--model", "longcat", "--memory", "bank"]) == 2
    assert "longcat is no world model, so there is no memory to choose" in capsys.readouterr().err


@pytest.mark.parametrize("memory", MEMORIES)
def test_the_longest_walk_is_the_longest(memory):
    shape, settings, limit = MODELS["hy-worldplay-5b"], PRESETS["balanced"], 3 * GIB
    frames = longest(shape, settings, shape.geometry(), limit, most=2000, memory=memory)
    if memory == "rebuild":
        assert frames == 2000
        return
    peaks = [predict(shape, settings, shape.geometry(), count, misfit=True, memory=memory).peak_bytes for count in (frames, frames + 4)]
    assert peaks[0] <= limit < peaks[1]
