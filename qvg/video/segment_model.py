"""A video in segments by the sampling loop: each continues the last latent frames of the one before (LongCat-Video).

    cache = segment_cache(network, settings, (30, 52), given=4, new=20)
    model = SegmentModel(network, embedding, cache, given=4, negative=other, cfg=4.0)
    run = Run(frames=84, chunk_frames=20, first_frames=24, sigmas=tuple(noise_levels(50).tolist()), solver="euler")
    sampler = Sampler(model, run, shape)

A chunk is a segment. Before its first step one pass over the given frames stores their keys and values, which every step reads; between
two segments only latents are kept. `segments.save_sampler` writes them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..attention.cached import CachedAttention
from ..attention.choice import packs
from ..attention.functions import Attention
from ..cache.context import context_settings
from ..cache.geometry import Geometry, on_device
from ..cache.kv_cache import KVCache, shrink_context
from ..cache.stats import CacheStats
from ..models import FAMILIES, Family
from ..models.longcat_schedule import cfg_zero
from ..settings import QVGSettings
from .network import TIMESTEPS, Condition, finished_before


def segment_cache(network: nn.Module, settings: QVGSettings, grid: tuple[int, int], *, given: int, new: int, device="cpu",
                  dtype: torch.dtype | None = None, family: Family = FAMILIES["longcat"], heads: int = 0,
                  workspace_limit: int | None = None, **more) -> KVCache:
    """A cache for `given` latent frames of `grid` tokens that segments of `new` latent frames continue.

    dtype: that the network computes in, of its first parameter by default. heads: that it keeps, 0 for all. workspace_limit, more: for
    `KVCache`.
    Raises ValueError where a budget is too small or the settings do not fit the heads.
    """
    sizes, dtype = network.sizes, dtype or next(network.parameters()).dtype
    heads = heads or sizes.heads
    geometry = on_device(Geometry(sizes.layers, heads, sizes.head_dim, grid, packs=packs(settings, device, head_dim=sizes.head_dim)),
                         torch.device(device).type, workspace_limit)
    return KVCache(context_settings(settings, geometry, given, new, dtype.itemsize), layers=geometry.layers, heads=heads,
                   head_dim=geometry.head_dim, grid=grid, rope=family.rope, device=device, dtype=dtype, max_frames=given + new,
                   chunk_frames=given, stored_frames=given, packs=geometry.packs, workspace_limit=workspace_limit, **more)


class SegmentModel:
    """A `video.Model` of a network with `encode`, for `Sampler` with the solver "euler".

    prompt: a text embedding [1, L, C], or an object with `name(frame)` and `context(frame)` (see `schedule.PromptTrack`). negative: the
    embedding that `cfg` guides away from, by CFG-Zero*; without it there is no guidance. given: latent frames that a segment continues.
    attention: see `CachedAttention`.
    latents: of all finished segments, [1, C, f, H, W] float32 on the CPU.
    """

    def __init__(self, network: nn.Module, prompt, cache: KVCache, *, given: int, negative: Tensor | None = None, cfg: float = 1.0,
                 attention: Attention | None = None):
        self.network, self.cache, self.given, self.negative, self.cfg, self.attention = network, cache, given, negative, cfg, attention
        self.condition = Condition(prompt, cache)
        self.caches = [cache]
        self.latents: list[Tensor] = []
        self._ready: int | None = None  # the segment whose given frames are in the cache

    @torch.no_grad()
    def denoise(self, x: Tensor, sigma: float, first: int, *, prompt_frame: int, store: bool) -> Tensor:
        """See `Model`."""
        if store:
            # in one assignment, so that an interrupt leaves the old list or the new one
            self.latents = [*self.latents, x.detach().to("cpu", torch.float32)]
            return x
        self._prepare(first, x.device)
        texts = self.condition.context(prompt_frame)
        if self.negative is not None:
            texts = torch.cat([texts, self.negative.to(texts)])
        new = self._share(x.expand(len(texts), -1, -1, -1, -1).to(self.cache.workspace.dtype))
        timestep = torch.full((len(texts),), TIMESTEPS * sigma, device=x.device)
        flow = self._whole(self.network(new, timestep, texts, attend=self._attend(x.shape[2])))
        # this network's flow points from noise to video
        return x + sigma * (flow if len(texts) == 1 else cfg_zero(flow[:1], flow[1:], self.cfg))

    def _attend(self, frames: int):
        """What the network calls for the self-attention of new frames."""
        return self._sharded(CachedAttention(self.cache, start_frame=self.cache.frames, frames=frames, store=False,
                                             attention=self.attention))

    def _prepare(self, first: int, device) -> None:
        """Have the cache hold the frames before latent frame `first`; once a segment."""
        if self._ready == first:
            return
        self.cache.clear()
        if self.latents:
            given = self._share(self.last(self.given)).to(device, self.cache.workspace.dtype)
            self.network.encode(given, self._sharded(CachedAttention(
                self.cache, start_frame=0, frames=given.shape[2], store=True, newest=self.cache.settings.recent_frames,
                attention=self.attention)))
        self._ready = first

    def last(self, frames: int) -> Tensor:
        """The newest finished latents, at most so many frames."""
        parts, count = [], 0
        while count < frames and len(parts) < len(self.latents):
            parts.insert(0, self.latents[-1 - len(parts)])
            count += parts[0].shape[2]
        return torch.cat(parts, dim=2)[:, :, -frames:]

    def _sharded(self, attend):
        """`attend` of all tokens as the network calls it."""
        return attend

    def _share(self, x: Tensor) -> Tensor:
        """What the network gets of latents [B, C, F, H, W]."""
        return x

    def _whole(self, x: Tensor) -> Tensor:
        """The inverse of `_share`."""
        return x

    def remember(self, latents: list[Tensor]) -> None:
        """Begin with finished segments, for which see `latents`."""
        self.latents = latents

    def prompt(self, frame: int) -> str:
        return self.condition.name(frame)

    def rewind(self, first: int) -> None:
        """Forget the segments from latent frame `first` on."""
        self._ready, self.latents = None, finished_before(self.latents, first)
        self.cache.clear()

    def shrink(self) -> str | None:
        """See `cache.kv_cache.shrink_context`."""
        self._ready = None
        return shrink_context(self.caches)

    def stats(self) -> CacheStats:
        return self.cache.stats()
