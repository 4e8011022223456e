"""Two float16 numbers in a word of 32 bits, which NVIDIA's cards compute with in one instruction.

Decoding adds few numbers of one size and rounds the sum to 16 bits in the end, so that the 11 bits of a float16 are enough on the way
where a power of two keeps them in range. NVIDIA: whether there are such instructions; elsewhere the same is spelled out.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pair(low, high, NVIDIA: tl.constexpr):
    """Two float32 as a word of float16."""
    if NVIDIA:
        return tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", args=[low, high], dtype=tl.int32, is_pure=True, pack=1)
    low, high = low.to(tl.float16).to(tl.int16, bitcast=True), high.to(tl.float16).to(tl.int16, bitcast=True)
    return (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)


@triton.jit
def _half(words):
    """The float16 in the low half of a word, as float32."""
    return words.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def unpair(words, NVIDIA: tl.constexpr):
    """The two as float32."""
    if NVIDIA:
        return tl.inline_asm_elementwise("{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }", "=f,=f,r",
                                         args=[words], dtype=(tl.float32, tl.float32), is_pure=True, pack=1)
    return _half(words), _half(words >> 16)


@triton.jit
def times(a, b, NVIDIA: tl.constexpr):
    """a * b"""
    if NVIDIA:
        return tl.inline_asm_elementwise("mul.rn.f16x2 $0, $1, $2;", "=r,r,r", args=[a, b], dtype=tl.int32, is_pure=True, pack=1)
    return pair(_half(a) * _half(b), _half(a >> 16) * _half(b >> 16), False)


@triton.jit
def fma(a, b, c, NVIDIA: tl.constexpr):
    """a * b + c"""
    if NVIDIA:
        return tl.inline_asm_elementwise("fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", args=[a, b, c], dtype=tl.int32, is_pure=True, pack=1)
    return pair(_half(a) * _half(b) + _half(c), _half(a >> 16) * _half(b >> 16) + _half(c >> 16), False)


@triton.jit
def turn_pair(x, angle, NVIDIA: tl.constexpr):
    """A channel pair turned by (cos, sin)."""
    if NVIDIA:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 c, s; .reg .b32 cc, ss, t; mov.b32 {c, s}, $2; mov.b32 cc, {c, c}; mov.b32 ss, {s, s};"
            " prmt.b32 t, $1, 0, 0x1032; xor.b32 t, t, 0x8000; mul.rn.f16x2 t, t, ss; fma.rn.f16x2 $0, $1, cc, t; }",
            "=r,r,r", args=[x, angle], dtype=tl.int32, is_pure=True, pack=1)
    even, odd, cos, sin = _half(x), _half(x >> 16), _half(angle), _half(angle >> 16)
    return pair(even * cos - odd * sin, odd * cos + even * sin, False)


@triton.jit
def bfloat16_pair(x, factor):
    """Two float16 as bf16, times a power of two, which `factor` holds twice as bf16 (NVIDIA alone)."""
    return tl.inline_asm_elementwise(
        "{ .reg .b16 l, h; .reg .f32 a, b; .reg .b32 w, z; mov.b32 {l, h}, $1; cvt.f32.f16 a, l; cvt.f32.f16 b, h;"
        " cvt.rn.bf16x2.f32 w, b, a; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, w, $2, z; }",
        "=r,r,r", args=[x, factor], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def e4m3_pairs(words, NATIVE: tl.constexpr):
    """Four E4M3 codes a number, int32 -> two words, 2^8 too small where the device has no instruction that reads E4M3."""
    if NATIVE:
        # both in one text, which leaves it to the assembler to take the upper half without moving it
        return tl.inline_asm_elementwise(
            "{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.rn.f16x2.e4m3x2 $0, l; cvt.rn.f16x2.e4m3x2 $1, h; }", "=r,=r,r",
            args=[words], dtype=(tl.int32, tl.int32), is_pure=True, pack=1)
    return e4m3_pair(words, False), e4m3_pair(words >> 16, False)


@triton.jit
def e4m3_pair(words, NATIVE: tl.constexpr):
    """The same of the two lower codes alone."""
    if NATIVE:
        return tl.inline_asm_elementwise("{ .reg .b16 l, h; mov.b32 {l, h}, $1; cvt.rn.f16x2.e4m3x2 $0, l; }", "=r,r",
                                         args=[words], dtype=tl.int32, is_pure=True, pack=1)
    return _moved(((words & 0xFF) << 8) | ((words & 0xFF00) << 16))


@triton.jit
def _moved(words):
    """Two E4M3 codes, the high bytes of a word's halves. A float16 has the same fields and an exponent that counts from 15, not 7."""
    return (words & -2147450880) | ((words & 0x7F007F00) >> 1)
