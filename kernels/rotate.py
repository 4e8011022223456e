"""RoPE on tokens, in one pass over them. Twin: `qvg.rope.rotate`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..qvg.dispatch import Unsupported, before_launch
from .tiles import require_channels_last


@triton.jit(do_not_specialize=["lines", "tokens", "heads"])
def rotate_kernel(x, cos, sin, out, lines, tokens, heads, x_batch, x_token, x_head,
                  D: tl.constexpr, LINES: tl.constexpr):
    """LINES heads of neighbouring tokens, [LINES, D]; out is contiguous. Grid: (blocks of lines, batch)."""
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    mask = (line < lines)[:, None]
    token, head = line // heads, line % heads
    channel, pair = tl.arange(0, D)[None, :], tl.arange(0, D // 2)[None, :]
    batch = tl.program_id(1).to(tl.int64)
    tile = tl.load(x + batch * x_batch + token.to(tl.int64)[:, None] * x_token + head[:, None] * x_head + channel, mask=mask, other=0.0)
    at = token.to(tl.int64)[:, None] * (D // 2) + pair
    c, s = tl.load(cos + at, mask=mask, other=0.0), tl.load(sin + at, mask=mask, other=0.0)
    even, odd = tl.split(tl.reshape(tile.to(tl.float32), (LINES, D // 2, 2)))
    turned = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (LINES, D))
    tl.store(out + (batch * lines + line.to(tl.int64)[:, None]) * D + channel, turned.to(tile.dtype), mask=mask)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, H, D] or [T, H, D]; cos and sin float32 [T, 1, D / 2] -> like x, contiguous."""
    require_channels_last(x)
    batched = x if x.ndim == 4 else x[None]
    if batched.ndim != 4 or cos.shape != (batched.shape[1], 1, x.shape[-1] // 2):
        raise Unsupported(f"tokens {tuple(x.shape)} and angles {tuple(cos.shape)} are not [B, T, H, D] and [T, 1, D / 2]")
    batch, tokens, heads, dim = batched.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    lines, block = tokens * heads, 2048 // dim
    before_launch("rotate", dim, x.dtype, x.device)
    rotate_kernel[(triton.cdiv(lines, block), batch)](
        x, cos.contiguous(), sin.contiguous(), out, lines, tokens, heads, *batched.stride()[:3], D=dim, LINES=block, num_warps=4)
    return out
