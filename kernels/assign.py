"""Nearest centroid of every token, for all rows in one launch. Reference: `qvg.codec.kmeans.assign`.

Centroids are first prepared as operands of the matrix units, with half their squared norms. A program then multiplies its tokens with one
block of centroids at a time and keeps the best in registers, so the [tokens, centroids] matrix never exists in memory. Operands are rounded
to bf16 on a GPU: of two centroids that are equally near within that rounding either may win. The residual is computed from the winner, so
nothing is lost.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..qvg.backends import Unsupported, before_launch
from .tiles import Product, require_channels_last

# centroids that one program prepares
PREPARED = 16
# the lowest eight bits of a score hold the id of its centroid
MAX_CENTROIDS = 256


@triton.jit
def nearest(x, table, norms, count, last, D: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """Ids int32 [TOKENS], at most `last`, of the nearest centroids of x [TOKENS, D]. table [count, D] has the dtype of x and is processed
    BLOCK rows at a time; norms [count] float32 are half the squared norms.

    |x|^2 is the same for every centroid and is omitted. The highest score and its index are found together: the lowest bits of a score hold
    255 minus the index, so that of equal positive scores the lower id wins, and of negative ones the higher. Tokens with NaN have no best
    score and get a valid id.
    """
    best = tl.full((TOKENS,), float("-inf"), tl.float32)
    centroid = tl.arange(0, BLOCK)
    # offsets within a block are constants, which cost no instruction
    within = centroid[:, None] * D + tl.arange(0, D)[None, :]
    for start in range(0, count, BLOCK):
        block = tl.load(table + start * D + within)
        score = tl.dot(x, tl.trans(block), input_precision="ieee") - tl.load(norms + start + centroid)[None, :]
        bits = (score.to(tl.int32, bitcast=True) & -256) | ((255 - start) - centroid)[None, :]
        best = tl.maximum(best, tl.max(bits.to(tl.float32, bitcast=True), axis=1))
    return tl.minimum(255 - (best.to(tl.int32, bitcast=True) & 255), last)


@triton.jit
def prepare(block, table, norms, at, centroid, count, D: tl.constexpr):
    """Store float32 centroids [BLOCK, D] and half their squared norms for `nearest`, as rows `at + centroid` of `table` and `norms`. Rows
    from `count` on are padding and never the nearest."""
    place = (at + centroid)[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(table + place, block.to(table.dtype.element_ty))
    tl.store(norms + at + centroid, tl.where(centroid < count, 0.5 * tl.sum(block * block, axis=1), 3e38))


@triton.jit(do_not_specialize=["count", "padded"])
def prepare_kernel(centroids, table, norms, count, padded, D: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: (blocks of centroids, rows)."""
    row = tl.program_id(1).to(tl.int64)
    centroid = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = (row * count + centroid)[:, None] * D + tl.arange(0, D)[None, :]
    prepare(tl.load(centroids + place, mask=(centroid < count)[:, None], other=0.0), table, norms, row * padded, centroid, count, D)


@triton.jit(do_not_specialize=["tokens", "count", "last"])
def assign_kernel(x, table, norms, ids, tokens, count, last, x_row, x_token, D: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: (blocks of tokens, rows)."""
    row = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    mask = token < tokens
    at = row * x_row + token.to(tl.int64)[:, None] * x_token + tl.arange(0, D)[None, :]
    tile = tl.load(x + at, mask=mask[:, None], other=0.0).to(table.dtype.element_ty)
    found = nearest(tile, table + row * count * D, norms + row * count, count, last, D, TOKENS, BLOCK)
    tl.store(ids + row * tokens + token, found.to(tl.int64), mask=mask)


def prepared(product: Product, count: int, dim: int, device: torch.device, *outer: int) -> tuple[Tensor, Tensor]:
    """Buffers for what `prepare` writes of `count` centroids, padded to whole blocks: table [*outer, padded, dim], norms [*outer, padded].
    Raises Unsupported for more than MAX_CENTROIDS."""
    if count > MAX_CENTROIDS:
        raise Unsupported(f"{count} centroids are more than the {MAX_CENTROIDS} that the kernel distinguishes")
    padded = triton.cdiv(count, product.block) * product.block
    return (torch.empty(*outer, padded, dim, dtype=product.torch_dtype, device=device),
            torch.empty(*outer, padded, dtype=torch.float32, device=device))


class Search:
    """The launches for tokens x [R, T, D], float32 or bf16, and `count` centroids, with their buffers: table and norms."""

    def __init__(self, x: Tensor, count: int):
        require_channels_last(x)
        self._x, self._count, self._product = x, count, Product.of(x.shape[-1], x.device)
        self.table, self.norms = prepared(self._product, count, x.shape[-1], x.device, x.shape[0])

    def prepare(self, centroids: Tensor) -> None:
        """centroids [R, C, D] float32, contiguous."""
        rows, padded, dim = self.table.shape
        prepare_kernel[(padded // PREPARED, rows)](
            centroids, self.table, self.norms, self._count, padded, D=dim, BLOCK=PREPARED, num_warps=4)

    def __call__(self, ids: Tensor) -> None:
        """Write the ids of the nearest prepared centroids to ids int64 [R, T]."""
        (rows, tokens, dim), product, x = self._x.shape, self._product, self._x
        assign_kernel[(triton.cdiv(tokens, product.tokens), rows)](
            x, self.table, self.norms, ids, tokens, self.table.shape[1], self._count - 1, x.stride(0), x.stride(1),
            D=dim, TOKENS=product.tokens, BLOCK=product.block, num_warps=product.warps, num_stages=product.stages)


def assign(x: Tensor, centroids: Tensor) -> Tensor:
    """x [R, T, D] float32 or bf16, centroids [R, C, D] float32 -> int64 [R, T]."""
    search = Search(x, centroids.shape[1])
    ids = torch.empty(x.shape[:2], dtype=torch.int64, device=x.device)
    before_launch("assign", x.shape[-1], x.dtype, x.device)
    search.prepare(centroids.contiguous())
    search(ids)
    return ids
