"""RoPE on a chunk's own tokens in one pass. References: `qvg.attention.rope.rotate` and `qvg.attention.rope.rotate_chunk`.

A chunk's queries and keys are rotated in one launch, which also writes the keys and values of the first group of heads into the workspace.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..qvg.backends import Unsupported, before_launch
from .tiles import require_channels_last


@triton.jit(do_not_specialize=["lines", "heads", "placed", "batches"])
def rotate_kernel(x, other_x, cos, sin, out, other_out, value, keys, values, lines, heads, placed, batches, x_batch, x_token, x_head,
                  value_batch, value_token, value_head, workspace_batch, workspace_token,
                  D: tl.constexpr, LINES: tl.constexpr, PLACES: tl.constexpr):
    """RoPE on LINES heads of neighbouring tokens, [LINES, D], of x or of other_x; both outputs are contiguous. PLACES: the first `placed`
    heads of other_x are also stored in `keys`, after RoPE, and those of `value` in `values`, [batches, tokens, placed, D] each.

    Grid: (blocks of lines, batch, tensors).
    """
    batch, second = tl.program_id(1).to(tl.int64), tl.program_id(2) == 1
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    inside = line < lines
    mask = inside[:, None]
    token, head = (line // heads).to(tl.int64), line % heads
    channel, pair = tl.arange(0, D)[None, :], tl.arange(0, D // 2)[None, :]
    tile = tl.load(tl.where(second, other_x, x) + batch * x_batch + token[:, None] * x_token + head[:, None] * x_head + channel,
                   mask=mask, other=0.0)
    at = token[:, None] * (D // 2) + pair
    c, s = tl.load(cos + at, mask=mask, other=0.0), tl.load(sin + at, mask=mask, other=0.0)
    even, odd = tl.split(tl.reshape(tile.to(tl.float32), (LINES, D // 2, 2)))
    rotated = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (LINES, D)).to(tile.dtype)
    tl.store(tl.where(second, other_out, out) + (batch * lines + line.to(tl.int64)[:, None]) * D + channel, rotated, mask=mask)
    if PLACES:
        if second and batch < batches:
            mask = (inside & (head < placed))[:, None]
            spot = batch * workspace_batch + token[:, None] * workspace_token + head[:, None] * D + channel
            tl.store(keys + spot, rotated, mask=mask)
            tile = tl.load(value + batch * value_batch + token[:, None] * value_token + head[:, None] * value_head + channel, mask=mask)
            tl.store(values + spot, tile, mask=mask)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, H, D] or [T, H, D]; cos and sin float32 [T, 1, D / 2] -> like x, contiguous."""
    batched = x if x.ndim == 4 else x[None]
    return _launch("rotate", batched, batched, cos, sin, 1)[0].view(x.shape)


def rotate_chunk(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, workspace: tuple[Tensor, Tensor] | None) -> list[Tensor]:
    """As `qvg.attention.rope.rotate_chunk`; both results are contiguous."""
    if q.shape != k.shape or q.stride() != k.stride() or q.dtype != k.dtype:
        raise Unsupported("queries and keys differ in shape, strides or dtype")
    if workspace is None:
        return _launch("rotate_chunk", q, k, cos, sin, 2)
    keys, values = workspace
    if keys.stride() != values.stride() or keys.stride()[2:] != (keys.shape[-1], 1) or {keys.dtype, values.dtype, v.dtype} != {k.dtype}:
        raise Unsupported("the workspace's keys and values differ from the tokens in dtype, or from each other in strides")
    if v.shape != k.shape:
        raise Unsupported(f"values {tuple(v.shape)} differ in shape from keys {tuple(k.shape)}")
    require_channels_last(v)
    return _launch("rotate_chunk", q, k, cos, sin, 2, v, keys, values)


def _launch(op: str, x: Tensor, other: Tensor, cos: Tensor, sin: Tensor, tensors: int, *placed: Tensor) -> list[Tensor]:
    require_channels_last(x)
    if x.ndim != 4 or cos.shape != (x.shape[1], 1, x.shape[-1] // 2):
        raise Unsupported(f"tokens {tuple(x.shape)} and angles {tuple(cos.shape)} are not [B, T, H, D] and [T, 1, D / 2]")
    batch, tokens, heads, dim = x.shape
    outs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(tensors)]
    lines, block = tokens * heads, 2048 // dim
    value, keys, values = placed or (x, x, x)
    before_launch(op, dim, x.dtype, bool(placed), x.device)
    rotate_kernel[(triton.cdiv(lines, block), batch, tensors)](
        x, other, cos.contiguous(), sin.contiguous(), outs[0], outs[-1], value, keys, values, lines, heads, keys.shape[2], len(keys),
        *x.stride()[:3], *value.stride()[:3], *keys.stride()[:2], D=dim, LINES=block, PLACES=bool(placed), num_warps=4)
    return outs
