"""Arithmetic on pairs of bf16 in 32-bit words, one instruction each on NVIDIA GPUs from compute capability 9."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def opaque_zero():
    """0, unknown to the compiler."""
    return gl.inline_asm_elementwise("mov.b32 $0, 0;", "=r", args=[], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def copy_pairs(x):
    """The same pairs in other registers, those from which the matrix units read. If the compiler recognized a copy, some versions would
    keep the loaded registers as well."""
    return gl.inline_asm_elementwise("{ .reg .b32 z; mov.b32 z, 0x80008000; add.rn.bf16x2 $0, $1, z; }", "=r,r", args=[x], dtype=gl.int32,
                                     is_pure=True, pack=1)


@gluon.jit
def subtract_pairs(x, y):
    """x - y"""
    return gl.inline_asm_elementwise("sub.rn.bf16x2 $0, $1, $2;", "=r,r,r", args=[x, y], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def fma_pairs(x, y, z):
    """x * y + z"""
    return gl.inline_asm_elementwise("fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", args=[x, y, z], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def pair_of(low, high):
    """Two float32 as a pair."""
    return gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", args=[low, high], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def sign_byte(w0, w1, w2, w3):
    """A byte from the four pairs of an octet; bit c is set where channel c is not negative."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 a, b; prmt.b32 a, $1, $2, 0xFDB9; prmt.b32 b, $3, $4, 0xFDB9;
        dp4a.s32.u32 a, a, 0x08040201, 255; dp4a.s32.u32 $0, b, 0x80402010, a;
        }""", "=r,r,r,r,r", args=[w0, w1, w2, w3], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def power_of_pairs(w0, w1, w2, w3):
    """Sum of squares of an octet, float32. The four pairs are summed in bf16."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 a; .reg .f32 x, y;
        mul.rn.bf16x2 a, $1, $1; fma.rn.bf16x2 a, $2, $2, a; fma.rn.bf16x2 a, $3, $3, a; fma.rn.bf16x2 a, $4, $4, a;
        shl.b32 x, a, 16; and.b32 y, a, 0xFFFF0000; add.f32 $0, x, y;
        }""", "=f,r,r,r,r", args=[w0, w1, w2, w3], dtype=gl.float32, is_pure=True, pack=1)
