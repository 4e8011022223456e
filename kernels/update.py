"""Means of the tokens assigned to each centroid, for all rows in two launches. Reference: `qvg.codec.kmeans.update`.

Sums are a matrix product with the one-hot assignment, which is built in registers. Partial sums are added in a fixed order without atomics,
so two runs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..qvg.backends import before_launch
from .assign import prepare
from .tiles import Product, require_channels_last

# enough programs for every multiprocessor, few enough that the partial sums stay small beside the tokens
PROGRAMS = 256
# elements that a program loads together when it searches the token with the largest error
SEARCH = 4096


@triton.jit(do_not_specialize=["tokens", "count", "share"])
def sums_kernel(x, ids, sums, sizes, tokens, count, x_row, x_token, share,
                D: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """Sums and counts over `share` tokens. Grid: (parts of the tokens, blocks of centroids, rows)."""
    part, row = tl.program_id(0), tl.program_id(2).to(tl.int64)
    centroid = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, D)[None, :]
    total = tl.zeros((BLOCK, D), tl.float32)
    size = tl.zeros((BLOCK,), tl.float32)
    for start in range(part * share, min(part * share + share, tokens), TOKENS):
        token = start + tl.arange(0, TOKENS)
        mask = token < tokens
        assigned = tl.load(ids + row * tokens + token, mask=mask, other=-1).to(tl.int32)
        at = row * x_row + token.to(tl.int64)[:, None] * x_token + channel
        tile = tl.load(x + at, mask=mask[:, None], other=0.0)
        member = centroid[:, None] == assigned[None, :]
        total += tl.dot(member.to(tile.dtype), tile, input_precision=PRECISION)
        size += tl.sum(member.to(tl.float32), axis=1)
    at = (part * tl.num_programs(2) + row) * count + centroid
    inside = centroid < count
    tl.store(sums + at[:, None] * D + channel, total, mask=inside[:, None])
    tl.store(sizes + at, size, mask=inside)


@triton.jit(do_not_specialize=["tokens", "count", "padded", "parts"])
def means_kernel(x, ids, centroids, sums, sizes, means, table, norms, tokens, count, padded, x_row, x_token, parts,
                 D: tl.constexpr, SEARCH: tl.constexpr, PREPARES: tl.constexpr):
    """Means from the partial sums. A centroid without tokens becomes the token with the largest error in its own share of them. PREPARES:
    also call `prepare`. Grid: (centroids, rows)."""
    centroid, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, D)
    total = tl.zeros((D,), tl.float32)
    size = 0.0
    for part in range(parts):
        at = (part * tl.num_programs(1) + row) * count + centroid
        total += tl.load(sums + at * D + channel)
        size += tl.load(sizes + at)
    value = total / tl.maximum(size, 1.0)
    if size == 0.0:
        share = tokens // count
        most, place = -1.0, centroid * share
        for start in range(0, share, SEARCH):
            offset = start + tl.arange(0, SEARCH)
            mask = offset < share
            token = centroid * share + offset
            assigned = tl.load(ids + row * tokens + token, mask=mask, other=0)
            at = row * x_row + token.to(tl.int64)[:, None] * x_token + channel[None, :]
            tile = tl.load(x + at, mask=mask[:, None], other=0.0).to(tl.float32)
            tile -= tl.load(centroids + (row * count + assigned[:, None]) * D + channel[None, :])
            error = tl.where(mask, tl.sum(tile * tile, axis=1), -1.0)
            largest, where = tl.max(error, axis=0, return_indices=True)
            place = tl.where(largest > most, centroid * share + start + where, place)
            most = tl.maximum(largest, most)
        value = tl.load(x + row * x_row + place.to(tl.int64) * x_token + channel).to(tl.float32)
    tl.store(means + (row * count + centroid) * D + channel, value)
    if PREPARES:
        prepare(value[None, :], table, norms, row * padded, centroid + tl.arange(0, 1), count, D)


class Means:
    """The two launches for tokens x [R, T, D], float32 or bf16, and `count` centroids, with their buffers."""

    def __init__(self, x: Tensor, count: int):
        require_channels_last(x)
        rows, tokens, dim = x.shape
        self._x, self._count, self._product = x, count, Product.of(dim, x.device, tokens=32)
        self._blocks = triton.cdiv(count, self._product.block)
        tiles = triton.cdiv(tokens, self._product.tokens)
        parts = min(tiles, max(1, PROGRAMS // (rows * self._blocks)))
        self._share = triton.cdiv(tiles, parts) * self._product.tokens
        self._parts = triton.cdiv(tokens, self._share)
        self._sums = torch.empty(self._parts, rows, count, dim, dtype=torch.float32, device=x.device)
        self._sizes = torch.empty(self._parts, rows, count, dtype=torch.float32, device=x.device)

    def __call__(self, ids: Tensor, centroids: Tensor, out: Tensor, table: Tensor | None = None, norms: Tensor | None = None) -> None:
        """Write to `out` the means of the tokens assigned by ids int64 [R, T] to centroids float32 [R, C, D]; prepare them in `table`, if
        there is one."""
        (rows, tokens, dim), product, x = self._x.shape, self._product, self._x
        sums_kernel[(self._parts, self._blocks, rows)](
            x, ids, self._sums, self._sizes, tokens, self._count, x.stride(0), x.stride(1), self._share,
            D=dim, TOKENS=product.tokens, BLOCK=product.block, PRECISION=product.precision,
            num_warps=product.warps, num_stages=product.stages)
        prepares = table is not None
        means_kernel[(self._count, rows)](
            x, ids, centroids, self._sums, self._sizes, out, table if prepares else out, norms if prepares else out,
            tokens, self._count, table.shape[1] if prepares else 0, x.stride(0), x.stride(1), self._parts,
            D=dim, SEARCH=SEARCH // dim, PREPARES=prepares, num_warps=4)


def update(x: Tensor, ids: Tensor, centroids: Tensor) -> Tensor:
    """x [R, T, D] float32 or bf16, ids int64 [R, T] into centroids [R, C, D] float32 -> means float32 [R, C, D]."""
    means = Means(x, centroids.shape[1])
    out = torch.empty(centroids.shape, dtype=torch.float32, device=x.device)
    before_launch("update", x.shape[-1], x.dtype, x.device)
    means(ids.contiguous(), centroids.contiguous(), out)
    return out
