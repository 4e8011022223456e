"""Attention functions on [B, T, H, D], the layout of this pack."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# q [B, T, H, D], k and v [B, N, H, D] -> [B, T, H, D]. One with a true attribute `converts` takes k and v of another dtype than q.
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full attention through torch, [B, T, H, D] in and out. All three have the same dtype."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)


def widened(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`sdpa` for a network that computes in a wider dtype than its cache holds, as on a CPU where bf16 is slow."""
    return sdpa(q, k.to(q.dtype), v.to(q.dtype))


widened.converts = True
