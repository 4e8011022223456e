"""Decode spans into the workspace in one pass: planes, scales, the centroids of every stage, and RoPE for K.

Reference: `qvg.cache.read.read`. One launch reads all spans of one kind, K and V together (`jobs`).

A place is the position of a token within its frame. A program decodes one head at the same places of all frames of a span, a tile of TOKENS
at a time, so it loads the rotation angles of few places. A thread holds one octet of channels of one token (`octets`), or two that lie half
a head apart: a byte of each plane, eight bytes of each centroid, sixteen bytes of output, and nothing moves between threads. For a bf16
workspace on an NVIDIA GPU an octet is computed as four float16 pairs (`octet_pairs`), otherwise in float32.

The kernel is bound by memory. Planes, scales and ids are prefetched into the L2 cache when a program starts, and the output is stored with
a streaming hint, because a workspace is larger than that cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .halves import pair
from .jobs import (
    CENTROID_SCALE,
    CHANNEL_SCALE,
    COLUMNS,
    EXPONENTS,
    FRAME,
    FRAMES,
    INT8,
    IS_VALUE,
    PAPER,
    PLAIN,
    PLANES,
    START,
    address,
    span_addresses,
)
from .octet_pairs import dequantize_pairs, factors_of, octet_of, rotate_pairs, words_of
from .octets import bfloat16_octet, dequantize, e4m3_octet, fetch, octets, rotate, tile_of
from .tiles import (
    power_of_two,
    prefetch,
    repeat2,
    repeat4,
    round_to_bfloat16,
    saturate,
    scale_to_float32,
)

# tokens of a program, approximately: longer programs leave multiprocessors idle at the end, shorter ones start too often
PROGRAM = 144


@dataclass(frozen=True)
class Tiling:
    """How a launch is cut. tokens: of a tile, so that a thread holds one octet, or two when it computes in halves. registers: the limit a
    thread has, low enough that many threads are resident and none spills. `qvg bench kernels --only tune` measures alternatives.
    """

    tokens: int
    warps: int
    registers: int | None = None
    halves: bool = False

    @property
    def limits(self) -> dict[str, int]:
        return {} if self.registers is None else {"maxnreg": self.registers}

    def share(self, frames: int) -> int:
        """Tiles of places that a program decodes in each of `frames` frames."""
        return max(1, round(PROGRAM / (self.tokens * frames)))

    @staticmethod
    def of(head_dim: int, name: str, bits: int = 2, major: int = 9, halves: bool = False) -> Tiling:
        """For a platform name (`tiles.platform`) and the major compute capability of an NVIDIA GPU."""
        if name == "interpreter":
            return Tiling(tokens=4096 // head_dim, warps=8, halves=halves)
        # these limits would spill from capability 10 on
        limited = name == "cuda" and major < 10
        registers = (72 if bits < 4 else 96) if limited else None
        return Tiling(tokens=(2048 if halves else 1024) // head_dim, warps=4, registers=registers, halves=halves)


def computes_in_halves(name: str, major: int, dtype: torch.dtype) -> bool:
    """Whether planes are decoded in float16, whose 11 significant bits cover the 8 of a bf16 workspace. name: of the platform
    (`tiles.platform`). major: of an NVIDIA GPU's compute capability, which multiplies bf16 from 8 on."""
    return dtype == torch.bfloat16 and (name == "interpreter" or (name == "cuda" and major >= 8))


@triton.jit
def _plane_factors(job, levels, row, rows, octet, BITS: tl.constexpr, STAGES: tl.constexpr, D: tl.constexpr, OCTETS: tl.constexpr,
                   PARTS: tl.constexpr, NVIDIA: tl.constexpr, NATIVE_E4M3: tl.constexpr):
    """What dequantizes the planes of a row: its quantizer levels, and the factors of an octet's channels and centroids.

    With two PARTS, in halves: levels as pairs, and for each part what `factors_of` returns. Otherwise in float32: levels times the unit of
    the row's scales, and (channel scales, centroid scales of every stage).
    """
    HALVES: tl.constexpr = PARTS == 2
    level = ()
    for n in tl.static_range(1 << (BITS - 1)):
        level = level + (tl.load(levels + n),)
    unit = power_of_two(tl.load(address(job, EXPONENTS, tl.int8) + row))
    channel_scale = address(job, CHANNEL_SCALE, tl.int64) + row * (D // 4) + 2 * octet
    centroid_scale = address(job, CENTROID_SCALE, tl.int64) + row * (D // 4) + 2 * octet
    sizes = ()
    for n in tl.static_range(1 << (BITS - 1)):
        sizes = sizes + (pair(level[n], level[n], NVIDIA) if HALVES else level[n] * unit,)
    factors = ()
    if HALVES:
        for part in tl.static_range(PARTS):
            factors = factors + (factors_of(channel_scale + part * (2 * OCTETS), centroid_scale + part * (2 * OCTETS), rows * (D // 4),
                                            unit, STAGES, NVIDIA, NATIVE_E4M3),)
    else:
        channels = bfloat16_octet(channel_scale)
        units = ()
        for stage in tl.static_range(STAGES):
            units = units + (bfloat16_octet(centroid_scale + stage * rows * (D // 4)),)
        factors = (channels, units)
    return sizes, factors


@triton.jit
def _prefetch_span(data, scales, ids, first, places, span_frames, share, BITS: tl.constexpr, STAGES: tl.constexpr, GROUPS: tl.constexpr,
                   D: tl.constexpr, TOKENS: tl.constexpr):
    """Bring planes, scales and ids of this program into the L2 cache. While stores keep the memory busy, loads take longer than the
    computation of one tile. Each warp requests those of one frame."""
    end = tl.minimum(first + share * TOKENS, places) - 1
    thread = tl.arange(0, 128)
    for start in range(0, span_frames, 4):
        before = tl.minimum(start + thread // 32, span_frames - 1) * places
        line = (before + first) * (D // 8) + tl.minimum(thread % 32 * 128, (end - first) * (D // 8))
        prefetch(data[0] + line)
        if BITS > 1:
            prefetch(data[1] + line)
        sector = before + tl.minimum(first + thread % 32 * 32, end)
        prefetch(scales[0] + sector * GROUPS)
        for stage in tl.static_range(STAGES):
            prefetch(ids[0] + stage * ids[2] + sector)


@triton.jit
def _load_centroids(centroids, selected, octet, STAGES: tl.constexpr, D: tl.constexpr, OCTETS: tl.constexpr, PARTS: tl.constexpr):
    """The E4M3 codes of the selected centroids of every stage and part: int64 [TOKENS, OCTETS] each."""
    words = ()
    for stage in tl.static_range(STAGES):
        codes = centroids[0].to(tl.pointer_type(tl.int64)) + stage * (centroids[1] // 8)
        codes += selected[stage].to(tl.int32) * (D // 8) + octet
        parts = ()
        for part in tl.static_range(PARTS):
            parts = parts + (tl.load(codes + part * OCTETS),)
        words = words + (parts,)
    return words


@triton.jit
def _dequantize_octet(bits, scale, words, sizes, factors, BITS: tl.constexpr, STAGES: tl.constexpr, NATIVE_E4M3: tl.constexpr):
    """An octet as eight float32 tiles from its planes, the code of its scale and its centroids."""
    scale = scale_to_float32(scale, NATIVE_E4M3)
    m = ()
    for n in tl.static_range(1 << (BITS - 1)):
        m = m + (sizes[n] * scale,)
    x = ()
    for c in tl.static_range(8):
        x = x + (dequantize(bits, c, BITS, m) * factors[0][c],)
    for stage in tl.static_range(STAGES):
        found = e4m3_octet(words[stage][0], NATIVE_E4M3)
        y = ()
        for c in tl.static_range(8):
            y = y + (x[c] + found[c] * factors[1][stage][c],)
        x = y
    return x


@triton.jit
def _decode_tile(data, scales, ids, centroids, local, channel,
                 KIND: tl.constexpr, BITS: tl.constexpr, STAGES: tl.constexpr, GROUPS: tl.constexpr, HAS_ZEROS: tl.constexpr,
                 D: tl.constexpr, TOKENS: tl.constexpr, NATIVE_E4M3: tl.constexpr):
    """Tokens [TOKENS, D] float32 of a span in paper mode, of int8 values, or of plain ones."""
    group = tl.arange(0, GROUPS)[None, :]
    if KIND == PAPER:
        packed = tl.load(data[0] + local * data[4] + tl.arange(0, D * BITS // 8)[None, :])
        if BITS == 2:
            codes = (repeat4(packed.to(tl.int32), TOKENS, D // 4) >> (6 - 2 * (channel % 4))) & 3
        else:
            codes = (repeat2(packed.to(tl.int32), TOKENS, D // 2) >> (4 - 4 * (channel % 2))) & 15
        tile = codes.to(tl.float32)
        if not HAS_ZEROS:
            tile -= 2 ** (BITS - 1) - 1
    else:
        tile = tl.load(data[0] + local * data[4] + channel).to(tl.float32)
    if KIND != PLAIN:
        scale = tl.load(scales[0] + local * scales[2] + group)
        scale = scale.to(tl.float32) if KIND == INT8 else scale_to_float32(scale, NATIVE_E4M3)
        tile = tl.reshape(tile, (TOKENS, GROUPS, D // GROUPS)) * scale[:, :, None]
        if HAS_ZEROS:
            tile += scale_to_float32(tl.load(scales[1] + local * scales[2] + group), NATIVE_E4M3)[:, :, None]
        tile = tl.reshape(tile, (TOKENS, D))
    if KIND == PAPER:
        for stage in tl.static_range(STAGES):
            selected = tl.load(ids[0] + stage * ids[2] + local * ids[1]).to(tl.int32)
            tile += tl.load(centroids[0] + stage * centroids[1] + selected * D + channel).to(tl.float32)
        # the released package rounds to bf16 first
        tile = round_to_bfloat16(tile)
    return tile


@triton.jit
def apply_rope(x, angles, of_time, of_place, octet, part: tl.constexpr, D: tl.constexpr, TIME: tl.constexpr, OCTETS: tl.constexpr,
               HALVES: tl.constexpr, NVIDIA: tl.constexpr, ALONE: tl.constexpr):
    """RoPE on an octet. of_time, of_place: rows of the table of angles, in octets; the first TIME channel pairs rotate with time. ALONE:
    whether a thread holds one octet of a token."""
    # the boundary may fall between the second and the third of an octet's four pairs
    left, right = of_place, of_place
    if 4 * part * OCTETS < TIME:
        pairs = 4 * (octet + part * OCTETS)
        left = tl.where(pairs < TIME, of_time, of_place)
        right = tl.where(pairs + 2 < TIME, of_time, of_place)
    # the hint is wrong at the boundary, but where a thread holds one octet, what matters is that threads lie along a row
    RUN: tl.constexpr = OCTETS if ALONE else 1
    if HALVES:
        left = angles + tl.max_contiguous(2 * left + octet, (1, RUN))
        right = angles + tl.max_contiguous(2 * right + octet, (1, RUN))
        x = rotate_pairs(x, tl.load(left + part * OCTETS), tl.load(right + (part * OCTETS + D // 8)), NVIDIA)
    else:
        left = angles + tl.max_contiguous(4 * left + octet, (1, RUN))
        right = angles + tl.max_contiguous(4 * right + octet, (1, RUN))
        x0, x1 = rotate(x[0], x[1], tl.load(left))
        x2, x3 = rotate(x[2], x[3], tl.load(left + D // 8))
        x4, x5 = rotate(x[4], x[5], tl.load(right + D // 4))
        x6, x7 = rotate(x[6], x[7], tl.load(right + 3 * (D // 8)))
        x = (x0, x1, x2, x3, x4, x5, x6, x7)
    return x


@triton.jit
def store(at, x, channel, up, part: tl.constexpr, DTYPE: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr, PARTS: tl.constexpr,
          NVIDIA: tl.constexpr):
    """Store a part of the tokens that `at` points to. up: in halves, the power of two that restores their size."""
    HALVES: tl.constexpr = PARTS == 2
    if HALVES and NVIDIA:
        at = at.to(tl.pointer_type(tl.int32)) + tl.arange(0, D // PARTS // 2)[None, :]
        tl.store(at + part * (D // PARTS // 2), words_of(x, up, TOKENS, D // PARTS), cache_modifier=".cs")
    else:
        if HALVES:
            x = octet_of(x, up)
        whole = tile_of(x, TOKENS, D // PARTS)
        if DTYPE == tl.float16:
            whole = saturate(whole)
        tl.store(at + channel + part * (D // PARTS), whole.to(DTYPE), cache_modifier=".cs")


# sizes that change during a video would each compile the kernel anew
@triton.jit(do_not_specialize=["first_job", "first_head", "all_heads", "origin", "frames", "places", "share"])
def decode_kernel(
    jobs, levels, angles, keys, values,
    first_job, first_head, all_heads, batches, batch_stride, token_stride, head_stride, origin, frames, places, share,
    KIND: tl.constexpr, BITS: tl.constexpr, STAGES: tl.constexpr, GROUPS: tl.constexpr, HAS_ZEROS: tl.constexpr,
    D: tl.constexpr, TIME: tl.constexpr, TOKENS: tl.constexpr, HALVES: tl.constexpr, NVIDIA: tl.constexpr, NATIVE_E4M3: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """One head at `share` tiles of places of every frame of one span, to keys or values [batches, T, h, D]; h heads from first_head on.

    jobs, levels: rows of spans from first_job on. angles: `reader.Angles`, of which row `origin` is frame 0 and row `frames` place 0; the
    first TIME channel pairs rotate with time. Grid: (blocks of places, heads, spans * batches).
    """
    index = first_job + tl.program_id(2) // batches
    job = jobs + index * COLUMNS
    span_frames = tl.load(job + FRAMES).to(tl.int32)
    batch = tl.program_id(2) % batches
    head = tl.program_id(1)
    rows = batches * all_heads
    row = (batch * all_heads + first_head + head).to(tl.int64)
    # a thread holds one of a token's octets of each part
    PARTS: tl.constexpr = 2 if HALVES else 1
    OCTETS: tl.constexpr = D // PARTS // 8
    channel = tl.arange(0, D // PARTS)[None, :]
    octet = tl.arange(0, OCTETS)[None, :]
    dtype: tl.constexpr = keys.dtype.element_ty

    is_value = tl.load(job + IS_VALUE) != 0
    out = tl.where(is_value, values.to(tl.int64), keys.to(tl.int64)).to(tl.pointer_type(dtype))
    out = tl.multiple_of(out, 16)
    out += batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride
    out += tl.load(job + START) * token_stride

    # everything that the loop needs of a job is loaded before it: after a store the compiler would load it again
    data, scales, ids, centroids = span_addresses(job, row, dtype, KIND, BITS, STAGES, HAS_ZEROS)
    if KIND == PLANES:
        sizes, factors = _plane_factors(job, levels + index * 8, row, rows, octet, BITS, STAGES, D, OCTETS, PARTS, NVIDIA,
                                        NATIVE_E4M3)
    first_frame = tl.load(job + FRAME).to(tl.int32) + origin

    first = tl.program_id(0) * (share * TOKENS)
    if PREFETCH:
        _prefetch_span(data, scales, ids, first, places, span_frames, share, BITS, STAGES, GROUPS, D, TOKENS)
    within = tl.arange(0, TOKENS)[:, None]
    # past the end of a frame its last token is loaded and stored again, which is cheaper than masks
    place = tl.minimum(first + within, places - 1)
    local = place
    frame = 0
    if KIND == PLANES:
        ahead = fetch(local, octet, data[0], data[1], data[2], data[3], scales[0], ids[0], ids[2], BITS, STAGES, GROUPS, OCTETS, PARTS)
    for _ in range(tl.minimum(share, tl.cdiv(places - first, TOKENS)) * span_frames):
        # the same tile of every frame before the next tile, so that the angles of its places stay in the cache
        more = frame + 1 < span_frames
        first = tl.where(more, first, first + TOKENS)
        next_frame = tl.where(more, frame + 1, 0)
        next_place = tl.minimum(first + within, places - 1)
        next_local = next_frame * places + next_place
        if KIND == PLANES:
            bits, scale, selected = ahead
            words = _load_centroids(centroids, selected, octet, STAGES, D, OCTETS, PARTS)
            # the next tile's bytes arrive while this one is computed
            ahead = fetch(next_local, octet, data[0], data[1], data[2], data[3], scales[0], ids[0], ids[2], BITS, STAGES, GROUPS, OCTETS,
                          PARTS)
            if not HALVES:
                x = _dequantize_octet(bits[0], scale[0], words, sizes, factors, BITS, STAGES, NATIVE_E4M3)
        else:
            tile = _decode_tile(data, scales, ids, centroids, local, channel, KIND, BITS, STAGES, GROUPS, HAS_ZEROS, D, TOKENS, NATIVE_E4M3)
            x = octets(tile, TOKENS, D)

        # rows of the table of angles, in octets
        of_time, of_place = (first_frame + frame) * (D // 8), (frames + place) * (D // 8)
        for part in tl.static_range(PARTS):
            if HALVES:
                found = ()
                for stage in tl.static_range(STAGES):
                    found = found + (words[stage][part],)
                x = dequantize_pairs(bits[part], scale[part], found, sizes, factors[part], BITS, STAGES, NVIDIA, NATIVE_E4M3)
            if not is_value:
                x = apply_rope(x, angles, of_time, of_place, octet, part, D, TIME, OCTETS, HALVES, NVIDIA, True)
            at = out + local.to(tl.int64) * token_stride
            store(at, x, channel, factors[part][2] if HALVES else 1.0, part, dtype, D, TOKENS, PARTS, NVIDIA)
        frame, place, local = next_frame, next_place, next_local
