"""Noise levels of walks, against those of the published schedulers."""

import pytest
import torch

from comfyui_qvg.qvg.models.worldplay_schedule import SAMPLING_5B, SAMPLING_8B
from comfyui_qvg.qvg.video.world import DISTILLED, DISTILLED_8B


def test_distilled_models_take_four_steps():
    assert SAMPLING_5B.levels(4, distilled=True) == pytest.approx(DISTILLED)
    assert SAMPLING_8B.levels(4, distilled=True) == pytest.approx(DISTILLED_8B)
    # whatever the shift of the base model is
    assert SAMPLING_8B.levels(4, distilled=True, shift=3.0) == SAMPLING_8B.levels(4, distilled=True)


@pytest.mark.parametrize("steps", [1, 30, 50])
def test_the_8b_takes_equal_steps_shifted(steps):
    """FlowMatchDiscreteScheduler with shift 5, of the configuration 480p_i2v."""
    equal = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    assert SAMPLING_8B.levels(steps, distilled=False) == pytest.approx((5 * equal / (1 + 4 * equal)).tolist())


@pytest.mark.parametrize("steps", [1, 30, 50])
def test_the_5b_begins_a_training_step_below_one(steps):
    """UniPCMultistepScheduler of Wan 2.2 TI2V 5B: flow sigmas, flow_shift 5, a final sigma of 0."""
    equal = 1 - torch.linspace(1, 1 / 1000, steps + 1, dtype=torch.float64)
    levels = (5 * equal / (1 + 4 * equal)).flip(0)[:-1].tolist() + [0.0]
    assert SAMPLING_5B.levels(steps, distilled=False) == pytest.approx(levels)


def test_levels_fall_and_steps_are_limited():
    for sampling in (SAMPLING_5B, SAMPLING_8B):
        for distilled in (False, True):
            levels = sampling.levels(1000, distilled=distilled, shift=12.0)
            assert len(levels) == 1001 and all(a > b for a, b in zip(levels, levels[1:])) and levels[-1] == 0
        for steps in (0, 1001):
            with pytest.raises(ValueError, match=f"steps is {steps}; choose 1 to 1000"):
                sampling.levels(steps, distilled=False)
