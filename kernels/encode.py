"""Encode tokens to bit planes: centroids taken off, channel and group scales, planes, packed bytes. Twin: `qvg.codec`.

The power of two that a row's scales share depends on every token of the span, so there are two launches. The first
finds the ids of every stage and each row's largest scale (a maximum of bit patterns, which no order of additions can
change); the second takes the residual again, from numbers that are still in the L2 cache, and writes the bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..qvg import planes
from ..qvg.codec import PlaneSpan
from ..qvg.dispatch import before_launch
from ..qvg.smoothing import Codebook
from .assign import nearest
from .tiles import (
    Product,
    converts_e4m3,
    e4m3_to_float32,
    float32_to_e4m3,
    power_of_two,
    require_channels_last,
)

MAX_BORDERS = 2 ** (planes.MAX_PLANES - 1) - 1


@triton.jit
def _exponent(largest):
    """The row's power of two from the bit pattern of its largest scale, as `codec` defines it."""
    found = tl.where(largest == 0, 0, (largest >> 23) - 126)
    return tl.minimum(tl.maximum(found, -100), 100) - 8


@triton.jit
def _scales(residual, channels, TOKENS: tl.constexpr, D: tl.constexpr, GROUPS: tl.constexpr):
    """Residual over channel scales [TOKENS, GROUPS, D / GROUPS], and its root mean square a group [TOKENS, GROUPS]."""
    y = tl.reshape(residual / channels, (TOKENS, GROUPS, D // GROUPS))
    return y, tl.sqrt(tl.sum(y * y, axis=2) / (D // GROUPS))


@triton.jit
def _subtract(residual, codes, unit, chosen, D: tl.constexpr, NATIVE_E4M3: tl.constexpr):
    at = chosen.to(tl.int64)[:, None] * D + tl.arange(0, D)[None, :]
    return residual - e4m3_to_float32(tl.load(codes + at), NATIVE_E4M3) * unit


@triton.jit(do_not_specialize=["tokens", "rows", "count"])
def assign_stages_kernel(
    x, codes, units, channel_scale, ids, largest, tokens, rows, count, x_token, x_row, id_stage, id_token, id_row,
    STAGES: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
    PRODUCT: tl.constexpr, NATIVE_E4M3: tl.constexpr,
):
    """Ids of every stage, and the largest group scale of the row. Grid: (blocks of tokens, rows)."""
    row = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    mask = token < tokens
    channel = tl.arange(0, D)[None, :]
    residual = tl.load(x + row * x_row + token[:, None] * x_token + channel, mask=mask[:, None], other=0.0).to(tl.float32)
    for stage in tl.static_range(STAGES):
        index = stage * rows + row
        unit = tl.load(units + index * D + channel).to(tl.float32)
        table = codes + index * count * D
        found = nearest(residual, table, unit, count, D, TOKENS, BLOCK, PRODUCT, True, NATIVE_E4M3)
        tl.store(ids + (row * 0 + stage) * id_stage + token * id_token + row * id_row, found.to(tl.uint8), mask=mask)
        residual = _subtract(residual, table, unit, found, D, NATIVE_E4M3)
    channels = tl.load(channel_scale + row * D + channel).to(tl.float32)
    _, rms = _scales(residual, channels, TOKENS, D, GROUPS)
    rms = tl.where(mask[:, None], rms, 0.0)
    tl.atomic_max(largest + row, tl.max(rms.to(tl.int32, bitcast=True)))


@triton.jit(do_not_specialize=["tokens", "rows", "count"])
def write_planes_kernel(
    x, codes, units, channel_scale, ids, largest, b0, b1, b2, b3, b4, b5, b6, scales, plane0, plane1, plane2, plane3,
    exponents, tokens, rows, count, x_token, x_row, id_stage, id_token, id_row, data_token, data_row, scale_token, scale_row,
    STAGES: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr,
    NATIVE_E4M3: tl.constexpr,
):
    """Scales and planes of one tile, and once a row its exponent; b0 to b6 are the cells' borders. Grid: (blocks of tokens, rows)."""
    row = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    mask = token < tokens
    channel = tl.arange(0, D)[None, :]
    residual = tl.load(x + row * x_row + token[:, None] * x_token + channel, mask=mask[:, None], other=0.0).to(tl.float32)
    for stage in tl.static_range(STAGES):
        index = stage * rows + row
        unit = tl.load(units + index * D + channel).to(tl.float32)
        chosen = tl.load(ids + (row * 0 + stage) * id_stage + token * id_token + row * id_row, mask=mask, other=0)
        residual = _subtract(residual, codes + index * count * D, unit, chosen, D, NATIVE_E4M3)

    y, rms = _scales(residual, tl.load(channel_scale + row * D + channel).to(tl.float32), TOKENS, D, GROUPS)
    exponent = _exponent(tl.load(largest + row))
    if tl.program_id(0) == 0:
        tl.store(exponents + row, exponent.to(tl.int8))
    rounded = float32_to_e4m3(rms * power_of_two(-exponent))
    at = row * scale_row + token[:, None] * scale_token + tl.arange(0, GROUPS)[None, :]
    tl.store(scales + at, rounded, mask=mask[:, None])

    scale = (e4m3_to_float32(rounded, NATIVE_E4M3) * power_of_two(exponent))[:, :, None]
    # a group whose scale rounds to zero is read back as zero, whatever its signs say
    z = tl.reshape(tl.where(scale > 0, y / tl.where(scale > 0, scale, 1.0), 0.0), (TOKENS, D))
    size = tl.abs(z)
    cell = tl.zeros((TOKENS, D), tl.int32)
    if BITS > 1:
        cell += (size >= b0).to(tl.int32)
    if BITS > 2:
        cell += (size >= b1).to(tl.int32) + (size >= b2).to(tl.int32)
    if BITS > 3:
        cell += (size >= b3).to(tl.int32) + (size >= b4).to(tl.int32) + (size >= b5).to(tl.int32) + (size >= b6).to(tl.int32)
    at = row * data_row + token[:, None] * data_token + tl.arange(0, D // 8)[None, :]
    _store_plane(plane0 + at, z >= 0, mask, TOKENS, D)
    if BITS > 1:
        _store_plane(plane1 + at, ((cell >> (BITS - 2)) & 1) != 0, mask, TOKENS, D)
    if BITS > 2:
        _store_plane(plane2 + at, ((cell >> (BITS - 3)) & 1) != 0, mask, TOKENS, D)
    if BITS > 3:
        _store_plane(plane3 + at, (cell & 1) != 0, mask, TOKENS, D)


@triton.jit
def _store_plane(pointers, bits, mask, TOKENS: tl.constexpr, D: tl.constexpr):
    weights = bits.to(tl.int32) << (tl.arange(0, D) % 8)[None, :]
    packed = tl.sum(tl.reshape(weights, (TOKENS, D // 8, 8)), axis=2)
    tl.store(pointers, packed.to(tl.uint8), mask=mask[:, None])


def encode(x: Tensor, bits: int, codebook: Codebook, groups: int, gain: str) -> PlaneSpan:
    """x [T, R, D] -> a span with `bits` planes."""
    require_channels_last(x)
    tokens, rows, dim = x.shape
    stages, count = codebook.stages, codebook.centroids.shape[2]
    span = PlaneSpan.empty(x, bits, codebook, groups, gain)
    largest = torch.zeros(rows, dtype=torch.int32, device=x.device)
    book = codebook.centroids, codebook.centroid_scale, codebook.channel_scale
    native, product, tile = converts_e4m3(x.device), Product.of(dim, x.device), 4096 // dim
    before_launch("encode", bits, stages, groups, dim, x.dtype, x.device)
    assign_stages_kernel[(triton.cdiv(tokens, product.tokens), rows)](
        x, *book, span.ids, largest, tokens, rows, count, x.stride(0), x.stride(1), *span.ids.stride(),
        STAGES=stages, GROUPS=groups, D=dim, TOKENS=product.tokens, BLOCK=product.block, PRODUCT=product.dtype,
        NATIVE_E4M3=native, num_warps=product.warps, num_stages=product.stages)
    borders = planes.thresholds(bits)
    write_planes_kernel[(triton.cdiv(tokens, tile), rows)](
        x, *book, span.ids, largest, *borders, *[0.0] * (MAX_BORDERS - len(borders)), span.scales,
        *span.planes, *span.planes[:1] * (planes.MAX_PLANES - bits), span.exponents,
        tokens, rows, count, x.stride(0), x.stride(1), *span.ids.stride(), *span.planes[0].stride()[:2],
        *span.scales.stride()[:2],
        STAGES=stages, GROUPS=groups, BITS=bits, D=dim, TOKENS=tile, NATIVE_E4M3=native, num_warps=8)
    return span
