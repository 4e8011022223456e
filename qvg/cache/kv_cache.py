"""The KV cache of one run: encoded as it comes, read a few heads at a time, forgotten bit by bit.

A `KVCache` holds one `LayerCache` per layer and one workspace that all of them share. `append` encodes a finished chunk at once, so the
bf16 cache never exists. `read` decodes some heads of the whole history into the workspace, K with RoPE applied. Precision depends on age:
sinks and recent frames hold more bits, old spans settle to fewer, and under a memory budget the oldest lose bits and are then evicted.

Every byte that is reported is counted from tensors that are held. A cache belongs to one run; nothing is stored at module level.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from .. import backends
from ..codec import Tables
from ..registry import CODECS
from ..settings import QVGSettings
from . import limits
from .ageing import Limits
from .codebook_lifetime import Rules
from .geometry import Geometry, on_device
from .host import HostStore
from .layer import LayerCache
from .stats import KINDS, CacheStats
from .workspace import Workspace

# newest spans of a layer that are checked for tokens that are not finite: those of two chunks, which a sink may split
WATCHED = 4
BROKEN = ("QVG: keys or values of the model were not finite (NaN or infinite), or far too large, when latent frame %d was stored. They "
          "read back as NaN; no others in the cache are affected. A model that overflows in float16 is the usual cause; use bf16 or "
          "fp32.")


class KVCache:
    """All layers of one run.

    shape: layers, heads, head_dim, grid (tokens of a latent frame, height and width) and optionally batch, as in `Geometry`. rope: makes
    the model's positions from head_dim and grid, such as `attention.Rope`. dtype: of the keys and values that `read` returns and that
    16-bit spans hold. max_frames: latent frames of the whole video if known; the workspace is then allocated once. chunk_frames: latent
    frames of a chunk, for which a memory budget keeps space. stored_frames: most latent frames that are stored, if fewer than those two
    imply. read_frames: most latent frames that a pass sees, its own included, if it reads only those that `choose` names.
    workspace_limit: bytes of the workspace, however long the video is; a longer history is attended to a piece at a time
    (`attention.pieces`). None for what suits the device (`geometry.on_device`), 0 for no limit.
    agree: see `codec.misfit.Misfit`, for the cache of a rank.
    Raises ValueError when the settings do not fit this shape, or the budget is too small for it.
    """

    def __init__(self, settings: QVGSettings, *, rope: Callable[[int, tuple[int, int]], Any], device="cpu",
                 dtype: torch.dtype = torch.bfloat16, max_frames: int | None = None, chunk_frames: int = 3,
                 stored_frames: int | None = None, read_frames: int | None = None,
                 workspace_limit: int | None = None, agree: Callable[[torch.Tensor], torch.Tensor] | None = None, **shape):
        self.settings, self.agree = settings, agree
        self.geometry = geometry = on_device(Geometry(**shape), torch.device(device).type, workspace_limit)
        self.itemsize = dtype.itemsize
        self.limits: Limits = limits.limits(settings, self.geometry, chunk_frames, max_frames, self.itemsize, read_frames)
        self.rules = Rules(settings, self.geometry)
        self.rope = rope(geometry.head_dim, geometry.grid)
        self.tables = Tables(device)
        self.memo: dict = {}  # what backends keep from one read to the next, for all layers
        self.workspace = Workspace(self.geometry, dtype, device, read_frames or limits.capacity_frames(
            settings, chunk_frames, max_frames, self.limits.cap_frames))
        if stored_frames is None and read_frames is not None:
            stored_frames = read_frames - chunk_frames
        if stored_frames is None:
            stored_frames = limits.history_frames(settings, chunk_frames, max_frames, self.limits.cap_frames)
        self._staging = limits.staging_bytes(settings, self.geometry, chunk_frames, stored_frames, self.limits, self.itemsize)
        self.host = HostStore(device, self._staging) if settings.offload else None
        self.layers = [LayerCache(self, number) for number in range(geometry.layers)]
        self.peak_bytes = 0
        self.calls: backends.Calls = {}
        self.attention = ""  # which reads it and why, as `attention.choice` notes it
        self.said: set[str] = set()  # warnings of this run
        self._held: dict[int, int] = {}  # bytes of each layer as counted last
        self.chosen: frozenset[int] | None = None

    @property
    def frames(self) -> int:
        """Latent frames that every layer has stored so far."""
        return min((layer.next_frame for layer in self.layers), default=0)

    def choose(self, frames: Sequence[int] | None) -> None:
        """Read only the spans that hold these latent frames from now on, or with None all of them; for a memory that looks back at what a
        camera sees. Nothing is forgotten."""
        self.chosen = None if frames is None else frozenset(frames)

    def head_slices(self, group: int = 0) -> list[slice]:
        """Groups of heads that are decoded at a time."""
        group = group or self.workspace.group
        return [slice(start, start + group) for start in range(0, self.geometry.heads, group)]

    def _note_peak(self, changed: LayerCache | None = None) -> None:
        """Update the bytes of every layer, or of the one that changed, and the peak."""
        if changed is None:
            self._held.clear()
        for layer in self.layers:
            if layer is changed or layer.number not in self._held:
                self._held[layer.number] = layer.device_bytes
        staged = 0 if self.host is None else self.host.device_bytes
        self.peak_bytes = max(self.peak_bytes, sum(self._held.values()) + self.workspace.nbytes + staged)

    def recount(self) -> None:
        """Count all layers again when bytes are next asked for."""
        self._held.clear()

    def rewind(self, first: int) -> None:
        """Forget what was stored from latent frame `first` on. Bits that older spans have lost since do not come back."""
        self.recount()
        for layer in self.layers:
            layer.rewind(first)

    def shrink(self) -> str | None:
        """See `shrink`."""
        return shrink([self])

    def narrow(self) -> bool:
        """Forget everything, and store with the next fewer bits from now on; False where there are none."""
        widths, tensors = CODECS[self.settings.codec].widths, (self.settings.key, self.settings.value)
        fewer = [max((width for width in widths if width < tensor.bits), default=tensor.bits) for tensor in tensors]
        narrowed = fewer != [tensor.bits for tensor in tensors]
        key, value = (replace(tensor, bits=bits) for tensor, bits in zip(tensors, fewer))
        self.settings = replace(self.settings, key=key, value=value)
        self.rules = Rules(self.settings, self.geometry)
        self.clear()
        return narrowed

    def _warn_of_broken(self) -> None:
        """Once a run, as soon as the device has reported on the newest spans: usually a chunk later, since nothing waits for it."""
        if BROKEN not in self.said:
            found = [entry.first for layer in self.layers for entry in layer.entries[-WATCHED:] if entry.broken]
            if found:
                self.said.add(BROKEN)
                logging.warning(BROKEN, min(found))

    def stats(self) -> CacheStats:
        self._warn_of_broken()
        layers = [layer.bytes_by_kind() for layer in self.layers]
        self._held = {layer.number: sum(counts.values()) if self.host is None else counts["codebooks"]
                      for layer, counts in zip(self.layers, layers)}
        self._note_peak(self.layers[-1])
        by_kind = dict.fromkeys(KINDS, 0)
        for layer in layers:
            for kind, count in layer.items():
                by_kind[kind] = by_kind.get(kind, 0) + count
        by_bits = {}
        for layer in self.layers:
            for bits, count in layer.bytes_by_bits().items():
                by_bits[bits] = by_bits.get(bits, 0) + count
        held, ran = min((layer.held_frames for layer in self.layers), default=0), backends.summary(self.calls)
        return CacheStats(
            frames=self.frames, held_frames=held, tokens=held * self.geometry.frame_tokens,
            elements=self.geometry.bf16_bytes(held) // 2, stored_bytes=sum(by_kind.values()),
            workspace_bytes=self.workspace.nbytes, peak_bytes=self.peak_bytes, bf16_bytes=self.geometry.bf16_bytes(self.frames),
            by_kind=by_kind, by_layer=tuple(sum(layer.values()) for layer in layers), by_bits=dict(sorted(by_bits.items())),
            host_bytes=sum(layer.host_bytes for layer in self.layers), backends=ran,
            attention=self._attention_that_ran(ran.get("attend", "")))

    def _attention_that_ran(self, attended: str) -> str:
        """attended: which backend ran the op, which may be another than was expected."""
        expected = not self.attention or backends.REFERENCE in self.attention or backends.REFERENCE not in attended
        return self.attention if expected else f"{self.attention}; {attended}"

    def clear(self) -> None:
        """Forget everything that was stored, as if nothing ever had been; the workspace stays."""
        self._held.clear()
        self.chosen = None
        self.layers = [LayerCache(self, number) for number in range(self.geometry.layers)]

    def free(self) -> None:
        """Free all memory; the cache is empty and can be used again."""
        self.clear()
        self.workspace.free()
        self.memo.clear()
        self.calls.clear()
        self.said.clear()
        self.attention = ""
        if self.host is not None:
            self.host.close()
            self.host = HostStore(self.host.device, self._staging)


def shrink(caches: Sequence[KVCache]) -> str | None:
    """Free memory by the cheapest means left and say which: half of the heads that are decoded at a time, then bits of the widest spans,
    then the older half of the history. None when nothing is left to free.

    All caches of a run, such as those of its conditions, shrink alike, because guidance compares what they predict.
    """
    layers = [layer for cache in caches for layer in cache.layers]
    for cache in caches:
        cache.recount()
        if cache.host is not None:
            cache.host.shrink()
    if sum(cache.workspace.halve() for cache in caches):
        return f"Memory did not suffice: heads are now decoded {caches[0].workspace.group} at a time."
    # a pass that failed may have let spans age in some layers and caches and not yet in others
    if most := max(layer.widest for layer in layers):
        for layer in layers:
            layer.drop_bits(most)
        return "Memory did not suffice: the widest spans of the KV cache now hold fewer bits."
    movable = min(([entry for entry in layer.entries if not entry.sink] for layer in layers), key=len, default=[])
    if len(movable) < 2:
        return None
    for layer in layers:
        layer.forget_before(movable[len(movable) // 2].first)
    return "Memory did not suffice: the older half of the history was evicted from the KV cache."


def shrink_context(caches: Sequence[KVCache]) -> str | None:
    """As `shrink`, for caches that are filled anew for every chunk and never hold less of it: half of the heads at a time, then fewer bits
    from the next time on."""
    if sum(cache.workspace.halve() for cache in caches):
        return f"Memory did not suffice: heads are now decoded {caches[0].workspace.group} at a time."
    # all of them, not the first alone
    if not sum(cache.narrow() for cache in caches):
        return None
    return "Memory did not suffice: the context is now kept with fewer bits."
