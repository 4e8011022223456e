"""LongCat-Video's noise levels against the original scheduler, and its guidance."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from comfyui_qvg.qvg.models.longcat_schedule import DISTILLED_STEPS, STEPS, cfg_zero, noise_levels


@pytest.mark.parametrize(("name", "arguments"), [
    ("sigmas_50", {"steps": STEPS}), ("sigmas_50_tail", {"steps": STEPS, "tail": True}),
    ("sigmas_16", {"steps": DISTILLED_STEPS, "distilled": True})])
def test_noise_levels(name, arguments):
    with safe_open(Path(__file__).parent / "data" / "longcat.safetensors", "pt") as file:
        expected = file.get_tensor(name)
    torch.testing.assert_close(noise_levels(**arguments), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("steps", "distilled"), [(0, False), (51, True), (1001, False)])
def test_impossible_steps(steps, distilled):
    with pytest.raises(ValueError, match=f"steps is {steps}; choose 1 to"):
        noise_levels(steps, distilled=distilled)


def test_guidance_fits_the_unconditional_prediction():
    """Per video: a multiple of the conditional prediction adds nothing, and an orthogonal one is left out."""
    draw = torch.Generator().manual_seed(0)
    cond = torch.randn(2, 16, 3, 4, 6, generator=draw)
    torch.testing.assert_close(cfg_zero(cond, cond * torch.tensor([3.0, -0.5]).view(2, 1, 1, 1, 1), 4.0), cond)
    uncond = torch.randn(cond.shape, generator=draw)
    fit = (cond * uncond).sum((1, 2, 3, 4), keepdim=True) / cond.square().sum((1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(cfg_zero(cond, uncond - fit * cond, 4.0), 4 * cond, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cfg_zero(cond, uncond, 1.0), cond)
