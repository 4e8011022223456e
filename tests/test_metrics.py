"""PSNR and SSIM against values that follow from their definitions, and the heat map's colours."""

import math

import pytest
import torch

from comfyui_qvg.qvg.report.metrics import MOST_DB, heat, psnr, ssim


def video(frames=20, height=24, width=32, seed=0):
    return torch.rand(frames, height, width, 3, generator=torch.Generator().manual_seed(seed))


def test_equal_videos():
    a = video()
    assert torch.equal(psnr(a, a), torch.full((20,), MOST_DB))
    assert torch.allclose(ssim(a, a), torch.ones(20))
    assert heat(a, a).max() == 0


@pytest.mark.parametrize("away", [0.01, 0.1, 0.5])
def test_psnr_of_a_known_distance(away):
    a = torch.full((3, 8, 8, 3), 0.25)
    assert torch.allclose(psnr(a, a + away), torch.full((3,), -20 * math.log10(away)), atol=1e-3)


def test_ssim_of_flat_frames_is_its_luminance_term():
    a, b = torch.full((1, 16, 16, 3), 0.2), torch.full((1, 16, 16, 3), 0.6)
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    assert ssim(a, b).item() == pytest.approx(expected, abs=1e-4)


def test_ssim_falls_with_noise_and_is_symmetric():
    a = video(seed=1)
    draw = torch.Generator().manual_seed(2)
    noise = torch.randn(a.shape, generator=draw)
    values = [ssim(a, a + level * noise).mean() for level in (0.0, 0.05, 0.2, 0.8)]
    assert values == sorted(values, reverse=True)
    assert torch.allclose(ssim(a, a + noise), ssim(a + noise, a), atol=1e-6)


def test_frames_are_measured_one_by_one():
    a = video(frames=40)
    b = a.clone()
    b[17] = 1 - b[17]
    assert (psnr(a, b) == MOST_DB).nonzero().flatten().tolist() == [i for i in range(40) if i != 17]


def test_heat_names_the_pixel():
    a = torch.zeros(1, 4, 4, 3)
    b = a.clone()
    b[0, 1, 2, 1] = 1.0
    assert heat(a, b)[0, 1, 2].tolist() == [1, 1, 1] and heat(a, b).sum() == 3


def test_frames_smaller_than_the_window():
    assert ssim(video(2, 5, 7), video(2, 5, 7, seed=3)).isfinite().all()


@pytest.mark.parametrize("other", [video(frames=19), video(height=25)])
def test_videos_that_do_not_match_are_refused(other):
    with pytest.raises(ValueError, match="the same number of frames and the same size"):
        psnr(video(), other)
