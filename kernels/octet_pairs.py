"""An octet of channels as four pairs of float16, which `decode` uses for a bf16 workspace; arithmetic on pairs is in `halves`.

float16 has enough bits but little range. So the factors of an octet are scaled by a power of two that bounds every sum, which is undone
when values are stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .halves import bfloat16_pair, e4m3_octet_pairs, e4m3_pair, fma, pair, rotate_pair, times, unpair
from .octets import bfloat16_octet
from .tiles import power_of_two


@triton.jit
def factors_of(channel_scale, centroid_scale, stage, unit, STAGES: tl.constexpr, NVIDIA: tl.constexpr, NATIVE_E4M3: tl.constexpr):
    """Factors that dequantize an octet in float16: its channel scales times `unit`, and the centroid units of every stage, as pairs and
    scaled down by a power of two so that sums stay in range; and the power that undoes this."""
    channels, units, found = bfloat16_octet(channel_scale), (), ()
    # an upper bound of a token's values: codes of scales and centroids are at most 448, and levels are below 4
    largest = _largest(channels) * (unit * 1792.0)
    for n in tl.static_range(STAGES):
        units = units + (bfloat16_octet(centroid_scale + n * stage),)
        largest += _largest(units[n]) * 448.0
    # at most 2^15 after scaling
    exponent = tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 15)
    down, up = power_of_two(141 - exponent), power_of_two(exponent - 141)
    down *= 1.0 if NATIVE_E4M3 else 256.0
    for n in tl.static_range(STAGES):
        found = found + (_four_pairs(units[n], down, NVIDIA),)
    if NVIDIA:
        word = up.to(tl.int32, bitcast=True)
        up = word | (word >> 16)
    return _four_pairs(channels, unit * down, NVIDIA), found, up


@triton.jit
def _largest(x):
    return tl.maximum(tl.maximum(tl.maximum(x[0], x[1]), tl.maximum(x[2], x[3])),
                      tl.maximum(tl.maximum(x[4], x[5]), tl.maximum(x[6], x[7])))


@triton.jit
def _four_pairs(x, factor, NVIDIA: tl.constexpr):
    return (pair(x[0] * factor, x[1] * factor, NVIDIA), pair(x[2] * factor, x[3] * factor, NVIDIA),
            pair(x[4] * factor, x[5] * factor, NVIDIA), pair(x[6] * factor, x[7] * factor, NVIDIA))


@triton.jit
def dequantize_pairs(bits, code, words, sizes, factors, BITS: tl.constexpr, STAGES: tl.constexpr,
                     NVIDIA: tl.constexpr, NATIVE_E4M3: tl.constexpr):
    """An octet as four pairs, from its planes, the code of its scale, and its centroids: eight codes of each stage, int64.

    sizes: the quantizer levels as coefficients of a polynomial in the bits after the sign, where a set bit has the value 2.
    """
    scale = e4m3_pair(code.to(tl.int32) * 0x0101, NATIVE_E4M3)
    if not NATIVE_E4M3:
        # the conversion does not handle NaN
        scale = tl.where(code == 0x7F, 0x7E007E00, scale)
    m = ()
    for n in tl.static_range(1 << (BITS - 1)):
        m = m + (times(sizes[n], scale, NVIDIA),)
    x = ()
    for p in tl.static_range(4):
        x = x + (_levels(bits[0] << (14 - 2 * p), bits[1] << (14 - 2 * p), m, BITS, NVIDIA),)
    if STAGES == 0:
        x = _times(x, factors[0], NVIDIA)
    else:
        y = _times(e4m3_octet_pairs(words[0], NATIVE_E4M3), factors[1][0], NVIDIA)
        for n in tl.static_range(1, STAGES):
            y = _fma(e4m3_octet_pairs(words[n], NATIVE_E4M3), factors[1][n], y, NVIDIA)
        x = _fma(x, factors[0], y, NVIDIA)
    return x


@triton.jit
def _levels(first, second, m, BITS: tl.constexpr, NVIDIA: tl.constexpr):
    """Signed levels of two channels, from words in which they have the bits 14 and 15, and 30 and 31. Bit 14 alone is the float16 2."""
    x = m[0]
    if BITS > 1:
        b = first & 0x40004000
        x = fma(b, m[1], m[0], NVIDIA)
    if BITS > 2:
        c = second & 0x40004000
        x = fma(c, fma(b, m[3], m[2], NVIDIA), x, NVIDIA)
    if BITS > 3:
        d = (second >> 1) & 0x40004000
        x = fma(d, fma(c, fma(b, m[7], m[6], NVIDIA), fma(b, m[5], m[4], NVIDIA), NVIDIA), x, NVIDIA)
    # a set bit of plane 0 means not negative
    return x ^ (~first & -0x7FFF8000)


@triton.jit
def _times(a, b, NVIDIA: tl.constexpr):
    return times(a[0], b[0], NVIDIA), times(a[1], b[1], NVIDIA), times(a[2], b[2], NVIDIA), times(a[3], b[3], NVIDIA)


@triton.jit
def _fma(a, b, c, NVIDIA: tl.constexpr):
    return (fma(a[0], b[0], c[0], NVIDIA), fma(a[1], b[1], c[1], NVIDIA),
            fma(a[2], b[2], c[2], NVIDIA), fma(a[3], b[3], c[3], NVIDIA))


@triton.jit
def rotate_pairs(x, left, right, NVIDIA: tl.constexpr):
    """RoPE on the four pairs of an octet. left, right: int64, two angles each as (cos, sin) in float16."""
    return (rotate_pair(x[0], left.to(tl.int32), NVIDIA), rotate_pair(x[1], (left >> 32).to(tl.int32), NVIDIA),
            rotate_pair(x[2], right.to(tl.int32), NVIDIA), rotate_pair(x[3], (right >> 32).to(tl.int32), NVIDIA))


@triton.jit
def octet_of(x, factor):
    """Four pairs as eight float32 times a factor (other GPUs than NVIDIA's)."""
    a, b = unpair(x[0], False)
    c, d = unpair(x[1], False)
    e, f = unpair(x[2], False)
    g, h = unpair(x[3], False)
    return a * factor, b * factor, c * factor, d * factor, e * factor, f * factor, g * factor, h * factor


@triton.jit
def words_of(x, factor, ROWS: tl.constexpr, D: tl.constexpr):
    """Four pairs times a power of two as words of bf16 [ROWS, D / 2] (NVIDIA only). factor: the power, twice as bf16 in a word."""
    w0, w1, w2, w3 = bfloat16_pair(x[0], factor), bfloat16_pair(x[1], factor), bfloat16_pair(x[2], factor), bfloat16_pair(x[3], factor)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (ROWS, D // 2))
