"""`encode` for NVIDIA's Hopper in one launch. Reference: `qvg.codec.spans`.

Four threads have a token from first to last, 16 channels of every 64 each, as pairs of bf16. The registers that they load are an operand of
the matrix units as it is, because a product does not mind the order of its channels; the ids come out where the channels are; what the
centroids leave is the next operand. So tokens never pass through shared memory. The centroids of every stage, made by each program from
the codebook, serve as many tokens as there are for it: in shared memory for the products, and in memory, which then means the first
cache, to be taken off. Groups of four warps take turns at the matrix units.

A codebook's units are powers of two, so that its centroids are numbers of bf16 and taking one off is exact but for the last rounding. (Of
units that are not, as caches of earlier versions have, centroids are rounded.) A number that a rounding carries over a border is as well
on either side.

Written in Gluon, Triton's language for saying where numbers lie, as Triton 3.5 to 3.9 have it. Triton's interpreter does not know it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma

from ..qvg.codec.spans import PlaneSpan
from . import tiles
from .encode import borders_and_planes, power, scale_to_e4m3, shared_exponent, signs
from .octets import octets

# of a program, and what the compiler may take of it to move numbers about
SHARED_BYTES, RESERVED_BYTES = 232_448, 4096
# scales that the last program of a row looks at together
SCALES = 8192
# how many tiles a program could do in the time that it takes to get the centroids ready
START = 1.2

# it has another name since Triton 3.7
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
_round_to_e4m3 = gluon.jit(tiles.round_to_e4m3.fn)
_power_of_two = gluon.jit(tiles.power_of_two.fn)
_octets, _power, _signs, _shared_exponent, _scale_to_e4m3 = (
    gluon.jit(function.fn) for function in (octets, power, signs, shared_exponent, scale_to_e4m3))


@gluon.constexpr_function
def _halves(number):
    return number.bit_length() - 1


@gluon.constexpr_function
def _word_layout(tokens, dim):
    """[tokens, dim / 2], pairs of channels: 16q to 16q + 15 of every 64 are of thread q of four, which has the token eight behind, too."""
    registers = [[0, 1], [0, 2], [0, 4], *([0, 32 << bit] for bit in range(_halves(dim // 64))), [8, 0]]
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16 << bit, 0] for bit in range(_halves(tokens // 16))], [], [tokens, dim // 2])


@gluon.constexpr_function
def _quarter_layout(tokens):
    """[tokens, 4], quarters of tokens: of the threads that have them in `_word_layout`."""
    warps = [[16 << bit, 0] for bit in range(_halves(tokens // 16))]
    return gl.DistributedLinearLayout([[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], warps, [], [tokens, 4])


@gluon.constexpr_function
def _codebook_layout(warps, count, dim):
    """[count, dim] so that channels are where `_word_layout` has them."""
    lanes = [[0, 16], [0, 32], *([0, 64 << bit] for bit in range(_halves(dim // 64)))]
    return _rows_layout(warps, count, [[0, 1], [0, 2], [0, 4], [0, 8]], lanes, dim)


@gluon.constexpr_function
def _parts_layout(warps, count, dim):
    """[count, 16] so that a thread has the rows that it has of `_codebook_layout`."""
    return _rows_layout(warps, count, [[0, 1], [0, 2], [0, 4]], [[0, 8], *[[0, 0]] * _halves(dim // 32)], 16)


@gluon.constexpr_function
def _rows_layout(warps, count, registers, lanes, width):
    rows = [[1 << bit, 0] for bit in range(_halves(count))]
    lanes, rows = lanes + rows[:5 - len(lanes)], rows[5 - len(lanes):]
    split = _halves(warps)
    held = rows[:split] + [[0, 0]] * (split - len(rows))
    return gl.DistributedLinearLayout(registers + rows[split:], lanes, held, [], [count, width])


@gluon.jit
def _as_operand(x, ROWS: gl.constexpr, D: gl.constexpr):
    """Channels in the order in which the matrix units find them in the registers of `_word_layout`."""
    return gl.reshape(gl.permute(gl.reshape(x, (ROWS, D // 64, 4, 8, 2)), (0, 1, 3, 2, 4)), (ROWS, D))


@gluon.jit
def _zero():
    """Which the compiler does not know."""
    return gl.inline_asm_elementwise("mov.b32 $0, 0;", "=r", args=[], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _place(word, D: gl.constexpr):
    """Where a pair of channels of a centroid lies in memory, so that four threads read neighbouring octets at a time."""
    return gl.max_contiguous(gl.multiple_of((word & 3) + (word >> 1 & 12) + (word >> 5) * 16 + (word >> 2 & 1) * (D // 4), 4), 4)


@gluon.jit
def _publish(words, pairs):
    """Centroids, pairs of bf16 [C, D / 2], to memory."""
    C: gl.constexpr = pairs.shape[0]
    WIDTH: gl.constexpr = pairs.shape[1]
    number = gl.arange(0, C, layout=gl.SliceLayout(1, pairs.type.layout))[:, None]
    word = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, pairs.type.layout))
    gl.store(words + (number * WIDTH + _place(word, 2 * WIDTH)[None, :]), pairs)


@gluon.jit
def _channels(words, ROWS: gl.constexpr, D: gl.constexpr):
    """Pairs of bf16 as [ROWS, D]."""
    low, high = (words & 65535).to(gl.int16), (words >> 16).to(gl.int16)
    return gl.reshape(gl.join(low, high), (ROWS, D)).to(gl.bfloat16, bitcast=True)


@gluon.jit
def _load(codes, units, index, count, LAYOUT: gl.constexpr, START: gl.constexpr, N: gl.constexpr, D: gl.constexpr):
    """Codes [N, D] of the centroids of a row and stage from START on, and what multiplies them [D]."""
    number = START + gl.arange(0, N, layout=gl.SliceLayout(1, LAYOUT))
    channel = gl.arange(0, D, layout=gl.SliceLayout(0, LAYOUT))
    code = gl.load(codes + (index * count + number)[:, None] * D + channel[None, :], mask=(number < count)[:, None], other=0)
    return code, gl.load(units + index * D + channel)


@gluon.jit
def _hold(loaded, table, parts, left, WARPS: gl.constexpr):
    """What `_load` loaded, of which `left` are centroids, as pairs of bf16 [N, D / 2], and to shared memory as the matrix units take them:
    table bf16 [N, D]; half their norms, negative, in three parts [N, 16], a product of which with ones is added to the scores."""
    code, unit = loaded
    N: gl.constexpr = code.shape[0]
    D: gl.constexpr = code.shape[1]
    number = gl.arange(0, N, layout=gl.SliceLayout(1, code.type.layout))
    values = code.to(gl.float8e4nv, bitcast=True).to(gl.float32) * unit.to(gl.float32)[None, :]
    rest = gl.where(number < left, -0.5 * gl.sum(values * values, axis=1), -3e38)
    low, high = gl.split(gl.reshape(values, (N, D // 2, 2)))
    pairs = _pair(low, high)
    table.store(_as_operand(_channels(pairs, N, D), N, D))
    layout: gl.constexpr = _parts_layout(WARPS, N, D)
    rest = gl.convert_layout(rest, gl.SliceLayout(1, layout))
    part = gl.arange(0, 16, layout=gl.SliceLayout(0, layout))[None, :]
    high = rest.to(gl.bfloat16)
    rest -= high.to(gl.float32)
    middle = rest.to(gl.bfloat16)
    low = (rest - middle.to(gl.float32)).to(gl.bfloat16)
    none = gl.full((N, 16), 0.0, gl.bfloat16, layout)
    parts.store(gl.where(part == 0, high[:, None], gl.where(part == 1, middle[:, None], gl.where(part == 2, low[:, None], none))))
    return pairs


@gluon.jit
def _wait_for_turn():
    """Groups of four warps take turns to begin a product, so that they are at different steps: one has the matrix units while others
    look for the best scores. Without turns all multiply at once, and then none."""
    gl.inline_asm_elementwise("{ .reg .u32 t; mov.u32 t, %tid.x; shr.u32 t, t, 7; add.u32 t, t, 1; bar.sync t, 256; mov.u32 $0, 0; }",
                              "=r", args=[], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _give_turn(WARPS: gl.constexpr):
    """To the next group, behind the last to the first."""
    gl.inline_asm_elementwise(
        "{ .reg .u32 t; mov.u32 t, %tid.x; shr.u32 t, t, 7; add.u32 t, t, 1; and.b32 t, t, $1; add.u32 t, t, 1; bar.arrive t, 256;"
        " mov.u32 $0, 0; }", "=r,n", args=[WARPS // 4 - 1], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _give_first_turn(WARPS: gl.constexpr):
    """The last group to the first."""
    gl.inline_asm_elementwise(
        "{ .reg .u32 t; .reg .pred p; mov.u32 t, %tid.x; shr.u32 t, t, 7; setp.eq.u32 p, t, $1; @p bar.arrive 1, 256; mov.u32 $0, 0; }",
        "=r,n", args=[WARPS // 4 - 1], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _scores(x, ones, table, parts, START: gl.constexpr, N: gl.constexpr):
    """Scores [T, N] of N centroids from START on of tokens, pairs of bf16 [T, D / 2]. ones: [T, 16], what adds up the parts of norms."""
    T: gl.constexpr = x.shape[0]
    D: gl.constexpr = 2 * x.shape[1]
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[T // 16, 1], instr_shape=[16, N, 16])
    operand = gl.convert_layout(_as_operand(_channels(x, T, D), T, D), gl.DotOperandLayout(operand_index=0, parent=MMA, k_width=2))
    _wait_for_turn()
    score = warpgroup_mma(operand, table.slice(START, N, 0).permute((1, 0)), gl.full((T, N), 0.0, gl.float32, MMA), use_acc=False,
                          is_async=True)
    _give_turn(T // 16)
    # waits for both. Where Triton 3.9 is asked to wait for a product begun before, it adds a barrier, and then all groups are at one step
    return warpgroup_mma(ones, parts.slice(START, N, 0).permute((1, 0)), score)


@gluon.jit
def _best(score, upper, START: gl.constexpr):
    """The best four [T, 4] of scores, with 255 less their ids in the lowest bits; see `assign.nearest`."""
    T: gl.constexpr = score.shape[0]
    N: gl.constexpr = score.shape[1]
    # of a column's number the compiler knows all but the bits 2 and 4, which are taken off the best of a thread's columns
    number = gl.arange(0, N, layout=gl.SliceLayout(0, score.type.layout)) & -7
    # one instruction, of which the compiler makes two
    bits = gl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r",
        args=[score.to(gl.int32, bitcast=True), upper, ((number + START) ^ 255)[None, :]], dtype=gl.int32, is_pure=True, pack=1)
    return gl.max(gl.max(gl.reshape(bits.to(gl.float32, bitcast=True), (T, N // 8, 4, 2)), axis=3), axis=1)


@gluon.jit
def _id(best, last, CLAMPS: gl.constexpr, LAYOUT: gl.constexpr):
    """Of the best of four [T, 4] as `_best` has them: int32 [T]. CLAMPS: `last` at most; tokens that are no numbers have no best."""
    best = best.to(gl.int32, bitcast=True) - 2 * gl.arange(0, 4, layout=gl.SliceLayout(0, best.type.layout))[None, :]
    best = gl.max(best.to(gl.float32, bitcast=True), axis=1).to(gl.int32, bitcast=True)
    return gl.convert_layout(gl.minimum(255 - (best & 255), last) if CLAMPS else 255 - (best & 255), gl.SliceLayout(1, LAYOUT))


@gluon.jit
def _moved(x):
    """Pairs of bf16 themselves, in the registers in which products take them. A move that the compiler sees through makes some versions
    keep those that were loaded, too."""
    return gl.inline_asm_elementwise("{ .reg .b32 z; mov.b32 z, 0x80008000; add.rn.bf16x2 $0, $1, z; }", "=r,r", args=[x], dtype=gl.int32,
                                     is_pure=True, pack=1)


@gluon.jit
def _minus(x, y):
    """Pairs of bf16."""
    return gl.inline_asm_elementwise("sub.rn.bf16x2 $0, $1, $2;", "=r,r,r", args=[x, y], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _fma(x, y, z):
    """Pairs of bf16: x * y + z."""
    return gl.inline_asm_elementwise("fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", args=[x, y, z], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _pair(low, high):
    """Of float32."""
    return gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", args=[low, high], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _byte(w0, w1, w2, w3):
    """Of an octet in pairs the byte whose bits are set where a number is not below zero."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 a, b; prmt.b32 a, $1, $2, 0xFDB9; prmt.b32 b, $3, $4, 0xFDB9;
        dp4a.s32.u32 a, a, 0x08040201, 255; dp4a.s32.u32 $0, b, 0x80402010, a;
        }""", "=r,r,r,r,r", args=[w0, w1, w2, w3], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _power_of_pairs(w0, w1, w2, w3):
    """Sum of the squares of an octet in pairs, float32. Four of them are added as bf16."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 a; .reg .f32 x, y;
        mul.rn.bf16x2 a, $1, $1; fma.rn.bf16x2 a, $2, $2, a; fma.rn.bf16x2 a, $3, $3, a; fma.rn.bf16x2 a, $4, $4, a;
        shl.b32 x, a, 16; and.b32 y, a, 0xFFFF0000; add.f32 $0, x, y;
        }""", "=f,r,r,r,r", args=[w0, w1, w2, w3], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _quantize(y, factor, b0, b1, b2, b3, b4, b5, b6, GROUPS: gl.constexpr, BITS: gl.constexpr):
    """Residuals, pairs of bf16 [T, D / 2] -> root mean squares float32 [T, GROUPS], bytes of planes int32 [T, D / 8].

    factor: in shared memory what divides by the channel scales, float32 [D], up to two planes pairs of bf16 [D / 2].
    """
    T: gl.constexpr = y.shape[0]
    OCTETS: gl.constexpr = y.shape[1] // 4
    # adding 0 makes zeros of negative zeros, which have the sign bit of numbers below zero
    if BITS > 2:
        z = _channels(y, T, 8 * OCTETS).to(gl.float32)
        o = _octets(z * factor.load(gl.SliceLayout(0, z.type.layout))[None, :] + 0.0, T, 8 * OCTETS)
        power = _power(o)
    else:
        none = gl.zeros_like(y)
        even, odd = gl.split(gl.reshape(_fma(y, factor.load(gl.SliceLayout(0, y.type.layout))[None, :] + none, none), (T, OCTETS, 2, 2)))
        w0, w2 = gl.split(even)
        w1, w3 = gl.split(odd)
        power = _power_of_pairs(w0, w1, w2, w3)
    OCTET: gl.constexpr = power.type.layout
    power = gl.reshape(power, (T, GROUPS, OCTETS // GROUPS))
    rms = gl.sqrt(gl.sum(power, axis=2) / (8 * OCTETS // GROUPS))
    scale = _round_to_e4m3(rms)
    scale = gl.where(scale > 0, scale, 1.0)
    scale = gl.expand_dims(scale, 2) + gl.full((T, GROUPS, OCTETS // GROUPS), 0.0, gl.float32, power.type.layout)
    scale = gl.convert_layout(gl.reshape(scale, (T, OCTETS)), OCTET)
    border = scale * (b0 if BITS == 2 else b1 if BITS == 3 else b3)
    if BITS > 2:
        bytes = _signs(o, scale, border, b0, b1, b2, b4, b5, b6, BITS)
    elif BITS == 2:
        # x * x - border * border has the sign of |x| - border
        square = -border * border
        square = _pair(square, square)
        bytes = _byte(w0, w1, w2, w3), _byte(_fma(w0, w0, square), _fma(w1, w1, square), _fma(w2, w2, square), _fma(w3, w3, square))
    else:
        bytes = (_byte(w0, w1, w2, w3),)
    return rms, bytes


@gluon.jit
def _store(pointer, first, x, local, last):
    """[T, width] to rows `first` and on of a tensor as wide, `local` up to `last` of them. Offsets that the compiler knows come last."""
    at = gl.convert_layout(local, gl.SliceLayout(1, x.type.layout))[:, None]
    column = gl.arange(0, x.shape[1], layout=gl.SliceLayout(0, x.type.layout))[None, :]
    gl.store(pointer + first * x.shape[1] + (at * x.shape[1] + column), x.to(pointer.dtype.element_ty), mask=at <= last)


@gluon.jit
def _finite(root):
    """Scales, 0 in place of those that are no numbers."""
    return gl.where(root < float("inf"), root, 0.0)


@gluon.jit
def _tokens(x, x_token, token, last, word):
    """Pairs of bf16 [T, D / 2]; tokens behind the last are that token again. They are not to take the place of centroids in the cache."""
    return gl.load((x + gl.minimum(token, last) * x_token)[:, None] + word[None, :], eviction_policy="evict_first")


@gluon.jit
def _prefetch(x, x_token, token, last, T: gl.constexpr, D: gl.constexpr):
    """Bring tokens into the L2 cache."""
    layout: gl.constexpr = _quarter_layout(T)
    quarter = gl.arange(0, 4, layout=gl.SliceLayout(0, layout)) * (D // 8)
    start = (x + gl.convert_layout(gl.minimum(token, last), gl.SliceLayout(1, layout)) * x_token)[:, None] + quarter[None, :]
    gl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", args=[start.to(gl.int64)], dtype=gl.int32, is_pure=False,
                              pack=1)


@gluon.jit(do_not_specialize=["tokens", "rows", "count", "share", "upper"])
def encode_kernel(
    x, other_x, codes, other_codes, units, other_units, channel_scale, other_channel_scale, ids, other_ids, roots, arrived,
    b0, b1, b2, b3, b4, b5, b6, plane0, other_plane0, plane1, other_plane1, plane2, other_plane2, plane3, other_plane3,
    scales, other_scales, exponents, other_exponents, words,
    tokens, rows, count, share, upper, x_token, x_row,
    STAGES: gl.constexpr, GROUPS: gl.constexpr, BITS: gl.constexpr, D: gl.constexpr, C: gl.constexpr, N: gl.constexpr, T: gl.constexpr,
    AT_ONCE: gl.constexpr, CLAMPS: gl.constexpr,
):
    """A span of K and V: ids, planes and scales of `share` tokens of a row, T at a time; b0 to b6 are the cells' borders.

    ids [STAGES, rows, tokens], planes [rows, tokens, D / 8] and scales [rows, tokens, GROUPS] lie as `PlaneSpan.empty` made them.
    roots float32 [tensors, rows, tokens, GROUPS] are the scales before they are bytes, which needs the largest of the row: the program
    that finishes it last does that. arrived int32 [tensors, rows], zeros before and after, tells it. words int32 [tensors, rows, STAGES, C,
    D / 2] is room for the centroids as pairs of bf16, which all programs of a row write alike. upper: -256, the bits of a score but
    the lowest eight; not a constant, because an instruction has room for one, and that is better the number of a column.
    Grid: (shares of tokens, rows, tensors).
    """
    OCTETS: gl.constexpr = D // 8
    WARPS: gl.constexpr = T // 16
    L: gl.constexpr = _word_layout(T, D)
    B: gl.constexpr = _codebook_layout(WARPS, N, D)
    row, side = gl.program_id(1).to(gl.int64), gl.program_id(2)
    begin = gl.program_id(0).to(gl.int64) * share
    last = gl.minimum(tokens - gl.program_id(0) * share, share) - 1
    x, ids = gl.where(side == 0, x, other_x), gl.where(side == 0, ids, other_ids)
    codes, units = gl.where(side == 0, codes, other_codes), gl.where(side == 0, units, other_units)
    channel_scale = gl.where(side == 0, channel_scale, other_channel_scale)
    plane0, plane1 = gl.where(side == 0, plane0, other_plane0), gl.where(side == 0, plane1, other_plane1)
    plane2, plane3 = gl.where(side == 0, plane2, other_plane2), gl.where(side == 0, plane3, other_plane3)
    x += row * x_row + begin * x_token
    ids += row * tokens + begin
    plane0 += (row * tokens + begin) * OCTETS
    plane1 += (row * tokens + begin) * OCTETS
    plane2 += (row * tokens + begin) * OCTETS
    plane3 += (row * tokens + begin) * OCTETS
    roots += (side * gl.num_programs(1) + row) * tokens * GROUPS
    words += (side * gl.num_programs(1) + row) * (STAGES * C * (D // 2))
    local = gl.arange(0, T, layout=gl.SliceLayout(1, L))
    word = gl.arange(0, D // 2, layout=gl.SliceLayout(0, L))
    x = x.to(gl.pointer_type(gl.int32))
    x_token //= 2

    # where registers hold them, the centroids of all stages are loaded before the first are looked at
    AHEAD: gl.constexpr = C == N and STAGES * C * D <= 4096 * WARPS
    loaded, tables, parts, pairs = (), (), (), ()
    if AHEAD:
        for stage in gl.static_range(STAGES):
            loaded = loaded + (_load(codes, units, stage * rows + row, count, B, 0, C, D),)
    _prefetch(x, x_token, local, last, T, D)
    each = gl.arange(0, D, layout=gl.BlockedLayout([2], [32], [WARPS], [0]))
    inverse = 1.0 / gl.load(channel_scale + row * D + each).to(gl.float32)
    if BITS > 2:
        factor = gl.allocate_shared_memory(gl.float32, (1, D), gl.SwizzledSharedLayout(1, 1, 1, [0]))
        factor.index(0).store(inverse)
    else:
        factor = gl.allocate_shared_memory(gl.int32, (1, D // 2), gl.SwizzledSharedLayout(1, 1, 1, [0]))
        low, high = gl.split(gl.reshape(inverse, (D // 2, 2)))
        factor.index(0).store(_pair(low, high))
    ones = gl.allocate_shared_memory(gl.bfloat16, (T, 16), gl.NVMMASharedLayout(32, 16, 2), gl.full(
        (T, 16), 1.0, gl.bfloat16, gl.BlockedLayout([1, 8], [16, 2], [WARPS, 1], [1, 0])))
    for stage in gl.static_range(STAGES):
        table = gl.allocate_shared_memory(gl.bfloat16, (C, D), gl.NVMMASharedLayout(128, 16, 2))
        part = gl.allocate_shared_memory(gl.bfloat16, (C, 16), gl.NVMMASharedLayout(32, 16, 2))
        tables, parts = tables + (table,), parts + (part,)
        if AHEAD:
            pairs = pairs + (_hold(loaded[stage], table, part, count, WARPS),)
        else:
            for block in gl.static_range(0, C, N):
                codeword = _load(codes, units, stage * rows + row, count, B, block, N, D)
                pair = _hold(codeword, table.slice(block, N, 0), part.slice(block, N, 0), count - block, WARPS)
                _publish(words + (stage * C + block) * (D // 2), pair)
        # behind the loads of centroids, which all wait for
        if stage == (0 if AHEAD else STAGES - 1):
            following = _tokens(x, x_token, local, last, word)
    fence_async_shared()
    _barrier()
    if AHEAD:
        # behind the fence, which would wait for them
        for stage in gl.static_range(STAGES):
            _publish(words + stage * C * (D // 2), pairs[stage])
    _barrier()
    _prefetch(x, x_token, T + local, last, T, D)
    _give_first_turn(WARPS)

    for first in range(0, last + 1, T):
        token = first + local
        y = _moved(following)
        # keeps what is read there from being taken out of the loop into registers that are not there
        again = _zero()
        for stage in gl.static_range(STAGES):
            best = _best(_scores(y, ones, tables[stage], parts[stage], 0, N), upper, 0)
            for block in gl.static_range(N, C, N):
                best = gl.maximum(best, _best(_scores(y, ones, tables[stage], parts[stage], block, N), upper, block))
            chosen = _id(best, count - 1, CLAMPS, L)
            gl.store(ids + (rows.to(gl.int64) * tokens * stage + first) + local, chosen.to(gl.uint8), mask=local <= last - first)
            y = _minus(y, gl.load(words + stage * C * (D // 2) + (chosen[:, None] * (D // 2) + _place(word, D)[None, :])))
        if BITS <= 2:
            following = _tokens(x, x_token, token + T, last, word)
        rms, bytes = _quantize(y, factor.index(again), b0, b1, b2, b3, b4, b5, b6, GROUPS, BITS)
        _prefetch(x, x_token, token + 2 * T, last, T, D)
        _store(roots + begin * GROUPS, first, rms, local, last - first)
        _store(plane0, first, bytes[0], local, last - first)
        if BITS > 1:
            _store(plane1, first, bytes[1], local, last - first)
        if BITS > 2:
            _store(plane2, first, bytes[2], local, last - first)
        if BITS > 3:
            _store(plane3, first, bytes[3], local, last - first)
        # more planes need the registers
        if BITS > 2:
            following = _tokens(x, x_token, token + T, last, word)

    arrived += side * gl.num_programs(1) + row
    _barrier()
    if gl.atomic_add(arrived, 1, sem="acq_rel") == gl.num_programs(0) - 1:
        scales, exponents = gl.where(side == 0, scales, other_scales), gl.where(side == 0, exponents, other_exponents)
        total = tokens * GROUPS
        scales += row * total
        spot = gl.arange(0, AT_ONCE, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
        # mostly these are all, and not read again
        root = gl.load(roots + spot, mask=spot < total, other=0.0, cache_modifier=".cg")
        largest = _finite(root)
        for start in range(AT_ONCE, total, AT_ONCE):
            more = gl.load(roots + start + spot, mask=start + spot < total, other=0.0, cache_modifier=".cg")
            largest = gl.maximum(largest, _finite(more))
        exponent = _shared_exponent(gl.max(largest, axis=0))
        gl.store(exponents + row, exponent.to(gl.int8))
        gl.store(scales + spot, _scale_to_e4m3(root, _power_of_two(-exponent)), mask=spot < total)
        for start in range(AT_ONCE, total, AT_ONCE):
            root = gl.load(roots + start + spot, mask=start + spot < total, other=0.0, cache_modifier=".cg")
            gl.store(scales + start + spot, _scale_to_e4m3(root, _power_of_two(-exponent)), mask=start + spot < total)
        gl.store(arrived, 0)


@dataclass(frozen=True)
class Cut:
    """How an encoding is cut. tokens, block: of a tile and of the centroids; width: of those that are multiplied at once."""

    tokens: int
    block: int
    width: int
    registers: int | None

    @property
    def warps(self) -> int:
        return self.tokens // 16

    @staticmethod
    def of(bits: int, stages: int, count: int, dim: int) -> Cut | None:
        """None where there are no centroids, those of every stage do not fit shared memory, or the rest does not fit the registers."""
        block = max(16, triton.next_power_of_2(count))
        # a thread has two tokens: a quarter of their channels and of the scores of `width` centroids
        small = dim <= 128 and block <= 128 and bits <= 2
        cut = Cut(256, block, min(block, 128), 128) if small else Cut(128, block, min(block, 128), None)
        shared = 2 * (stages * block * (dim + 16) + 16 * cut.tokens) + 4 * dim + RESERVED_BYTES
        return cut if stages and shared <= SHARED_BYTES and (dim <= 128 or bits <= 2) else None


@lru_cache
def share_of(tokens: int, rows: int, tile: int, places: int) -> int:
    """Tokens of a program so that the last one ends early. places: programs that run at once."""
    def time(programs: int) -> float:
        return -(-rows * programs // places) * (-(-tokens // (programs * tile)) + START)

    return -(-tokens // min(range(1, -(-tokens // tile) + 1), key=time))


@lru_cache
def _arrived(device: torch.device, stream: int, rows: int) -> Tensor:
    """Zeros, as a launch leaves them. Every stream has its own, because only launches of one follow each other."""
    return torch.zeros(rows, dtype=torch.int32, device=device)


def launch(cut: Cut, spans: list[PlaneSpan], xs: list[Tensor]) -> None:
    """Encode tensors [T, R, D] bf16, one or two that are alike, to the spans made for them."""
    x, first = xs[0], spans[0]
    tokens, rows, dim = x.shape
    groups, sides = first.scales.shape[2], len(xs)
    roots = torch.empty(sides, rows, tokens, groups, dtype=torch.float32, device=x.device)
    words = torch.empty(sides * rows, first.codebook.stages, cut.block, dim // 2, dtype=torch.int32, device=x.device)
    arrived = _arrived(x.device, torch.cuda.current_stream(x.device).cuda_stream, sides * rows)
    share = share_of(tokens, sides * rows, cut.tokens, torch.cuda.get_device_properties(x.device).multi_processor_count)
    # within a program's share 32 bits count the numbers
    share = min(share, (2**31 - 1) // max(1, x.stride(0)))
    pair = first, spans[-1]
    encode_kernel[(triton.cdiv(tokens, share), rows, sides)](
        xs[0], xs[-1], *(span.codebook.centroids for span in pair), *(span.codebook.centroid_scale for span in pair),
        *(span.codebook.channel_scale for span in pair), *(span.ids for span in pair), roots, arrived,
        *borders_and_planes(spans),
        *(span.scales for span in pair), *(span.exponents for span in pair), words,
        tokens, rows, first.codebook.centroids.shape[2], share, -256, x.stride(0), x.stride(1),
        STAGES=first.codebook.stages, GROUPS=groups, BITS=first.bits, D=dim, C=cut.block, N=cut.width, T=cut.tokens, AT_ONCE=SCALES,
        CLAMPS=first.codebook.centroids.shape[2] < cut.block,
        num_warps=cut.warps, maxnreg=cut.registers)
