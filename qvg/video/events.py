"""What the sampling loop reports as it goes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..cache.stats import CacheStats


@dataclass(frozen=True)
class StepDone:
    """One denoising step of generated chunk `chunk` of `chunks`, whose first latent frame is `first`. denoised: [B, C, f, H, W]."""

    chunk: int
    chunks: int
    step: int
    steps: int
    first: int
    denoised: Tensor


@dataclass(frozen=True)
class ChunkDone:
    """A chunk is final and stored. latents: [B, C, f, H, W] from latent frame `first`. chunk: None for given start frames."""

    chunk: int | None
    chunks: int
    first: int
    latents: Tensor
    stats: CacheStats | None


@dataclass(frozen=True)
class Adapted:
    """Memory ran out, and the run continues with less. message: what was given up, as a sentence."""

    message: str


Event = StepDone | ChunkDone | Adapted
