"""Attention in eight bits over a packed history. Reference: `qvg.attention.fast`.

A program holds some queries of a head in int8 and walks over its keys: logits are products in int32 times the scales of the row and of the
tile of keys, exponentials are relative to the largest logit so far. Their products with values in E4M3 start from zero for every tile and
are added in float32, because E4M3 products accumulate in fewer bits than float32 has (Hopper about 14, Ada 22). GPUs without such products
take exponentials and values in 16 bits, and keys in int8 still.

GPUs of compute capability 9 have another kernel for values in E4M3, `hopper_attend`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..qvg.attention import fast
from ..qvg.backends import Failures, Unsupported, before_launch, note, ran_out, sentence_of
from .attend_pack import LARGEST_INT8, Packed, magnitude, pack, rounded_to_e4m3, scales, whole_numbers
from .tiles import converts_e4m3, major, platform, require_channels_last

# exponentials in E4M3 are 448 at most, which is folded into their exponent
LOG2_OF_448, LOG2_OF_E, LN_2 = tl.constexpr(8.807354922057604), tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
ON_HOPPER = "attend on Hopper"
_hopper_failures = Failures()


@dataclass(frozen=True)
class Tiling:
    """rows: queries of a program. keys: tokens of the history at a time, one or two tiles of `fast.TILE`."""

    rows: int
    keys: int
    warps: int
    stages: int = 2

    @staticmethod
    def of(name: str, major: int = 0) -> Tiling:
        """For a platform name (`tiles.platform`) and a major compute capability."""
        if name == "interpreter":
            return Tiling(32, 64, 4)
        if major == 9:
            # the best of those that were measured on an H200
            return Tiling(64, 128, 4)
        # what fits the registers, by the compiler's report
        return Tiling(64, 64, 8, 1) if name == "rdna" else Tiling(128, 64, 8)


@triton.jit
def _step(codes, row_scale, most, size, total, keys, key_scales, values, v_token, left,
          D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, TILE: tl.constexpr, E4M3: tl.constexpr, NATIVE_E4M3: tl.constexpr,
          MASKED: tl.constexpr):
    """Add KEYS tokens, of which `left` exist. most: largest logit so far, in powers of two. size: sum of exponentials. v_token: stride of
    values from token to token, or in E4M3 from channel to channel."""
    token, channel = tl.arange(0, KEYS), tl.arange(0, D)
    held = tl.load(keys + (token[None, :] * D + channel[:, None]))
    logits = tl.dot(codes, held, out_dtype=tl.int32).to(tl.float32)
    if KEYS == TILE:
        row_scale *= tl.load(key_scales)
    else:
        logits *= tl.where(token < TILE, tl.load(key_scales), tl.load(key_scales + 1))[None, :]
    exists = (token < left)[None, :]
    # before the scale of the row, with which they are multiplied in the exponent
    largest = tl.max(tl.where(exists, logits, float("-inf")) if MASKED else logits, axis=1) * row_scale
    larger = tl.maximum(most, largest)
    past = tl.exp2(most - larger)
    weights = tl.exp2(logits * row_scale[:, None] - (larger - (LOG2_OF_448 if E4M3 else 0.0))[:, None])
    if MASKED:
        weights = tl.where(exists, weights, 0.0)
    size = size * past + tl.sum(weights, axis=1)
    total = total * past[:, None]
    if E4M3:
        rows = tl.load(values + (channel[:, None] * v_token + token[None, :]))
        # with a limit the compiler does not join the addition to the product
        total += tl.dot(rounded_to_e4m3(weights, NATIVE_E4M3), tl.trans(rows), max_num_imprecise_acc=KEYS)
    else:
        at = values + (token[:, None] * v_token + channel[None, :])
        rows = tl.load(at, mask=(token < left)[:, None], other=0.0) if MASKED else tl.load(at)
        total = tl.dot(weights.to(rows.dtype), rows, total, input_precision="ieee")
    return larger, size, total


@triton.jit(do_not_specialize=["queries", "blocks", "tokens", "tiles"])
def attend_kernel(
    q, keys, key_scales, key_mean, values, value_scales, out, lse, queries, blocks, tokens, tiles,
    q_batch, q_token, q_head, v_batch, v_token, v_head,
    D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, TILE: tl.constexpr, E4M3: tl.constexpr, NATIVE_E4M3: tl.constexpr,
):
    """ROWS queries of a head, to out [C * B, T, H, D] and lse [C * B, T, H], contiguous. Strides of v: of values that are not packed.

    Programs of a head are neighbours, so that they read its keys together. Grid: (blocks * C, H, B).
    """
    block, condition = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    head, batch, heads = tl.program_id(1), tl.program_id(2), tl.num_programs(1)
    entry, line = (condition * tl.num_programs(2) + batch).to(tl.int64), (batch * heads + head).to(tl.int64)
    row, channel = block * ROWS + tl.arange(0, ROWS), tl.arange(0, D)
    mask = row < queries
    at = entry * q_batch + head.to(tl.int64) * q_head + row.to(tl.int64)[:, None] * q_token + channel[None, :]
    x = tl.load(q + at, mask=mask[:, None], other=0.0).to(tl.float32)
    of_mean = tl.sum(x * tl.load(key_mean + line * D + channel)[None, :], axis=1) * (D ** -0.5)
    row_scale, inverse = scales(tl.max(magnitude(x), axis=1), LARGEST_INT8)
    codes = whole_numbers(x * inverse[:, None])
    row_scale *= LOG2_OF_E * D ** -0.5

    keys += line * tiles * (TILE * D)
    key_scales += line * tiles
    if E4M3:
        values += line * tiles * (TILE * D)
        # a multiple of 16 to the compiler, too
        v_token = tiles * TILE
    else:
        values += batch.to(tl.int64) * v_batch + head.to(tl.int64) * v_head
    most, size = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS, D), tl.float32)
    for _ in range(tokens // KEYS):
        most, size, total = _step(codes, row_scale, most, size, total, keys, key_scales, values, v_token, KEYS,
                                  D, ROWS, KEYS, TILE, E4M3, NATIVE_E4M3, False)
        keys += KEYS * D
        key_scales += KEYS // TILE
        values += KEYS if E4M3 else KEYS * v_token
    if tokens % KEYS:
        most, size, total = _step(codes, row_scale, most, size, total, keys, key_scales, values, v_token, tokens % KEYS,
                                  D, ROWS, KEYS, TILE, E4M3, NATIVE_E4M3, True)
    total /= size[:, None]
    if E4M3:
        total *= tl.load(value_scales + line * D + channel)[None, :]
        most -= LOG2_OF_448
    at = (entry * queries + row) * heads + head
    tl.store(out + at[:, None] * D + channel[None, :], total.to(out.dtype.element_ty), mask=mask[:, None])
    tl.store(lse + at, (most + tl.log2(size)) * LN_2 + of_mean, mask=mask)


def attend(q: Tensor, k: Tensor, v: Tensor, space: fast.Space | None = None) -> tuple[Tensor, Tensor]:
    """As `qvg.attention.fast.fast`."""
    require_channels_last(q)
    if q.ndim != 4 or k.ndim != 4 or len(q) % len(k) or q.shape[2:] != k.shape[2:]:
        raise Unsupported(f"queries {tuple(q.shape)} and keys {tuple(k.shape)} are not [C * B, T, H, D] and [B, N, H, D]")
    if reason := fast.refusal(q.shape[-1]):
        raise Unsupported(reason)
    e4m3 = converts_e4m3(q.device)
    if not e4m3 and v.dtype == torch.float32 and platform(q.device) != "interpreter":
        raise Unsupported("this GPU has no products in E4M3, and those in 16 bits need values in bfloat16 or float16, not float32")
    return attend_packed(q, pack(k, v, e4m3, space))


def _on_hopper(q: Tensor, packed: Packed) -> tuple[Tensor, Tensor] | None:
    """Attend with the kernel for Hopper, if that is possible. Variants that failed are not tried again."""
    if major(q.device) != 9 or packed.value_scales is None or q.dtype == torch.float32:
        return None
    compiled_for = q.device, q.dtype, q.shape[3]
    if reason := _hopper_failures.reason(compiled_for, q.shape):
        note(ON_HOPPER, reason=reason)
        return None
    try:
        from . import hopper_attend

        return hopper_attend.attend_packed(q, packed)
    except Exception as error:
        if ran_out(error):
            raise
        # a Triton without Gluon or with another version of it; the kernel for any GPU needs neither
        reason = sentence_of(error)
        _hopper_failures.add(compiled_for, q.shape, reason)
        logging.warning("QVG: from here on the kernel for any GPU attends to heads of %s channels in eight bits: %s", q.shape[3], reason)
        note(ON_HOPPER, reason=reason)
        return None


def attend_packed(q: Tensor, packed: Packed, tile: Tiling | None = None) -> tuple[Tensor, Tensor]:
    """Attention of q [C * B, T, H, D] to a packed history; see `qvg.attention.fast.attend`. tile: of the kernel for any GPU, which then
    attends on Hopper, too."""
    if tile is None and (found := _on_hopper(q, packed)):
        return found
    entries, queries, heads, dim = q.shape
    tile = tile or Tiling.of(platform(q.device), major(q.device))
    e4m3, batch = packed.value_scales is not None, len(packed.keys)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    blocks = triton.cdiv(queries, tile.rows)
    before_launch("attend", dim, q.dtype, packed.values.dtype, tile, q.device)
    attend_kernel[(blocks * (entries // batch), heads, batch)](
        q, packed.keys, packed.key_scales, packed.key_mean, packed.values, packed.value_scales if e4m3 else packed.key_mean, out, lse,
        queries, blocks, packed.tokens, packed.key_scales.shape[2], *q.stride()[:3], *packed.values.stride()[:3],
        D=dim, ROWS=tile.rows, KEYS=tile.keys, TILE=fast.TILE, E4M3=e4m3, NATIVE_E4M3=converts_e4m3(q.device),
        num_warps=tile.warps, num_stages=tile.stages)
    return out, lse
