"""Encode tokens to bit planes: centroids subtracted, channel and group scales, packed planes. Reference: `qvg.codec.qvg`.

K and V are encoded together, because a launch takes the host longer than a small kernel takes the device. There are three launches. The
first prepares the centroids as operands of the matrix units. The second loads the tokens and does everything except the bytes of the
scales: those share a power of two, which depends on the largest scale of the row, and planes do not depend on it. The third, small, finds
it and writes them. The kernel loads the tokens again for every stage, because registers that keep them would cost occupancy.

GPUs of compute capability 9 have another kernel for bf16 tokens, `hopper`, which is one launch.
"""

from __future__ import annotations

import logging

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..qvg.backends import Failures, before_launch, note, ran_out, sentence_of
from ..qvg.codec import planes
from ..qvg.codec.qvg import PlaneSpan
from ..qvg.codec.smoothing import Codebook
from .assign import PREPARED, nearest, prepare, prepared
from .octets import e4m3_octet, float32_octet, octets, tile_of
from .quantize import plane_bytes, power, scale_to_e4m3, shared_exponent
from .tiles import Product, converts_e4m3, e4m3_to_float32, is_finite, major, power_of_two, require_channels_last, round_to_e4m3

MAX_BORDERS = 2 ** (planes.MAX_PLANES - 1) - 1
# scales that a program processes together
SCALES = 2048
ON_HOPPER = "encode on Hopper"
_hopper_failures = Failures()


def encode_warps(product: Product, head_dim: int, major: int) -> int:
    """Warps of a program of `encode_kernel`: four if their registers hold the tile, so that several programs share a multiprocessor. major:
    of the compute capability; data centre Blackwell (10) would spill."""
    return min(product.warps, max(4, product.tokens * head_dim // 2048)) if major != 10 else product.warps


@triton.jit(do_not_specialize=["count", "padded", "rows"])
def prepare_kernel(codes, other_codes, units, other_units, channel_scale, other_channel_scale, table, norms, factors, count, padded, rows,
                   STAGES: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, NATIVE_E4M3: tl.constexpr):
    """Prepare the centroids of both codebooks for `nearest`, and write factors float32 [codebooks, rows, STAGES + 1, D]: the units of every
    stage, negative, then the reciprocals of the channel scales.

    Grid: (blocks of centroids, stages and one more, codebooks x rows).
    """
    stage, side, row = tl.program_id(1), tl.program_id(2) // rows, (tl.program_id(2) % rows).to(tl.int64)
    channel = tl.arange(0, D)[None, :]
    factor = factors + ((side * rows + row) * (STAGES + 1) + stage) * D + channel
    if stage == STAGES:
        if tl.program_id(0) == 0:
            scale = tl.load(tl.where(side == 0, channel_scale, other_channel_scale) + row * D + channel)
            tl.store(factor, 1.0 / scale.to(tl.float32))
    else:
        index = stage * rows + row
        unit = tl.load(tl.where(side == 0, units, other_units) + index * D + channel).to(tl.float32)
        if tl.program_id(0) == 0:
            tl.store(factor, -unit)
        centroid = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        code = tl.load(tl.where(side == 0, codes, other_codes) + (index * count + centroid)[:, None] * D + channel,
                       mask=(centroid < count)[:, None], other=0)
        at = ((side * STAGES + stage) * rows + row) * padded
        prepare(e4m3_to_float32(code, NATIVE_E4M3) * unit, table, norms, at, centroid, count, D)


@triton.jit
def _residual(x, words, factors, found, held, octet, x_token, stage_words,
              STAGE: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr, NATIVE_E4M3: tl.constexpr):
    """Octets of the tile minus the centroids of the first `STAGE` stages."""
    tile = tl.load(x + (held[:, None] * x_token + tl.arange(0, D)[None, :]))
    y = octets(tile.to(tl.float32), TOKENS, D)
    for stage in tl.static_range(STAGE):
        codeword = tl.load(words + stage * stage_words * (D // 8) + (found[stage][:, None] * (D // 8) + octet))
        y = _plus(y, e4m3_octet(codeword, NATIVE_E4M3), float32_octet(factors + stage * D + 8 * octet))
    return y


@triton.jit(do_not_specialize=["tokens", "rows", "count", "padded", "zero"])
def encode_kernel(
    x, other_x, codes, other_codes, ids, other_ids, table, norms, factors, roots,
    b0, b1, b2, b3, b4, b5, b6, plane0, other_plane0, plane1, other_plane1, plane2, other_plane2, plane3, other_plane3,
    tokens, rows, count, padded, zero, x_token, x_row,
    STAGES: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
    NATIVE_E4M3: tl.constexpr,
):
    """Ids and planes of one tile, and its scales to roots float32 [tensors, rows, tokens, GROUPS]; b0 to b6 are the cells' borders.

    ids [STAGES, rows, tokens] and planes [rows, tokens, D / 8] lie as `PlaneSpan.empty` made them. zero: 0, unknown to the compiler. If it
    knew the alignment of words, it would give a thread neighbouring octets of a token, whose channel scales would fill the registers.
    Grid: (blocks of tokens, rows, tensors).
    """
    OCTETS: tl.constexpr = D // 8
    row, side = tl.program_id(1).to(tl.int64), tl.program_id(2)
    first = tl.program_id(0).to(tl.int64) * TOKENS
    # offsets within the tile are short, and those that the compiler knows cost no instruction
    local = tl.arange(0, TOKENS)
    mask = local < tokens - first
    # past the end the last token is encoded again
    held = tl.minimum(local, (tokens - first - 1).to(tl.int32))
    octet = tl.arange(0, OCTETS)[None, :] + zero
    x = tl.where(side == 0, x, other_x) + row * x_row + first * x_token
    factors += (side * rows + row) * ((STAGES + 1) * D)
    words = (tl.where(side == 0, codes, other_codes) + row * count * D).to(tl.pointer_type(tl.int64))
    found = ()
    for stage in tl.static_range(STAGES):
        # loaded from the cache again; registers that keep it would cost occupancy
        y = _residual(x, words, factors, found, held, octet, x_token, rows * count, stage, D, TOKENS, NATIVE_E4M3)
        at = ((side * STAGES + stage) * rows + row) * padded
        tile = tile_of(y, TOKENS, D).to(table.dtype.element_ty)
        selected = nearest(tile, table + at * D, norms + at, padded, count - 1, D, TOKENS, BLOCK)
        tl.store(tl.where(side == 0, ids, other_ids) + (stage * rows + row) * tokens + first + local, selected.to(tl.uint8), mask=mask)
        found = found + (selected,)
    y = _residual(x, words, factors, found, held, octet, x_token, rows * count, STAGES, D, TOKENS, NATIVE_E4M3)
    y = _times(y, float32_octet(factors + STAGES * D + 8 * octet))

    rms = tl.sqrt(tl.sum(tl.reshape(power(y), (TOKENS, GROUPS, OCTETS // GROUPS)), axis=2) / (D // GROUPS))
    at = (side * tl.num_programs(1) + row) * tokens + first
    tl.store(roots + at * GROUPS + (local[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]), rms, mask=mask[:, None])
    scale = round_to_e4m3(rms)
    scale = tl.where(scale > 0, scale, 1.0)
    scale = tl.reshape(tl.broadcast_to(scale[:, :, None], (TOKENS, GROUPS, OCTETS // GROUPS)), (TOKENS, OCTETS))
    # rounded on its own, so that comparisons with it and differences from it agree
    border = tl.fma(scale, b0 if BITS == 2 else b1 if BITS == 3 else b3, 0.0)
    p0, p1, p2, p3 = plane_bytes(y, scale, border, b0, b1, b2, b4, b5, b6, BITS)
    at = (row * tokens + first) * OCTETS
    inside = local[:, None] * OCTETS + octet
    tl.store(tl.where(side == 0, plane0, other_plane0) + at + inside, p0.to(tl.uint8), mask=mask[:, None])
    if BITS > 1:
        tl.store(tl.where(side == 0, plane1, other_plane1) + at + inside, p1.to(tl.uint8), mask=mask[:, None])
    if BITS > 2:
        tl.store(tl.where(side == 0, plane2, other_plane2) + at + inside, p2.to(tl.uint8), mask=mask[:, None])
    if BITS > 3:
        tl.store(tl.where(side == 0, plane3, other_plane3) + at + inside, p3.to(tl.uint8), mask=mask[:, None])


@triton.jit
def _plus(y, c, factor):
    """An octet plus centroids, which are codes times a factor."""
    return (y[0] + c[0] * factor[0], y[1] + c[1] * factor[1], y[2] + c[2] * factor[2], y[3] + c[3] * factor[3],
            y[4] + c[4] * factor[4], y[5] + c[5] * factor[5], y[6] + c[6] * factor[6], y[7] + c[7] * factor[7])


@triton.jit
def _times(y, factor):
    """y * factor. Adding 0 turns -0 into 0, whose sign bit is that of a value that is not negative."""
    return (tl.fma(y[0], factor[0], 0.0), tl.fma(y[1], factor[1], 0.0), tl.fma(y[2], factor[2], 0.0), tl.fma(y[3], factor[3], 0.0),
            tl.fma(y[4], factor[4], 0.0), tl.fma(y[5], factor[5], 0.0), tl.fma(y[6], factor[6], 0.0), tl.fma(y[7], factor[7], 0.0))


@triton.jit(do_not_specialize=["count"])
def scales_kernel(roots, scales, other_scales, exponents, other_exponents, count, BLOCK: tl.constexpr):
    """float32 scales [tensors, rows, count] to E4M3 bytes under one power of two for each row, which non-finite ones do not affect.
    Grid: (rows, tensors)."""
    row, side = tl.program_id(0).to(tl.int64), tl.program_id(1)
    roots += (side * tl.num_programs(0) + row) * count
    scales = tl.where(side == 0, scales, other_scales) + row * count
    store_scales(roots, scales, tl.where(side == 0, exponents, other_exponents) + row, count, BLOCK)


@triton.jit
def store_scales(roots, scales, exponent_of_row, count, BLOCK: tl.constexpr):
    """Scales of one row, float32 [count], to E4M3 bytes and their power of two."""
    place = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        root = tl.load(roots + start + place, mask=start + place < count, other=0.0)
        largest = tl.maximum(largest, tl.where(is_finite(root), root, 0.0))
    exponent = shared_exponent(tl.max(largest, axis=0))
    tl.store(exponent_of_row, exponent.to(tl.int8))
    for start in range(0, count, BLOCK):
        mask = start + place < count
        root = tl.load(roots + start + place, mask=mask, other=0.0)
        tl.store(scales + start + place, scale_to_e4m3(root, power_of_two(-exponent)), mask=mask)


def borders_and_planes(spans: list[PlaneSpan]) -> list[float | Tensor]:
    """b0 to b6 and the planes of K and V, as arguments of the kernels; unused arguments get placeholders."""
    bits = spans[0].bits
    borders = planes.thresholds(bits)
    written = [span.planes[min(plane, bits - 1)] for plane in range(planes.MAX_PLANES) for span in (spans[0], spans[-1])]
    return [*borders, *[0.0] * (MAX_BORDERS - len(borders)), *written]


def _on_hopper(spans: list[PlaneSpan], xs: list[Tensor]) -> bool:
    """Encode with the kernel for Hopper, if that is possible. Returns whether it did. Variants that failed are not tried again."""
    x, first = xs[0], spans[0]
    # it loads two channels at a time
    odd = x.stride(0) % 2 or x.stride(1) % 2 or any(tensor.data_ptr() % 4 for tensor in xs)
    if major(x.device) != 9 or x.dtype != torch.bfloat16 or odd:
        return False
    if reason := _hopper_failures.reason(_compiled_for(first), x.shape):
        note(ON_HOPPER, reason=reason)
        return False
    try:
        from . import hopper

        cut = hopper.Cut.of(first.bits, first.codebook.stages, first.codebook.centroids.shape[2], x.shape[2])
        if cut is not None:
            hopper.launch(cut, spans, xs)
    except Exception as error:
        if ran_out(error):
            raise
        # a Triton without Gluon or with another version of it; the kernel for any GPU needs neither
        reason = sentence_of(error)
        _hopper_failures.add(_compiled_for(first), x.shape, reason)
        logging.warning("QVG: from here on %s tokens in %s heads are encoded by the kernel for any GPU: %s", *x.shape[:2], reason)
        note(ON_HOPPER, reason=reason)
        return False
    return cut is not None


def _compiled_for(span: PlaneSpan) -> tuple:
    return span.scales.device, span.bits, span.scales.shape[2], span.codebook.centroids.shape


def encode(bits: int, groups: int, gains: list[str], books: list[Codebook], *xs: Tensor) -> list[PlaneSpan]:
    """One or two tensors [T, R, D] of one shape, with codebooks of one shape -> a span with `bits` planes of each."""
    for x in xs:
        require_channels_last(x)
    x = xs[0]
    tokens, rows, dim = x.shape
    stages, count = books[0].stages, books[0].centroids.shape[2]
    if any(other.stride() != x.stride() for other in xs):
        xs = [other.contiguous() for other in xs]
        x = xs[0]
    spans = [PlaneSpan.empty(x, bits, book, groups, gain) for x, book, gain in zip(xs, books, gains)]
    before_launch("encode", bits, stages, groups, dim, x.dtype, x.device)
    if _on_hopper(spans, xs):
        return spans
    native, product = converts_e4m3(x.device), Product.of(dim, x.device)
    table, norms = prepared(product, count, dim, x.device, len(xs), stages, rows)
    padded = table.shape[3]
    factors = torch.empty(len(xs), rows, stages + 1, dim, dtype=torch.float32, device=x.device)
    roots = torch.empty(len(xs), rows, tokens, groups, dtype=torch.float32, device=x.device)

    def both(tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
        return tensors[0], tensors[-1]

    codes = both([book.centroids for book in books])
    prepare_kernel[(max(1, padded // PREPARED), stages + 1, len(xs) * rows)](
        *codes, *both([book.centroid_scale for book in books]), *both([book.channel_scale for book in books]), table, norms, factors,
        count, padded, rows, STAGES=stages, D=dim, BLOCK=PREPARED, NATIVE_E4M3=native, num_warps=4)
    encode_kernel[(triton.cdiv(tokens, product.tokens), rows, len(xs))](
        *both(xs), *codes, *both([span.ids for span in spans]), table, norms, factors, roots,
        *borders_and_planes(spans),
        tokens, rows, count, padded, 0, x.stride(0), x.stride(1),
        STAGES=stages, GROUPS=groups, BITS=bits, D=dim, TOKENS=product.tokens, BLOCK=product.block, NATIVE_E4M3=native,
        num_warps=encode_warps(product, dim, major(x.device)), num_stages=product.stages)
    scales_kernel[(rows, len(xs))](
        roots, *both([span.scales for span in spans]), *both([span.exponents for span in spans]), tokens * groups,
        BLOCK=SCALES, num_warps=8)
    return spans
