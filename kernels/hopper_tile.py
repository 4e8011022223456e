"""A tile of tokens on Hopper: loading, quantizing residuals to planes, storing, and the scales of a finished row; see `hopper`."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from . import octets, quantize, tiles
from .hopper_layouts import channels_of, quarter_layout
from .hopper_pairs import fma_pairs, pair_of, power_of_pairs, sign_byte

# functions that the kernel for any GPU has, compiled as Gluon
_octets, _round_to_e4m3, _power_of_two = (
    gluon.jit(function.fn) for function in (octets.octets, tiles.round_to_e4m3, tiles.power_of_two))
_power, _plane_bytes, _shared_exponent, _scale_to_e4m3 = (
    gluon.jit(function.fn) for function in (quantize.power, quantize.plane_bytes, quantize.shared_exponent, quantize.scale_to_e4m3))


@gluon.jit
def load_tokens(x, x_token, token, last, word):
    """Pairs of bf16 [T, D / 2]; past the end the last token again. Tokens are evicted first, so that centroids stay in the cache."""
    return gl.load((x + gl.minimum(token, last) * x_token)[:, None] + word[None, :], eviction_policy="evict_first")


@gluon.jit
def prefetch_tokens(x, x_token, token, last, T: gl.constexpr, D: gl.constexpr):
    """Bring tokens into the L2 cache."""
    layout: gl.constexpr = quarter_layout(T)
    quarter = gl.arange(0, 4, layout=gl.SliceLayout(0, layout)) * (D // 8)
    start = (x + gl.convert_layout(gl.minimum(token, last), gl.SliceLayout(1, layout)) * x_token)[:, None] + quarter[None, :]
    gl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", args=[start.to(gl.int64)], dtype=gl.int32, is_pure=False,
                              pack=1)


@gluon.jit
def store_tile(pointer, first, x, local, last):
    """[T, width] to rows `first + local` of a tensor of that width, up to `local == last`. Offsets that are constants come last."""
    at = gl.convert_layout(local, gl.SliceLayout(1, x.type.layout))[:, None]
    column = gl.arange(0, x.shape[1], layout=gl.SliceLayout(0, x.type.layout))[None, :]
    gl.store(pointer + first * x.shape[1] + (at * x.shape[1] + column), x.to(pointer.dtype.element_ty), mask=at <= last)


@gluon.jit
def channel_factors(channel_scale, D: gl.constexpr, BITS: gl.constexpr, WARPS: gl.constexpr):
    """Reciprocals of the channel scales in shared memory, as `quantize_tile` takes them: float32 [1, D], up to two planes pairs of bf16
    [1, D / 2]."""
    each = gl.arange(0, D, layout=gl.BlockedLayout([2], [32], [WARPS], [0]))
    inverse = 1.0 / gl.load(channel_scale + each).to(gl.float32)
    if BITS > 2:
        factor = gl.allocate_shared_memory(gl.float32, (1, D), gl.SwizzledSharedLayout(1, 1, 1, [0]))
        factor.index(0).store(inverse)
    else:
        factor = gl.allocate_shared_memory(gl.int32, (1, D // 2), gl.SwizzledSharedLayout(1, 1, 1, [0]))
        low, high = gl.split(gl.reshape(inverse, (D // 2, 2)))
        factor.index(0).store(pair_of(low, high))
    return factor


@gluon.jit
def quantize_tile(y, factor, b0, b1, b2, b3, b4, b5, b6, GROUPS: gl.constexpr, BITS: gl.constexpr):
    """Residuals, pairs of bf16 [T, D / 2] -> root mean squares float32 [T, GROUPS], bytes of planes int32 [T, D / 8] each.

    factor: see `channel_factors`. b0 to b6: borders of the quantizer's cells.
    """
    T: gl.constexpr = y.shape[0]
    OCTETS: gl.constexpr = y.shape[1] // 4
    # adding 0 turns -0 into 0, whose sign bit is that of a value that is not negative
    if BITS > 2:
        z = channels_of(y, T, 8 * OCTETS).to(gl.float32)
        o = _octets(z * factor.load(gl.SliceLayout(0, z.type.layout))[None, :] + 0.0, T, 8 * OCTETS)
        power = _power(o)
    else:
        none = gl.zeros_like(y)
        even, odd = gl.split(gl.reshape(fma_pairs(y, factor.load(gl.SliceLayout(0, y.type.layout))[None, :] + none, none),
                                        (T, OCTETS, 2, 2)))
        w0, w2 = gl.split(even)
        w1, w3 = gl.split(odd)
        power = power_of_pairs(w0, w1, w2, w3)
    OCTET: gl.constexpr = power.type.layout
    power = gl.reshape(power, (T, GROUPS, OCTETS // GROUPS))
    rms = gl.sqrt(gl.sum(power, axis=2) / (8 * OCTETS // GROUPS))
    scale = _round_to_e4m3(rms)
    scale = gl.where(scale > 0, scale, 1.0)
    scale = gl.expand_dims(scale, 2) + gl.full((T, GROUPS, OCTETS // GROUPS), 0.0, gl.float32, power.type.layout)
    scale = gl.convert_layout(gl.reshape(scale, (T, OCTETS)), OCTET)
    border = scale * (b0 if BITS == 2 else b1 if BITS == 3 else b3)
    if BITS > 2:
        bytes = _plane_bytes(o, scale, border, b0, b1, b2, b4, b5, b6, BITS)
    elif BITS == 2:
        # x * x - border * border has the sign of |x| - border
        square = -border * border
        square = pair_of(square, square)
        bytes = (sign_byte(w0, w1, w2, w3), sign_byte(fma_pairs(w0, w0, square), fma_pairs(w1, w1, square), fma_pairs(w2, w2, square),
                                                      fma_pairs(w3, w3, square)))
    else:
        bytes = (sign_byte(w0, w1, w2, w3),)
    return rms, bytes


@gluon.jit
def _finite(root):
    """Scales, 0 in place of non-finite ones."""
    return gl.where(root < float("inf"), root, 0.0)


@gluon.jit
def store_scales(roots, scales, exponents, row, total, AT_ONCE: gl.constexpr, WARPS: gl.constexpr):
    """Scales float32 [total] of a row to E4M3 bytes under one power of two, AT_ONCE at a time."""
    spot = gl.arange(0, AT_ONCE, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    # usually these are all of them, and are not loaded again
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
