"""Generation with an exact cache, a batch of prompts at a time, to inspect a trained model."""

from __future__ import annotations

import torch
from torch import Tensor

from ...qvg.attention.rope import Rope
from ...qvg.demo import CHUNK_FRAMES, GRID, LATENT
from ...qvg.models.wan import HEAD_DIM, CausalWan, scaled_attention
from .diffusion import SIGMAS


class ExactCache:
    """Keys (after RoPE) and values of all stored frames; `begin` returns an `attend` for the next chunk."""

    def __init__(self):
        self.rope, self.frames, self.kept, self.fresh = Rope(HEAD_DIM, GRID), 0, {}, {}

    def begin(self, count: int, commit: bool) -> ExactCache:
        self.count, self.commit = count, commit
        return self

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = self.rope.apply(q, self.frames, self.count), self.rope.apply(k, self.frames, self.count)
        if layer in self.kept:
            k, v = (torch.cat(pair, dim=1) for pair in zip(self.kept[layer], (k, v)))
        if self.commit:
            self.fresh[layer] = (k, v)
        return scaled_attention(q, k, v)

    def end(self) -> None:
        self.kept, self.fresh, self.frames = self.fresh, {}, self.frames + self.count


@torch.no_grad()
def generate(network: CausalWan, embedding: Tensor, frames: int, seed: int = 0, start: Tensor | None = None) -> Tensor:
    """Latents [B, 16, frames, H, W] in the network's normalization; `start` [B, 16, n, H, W] is given as context."""
    device, batch = embedding.device, len(embedding)
    generator = torch.Generator().manual_seed(seed)
    cache, prompt, done = ExactCache(), network.project_context(embedding), []

    def step(x: Tensor, sigma: float, commit: bool = False) -> Tensor:
        timestep = torch.full((batch, x.shape[2]), 1000 * sigma, device=device)
        return network(x, timestep, prompt, cache.begin(x.shape[2], commit))

    if start is not None:
        step(start, 0.0, commit=True)
        cache.end()
        done.append(start)
    while cache.frames < frames:
        shape = (batch, 16, min(CHUNK_FRAMES, frames - cache.frames), *LATENT)
        x = torch.randn(shape, generator=generator).to(device)
        for sigma, following in zip(SIGMAS, (*SIGMAS[1:], 0.0)):
            clean = x - sigma * step(x, sigma)
            x = (1 - following) * clean + following * torch.randn(shape, generator=generator).to(device)
        step(x, 0.0, commit=True)
        cache.end()
        done.append(x)
    return torch.cat(done, dim=2)
