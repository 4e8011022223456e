"""Sessions of a video that several ranks make: saved with the heads of all of them, and continued by any number of ranks.

    save(path, sampler, ranks=ranks, fingerprint=...)             # by the leader; the others run `take_part` on the command "save"
    restore(session, sampler, ranks, fingerprint)           # likewise on the command "restore"

`save_walk` is for walks. A session of segments holds no keys and values, so the first rank saves it alone (`segments.save_sampler`).
`restore` takes sessions of all kinds.

Which axis of a tensor counts rows (batch x heads) is not written down anywhere: it is the one whose length follows the heads in what a
codec states of its parts (`session_parts`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ..attention.ranks import Ranks
from ..cache.kv_cache import KVCache
from ..settings import QVGSettings
from . import session as storage
from . import walk_session
from .sampler import Sampler
from .segments import SegmentSession
from .session import Session
from .session_parts import cache_parts
from .walk_session import WalkSession


def save(path: str | Path, sampler: Sampler, *, ranks: Ranks, fingerprint: str, latents: Tensor | None = None, extra: Mapping | None = None,
         tensors: Mapping[str, Tensor] | None = None) -> None:
    """As `session.save`, by the first rank, with the heads of all. Raises as that does, before the others are asked for anything."""
    _write(path, sampler, ranks, *storage.contents(sampler, fingerprint, latents, extra, tensors))


def save_walk(path: str | Path, sampler: Sampler, *, ranks: Ranks, fingerprint: str, extra: Mapping | None = None,
              tensors: Mapping[str, Tensor] | None = None) -> None:
    """As `walk_session.save`, in the same way."""
    _write(path, sampler, ranks, *walk_session.contents(sampler, fingerprint, extra, tensors))


def _write(path: str | Path, sampler: Sampler, ranks: Ranks, header: dict, own: dict[str, Tensor], stored: dict[str, Tensor]) -> None:
    """own: tensors of this rank's caches. stored: the others, which are those of the video."""
    sampler.model.tell("save", header)
    storage.write(path, _of_all(header, ranks), stored | dict(_gather(header, own, ranks)))


def take_part(header: dict, caches: list[KVCache], ranks: Ranks) -> None:
    """Send this rank's heads to the first rank, which saves them."""
    own: dict[str, Tensor] = {}
    # a memory that rebuilds its context saves none of it
    storage.layer_states(caches if header["layers"] else [], own)
    for _ in _gather(header, own, ranks):
        pass


def restore(session: Session | WalkSession | SegmentSession, sampler: Sampler, ranks: Ranks, fingerprint: str) -> None:
    """As the session's own `restore`, by the first rank, for all. Raises SessionError before the others are asked for anything."""
    if isinstance(session, SegmentSession):
        session.restore(sampler, fingerprint)
        return
    caches = sampler.model.caches
    geometry = [replace(place, heads=cache.geometry.heads) if place.heads == cache.geometry.heads * ranks.size else place
                for place, cache in zip(session.geometry, caches)]
    own = replace(session, geometry=geometry)
    own.check(sampler, fingerprint)
    header = {"shape": list(session.shape), "frames_done": session.frames_done, "chunk": session.chunk,
              "run": {"frames": session.run.frames}, "settings": [cache.settings.to_json() for cache in caches],
              "geometry": [storage.shape_of(place) for place in geometry], "layers": session.layers, "dtype": session.dtype,
              "peaks": [0] * len(caches), "memory": getattr(session, "memory", "")}
    sampler.model.tell("restore", header)
    own.stored = dict(_scatter(header, session.stored, ranks))
    # with the others, because all agree on how well each span fits
    own.restore(sampler, fingerprint)


def remembered(shapes: Sequence[tuple[int, ...]], parts: list[Tensor] | None, ranks: Ranks) -> list[Tensor]:
    """Finished latents of whole frames, float32 on the CPU, from the first rank to all. parts: those of the first rank, whose shapes the
    others know."""
    parts = [torch.empty(shape) for shape in shapes] if parts is None else [part.float().contiguous() for part in parts]
    for part in parts:
        dist.broadcast(part, src=0, group=ranks.control)
    return parts


def receive(header: dict, caches: list[KVCache], ranks: Ranks) -> None:
    """Fill this rank's caches with its heads of the session that the first rank restores."""
    stored = dict(_scatter(header, None, ranks))
    storage.fill_caches(caches, header["layers"], stored)


def _row_axes(header: dict) -> dict[str, int | None]:
    """For each tensor of the caches, the axis that counts rows; None where all ranks have the same. header: of one rank."""
    header = header | {"settings": [QVGSettings.from_json(text) for text in header["settings"]]}
    places = [place | {"grid": list(place["grid"])} for place in header["geometry"]]
    parts, wide = (cache_parts(header | {"geometry": [place | {"heads": times * place["heads"]} for place in places]},
                               [place["grid"] for place in places]) for times in (1, 2))
    return {name: next((axis for axis, pair in enumerate(zip(part.shape, wide[name].shape)) if pair[0] != pair[1]), None)
            for name, part in parts.items()}


def _of_all(header: dict, ranks: Ranks) -> dict:
    """The header of all heads."""
    geometry = [place | {"heads": place["heads"] * ranks.size} for place in header["geometry"]]
    return header | {"geometry": geometry, "peaks": [peak * ranks.size for peak in header["peaks"]]}


def _gather(header: dict, own: dict[str, Tensor], ranks: Ranks) -> Iterator[tuple[str, Tensor]]:
    """The tensors of all ranks by name, joined; on the first rank alone."""
    batch = header["shape"][0]
    for name, axis in _row_axes(header).items():
        mine = own[name].detach().cpu().contiguous()
        if axis is None:
            yield name, mine
            continue
        parts = [torch.empty_like(mine) for _ in range(ranks.size)] if ranks.leads else None
        dist.gather(_bytes(mine), [_bytes(part) for part in parts] if ranks.leads else None, dst=0, group=ranks.control)
        if ranks.leads:
            # rows are heads of a batch entry
            yield name, torch.cat([part.unflatten(axis, (batch, -1)) for part in parts], axis + 1).flatten(axis, axis + 1)


def _scatter(header: dict, stored: Mapping[str, Tensor] | None, ranks: Ranks) -> Iterator[tuple[str, Tensor]]:
    """This rank's tensors by name. stored: those of all heads, on the first rank."""
    batch, axes = header["shape"][0], _row_axes(header)
    shapes = ranks.command(None if stored is None else {name: (stored[name].dtype, list(stored[name].shape)) for name in axes})
    for name, axis in axes.items():
        dtype, shape = shapes[name]
        if axis is not None:
            shape[axis] //= ranks.size
        mine = torch.empty(shape, dtype=dtype)
        if axis is None:
            if ranks.leads:
                mine.copy_(stored[name])
            dist.broadcast(_bytes(mine), src=0, group=ranks.control)
        else:
            parts = None
            if ranks.leads:
                rows = stored[name].unflatten(axis, (batch, -1)).chunk(ranks.size, axis + 1)
                parts = [_bytes(part.flatten(axis, axis + 1).contiguous()) for part in rows]
            dist.scatter(_bytes(mine), parts, src=0, group=ranks.control)
        yield name, mine


def _bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor as uint8, which every transport knows."""
    return tensor.view(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)
