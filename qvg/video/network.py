"""What the sampling loop runs: the interface `Model`, and `CachedNetwork`, which makes one of a network and a KV cache per prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..attention.cached import CachedAttention
from ..attention.functions import Attention
from ..cache import limits
from ..cache.kv_cache import KVCache, shrink
from ..cache.stats import CacheStats
from ..settings import QVGSettings
from .run import Run

# what a network takes as timestep at sigma 1
TIMESTEPS = 1000


class Model(Protocol):
    """What the sampling loop needs. caches: every KV cache that it fills, for `session`."""

    caches: list[KVCache]

    def denoise(self, x: Tensor, sigma: float, first: int, *, prompt_frame: int, store: bool) -> Tensor:
        """Predict the clean latents of x [B, C, f, H, W] at noise level sigma.

        first: the latent frame at which x starts. prompt_frame: the latent frame whose prompt applies. store: add this pass to the history;
        the prediction is then not used.
        """

    def prompt(self, frame: int) -> str:
        """A name of the prompt at a latent frame. A different name is a different prompt."""

    def rewind(self, first: int) -> None:
        """Forget the history from latent frame `first` on."""

    def shrink(self) -> str | None:
        """Give something up to need less memory, and say what; None when nothing is left to give up."""

    def stats(self) -> CacheStats | None:
        """Sizes of what is stored, for `ChunkDone`."""


def finished_before(parts: Sequence[Tensor], first: int) -> list[Tensor]:
    """Of latents [B, C, f, H, W] of finished chunks, oldest first, those that end at latent frame `first` or earlier."""
    kept, count = [], 0
    for part in parts:
        count += part.shape[2]
        if count <= first:
            kept.append(part)
    return kept


@dataclass
class Condition:
    """One side of guidance: a prompt, the cache that its passes fill, and the weight of its prediction.

    prompt: what the network takes as context, or an object with `name(frame)` and `context(frame)` (see `schedule.PromptTrack`).
    """

    prompt: Any
    cache: KVCache
    weight: float = 1.0

    def name(self, frame: int) -> str:
        """A name of the prompt at a latent frame; "" for a prompt that never changes."""
        # a tensor has a name, too
        return self.prompt.name(frame) if hasattr(self.prompt, "context") else ""

    def context(self, frame: int):
        """What the network takes as context at a latent frame."""
        return self.prompt.context(frame) if hasattr(self.prompt, "context") else self.prompt


def guided(prompt, cache: KVCache, negative, negative_cache: KVCache, cfg: float) -> list[Condition]:
    """The two conditions of classifier-free guidance: negative + cfg * (prompt - negative)."""
    return [Condition(prompt, cache, cfg), Condition(negative, negative_cache, 1.0 - cfg)]


def check_positions(settings: QVGSettings, run: Run, position_limit: int) -> None:
    """Raises ValueError if a pass sees more frames than there are positions (0: no limit), so that frames would collide with sinks."""
    most = limits.capacity_frames(settings, run.chunk_frames, run.frames, None)
    if position_limit and most > position_limit:
        raise ValueError(f"A pass sees up to {most} latent frames, but positions are limited to {position_limit}. Set a window of at most "
                         f"{max(0, position_limit - settings.sink_frames - 2 * run.chunk_frames + 1)} frames.")


def check_conditions(conditions: Sequence) -> None:
    """Raises ValueError if two conditions share a cache, or their weights do not add up to 1. Each has `cache` and `weight`."""
    if len({id(condition.cache) for condition in conditions}) < len(conditions):
        raise ValueError("Two conditions share a KV cache, but keys and values depend on the prompt; give each its own.")
    total = sum(condition.weight for condition in conditions)
    if abs(total - 1) > 1e-6:
        raise ValueError(f"The weights of the conditions add up to {total:g}; they must add up to 1.")


class CachedNetwork:
    """A `Model` of a network that predicts the flow, with Wan's forward(x, timestep, context, attend), and one cache per condition.

    conditions: their weights add up to 1. attention, position_limit: see `CachedAttention`.
    Raises ValueError if two conditions share a cache or the weights do not add up.
    """

    def __init__(self, network: nn.Module, conditions: Sequence[Condition], *, attention: Attention | None = None,
                 position_limit: int = 0):
        self.network, self.conditions = network, list(conditions)
        self.caches = [condition.cache for condition in self.conditions]
        self.attention, self.position_limit = attention, position_limit
        for cache in self.caches:
            cache.said = self.caches[0].said  # each warning is given once a run
        check_conditions(self.conditions)

    def _attend(self, cache: KVCache, **options):
        """What the network calls for its self-attention."""
        return CachedAttention(cache, **options)

    @torch.no_grad()
    def denoise(self, x: Tensor, sigma: float, first: int, *, prompt_frame: int, store: bool) -> Tensor:
        """See `Model`. Returns x - sigma * flow, summed over the conditions by weight: float32 [B, C, f, H, W]."""
        batch, frames = x.shape[0], x.shape[2]
        timestep = torch.full((batch, frames), TIMESTEPS * sigma, device=x.device)
        mixed = None
        for condition in self.conditions:
            attend = self._attend(condition.cache, start_frame=first, frames=frames, store=store, attention=self.attention,
                                  position_limit=self.position_limit)
            flow = self.network(x, timestep, condition.context(prompt_frame), attend)
            denoised = (x - sigma * flow.float()) * condition.weight
            mixed = denoised if mixed is None else mixed + denoised
        return mixed

    def prompt(self, frame: int) -> str:
        return "\n".join(condition.name(frame) for condition in self.conditions)

    def rewind(self, first: int) -> None:
        for cache in self.caches:
            cache.rewind(first)

    def shrink(self) -> str | None:
        return shrink(self.caches)

    def stats(self) -> CacheStats:
        return CacheStats.total([cache.stats() for cache in self.caches])
