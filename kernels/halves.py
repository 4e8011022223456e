"""Two float16 values in a 32-bit word, on which NVIDIA GPUs compute with one instruction.

Decoding adds a few values of similar size and rounds the sum to bf16, so the 11 bits of float16 suffice in between. NVIDIA: whether the GPU
has these instructions; otherwise the same is computed in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pair(low, high, NVIDIA: tl.constexpr):
    """Two float32 as a pair."""
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
    """A pair as two float32."""
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
def rotate_pair(x, angle, NVIDIA: tl.constexpr):
    """RoPE on a channel pair. angle: the pair (cos, sin)."""
    if NVIDIA:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 c, s; .reg .b32 cc, ss, t; mov.b32 {c, s}, $2; mov.b32 cc, {c, c}; mov.b32 ss, {s, s};"
            " prmt.b32 t, $1, 0, 0x1032; xor.b32 t, t, 0x8000; mul.rn.f16x2 t, t, ss; fma.rn.f16x2 $0, $1, cc, t; }",
            "=r,r,r", args=[x, angle], dtype=tl.int32, is_pure=True, pack=1)
    even, odd, cos, sin = _half(x), _half(x >> 16), _half(angle), _half(angle >> 16)
    return pair(even * cos - odd * sin, odd * cos + even * sin, False)


@triton.jit
def bfloat16_pair(x, factor):
    """A pair as two bf16 times a power of two (NVIDIA only). factor: the power, twice as bf16 in a word."""
    return tl.inline_asm_elementwise(
        "{ .reg .b16 l, h; .reg .f32 a, b; .reg .b32 w, z; mov.b32 {l, h}, $1; cvt.f32.f16 a, l; cvt.f32.f16 b, h;"
        " cvt.rn.bf16x2.f32 w, b, a; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, w, $2, z; }",
        "=r,r,r", args=[x, factor], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def e4m3_pairs(words, NATIVE: tl.constexpr):
    """Four E4M3 codes in an int32 -> two pairs, too small by 2^8 without NATIVE, an instruction that converts E4M3."""
    if NATIVE:
        # both in one statement, so that the assembler can use the upper half without moving it
        return tl.inline_asm_elementwise(
            "{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.rn.f16x2.e4m3x2 $0, l; cvt.rn.f16x2.e4m3x2 $1, h; }", "=r,=r,r",
            args=[words], dtype=(tl.int32, tl.int32), is_pure=True, pack=1)
    return e4m3_pair(words, False), e4m3_pair(words >> 16, False)


@triton.jit
def e4m3_pair(words, NATIVE: tl.constexpr):
    """The same for the two lower codes only."""
    if NATIVE:
        return tl.inline_asm_elementwise("{ .reg .b16 l, h; mov.b32 {l, h}, $1; cvt.rn.f16x2.e4m3x2 $0, l; }", "=r,r",
                                         args=[words], dtype=tl.int32, is_pure=True, pack=1)
    return _shift_codes(((words & 0xFF) << 8) | ((words & 0xFF00) << 16))


@triton.jit
def _shift_codes(words):
    """Two E4M3 codes in the high bytes of a word's halves -> float16 fields: the exponent has one more bit and a bias of 15, not 7."""
    return (words & -2147450880) | ((words & 0x7F007F00) >> 1)


@triton.jit
def e4m3_octet_pairs(codes, NATIVE: tl.constexpr):
    """Eight E4M3 codes in an int64 -> four pairs, scaled as in `e4m3_pairs`."""
    a, b = e4m3_pairs(codes.to(tl.int32), NATIVE)
    c, d = e4m3_pairs((codes >> 32).to(tl.int32), NATIVE)
    return a, b, c, d
