"""An octet is eight neighbouring channels of a token: one byte of a bit plane, one 16-byte store of bf16. A thread holds one.

Kernels keep the eight channels as separate tiles [tokens, octets], so that nothing moves between threads and a channel's bits are selected
by constants. For a bf16 workspace `decode` keeps them as four pairs of float16 instead (`octet_pairs`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .halves import e4m3_octet_pairs, unpair


@triton.jit
def octets(x, ROWS: tl.constexpr, D: tl.constexpr):
    """[ROWS, D] as eight tiles [ROWS, D / 8]: the first channel of every octet, the second, and so on."""
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
    """The inverse of `octets`."""
    even = tl.join(tl.join(x[0], x[4]), tl.join(x[2], x[6]))
    odd = tl.join(tl.join(x[1], x[5]), tl.join(x[3], x[7]))
    return tl.reshape(tl.join(even, odd), (ROWS, D))


@triton.jit
def float32_octet(pointers):
    """Eight neighbouring float32 values, the first at `pointers`."""
    return (tl.load(pointers), tl.load(pointers + 1), tl.load(pointers + 2), tl.load(pointers + 3),
            tl.load(pointers + 4), tl.load(pointers + 5), tl.load(pointers + 6), tl.load(pointers + 7))


@triton.jit
def bfloat16_octet(pointers):
    """Eight neighbouring bf16 values, the first at `pointers` to int64, as float32."""
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
    """Everything that is loaded of a tile's tokens before the centroids: planes and codes of scales for each of the PARTS into which the
    octets of a token are divided, and ids of every stage. Each word holds two planes (`_interleave`): the first two, then the others."""
    bits, codes, selected = (), (), ()
    for part in tl.static_range(PARTS):
        # constants come last, so that the compiler folds them into the instruction
        at = local * (OCTETS * PARTS) + octet
        sign = tl.load(data + at + part * OCTETS).to(tl.int32) * 0x10002
        first = _interleave(sign, tl.load(plane1 + at + part * OCTETS)) if BITS > 1 else sign
        second = first
        if BITS > 2:
            upper = tl.load(plane3 + at + part * OCTETS).to(tl.int32) * 0x10002 if BITS > 3 else 0
            second = _interleave(upper, tl.load(plane2 + at + part * OCTETS))
        bits = bits + ((first, second),)
        if part == 0 or GROUPS > 1:
            group = scales + local * GROUPS + part * GROUPS // PARTS
            code = tl.load(group)
            for more in tl.static_range(1, GROUPS // PARTS):
                code = tl.where(octet >= more * (OCTETS * PARTS // GROUPS), tl.load(group + more), code)
        codes = codes + (code,)
    for stage in tl.static_range(STAGES):
        selected = selected + (tl.load(ids + stage * id_stage + local),)
    return bits, codes, selected


@triton.jit
def _interleave(upper, byte):
    """Two planes of an octet as one word: channel 2j has the bits 2j + 1 and 2j, channel 2j + 1 those 16 above. upper: 0x10002 times the
    byte of the plane with the upper bits. All other bits are arbitrary and never used."""
    return (upper & 0x00AA00AA) | (byte.to(tl.int32) * 0x8001 & ~0x00AA00AA)


@triton.jit
def e4m3_octet(codes, NATIVE: tl.constexpr):
    """Eight E4M3 codes, int64 -> eight float32 tiles, the lowest byte first. NATIVE: see `tiles.e4m3_to_float32`."""
    w = e4m3_octet_pairs(codes, NATIVE)
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
    """One channel of an octet, from its planes and the quantizer levels m of its token."""
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
def rotate(even, odd, angle):
    """RoPE on a channel pair. angle: (cos, sin), the halves of an int64."""
    cos = angle.to(tl.int32).to(tl.float32, bitcast=True)
    sin = (angle >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return even * cos - odd * sin, even * sin + odd * cos
