"""Attention of one chunk over a quantized history, a few heads at a time.

A network calls `attend(layer, q, k, v)` and knows nothing of caches. Here q and k are turned to their absolute positions, the history is
decoded into the shared workspace for one group of heads, the chunk's own K and V follow it, and the group attends. Only the pass over
the finished chunk stores: noisy passes leave no trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .cache import KVCache, LayerCache
from .rope import rotate

# q [B, T, H, D], k and v [B, N, H, D] -> [B, T, H, D]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full attention through torch, [B, T, H, D] in and out."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)


def widened(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`sdpa` of a network that computes in a wider type than its cache keeps, as one does where bf16 is slow."""
    return sdpa(q, k.to(q.dtype), v.to(q.dtype))


class CachedAttention:
    """One forward pass over `frames` latent frames from absolute frame `start_frame`.

    store: this is the pass over the finished chunk; its K and V are appended, layer by layer. newest: see `LayerCache.append`.
    position_limit: latent frames that the network was trained to tell apart. Beyond it the pass ends at this position and the history
    keeps its distance to the pass; sinks keep their places. 0 counts on without end.
    A pass with a batch that is a multiple of the cache's (conditions stacked by CFG) reads the same history for each.
    Raises ValueError when a stored chunk does not continue where the cache ends.
    """

    def __init__(self, cache: KVCache, *, start_frame: int, frames: int, store: bool, attention: Attention = sdpa,
                 position_limit: int = 0, newest: int = 0):
        if store and start_frame != cache.frames:
            raise ValueError(f"The chunk to store starts at latent frame {start_frame}, but the cache ends at frame {cache.frames}.")
        self.cache, self.frames, self.store, self.attention = cache, frames, store, attention
        self.start_frame, self.newest = start_frame, newest
        self._ahead = None if cache.workspace.side is None else _Ahead(cache)
        self.shift = max(0, start_frame + frames - position_limit) if position_limit else 0
        self._angles: tuple[Tensor, Tensor] | None = None

    def _turn(self, x: Tensor) -> Tensor:
        if self._angles is None:
            cos, sin = self.cache.rope.tables(self.start_frame - self.shift, self.frames, x.device)
            self._angles = cos[:, None], sin[:, None]
        return rotate(x, *self._angles)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        history = self.cache.layers[layer]
        turned = self._turn(k)
        q = self._turn(q)
        if not history.tokens:
            out = self.attention(q, turned, v)
        else:
            # made before any stream but the present one is at work, because each of them writes its heads here
            out = torch.empty_like(q)
            try:
                for heads, keys, values in self._decoded(history, turned, v):
                    with self._ahead.lane() if self._ahead else nullcontext():
                        self._attend_group(heads, q, turned, v, keys, values, out)
            finally:
                if self._ahead:
                    self._ahead.close()
        if self.store:
            history.append(k, v, self.frames, self.newest)
        return out

    def _decoded(self, history: LayerCache, k: Tensor, v: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Groups of heads in turn: their history, decoded, and behind it the chunk's own tokens (of a CFG batch, the first condition's)."""
        workspace, past, slices, batch = self.cache.workspace, history.tokens, self.cache.head_slices(), self.cache.geometry.batch
        tokens, ahead = past + k.shape[1], self._ahead

        def append(heads: slice, keys: Tensor, values: Tensor) -> None:
            keys[:, past:], values[:, past:] = k[:batch, :, heads], v[:batch, :, heads]

        if ahead is None:
            for heads in slices:
                keys, values = workspace.views(tokens)
                history.read(heads, keys[:, :past], values[:, :past], self.shift)
                append(heads, keys, values)
                yield heads, keys, values
            return
        ahead.open(history, slices[0], tokens, self.shift)
        ahead.append(append, slices[0])
        coming = [(history, heads) for heads in slices[1:]]
        coming += [(layer, slices[0]) for layer in self.cache.layers[history.number + 1:history.number + 2] if layer.tokens == past]
        for number, heads in enumerate(slices):
            views = ahead.take()
            if number < len(coming):
                layer, group = coming[number]
                ahead.begin(layer, group, layer.tokens + k.shape[1])
                # A copy goes first, for the next layer one that it will overwrite: meanwhile attention to the group before takes the
                # multiprocessors that it can use, and what is decoded takes the others. The other way round attention would wait.
                ahead.append(append, group)
                ahead.decode(layer, self.shift)
            yield heads, *views
            ahead.release()

    def _attend_group(self, heads: slice, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> None:
        """Some heads of the chunk over what `_decoded` gave, to `out`."""
        batch, past = self.cache.geometry.batch, keys.shape[1] - k.shape[1]
        # the conditions of a CFG batch differ in their own tokens only, so they take turns behind the one history
        for start in range(0, q.shape[0], batch):
            own = slice(start, start + batch)
            if start:
                keys[:, past:], values[:, past:] = k[own, :, heads], v[own, :, heads]
            out[own, :, heads] = self.attention(q[own, :, heads], keys, values)


class _Ahead:
    """Decodes a group of heads on a second stream while the group before attends, and while a layer ends the first group of the next.

    Attention seldom fills a device to its last multiprocessor, so what is decoded beside it costs next to nothing. For the same reason
    groups attend on two streams in turn: what the last blocks of one leave idle, the next one takes, as it would if all heads attended at
    once. Two buffers take turns; events say when one is ready, and when what reads it is done. Lives as long as a pass, in which no
    history changes before its layer was read.
    """

    def __init__(self, cache: KVCache):
        self._workspace = cache.workspace
        self._free: list[torch.cuda.Event | None] = [None] * cache.geometry.buffers
        self._buffer = 0  # the one that is being filled
        self._filled: tuple | None = None  # what it was begun for
        self._views: tuple[Tensor, Tensor] | None = None
        self._attends: torch.cuda.Stream | None = None

    @property
    def _present(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._workspace.device)

    def open(self, history: LayerCache, heads: slice, tokens: int, shift: int) -> None:
        """A layer is read from here on: what the present stream made of its tokens may be copied, and its first group is decoded unless
        it is already."""
        self._made, self._home = self._present.record_event(), self._present
        self._workspace.lane.wait_event(self._made)
        if self._filled != (history.number, heads, tokens):
            self.begin(history, heads, tokens)
            self.decode(history, shift)

    def begin(self, history: LayerCache, heads: slice, tokens: int) -> None:
        """Take the next buffer, once what reads it is done, for some heads of `tokens` tokens."""
        self._filled = history.number, heads, tokens
        self._views = self._workspace.views(tokens, self._buffer)
        self._workspace.side.wait_event(self._free[self._buffer] or self._made)

    def decode(self, history: LayerCache, shift: int) -> None:
        with torch.cuda.stream(self._workspace.side):
            past = history.tokens
            history.read(self._filled[1], self._views[0][:, :past], self._views[1][:, :past], shift)

    def append(self, copy: Callable, heads: slice) -> None:
        """The chunk's own tokens, by `copy(heads, keys, values)`."""
        side = self._workspace.side
        with torch.cuda.stream(side):
            side.wait_event(self._made)
            copy(heads, *self._views)

    def take(self) -> tuple[Tensor, Tensor]:
        """The views that were filled last, for which the stream that attends to them waits; the other buffer is filled next."""
        views, self._taken = self._views, self._buffer
        self._attends = self._workspace.lane if self._attends is self._home else self._home
        self._attends.wait_event(self._workspace.side.record_event())
        self._buffer, self._filled, self._views = (self._buffer + 1) % len(self._free), None, None
        return views

    def lane(self) -> AbstractContextManager:
        """Inside, work goes to the stream that attends to the views taken last."""
        return torch.cuda.stream(self._attends)

    def release(self) -> None:
        """All that reads the views taken last has been given to its stream."""
        self._free[self._taken] = self._attends.record_event()

    def close(self) -> None:
        """The present stream waits for what the others still do of this layer."""
        self._present.wait_stream(self._workspace.lane)
