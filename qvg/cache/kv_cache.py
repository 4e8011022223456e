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
from ..settings import QVGSettings
from . import limits
from .ageing import Limits
from .codebook_lifetime import Rules
from .geometry import Geometry, buffers_on
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
    imply. Raises ValueError when the settings do not fit this shape, or the budget is too small for it.
    """

    def __init__(self, settings: QVGSettings, *, rope: Callable[[int, tuple[int, int]], Any], device="cpu",
                 dtype: torch.dtype = torch.bfloat16, max_frames: int | None = None, chunk_frames: int = 3,
                 stored_frames: int | None = None, **shape):
        self.settings = settings
        geometry = Geometry(**shape)
        self.geometry = replace(geometry, buffers=buffers_on(torch.device(device).type, geometry.heads))
        self.itemsize = dtype.itemsize
        self.limits: Limits = limits.limits(settings, self.geometry, chunk_frames, max_frames, self.itemsize)
        self.rules = Rules(settings, self.geometry)
        self.rope = rope(geometry.head_dim, geometry.grid)
        self.tables = Tables(device)
        self.memo: dict = {}  # what backends keep from one read to the next, for all layers
        self.workspace = Workspace(self.geometry, dtype, device, limits.capacity_frames(
            settings, chunk_frames, max_frames, self.limits.cap_frames))
        if stored_frames is None:
            stored_frames = limits.history_frames(settings, chunk_frames, max_frames, self.limits.cap_frames)
        self._staging = limits.staging_bytes(settings, self.geometry, chunk_frames, stored_frames, self.limits, self.itemsize)
        self.host = HostStore(device, self._staging) if settings.offload else None
        self.layers = [LayerCache(self, number) for number in range(geometry.layers)]
        self.peak_bytes = 0
        self.calls: backends.Calls = {}
        self.said: set[str] = set()  # warnings of this run
        self._held: dict[int, int] = {}  # bytes of each layer as counted last

    @property
    def frames(self) -> int:
        """Latent frames that every layer has stored so far."""
        return min((layer.next_frame for layer in self.layers), default=0)

    def head_slices(self) -> list[slice]:
        group = self.workspace.group
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
        held = min((layer.held_frames for layer in self.layers), default=0)
        return CacheStats(
            frames=self.frames, held_frames=held, tokens=held * self.geometry.frame_tokens,
            elements=self.geometry.bf16_bytes(held) // 2, stored_bytes=sum(by_kind.values()),
            workspace_bytes=self.workspace.nbytes, peak_bytes=self.peak_bytes, bf16_bytes=self.geometry.bf16_bytes(self.frames),
            by_kind=by_kind, by_layer=tuple(sum(layer.values()) for layer in layers), by_bits=dict(sorted(by_bits.items())),
            host_bytes=sum(layer.host_bytes for layer in self.layers), backends=backends.summary(self.calls))

    def free(self) -> None:
        """Free all memory; the cache is empty and can be used again."""
        self.workspace.free()
        self.memo.clear()
        self._held.clear()
        self.calls.clear()
        self.said.clear()
        self.layers = [LayerCache(self, number) for number in range(self.geometry.layers)]
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
