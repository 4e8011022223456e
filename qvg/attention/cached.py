"""Attention of one chunk over a quantized history, a few heads at a time.

A network calls `attend(layer, q, k, v)` and knows nothing of caches. Here q and k are turned to their absolute positions, the history is
decoded into the shared workspace for one group of heads, the chunk's own K and V follow it, and the group attends. Only the pass over
the finished chunk stores: noisy passes leave no trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property

import torch
from torch import Tensor

from .. import backends
from ..cache.kv_cache import KVCache
from ..cache.layer import LayerCache
from .rope import rotate_chunk

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

    @cached_property
    def _angles(self) -> tuple[Tensor, Tensor]:
        """cos and sin of the chunk's positions, [T, 1, D / 2]."""
        cos, sin = self.cache.rope.tables(self.start_frame - self.shift, self.frames, self.cache.workspace.device)
        return cos[:, None], sin[:, None]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with backends.recording(self.cache.calls):
            return self._pass(layer, q, k, v)

    def _pass(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        history = self.cache.layers[layer]
        past, workspace = history.tokens, self.cache.workspace
        if not past:
            q, turned = rotate_chunk(q, k, v, *self._angles)
            out = self.attention(q, turned, v)
        else:
            buffers = [workspace.views(past + k.shape[1], number) for number in range(self.cache.geometry.buffers)]
            q, turned = rotate_chunk(q, k, v, *self._angles, tuple(part[:, past:] for part in buffers[0]))
            # made before any stream but the present one is at work, because each of them writes its heads here
            out = torch.empty_like(q)
            try:
                for heads, keys, values, lane in self._decoded(history, turned, v, buffers):
                    with lane:
                        self._attend_group(heads, q, turned, v, keys, values, out)
            finally:
                if self._ahead:
                    self._ahead.close()
        if self.store:
            history.append(k, v, self.frames, self.newest)
        return out

    def _decoded(self, history: LayerCache, k: Tensor, v: Tensor,
                 buffers: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[slice, Tensor, Tensor, AbstractContextManager]]:
        """Groups of heads in turn: their history, decoded, behind it the chunk's own tokens (of a CFG batch, the first condition's), and
        where they attend. Those of the first group are there already."""
        past, slices, batch = history.tokens, self.cache.head_slices(), self.cache.geometry.batch

        def append(heads: slice, keys: Tensor, values: Tensor) -> None:
            keys[:, past:], values[:, past:] = k[:batch, :, heads], v[:batch, :, heads]

        if self._ahead is None:
            keys, values = buffers[0]
            for heads in slices:
                history.read(heads, keys[:, :past], values[:, :past], self.shift)
                if heads.start:
                    append(heads, keys, values)
                yield heads, keys, values, nullcontext()
            return
        following = next(iter(self.cache.layers[history.number + 1:history.number + 2]), None)
        yield from self._ahead.groups(history, slices, buffers, self.shift, append, following)

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
    """Decodes a group of heads while the group before attends, and while a layer ends the first group of the next.

    Attention seldom fills a device to its last multiprocessor, so what is decoded beside it costs next to nothing. For the same reason
    groups attend on two streams in turn: what the last blocks of one leave idle, the next one takes, as it would if all heads attended at
    once. A group is decoded on the stream and into the buffer that it attends on and from, so that the streams wait for each other only
    where a layer begins and ends. There are two and no more, the present one and `Workspace.side`: an H100 needs 0.6 us longer to
    start each kernel of a network while two other streams wait for it (measured), and no longer while one does. Lives as long as a pass,
    in which no history changes before its layer was read.
    """

    def __init__(self, cache: KVCache):
        self._workspace, self._offloads = cache.workspace, cache.host is not None
        self._filled: tuple | None = None  # what the first buffer was filled for

    @property
    def _present(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._workspace.device)

    def groups(self, history: LayerCache, slices: list[slice], buffers: list[tuple[Tensor, Tensor]], shift: int,
               append: Callable[[slice, Tensor, Tensor], None],
               following: LayerCache | None) -> Iterator[tuple[slice, Tensor, Tensor, AbstractContextManager]]:
        """Groups of heads, each with its buffer, filled, and the stream that it is to attend on. append: copies the chunk's own tokens
        to the end of a buffer, where those of the first group are already. following: the next layer."""
        home, side = self._present, self._workspace.side
        lanes, tokens = (home, side), buffers[0][0].shape[1]

        def decode(layer: LayerCache, heads: slice, keys: Tensor, values: Tensor) -> None:
            layer.read(heads, keys[:, :layer.tokens], values[:, :layer.tokens], shift)

        if self._filled != (history.number, slices[0], tokens):
            decode(history, slices[0], *buffers[0])
        self._filled = None
        side.wait_event(home.record_event())
        for number, heads in enumerate(slices):
            if number + 1 < len(slices):
                coming, other = slices[number + 1], (number + 1) % 2
                with torch.cuda.stream(lanes[other]):
                    # The copy goes first: meanwhile attention to the group before takes the multiprocessors that it can use, and what is
                    # decoded takes the others. The other way round attention would wait.
                    append(coming, *buffers[other])
                    decode(history, coming, *buffers[other])
                    read = lanes[other].record_event()
            elif number % 2 and following is not None and following.tokens == history.tokens:
                if self._offloads:
                    # to read on is to overwrite what was staged of this layer, so all of it must have been read
                    home.wait_event(read)
                decode(following, slices[0], *buffers[0])
                self._filled = following.number, slices[0], tokens
            yield heads, *buffers[number % 2], torch.cuda.stream(lanes[number % 2])

    def close(self) -> None:
        """The present stream waits for what the other still does of this layer."""
        self._present.wait_stream(self._workspace.side)
