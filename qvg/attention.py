"""Attention of one chunk over a quantized history, a few heads at a time.

A network calls `attend(layer, q, k, v)` and knows nothing of caches. Here q and k are turned to their absolute positions, the history is
decoded into the shared workspace for one group of heads, the chunk's own K and V follow it, and the group attends. Only the pass over
the finished chunk stores: noisy passes leave no trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .cache import KVCache
from .rope import rotate

# q [B, T, H, D], k and v [B, N, H, D] -> [B, T, H, D]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full attention through torch, [B, T, H, D] in and out."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)


class CachedAttention:
    """One forward pass over `frames` latent frames from absolute frame `start_frame`.

    store: this is the pass over the finished chunk; its K and V are appended, layer by layer.
    position_limit: latent frames that the network was trained to tell apart. Beyond it the pass ends at this position and the history
    keeps its distance to the pass; sinks keep their places. 0 counts on without end.
    A pass with a batch that is a multiple of the cache's (conditions stacked by CFG) reads the same history for each.
    Raises ValueError when a stored chunk does not continue where the cache ends.
    """

    def __init__(self, cache: KVCache, *, start_frame: int, frames: int, store: bool, attention: Attention = sdpa,
                 position_limit: int = 0):
        if store and start_frame != cache.frames:
            raise ValueError(f"The chunk to store starts at latent frame {start_frame}, but the cache ends at frame {cache.frames}.")
        self.cache, self.frames, self.store, self.attention = cache, frames, store, attention
        self.start_frame = start_frame
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
            groups = self._decoded(history, turned, v)
            out = torch.cat([self._attend_group(heads, q, turned, v, keys, values) for heads, keys, values in groups], dim=2)
        if self.store:
            history.append(k, v, self.frames)
        return out

    def _decoded(self, history, k: Tensor, v: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Groups of heads in turn: their history, decoded, and behind it the chunk's own tokens (of a CFG batch, the first condition's).

        With two buffers a second stream decodes a group while the one before attends, and waits for a buffer until what reads it is done.
        """
        workspace, past, slices = self.cache.workspace, history.tokens, self.cache.head_slices()
        side, batch, tokens = workspace.side, self.cache.geometry.batch, history.tokens + k.shape[1]

        def fill(heads: slice, keys: Tensor, values: Tensor) -> None:
            history.read(heads, keys[:, :past], values[:, :past], self.shift)
            keys[:, past:], values[:, past:] = k[:batch, :, heads], v[:batch, :, heads]

        if side is None:
            for heads in slices:
                views = workspace.views(tokens)
                fill(heads, *views)
                yield heads, *views
            return
        main = torch.cuda.current_stream(workspace.device)
        buffers = self.cache.geometry.buffers
        views = [workspace.views(tokens, buffer) for buffer in range(buffers)]
        ready, done = [], []

        def decode(number: int) -> None:
            with torch.cuda.stream(side):
                if number < buffers:
                    side.wait_stream(main)
                else:
                    side.wait_event(done[number - buffers])
                fill(slices[number], *views[number % buffers])
                ready.append(side.record_event())

        decode(0)
        for number, heads in enumerate(slices):
            if number + 1 < len(slices):
                decode(number + 1)
            main.wait_event(ready[number])
            yield heads, *views[number % buffers]
            done.append(main.record_event())

    def _attend_group(self, heads: slice, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Some heads of the chunk over what `_decoded` gave."""
        batch, past, outs = self.cache.geometry.batch, keys.shape[1] - k.shape[1], []
        # the conditions of a CFG batch differ in their own tokens only, so they take turns behind the one history
        for start in range(0, q.shape[0], batch):
            own = slice(start, start + batch)
            if start:
                keys[:, past:], values[:, past:] = k[own, :, heads], v[own, :, heads]
            outs.append(self.attention(q[own, :, heads], keys, values))
        return outs[0] if len(outs) == 1 else torch.cat(outs)
