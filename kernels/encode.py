"""Encode tokens to bit planes: centroids taken off, channel and group scales, planes, packed bytes. Twin: `qvg.codec`.

K and V go together through three launches. The first writes the centroids as the matrix units take them. The second finds the ids of every
stage and each row's largest scale (a maximum of bit patterns, which no order of additions can change), on which the power of two depends
that the row's scales share. The third takes the residual again, from numbers that are still in the L2 cache, and writes the bytes, a thread
an octet of channels.
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
from .assign import PREPARED, nearest, prepare
from .octets import bfloat16_octet, octets
from .tiles import (
    Product,
    converts_e4m3,
    e4m3_octet,
    e4m3_to_float32,
    float32_to_e4m3,
    major,
    platform,
    power_of_two,
    require_channels_last,
)

MAX_BORDERS = 2 ** (planes.MAX_PLANES - 1) - 1
# numbers that a program writes as planes
WRITTEN = 4096


def assigned_tokens(head_dim: int) -> int:
    """Tokens that a program of `assign_stages_kernel` takes; fewer on cards whose registers do not hold them."""
    return min(head_dim, 128)


def assign_options(name: str, head_dim: int, major: int) -> dict:
    """Registers that a thread of `assign_stages_kernel` gets on Hopper, so that two programs share a multiprocessor; name: see
    `tiles.platform`; major: of the compute capability. Elsewhere the kernel would spill."""
    return {"maxnreg": 128} if name == "cuda" and major == 9 and head_dim == 128 else {}


@triton.jit
def _exponent(largest):
    """The row's power of two from the bit pattern of its largest scale, as `codec` defines it."""
    found = tl.where(largest == 0, 0, (largest >> 23) - 126)
    return tl.minimum(tl.maximum(found, -100), 100) - 8


@triton.jit(do_not_specialize=["count", "rows"])
def prepare_kernel(codes, other_codes, units, other_units, table, norms, count, rows,
                   STAGES: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, NATIVE_E4M3: tl.constexpr):
    """The centroids of both codebooks for `nearest`. Grid: (blocks of centroids, stages x rows, codebooks)."""
    index, side = tl.program_id(1).to(tl.int64), tl.program_id(2)
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = number < count
    channel = tl.arange(0, D)[None, :]
    at = (index * count + number)[:, None] * D + channel
    unit = tl.load(tl.where(side == 0, units, other_units) + index * D + channel).to(tl.float32)
    block = e4m3_to_float32(tl.load(tl.where(side == 0, codes, other_codes) + at, mask=inside[:, None], other=0), NATIVE_E4M3) * unit
    prepare(block, table, norms, (side.to(tl.int64) * STAGES * rows + index) * count, number, inside, D)


@triton.jit
def _residual(x, codes, units, found, token, mask, rows, count, row, x_token, STAGE: tl.constexpr, D: tl.constexpr,
              NATIVE_E4M3: tl.constexpr):
    """float32 [TOKENS, D] without the centroids of the first `STAGE` stages."""
    channel = tl.arange(0, D)[None, :]
    residual = tl.load(x + token[:, None] * x_token + channel, mask=mask[:, None], other=0.0).to(tl.float32)
    for stage in tl.static_range(STAGE):
        index = stage * rows + row
        unit = tl.load(units + index * D + channel).to(tl.float32)
        codeword = tl.load(codes + index * count * D + found[stage][:, None] * D + channel)
        residual -= e4m3_to_float32(codeword, NATIVE_E4M3) * unit
    return residual


@triton.jit(do_not_specialize=["tokens", "rows", "count"])
def assign_stages_kernel(
    x, other_x, codes, other_codes, units, other_units, channel_scale, other_channel_scale, ids, other_ids, table, norms, largest,
    tokens, rows, count, x_token, x_row, id_stage, id_token, id_row,
    STAGES: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, NATIVE_E4M3: tl.constexpr,
):
    """Ids of every stage, and the largest group scale of the row. Grid: (blocks of tokens, rows, tensors)."""
    row, side = tl.program_id(1).to(tl.int64), tl.program_id(2)
    x = tl.where(side == 0, x, other_x) + row * x_row
    codes, units = tl.where(side == 0, codes, other_codes), tl.where(side == 0, units, other_units)
    ids = tl.where(side == 0, ids, other_ids) + row * id_row
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    mask = token < tokens
    token = token.to(tl.int64)
    found = ()
    for stage in tl.static_range(STAGES):
        # taken anew from the cache, not kept: registers that hold it would be missing to other programs
        residual = _residual(x, codes, units, found, token, mask, rows, count, row, x_token, stage, D, NATIVE_E4M3)
        index = ((side * STAGES + stage) * rows + row) * count
        chosen = nearest(residual.to(table.dtype.element_ty), table + index * D, norms + index, count, D, TOKENS, BLOCK)
        tl.store(ids + (row * 0 + stage) * id_stage + token * id_token, chosen.to(tl.uint8), mask=mask)
        found = found + (chosen,)
    residual = _residual(x, codes, units, found, token, mask, rows, count, row, x_token, STAGES, D, NATIVE_E4M3)
    channels = tl.load(tl.where(side == 0, channel_scale, other_channel_scale) + row * D + tl.arange(0, D)[None, :]).to(tl.float32)
    y = tl.reshape(residual * (1.0 / channels), (TOKENS, GROUPS, D // GROUPS))
    rms = tl.sqrt(tl.sum(y * y, axis=2) / (D // GROUPS))
    rms = tl.where(mask[:, None], rms, 0.0)
    tl.atomic_max(largest + side * rows + row, tl.max(rms.to(tl.int32, bitcast=True)))


@triton.jit(do_not_specialize=["tokens", "rows", "count"])
def write_planes_kernel(
    x, other_x, codes, other_codes, units, other_units, channel_scale, other_channel_scale, ids, other_ids, largest,
    b0, b1, b2, b3, b4, b5, b6, scales, other_scales, plane0, other_plane0, plane1, other_plane1, plane2, other_plane2,
    plane3, other_plane3, exponents, other_exponents, tokens, rows, count, x_token, x_row, id_stage, id_token, id_row,
    data_token, data_row, scale_token, scale_row,
    STAGES: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr,
    NATIVE_E4M3: tl.constexpr,
):
    """Scales and planes of one tile, and once a row its exponent; b0 to b6 are the cells' borders.

    Grid: (blocks of tokens, rows, tensors).
    """
    OCTETS: tl.constexpr = D // 8
    row, side = tl.program_id(1).to(tl.int64), tl.program_id(2)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    mask = token < tokens
    token = token.to(tl.int64)
    octet = tl.arange(0, OCTETS)[None, :]
    tile = tl.load(tl.where(side == 0, x, other_x) + row * x_row + token[:, None] * x_token + tl.arange(0, D)[None, :],
                   mask=mask[:, None], other=0.0)
    y0, y1, y2, y3, y4, y5, y6, y7 = octets(tile.to(tl.float32), TOKENS, D)
    y = (y0, y1, y2, y3, y4, y5, y6, y7)
    for stage in tl.static_range(STAGES):
        index = stage * rows + row
        chosen = tl.load(tl.where(side == 0, ids, other_ids) + (row * 0 + stage) * id_stage + token * id_token + row * id_row,
                         mask=mask, other=0).to(tl.int32)
        words = (tl.where(side == 0, codes, other_codes) + index * count * D).to(tl.pointer_type(tl.int64))
        codeword = e4m3_octet(tl.load(words + chosen[:, None] * OCTETS + octet), NATIVE_E4M3)
        unit = bfloat16_octet((tl.where(side == 0, units, other_units) + index * D).to(tl.pointer_type(tl.int32)) + octet * 4)
        y = _less(y, codeword, unit)
    channels = bfloat16_octet((tl.where(side == 0, channel_scale, other_channel_scale) + row * D).to(tl.pointer_type(tl.int32)) + octet * 4)
    y = _over(y, channels)

    rms = tl.sqrt(tl.sum(tl.reshape(_power(y), (TOKENS, GROUPS, OCTETS // GROUPS)), axis=2) / (D // GROUPS))
    exponent = _exponent(tl.load(largest + side * rows + row))
    if tl.program_id(0) == 0:
        tl.store(tl.where(side == 0, exponents, other_exponents) + row, exponent.to(tl.int8))
    rounded = float32_to_e4m3(rms * power_of_two(-exponent))
    at = row * scale_row + token[:, None] * scale_token + tl.arange(0, GROUPS)[None, :]
    tl.store(tl.where(side == 0, scales, other_scales) + at, rounded, mask=mask[:, None])

    scale = e4m3_to_float32(rounded, NATIVE_E4M3) * power_of_two(exponent)
    # a group whose scale rounds to zero is read back as zero, whatever its signs say
    inverse = tl.where(scale > 0, 1.0 / tl.where(scale > 0, scale, 1.0), 0.0)
    inverse = tl.reshape(tl.broadcast_to(inverse[:, :, None], (TOKENS, GROUPS, OCTETS // GROUPS)), (TOKENS, OCTETS))
    p0 = tl.zeros((TOKENS, OCTETS), tl.int32)
    p1, p2, p3 = p0, p0, p0
    for channel in tl.static_range(8):
        z = y[channel] * inverse
        size = tl.abs(z)
        p0 |= (z >= 0).to(tl.int32) << channel
        if BITS == 2:
            p1 |= (size >= b0).to(tl.int32) << channel
        if BITS == 3:
            high = size >= b1
            p1 |= high.to(tl.int32) << channel
            p2 |= (size >= tl.where(high, b2, b0)).to(tl.int32) << channel
        if BITS == 4:
            high = size >= b3
            middle = size >= tl.where(high, b5, b1)
            p1 |= high.to(tl.int32) << channel
            p2 |= middle.to(tl.int32) << channel
            p3 |= (size >= tl.where(high, tl.where(middle, b6, b4), tl.where(middle, b2, b0))).to(tl.int32) << channel
    at = row * data_row + token[:, None] * data_token + octet
    tl.store(tl.where(side == 0, plane0, other_plane0) + at, p0.to(tl.uint8), mask=mask[:, None])
    if BITS > 1:
        tl.store(tl.where(side == 0, plane1, other_plane1) + at, p1.to(tl.uint8), mask=mask[:, None])
    if BITS > 2:
        tl.store(tl.where(side == 0, plane2, other_plane2) + at, p2.to(tl.uint8), mask=mask[:, None])
    if BITS > 3:
        tl.store(tl.where(side == 0, plane3, other_plane3) + at, p3.to(tl.uint8), mask=mask[:, None])


@triton.jit
def _less(y, c, unit):
    """Centroids, codes times units, taken from an octet."""
    return (y[0] - c[0] * unit[0], y[1] - c[1] * unit[1], y[2] - c[2] * unit[2], y[3] - c[3] * unit[3],
            y[4] - c[4] * unit[4], y[5] - c[5] * unit[5], y[6] - c[6] * unit[6], y[7] - c[7] * unit[7])


@triton.jit
def _over(y, c):
    return (y[0] * (1.0 / c[0]), y[1] * (1.0 / c[1]), y[2] * (1.0 / c[2]), y[3] * (1.0 / c[3]),
            y[4] * (1.0 / c[4]), y[5] * (1.0 / c[5]), y[6] * (1.0 / c[6]), y[7] * (1.0 / c[7]))


@triton.jit
def _power(y):
    """Sum of the squares of an octet."""
    return (((y[0] * y[0] + y[1] * y[1]) + (y[2] * y[2] + y[3] * y[3]))
            + ((y[4] * y[4] + y[5] * y[5]) + (y[6] * y[6] + y[7] * y[7])))


def encode(bits: int, groups: int, gains: list[str], books: list[Codebook], *xs: Tensor) -> list[PlaneSpan]:
    """One or two tensors [T, R, D] that are alike, as are their codebooks -> a span with `bits` planes of each."""
    for x in xs:
        require_channels_last(x)
    x = xs[0]
    tokens, rows, dim = x.shape
    stages, count = books[0].stages, books[0].centroids.shape[2]
    if any(other.stride() != x.stride() for other in xs):
        xs = [other.contiguous() for other in xs]
        x = xs[0]
    spans = [PlaneSpan.empty(x, bits, book, groups, gain) for x, book, gain in zip(xs, books, gains)]
    native, product, tile = converts_e4m3(x.device), Product.of(dim, x.device, assigned_tokens(dim)), WRITTEN // dim
    table = torch.empty(len(xs), stages, rows, count, dim, dtype=product.torch_dtype, device=x.device)
    norms = torch.empty(len(xs), stages, rows, count, dtype=torch.float32, device=x.device)
    largest = torch.zeros(len(xs), rows, dtype=torch.int32, device=x.device)

    def both(tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
        return tensors[0], tensors[-1]

    codes, units = both([book.centroids for book in books]), both([book.centroid_scale for book in books])
    before_launch("encode", bits, stages, groups, dim, x.dtype, x.device)
    if stages:
        prepare_kernel[(triton.cdiv(count, PREPARED), stages * rows, len(xs))](
            *codes, *units, table, norms, count, rows, STAGES=stages, D=dim, BLOCK=PREPARED, NATIVE_E4M3=native, num_warps=4)
    first, ids = spans[0], both([span.ids for span in spans])
    book = *both(xs), *codes, *units, *both([book.channel_scale for book in books]), *ids
    assign_stages_kernel[(triton.cdiv(tokens, product.tokens), rows, len(xs))](
        *book, table, norms, largest, tokens, rows, count, x.stride(0), x.stride(1), *first.ids.stride(),
        STAGES=stages, GROUPS=groups, D=dim, TOKENS=product.tokens, BLOCK=product.block, NATIVE_E4M3=native,
        num_warps=product.warps, num_stages=product.stages, **assign_options(platform(x.device), dim, major(x.device)))
    borders = planes.thresholds(bits)
    written = [both([span.planes[min(plane, bits - 1)] for span in spans]) for plane in range(planes.MAX_PLANES)]
    write_planes_kernel[(triton.cdiv(tokens, tile), rows, len(xs))](
        *book, largest, *borders, *[0.0] * (MAX_BORDERS - len(borders)), *both([span.scales for span in spans]),
        *[plane for pair in written for plane in pair], *both([span.exponents for span in spans]),
        tokens, rows, count, x.stride(0), x.stride(1), *first.ids.stride(), *first.planes[0].stride()[:2], *first.scales.stride()[:2],
        STAGES=stages, GROUPS=groups, BITS=bits, D=dim, TOKENS=tile, NATIVE_E4M3=native, num_warps=4)
    return spans
