"""The loop of `loop` for world models: one walk again and again from the same noise, each time with other settings, or another memory.

    loop = WalkLoop(network, prompt, (1, 16, 12, 18))
    exact = loop.make(path, image, PRESETS["off"], memory="rebuild").latents
    found = loop.make(path, image, PRESETS["balanced"], memory="rebuild")
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..attention.choice import attention_of, packs
from ..attention.functions import widened
from ..attention.rope import Rope
from ..cache.geometry import Geometry
from ..models.wan import PATCH
from ..settings import QVGSettings
from ..video import Adapted, ChunkDone, Run, Sampler
from ..video.cameras import CameraPath
from ..video.view_memory import WORLDPLAY_5B, ViewMemory
from ..video.world import CHUNK, DISTILLED, WanScene, WorldCondition, WorldModel, walk_cache
from .loop import Made, Progress, silent


class WideScene(WanScene):
    """One whose network computes in the dtype of its weights, whatever the cache holds: many CPUs have no bf16 arithmetic."""

    def flow(self, x: Tensor, *rest) -> Tensor:
        return super().flow(x.to(self.network.patch_embedding.weight.dtype), *rest)

    def encode(self, x: Tensor, *rest) -> None:
        super().encode(x.to(self.network.patch_embedding.weight.dtype), *rest)


class WalkLoop:
    """A network in the layout of HY-WorldPlay 5B, with a prompt of its `project_context`. shape: (B, C, h, w) of a latent frame; all videos
    of a batch follow one path. The cache holds bf16, whatever the network computes in."""

    def __init__(self, network: nn.Module, prompt: Sequence[tuple[Tensor, Tensor]], shape: Sequence[int], device="cpu"):
        self.network, self.shape, self.device = network, tuple(shape), torch.device(device)
        self.prompt = [tuple(part.expand(shape[0], -1, -1, -1) for part in pair) for pair in prompt]

    @property
    def geometry(self) -> Geometry:
        sizes = self.network.sizes
        return Geometry(sizes.layers, sizes.heads, sizes.head_dim, (self.shape[2] // PATCH[1], self.shape[3] // PATCH[2]), self.shape[0])

    def make(self, path: CameraPath, image: Tensor, settings: QVGSettings, *, memory: str, views: ViewMemory = WORLDPLAY_5B, seed: int = 0,
             progress: Progress = silent) -> Made:
        """The walk along the whole path from a start image [B, C, 1, h, w]; memory and views: see `video.world`.

        Raises ValueError for an unknown memory, and MemoryError where it would go on with less than the settings ask for.
        """
        geometry = replace(self.geometry, packs=packs(settings, self.device, head_dim=self.network.sizes.head_dim))
        cache = walk_cache(settings, geometry, memory=memory, views=views, frames=len(path), device=self.device)
        scene = WideScene(self.network, self.prompt, path.actions, image)
        attention = attention_of(cache, exact=widened)
        model = WorldModel([WorldCondition(scene, cache)], path, memory=memory, views=views, rope=Rope, attention=attention)
        run = Run(frames=len(path), chunk_frames=CHUNK, sigmas=DISTILLED, solver="euler", seed=seed)
        chunks, seconds, done, began = [], [], 0, time.perf_counter()
        try:
            for event in Sampler(model, run, self.shape, device=self.device):
                if isinstance(event, Adapted):
                    raise MemoryError("the cache would have had to give something up")
                if isinstance(event, ChunkDone):
                    chunks.append(event.latents.float().cpu())
                    now = time.perf_counter()
                    seconds.append(now - began)
                    began = now
                done += 1
                progress(done, event.chunks * (run.steps + 1))
            return Made(torch.cat(chunks, dim=2), model.stats(), seconds)
        finally:
            cache.free()
