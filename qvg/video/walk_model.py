"""From the job of a walk to a `WorldModel` with its KV caches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..attention.choice import packs
from ..cache.geometry import Geometry
from ..cache.kv_cache import KVCache
from ..models import FAMILIES, HY_WORLDPLAY_8B
from ..models.latent_scale import to_network
from ..settings import QVGSettings
from .cameras import CameraPath
from .walk_job import WalkInputs, WalkJob, WalkText
from .world import HunyuanScene, Scene, WanScene, WorldCondition, WorldModel, walk_cache


def unshared(x: Tensor) -> Tensor:
    return x


@torch.no_grad()
def walk_of(network: nn.Module, inputs: WalkInputs, job: WalkJob, *, heads: int = 0, make: Callable = WorldModel,
            share: Callable[[Tensor], Tensor] = unshared, **more) -> WorldModel:
    """The model of a walk, with its caches.

    heads: that they keep, 0 for all. make: called as `WorldModel` is. share: of whole latent frames, the part that this process passes
    through the network. more: for `KVCache`. Raises ValueError where settings or a budget do not fit the network and the run.
    """
    guides = job.cfg != 1
    settings = replace(job.settings, budget_gib=job.settings.budget_gib / (1 + guides), host_gib=job.settings.host_gib / (1 + guides))
    start = share(to_network(inputs.start.to(job.device, torch.float32)))

    def cache() -> KVCache:
        return cache_of_walk(network, settings, job.grid, heads=heads, memory=job.memory, views=job.kind.views, frames=job.run.frames,
                             device=job.device, chunk_frames=job.run.chunk_frames, **more)

    sides = [(inputs.texts[job.prompt - 1], job.cfg), (inputs.negative, 1 - job.cfg)] if guides else [(inputs.texts[job.prompt - 1], 1.0)]
    conditions = [WorldCondition(scene_of(job.family, network, text, inputs.vision, job.path, start), cache(), weight)
                  for text, weight in sides]
    return make(conditions, job.path, memory=job.memory, views=job.kind.views, rope=FAMILIES[job.family].rope)


def cache_of_walk(network: nn.Module, settings: QVGSettings, grid: tuple[int, int], *, heads: int = 0, device="cpu", **more) -> KVCache:
    """A cache for a walk of a network. grid: tokens (height, width) of a latent frame. heads: that it keeps, 0 for all. more: for
    `walk_cache`."""
    sizes = network.sizes
    geometry = Geometry(sizes.layers, heads or sizes.heads, sizes.head_dim, grid, packs=packs(settings, device, head_dim=sizes.head_dim))
    return walk_cache(settings, geometry, device=device, dtype=next(network.parameters()).dtype, **more)


def scene_of(family: str, network: nn.Module, text: WalkText, vision: Tensor | None, path: CameraPath, start: Tensor | None) -> Scene:
    """A prompt and a start image for a network. family: its name in `models.FAMILIES`. vision: see `WalkInputs`. start: this process's part
    of the start image, in the scale of the network."""
    first = next(network.parameters())
    tokens, glyphs, vision = (None if part is None else part.to(first.device, first.dtype) for part in (text.tokens, text.glyphs, vision))
    if family != HY_WORLDPLAY_8B.name:
        return WanScene(network, network.project_context(tokens), path.actions, start)
    mask, glyph_mask = (None if part is None else part.to(first.device) for part in (text.mask, text.glyph_mask))
    keys = network.text(tokens, mask, glyphs=glyphs, glyph_mask=glyph_mask, image=vision)
    return HunyuanScene(network, keys, path.actions, start)
