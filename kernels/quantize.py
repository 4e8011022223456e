"""Residuals of an octet to bit planes and scales; shared by the kernels that encode (`encode`, `hopper`)."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import float32_to_e4m3, is_finite


@triton.jit
def plane_bytes(y, scale, border, b0, b1, b2, b4, b5, b6, BITS: tl.constexpr):
    """The bytes of an octet's planes, from its residuals and the scales of their groups. b0 to b6: borders of the quantizer's cells;
    instead of dividing by the scale, it is multiplied into them. border: the middle one, scaled, which every channel needs."""
    # signs of differences, the last channel first
    p0, p1, p2, p3 = 0, 0, 0, 0
    for channel in tl.static_range(7, -1, -1):
        size = tl.abs(y[channel])
        p0 = _append_sign(p0, y[channel])
        if BITS > 1:
            p1 = _append_sign(p1, size - border)
        if BITS == 3:
            p2 = _append_sign(p2, size - tl.where(size >= border, b2, b0) * scale)
        if BITS == 4:
            high = size >= border
            middle = tl.where(high, b5, b1) * scale
            p2 = _append_sign(p2, size - middle)
            p3 = _append_sign(p3, size - tl.where(size >= middle, tl.where(high, b6, b2), tl.where(high, b4, b0)) * scale)
    # a set bit means not negative
    return p0 ^ 255, p1 ^ 255, p2 ^ 255, p3 ^ 255


@triton.jit
def _append_sign(byte, x):
    """Shift the sign bit of x in from below, which is one instruction."""
    return (byte << 1) | (x.to(tl.uint32, bitcast=True) >> 31)


@triton.jit
def power(y):
    """Sum of squares of an octet."""
    return tl.fma(y[0], y[0], tl.fma(y[1], y[1], tl.fma(y[2], y[2], y[3] * y[3]))) + tl.fma(
        y[4], y[4], tl.fma(y[5], y[5], tl.fma(y[6], y[6], y[7] * y[7])))


@triton.jit
def shared_exponent(largest):
    """Exponent of the power of two under which the scales of a row are stored, from its largest finite scale, float32."""
    bits = largest.to(tl.int32, bitcast=True)
    # the exponent of a mantissa in [0.5, 1), as the codec defines it
    return tl.minimum(tl.maximum(tl.where(bits == 0, 0, (bits >> 23) - 126), -100), 100) - 8


@triton.jit
def scale_to_e4m3(root, factor):
    """float32 scales times a factor as E4M3 bytes; NaN for non-finite scales."""
    return tl.where(is_finite(root), float32_to_e4m3(root * factor).to(tl.int32), 0x7F).to(tl.uint8)
