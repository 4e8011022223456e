"""PRoPE and RoPE of the same tokens in one pass over memory. Reference: `qvg.attention.prope.project`.

The camera's branch of attention needs keys, values, queries and outputs times a 4 x 4 matrix of their frame, the other branch keys and
queries after RoPE. A program keeps the four channels of every group as four tiles, with the 16 elements of its frame's matrix as scalars,
and writes both results of what it read once. Keys and values take one launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..qvg.backends import Unsupported, before_launch
from .tiles import require_channels_last


@triton.jit
def quads(x, LINES: tl.constexpr, D: tl.constexpr):
    """[LINES, D] as four tiles [LINES, D / 4]: the first channel of every group of four, the second, and so on."""
    even, odd = tl.split(tl.reshape(x, (LINES, D // 4, 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def tile_of_quads(x0, x1, x2, x3, LINES: tl.constexpr, D: tl.constexpr):
    """The inverse of `quads`."""
    return tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), (LINES, D))


@triton.jit
def pairs(table, at, mask, LINES: tl.constexpr, D: tl.constexpr):
    """A table of angles [LINES, D / 2] as two tiles [LINES, D / 4]: of the first channel pair of every group, and of the second."""
    return tl.split(tl.reshape(tl.load(table + at, mask=mask, other=0.0), (LINES, D // 4, 2)))


@triton.jit(do_not_specialize=["lines", "frame_tokens", "heads", "frames"])
def project_kernel(x, other, matrices, cos, sin, out, other_out, rotated, lines, frame_tokens, heads, frames, x_batch, x_token, x_head,
                   out_batch, out_token, out_head, rotated_batch, rotated_token, rotated_head,
                   D: tl.constexpr, LINES: tl.constexpr, TURNS: tl.constexpr):
    """LINES heads of neighbouring tokens of one frame, [LINES, D], of x or of `other`. TURNS: those of x are rotated as well.

    lines: of a frame. `other` has the strides of x, and other_out those of `out`. Grid: (blocks of a frame's lines, frames x batch,
    tensors).
    """
    frame, batch = tl.program_id(1) % frames, (tl.program_id(1) // frames).to(tl.int64)
    second = tl.program_id(2) == 1
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    mask = (line < lines)[:, None]
    token = (frame.to(tl.int64) * frame_tokens + line // heads)[:, None]
    head = (line % heads).to(tl.int64)[:, None]
    channel = tl.arange(0, D)[None, :]
    tile = tl.load(tl.where(second, other, x) + batch * x_batch + token * x_token + head * x_head + channel, mask=mask, other=0.0)
    x0, x1, x2, x3 = quads(tile.to(tl.float32), LINES, D)
    p_matrix = matrices + frame * 16
    y0 = x0 * tl.load(p_matrix) + x1 * tl.load(p_matrix + 1) + x2 * tl.load(p_matrix + 2) + x3 * tl.load(p_matrix + 3)
    y1 = x0 * tl.load(p_matrix + 4) + x1 * tl.load(p_matrix + 5) + x2 * tl.load(p_matrix + 6) + x3 * tl.load(p_matrix + 7)
    y2 = x0 * tl.load(p_matrix + 8) + x1 * tl.load(p_matrix + 9) + x2 * tl.load(p_matrix + 10) + x3 * tl.load(p_matrix + 11)
    y3 = x0 * tl.load(p_matrix + 12) + x1 * tl.load(p_matrix + 13) + x2 * tl.load(p_matrix + 14) + x3 * tl.load(p_matrix + 15)
    tl.store(tl.where(second, other_out, out) + batch * out_batch + token * out_token + head * out_head + channel,
             tile_of_quads(y0, y1, y2, y3, LINES, D).to(tile.dtype), mask=mask)
    if TURNS:
        if tl.program_id(2) == 0:
            at = token * (D // 2) + tl.arange(0, D // 2)[None, :]
            c01, c23 = pairs(cos, at, mask, LINES, D)
            s01, s23 = pairs(sin, at, mask, LINES, D)
            turned = tile_of_quads(x0 * c01 - x1 * s01, x0 * s01 + x1 * c01, x2 * c23 - x3 * s23, x2 * s23 + x3 * c23, LINES, D)
            tl.store(rotated + batch * rotated_batch + token * rotated_token + head * rotated_head + channel, turned.to(tile.dtype),
                     mask=mask)


def project(x: Tensor, matrices: Tensor, out: Tensor, turn: tuple[Tensor, Tensor, Tensor] | None,
            other: tuple[Tensor, Tensor] | None) -> None:
    """As `qvg.attention.prope.project`, for tokens and results of one dtype."""
    second, second_out = other or (x, out)
    cos, sin, rotated = turn or (matrices, matrices, x)
    for tensor in (x, second, out, second_out, rotated):
        require_channels_last(tensor)
        if tensor.shape != x.shape or tensor.dtype != x.dtype:
            raise Unsupported("tokens and results differ in shape or dtype")
    if second.stride() != x.stride() or second_out.stride() != out.stride():
        raise Unsupported("the tokens that are multiplied together, or their results, differ in strides")
    batch, tokens, heads, dim = x.shape
    frames = len(matrices)
    if matrices.shape != (frames, 4, 4) or matrices.dtype != torch.float32 or tokens % frames:
        raise Unsupported(f"{tokens} tokens and matrices {tuple(matrices.shape)} in {matrices.dtype} are not of F frames and [F, 4, 4]")
    if turn is not None and (cos.shape != (tokens, 1, dim // 2) or cos.shape != sin.shape or {cos.dtype, sin.dtype} != {torch.float32}):
        raise Unsupported(f"tokens {tuple(x.shape)} and angles {tuple(cos.shape)} are not [B, T, H, D] and float32 [T, 1, D / 2]")
    lines, block = tokens // frames * heads, 2048 // dim
    before_launch("project", dim, x.dtype, turn is not None, x.device)
    project_kernel[(triton.cdiv(lines, block), frames * batch, 1 if other is None else 2)](
        x, second, matrices.contiguous(), cos.contiguous(), sin.contiguous(), out, second_out, rotated, lines, tokens // frames, heads,
        frames, *x.stride()[:3], *out.stride()[:3], *rotated.stride()[:3], D=dim, LINES=block, TURNS=turn is not None, num_warps=4)
