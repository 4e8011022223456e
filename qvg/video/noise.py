"""Noise of the sampling loop: drawn from generators keyed by seed, chunk and step, and added to clean latents."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from .run import Run

# (denoised, sigma, noise) -> x at noise level sigma; tensors [B, C, f, H, W]
Renoise = Callable[[Tensor, float, Tensor], Tensor]


def flow_renoise(denoised: Tensor, sigma: float, noise: Tensor) -> Tensor:
    """Clean latents [B, C, f, H, W] at noise level sigma (0 to 1), on the straight path of flow matching."""
    return (1.0 - sigma) * denoised + sigma * noise


def draw_noise(run: Run, chunk: int, step: int | str, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Standard float32 noise for a step of a chunk. step: a number, or the name of another moment that draws noise.

    With `run.noise == "core"`, numbered steps draw as ComfyUI's sample_ar_video does. The global random state is never used.
    """
    if run.noise == "core" and isinstance(step, int):
        generator = torch.Generator(device).manual_seed((run.seed + chunk * 1000 + step) % 2**64)
        return torch.randn(shape, generator=generator, device=device)
    digest = hashlib.blake2b(f"{run.seed}/{chunk}/{step}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(shape, generator=generator).to(device)
