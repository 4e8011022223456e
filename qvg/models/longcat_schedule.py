"""Noise levels and guidance for sampling LongCat-Video, as published with the model.

Source: LongCat-Video, longcat_video/pipeline_longcat_video.py. Guidance is CFG-Zero* (arXiv 2503.18886).
"""

from __future__ import annotations

import torch
from torch import Tensor

SHIFT = 12.0
STEPS, DISTILLED_STEPS = 50, 16
GUIDANCE = 4.0

# the distilled model was trained on this many equal steps, before the shift
DISTILLED_GRID = 50
TAIL_START, TAIL_STEPS = 0.5, 10


def noise_levels(steps: int, *, distilled: bool = False, tail: bool = False, shift: float = SHIFT) -> Tensor:
    """Sigmas from 1 to 0, float32 [steps + 1].

    distilled: the levels that the distilled model was trained on; at most 50 steps. tail: below 0.5, ten equal steps replace those of the
    schedule, for fine detail; meant for continuing a video with the base model. The result then has another length.
    Raises ValueError for a number of steps outside these limits.
    """
    most = DISTILLED_GRID if distilled else 1000
    if not 1 <= steps <= most:
        raise ValueError(f"steps is {steps}; choose 1 to {most}.")
    if distilled:
        levels = 1 - torch.arange(steps) * DISTILLED_GRID // steps / DISTILLED_GRID
    else:
        levels = torch.linspace(1, 0.001, steps)
    levels = shift * levels / (1 + (shift - 1) * levels)
    if tail and not distilled:
        levels = torch.cat([levels[levels > TAIL_START], TAIL_START * (1 - torch.arange(TAIL_STEPS) / TAIL_STEPS)])
    return torch.cat([levels, torch.zeros(1)])


def cfg_zero(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance in which `uncond` is first scaled by its least-squares fit to `cond`; flows [B, ...]."""
    cond32, uncond32 = cond.float().flatten(1), uncond.float().flatten(1)
    fit = (cond32 * uncond32).sum(1) / (uncond32.square().sum(1) + 1e-8)
    uncond = uncond * fit.view(-1, *[1] * (uncond.ndim - 1)).to(uncond.dtype)
    return uncond + scale * (cond - uncond)
