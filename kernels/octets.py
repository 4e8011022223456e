"""An octet is eight neighbouring channels of a token: one byte of a bit plane, one 16-byte store of bf16. A thread holds one.

The kernel that decodes keeps the eight channels as tiles of their own, [tokens, octets] each, so that nothing moves between threads and a
channel's bits are found by constants. For a bf16 workspace it keeps them as four pairs of float16, of which `halves` tells.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .halves import bfloat16_pair, e4m3_pair, e4m3_pairs, fma, pair, times, turn_pair, unpair
from .tiles import power_of_two


@triton.jit
def octets(x, ROWS: tl.constexpr, D: tl.constexpr):
    """[ROWS, D] as eight tiles [ROWS, D / 8]: the first channels of all octets, the second ones, and so on."""
    low, high = tl.split(tl.reshape(x, (ROWS, D // 8, 4, 2)))
    x02, x13 = tl.split(tl.reshape(low, (ROWS, D // 8, 2, 2)))
    x46, x57 = tl.split(tl.reshape(high, (ROWS, D // 8, 2, 2)))
    x0, x4 = tl.split(x02)
    x2, x6 = tl.split(x13)
    x1, x5 = tl.split(x46)
    x3, x7 = tl.split(x57)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def tile_of(x, ROWS: tl.constexpr, D: tl.constexpr):
    """What `octets` took apart."""
    even = tl.join(tl.join(x[0], x[4]), tl.join(x[2], x[6]))
    odd = tl.join(tl.join(x[1], x[5]), tl.join(x[3], x[7]))
    return tl.reshape(tl.join(even, odd), (ROWS, D))


@triton.jit
def float32_octet(pointers):
    """Eight neighbouring float32 numbers, which `pointers` begin."""
    return (tl.load(pointers), tl.load(pointers + 1), tl.load(pointers + 2), tl.load(pointers + 3),
            tl.load(pointers + 4), tl.load(pointers + 5), tl.load(pointers + 6), tl.load(pointers + 7))


@triton.jit
def bfloat16_octet(pointers):
    """Eight neighbouring bf16 numbers, which `pointers` to int64 begin, as float32."""
    low, high = tl.load(pointers), tl.load(pointers + 1)
    w0, w1, w2, w3 = low.to(tl.int32), (low >> 32).to(tl.int32), high.to(tl.int32), (high >> 32).to(tl.int32)
    return (_low(w0), _high(w0), _low(w1), _high(w1), _low(w2), _high(w2), _low(w3), _high(w3))


@triton.jit
def _low(word):
    return (word << 16).to(tl.float32, bitcast=True)


@triton.jit
def _high(word):
    return (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def fetch(local, octet, data, plane1, plane2, plane3, scales, ids, id_stage,
          BITS: tl.constexpr, STAGES: tl.constexpr, GROUPS: tl.constexpr, OCTETS: tl.constexpr, PARTS: tl.constexpr):
    """What is read of a tile's tokens before the centroids: planes and codes of the scales, of each of the PARTS that a token's octets are
    cut into, and ids of every stage. Planes come two to a word, as `_joined` says, the first two and those behind them."""
    bits, codes, chosen = (), (), ()
    for part in tl.static_range(PARTS):
        # constants come last, where the compiler makes them part of the instruction
        at = local * (OCTETS * PARTS) + octet
        sign = tl.load(data + at + part * OCTETS).to(tl.int32) * 0x10002
        first = _joined(sign, tl.load(plane1 + at + part * OCTETS)) if BITS > 1 else sign
        second = first
        if BITS > 2:
            upper = tl.load(plane3 + at + part * OCTETS).to(tl.int32) * 0x10002 if BITS > 3 else 0
            second = _joined(upper, tl.load(plane2 + at + part * OCTETS))
        bits = bits + ((first, second),)
        if part == 0 or GROUPS > 1:
            group = scales + local * GROUPS + part * GROUPS // PARTS
            code = tl.load(group)
            for more in tl.static_range(1, GROUPS // PARTS):
                code = tl.where(octet >= more * (OCTETS * PARTS // GROUPS), tl.load(group + more), code)
        codes = codes + (code,)
    for stage in tl.static_range(STAGES):
        chosen = chosen + (tl.load(ids + stage * id_stage + local),)
    return bits, codes, chosen


@triton.jit
def _joined(upper, byte):
    """Two planes of an octet as one word: of channel 2j the bits 2j + 1 and 2j, of channel 2j + 1 those 16 above. upper: 0x10002 times the
    byte of the plane that takes the upper bits. What else the factors leave lies where nobody looks."""
    return (upper & 0x00AA00AA) | (byte.to(tl.int32) * 0x8001 & ~0x00AA00AA)


@triton.jit
def e4m3_octet(codes, NATIVE: tl.constexpr):
    """Eight E4M3 codes, int64 -> eight float32 tiles, the lowest byte first. NATIVE: see `tiles.e4m3_to_float32`."""
    w = _codes(codes, NATIVE)
    a, b = unpair(w[0], NATIVE)
    c, d = unpair(w[1], NATIVE)
    e, f = unpair(w[2], NATIVE)
    g, h = unpair(w[3], NATIVE)
    if NATIVE:
        return a, b, c, d, e, f, g, h
    return a * 256.0, b * 256.0, c * 256.0, d * 256.0, e * 256.0, f * 256.0, g * 256.0, h * 256.0


@triton.jit
def _has(word, UPPER: tl.constexpr, CHANNEL: tl.constexpr):
    return (word & (1 << (UPPER + CHANNEL // 2 * 2 + CHANNEL % 2 * 16))) != 0


@triton.jit
def dequantize(bits, CHANNEL: tl.constexpr, BITS: tl.constexpr, m):
    """One channel of an octet from its planes and the levels of its token."""
    size = m[0]
    if BITS == 2:
        size = tl.where(_has(bits[0], 0, CHANNEL), m[1], m[0])
    if BITS == 3:
        third = _has(bits[1], 0, CHANNEL)
        size = tl.where(_has(bits[0], 0, CHANNEL), tl.where(third, m[3], m[2]), tl.where(third, m[1], m[0]))
    if BITS == 4:
        third, fourth = _has(bits[1], 0, CHANNEL), _has(bits[1], 1, CHANNEL)
        high = tl.where(third, tl.where(fourth, m[7], m[6]), tl.where(fourth, m[5], m[4]))
        low = tl.where(third, tl.where(fourth, m[3], m[2]), tl.where(fourth, m[1], m[0]))
        size = tl.where(_has(bits[0], 0, CHANNEL), high, low)
    return tl.where(_has(bits[0], 1, CHANNEL), size, -size)


@triton.jit
def turn(even, odd, turns):
    """A channel pair turned by (cos, sin), held in the halves of an int64."""
    cos = turns.to(tl.int32).to(tl.float32, bitcast=True)
    sin = (turns >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return even * cos - odd * sin, even * sin + odd * cos


@triton.jit
def factors_of(channel_scale, centroid_scale, stage, unit, STAGES: tl.constexpr, NVIDIA: tl.constexpr, NATIVE_E4M3: tl.constexpr):
    """What dequantizes an octet in float16: its channel scales times `unit` and the units of every stage as pairs, by a power of two small
    enough, and what makes up for that power."""
    channels, units, found = bfloat16_octet(channel_scale), (), ()
    # the most that a token can come to: no code of a scale or a centroid is above 448, and no level reaches 4
    largest = _largest(channels) * (unit * 1792.0)
    for n in tl.static_range(STAGES):
        units = units + (bfloat16_octet(centroid_scale + n * stage),)
        largest += _largest(units[n]) * 448.0
    # 2^15 at most after that
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
    """An octet as four pairs from its planes, the code of its scale and its centroids, of each stage eight codes, int64.

    sizes: the levels as coefficients of a polynomial in the bits behind the sign, of which each stands for 2 where it is set.
    """
    scale = e4m3_pair(code.to(tl.int32) * 0x0101, NATIVE_E4M3)
    if not NATIVE_E4M3:
        # NaN, of which that knows nothing
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
        y = _times(_codes(words[0], NATIVE_E4M3), factors[1][0], NVIDIA)
        for n in tl.static_range(1, STAGES):
            y = _fma(_codes(words[n], NATIVE_E4M3), factors[1][n], y, NVIDIA)
        x = _fma(x, factors[0], y, NVIDIA)
    return x


@triton.jit
def _levels(first, second, m, BITS: tl.constexpr, NVIDIA: tl.constexpr):
    """Levels of two channels with their signs, from words whose bits 14 and 15, 30 and 31 are theirs. Bit 14 alone is a float16 of 2."""
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
    # a plane's bit is set where a number is not below zero
    return x ^ (~first & -0x7FFF8000)


@triton.jit
def _codes(octet, NATIVE_E4M3: tl.constexpr):
    """Eight E4M3 codes, int64, as four pairs."""
    a, b = e4m3_pairs(octet.to(tl.int32), NATIVE_E4M3)
    c, d = e4m3_pairs((octet >> 32).to(tl.int32), NATIVE_E4M3)
    return a, b, c, d


@triton.jit
def _times(a, b, NVIDIA: tl.constexpr):
    return times(a[0], b[0], NVIDIA), times(a[1], b[1], NVIDIA), times(a[2], b[2], NVIDIA), times(a[3], b[3], NVIDIA)


@triton.jit
def _fma(a, b, c, NVIDIA: tl.constexpr):
    return (fma(a[0], b[0], c[0], NVIDIA), fma(a[1], b[1], c[1], NVIDIA),
            fma(a[2], b[2], c[2], NVIDIA), fma(a[3], b[3], c[3], NVIDIA))


@triton.jit
def turn_pairs(x, left, right, NVIDIA: tl.constexpr):
    """The four pairs of an octet turned by (cos, sin), of which `left` and `right`, int64, hold two each."""
    return (turn_pair(x[0], left.to(tl.int32), NVIDIA), turn_pair(x[1], (left >> 32).to(tl.int32), NVIDIA),
            turn_pair(x[2], right.to(tl.int32), NVIDIA), turn_pair(x[3], (right >> 32).to(tl.int32), NVIDIA))


@triton.jit
def octet_of(x, factor):
    """Four pairs as eight float32 times a factor (not NVIDIA)."""
    a, b = unpair(x[0], False)
    c, d = unpair(x[1], False)
    e, f = unpair(x[2], False)
    g, h = unpair(x[3], False)
    return a * factor, b * factor, c * factor, d * factor, e * factor, f * factor, g * factor, h * factor


@triton.jit
def words_of(x, factor, ROWS: tl.constexpr, D: tl.constexpr):
    """Four pairs times a power of two, which a word holds twice as bf16, as words [ROWS, D / 2] of bf16 (NVIDIA alone)."""
    w0, w1, w2, w3 = bfloat16_pair(x[0], factor), bfloat16_pair(x[1], factor), bfloat16_pair(x[2], factor), bfloat16_pair(x[3], factor)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (ROWS, D // 2))
