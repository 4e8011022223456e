"""A walk through a world model: a start image, a prompt and a camera path become video, and what was left behind is remembered.

    scene = WanScene(network, network.project_context(embedding), path.actions, image)
    cache = walk_cache(settings, Geometry(30, 24, 128, (22, 40)), memory="bank", views=WORLDPLAY_5B, frames=len(path))
    model = WorldModel([WorldCondition(scene, cache)], path, memory="bank", views=WORLDPLAY_5B, rope=Rope)
    sampler = Sampler(model, Run(frames=len(path), chunk_frames=4, sigmas=DISTILLED, solver="euler"), shape)

A chunk of four latent frames reads earlier ones: all while they are few, later the newest and those that saw the same place
(`view_memory`). They take positions from 0 on, the chunk follows them, and each keeps its camera. Three memories say where their keys and
values come from:

- **rebuild**: as HY-WorldPlay does. Before a chunk, the chosen frames pass through the network once, at timestep 14 and together, and each
  layer's keys and values are encoded as they come. Between two chunks only latents are kept.
- **append**: as the released Quant VideoGen does. A finished chunk passes through the network once, and what it stored is read from then
  on, all of it or a window.
- **bank**: the same, but every frame stays for ever, at a precision that falls with age, and a chunk reads those that its camera will see.
  There is no context pass.

Keys and values of old frames depend on what they attended to. In *rebuild* they are computed anew in the present context; in the others
they are those of their own time, which is why the three make different videos.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from ..attention.functions import Attention, sdpa
from ..attention.prope import Prope
from ..attention.rope import NoRope, Rope
from ..attention.world import View, WorldAttention
from ..cache.context import context_settings
from ..cache.geometry import Geometry, on_device
from ..cache.kv_cache import KVCache, shrink, shrink_context
from ..cache.stats import CacheStats
from ..cache.walks import MEMORIES as MEMORIES
from ..cache.walks import check_memory, read_limit
from ..models.worldplay_hunyuan import with_start_image
from ..models.worldplay_schedule import CONTEXT_TIMESTEP as CONTEXT_TIMESTEP
from ..models.worldplay_schedule import SAMPLING_5B, SAMPLING_8B
from ..settings import QVGSettings
from .cameras import CameraPath
from .network import TIMESTEPS, check_conditions, finished_before
from .view_memory import ViewMemory

CHUNK = 4  # latent frames
# noise levels of the distilled checkpoints
DISTILLED, DISTILLED_8B = (one.levels(one.distilled_steps, distilled=True) for one in (SAMPLING_5B, SAMPLING_8B))


class Scene(Protocol):
    """A network with its prompt and start image. given: latents [B, C, 1, H, W] that latent frame 0 is, or None."""

    given: Tensor | None

    def flow(self, x: Tensor, timestep: Tensor, frames: Sequence[int], attend: WorldAttention) -> Tensor:
        """The flow, noise minus video, [B, C, F, H, W] of latent frames `frames`. timestep: [B, F]."""

    def encode(self, x: Tensor, timestep: Tensor, frames: Sequence[int], attend: WorldAttention) -> None:
        """Pass finished latents through all layers, so that `attend` stores their keys and values."""


class WanScene:
    """HY-WorldPlay 5B. prompt: of `WorldWan.project_context`. actions: [frames of the walk]. image: latents of the start image
    [B, C, 1, H, W], which latent frame 0 is."""

    def __init__(self, network: nn.Module, prompt, actions: Tensor, image: Tensor | None = None, attention: Attention = sdpa):
        self.network, self.prompt, self.actions, self.given, self.attention = network, prompt, actions, image, attention

    def flow(self, x: Tensor, timestep: Tensor, frames: Sequence[int], attend: WorldAttention) -> Tensor:
        return self.network(x, timestep, self.prompt, attend, action=_actions(self.actions, frames, x), attention=self.attention)

    def encode(self, x: Tensor, timestep: Tensor, frames: Sequence[int], attend: WorldAttention) -> None:
        self.network.encode(x, timestep, self.prompt, attend, action=_actions(self.actions, frames, x), attention=self.attention)


class HunyuanScene:
    """HY-WorldPlay 8B. text: of `WorldPlayHunyuan.text`. image: latents of the start image [B or 1, C, 1, H, W], a condition of latent
    frame 0; the frame itself is made like any other."""

    given = None

    def __init__(self, network: nn.Module, text, actions: Tensor, image: Tensor | None = None):
        self.network, self.text, self.actions, self.image = network, text, actions, image

    def flow(self, x: Tensor, timestep: Tensor, frames: Sequence[int], attend: WorldAttention) -> Tensor:
        return self.network(self._conditioned(x, frames), timestep, self.text, attend, action=_actions(self.actions, frames, x))

    def encode(self, x: Tensor, timestep: Tensor, frames: Sequence[int], attend: WorldAttention) -> None:
        self.network.encode(self._conditioned(x, frames), timestep, self.text, attend, action=_actions(self.actions, frames, x))

    def _conditioned(self, x: Tensor, frames: Sequence[int]) -> Tensor:
        return with_start_image(x, frames, None if self.image is None else self.image.to(x))


def _actions(actions: Tensor, frames: Sequence[int], x: Tensor) -> Tensor:
    """[B, F] labels of some latent frames, on the device of x."""
    return actions[list(frames)].to(x.device).expand(x.shape[0], -1)


@dataclass
class WorldCondition:
    """One side of guidance: a scene, the cache that its passes fill, and the weight of its prediction."""

    scene: Scene
    cache: KVCache
    weight: float = 1.0

    @property
    def dtype(self) -> torch.dtype:
        """That the network computes in, which its keys and values have."""
        return self.cache.workspace.dtype


def walk_cache(settings: QVGSettings, geometry: Geometry, *, memory: str, views: ViewMemory, frames: int, device="cpu",
               dtype: torch.dtype = torch.bfloat16, chunk_frames: int = CHUNK, workspace_limit: int | None = None, **more) -> KVCache:
    """A cache for a walk of `frames` latent frames. geometry: its layers, heads, head_dim, grid, batch and packs are used. workspace_limit,
    more: for `KVCache`.

    Raises ValueError for an unknown memory, and as `KVCache` does.
    """
    check_memory(memory)
    geometry = on_device(replace(geometry, branches=2), torch.device(device).type, workspace_limit)
    shape = {name: getattr(geometry, name) for name in ("layers", "heads", "head_dim", "grid", "batch", "branches", "packs")}
    shape |= {"rope": NoRope, "device": device, "dtype": dtype, "workspace_limit": workspace_limit, **more}
    if memory == "rebuild":
        kept = context_settings(settings, geometry, views.window, chunk_frames, dtype.itemsize)
        return KVCache(kept, max_frames=views.window + chunk_frames, chunk_frames=views.window, stored_frames=views.window, **shape)
    return KVCache(settings, max_frames=frames, chunk_frames=chunk_frames,
                   read_frames=read_limit(memory, views.window, frames, chunk_frames), **shape)


class WorldModel:
    """A `video.Model` of a world model, for `Sampler`. path: a camera for every latent frame. rope: makes positions from head dim and grid.

    attention: see `WorldAttention`. latents: of all finished chunks, [B, C, f, H, W] on the CPU. reads: the latent frames that the last
    chunk read.
    Raises ValueError for an unknown memory, a shared cache, weights that do not add up, and chunks that are not of whole clips.
    """

    def __init__(self, conditions: Sequence[WorldCondition], path: CameraPath, *, memory: str, views: ViewMemory,
                 rope: Callable[[int, tuple[int, int]], Rope], attention: Attention | None = None):
        check_memory(memory)
        self.conditions, self.path, self.memory, self.views, self.attention = list(conditions), path, memory, views, attention
        self.caches = [condition.cache for condition in self.conditions]
        check_conditions(self.conditions)
        geometry = self.caches[0].geometry
        self.rope = rope(geometry.head_dim, geometry.grid)
        self.prope = Prope(geometry.head_dim, geometry.grid, path.cameras, path.intrinsics)
        self.latents: list[Tensor] = []
        self.reads: list[int] = []
        self._ready: int | None = None  # the chunk whose context is in the cache
        self._selected: tuple[range, CameraPath, list[int]] | None = None

    @property
    def frames(self) -> int:
        """Finished latent frames."""
        return sum(part.shape[2] for part in self.latents)

    @torch.no_grad()
    def denoise(self, x: Tensor, sigma: float, first: int, *, prompt_frame: int, store: bool) -> Tensor:
        """See `Model`. Raises ValueError when a chunk reaches beyond the path."""
        new = range(first, first + x.shape[2])
        if new.stop > len(self.path):
            raise ValueError(f"A chunk of latent frames {new.start} to {new.stop - 1} reaches beyond the camera path of {len(self.path)}; "
                             "make the path longer.")
        self._prepare(new)
        if store:
            self._store(x, new)
            return x
        x, timestep, mixed = self._with_given(x, new), self._timesteps(x, new, TIMESTEPS * sigma), None
        for condition in self.conditions:
            flow = condition.scene.flow(x.to(condition.dtype), timestep, new, self._attend(condition, self.reads, new))
            denoised = (x - sigma * flow.float()) * condition.weight
            mixed = denoised if mixed is None else mixed + denoised
        return self._with_given(mixed, new)

    def _attend(self, condition: WorldCondition, frames: Sequence[int], new: Sequence[int], **options) -> WorldAttention:
        return WorldAttention(condition.cache, View(self.rope, self.prope, frames, new), attention=self.attention, **options)

    def _with_given(self, x: Tensor, new: Sequence[int]) -> Tensor:
        given = self.conditions[0].scene.given
        if given is None or 0 not in new:
            return x
        return torch.cat([given.to(x).expand(x.shape[0], -1, -1, -1, -1), x[:, :, 1:]], dim=2)

    def _timesteps(self, x: Tensor, new: Sequence[int], value: float) -> Tensor:
        """[B, F]"""
        timestep = torch.full((x.shape[0], len(new)), value, device=x.device)
        if self.conditions[0].scene.given is not None and 0 in new:
            timestep[:, 0] = CONTEXT_TIMESTEP
        return timestep

    def _prepare(self, new: range) -> None:
        """Have the caches return what the chunk reads; once a chunk."""
        if self._ready == new.start:
            return
        if self.memory == "append":
            self.reads = self._held()
        else:
            self.reads = self._select(new)
            if self.memory == "bank":
                self._look_back()
            else:
                self._rebuild()
        self._ready = new.start

    def _select(self, new: range) -> list[int]:
        """What the views choose for a chunk; the last choice is remembered."""
        if self._selected is None or self._selected[:2] != (new, self.path):
            self._selected = new, self.path, self.views.select(self.path, new.start, len(new)) if new.start else []
        return self._selected[2]

    def _held(self) -> list[int]:
        return self.caches[0].layers[0].seen_frames

    def _look_back(self) -> None:
        for cache in self.caches:
            cache.choose(self.reads)
        # a memory budget may have evicted some
        self.reads = self._held()

    def _rebuild(self) -> None:
        for condition in self.conditions:
            condition.cache.clear()
        if not self.reads:
            return
        x = self._finished(self.reads)
        for condition in self.conditions:
            device = condition.cache.workspace.device
            # as few as `context_settings` lets differ from the rest
            newest = min(condition.cache.settings.recent_frames, len(self.reads) - 1)
            attend = self._attend(condition, [], self.reads, store=True, newest=newest)
            condition.scene.encode(x.to(device, condition.dtype), self._context_timesteps(x, device), self.reads, attend)

    @staticmethod
    def _context_timesteps(x: Tensor, device) -> Tensor:
        return torch.full((x.shape[0], x.shape[2]), CONTEXT_TIMESTEP, device=device)

    def _store(self, clean: Tensor, new: range) -> None:
        if self.memory != "rebuild":
            for condition in self.conditions:
                attend = self._attend(condition, self.reads, new, store=True)
                condition.scene.encode(clean.to(condition.dtype), self._context_timesteps(clean, clean.device), new, attend)
        following = range(new.stop, min(new.stop + len(new), len(self.path)))
        if self.memory != "append" and following:
            # on the host, while the device still computes
            self._select(following)
        # in one assignment, so that an interrupt leaves the old list or the new one
        self.latents = [*self.latents, self._whole(clean).detach().to("cpu", torch.float32)]

    def _finished(self, frames: Sequence[int]) -> Tensor:
        """Latents of some finished frames, as the network takes them."""
        return torch.cat(self.latents, dim=2)[:, :, list(frames)]

    def _whole(self, clean: Tensor) -> Tensor:
        """Latents of whole frames from what the network gives."""
        return clean

    def remember(self, latents: list[Tensor]) -> None:
        """Begin with finished chunks, for which see `latents`."""
        self.latents = latents

    def prompt(self, frame: int) -> str:
        return ""

    def rewind(self, first: int) -> None:
        """Forget the chunks from latent frame `first` on."""
        self._ready, self.latents = None, finished_before(self.latents, first)
        for cache in self.caches:
            cache.clear() if self.memory == "rebuild" else cache.rewind(first)

    def shrink(self) -> str | None:
        """See `cache.kv_cache.shrink`. A context that is rebuilt is rebuilt with fewer bits, and never shorter."""
        if self.memory != "rebuild":
            return shrink(self.caches)
        self._ready = None
        return shrink_context(self.caches)

    def stats(self) -> CacheStats:
        return CacheStats.total([cache.stats() for cache in self.caches])
