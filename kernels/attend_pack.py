"""Keys and values of a history in eight bits, as `attend` multiplies them. Reference: `qvg.attention.fast`.

The mean of the keys and the largest value of a channel are of all tokens, so what is packed is read twice: by one launch for sums and
maxima of parts of the tokens, and by one that writes. Values lie channel after channel, because products in E4M3 read them along tokens.

A decode that writes this form itself would spare those reads, and the workspace in 16 bits. It can take any vector off the keys, because
what is taken off comes back in the log-sum-exp: one near their mean after RoPE, such as the mean of the last pass, is enough, and the scale
of a tile covers what is left. Values are the difficulty: a channel needs one scale for the whole piece before the first token is written,
so spans would have to keep the largest value of each channel when they are encoded, as decoded. Transposing is for the matrix unit: the
product by the basis can be taken the other way round, vectors times bits, and is then [channels, tokens].
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..qvg.attention import fast
from ..qvg.backends import Unsupported, before_launch
from ..qvg.cache import geometry
from .tiles import converts_e4m3, float32_to_e4m3, require_channels_last

# tokens are padded with zeros to a multiple of it
PADDED = geometry.PACKED
# programs of the first launch: enough for every multiprocessor, few enough that their sums stay small beside the tokens
PROGRAMS = 512
# of the second launch
WARPS = 8
LARGEST_INT8, LARGEST_E4M3, TINY = (tl.constexpr(value) for value in (fast.INT8, fast.E4M3, fast.TINY))


@dataclass(frozen=True)
class Packed:
    """The history of B batch entries and H heads, N tokens of D channels, P of them with the padding.

    keys: int8 [B, H, P, D]. key_scales: float32 [B, H, P / TILE]. key_mean: float32 [B, H, D], which the keys lack. values: E4M3
    [B, H, D, P], and value_scales: float32 [B, H, D]; without scales they are as they came, [B, N, H, D]. All others are contiguous, and
    parts of one allocation.
    """

    keys: Tensor
    key_scales: Tensor
    key_mean: Tensor
    values: Tensor
    value_scales: Tensor | None
    tokens: int


@triton.jit
def magnitude(x):
    """|x|, infinite where x is NaN, which a maximum would pass over."""
    return tl.where(x == x, tl.abs(x), float("inf"))


@triton.jit
def scales(most, LARGEST: tl.constexpr):
    """Largest magnitudes -> what a code of 1 is worth, NaN where they are infinite, and what to multiply with to get codes."""
    most = tl.maximum(most, TINY)
    whole = tl.full(most.shape, LARGEST, tl.float32)
    return tl.where(most < float("inf"), tl.div_rn(most, whole), float("nan")), tl.div_rn(whole, most)


@triton.jit
def whole_numbers(x):
    """float32 of at most 127 -> int8, nearest, ties to even."""
    # so large a float32 has no bits for a fraction, and its lowest ones count from 0
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def rounded_to_e4m3(x, NATIVE: tl.constexpr):
    """float32 of at most 448 -> E4M3, nearest, ties to even. NATIVE: by an instruction, which truncates in Triton's interpreter."""
    if NATIVE:
        return x.to(tl.float8e4nv)
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (float32_to_e4m3(tl.abs(x)).to(tl.int32) | sign).to(tl.uint8).to(tl.float8e4nv, bitcast=True)


@triton.jit(do_not_specialize=["tokens", "heads", "share"])
def sums_kernel(k, v, sums, most, tokens, heads, share, k_batch, k_token, k_head, v_batch, v_token, v_head,
                D: tl.constexpr, TOKENS: tl.constexpr, E4M3: tl.constexpr):
    """Of `share` tokens: their part of the mean of the keys, and for E4M3 the largest magnitudes of values, float32 [parts, B, H, D] each.
    Grid: (parts, H, B)."""
    head, batch = tl.program_id(1), tl.program_id(2)
    first = tl.program_id(0).to(tl.int64) * share
    within, channel = tl.arange(0, TOKENS), tl.arange(0, D)
    k += batch.to(tl.int64) * k_batch + head.to(tl.int64) * k_head + first * k_token
    v += batch.to(tl.int64) * v_batch + head.to(tl.int64) * v_head + first * v_token
    left = tl.minimum(tokens - first, share).to(tl.int32)
    total, largest = tl.zeros((TOKENS, D), tl.float32), tl.zeros((TOKENS, D), tl.float32)
    for _ in range(tl.cdiv(left, TOKENS)):
        mask = (within < left)[:, None]
        total += tl.load(k + (within[:, None] * k_token + channel[None, :]), mask=mask, other=0.0).to(tl.float32)
        if E4M3:
            x = tl.load(v + (within[:, None] * v_token + channel[None, :]), mask=mask, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, magnitude(x))
        k += TOKENS * k_token
        v += TOKENS * v_token
        left -= TOKENS
    at = ((tl.program_id(0) * tl.num_programs(2) + batch) * heads + head).to(tl.int64) * D + channel
    tl.store(sums + at, tl.sum(total, axis=0) / tokens)
    if E4M3:
        tl.store(most + at, tl.max(largest, axis=0))


@triton.jit(do_not_specialize=["tokens", "heads"])
def pack_kernel(k, v, mean, most, keys, key_scales, values, value_scales, tokens, heads, k_batch, k_token, k_head,
                v_batch, v_token, v_head, D: tl.constexpr, TILE: tl.constexpr, E4M3: tl.constexpr, NATIVE_E4M3: tl.constexpr):
    """A tile of tokens of a head. mean, most: float32 [B, H, D]. Grid: (tiles, H, B)."""
    tile, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    line, padded = (batch * heads + head).to(tl.int64), tl.num_programs(0) * TILE
    within, channel = tl.arange(0, TILE), tl.arange(0, D)
    first = tile.to(tl.int64) * TILE
    mask = (within < tokens - first)[:, None]
    k += batch.to(tl.int64) * k_batch + head.to(tl.int64) * k_head + first * k_token
    x = tl.load(k + (within[:, None] * k_token + channel[None, :]), mask=mask, other=0.0).to(tl.float32)
    x = tl.where(mask, x - tl.load(mean + line * D + channel)[None, :], 0.0)
    scale, inverse = scales(tl.max(magnitude(x)), LARGEST_INT8)
    tl.store(key_scales + line * (padded // TILE) + tile, scale)
    tl.store(keys + (line * padded + first) * D + (within[:, None] * D + channel[None, :]), whole_numbers(x * inverse))
    if E4M3:
        v += batch.to(tl.int64) * v_batch + head.to(tl.int64) * v_head + first * v_token
        x = tl.load(v + (within[:, None] * v_token + channel[None, :]), mask=mask, other=0.0).to(tl.float32)
        scale, inverse = scales(tl.load(most + line * D + channel), LARGEST_E4M3)
        codes = tl.trans(rounded_to_e4m3(x * inverse[None, :], NATIVE_E4M3))
        tl.store(values + (line * D + channel)[:, None] * padded + first + within[None, :], codes)
        if tile == 0:
            tl.store(value_scales + line * D + channel, scale)


def _placed(k: Tensor, padded: int, e4m3: bool, space: fast.Space | None) -> list[Tensor | None]:
    """keys, key_scales, key_mean, values and value_scales of `Packed`, uninitialized."""
    batch, _, heads, dim = k.shape
    parts = [((batch, heads, padded, dim), torch.int8), ((batch, heads, padded // fast.TILE), torch.float32),
             ((batch, heads, dim), torch.float32)]
    if e4m3:
        parts += [((batch, heads, dim, padded), torch.float8_e4m3fn), ((batch, heads, dim), torch.float32)]
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in parts]
    starts = [0, *itertools.accumulate(map(geometry.aligned, sizes))]
    whole = space(starts[-1]) if space else k.new_empty(starts[-1], dtype=torch.uint8)
    placed = [whole[start:start + size].view(dtype).view(shape) for start, size, (shape, dtype) in zip(starts, sizes, parts)]
    return placed + [None] * (5 - len(placed))


def pack(k: Tensor, v: Tensor, e4m3: bool, space: fast.Space | None = None) -> Packed:
    """k and v [B, N, H, D] of any strides but the last. e4m3: pack the values, too. space: see `qvg.attention.fast.attend`."""
    for x in (k, v):
        require_channels_last(x)
    if k.shape != v.shape or k.ndim != 4 or not k.shape[1]:
        raise Unsupported(f"keys {tuple(k.shape)} and values {tuple(v.shape)} are not both [B, N, H, D] of some tokens")
    batch, tokens, heads, dim = k.shape
    block, padded = 4096 // dim, -(-tokens // PADDED) * PADDED
    share = triton.cdiv(tokens, max(1, PROGRAMS // (batch * heads)))
    share = triton.cdiv(share, block) * block
    parts = triton.cdiv(tokens, share)
    sums, most = k.new_empty(2, parts, batch, heads, dim, dtype=torch.float32)
    keys, key_scales, mean, values, value_scales = _placed(k, padded, e4m3, space)
    values = v if values is None else values
    strides = *k.stride()[:3], *v.stride()[:3]
    before_launch("attend", "pack", dim, k.dtype, v.dtype, e4m3, k.device)
    sums_kernel[(parts, heads, batch)](k, v, sums, most, tokens, heads, share, *strides, D=dim, TOKENS=block, E4M3=e4m3, num_warps=4)
    torch.sum(sums, 0, out=mean)
    most = most.amax(0) if e4m3 else mean
    pack_kernel[(padded // fast.TILE, heads, batch)](
        k, v, mean, most, keys, key_scales, values, value_scales if e4m3 else mean, tokens, heads, *strides,
        D=dim, TILE=fast.TILE, E4M3=e4m3, NATIVE_E4M3=converts_e4m3(k.device), num_warps=WARPS)
    return Packed(keys, key_scales, mean, values, value_scales, tokens)
