"""Decode spans into the workspace: planes, scales, the centroids of every stage, and RoPE for K, in one pass.

Reference: `qvg.cache.kv_cache.LayerCache.read`. A `Reader` keeps one row of addresses, strides and levels per span, so that one launch
covers all spans of one kind, K and V together: spans of different lengths, epochs and codebook sizes differ only in
their rows. Kinds that need other code (another number of planes, 8-bit sinks, paper mode) take a launch each.

A program decodes one head at the same places of all frames of a span, a tile of TOKENS at a time: the angles that its keys turn by are
those of few places. What the kernel waits for is memory: the streams of planes, scales and ids are brought into the L2 cache when a program
starts, and stores are the first to leave it, because a workspace is larger.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .halves import pair
from .octets import (
    bfloat16_octet,
    dequantize,
    dequantize_pairs,
    e4m3_octet,
    factors_of,
    fetch,
    octet_of,
    octets,
    tile_of,
    turn,
    turn_pairs,
    words_of,
)
from .tiles import (
    power_of_two,
    prefetch,
    repeat2,
    repeat4,
    round_to_bfloat16,
    saturate,
    scale_to_float32,
)

PLANES, PAPER, INT8, PLAIN = (tl.constexpr(kind) for kind in range(4))

# columns of a job: addresses, then sizes and places, then strides in elements
DATA = tl.constexpr(0)  # four planes, or packed codes, or plain numbers in the first
SCALES = tl.constexpr(4)
ZEROS = tl.constexpr(5)
IDS = tl.constexpr(6)
CENTROIDS = tl.constexpr(7)
CENTROID_SCALE = tl.constexpr(8)
CHANNEL_SCALE = tl.constexpr(9)
EXPONENTS = tl.constexpr(10)
FRAMES = tl.constexpr(11)  # of the span
START = tl.constexpr(12)  # its first token in the workspace
IS_VALUE = tl.constexpr(13)
FRAME = tl.constexpr(14)  # position of its first frame
DATA_STRIDES = tl.constexpr(15)  # token, row
SCALE_STRIDES = tl.constexpr(17)  # token, row
ID_STRIDES = tl.constexpr(19)  # stage, token, row
CENTROID_STRIDES = tl.constexpr(22)  # stage, row
COLUMNS = tl.constexpr(24)


# tokens of a program, about: longer ones leave multiprocessors idle at the end, shorter ones begin too often
PROGRAM = 144


@dataclass(frozen=True)
class Kind:
    """What the compiler must know of a span: spans that agree in it share a launch."""

    code: int
    bits: int = 0
    stages: int = 0
    groups: int = 1
    zeros: bool = False


@dataclass(frozen=True)
class Tiling:
    """tokens: of a tile, chosen so that a thread holds an octet, or two where it computes in halves; registers: of a thread at most.

    Few enough registers that many threads are under way, and none spills; `qvg bench kernels --only tune` measures other choices.
    """

    tokens: int
    warps: int
    registers: int | None = None
    halves: bool = False

    @property
    def limits(self) -> dict[str, int]:
        return {} if self.registers is None else {"maxnreg": self.registers}

    def share(self, frames: int) -> int:
        """Tiles of places that a program takes of each of `frames` frames."""
        return max(1, round(PROGRAM / (self.tokens * frames)))

    @staticmethod
    def of(head_dim: int, name: str, bits: int = 2, major: int = 9, halves: bool = False) -> Tiling:
        """For a platform by its name, see `tiles.platform`; major: of NVIDIA's compute capability."""
        if name == "interpreter":
            return Tiling(tokens=4096 // head_dim, warps=8, halves=halves)
        # so few registers would spill from capability 10 on
        few = name == "cuda" and major < 10
        registers = (72 if bits < 4 else 96) if few else None
        return Tiling(tokens=(2048 if halves else 1024) // head_dim, warps=4, registers=registers, halves=halves)


def computes_in_halves(name: str, major: int, dtype: torch.dtype) -> bool:
    """Whether planes are decoded in float16, of whose 11 bits a bf16 workspace keeps 8. name: see `tiles.platform`; major: of NVIDIA's
    compute capability, which has products of bf16 from 8 on."""
    return dtype == torch.bfloat16 and (name == "interpreter" or (name == "cuda" and major >= 8))


@triton.jit
def _address(job, COLUMN: tl.constexpr, dtype: tl.constexpr):
    """A pointer out of the job table; torch aligns what it allocates, which the compiler cannot know."""
    return tl.multiple_of(tl.load(job + COLUMN).to(tl.pointer_type(dtype)), 16)


# numbers that change during a video would each be compiled for anew
@triton.jit(do_not_specialize=["first_job", "first_head", "all_heads", "origin", "frames", "places", "share"])
def decode_kernel(
    jobs, levels, angles, keys, values,
    first_job, first_head, all_heads, batches, batch_stride, token_stride, head_stride, origin, frames, places, share,
    KIND: tl.constexpr, BITS: tl.constexpr, STAGES: tl.constexpr, GROUPS: tl.constexpr, HAS_ZEROS: tl.constexpr,
    D: tl.constexpr, TIME: tl.constexpr, TOKENS: tl.constexpr, HALVES: tl.constexpr, NVIDIA: tl.constexpr, NATIVE_E4M3: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """One head at `share` tiles of places of every frame of one span. Grid: (blocks of places, heads, spans * batches)."""
    number = first_job + tl.program_id(2) // batches
    job = jobs + number * COLUMNS
    span_frames = tl.load(job + FRAMES).to(tl.int32)
    batch = tl.program_id(2) % batches
    head = tl.program_id(1)
    rows = batches * all_heads
    row = (batch * all_heads + first_head + head).to(tl.int64)
    # of a token's octets a thread holds one of each part
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

    # all of a job that the loop needs is read before it: the stores inside would make the compiler read it again
    data_token = tl.load(job + DATA_STRIDES)
    data_row = row * tl.load(job + DATA_STRIDES + 1)
    if KIND == PLAIN:
        data = _address(job, DATA, dtype) + data_row
    elif KIND == INT8:
        data = _address(job, DATA, tl.int8) + data_row
    else:
        data = _address(job, DATA, tl.uint8) + data_row
    if KIND != PLAIN:
        scale_token = tl.load(job + SCALE_STRIDES)
        scale_row = row * tl.load(job + SCALE_STRIDES + 1)
        scales = _address(job, SCALES, tl.bfloat16 if KIND == INT8 else tl.uint8) + scale_row
        group = tl.arange(0, GROUPS)[None, :]
        if HAS_ZEROS:
            zeros = _address(job, ZEROS, tl.uint8) + scale_row
    ids, id_token, id_stage = data, 0, 0
    if STAGES > 0:
        id_token = tl.load(job + ID_STRIDES + 1)
        id_stage = tl.load(job + ID_STRIDES)
        ids = _address(job, IDS, tl.uint8) + row * tl.load(job + ID_STRIDES + 2)
        centroid_stage = tl.multiple_of(tl.load(job + CENTROID_STRIDES), 16)
        centroid_row = row * tl.multiple_of(tl.load(job + CENTROID_STRIDES + 1), 16)
        centroids = _address(job, CENTROIDS, tl.bfloat16 if KIND == PAPER else tl.uint8) + centroid_row
    if KIND == PLANES:
        plane1 = _address(job, DATA + (1 if BITS > 1 else 0), tl.uint8) + data_row
        plane2 = _address(job, DATA + (2 if BITS > 2 else 0), tl.uint8) + data_row
        plane3 = _address(job, DATA + (3 if BITS > 3 else 0), tl.uint8) + data_row
        level = ()
        for n in tl.static_range(1 << (BITS - 1)):
            level = level + (tl.load(levels + number * 8 + n),)
        unit = power_of_two(tl.load(_address(job, EXPONENTS, tl.int8) + row))
        channel_scale = _address(job, CHANNEL_SCALE, tl.int64) + row * (D // 4) + 2 * octet
        centroid_scale = _address(job, CENTROID_SCALE, tl.int64) + row * (D // 4) + 2 * octet
        sizes = ()
        for n in tl.static_range(1 << (BITS - 1)):
            sizes = sizes + (pair(level[n], level[n], NVIDIA) if HALVES else level[n] * unit,)
        if HALVES:
            factors = ()
            for part in tl.static_range(PARTS):
                factors = factors + (factors_of(channel_scale + part * (2 * OCTETS), centroid_scale + part * (2 * OCTETS), rows * (D // 4),
                                                unit, STAGES, NVIDIA, NATIVE_E4M3),)
        else:
            channels = bfloat16_octet(channel_scale)
            units = ()
            for stage in tl.static_range(STAGES):
                units = units + (bfloat16_octet(centroid_scale + stage * rows * (D // 4)),)
    first_frame = tl.load(job + FRAME).to(tl.int32) + origin

    first = tl.program_id(0) * (share * TOKENS)
    if PREFETCH:
        # while stores keep the memory busy, bytes come later than the next tile can wait. A warp asks for those of a frame
        end = tl.minimum(first + share * TOKENS, places) - 1
        lane = tl.arange(0, 128)
        for start in range(0, span_frames, 4):
            before = tl.minimum(start + lane // 32, span_frames - 1) * places
            line = (before + first) * (D // 8) + tl.minimum(lane % 32 * 128, (end - first) * (D // 8))
            prefetch(data + line)
            if BITS > 1:
                prefetch(plane1 + line)
            sector = before + tl.minimum(first + lane % 32 * 32, end)
            prefetch(scales + sector * GROUPS)
            for stage in tl.static_range(STAGES):
                prefetch(ids + stage * id_stage + sector)
    within = tl.arange(0, TOKENS)[:, None]
    # beyond the end of a frame its last token is read and written again, which is cheaper than a mask on each
    place = tl.minimum(first + within, places - 1)
    local = place
    frame = 0
    if KIND == PLANES:
        ahead = fetch(local, octet, data, plane1, plane2, plane3, scales, ids, id_stage, BITS, STAGES, GROUPS, OCTETS, PARTS)
    for _ in range(tl.minimum(share, tl.cdiv(places - first, TOKENS)) * span_frames):
        # a tile of every frame in turn, so that the angles of its places are still in the cache
        more = frame + 1 < span_frames
        first = tl.where(more, first, first + TOKENS)
        next_frame = tl.where(more, frame + 1, 0)
        next_place = tl.minimum(first + within, places - 1)
        next_local = next_frame * places + next_place
        if KIND == PLANES:
            bits, scale, chosen = ahead
            words = ()
            for stage in tl.static_range(STAGES):
                codes = centroids.to(tl.pointer_type(tl.int64)) + stage * (centroid_stage // 8)
                codes += chosen[stage].to(tl.int32) * (D // 8) + octet
                parts = ()
                for part in tl.static_range(PARTS):
                    parts = parts + (tl.load(codes + part * OCTETS),)
                words = words + (parts,)
            # the next tile's bytes are on their way while this one is computed
            ahead = fetch(next_local, octet, data, plane1, plane2, plane3, scales, ids, id_stage, BITS, STAGES, GROUPS, OCTETS, PARTS)
            if not HALVES:
                scale = scale_to_float32(scale[0], NATIVE_E4M3)
                m = ()
                for n in tl.static_range(1 << (BITS - 1)):
                    m = m + (sizes[n] * scale,)
                x = ()
                for c in tl.static_range(8):
                    x = x + (dequantize(bits[0], c, BITS, m) * channels[c],)
                for stage in tl.static_range(STAGES):
                    found = e4m3_octet(words[stage][0], NATIVE_E4M3)
                    y = ()
                    for c in tl.static_range(8):
                        y = y + (x[c] + found[c] * units[stage][c],)
                    x = y
        else:
            if KIND == PAPER:
                packed = tl.load(data + local * data_token + tl.arange(0, D * BITS // 8)[None, :])
                if BITS == 2:
                    codes = (repeat4(packed.to(tl.int32), TOKENS, D // 4) >> (6 - 2 * (channel % 4))) & 3
                else:
                    codes = (repeat2(packed.to(tl.int32), TOKENS, D // 2) >> (4 - 4 * (channel % 2))) & 15
                tile = codes.to(tl.float32)
                if not HAS_ZEROS:
                    tile -= 2 ** (BITS - 1) - 1
            else:
                tile = tl.load(data + local * data_token + channel).to(tl.float32)
            if KIND != PLAIN:
                scale = tl.load(scales + local * scale_token + group)
                scale = scale.to(tl.float32) if KIND == INT8 else scale_to_float32(scale, NATIVE_E4M3)
                tile = tl.reshape(tile, (TOKENS, GROUPS, D // GROUPS)) * scale[:, :, None]
                if HAS_ZEROS:
                    tile += scale_to_float32(tl.load(zeros + local * scale_token + group), NATIVE_E4M3)[:, :, None]
                tile = tl.reshape(tile, (TOKENS, D))
            if KIND == PAPER:
                for stage in tl.static_range(STAGES):
                    chosen = tl.load(ids + stage * id_stage + local * id_token).to(tl.int32)
                    tile += tl.load(centroids + stage * centroid_stage + chosen * D + channel).to(tl.float32)
                # the released package rounds to bf16 before anything else sees the value
                tile = round_to_bfloat16(tile)
            x = octets(tile, TOKENS, D)

        # rows of the angles' table, in octets
        of_time, of_place = (first_frame + frame) * (D // 8), (frames + place) * (D // 8)
        for part in tl.static_range(PARTS):
            if HALVES:
                found = ()
                for stage in tl.static_range(STAGES):
                    found = found + (words[stage][part],)
                x = dequantize_pairs(bits[part], scale[part], found, sizes, factors[part], BITS, STAGES, NVIDIA, NATIVE_E4M3)
            if not is_value:
                # an octet turns by four pairs; those that turn with time end between the second and the third of one
                left, right = of_place, of_place
                if 4 * part * OCTETS < TIME:
                    pairs = 4 * (octet + part * OCTETS)
                    left = tl.where(pairs < TIME, of_time, of_place)
                    right = tl.where(pairs + 2 < TIME, of_time, of_place)
                # not so at the octet where time ends, but a thread holds one octet, and what matters is that threads stand along a row
                if HALVES:
                    left = angles + tl.max_contiguous(2 * left + octet, (1, OCTETS))
                    right = angles + tl.max_contiguous(2 * right + octet, (1, OCTETS))
                    x = turn_pairs(x, tl.load(left + part * OCTETS), tl.load(right + (part * OCTETS + D // 8)), NVIDIA)
                else:
                    left = angles + tl.max_contiguous(4 * left + octet, (1, OCTETS))
                    right = angles + tl.max_contiguous(4 * right + octet, (1, OCTETS))
                    x0, x1 = turn(x[0], x[1], tl.load(left))
                    x2, x3 = turn(x[2], x[3], tl.load(left + D // 8))
                    x4, x5 = turn(x[4], x[5], tl.load(right + D // 4))
                    x6, x7 = turn(x[6], x[7], tl.load(right + 3 * (D // 8)))
                    x = (x0, x1, x2, x3, x4, x5, x6, x7)
            at = out + local.to(tl.int64) * token_stride
            if HALVES and NVIDIA:
                at = at.to(tl.pointer_type(tl.int32)) + tl.arange(0, D // PARTS // 2)[None, :]
                tl.store(at + part * (D // PARTS // 2), words_of(x, factors[part][2], TOKENS, D // PARTS), cache_modifier=".cs")
            else:
                if HALVES:
                    x = octet_of(x, factors[part][2])
                whole = tile_of(x, TOKENS, D // PARTS)
                if dtype == tl.float16:
                    whole = saturate(whole)
                tl.store(at + channel + part * (D // PARTS), whole.to(dtype), cache_modifier=".cs")
        frame, place, local = next_frame, next_place, next_local
