"""Attention to several parts of the keys, joined by their log-sum-exp; see `hopper_attend`. Reference: `qvg.attention.pieces.Running`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["queries", "heads", "whole", "pieces"])
def join_kernel(parts, part_lse, out, lse, queries, heads, whole, pieces, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """parts: float32 [blocks, pieces, BLOCK, D], of the blocks of BLOCK queries from block `whole` on; part_lse: without D. Writes out
    [C * B, T, H, D] and lse [C * B, T, H] as `hopper_attend.attend_kernel` does. Grid: (blocks, BLOCK / ROWS)."""
    blocks, index = (queries + BLOCK - 1) // BLOCK, whole + tl.program_id(0)
    local, channel = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, D)
    at = tl.program_id(0).to(tl.int64) * pieces * BLOCK
    parts += at * D
    part_lse += at
    most, size, total = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, D), tl.float32)
    for piece in range(pieces):
        found = tl.load(part_lse + piece * BLOCK + local)
        larger = tl.maximum(most, found)
        past, weight = tl.exp(most - larger), tl.exp(found - larger)
        size = size * past + weight
        total = total * past[:, None] + tl.load(parts + (piece * BLOCK + local)[:, None] * D + channel[None, :]) * weight[:, None]
        most = larger
    line = index % blocks * BLOCK + local
    mask = line < queries
    entry, head = index // blocks // heads, index // blocks % heads
    at = (entry.to(tl.int64) * queries + line) * heads + head
    tl.store(out + at[:, None] * D + channel[None, :], (total / size[:, None]).to(out.dtype.element_ty), mask=mask[:, None])
    tl.store(lse + at, most + tl.log(size), mask=mask)
