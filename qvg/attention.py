"""Attention of one chunk over a quantized history, a few heads at a time.

A network calls `attend(layer, q, k, v)` and knows nothing of caches. Here q and k are turned to their absolute positions, the history is
decoded into the shared workspace for one group of heads, the chunk's own K and V follow it, and the group attends. Only the pass over
the finished chunk stores: noisy passes leave no trace.
"""

from __future__ import annotations

from collections.abc import Callable

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
    A pass with a batch that is a multiple of the cache's (conditions stacked by CFG) reads the same history for each.
    Raises ValueError when a stored chunk does not continue where the cache ends.
    """

    def __init__(self, cache: KVCache, *, start_frame: int, frames: int, store: bool, attention: Attention = sdpa):
        if store and start_frame != cache.frames:
            raise ValueError(f"The chunk to store starts at latent frame {start_frame}, but the cache ends at frame {cache.frames}.")
        self.cache, self.frames, self.store, self.attention = cache, frames, store, attention
        self.start_frame = start_frame
        self._angles: tuple[Tensor, Tensor] | None = None

    def _turn(self, x: Tensor) -> Tensor:
        if self._angles is None:
            cos, sin = self.cache.rope.tables(self.start_frame, self.frames, x.device)
            self._angles = cos[:, None], sin[:, None]
        return rotate(x, *self._angles)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        history = self.cache.layers[layer]
        turned = self._turn(k)
        q = self._turn(q)
        if not history.tokens:
            out = self.attention(q, turned, v)
        else:
            out = torch.empty_like(q)
            for heads in self.cache.head_slices():
                out[:, :, heads] = self._attend_group(history, heads, q[:, :, heads], turned[:, :, heads], v[:, :, heads])
        if self.store:
            history.append(k, v, self.frames)
        return out

    def _attend_group(self, history, heads: slice, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        past, batch = history.tokens, self.cache.geometry.batch
        copies = q.shape[0] // batch
        keys, values = self.cache.workspace.views(past + k.shape[1])
        history.read(heads, keys[:, :past], values[:, :past])
        outs = []
        # the conditions of a CFG batch differ in their own tokens only, so they take turns behind the one history
        for part in range(copies):
            own = slice(part * batch, (part + 1) * batch)
            keys[:, past:], values[:, past:] = k[own], v[own]
            outs.append(self.attention(q[own], keys, values))
        return outs[0] if copies == 1 else torch.cat(outs)
