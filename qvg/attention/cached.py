"""Attention of one chunk over a quantized history, a few heads at a time.

A network calls `attend(layer, q, k, v)` and knows nothing of caches. Here RoPE is applied to q and k at their absolute positions, the
history is decoded into the shared workspace for one group of heads, the chunk's own K and V follow it, and the group attends. Only the pass
over the finished chunk stores; noisy passes leave no trace.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property

import torch
from torch import Tensor

from .. import backends
from ..cache.kv_cache import KVCache
from ..cache.layer import LayerCache
from .choice import attention_of
from .functions import Attention
from .pieces import Running
from .rope import rotate_chunk
from .streams import DecodeAhead, PieceReader


class CachedAttention:
    """One forward pass over `frames` latent frames from absolute frame `start_frame`. Nothing in it is differentiated.

    store: this is the pass over the finished chunk; its K and V are appended, layer by layer. newest: see `LayerCache.append`.
    position_limit: latent frames that the network was trained to tell apart. Beyond it the pass ends at this position and the history
    keeps its distance to the pass; sinks keep their places. 0 sets no limit.
    attention: by default the one that the cache's settings ask for, see `choice`.
    A pass with a batch that is a multiple of the cache's (conditions stacked by CFG) reads the same history for each.
    Raises ValueError when a stored chunk does not continue where the cache ends.
    """

    def __init__(self, cache: KVCache, *, start_frame: int, frames: int, store: bool,
                 attention: Attention | None = None, position_limit: int = 0, newest: int = 0):
        if store and start_frame != cache.frames:
            raise ValueError(f"The chunk to store starts at latent frame {start_frame}, but the cache ends at frame {cache.frames}.")
        self.cache, self.frames, self.store, self.attention = cache, frames, store, attention or attention_of(cache)
        self.start_frame, self.newest = start_frame, newest
        self._ahead = None if cache.workspace.side is None else DecodeAhead(cache)
        self._whole_pass = True  # whether the same object is called for the next layer
        self.shift = max(0, start_frame + frames - position_limit) if position_limit else 0

    @cached_property
    def _angles(self) -> tuple[Tensor, Tensor]:
        """cos and sin of the chunk's positions, [T, 1, D / 2]."""
        cos, sin = self.cache.rope.tables(self.start_frame - self.shift, self.frames, self.cache.workspace.device)
        return cos[:, None], sin[:, None]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of layer `layer` from q, k and v [B, T, H, D], k after its norm and before RoPE, to [B, T, H, D].

        Raises ValueError when dtypes or devices differ from each other or from the cache's, or when the tokens are not those of `frames`
        latent frames.
        """
        self._check(q, k, v)
        with torch.no_grad(), backends.recording(self.cache.calls):
            out = self._attend(self.cache.layers[layer], q, k, v)
            if self.store:
                self.cache.layers[layer].append(k, v, self.frames, self.newest)
            return out

    def _check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        workspace = self.cache.workspace
        if not q.dtype == k.dtype == v.dtype:
            raise ValueError(f"Queries are {q.dtype}, keys {k.dtype} and values {v.dtype}; give all three in one dtype.")
        if q.dtype != workspace.dtype and not getattr(self.attention, "converts", False):
            raise ValueError(f"The network computes in {q.dtype}, but this cache returns keys and values in {workspace.dtype}. Make the "
                             f"cache with dtype={q.dtype}, or give an attention that converts them, such as attention.widened.")
        if q.device.type != torch.device(workspace.device).type:
            raise ValueError(f"The network computes on {q.device}, but this cache lies on {workspace.device}. Make the cache with "
                             f"device={str(q.device)!r}.")
        tokens = self.frames * self.cache.geometry.frame_tokens
        if not q.shape[1] == k.shape[1] == v.shape[1] == tokens:
            raise ValueError(f"Queries have {q.shape[1]} tokens, keys {k.shape[1]} and values {v.shape[1]}, but {self.frames} latent "
                             f"frames of this cache have {tokens}.")

    def _attend(self, history: LayerCache, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        past, workspace = history.tokens, self.cache.workspace
        if not past:
            q, rotated = rotate_chunk(q, k, v, *self._angles)
            return self.attention(q, rotated, v)
        if hasattr(self.attention, "history") or (not workspace.fits(past + k.shape[1]) and hasattr(self.attention, "partial")):
            return self._attend_in_pieces(history, q, k, v)
        buffers = [workspace.views(past + k.shape[1], number) for number in range(self.cache.geometry.buffers)]
        q, rotated = rotate_chunk(q, k, v, *self._angles, tuple(part[:, past:] for part in buffers[0]))
        # allocated while only the current stream is at work, because both streams write their heads here
        out = torch.empty_like(q)
        try:
            for heads, (keys, values), stream in self._groups(history, rotated, v, buffers):
                with stream:
                    self._attend_group(heads, q, rotated, v, keys, values, out)
        finally:
            if self._ahead:
                self._ahead.close()
        return out

    def _attend_in_pieces(self, history: LayerCache, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The chunk over its history, of which a few latent frames are decoded at a time."""
        workspace, batch = self.cache.workspace, self.cache.geometry.batch
        exact, rough = self.attention.partial, getattr(self.attention, "history", None)
        own = [slice(start, start + batch) for start in range(0, q.shape[0], batch)]
        q, k = rotate_chunk(q, k, v, *self._angles)
        out = torch.empty_like(q)
        unfinished: dict[int, list[Running]] = {}
        # behind the history, unless conditions differ in it or the history is attended to otherwise
        room = self.frames if len(own) == 1 and rough is None else 0
        with PieceReader(self.cache, history, self.shift, apart=rough is not None, room=room) as reader:
            for (heads, number, stream), piece, _, keys, values, room in reader.steps():
                with stream:
                    running = unfinished.setdefault(heads.start, [Running() for _ in own])
                    if room:
                        keys[:, -k.shape[1]:], values[:, -k.shape[1]:] = k[:, :, heads], v[:, :, heads]
                        running[0].finish(out[:, :, heads], *exact(q[:, :, heads], keys, values))
                    elif piece is None:
                        for at, joined in zip(own, unfinished.pop(heads.start)):
                            if not reader.room:
                                joined.finish(out[at, :, heads], *exact(q[at, :, heads], k[at, :, heads], v[at, :, heads]))
                    elif piece.coarse and rough is not None:
                        outs, sums = rough(q[:, :, heads], keys, values, workspace.packing(number))
                        for at, joined in zip(own, running):
                            joined.add(outs[at], sums[at])
                    else:
                        for at, joined in zip(own, running):
                            joined.add(*exact(q[at, :, heads], keys, values))
        return out

    def _groups(self, history: LayerCache, k: Tensor, v: Tensor, buffers: list[tuple[Tensor, Tensor]]
                ) -> Iterator[tuple[slice, tuple[Tensor, Tensor], AbstractContextManager]]:
        """Groups of heads: their decoded history followed by the chunk's own tokens (of a CFG batch, the first condition's), and the stream
        on which to attend. Those of the first group are in its buffer already."""
        past, slices, batch = history.tokens, self.cache.head_slices(), self.cache.geometry.batch

        def append(heads: slice, keys: Tensor, values: Tensor) -> None:
            keys[:, past:], values[:, past:] = k[:batch, :, heads], v[:batch, :, heads]

        if self._ahead is None:
            keys, values = buffers[0]
            for heads in slices:
                history.read(heads, keys[:, :past], values[:, :past], self.shift)
                if heads.start:
                    append(heads, keys, values)
                yield heads, (keys, values), nullcontext()
            return
        following = next(iter(self.cache.layers[history.number + 1:history.number + 2]), None) if self._whole_pass else None
        for heads, buffer, stream in self._ahead.groups(history, slices, buffers, self.shift, append, following):
            yield heads, buffer, torch.cuda.stream(stream)

    def _attend_group(self, heads: slice, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> None:
        """Some heads of the chunk over their history, written to `out`."""
        batch, past = self.cache.geometry.batch, keys.shape[1] - k.shape[1]
        # the conditions of a CFG batch differ in their own tokens only, so one after the other follows the same history
        for start in range(0, q.shape[0], batch):
            own = slice(start, start + batch)
            if start:
                keys[:, past:], values[:, past:] = k[own, :, heads], v[own, :, heads]
            out[own, :, heads] = self.attention(q[own, :, heads], keys, values)


def attend(cache: KVCache, layer: int, q: Tensor, k: Tensor, v: Tensor, *, frames: int, store: bool = False,
           attention: Attention | None = None) -> Tensor:
    """Attention of one layer over what `cache` holds and the chunk's own tokens, [B, T, H, D] in and out.

    q, k, v: of `frames` latent frames that follow what the cache holds, k after its norm and before RoPE. store: keep k and v, once per
    chunk. Call it for every layer in order. `CachedAttention` is the same for a whole pass, and faster: it computes the chunk's angles once
    and on a GPU decodes the next layer ahead.
    Raises ValueError as `CachedAttention` does.
    """
    one = CachedAttention(cache, start_frame=cache.layers[layer].next_frame, frames=frames, store=False, attention=attention)
    # each layer gets a new object here, so decoding the next layer ahead would be wasted
    one.store, one._whole_pass = store, False
    return one(layer, q, k, v)
