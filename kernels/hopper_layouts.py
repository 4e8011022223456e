"""Where elements lie in the registers of a program of `hopper`, and the order of channels that follows.

Four neighbouring threads hold a token: 16 channels of every 64 each, as pairs of bf16 in 32-bit words. A layout lists
what each bit of a register's, a lane's and a warp's index adds to (row, column).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def log2(power_of_two):
    return power_of_two.bit_length() - 1


@gluon.constexpr_function
def word_layout(tokens, dim):
    """[tokens, dim / 2], pairs of channels: thread q of four holds channels 16q to 16q + 15 of every 64, of a token and of the eighth after
    it."""
    registers = [[0, 1], [0, 2], [0, 4], *([0, 32 << bit] for bit in range(log2(dim // 64))), [8, 0]]
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16 << bit, 0] for bit in range(log2(tokens // 16))], [], [tokens, dim // 2])


@gluon.constexpr_function
def sign_layout(tokens):
    """[tokens, 8], pairs of the 16 bits of a word, in the threads that hold them as an operand."""
    warps = [[16 << bit, 0] for bit in range(log2(tokens // 16))]
    return gl.DistributedLinearLayout([[8, 0], [0, 4]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], warps, [], [tokens, 8])


@gluon.constexpr_function
def octet_layout(tokens, dim):
    """[tokens, dim / 2], pairs of channels: a thread holds an octet of every 32 channels, of a token and of the eighth after it."""
    registers = [[0, 1], [0, 2], *([0, 16 << bit] for bit in range(log2(dim // 32))), [8, 0]]
    warps = [[16 << bit, 0] for bit in range(log2(tokens // 16))]
    return gl.DistributedLinearLayout(registers, [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]], warps, [], [tokens, dim // 2])


@gluon.constexpr_function
def quarter_layout(tokens):
    """[tokens, 4], quarters of tokens, in the threads that hold them in `word_layout`."""
    warps = [[16 << bit, 0] for bit in range(log2(tokens // 16))]
    return gl.DistributedLinearLayout([[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], warps, [], [tokens, 4])


@gluon.constexpr_function
def codebook_layout(warps, count, dim):
    """[count, dim], with channels in the same places of a thread as in `word_layout`."""
    lanes = [[0, 16], [0, 32], *([0, 64 << bit] for bit in range(log2(dim // 64)))]
    return _rows_layout(warps, count, [[0, 1], [0, 2], [0, 4], [0, 8]], lanes, dim)


@gluon.constexpr_function
def parts_layout(warps, count, dim):
    """[count, 16], with rows in the same threads as in `codebook_layout`."""
    return _rows_layout(warps, count, [[0, 1], [0, 2], [0, 4]], [[0, 8], *[[0, 0]] * log2(dim // 32)], 16)


@gluon.constexpr_function
def _rows_layout(warps, count, registers, lanes, width):
    rows = [[1 << bit, 0] for bit in range(log2(count))]
    lanes, rows = lanes + rows[:5 - len(lanes)], rows[5 - len(lanes):]
    split = log2(warps)
    held = rows[:split] + [[0, 0]] * (split - len(rows))
    return gl.DistributedLinearLayout(registers + rows[split:], lanes, held, [], [count, width])


@gluon.jit
def as_operand(x, ROWS: gl.constexpr, D: gl.constexpr):
    """[ROWS, D] with channels in the order in which the matrix units read the registers of `word_layout`. A product does not depend on the
    order of its channels, so tokens need not move."""
    return gl.reshape(gl.permute(gl.reshape(x, (ROWS, D // 64, 4, 8, 2)), (0, 1, 3, 2, 4)), (ROWS, D))


@gluon.jit
def word_offset(word, D: gl.constexpr):
    """Offset in memory of a centroid's channel pair, such that four threads load neighbouring octets together."""
    return gl.max_contiguous(gl.multiple_of((word & 3) + (word >> 1 & 12) + (word >> 5) * 16 + (word >> 2 & 1) * (D // 4), 4), 4)


@gluon.jit
def channels_of(words, ROWS: gl.constexpr, D: gl.constexpr):
    """Pairs of bf16 [ROWS, D / 2] as bf16 [ROWS, D]."""
    low, high = (words & 65535).to(gl.int16), (words >> 16).to(gl.int16)
    return gl.reshape(gl.join(low, high), (ROWS, D)).to(gl.bfloat16, bitcast=True)
