"""The session of a walk: its latents, its cameras and, where the memory keeps them, all keys and values.

    save(path, sampler, fingerprint=fingerprint(network))
    session = load(path)
    sampler = Sampler(WorldModel(conditions, session.path.extended(walk("w-16")), memory=session.memory, views=session.views, ...), ...)
    session.restore(sampler, fingerprint(network))

A memory that rebuilds its context needs the latents alone. The file is as safe as any session (see `session`): written atomically, with
checksums, and checked before anything in it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..cache.geometry import Geometry
from ..settings import QVGSettings
from . import session as storage
from .cameras import CameraPath
from .run import Run
from .sampler import Sampler
from .session import SessionError, refused
from .session_parts import WALK_KIND, check_causal, geometry_of
from .view_memory import ViewMemory
from .world import WorldModel

# cameras of a longer path may differ from saved ones by what rounding in float64 leaves
CAMERA_TOLERANCE = 1e-6


@dataclass
class WalkSession:
    """A checked session of a walk. cameras: the whole path that was planned; shape: (B, C, H, W) of a latent frame; latents [B, C, F, H, W]
    of the `frames_done` finished frames."""

    path: Path
    fingerprint: str
    run: Run
    shape: tuple[int, ...]
    memory: str
    views: ViewMemory
    cameras: CameraPath
    settings: list[QVGSettings]
    geometry: list[Geometry]
    dtype: str
    frames_done: int
    chunk: int
    latents: Tensor
    extra: dict
    tensors: dict[str, Tensor]
    layers: list[list[dict]] = field(repr=False)
    peaks: list[int] = field(repr=False)
    stored: dict[str, Tensor] = field(repr=False)

    def check(self, sampler: Sampler, fingerprint: str) -> None:
        """Raises SessionError where an unused sampler of a `WorldModel` cannot continue this walk. Its path must begin with the cameras of
        the finished frames."""
        model: WorldModel = sampler.model
        done = self.frames_done
        storage.check_same(self, sampler, fingerprint)
        if (model.memory, model.views) != (self.memory, self.views):
            raise SessionError(f"{self.path.name} was saved with the memory {self.memory!r} and {self.views}. Use the same.")
        ours = model.path[:max(1, done)]
        same = len(ours) >= done and torch.allclose(ours.cameras[:done], self.cameras.cameras[:done], rtol=0, atol=CAMERA_TOLERANCE)
        if not same or not torch.equal(ours.actions[:done], self.cameras.actions[:done]):
            raise SessionError(f"The camera path does not begin with the {done} latent frames of {self.path.name}. Continue the path that "
                               "it holds.")

    def restore(self, sampler: Sampler, fingerprint: str) -> None:
        """Fill an unused sampler of a `WorldModel`, or change nothing and raise as `check` does."""
        self.check(sampler, fingerprint)
        storage.fill(self, sampler)
        sampler.model.remember(self.remembered)

    @property
    def remembered(self) -> list[Tensor]:
        """`WorldModel.latents` of the finished frames."""
        return [self.latents] if self.frames_done else []


def save(path: str | Path, sampler: Sampler, *, fingerprint: str, extra: Mapping | None = None,
         tensors: Mapping[str, Tensor] | None = None) -> None:
    """Write the session of a walk between two chunks; extra, tensors and errors as for `session.save`."""
    header, of_caches, stored = contents(sampler, fingerprint, extra, tensors)
    storage.write(path, header, stored | of_caches)


def contents(sampler: Sampler, fingerprint: str, extra: Mapping | None, tensors: Mapping[str, Tensor] | None
             ) -> tuple[dict, dict[str, Tensor], dict[str, Tensor]]:
    """The header of a session, the tensors of the caches, and the others."""
    model: WorldModel = sampler.model
    stored = {f"extra.{name}": tensor for name, tensor in (tensors or {}).items()}
    stored |= {"cameras": model.path.cameras, "intrinsics": model.path.intrinsics, "actions": model.path.actions.to(torch.uint8)}
    if model.latents:
        stored["latents"] = torch.cat(model.latents, dim=2)
    of_caches: dict[str, Tensor] = {}
    header = storage.header_of(sampler, [] if model.memory == "rebuild" else model.caches, of_caches, fingerprint, extra)
    return header | {"kind": WALK_KIND, "memory": model.memory, "views": asdict(model.views)}, of_caches, stored


def load(path: str | Path) -> WalkSession:
    """Read and check the session of a walk. Raises SessionError and FileNotFoundError as `session.load` does."""
    return walk_of(Path(path), *storage.read(path))


def walk_of(path: Path, header: dict, stored: dict[str, Tensor]) -> WalkSession:
    """The walk that `session.read` returned for `path`. Raises SessionError."""
    if header.get("kind") != WALK_KIND:
        raise SessionError(f"{path.name} holds a video of another kind ({header.get('kind', 'causal')}). Choose one of a walk.")
    with refused(path):
        run, views = Run(**header["run"]), ViewMemory(**header["views"])
        check_causal(header, stored)
        # labels are part of the file, because those of a path that was continued are not all derived from its cameras
        cameras = CameraPath.from_cameras(stored["cameras"], stored["intrinsics"])
        cameras = CameraPath(cameras.cameras, cameras.intrinsics, stored["actions"].long())
    batch, channels, height, width = header["shape"]
    return WalkSession(
        path=path, fingerprint=header["fingerprint"], run=run, shape=tuple(header["shape"]), memory=header["memory"], views=views,
        cameras=cameras, settings=header["settings"], geometry=[geometry_of(place) for place in header["geometry"]],
        dtype=header["dtype"], frames_done=header["frames_done"], chunk=header["chunk"],
        latents=stored.get("latents", torch.empty(batch, channels, 0, height, width)), extra=header["extra"],
        tensors={name.removeprefix("extra."): tensor for name, tensor in stored.items() if name.startswith("extra.")},
        layers=header["layers"], peaks=header["peaks"], stored=stored)
