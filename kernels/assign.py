"""Nearest centroid of every token, for all rows in one launch. Twin: `qvg.smoothing.assign`.

Centroids are first written as the matrix units take them, with half their norms; a program then multiplies its tokens with one block of
centroids at a time and keeps the best in registers, so the [tokens, centroids] matrix never exists in memory. Operands are rounded to
`product` (bf16 on a GPU): where two centroids are equally near to within that rounding either may win, and the residual is taken against
the one that did, so nothing is lost.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..qvg.dispatch import Unsupported, before_launch
from .tiles import Product, require_channels_last

# centroids of a program that prepares them
PREPARED = 16
# a score gives its lowest bits to the number of its centroid, of which there are at most 256
MAX_CENTROIDS = 256


@triton.jit
def nearest(x, table, norms, count, D: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """Ids int32 [TOKENS] of the rows of x [TOKENS, D], in the number type of `table` [count, D]; ties take the lower id.

    norms [count] float32 are half those of the centroids. |x|^2 is the same for every centroid and is left out. The least score and its
    place are found as one number: the place stands in the lowest bits of the score, turned over where it is negative, so that a lower
    place is the lesser number in both cases.
    """
    best = tl.full((TOKENS,), float("inf"), tl.float32)
    channel = tl.arange(0, D)
    for start in range(0, count, BLOCK):
        number = start + tl.arange(0, BLOCK)
        inside = number < count
        block = tl.load(table + number[:, None] * D + channel[None, :], mask=inside[:, None], other=0.0)
        half = tl.load(norms + number, mask=inside, other=3e38)
        score = half[None, :] - tl.dot(x, tl.trans(block), input_precision="ieee")
        bits = score.to(tl.int32, bitcast=True)
        bits = (bits & -256) | (number[None, :] ^ ((bits >> 31) & 255))
        best = tl.minimum(best, tl.min(bits.to(tl.float32, bitcast=True), axis=1))
    bits = best.to(tl.int32, bitcast=True)
    return (bits ^ (bits >> 31)) & 255


@triton.jit
def prepare(block, table, norms, at, number, inside, D: tl.constexpr):
    """Store float32 centroids [BLOCK, D] and half their norms for `nearest`, as rows `at + number` of what `table` and `norms` begin."""
    place = (at + number)[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(table + place, block.to(table.dtype.element_ty), mask=inside[:, None])
    tl.store(norms + at + number, 0.5 * tl.sum(block * block, axis=1), mask=inside)


@triton.jit(do_not_specialize=["count"])
def prepare_kernel(centroids, table, norms, count, D: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: (blocks of centroids, rows)."""
    at = tl.program_id(1).to(tl.int64) * count
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = number < count
    place = (at + number)[:, None] * D + tl.arange(0, D)[None, :]
    prepare(tl.load(centroids + place, mask=inside[:, None], other=0.0), table, norms, at, number, inside, D)


@triton.jit(do_not_specialize=["tokens", "count"])
def assign_kernel(x, table, norms, ids, tokens, count, x_row, x_token, D: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: (blocks of tokens, rows)."""
    row = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    mask = token < tokens
    at = row * x_row + token.to(tl.int64)[:, None] * x_token + tl.arange(0, D)[None, :]
    tile = tl.load(x + at, mask=mask[:, None], other=0.0).to(table.dtype.element_ty)
    found = nearest(tile, table + row * count * D, norms + row * count, count, D, TOKENS, BLOCK)
    tl.store(ids + row * tokens + token, found.to(tl.int64), mask=mask)


def assign(x: Tensor, centroids: Tensor) -> Tensor:
    """x [R, T, D] float32 or bf16, centroids [R, C, D] float32 -> int64 [R, T]."""
    require_channels_last(x)
    rows, tokens, dim = x.shape
    count = centroids.shape[1]
    if count > MAX_CENTROIDS:
        raise Unsupported(f"{count} centroids are more than the {MAX_CENTROIDS} that the kernel tells apart")
    ids = torch.empty(rows, tokens, dtype=torch.int64, device=x.device)
    product = Product.of(dim, x.device)
    table = torch.empty(rows, count, dim, dtype=product.torch_dtype, device=x.device)
    norms = torch.empty(rows, count, dtype=torch.float32, device=x.device)
    before_launch("assign", dim, x.dtype, x.device)
    prepare_kernel[(triton.cdiv(count, PREPARED), rows)](centroids.contiguous(), table, norms, count, D=dim, BLOCK=PREPARED, num_warps=4)
    assign_kernel[(triton.cdiv(tokens, product.tokens), rows)](
        x, table, norms, ids, tokens, count, x.stride(0), x.stride(1),
        D=dim, TOKENS=product.tokens, BLOCK=product.block, num_warps=product.warps, num_stages=product.stages)
    return ids
