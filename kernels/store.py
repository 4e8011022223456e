"""Quantize centroids to the bytes of a codebook and subtract them from the tokens, for all rows in two launches.

Reference: `qvg.codec.smoothing.store`. The first launch writes the bytes and prepares the values that they represent as `assign` does. The
second finds each token's nearest centroid and writes the residual, so that neither ids nor gathered centroids exist in memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..qvg.backends import before_launch
from ..qvg.codec import e4m3
from .assign import nearest, prepare, prepared
from .tiles import Product, converts_e4m3, e4m3_to_float32, float32_to_e4m3, require_channels_last


@triton.jit(do_not_specialize=["count", "padded"])
def store_kernel(found, codes, units, table, norms, count, padded, MOST: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
                 NATIVE_E4M3: tl.constexpr):
    """Codes and channel units of the centroids of a row, found [rows, count, D] float32. MOST: the largest value of a code. Grid:
    (rows)."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, D)
    largest = tl.zeros((D,), tl.float32)
    for start in range(0, count, BLOCK):
        centroid = start + tl.arange(0, BLOCK)
        at = (row * count + centroid)[:, None] * D + channel[None, :]
        block = tl.load(found + at, mask=(centroid < count)[:, None], other=0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(block), axis=0))
    # rounded up to a power of two
    unit = tl.div_rn(largest, tl.full((D,), MOST, tl.float32)).to(tl.int32, bitcast=True)
    unit = ((unit + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    unit = tl.where(unit == 0, 1.0, unit)
    tl.store(units + row * D + channel, unit.to(tl.bfloat16))
    for start in range(0, padded, BLOCK):
        centroid = start + tl.arange(0, BLOCK)
        inside = centroid < count
        at = (row * count + centroid)[:, None] * D + channel[None, :]
        block = tl.load(found + at, mask=inside[:, None], other=0.0)
        block = tl.div_rn(block, tl.broadcast_to(unit[None, :], (BLOCK, D)))
        sign = (block.to(tl.int32, bitcast=True) >> 24) & 0x80
        code = (float32_to_e4m3(tl.abs(block)).to(tl.int32) | sign).to(tl.uint8)
        tl.store(codes + at, code, mask=inside[:, None])
        prepare(e4m3_to_float32(code, NATIVE_E4M3) * unit[None, :], table, norms, row * padded, centroid, count, D)


@triton.jit(do_not_specialize=["tokens", "count", "padded"])
def residual_kernel(x, codes, units, table, norms, residual, tokens, count, padded, x_row, x_token,
                 D: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, NATIVE_E4M3: tl.constexpr):
    """Tokens minus their nearest centroids; residual is contiguous. Grid: (blocks of tokens, rows)."""
    row = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    mask = (token < tokens)[:, None]
    token = token.to(tl.int64)[:, None]
    channel = tl.arange(0, D)[None, :]
    at = row * x_row + token * x_token + channel
    tile = tl.load(x + at, mask=mask, other=0.0).to(table.dtype.element_ty)
    ids = nearest(tile, table + row * padded * D, norms + row * padded, padded, count - 1, D, TOKENS, BLOCK)
    unit = tl.load(units + row * D + channel).to(tl.float32)
    value = e4m3_to_float32(tl.load(codes + (row * count + ids)[:, None] * D + channel), NATIVE_E4M3) * unit
    # loaded from the cache again instead of kept in registers
    tile = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(residual + (row * tokens + token) * D + channel, tile - value, mask=mask)


def store(x: Tensor, found: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [R, T, D] float32 or bf16, found [R, C, D] float32 -> codes uint8 [R, C, D], scale bf16 [R, 1, D], residual float32 [R, T, D]."""
    require_channels_last(x)
    rows, tokens, dim = x.shape
    count = found.shape[1]
    product, native = Product.of(dim, x.device), converts_e4m3(x.device)
    codes = torch.empty(rows, count, dim, dtype=torch.uint8, device=x.device)
    units = torch.empty(rows, 1, dim, dtype=torch.bfloat16, device=x.device)
    table, norms = prepared(product, count, dim, x.device, rows)
    padded = table.shape[1]
    residual = torch.empty(rows, tokens, dim, dtype=torch.float32, device=x.device)
    before_launch("store", dim, x.dtype, x.device)
    store_kernel[(rows,)](found.contiguous(), codes, units, table, norms, count, padded, MOST=e4m3.MAX, D=dim, BLOCK=product.block,
                          NATIVE_E4M3=native, num_warps=8)
    residual_kernel[(triton.cdiv(tokens, product.tokens), rows)](
        x, codes, units, table, norms, residual, tokens, count, padded, x.stride(0), x.stride(1),
        D=dim, TOKENS=product.tokens, BLOCK=product.block, NATIVE_E4M3=native, num_warps=product.warps, num_stages=product.stages)
    return codes, units, residual
