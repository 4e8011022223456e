"""Nearest centroid of every token, for all rows in one launch. Twin: `qvg.smoothing.assign`.

The distance product runs on the matrix units against one block of centroids at a time and the best is kept in
registers, so the [tokens, centroids] matrix never exists in memory. Operands are rounded to `product` (bf16 on a GPU):
where two centroids are equally near to within that rounding either may win, and the residual is taken against the one
that did, so nothing is lost.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..qvg.dispatch import before_launch
from .tiles import Product, e4m3_to_float32, require_channels_last

# tokens of a program; fewer on cards whose registers do not hold them
TOKENS = 128


@triton.jit
def nearest(x, centroids, scale, count, D: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
            PRODUCT: tl.constexpr, E4M3: tl.constexpr, NATIVE_E4M3: tl.constexpr):
    """Ids int32 [TOKENS] of the rows of x [TOKENS, D]; ties take the lower id.

    centroids [count, D] points to float32, or to E4M3 bytes that scale [1, D] multiplies. |x|^2 is the same for every
    centroid and is left out.
    """
    x = x.to(PRODUCT)
    best = tl.full((TOKENS,), float("inf"), tl.float32)
    ids = tl.zeros((TOKENS,), tl.int32)
    channel = tl.arange(0, D)
    for start in range(0, count, BLOCK):
        number = start + tl.arange(0, BLOCK)
        inside = number < count
        block = tl.load(centroids + number[:, None] * D + channel[None, :], mask=inside[:, None], other=0)
        if E4M3:
            block = e4m3_to_float32(block, NATIVE_E4M3) * scale
        half_norms = tl.where(inside, 0.5 * tl.sum(block * block, axis=1), float("inf"))
        score = half_norms[None, :] - tl.dot(x, tl.trans(block.to(PRODUCT)), input_precision="ieee")
        least, where = tl.min(score, axis=1, return_indices=True)
        ids = tl.where(least < best, start + where, ids)
        best = tl.minimum(least, best)
    return ids


@triton.jit(do_not_specialize=["tokens", "count"])
def assign_kernel(x, centroids, ids, tokens, count, x_row, x_token,
                  D: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, PRODUCT: tl.constexpr):
    """Grid: (blocks of tokens, rows)."""
    row = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    mask = token < tokens
    at = row * x_row + token.to(tl.int64)[:, None] * x_token + tl.arange(0, D)[None, :]
    tile = tl.load(x + at, mask=mask[:, None], other=0.0)
    found = nearest(tile, centroids + row * count * D, 1.0, count, D, TOKENS, BLOCK, PRODUCT, False, False)
    tl.store(ids + row * tokens + token, found.to(tl.int64), mask=mask)


def assign(x: Tensor, centroids: Tensor) -> Tensor:
    """x [R, T, D] float32 or bf16, centroids [R, C, D] float32 -> int64 [R, T]."""
    require_channels_last(x)
    rows, tokens, dim = x.shape
    ids = torch.empty(rows, tokens, dtype=torch.int64, device=x.device)
    product = Product.of(dim, x.device, TOKENS)
    before_launch("assign", dim, x.dtype, x.device)
    assign_kernel[(triton.cdiv(tokens, product.tokens), rows)](
        x, centroids.contiguous(), ids, tokens, centroids.shape[1], x.stride(0), x.stride(1),
        D=dim, TOKENS=product.tokens, BLOCK=product.block, PRODUCT=product.dtype,
        num_warps=product.warps, num_stages=product.stages)
    return ids
