"""What a crew makes of plans of segments and of walks, against one process. One crew for all tests."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from ranks_worker import GIVEN, GRID, SEGMENTS, SHAPE, longcat, random_text, segments_of
from test_ranks import FLIPS, video
from test_world import GRID as WALK_GRID
from test_world import PATH, RUN, VIEWS, made_wan, random_tensor, randomized
from test_world import SHAPE as WALK_SHAPE

from comfyui_qvg.qvg.cache.geometry import Geometry
from comfyui_qvg.qvg.models import FAMILIES
from comfyui_qvg.qvg.models.hunyuan_layers import HunyuanSizes
from comfyui_qvg.qvg.models.worldplay_hunyuan import WorldPlayHunyuan
from comfyui_qvg.qvg.settings import PRESETS
from comfyui_qvg.qvg.video import Sampler, crew
from comfyui_qvg.qvg.video.rank_plans import SegmentPlan, WalkPlan
from comfyui_qvg.qvg.video.ranks import Leader
from comfyui_qvg.qvg.video.segment_model import SegmentModel
from comfyui_qvg.qvg.video.walk_job import WalkText
from comfyui_qvg.qvg.video.walk_model import scene_of
from comfyui_qvg.qvg.video.world import WorldCondition, WorldModel, walk_cache

if find_spec("ray") is None:
    pytest.skip('install the pack with the extra "test"', allow_module_level=True)


@pytest.fixture(scope="module")
def pair():
    found = crew.Crew(2, "cpu")
    yield found
    found.stop()


def segment_plan(network, cfg: float, weights: str = "segments") -> SegmentPlan:
    prompts = [random_text(0)] if cfg == 1 else [random_text(0), random_text(1)]
    return SegmentPlan("longcat", network.sizes, weights, PRESETS["balanced"], GRID, GIVEN, SEGMENTS.chunk_frames, *prompts, cfg=cfg)


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_segments(pair, cfg):
    network = longcat()
    exact, plan = video(Sampler(segments_of(PRESETS["balanced"], SegmentModel, cfg), SEGMENTS, SHAPE)), segment_plan(network, cfg)
    with pair.video(plan, network) as ranks, Leader(plan.model(network, ranks, "cpu"), ranks) as leader:
        made = video(Sampler(leader, SEGMENTS, SHAPE))
    assert made.shape == exact.shape and (made - exact).abs().max() < FLIPS
    assert not pair.stopped and pair.prepare("segments")[0]


def test_frames_that_all_ranks_are_given(pair):
    """Latents of one frame, from outside of the run."""
    network, given = longcat(), torch.randn(1, 16, 1, *SHAPE[2:], generator=torch.Generator().manual_seed(7))
    x, alone, plan = torch.randn(1, 16, 3, *SHAPE[2:]), segments_of(PRESETS["balanced"], SegmentModel, 4.0), segment_plan(network, 4.0)
    nothing = alone.denoise(x, 0.5, 0, prompt_frame=0, store=False)
    alone.rewind(0)
    alone.remember([given])
    exact = alone.denoise(x, 0.5, 1, prompt_frame=1, store=False)
    with pair.video(plan, network) as ranks, Leader(plan.model(network, ranks, "cpu"), ranks) as leader:
        leader.remember([given])
        made = leader.denoise(x, 0.5, 1, prompt_frame=1, store=False)
    assert (made - exact).abs().max() < FLIPS < (exact - nothing).abs().max()


def hunyuan() -> WorldPlayHunyuan:
    torch.manual_seed(0)
    return randomized(WorldPlayHunyuan(HunyuanSizes(
        dim=256, head_dim=128, ffn_dim=64, layers=2, channels=8, inputs=17, text_dim=8, glyph_dim=8, glyph_hidden=8, image_dim=8)))


WALKS = {
    "hy-worldplay-5b": (made_wan, WALK_GRID, WALK_SHAPE, None, None),
    "hy-worldplay-8b": (hunyuan, (4, 6), (1, 8, 4, 6), torch.tensor([[1, 1, 0]]), random_tensor(1, 2, 8, seed=2))}


@pytest.mark.parametrize(("family", "memory", "cfg"), [("hy-worldplay-5b", "bank", 3.0), ("hy-worldplay-8b", "rebuild", 1.0)])
def test_a_walk(pair, family, memory, cfg):
    make, grid, shape, mask, vision = WALKS[family]
    network, start = make(), random_tensor(*shape[:2], 1, *shape[2:], seed=5)
    text, other = (WalkText(random_tensor(1, 3, 8, seed=seed), mask) for seed in (1, 2))
    prompts = [(1.0, text, vision)] if cfg == 1 else [(cfg, text, vision), (1 - cfg, other, vision)]
    plan = WalkPlan(family, network.sizes, family, PRESETS["balanced"], grid, PATH, memory, VIEWS, prompts, start)
    with pair.video(plan, network) as ranks, Leader(plan.model(network, ranks, "cpu"), ranks) as leader:
        made = video(Sampler(leader, RUN, shape))
    conditions = [WorldCondition(scene_of(family, network, text, vision, PATH, start), walk_cache(
        PRESETS["balanced"], Geometry(2, 2, 128, grid), memory=memory, views=VIEWS, frames=len(PATH), dtype=torch.float32), weight)
        for weight, text, vision in prompts]
    alone = WorldModel(conditions, PATH, memory=memory, views=VIEWS, rope=FAMILIES[family].rope)
    exact = video(Sampler(alone, RUN, shape))
    assert made.shape == exact.shape and (made - exact).abs().max() < FLIPS
