"""`attend` for NVIDIA's Hopper and a history packed in E4M3. Reference: `qvg.attention.fast`.

One warp loads tiles of keys and values into a ring in shared memory. Three groups of four warps hold 64 queries each: one computes
exponentials while the products of another are under way. Two groups that keep two products under way each, in turns or not, were 6 % slower
on an H200 (benchmarks/RESULTS.md). Thread q of the four that share a row holds columns 2q, 2q + 1, 2q + 8 and
2q + 9 of every 16 of a product, and columns 4q to 4q + 3 of every 16 of an operand in eight bits. So keys are loaded in an order in which
the former are keys 4q to 4q + 3, and weights are operands in the registers in which they were computed.

Blocks of queries that would leave multiprocessors idle at the end are cut along the keys, and a small second launch joins their parts.

- `hopper_attend_tile`: the arithmetic of a tile
- `hopper_attend_join`: the second launch

Written in Gluon, which has int8 products and these descriptors in Triton 3.6 to 3.9; without it `attend` uses the kernel for any GPU.
Triton's interpreter cannot run it; `tests/ptx_machine.py` can.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..qvg.backends import Unsupported, before_launch
from .attend_pack import Packed
from .hopper import barrier
from .hopper_attend_join import join_kernel
from .hopper_attend_tile import (
    LN2,
    SHIFT,
    TILE,
    add_product,
    exp2,
    logits_of,
    prepare_queries,
    product_of,
    products_layout,
    sums_of,
    wait_for,
    weights_of,
    words_of,
)

# queries of a warp group, and groups
ROWS, GROUPS = gl.constexpr(64), gl.constexpr(3)
# registers of a thread that loads
FEW = gl.constexpr(24)
# tiles of keys that a program could multiply while it starts and ends; an estimate
START = 8
# parts that blocks are cut into at most, for every program that runs at the same time
PARTS = 2
# queries that a program joins
JOINED = 16

# renamed in Triton 3.7
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def _load(keys, values, ring, key_row, value_row, begin, tiles, N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    """What the loading warp does: keys of a tile and values of the one before, which groups free together. The last tile comes first,
    because it is the one that may have to be masked."""
    k_ring, v_ring, k_full, v_full, free = ring
    v_at = begin * N
    for tile in range(tiles + 1):
        stage, before = tile % STAGES, (tile + STAGES - 1) % STAGES
        k_at = (begin + gl.where(tile == 0, tiles, tile) - 1) * N
        mbarrier.wait(free.index(stage), tile // STAGES & 1 ^ 1)
        mbarrier.expect(k_full.index(stage), N * D, pred=tile < tiles)
        load_tile(keys, [(key_row + k_at) // 16, 0, 0, 0, 0], k_full.index(stage), k_ring.index(stage), pred=tile < tiles)
        mbarrier.expect(v_full.index(before), N * D, pred=tile > 0)
        load_tile(values, [value_row, v_at], v_full.index(before), v_ring.index(before), pred=tile > 0)
        v_at = k_at


@gluon.jit
def _attend(inputs, outputs, ring, query, first, queries, q_token, scale, begin, tiles, count, heads, is_part,
            N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    """What a warp group does."""
    q, mean, key_scales, value_scales = inputs
    k_ring, v_ring, k_full, v_full, free = ring
    unit, of_mean = prepare_queries(q, q_token, first, queries, mean, scale, query, ROWS, D)
    fence_async_shared()
    barrier()
    pair = gl.arange(0, N // TILE, layout=gl.BlockedLayout([N // TILE], [32], [4], [0]))
    last = begin + tiles - 1
    wait_for(k_full, 0, STAGES)
    logits = logits_of(query, k_ring, 0, N, STAGES)
    scales = gl.load(key_scales + last * (N // TILE) + pair)
    # a tile ahead, because everything would wait for the load
    following = gl.load(key_scales + begin * (N // TILE) + pair)
    logits = warpgroup_mma_wait(0, deps=[logits])
    mbarrier.arrive(free.index(0), count=1)
    weights, most = weights_of(logits, unit, scales, unit, count - last * N, N, True)
    size = sums_of(weights)
    words = words_of(weights, N)
    total = gl.full((ROWS, D), 0.0, gl.float32, products_layout(D))
    past = gl.full((ROWS,), 0.0, gl.float32, unit.type.layout)
    for tile in range(1, tiles):
        scales = following
        following = gl.load(key_scales + gl.minimum(begin + tile, last) * (N // TILE) + pair)
        wait_for(v_full, tile - 1, STAGES)
        product = product_of(words, v_ring, tile - 1, N, STAGES)
        total = add_product(total, past, warpgroup_mma_wait(0, deps=[product]))
        wait_for(k_full, tile, STAGES)
        logits = warpgroup_mma_wait(0, deps=[logits_of(query, k_ring, tile, N, STAGES)])
        mbarrier.arrive(free.index(tile % STAGES), count=1)
        weights, larger = weights_of(logits, unit, scales, most, 0, N, False)
        now_past = exp2(most - larger)
        size = add_product(size, now_past, sums_of(weights))
        words, past, most = words_of(weights, N), now_past, larger
    wait_for(v_full, tiles - 1, STAGES)
    product = warpgroup_mma_wait(0, deps=[product_of(words, v_ring, tiles - 1, N, STAGES)])
    _store(add_product(total, past, product), gl.sum(size, axis=1), most, of_mean, value_scales, outputs, first, queries, heads, is_part)


@gluon.jit
def _store(total, size, most, of_mean, value_scales, outputs, first, queries, heads, is_part):
    """Output and log-sum-exp of a warp group's queries, or of a part of the keys."""
    out, lse, parts, part_lse = outputs
    D: gl.constexpr = total.shape[1]
    V: gl.constexpr = gl.SliceLayout(1, total.type.layout)
    size = gl.convert_layout(size, V)
    local, channel = gl.arange(0, ROWS, layout=V), gl.arange(0, D, layout=gl.SliceLayout(0, total.type.layout))
    total = total * (1.0 / size)[:, None] * gl.load(value_scales + channel)[None, :]
    found = gl.convert_layout((most - SHIFT) * LN2 + of_mean, V) + gl.log(size)
    if is_part:
        gl.store(parts + (local * D)[:, None] + channel[None, :], total)
        gl.store(part_lse + local, found)
    else:
        line, mask = first + local, first + local < queries
        gl.store(out + (line * (heads * D))[:, None] + channel[None, :], total.to(out.dtype.element_ty), mask=mask[:, None])
        gl.store(lse + line * heads, found, mask=mask)


@gluon.jit
def _barriers(count, STAGES: gl.constexpr):
    """A barrier for every stage, which `count` threads reach."""
    barriers = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(barriers.index(stage), count=count)
    return barriers


@gluon.jit(do_not_specialize=["queries", "heads", "shared", "tokens", "whole", "pieces"])
def attend_kernel(
    keys, values, q, key_mean, key_scales, value_scales, out, lse, parts, part_lse,
    queries, heads, shared, tokens, row_stride, whole, pieces, q_batch, q_token, q_head, scale,
    N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):
    """Attention of queries [C * B, T, H, D] to `tokens` keys; batch entry b of q reads entry b % shared of the history.

    keys, values: descriptors of `describe`; row_stride: tokens of a row of them, with the padding. out and lse: [C * B, T, H, D] and
    [C * B, T, H], contiguous. The first `whole` blocks of 64 * GROUPS queries are of one program each; of the others each is of `pieces`
    programs, and parts [programs, 64 * GROUPS, D] and part_lse [programs, 64 * GROUPS], float32, are theirs. REGISTERS: of a thread of a
    group. Grid: (whole + pieces * other blocks,).
    """
    part = gl.program_id(0) - whole
    is_part = part >= 0
    piece = gl.where(is_part, part % pieces, 0)
    index = gl.where(is_part, whole + part // pieces, part + whole)
    blocks, all_tiles = (queries + GROUPS * ROWS - 1) // (GROUPS * ROWS), (tokens + N - 1) // N
    begin = gl.where(is_part, all_tiles * piece // pieces, 0)
    tiles = gl.where(is_part, all_tiles * (piece + 1) // pieces, all_tiles) - begin
    first = index % blocks * (GROUPS * ROWS)
    batch, head = index // blocks // heads, index // blocks % heads
    row = batch % shared * heads + head
    inputs = (q + batch.to(gl.int64) * q_batch + head.to(gl.int64) * q_head, key_mean + row * D,
              key_scales + row * (row_stride // TILE), value_scales + row * D)
    line = batch.to(gl.int64) * queries * heads + head
    outputs = (out + line * D, lse + line, parts + part.to(gl.int64) * (GROUPS * ROWS * D), part_lse + part.to(gl.int64) * (GROUPS * ROWS))
    ring = (gl.allocate_shared_memory(keys.dtype, [STAGES] + keys.block_shape, keys.layout),
            gl.allocate_shared_memory(values.dtype, [STAGES] + values.block_shape, values.layout),
            _barriers(1, STAGES), _barriers(1, STAGES), _barriers(GROUPS, STAGES))
    fence_async_shared()
    held: gl.constexpr = gl.NVMMASharedLayout(D, 8, 2)
    query = gl.allocate_shared_memory(gl.int8, [GROUPS, ROWS, D], held)
    second = (outputs[0], outputs[1], outputs[2] + ROWS * D, outputs[3] + ROWS)
    third = (outputs[0], outputs[1], outputs[2] + 2 * ROWS * D, outputs[3] + 2 * ROWS)
    gl.warp_specialize([
        (_attend, (inputs, outputs, ring, query.index(0), first, queries, q_token, scale, begin, tiles, tokens, heads, is_part,
                   N, D, STAGES)),
        (_attend, (inputs, second, ring, query.index(1), first + ROWS, queries, q_token, scale, begin, tiles, tokens, heads, is_part,
                   N, D, STAGES)),
        (_attend, (inputs, third, ring, query.index(2), first + 2 * ROWS, queries, q_token, scale, begin, tiles, tokens, heads, is_part,
                   N, D, STAGES)),
        (_load, (keys, values, ring, row * row_stride, row * D, begin, tiles, N, D, STAGES)),
    ], [4, 4, 1], [REGISTERS, REGISTERS, FEW])


@dataclass(frozen=True)
class Cut:
    """How a launch is cut. keys: of a tile. stages: tiles in the ring."""

    keys: int = 128
    stages: int = 3

    @property
    def queries(self) -> int:
        """Of a program."""
        return GROUPS.value * ROWS.value

    def constants(self, head_dim: int) -> dict[str, int]:
        """Of the kernel. Warps that load give registers to the groups."""
        return {"N": self.keys, "D": head_dim, "STAGES": self.stages, "REGISTERS": 160}

    @staticmethod
    def of(head_dim: int) -> Cut:
        if head_dim not in (64, 128):
            raise Unsupported(f"attention in eight bits on Hopper has heads of 64 or 128 channels, not {head_dim}")
        return Cut()


@lru_cache
def plan(blocks: int, tiles: int, places: int) -> tuple[int, int]:
    """(whole, pieces): the first `whole` blocks are of one program each, and each of the others is cut along its tiles of keys into
    `pieces`, such that the last program ends earliest. places: programs that run at the same time."""
    whole = blocks // places * places
    rest = blocks - whole

    def time(pieces: int) -> float:
        return -(-rest * pieces // places) * (-(-tiles // pieces) + START)

    pieces = min(range(1, max(1, min(tiles, PARTS * places // max(1, rest))) + 1), key=time)
    return (blocks, 1) if pieces == 1 else (whole, pieces)


def boxes(keys: int, head_dim: int) -> tuple[list[int], list[int]]:
    """Shapes of a tile of keys and of a tile of values, see `describe`."""
    return [keys // 16, 2, 4, 2, head_dim], [head_dim, keys]


def layouts(keys: int, head_dim: int) -> tuple[gl.NVMMASharedLayout, gl.NVMMASharedLayout]:
    """Of a tile of keys, in the order that the kernel wants, and of a tile of values."""
    return gl.NVMMASharedLayout(head_dim, 8, 5), gl.NVMMASharedLayout(keys, 8, 2)


def describe(packed: Packed, keys: int) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Descriptors of tiles of `keys` tokens of keys and values.

    16 keys are four quadruples of two pairs. Quadruples are the third axis here and the second in memory, so a tile holds the first pairs
    of all four and then the second ones.
    """
    batch, heads, padded, dim = packed.keys.shape
    lines = batch * heads
    strides = [16 * dim, 2 * dim, 4 * dim, dim, 1], [padded, 1]
    shapes = [lines * padded // 16, 2, 4, 2, dim], [lines * dim, padded]
    found = zip((packed.keys, packed.values), shapes, strides, boxes(keys, dim), layouts(keys, dim))
    return tuple(TensorDescriptor(*each) for each in found)


def attend_packed(q: Tensor, packed: Packed, cut: Cut | None = None) -> tuple[Tensor, Tensor]:
    """Attention of q [C * B, T, H, D], 16 bits, to a history of B entries packed in E4M3: the output, contiguous, in q's dtype and the
    log-sum-exp [C * B, T, H] float32."""
    entries, queries, heads, dim = q.shape
    cut = cut or Cut.of(dim)
    blocks = triton.cdiv(queries, cut.queries) * entries * heads
    places = torch.cuda.get_device_properties(q.device).multi_processor_count
    whole, pieces = plan(blocks, triton.cdiv(packed.tokens, cut.keys), places)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    parts, part_lse = lse, lse
    if whole < blocks:
        parts = torch.empty(blocks - whole, pieces, cut.queries, dim, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(parts.shape[:3], dtype=torch.float32, device=q.device)
    before_launch("attend", "on Hopper", dim, q.dtype, cut, q.device)
    attend_kernel[(whole + (blocks - whole) * pieces,)](
        *describe(packed, cut.keys), q, packed.key_mean, packed.key_scales, packed.value_scales, out, lse, parts, part_lse,
        queries, heads, len(packed.keys), packed.tokens, packed.keys.shape[2], whole, pieces, *q.stride()[:3], dim ** -0.5,
        **cut.constants(dim), num_warps=4)
    if whole < blocks:
        join_kernel[(blocks - whole, cut.queries // JOINED)](
            parts, part_lse, out, lse, queries, heads, whole, pieces, D=dim, ROWS=JOINED, BLOCK=cut.queries, num_warps=4)
    return out, lse
