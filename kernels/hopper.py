"""`encode` for NVIDIA's Hopper in one launch. Reference: `qvg.codec.qvg`.

Four threads hold a token from the first product to the last byte, 16 channels of every 64 each, as pairs of bf16. The loaded registers are
an operand of the matrix units as they are, because a product does not depend on the order of its channels; ids arrive in the threads that
hold the channels; and the residual is the next operand. So tokens never pass through shared memory. Each program prepares the centroids of
every stage once, for all tokens of its share.

- `hopper_layouts`: which thread holds what
- `hopper_pairs`: arithmetic on pairs of bf16
- `hopper_assign`: centroids, scores and ids
- `hopper_tile`: loads, planes, scales

A codebook's units are powers of two, so centroids are exact in bf16 and a subtraction rounds once. (Caches of earlier versions have other
units; their centroids are rounded.) A residual that rounding moves across a cell border is represented as well by either cell.

Written in Gluon, which Triton has in this form in 3.5 to 3.9; without it `encode` uses the kernel for any GPU. Triton's interpreter cannot
run it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from ..qvg.codec.qvg import PlaneSpan
from .encode import borders_and_planes
from .hopper_assign import load_centroids, nearest, prepare_centroids, start_turns, store_centroids
from .hopper_layouts import codebook_layout, word_layout, word_offset
from .hopper_pairs import copy_pairs, opaque_zero, subtract_pairs
from .hopper_tile import channel_factors, load_tokens, prefetch_tokens, quantize_tile, store_scales, store_tile

# of a program, and what the compiler may use of it to exchange data
SHARED_BYTES, RESERVED_BYTES = 232_448, 4096
# scales that the last program of a row processes together
SCALES = 8192
# tiles that a program could encode in the time that it prepares the centroids
START = 1.2

# renamed in Triton 3.7
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.jit
def _prepare_row(x, x_token, codes, units, channel_scale, words, rows, row, count, local, last, word, STAGES: gl.constexpr,
                 BITS: gl.constexpr, D: gl.constexpr, C: gl.constexpr, N: gl.constexpr, T: gl.constexpr):
    """What a program prepares for all tokens of its share: the centroids of every stage (`prepare_centroids`) and, in `words`, as pairs of
    bf16; `channel_factors`; ones that sum the parts of norms. Also loads the first tile of tokens."""
    WARPS: gl.constexpr = T // 16
    B: gl.constexpr = codebook_layout(WARPS, N, D)
    # where registers suffice, the centroids of all stages are loaded before the first are processed
    AHEAD: gl.constexpr = C == N and STAGES * C * D <= 4096 * WARPS
    loaded, tables, parts, pairs = (), (), (), ()
    if AHEAD:
        for stage in gl.static_range(STAGES):
            loaded = loaded + (load_centroids(codes, units, stage * rows + row, count, B, 0, C, D),)
    prefetch_tokens(x, x_token, local, last, T, D)
    factor = channel_factors(channel_scale + row * D, D, BITS, WARPS)
    ones = gl.allocate_shared_memory(gl.bfloat16, (T, 16), gl.NVMMASharedLayout(32, 16, 2), gl.full(
        (T, 16), 1.0, gl.bfloat16, gl.BlockedLayout([1, 8], [16, 2], [WARPS, 1], [1, 0])))
    for stage in gl.static_range(STAGES):
        table = gl.allocate_shared_memory(gl.bfloat16, (C, D), gl.NVMMASharedLayout(128, 16, 2))
        part = gl.allocate_shared_memory(gl.bfloat16, (C, 16), gl.NVMMASharedLayout(32, 16, 2))
        tables, parts = tables + (table,), parts + (part,)
        if AHEAD:
            pairs = pairs + (prepare_centroids(loaded[stage], table, part, count, WARPS),)
        else:
            for block in gl.static_range(0, C, N):
                codeword = load_centroids(codes, units, stage * rows + row, count, B, block, N, D)
                pair = prepare_centroids(codeword, table.slice(block, N, 0), part.slice(block, N, 0), count - block, WARPS)
                store_centroids(words + (stage * C + block) * (D // 2), pair)
        # after the loads of centroids, for which everything waits
        if stage == (0 if AHEAD else STAGES - 1):
            following = load_tokens(x, x_token, local, last, word)
    fence_async_shared()
    barrier()
    if AHEAD:
        # after the fence, which would wait for these stores
        for stage in gl.static_range(STAGES):
            store_centroids(words + stage * C * (D // 2), pairs[stage])
    return tables, parts, factor, ones, following


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
    roots float32 [tensors, rows, tokens, GROUPS]: scales before they are bytes, which requires the row's largest. The program that finishes
    a row last does that; arrived int32 [tensors, rows], zeros before and after, tells it. words int32 [tensors, rows, STAGES, C, D / 2]:
    scratch for the centroids as pairs of bf16, to which all programs of a row write the same. upper: -256, the bits of a score except the
    lowest eight; not a constant, because an instruction can hold only one, which is better spent on a column's index.
    Grid: (shares of tokens, rows, tensors).
    """
    OCTETS: gl.constexpr = D // 8
    WARPS: gl.constexpr = T // 16
    L: gl.constexpr = word_layout(T, D)
    row, side = gl.program_id(1).to(gl.int64), gl.program_id(2)
    begin = gl.program_id(0).to(gl.int64) * share
    last = gl.minimum(tokens - gl.program_id(0) * share, share) - 1
    x, ids = gl.where(side == 0, x, other_x), gl.where(side == 0, ids, other_ids)
    codes, units = gl.where(side == 0, codes, other_codes), gl.where(side == 0, units, other_units)
    channel_scale = gl.where(side == 0, channel_scale, other_channel_scale)
    planes = (gl.where(side == 0, plane0, other_plane0), gl.where(side == 0, plane1, other_plane1),
              gl.where(side == 0, plane2, other_plane2), gl.where(side == 0, plane3, other_plane3))
    x += row * x_row + begin * x_token
    ids += row * tokens + begin
    at = (row * tokens + begin) * OCTETS
    planes = (planes[0] + at, planes[1] + at, planes[2] + at, planes[3] + at)
    roots += (side * gl.num_programs(1) + row) * tokens * GROUPS
    words += (side * gl.num_programs(1) + row) * (STAGES * C * (D // 2))
    local = gl.arange(0, T, layout=gl.SliceLayout(1, L))
    word = gl.arange(0, D // 2, layout=gl.SliceLayout(0, L))
    x = x.to(gl.pointer_type(gl.int32))
    x_token //= 2

    tables, parts, factor, ones, following = _prepare_row(
        x, x_token, codes, units, channel_scale, words, rows, row, count, local, last, word, STAGES, BITS, D, C, N, T)
    barrier()
    prefetch_tokens(x, x_token, T + local, last, T, D)
    start_turns(WARPS)

    for first in range(0, last + 1, T):
        token = first + local
        y = copy_pairs(following)
        # keeps the loads of factors inside the loop; there are no registers for their results outside
        again = opaque_zero()
        for stage in gl.static_range(STAGES):
            selected = nearest(y, ones, tables[stage], parts[stage], upper, count - 1, C, N, CLAMPS, L)
            gl.store(ids + (rows.to(gl.int64) * tokens * stage + first) + local, selected.to(gl.uint8), mask=local <= last - first)
            y = subtract_pairs(y, gl.load(words + stage * C * (D // 2) + (selected[:, None] * (D // 2) + word_offset(word, D)[None, :])))
        if BITS <= 2:
            following = load_tokens(x, x_token, token + T, last, word)
        rms, bytes = quantize_tile(y, factor.index(again), b0, b1, b2, b3, b4, b5, b6, GROUPS, BITS)
        prefetch_tokens(x, x_token, token + 2 * T, last, T, D)
        store_tile(roots + begin * GROUPS, first, rms, local, last - first)
        for plane in gl.static_range(BITS):
            store_tile(planes[plane], first, bytes[plane], local, last - first)
        # with more planes there are no registers for it earlier
        if BITS > 2:
            following = load_tokens(x, x_token, token + T, last, word)

    arrived += side * gl.num_programs(1) + row
    barrier()
    if gl.atomic_add(arrived, 1, sem="acq_rel") == gl.num_programs(0) - 1:
        scales, exponents = gl.where(side == 0, scales, other_scales), gl.where(side == 0, exponents, other_exponents)
        total = tokens * GROUPS
        store_scales(roots, scales + row * total, exponents, row, total, AT_ONCE, WARPS)
        gl.store(arrived, 0)


@dataclass(frozen=True)
class Cut:
    """How a launch is cut. tokens: of a tile. block: centroids of a stage, padded. width: centroids multiplied at a time. registers: the
    limit that a thread has."""

    tokens: int
    block: int
    width: int
    registers: int | None

    @property
    def warps(self) -> int:
        return self.tokens // 16

    @staticmethod
    def of(bits: int, stages: int, count: int, dim: int) -> Cut | None:
        """None where there are no centroids, where those of all stages exceed shared memory, or where the rest exceeds the registers."""
        block = max(16, triton.next_power_of_2(count))
        # a thread holds a quarter of two tokens: of their channels, and of their scores with `width` centroids
        small = dim <= 128 and block <= 128 and bits <= 2
        cut = Cut(256, block, min(block, 128), 128) if small else Cut(128, block, min(block, 128), None)
        shared = 2 * (stages * block * (dim + 16) + 16 * cut.tokens) + 4 * dim + RESERVED_BYTES
        return cut if stages and shared <= SHARED_BYTES and (dim <= 128 or bits <= 2) else None


@lru_cache
def share_of(tokens: int, rows: int, tile: int, places: int) -> int:
    """Tokens of a program for which the last program ends earliest. places: programs that run at the same time."""
    def time(programs: int) -> float:
        return -(-rows * programs // places) * (-(-tokens // (programs * tile)) + START)

    return -(-tokens // min(range(1, -(-tokens // tile) + 1), key=time))


@lru_cache
def _arrived(device: torch.device, stream: int, rows: int) -> Tensor:
    """Zeros, which every launch restores. One tensor for each stream, because launches of different streams may overlap."""
    return torch.zeros(rows, dtype=torch.int32, device=device)


def launch(cut: Cut, spans: list[PlaneSpan], xs: list[Tensor]) -> None:
    """Encode one or two tensors [T, R, D] bf16 of the same shape and strides into the spans allocated for them."""
    x, first = xs[0], spans[0]
    tokens, rows, dim = x.shape
    groups, sides = first.scales.shape[2], len(xs)
    roots = torch.empty(sides, rows, tokens, groups, dtype=torch.float32, device=x.device)
    words = torch.empty(sides * rows, first.codebook.stages, cut.block, dim // 2, dtype=torch.int32, device=x.device)
    arrived = _arrived(x.device, torch.cuda.current_stream(x.device).cuda_stream, sides * rows)
    share = share_of(tokens, sides * rows, cut.tokens, torch.cuda.get_device_properties(x.device).multi_processor_count)
    # offsets within a program's share have 32 bits
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
