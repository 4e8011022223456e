"""The nearest centroid of every token of a tile on Hopper's matrix units; see `hopper`.

The centroids of every stage are in shared memory as the operand of a product, and in global memory, in practice in the first cache, where
they are gathered to be subtracted. Warp groups (four warps) take turns at the matrix units, enforced by named barriers: one multiplies
while others look for their best scores. Without that all multiply at the same time, and then all search.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from .hopper_layouts import as_operand, channels_of, parts_layout, word_offset
from .hopper_pairs import pair_of


@gluon.jit
def load_centroids(codes, units, index, count, LAYOUT: gl.constexpr, START: gl.constexpr, N: gl.constexpr, D: gl.constexpr):
    """E4M3 codes [N, D] of a row and stage from centroid START on, and their channel units [D]."""
    centroid = START + gl.arange(0, N, layout=gl.SliceLayout(1, LAYOUT))
    channel = gl.arange(0, D, layout=gl.SliceLayout(0, LAYOUT))
    code = gl.load(codes + (index * count + centroid)[:, None] * D + channel[None, :], mask=(centroid < count)[:, None], other=0)
    return code, gl.load(units + index * D + channel)


@gluon.jit
def prepare_centroids(loaded, table, parts, left, WARPS: gl.constexpr):
    """Write what `load_centroids` returned, of which `left` rows are centroids, to shared memory as operands of products; returns the
    centroids as pairs of bf16 [N, D / 2].

    table: bf16 [N, D]. parts: bf16 [N, 16], half their squared norms, negative, in three parts; a product with ones adds them to the
    scores.
    """
    code, unit = loaded
    N: gl.constexpr = code.shape[0]
    D: gl.constexpr = code.shape[1]
    centroid = gl.arange(0, N, layout=gl.SliceLayout(1, code.type.layout))
    values = code.to(gl.float8e4nv, bitcast=True).to(gl.float32) * unit.to(gl.float32)[None, :]
    rest = gl.where(centroid < left, -0.5 * gl.sum(values * values, axis=1), -3e38)
    low, high = gl.split(gl.reshape(values, (N, D // 2, 2)))
    pairs = pair_of(low, high)
    table.store(as_operand(channels_of(pairs, N, D), N, D))
    layout: gl.constexpr = parts_layout(WARPS, N, D)
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
def store_centroids(words, pairs):
    """Centroids, pairs of bf16 [C, D / 2], to global memory in the order of `word_offset`."""
    C: gl.constexpr = pairs.shape[0]
    WIDTH: gl.constexpr = pairs.shape[1]
    centroid = gl.arange(0, C, layout=gl.SliceLayout(1, pairs.type.layout))[:, None]
    word = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, pairs.type.layout))
    gl.store(words + (centroid * WIDTH + word_offset(word, 2 * WIDTH)[None, :]), pairs)


@gluon.jit
def wait_for_turn():
    """Wait until this warp group may start a product."""
    gl.inline_asm_elementwise("{ .reg .u32 t; mov.u32 t, %tid.x; shr.u32 t, t, 7; add.u32 t, t, 1; bar.sync t, 256; mov.u32 $0, 0; }",
                              "=r", args=[], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def pass_turn(WARPS: gl.constexpr):
    """Let the next warp group start; after the last comes the first."""
    gl.inline_asm_elementwise(
        "{ .reg .u32 t; mov.u32 t, %tid.x; shr.u32 t, t, 7; add.u32 t, t, 1; and.b32 t, t, $1; add.u32 t, t, 1; bar.arrive t, 256;"
        " mov.u32 $0, 0; }", "=r,n", args=[WARPS // 4 - 1], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def start_turns(WARPS: gl.constexpr):
    """The last warp group lets the first one start."""
    gl.inline_asm_elementwise(
        "{ .reg .u32 t; .reg .pred p; mov.u32 t, %tid.x; shr.u32 t, t, 7; setp.eq.u32 p, t, $1; @p bar.arrive 1, 256; mov.u32 $0, 0; }",
        "=r,n", args=[WARPS // 4 - 1], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _scores(x, ones, table, parts, START: gl.constexpr, N: gl.constexpr):
    """Scores [T, N] of tokens, pairs of bf16 [T, D / 2], with N centroids from START on. ones: [T, 16], which sums the parts of norms."""
    T: gl.constexpr = x.shape[0]
    D: gl.constexpr = 2 * x.shape[1]
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[T // 16, 1], instr_shape=[16, N, 16])
    operand = gl.convert_layout(as_operand(channels_of(x, T, D), T, D), gl.DotOperandLayout(operand_index=0, parent=MMA, k_width=2))
    wait_for_turn()
    score = warpgroup_mma(operand, table.slice(START, N, 0).permute((1, 0)), gl.full((T, N), 0.0, gl.float32, MMA), use_acc=False,
                          is_async=True)
    pass_turn(T // 16)
    # this waits for both. To wait for an earlier product, Triton 3.9 would add a barrier, which puts all groups at the same step
    return warpgroup_mma(ones, parts.slice(START, N, 0).permute((1, 0)), score)


@gluon.jit
def _best(score, upper, START: gl.constexpr):
    """The best four scores [T, 4], whose lowest bits are 255 minus the id; see `assign.nearest`."""
    T: gl.constexpr = score.shape[0]
    N: gl.constexpr = score.shape[1]
    # the compiler knows a column's index except bits 2 and 4, which are subtracted from the best of a thread's columns later
    centroid = gl.arange(0, N, layout=gl.SliceLayout(0, score.type.layout)) & -7
    # one instruction, where the compiler would use two
    bits = gl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r",
        args=[score.to(gl.int32, bitcast=True), upper, ((centroid + START) ^ 255)[None, :]], dtype=gl.int32, is_pure=True, pack=1)
    return gl.max(gl.max(gl.reshape(bits.to(gl.float32, bitcast=True), (T, N // 8, 4, 2)), axis=3), axis=1)


@gluon.jit
def _id(best, last, CLAMPS: gl.constexpr, LAYOUT: gl.constexpr):
    """Ids int32 [T] from the best four of `_best`. CLAMPS: at most `last`, because tokens with NaN have no best score."""
    best = best.to(gl.int32, bitcast=True) - 2 * gl.arange(0, 4, layout=gl.SliceLayout(0, best.type.layout))[None, :]
    best = gl.max(best.to(gl.float32, bitcast=True), axis=1).to(gl.int32, bitcast=True)
    return gl.convert_layout(gl.minimum(255 - (best & 255), last) if CLAMPS else 255 - (best & 255), gl.SliceLayout(1, LAYOUT))


@gluon.jit
def nearest(x, ones, table, parts, upper, last, C: gl.constexpr, N: gl.constexpr, CLAMPS: gl.constexpr, LAYOUT: gl.constexpr):
    """Ids int32 [T], at most `last`, of the nearest of C centroids, N at a time, of tokens as pairs of bf16 [T, D / 2]."""
    best = _best(_scores(x, ones, table, parts, 0, N), upper, 0)
    for block in gl.static_range(N, C, N):
        best = gl.maximum(best, _best(_scores(x, ones, table, parts, block, N), upper, block))
    return _id(best, last, CLAMPS, LAYOUT)
