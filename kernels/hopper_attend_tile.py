"""A tile of keys on Hopper: logits, weights in E4M3, products with values; see `hopper_attend`."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma

from ..qvg.attention import fast

# keys that share a scale
TILE = gl.constexpr(fast.TILE)
INT8, TINY = gl.constexpr(fast.INT8), gl.constexpr(fast.TINY)
# logarithm of 448, the largest E4M3, which the largest weight of a row becomes
SHIFT = gl.constexpr(8.807354922057604)
# a float32 of this size has no bits for a fraction, and its lowest bits are an integer
WHOLE, WHOLE_BITS = gl.constexpr(12582912.0), gl.constexpr(0x4B400000)
LN2 = gl.constexpr(0.6931471805599453)


@gluon.constexpr_function
def products_layout(columns):
    """Of the product of a warp group, 64 rows."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 32])


@gluon.jit
def exp2(x):
    """Without the instructions that results below 2 ** -126 would take."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", args=[x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def fma(x, y, z):
    """x * y + z, one instruction whatever the compiler's default is."""
    x, y = gl.broadcast(x, y)
    x, z = gl.broadcast(x, z)
    return gl.fma(x, y, z)


@gluon.jit
def prepare_queries(q, q_token, first, queries, mean, scale, query, R: gl.constexpr, D: gl.constexpr):
    """Write queries, int8 [R, D], to shared memory. Returns what 1 of a logit is worth before the scale of its key, as a power of two, and
    the product with the mean of the keys, both [R]."""
    L: gl.constexpr = gl.BlockedLayout([1, 16], [512 // D, D // 16], [4, 1], [1, 0])
    V: gl.constexpr = gl.SliceLayout(1, products_layout(D))
    line = gl.minimum(first + gl.arange(0, R, layout=gl.SliceLayout(1, L)), queries - 1)
    channel = gl.arange(0, D, layout=gl.SliceLayout(0, L))
    x = gl.load(q + (line.to(gl.int64) * q_token)[:, None] + channel[None, :]).to(gl.float32)
    of_mean = gl.sum(x * gl.load(mean + channel)[None, :], axis=1) * scale
    # infinite where x is NaN, which a maximum would pass over
    most = gl.maximum(gl.max(gl.where(x == x, gl.abs(x), float("inf")), axis=1), TINY)
    query.store((x * (INT8 / most)[:, None] + WHOLE).to(gl.int32, bitcast=True).to(gl.int8))
    unit = gl.where(most < float("inf"), most / INT8, float("nan")) * (scale / LN2)
    return gl.convert_layout(unit, V), gl.convert_layout(of_mean, V)


@gluon.jit
def wait_for(full, tile, STAGES: gl.constexpr):
    """Wait until the tile of this number is in shared memory."""
    mbarrier.wait(full.index(tile % STAGES), tile // STAGES & 1)


@gluon.jit
def logits_of(query, keys, tile, N: gl.constexpr, STAGES: gl.constexpr):
    """Starts the product of queries and keys, int32 [R, N]."""
    D: gl.constexpr = query.shape[1]
    held = keys.index(tile % STAGES).reshape((N, D)).permute((1, 0))
    return warpgroup_mma(query, held, gl.full((query.shape[0], N), 0, gl.int32, products_layout(N)), use_acc=False, is_async=True)


@gluon.jit
def product_of(words, values, tile, N: gl.constexpr, STAGES: gl.constexpr):
    """Starts the product of weights, as `words_of` returns them, and values, float32 [R, D], from zero."""
    R: gl.constexpr = words.shape[0]
    D: gl.constexpr = values.shape[1]
    # the operand is the registers of the words, whose four bytes are elements side by side
    two = gl.join(words, words)
    four = gl.convert_layout(gl.reshape(gl.join(two, two), (R, N)), gl.DotOperandLayout(0, products_layout(D), 4), assert_trivial=True)
    weights = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r,r,r", args=[four], dtype=gl.float8e4nv, is_pure=True, pack=4)
    held = values.index(tile % STAGES).permute((1, 0))
    return warpgroup_mma(weights, held, gl.full((R, D), 0.0, gl.float32, products_layout(D)), use_acc=False, is_async=True)


@gluon.jit
def _by_thread(x, N: gl.constexpr):
    """[R, N] -> [R, tiles, 4, 8, 2] without an exchange: the four threads that share a row, their octets of columns and pairs."""
    return gl.permute(gl.reshape(x, (x.shape[0], N // TILE, TILE // 8, 4, 2)), (0, 1, 3, 2, 4))


@gluon.jit
def _everywhere(x):
    """[R, tiles] to the axes of `_by_thread`."""
    return gl.expand_dims(gl.expand_dims(gl.expand_dims(x, 2), 3), 4)


@gluon.jit
def weights_of(logits, unit, scales, most, left, N: gl.constexpr, FIRST: gl.constexpr):
    """Weights of a tile, at most 448, as `_by_thread` orders them, and the largest logit of a row so far [R].

    logits: int32 [R, N] in units of `unit` [R] times `scales` [N / TILE]. most: the largest logit before. FIRST: there was none, and only
    the first `left` keys exist.
    """
    x = _by_thread(logits, N)
    F: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, gl.SliceLayout(4, x.type.layout)))
    factor = gl.convert_layout(unit, gl.SliceLayout(1, F))[:, None] * gl.convert_layout(scales, gl.SliceLayout(0, F))[None, :]
    if FIRST:
        column = gl.arange(0, N, layout=gl.SliceLayout(0, logits.type.layout))
        # of columns in the order in which keys lie in shared memory
        key = (column & -16) | ((column & 6) << 1) | ((column & 8) >> 2) | (column & 1)
        exists = _by_thread((key < left)[None, :] & (gl.zeros_like(logits) == 0), N)
        x = gl.where(exists, x.to(gl.float32) * _everywhere(factor), float("-inf"))
        largest = gl.max(gl.max(x, axis=4), axis=3)
    else:
        largest = gl.max(gl.max(x, axis=4), axis=3).to(gl.float32) * gl.expand_dims(factor, 2)
    largest = gl.convert_layout(gl.max(gl.max(largest, axis=1), axis=1), unit.type.layout)
    if not FIRST:
        largest = gl.maximum(largest, most)
    shift = gl.expand_dims(gl.convert_layout(SHIFT - largest, gl.SliceLayout(1, F)), 1)
    if FIRST:
        return exp2(x + _everywhere(shift)), largest
    # an addition converts to float32 faster than an instruction that converts, and the exponent takes its error back
    x = (x + WHOLE_BITS).to(gl.float32, bitcast=True)
    shift = shift - factor * WHOLE
    return exp2(fma(x, _everywhere(factor), _everywhere(shift))), largest


@gluon.jit
def sums_of(weights):
    """Sums of a thread's weights [R, 4]."""
    return gl.sum(gl.sum(gl.sum(weights, axis=4), axis=3), axis=1)


@gluon.jit
def words_of(weights, N: gl.constexpr):
    """Weights in the order of `_by_thread` in E4M3, those of four keys side by side in a word: int32 [R, N / 4].

    A thread's four columns of every 16 become neighbours. Keys lie in shared memory such that these are the weights of neighbouring keys.
    """
    R: gl.constexpr = weights.shape[0]
    pairs = gl.permute(gl.reshape(weights, (R, N // TILE, 4, TILE // 16, 2, 2)), (0, 1, 3, 2, 5, 4))
    low, high = gl.split(pairs)
    a, b = gl.split(low)
    c, d = gl.split(high)
    words = gl.inline_asm_elementwise(
        "{ .reg .b16 l, h; cvt.rn.satfinite.e4m3x2.f32 l, $2, $1; cvt.rn.satfinite.e4m3x2.f32 h, $4, $3; mov.b32 $0, {l, h}; }",
        "=r,f,f,f,f", args=[a, b, c, d], dtype=gl.int32, is_pure=True, pack=1)
    return gl.reshape(words, (R, N // 4))


@gluon.jit
def add_product(total, factor, product):
    """total * factor + product; factor [R] of any layout."""
    return fma(total, gl.convert_layout(factor, gl.SliceLayout(1, total.type.layout))[:, None], product)
