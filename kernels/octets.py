"""An octet is eight neighbouring channels of a token: one byte of a bit plane, one 16-byte store of bf16. A thread holds one.

The kernel that decodes keeps the eight channels as tiles of their own, [tokens, octets] each, so that nothing moves between threads and a
channel's bits are found by constants.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
    """Eight neighbouring bf16 numbers, which `pointers` to int32 begin, as float32."""
    w0, w1, w2, w3 = tl.load(pointers), tl.load(pointers + 1), tl.load(pointers + 2), tl.load(pointers + 3)
    return (_low(w0), _high(w0), _low(w1), _high(w1), _low(w2), _high(w2), _low(w3), _high(w3))


@triton.jit
def _low(word):
    return (word << 16).to(tl.float32, bitcast=True)


@triton.jit
def _high(word):
    return (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _has(bits, PLANE: tl.constexpr, CHANNEL: tl.constexpr):
    return (bits & (1 << (8 * PLANE + CHANNEL))) != 0


@triton.jit
def fetch(local, octet, data, plane1, plane2, plane3, scales, ids, data_token, scale_token, id_token, id_stage,
          BITS: tl.constexpr, STAGES: tl.constexpr, GROUPS: tl.constexpr, OCTETS: tl.constexpr):
    """What is read of a tile's tokens before the centroids: planes, a byte of a word each, codes of the scales, ids of every stage."""
    at = local * data_token + octet
    bits = tl.load(data + at).to(tl.uint32)
    if BITS > 1:
        bits |= tl.load(plane1 + at).to(tl.uint32) << 8
    if BITS > 2:
        bits |= tl.load(plane2 + at).to(tl.uint32) << 16
    if BITS > 3:
        bits |= tl.load(plane3 + at).to(tl.uint32) << 24
    scale = tl.load(scales + local * scale_token)
    for group in tl.static_range(1, GROUPS):
        scale = tl.where(octet >= group * (OCTETS // GROUPS), tl.load(scales + local * scale_token + group), scale)
    chosen = ()
    for stage in tl.static_range(STAGES):
        chosen = chosen + (tl.load(ids + stage * id_stage + local * id_token),)
    return bits, scale, chosen


@triton.jit
def dequantize(bits, CHANNEL: tl.constexpr, BITS: tl.constexpr, l0, l1, l2, l3, l4, l5, l6, l7):
    """One channel of an octet from its planes and the levels of its token."""
    size = l0
    if BITS == 2:
        size = tl.where(_has(bits, 1, CHANNEL), l1, l0)
    if BITS == 3:
        size = tl.where(_has(bits, 1, CHANNEL), tl.where(_has(bits, 2, CHANNEL), l3, l2), tl.where(_has(bits, 2, CHANNEL), l1, l0))
    if BITS == 4:
        high = tl.where(_has(bits, 2, CHANNEL), tl.where(_has(bits, 3, CHANNEL), l7, l6), tl.where(_has(bits, 3, CHANNEL), l5, l4))
        low = tl.where(_has(bits, 2, CHANNEL), tl.where(_has(bits, 3, CHANNEL), l3, l2), tl.where(_has(bits, 3, CHANNEL), l1, l0))
        size = tl.where(_has(bits, 1, CHANNEL), high, low)
    return tl.where(_has(bits, 0, CHANNEL), size, -size)


@triton.jit
def turn(even, odd, turns):
    """A channel pair turned by (cos, sin), held in the halves of an int64."""
    cos = turns.to(tl.int32).to(tl.float32, bitcast=True)
    sin = (turns >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return even * cos - odd * sin, even * sin + odd * cos
