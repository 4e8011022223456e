"""Attention to one part of the keys joined to that to others, in one pass over memory. Reference: `qvg.attention.pieces.join`.

In plain torch this is some eight launches for every piece of a history and every group of heads, which take about as long as attention to
a piece itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..qvg.backends import Unsupported, before_launch
from .tiles import require_channels_last

# strides of attention are given to the kernel in these many elements, so that it knows how addresses are aligned, and so that no length,
# number of heads or slice of a wider tensor is compiled for
UNIT = 16
ELEMENTS = 2048  # of a program
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit(do_not_specialize=[
    "first_lse", "second_lse", "lse", "lines", "heads", "first_batch", "first_token", "first_head", "second_batch", "second_token",
    "second_head", "out_batch", "out_token", "out_head", "first_lse_batch", "first_lse_token", "first_lse_head", "second_lse_batch",
    "second_lse_token", "second_lse_head"])
def join_kernel(first, first_lse, second, second_lse, out, lse, lines, heads, first_batch, first_token, first_head, second_batch,
                second_token, second_head, out_batch, out_token, out_head, first_lse_batch, first_lse_token, first_lse_head,
                second_lse_batch, second_lse_token, second_lse_head, D: tl.constexpr, LINES: tl.constexpr, UNIT: tl.constexpr):
    """LINES heads of neighbouring tokens, [LINES, D]. lse: [B, T, H] contiguous.

    `out` may be `first`, because each number is read once, for what is written over it. Those of first_lse are read by several threads, so
    lse is other memory.
    lines: tokens times heads. Grid: (blocks of lines, batch).
    """
    batch = tl.program_id(1).to(tl.int64)
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    inside = line < lines
    token, head = (line // heads).to(tl.int64), (line % heads).to(tl.int64)
    a = tl.load(first_lse + batch * first_lse_batch + token * first_lse_token + head * first_lse_head, mask=inside, other=0.0)
    b = tl.load(second_lse + batch * second_lse_batch + token * second_lse_token + head * second_lse_head, mask=inside, other=0.0)
    most = tl.maximum(a, b)
    # two parts without keys, whose difference would be no number
    most = tl.where(most == float("-inf"), 0.0, most)
    past, weight = tl.exp(a - most), tl.exp(b - most)
    size = past + weight
    tl.store(lse + batch * lines + line, most + tl.log(size), mask=inside)
    share = tl.where(size == 0.0, 0.0, 1.0 / size)
    mask, channel = inside[:, None], tl.arange(0, D)[None, :]
    token, head = token[:, None] * UNIT, head[:, None] * UNIT
    batch = batch * UNIT
    x = tl.load(first + batch * first_batch + token * first_token + head * first_head + channel, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(second + batch * second_batch + token * second_token + head * second_head + channel, mask=mask, other=0.0).to(tl.float32)
    # what a part without keys holds is no result, be it NaN
    x = tl.where((a == float("-inf"))[:, None], 0.0, x * (past * share)[:, None])
    y = tl.where((b == float("-inf"))[:, None], 0.0, y * (weight * share)[:, None])
    tl.store(out + batch * out_batch + token * out_token + head * out_head + channel, (x + y).to(out.dtype.element_ty), mask=mask)


def join(first: Tensor, first_lse: Tensor, second: Tensor, second_lse: Tensor, out: Tensor, lse: Tensor) -> None:
    """As `qvg.attention.pieces.join`."""
    if first.ndim != 4 or not first.shape == second.shape == out.shape:
        raise Unsupported(f"attention {tuple(first.shape)} and {tuple(second.shape)} is not of one shape [B, T, H, D]")
    for x in (first, second, out):
        require_channels_last(x)
        if x.dtype not in DTYPES:
            raise Unsupported(f"there is no kernel for {x.dtype}")
    for x in (first_lse, second_lse, lse):
        if x.shape != first.shape[:3] or x.dtype != torch.float32:
            raise Unsupported(f"a log-sum-exp {tuple(x.shape)} in {x.dtype} is not of one number in float32 a head")
    if not lse.is_contiguous() or lse.data_ptr() in (first_lse.data_ptr(), second_lse.data_ptr()):
        raise Unsupported("the joined log-sum-exp is not contiguous or not in memory of its own")
    batch, tokens, heads, dim = first.shape
    strides = [number for x in (first, second, out) for number in _in_units(x)]
    lines, block = tokens * heads, ELEMENTS // dim
    if not batch * lines:
        return
    before_launch("join", dim, first.dtype, second.dtype, out.dtype, first.device)
    join_kernel[(triton.cdiv(lines, block), batch)](
        first, first_lse, second, second_lse, out, lse, lines, heads, *strides, *first_lse.stride(), *second_lse.stride(), D=dim,
        LINES=block, UNIT=UNIT, num_warps=4)


def _in_units(x: Tensor) -> list[int]:
    """Strides of all axes but the channels'."""
    strides = [0 if count == 1 else stride for count, stride in zip(x.shape[:3], x.stride())]
    if any(stride % UNIT for stride in strides):
        raise Unsupported(f"strides {strides} are no multiples of {UNIT}")
    return [stride // UNIT for stride in strides]
