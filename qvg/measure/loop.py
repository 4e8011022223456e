"""The closed loop: one video made again and again from the same noise, each time with other settings of the KV cache.

    loop = CausalLoop(network, prompt, Run(frames=30), shape=(1, 16, 60, 104), device="cuda")
    exact = loop.make(PRESETS["off"]).latents
    found = loop.make(PRESETS["balanced"])
    closeness(found.latents, exact)             # dB of every video and latent frame

All differences between two of its videos come from the cache, and a difference once made is part of the history of all later frames.
`CausalLoop` is for networks whose history grows from chunk to chunk, `SegmentLoop` for those that rebuild it for every segment.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from ..attention.cached import CachedAttention
from ..attention.choice import attention_of, packs
from ..attention.functions import widened
from ..cache.context import context_settings
from ..cache.geometry import Geometry
from ..cache.kv_cache import KVCache
from ..cache.stats import CacheStats
from ..models import FAMILIES, Family
from ..models.longcat_schedule import cfg_zero
from ..models.wan import PATCH
from ..settings import QVGSettings
from ..video import Adapted, CachedNetwork, ChunkDone, Condition, Run, Sampler, guided
from ..video.noise import draw_noise
from ..video.prepare import cache_of

# called with the passes done and those of the whole video; what it raises ends the run
Progress = Callable[[int, int], None]
# called with every cache before it is used
Change = Callable[[KVCache], None]


def silent(done: int, of_all: int) -> None:
    """No progress."""


def unchanged(cache: KVCache) -> None:
    """The cache as its settings make it."""


@dataclass
class Made:
    """A video of the loop. latents: [B, C, F, h, w] float32, on the CPU. stats: of its cache at the end. seconds: of each generated
    chunk."""

    latents: Tensor
    stats: CacheStats
    seconds: list[float]


class CausalLoop:
    """A network that keeps its history from chunk to chunk, with fixed prompts and one seed.

    prompt: see `video.Condition`; negative: the one that `cfg` guides away from, none for cfg 1. shape: (B, C, h, w) of a latent frame.
    start: latents [B, C, n, h, w] that the videos begin with. dtype: of unquantized and decoded values, the network's own by default.
    """

    def __init__(self, network: nn.Module, prompt, run: Run, shape: Sequence[int], *, negative=None, cfg: float = 1.0,
                 start: Tensor | None = None, family: Family = FAMILIES["wan"], dtype: torch.dtype | None = None, device="cpu"):
        self.network, self.run, self.shape, self.device, self.dtype = network, run, tuple(shape), torch.device(device), dtype
        self.prompt, self.negative, self.cfg, self.start, self.family = prompt, negative, cfg, start, family

    @property
    def lengths(self) -> list[int]:
        """Latent frames of each chunk, those of `start` included."""
        given = 0 if self.start is None else self.start.shape[2]
        return [*self.run.start_chunk_lengths(given), *self.run.chunk_lengths(given, self.run.frames)]

    def cache(self, settings: QVGSettings) -> KVCache:
        grid = self.shape[2] // PATCH[1], self.shape[3] // PATCH[2]
        return cache_of(self.network, settings, self.run, grid, batch=self.shape[0], device=self.device, dtype=self.dtype,
                        family=self.family)

    def make(self, settings: QVGSettings, progress: Progress = silent, change: Change = unchanged, sampler=Sampler) -> Made:
        """The videos with such a cache, which is freed. sampler: the class of the sampling loop."""
        caches = [self.cache(settings) for _ in range(1 if self.negative is None else 2)]
        for cache in caches:
            change(cache)
        try:
            return self.run_with(caches, progress, sampler)
        finally:
            for cache in caches:
                cache.free()

    def run_with(self, caches: Sequence[KVCache], progress: Progress = silent, sampler=Sampler) -> Made:
        """The videos with caches that the caller made: one for the prompt and, if there is any, one for the negative prompt.

        Raises MemoryError where the loop would go on with less than the settings ask for.
        """
        conditions = [Condition(self.prompt, caches[0])] if len(caches) == 1 else guided(
            self.prompt, caches[0], self.negative, caches[1], self.cfg)
        chunks, seconds, done, began = [], [], 0, time.perf_counter()
        model = CachedNetwork(self.network, conditions, attention=attention_of(*caches, exact=widened))
        for event in sampler(model, self.run, self.shape, start=self.start, device=self.device):
            if isinstance(event, Adapted):
                raise MemoryError("the cache would have had to give something up")
            if isinstance(event, ChunkDone):
                # to the CPU waits for the device, so that the time is that of the chunk
                chunks.append(event.latents.float().cpu())
                now = time.perf_counter()
                seconds += [] if event.chunk is None else [now - began]
                began = now
            if event.chunk is not None:
                done += 1
                progress(done, event.chunks * (self.run.steps + 1))
        return Made(torch.cat(chunks, dim=2), model.stats(), seconds)


class SegmentLoop:
    """A network with `encode`, such as LongCat-Video, which stores the last `given` latent frames anew for every segment.

    prompt, negative: text embeddings [1, L, C]; without a negative one there is no guidance. run: its chunks are the new frames of
    segments; the first segment has no history and is `given` frames longer. shape: (1, C, h, w) of a latent frame.
    """

    def __init__(self, network: nn.Module, prompt: Tensor, run: Run, shape: Sequence[int], *, given: int, negative: Tensor | None = None,
                 cfg: float = 1.0, family: Family = FAMILIES["longcat"], device="cpu"):
        self.network, self.run, self.shape, self.given, self.device = network, run, tuple(shape), given, torch.device(device)
        self.prompts = prompt if negative is None else torch.cat([prompt, negative])
        self.cfg, self.family = cfg, family
        self.first: Tensor | None = None  # the first segment has no cache, so it is the same with all settings

    @property
    def lengths(self) -> list[int]:
        """Latent frames of each segment that are new."""
        run, first = self.run, min(self.run.frames, self.given + self.run.chunk_frames)
        return [first, *run.chunk_lengths(first, run.frames)]

    def cache(self, settings: QVGSettings, given: int, new: int) -> KVCache:
        sizes, dtype = self.network.sizes, self.prompts.dtype
        geometry = Geometry(sizes.layers, sizes.heads, sizes.head_dim, (self.shape[2] // PATCH[1], self.shape[3] // PATCH[2]),
                            packs=packs(settings, self.device, head_dim=sizes.head_dim))
        return KVCache(context_settings(settings, geometry, given, new, dtype.itemsize), layers=geometry.layers, heads=geometry.heads,
                       head_dim=geometry.head_dim, grid=geometry.grid, rope=self.family.rope, device=self.device, dtype=dtype,
                       max_frames=given + new, chunk_frames=given, stored_frames=given, packs=geometry.packs)

    @torch.no_grad()
    def make(self, settings: QVGSettings, progress: Progress = silent, change: Change = unchanged) -> Made:
        """The video with such a cache, which is freed. Bytes are those of the last segment's cache, the peak that of all."""
        steps, lengths, stats, seconds = self.run.steps, self.lengths, [], []

        def report(segment: int) -> Callable[[int], None]:
            return lambda step: progress(segment * steps + step, len(lengths) * steps)

        if self.first is None:
            self.first = self._segment(0, None, lengths[0], report(0))
        video = self.first
        for segment, new in enumerate(lengths[1:], 1):
            given, began = video[:, :, -self.given:], time.perf_counter()
            cache = self.cache(settings, given.shape[2], new)
            change(cache)
            try:
                self.network.encode(given.to(self.prompts), CachedAttention(
                    cache, start_frame=0, frames=given.shape[2], store=True, newest=cache.settings.recent_frames))
                attend = CachedAttention(cache, start_frame=given.shape[2], frames=new, store=False)
                video = torch.cat([video, self._segment(segment, attend, new, report(segment))], dim=2)
                stats.append(cache.stats())
            finally:
                cache.free()
            seconds.append(time.perf_counter() - began)
        return Made(video, replace(stats[-1], peak_bytes=max(one.peak_bytes for one in stats)), seconds)

    def _segment(self, number: int, attend: CachedAttention | None, frames: int, progress: Callable[[int], None]) -> Tensor:
        """New latents [1, C, frames, h, w] by Euler's method. attend: reads the given frames, if there are any."""
        x = draw_noise(self.run, number, "start", (1, self.shape[1], frames, *self.shape[2:]), self.device)
        for step, (sigma, following) in enumerate(pairwise(self.run.sigmas)):
            batch = x.expand(len(self.prompts), -1, -1, -1, -1).to(self.prompts)
            flow = self.network(batch, torch.full((len(batch),), 1000 * sigma, device=self.device), self.prompts, attend=attend)
            # this network's flow points from noise to video
            x = x + (sigma - following) * (flow if len(batch) == 1 else cfg_zero(flow[:1], flow[1:], self.cfg))
            progress(step + 1)
        return x.cpu()


def closeness(latents: Tensor, exact: Tensor) -> Tensor:
    """dB of every video and latent frame against the exact cache [B, F]: PSNR of latents [B, C, F, h, w], whose range is taken as the exact
    video's."""
    error = (latents - exact).square().mean((1, 3, 4)).clamp(min=1e-12)
    peak = (exact.amax((1, 2, 3, 4)) - exact.amin((1, 2, 3, 4)))[:, None]
    return 20 * peak.log10() - 10 * error.log10()


@dataclass(frozen=True)
class Windows:
    """Parts of a video of latent frames: the first chunk that reads a history, from the third chunk on, and the last quarter.

    Raises ValueError for fewer than three chunks.
    """

    first: slice
    later: slice
    last_quarter: slice

    @staticmethod
    def of(lengths: Sequence[int]) -> Windows:
        """lengths: latent frames of each chunk."""
        if len(lengths) < 3:
            raise ValueError(f"{sum(lengths)} latent frames are chunks of {', '.join(map(str, lengths))}: too few, as the first reads no "
                             "history. Ask for more frames, so that there are three chunks.")
        ends = list(accumulate(lengths))
        frames = ends[-1]
        return Windows(slice(ends[0], ends[1]), slice(ends[1], frames), slice(frames - max(1, frames // 4), frames))

    def means(self, values: Tensor) -> dict[str, list[float]]:
        """The mean of each part, for every video; values: [B, F]."""
        return {name: values[:, getattr(self, name)].mean(1).tolist() for name in self.__dataclass_fields__}
