"""`encode` for NVIDIA's Hopper in one launch. Twin: `qvg.codec`.

Four threads have a token from first to last, 16 channels of every 64 each. The registers that they load are an operand of the matrix units
as it is, because a product does not mind the order of its channels; the ids come out where the channels are; what the centroids leave
is the next operand. So tokens never pass through shared memory, and warps wait for each other at the matrix units alone. The centroids of
every stage lie in shared memory, made by each program from the codebook, and serve as many tokens as there are for it.

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
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from ..qvg.codec import PlaneSpan
from . import tiles
from .encode import borders_and_planes, power, shared_exponent, signs
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
_float32_to_e4m3 = gluon.jit(tiles.float32_to_e4m3.fn)
_power_of_two = gluon.jit(tiles.power_of_two.fn)
_octets, _power, _signs, _shared_exponent = (gluon.jit(function.fn) for function in (octets, power, signs, shared_exponent))


@gluon.constexpr_function
def _halves(number):
    return number.bit_length() - 1


@gluon.constexpr_function
def _token_layout(tokens, dim):
    """[tokens, dim]: channels 16q to 16q + 15 of every 64 are of thread q of four, which has the token eight behind, too."""
    registers = [[0, 1], [0, 2], [0, 4], [0, 8], *([0, 64 << bit] for bit in range(_halves(dim // 64))), [8, 0]]
    lanes = [[0, 16], [0, 32], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16 << bit, 0] for bit in range(_halves(tokens // 16))], [], [tokens, dim])


@gluon.constexpr_function
def _codebook_layout(warps, count, dim):
    """[count, dim] so that eight channels that follow each other in the order of `_as_operand` are a thread's."""
    registers = [[0, 1], [0, 2], [0, 4], [0, 16], [0, 32]]
    lanes = [[0, 8], *([0, 64 << bit] for bit in range(_halves(dim // 64)))]
    rows = [[1 << bit, 0] for bit in range(_halves(count))]
    lanes, rows = lanes + rows[:5 - len(lanes)], rows[5 - len(lanes):]
    split = _halves(warps)
    held = rows[:split] + [[0, 0]] * (split - len(rows))
    return gl.DistributedLinearLayout(registers + rows[split:], lanes, held, [], [count, dim])


@gluon.constexpr_function
def _factor_layout(warps, dim):
    """What `_factor` reads of shared memory: four numbers of every thread of four follow each other."""
    registers = [[1], [2], [16], [32], *([64 << bit] for bit in range(_halves(dim // 64)))]
    return gl.DistributedLinearLayout(registers, [[4], [8], [0], [0], [0]], [[0]] * _halves(warps), [], [dim])


@gluon.jit
def _as_operand(x, ROWS: gl.constexpr, D: gl.constexpr):
    """Channels in the order in which the matrix units find them in the registers of `_token_layout`."""
    return gl.reshape(gl.permute(gl.reshape(x, (ROWS, D // 64, 4, 8, 2)), (0, 1, 3, 2, 4)), (ROWS, D))


@gluon.jit
def _factor(held, D: gl.constexpr, WARPS: gl.constexpr, LAYOUT: gl.constexpr):
    """[1, D] of shared memory."""
    x = gl.reshape(gl.permute(gl.reshape(held.load(_factor_layout(WARPS, D)), (D // 64, 4, 4, 4)), (0, 2, 1, 3)), (D,))
    return gl.convert_layout(x, gl.SliceLayout(0, LAYOUT))[None, :]


@gluon.jit
def _hold(code, unit, count, C: gl.constexpr, D: gl.constexpr, WARPS: gl.constexpr):
    """Codes [C, D] of centroids and what multiplies them -> in shared memory the centroids as bf16 and half their norms, negative, in
    three parts [C, 16], a product of which with ones begins the scores."""
    number = gl.arange(0, C, layout=gl.SliceLayout(1, code.type.layout))
    values = code.to(gl.float8e4nv, bitcast=True).to(gl.float32) * unit.to(gl.float32)[None, :]
    rest = gl.where(number < count, -0.5 * gl.sum(values * values, axis=1), -3e38)
    table = gl.allocate_shared_memory(gl.bfloat16, (C, D), gl.NVMMASharedLayout(128, 16, 2), _as_operand(values.to(gl.bfloat16), C, D))
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [32, 1], [WARPS, 1], [1, 0])
    rest = gl.convert_layout(rest, gl.SliceLayout(1, layout))
    part = gl.arange(0, 16, layout=gl.SliceLayout(0, layout))[None, :]
    high = rest.to(gl.bfloat16)
    rest -= high.to(gl.float32)
    middle = rest.to(gl.bfloat16)
    low = (rest - middle.to(gl.float32)).to(gl.bfloat16)
    none = gl.full((C, 16), 0.0, gl.bfloat16, layout)
    parts = gl.where(part == 0, high[:, None], gl.where(part == 1, middle[:, None], gl.where(part == 2, low[:, None], none)))
    return table, gl.allocate_shared_memory(gl.bfloat16, (C, 16), gl.NVMMASharedLayout(32, 16, 2), parts)


@gluon.jit
def _nearest(x, ones, table, parts, upper, C: gl.constexpr, N: gl.constexpr):
    """Ids int32 [T] of bf16 tokens [T, D], N of C centroids at a time; see `assign.nearest`."""
    T: gl.constexpr = x.shape[0]
    WARPS: gl.constexpr = T // 16
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, N, 16])
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=MMA, k_width=2)
    operand = gl.convert_layout(_as_operand(x, T, x.shape[1]), A)
    # of a column's number the compiler knows all but the bits 2 and 4, which are taken off the best of a thread's columns
    number = gl.arange(0, N, layout=gl.SliceLayout(0, MMA)) & -7
    for start in gl.static_range(0, C, N):
        score = warpgroup_mma(ones, parts.slice(start, N, 0).permute((1, 0)), gl.full((T, N), 0.0, gl.float32, MMA), use_acc=False,
                              is_async=True)
        score = warpgroup_mma(operand, table.slice(start, N, 0).permute((1, 0)), score, is_async=True)
        score = warpgroup_mma_wait(0, deps=[score])
        # one instruction, of which the compiler makes two
        bits = gl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r",
            args=[score.to(gl.int32, bitcast=True), upper, ((number + start) ^ 255)[None, :]], dtype=gl.int32, is_pure=True, pack=1)
        found = gl.max(gl.max(gl.reshape(bits.to(gl.float32, bitcast=True), (T, N // 8, 4, 2)), axis=3), axis=1)
        if start == 0:
            best = found
        else:
            best = gl.maximum(best, found)
    best = best.to(gl.int32, bitcast=True) - 2 * gl.arange(0, 4, layout=gl.SliceLayout(0, best.type.layout))[None, :]
    best = gl.max(best.to(gl.float32, bitcast=True), axis=1).to(gl.int32, bitcast=True)
    return gl.convert_layout(255 - (best & 255), gl.SliceLayout(1, x.type.layout))


@gluon.jit
def _left(x, codes, unit):
    """x + codes * unit: x bf16, codes E4M3, unit float32. Rounded to bf16 as the product takes it; a number that this carries over a
    border is as well on either side."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b16 l, h; .reg .b32 p, q; .reg .f32 c<4>, x<4>;
        mov.b32 {l, h}, $2; cvt.rn.f16x2.e4m3x2 p, l; cvt.rn.f16x2.e4m3x2 q, h;
        mov.b32 {l, h}, p; cvt.f32.f16 c0, l; cvt.f32.f16 c1, h; mov.b32 {l, h}, q; cvt.f32.f16 c2, l; cvt.f32.f16 c3, h;
        shl.b32 x0, $3, 16; and.b32 x1, $3, 0xFFFF0000; shl.b32 x2, $4, 16; and.b32 x3, $4, 0xFFFF0000;
        fma.rn.f32 x0, c0, $5, x0; fma.rn.f32 x1, c1, $6, x1; fma.rn.f32 x2, c2, $7, x2; fma.rn.f32 x3, c3, $8, x3;
        cvt.rn.bf16x2.f32 $0, x1, x0; cvt.rn.bf16x2.f32 $1, x3, x2;
        }""", "=r,=r,r,r,r,f,f,f,f", args=[codes, x, unit], dtype=gl.bfloat16, is_pure=True, pack=4)


@gluon.jit
def _left_at_last(x, codes, unit):
    """The same, not rounded."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b16 l, h; .reg .b32 p, q; .reg .f32 c<4>, x<4>;
        mov.b32 {l, h}, $4; cvt.rn.f16x2.e4m3x2 p, l; cvt.rn.f16x2.e4m3x2 q, h;
        mov.b32 {l, h}, p; cvt.f32.f16 c0, l; cvt.f32.f16 c1, h; mov.b32 {l, h}, q; cvt.f32.f16 c2, l; cvt.f32.f16 c3, h;
        shl.b32 x0, $5, 16; and.b32 x1, $5, 0xFFFF0000; shl.b32 x2, $6, 16; and.b32 x3, $6, 0xFFFF0000;
        fma.rn.f32 $0, c0, $7, x0; fma.rn.f32 $1, c1, $8, x1; fma.rn.f32 $2, c2, $9, x2; fma.rn.f32 $3, c3, $10, x3;
        }""", "=f,=f,=f,=f,r,r,r,f,f,f,f", args=[codes, x, unit], dtype=gl.float32, is_pure=True, pack=4)


@gluon.jit
def _prefetch(x, x_token, first, last, T: gl.constexpr, D: gl.constexpr):
    """Bring tokens into the L2 cache."""
    LINES: gl.constexpr = D // 64
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [32 // LINES, LINES], [T // 16, 1], [1, 0])
    token = gl.minimum(first + gl.arange(0, T, layout=gl.SliceLayout(1, layout)), last)
    line = x + (token[:, None] * x_token + gl.arange(0, LINES, layout=gl.SliceLayout(0, layout))[None, :] * 64)
    gl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", args=[line.to(gl.int64)], dtype=gl.int32, is_pure=False,
                              pack=1)


@gluon.jit(do_not_specialize=["tokens", "rows", "count", "share", "upper"])
def encode_kernel(
    x, other_x, codes, other_codes, units, other_units, channel_scale, other_channel_scale, ids, other_ids, roots, arrived,
    b0, b1, b2, b3, b4, b5, b6, plane0, other_plane0, plane1, other_plane1, plane2, other_plane2, plane3, other_plane3,
    scales, other_scales, exponents, other_exponents,
    tokens, rows, count, share, upper, x_token, x_row,
    STAGES: gl.constexpr, GROUPS: gl.constexpr, BITS: gl.constexpr, D: gl.constexpr, C: gl.constexpr, N: gl.constexpr, T: gl.constexpr,
    AT_ONCE: gl.constexpr,
):
    """A span of K and V: ids, planes and scales of `share` tokens of a row, T at a time; b0 to b6 are the cells' borders.

    ids [STAGES, rows, tokens], planes [rows, tokens, D / 8] and scales [rows, tokens, GROUPS] lie as `PlaneSpan.empty` made them.
    roots float32 [tensors, rows, tokens, GROUPS] are the scales before they are bytes, which needs the largest of the row: the program
    that finishes it last does that. arrived int32 [tensors, rows], zeros before and after, tells it. upper: -256, the bits of a score but
    the lowest eight; not a constant, because an instruction has room for one, and that is better the number of a column.
    Grid: (shares of tokens, rows, tensors).
    """
    OCTETS: gl.constexpr = D // 8
    WARPS: gl.constexpr = T // 16
    L: gl.constexpr = _token_layout(T, D)
    B: gl.constexpr = _codebook_layout(WARPS, C, D)
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
    local = gl.arange(0, T, layout=gl.SliceLayout(1, L))
    channel = gl.arange(0, D, layout=gl.SliceLayout(0, L))[None, :]
    _prefetch(x, x_token, 0, last, T, D)

    number = gl.arange(0, C, layout=gl.SliceLayout(1, B))
    place = gl.arange(0, D, layout=gl.SliceLayout(0, B))
    # as `_factor` reads them
    each = gl.arange(0, D, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    each = (each >> 6) * 64 + ((each >> 2) & 3) * 16 + ((each >> 4) & 3) * 4 + (each & 3)
    loaded, tables, parts = (), (), ()
    for stage in gl.static_range(STAGES):
        index = stage * rows + row
        held = gl.load(codes + (index * count + number)[:, None] * D + place[None, :], mask=(number < count)[:, None], other=0)
        loaded = loaded + ((held, gl.load(units + index * D + place), gl.load(units + index * D + each)),)
    channel_scale = gl.load(channel_scale + row * D + each)
    ones = gl.allocate_shared_memory(gl.bfloat16, (T, 16), gl.NVMMASharedLayout(32, 16, 2), gl.full(
        (T, 16), 1.0, gl.bfloat16, gl.BlockedLayout([1, 8], [16, 2], [WARPS, 1], [1, 0])))
    factors = gl.allocate_shared_memory(gl.float32, (STAGES + 1, D), gl.SwizzledSharedLayout(1, 1, 1, [0]))
    for stage in gl.static_range(STAGES):
        table, part = _hold(loaded[stage][0], loaded[stage][1], count, C, D, WARPS)
        tables, parts = tables + (table,), parts + (part,)
        factors.index(stage).store(-loaded[stage][2].to(gl.float32))
    factors.index(STAGES).store(1.0 / channel_scale.to(gl.float32))
    fence_async_shared()
    _barrier()

    for first in range(0, last + 1, T):
        token = first + local
        # tokens behind the last are that token again
        y = gl.load(x + (gl.minimum(token, last)[:, None] * x_token + channel))
        # 0, which keeps what is read there from being taken out of the loop into registers that are not there
        again = gl.inline_asm_elementwise("mov.b32 $0, 0;", "=r", args=[], dtype=gl.int32, is_pure=False, pack=1)
        for stage in gl.static_range(STAGES):
            chosen = _nearest(y, ones, tables[stage], parts[stage], upper, C, N)
            gl.store(ids + rows.to(gl.int64) * tokens * stage + token, chosen.to(gl.uint8), mask=token <= last)
            code = gl.load(codes + (stage * rows + row) * count * D + (chosen[:, None] * D + channel))
            unit = _factor(factors.index(stage + again), D, WARPS, L)
            if stage < STAGES - 1:
                y = _left(y, code, unit)
            else:
                y = _left_at_last(y, code, unit)
        # adding 0 makes zeros of negative zeros, which have the sign bit of numbers below zero
        o = _octets(y * _factor(factors.index(STAGES + again), D, WARPS, L) + 0.0, T, D)
        OCTET: gl.constexpr = o[0].type.layout
        # here are registers for it
        _prefetch(x, x_token, first + T, last, T, D)
        power = gl.reshape(_power(o), (T, GROUPS, OCTETS // GROUPS))
        rms = gl.sqrt(gl.sum(power, axis=2) / (D // GROUPS))
        R: gl.constexpr = rms.type.layout
        at = gl.convert_layout(token, gl.SliceLayout(1, R))[:, None]
        gl.store(roots + begin * GROUPS + (at * GROUPS + gl.arange(0, GROUPS, layout=gl.SliceLayout(0, R))[None, :]), rms, mask=at <= last)
        scale = _round_to_e4m3(rms)
        scale = gl.where(scale > 0, scale, 1.0)
        scale = gl.expand_dims(scale, 2) + gl.full((T, GROUPS, OCTETS // GROUPS), 0.0, gl.float32, power.type.layout)
        scale = gl.convert_layout(gl.reshape(scale, (T, OCTETS)), OCTET)
        border = scale * (b0 if BITS == 2 else b1 if BITS == 3 else b3)
        p0, p1, p2, p3 = _signs(o, scale, border, b0, b1, b2, b4, b5, b6, BITS)
        at = gl.convert_layout(token, gl.SliceLayout(1, OCTET))[:, None]
        inside = at * OCTETS + gl.arange(0, OCTETS, layout=gl.SliceLayout(0, OCTET))[None, :]
        gl.store(plane0 + inside, (p0 ^ 255).to(gl.uint8), mask=at <= last)
        if BITS > 1:
            gl.store(plane1 + inside, (p1 ^ 255).to(gl.uint8), mask=at <= last)
        if BITS > 2:
            gl.store(plane2 + inside, (p2 ^ 255).to(gl.uint8), mask=at <= last)
        if BITS > 3:
            gl.store(plane3 + inside, (p3 ^ 255).to(gl.uint8), mask=at <= last)

    arrived += side * gl.num_programs(1) + row
    _barrier()
    if gl.atomic_add(arrived, 1, sem="acq_rel") == gl.num_programs(0) - 1:
        scales, exponents = gl.where(side == 0, scales, other_scales), gl.where(side == 0, exponents, other_exponents)
        total = tokens * GROUPS
        scales += row * total
        spot = gl.arange(0, AT_ONCE, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
        # mostly these are all, and not read again
        root = gl.load(roots + spot, mask=spot < total, other=0.0, cache_modifier=".cg")
        largest = root
        for start in range(AT_ONCE, total, AT_ONCE):
            largest = gl.maximum(largest, gl.load(roots + start + spot, mask=start + spot < total, other=0.0, cache_modifier=".cg"))
        exponent = _shared_exponent(gl.max(largest, axis=0))
        gl.store(exponents + row, exponent.to(gl.int8))
        gl.store(scales + spot, _float32_to_e4m3(root * _power_of_two(-exponent)), mask=spot < total)
        for start in range(AT_ONCE, total, AT_ONCE):
            root = gl.load(roots + start + spot, mask=start + spot < total, other=0.0, cache_modifier=".cg")
            gl.store(scales + start + spot, _float32_to_e4m3(root * _power_of_two(-exponent)), mask=start + spot < total)
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
        # a thread has two tokens: a quarter of their channels and of the scores of `width` centroids. With 128 registers Triton 3.6 to 3.8
        # lack up to 18 for what does not change from tile to tile, 3.5 and 3.9 none; to read those from memory was measured to cost nothing
        small = dim <= 128 and block <= 128 and bits <= 2
        cut = Cut(256, block, min(block, 128), 128) if small else Cut(128, block, min(block, 128), None)
        shared = 2 * (stages * block * (dim + 16) + 16 * cut.tokens) + 4 * dim * (stages + 1) + RESERVED_BYTES
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
    arrived = _arrived(x.device, torch.cuda.current_stream(x.device).cuda_stream, sides * rows)
    share = share_of(tokens, sides * rows, cut.tokens, torch.cuda.get_device_properties(x.device).multi_processor_count)
    # within a program's share 32 bits count the numbers
    share = min(share, (2**31 - 1) // max(1, x.stride(0)))
    pair = first, spans[-1]
    encode_kernel[(triton.cdiv(tokens, share), rows, sides)](
        xs[0], xs[-1], *(span.codebook.centroids for span in pair), *(span.codebook.centroid_scale for span in pair),
        *(span.codebook.channel_scale for span in pair), *(span.ids for span in pair), roots, arrived,
        *borders_and_planes(spans),
        *(span.scales for span in pair), *(span.exponents for span in pair),
        tokens, rows, first.codebook.centroids.shape[2], share, -256, x.stride(0), x.stride(1),
        STAGES=first.codebook.stages, GROUPS=groups, BITS=first.bits, D=dim, C=cut.block, N=cut.width, T=cut.tokens, AT_ONCE=SCALES,
        num_warps=cut.warps, maxnreg=cut.registers)
