"""Attention functions on [B, T, H, D], the layout of this pack."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import fast
from .pieces import partial

# q [B, T, H, D], k and v [B, N, H, D] -> [B, T, H, D]. One with a true attribute `converts` takes k and v of another dtype than q; one with
# an attribute `partial`, see `pieces.partial`, can attend to a history a piece at a time. With an attribute `history`, a function like
# `fast.attend`, it attends by that to what the history holds in few bits, for all conditions of a CFG batch at once.
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full attention through torch, [B, T, H, D] in and out. All three have the same dtype."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)


sdpa.partial = partial


def widened(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`sdpa` for a network that computes in a wider dtype than its cache holds, as on a CPU where bf16 is slow."""
    return sdpa(q, k.to(q.dtype), v.to(q.dtype))


widened.converts = True
widened.partial = lambda q, k, v: partial(q, k.to(q.dtype), v.to(q.dtype))


def eight_bits(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`widened` to a chunk's own tokens and to what its history holds in many bits; in eight bits to the rest, see `fast`."""
    return widened(q, k, v)


eight_bits.converts = True
eight_bits.partial = widened.partial
eight_bits.history = fast.attend
