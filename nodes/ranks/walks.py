"""A walk of World Walk (HY-WorldPlay, QVG) over several GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ...qvg.settings import QVGSettings
from ...qvg.video.cameras import CameraPath
from ...qvg.video.rank_plans import WalkPlan
from ...qvg.video.walk_job import WalkText
from ..adapters.worldplay_scene import WalkMemory
from .checks import weights_of
from .mark import Split
from .runs import ROOM, ComfyLeader, split_run


@contextmanager
def walk_leader(guider, split: Split, memory: WalkMemory, settings: QVGSettings, path: CameraPath, start: torch.Tensor | None,
                say: Callable[[str], None]) -> Iterator[ComfyLeader]:
    """The model of all ranks of a walk. guider: of core, during a run. settings: of each cache. start: latents of the start image in the
    scale of the network.

    Raises ValueError for what cannot be split, and where the caches do not fit.
    """
    weights = weights_of(guider)
    with split_run(guider, split, memory.grid, len(weights), say) as run:
        memory.divide(run.size)
        memory.check(len(weights) * run.free.device, ROOM)
        prompts = [(weight, *text_of(guider.conds[name][0])) for name, weight in weights.items()]
        plan = WalkPlan(*run.named, settings, memory.grid, path, memory.memory, memory.variant.views, prompts,
                        None if start is None else start.cpu())
        with run.leader(plan) as leader:
            yield leader


def text_of(cond: dict) -> tuple[WalkText, torch.Tensor | None]:
    """The text of a condition of core's during a run, and the start image as CLIP Vision sees it, on the CPU."""
    found = cond["model_conds"]
    tokens, mask, glyphs, vision = (found[name].cond.cpu() if name in found else None
                                    for name in ("c_crossattn", "attention_mask", "txt_byt5", "clip_fea"))
    return WalkText(tokens, mask, glyphs), vision
