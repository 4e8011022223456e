"""Similarity of two videos, frame by frame: PSNR, SSIM (Wang et al. 2004) and a heat map of their differences.

Videos are [F, H, W, 3] in 0..1, as ComfyUI's IMAGE. A few frames are compared at a time, so that long videos are not copied.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FRAMES_AT_ONCE = 16
# PSNR of equal frames, because JSON and charts have no infinity
MOST_DB = 100.0
LUMA = (0.299, 0.587, 0.114)
WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2


def check_alike(a: Tensor, b: Tensor) -> None:
    """Raises ValueError if two videos differ in number or size of frames."""
    if a.shape[:3] != b.shape[:3]:
        first, second = (f"{len(video)} frames of {video.shape[2]} x {video.shape[1]}" for video in (a, b))
        raise ValueError(f"The videos have {first} and {second}; they must have the same number of frames and the same size.")


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """PSNR of each frame in dB, [F], at most MOST_DB."""
    check_alike(a, b)
    mse = torch.cat([(x[..., :3].float() - y[..., :3].float()).square().mean(dim=(1, 2, 3)) for x, y in _parts(a, b)])
    return (-10 * mse.clamp(min=1e-30).log10()).clamp(max=MOST_DB)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """SSIM of each frame's luma, [F], with a Gaussian window of 11 pixels, or smaller if a side is shorter."""
    check_alike(a, b)
    luma = torch.tensor(LUMA, device=a.device)
    return torch.cat([similarity(x[..., :3].float() @ luma, y[..., :3].float() @ luma) for x, y in _parts(a, b)])


def heat(a: Tensor, b: Tensor, most: float = 0.25) -> Tensor:
    """Heat map of the differences, [F, H, W, 3]: black where equal, through red and yellow to white where a channel differs by `most`."""
    check_alike(a, b)
    parts = []
    for x, y in _parts(a, b):
        away = (x[..., :3].float() - y[..., :3].float()).abs().amax(-1) / most
        parts.append(torch.stack([(3 * away - band).clamp(0, 1) for band in range(3)], dim=-1))
    return torch.cat(parts)


def _parts(a: Tensor, b: Tensor):
    return zip(a.split(FRAMES_AT_ONCE), b.split(FRAMES_AT_ONCE))


def similarity(x: Tensor, y: Tensor) -> Tensor:
    """SSIM of grey images [F, H, W] in 0..1 -> [F]."""
    size = min(WINDOW, *x.shape[1:])
    offset = torch.arange(size, device=x.device) - (size - 1) / 2
    window = torch.exp(-offset.square() / (2 * SIGMA**2))
    window = window / window.sum()

    def blur(values: Tensor) -> Tensor:
        values = F.conv2d(values.unsqueeze(1), window.view(1, 1, 1, -1))
        return F.conv2d(values, window.view(1, 1, -1, 1)).squeeze(1)

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    index = (2 * mean_x * mean_y + C1) * (2 * covariance + C2) / ((mean_x**2 + mean_y**2 + C1) * (var_x + var_y + C2))
    return index.mean(dim=(1, 2))
