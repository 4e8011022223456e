"""Encode tokens to the bits of their components. Reference: `qvg.codec.transform`.

K and V are encoded together, in two launches. The first transforms the tokens and writes their codes, a byte for each component, token
after token. Where registers do not hold all components, it transforms them twice, the first time for their scales. The second picks the
bits of the words from these, and writes the bytes of the scales: those share a power of two, which depends on the largest scale of the row,
and codes do not depend on it unless a token is 2^14 times smaller than the largest of its head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..qvg.backends import Unsupported, before_launch
from ..qvg.codec import transform
from ..qvg.codec.basis import MOST_BITS, Basis
from ..qvg.codec.transform import TransformSpan, words_of
from .bit_vectors import places, require_contiguous
from .encode import store_scales
from .tiles import Product, is_finite, platform, require_channels_last, round_to_e4m3

# tokens of a program of `pack_kernel`
PACKED = 512
HALF_STEPS, WITH_BITS = (tl.constexpr(value) for value in (transform.HALF_STEPS, transform.WITH_BITS))


@triton.jit
def _components(tile, vectors, component, D: tl.constexpr):
    """Some components of centred tokens, float32 [TOKENS, BLOCK]."""
    found = tl.load(vectors + (component[None, :] * D + tl.arange(0, D)[:, None]))
    return tl.dot(tile, found.to(tile.dtype), input_precision="ieee")


@triton.jit(do_not_specialize=["tokens"])
def components_kernel(
    x, other_x, mean, other_mean, vectors, other_vectors, deviation, other_deviation, weight, other_weight, reach, other_reach,
    roots, parts, codes, tokens, x_token, x_row, D: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr,
):
    """Scales of tokens to roots float32 [tensors, rows, tokens], not finite where a token is not; codes uint8 [tensors, rows, D, tokens];
    the sums of what bits leave of a block's tokens, and their number, to parts float32 [tensors, rows, blocks, 2].

    EXACT: operands in float32 instead of bf16. Grid: (blocks of tokens, rows, tensors).
    """
    row, side = tl.program_id(1).to(tl.int64), tl.program_id(2)
    first = tl.program_id(0).to(tl.int64) * TOKENS
    local, channel, block = tl.arange(0, TOKENS), tl.arange(0, D)[None, :], tl.arange(0, BLOCK)
    mask = local < tokens - first
    # past the end the last token is encoded again
    held = tl.minimum(local, (tokens - first - 1).to(tl.int32))
    mean = tl.where(side == 0, mean, other_mean) + row * D
    vectors = tl.where(side == 0, vectors, other_vectors) + row * (D * D)
    deviation = tl.where(side == 0, deviation, other_deviation) + row * D
    weight, reach = tl.where(side == 0, weight, other_weight) + row * D, tl.where(side == 0, reach, other_reach) + row * D
    line = side * tl.num_programs(1) + row

    x = tl.where(side == 0, x, other_x) + row * x_row + first * x_token
    tile = tl.load(x + (held[:, None] * x_token + channel)).to(tl.float32) - tl.load(mean + channel)
    tile = tile.to(tl.float32 if EXACT else tl.bfloat16)
    power, left, far = tl.zeros((TOKENS,), tl.float32), tl.zeros((TOKENS,), tl.float32), tl.zeros((TOKENS,), tl.float32)
    variance = tl.zeros((BLOCK,), tl.float32)
    y = tl.zeros((TOKENS, BLOCK), tl.float32)
    without_bits = WITH_BITS * tl.max(tl.load(weight + tl.arange(0, D)).to(tl.float32), axis=0)
    for start in range(0, D, BLOCK):
        y = _components(tile, vectors, start + block, D)
        power += tl.sum(y * y, axis=1)
        of_left = tl.load(weight + start + block).to(tl.float32)
        left += tl.sum(y * y * of_left[None, :], axis=1)
        of_block = tl.load(deviation + start + block).to(tl.float32)
        variance += of_block * of_block
        step = tl.where(of_left < without_bits, 1024.0 / (tl.load(reach + start + block).to(tl.float32) * of_block), 0.0)
        far = tl.maximum(far, tl.max(tl.abs(y) * step[None, :], axis=1))
    root, least = tl.sqrt(power / tl.sum(variance, axis=0)), far / HALF_STEPS
    # of a token that is not finite the root is not
    root = tl.where(least > root, least, root)
    tl.store(roots + line * tokens + first + local, root, mask=mask)
    good = mask & is_finite(root)
    parts += (line * tl.num_programs(0) + tl.program_id(0)) * 2
    tl.store(parts, tl.sum(tl.where(good, left, 0.0), axis=0))
    tl.store(parts + 1, tl.sum(good.to(tl.float32), axis=0))

    scale = round_to_e4m3(root)
    inverse = tl.where(scale > 0, 1.0 / scale, 0.0)
    codes += line * D * tokens + first
    for start in range(0, D, BLOCK):
        if BLOCK < D:
            y = _components(tile, vectors, start + block, D)
        step = 1024.0 / (tl.load(reach + start + block).to(tl.float32) * tl.load(deviation + start + block).to(tl.float32))
        code = tl.minimum(tl.maximum(tl.floor(y * inverse[:, None] * step[None, :]), -128.0), 127.0).to(tl.int32) + 128
        tl.store(codes + ((start + block).to(tl.int64)[None, :] * tokens + local[:, None]), code.to(tl.uint8), mask=mask[:, None])


@triton.jit(do_not_specialize=["tokens", "blocks", "words", "other_words", "rows"])
def pack_kernel(
    codes, order, other_order, out, other_out, roots, scales, other_scales, exponents, other_exponents, parts, fit, other_fit,
    tokens, blocks, words, other_words, rows, BITS: tl.constexpr, TOKENS: tl.constexpr,
):
    """Codes to words int16 [rows, words, tokens]; in the last programs the scales of a row, and its fit. BITS: of a basis's order.

    Grid: (blocks of tokens, words and one more, tensors * rows).
    """
    side, row = tl.program_id(2) // rows, (tl.program_id(2) % rows).to(tl.int64)
    line, word = tl.program_id(2).to(tl.int64), tl.program_id(1)
    count = tl.where(side == 0, words, other_words)
    if word < count:
        bit = tl.arange(0, 16)
        order = tl.where(side == 0, order, other_order) + row * BITS
        component, place, _ = places(order, 16 * word + bit, 16 * count)
        token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
        mask = (token < tokens)[None, :]
        code = tl.load(codes + (line * (BITS // 4) + component)[:, None] * tokens + token[None, :], mask=mask, other=0).to(tl.int32)
        found = tl.sum((code >> (7 - place)[:, None] & 1) << bit[:, None], axis=0)
        tl.store(tl.where(side == 0, out, other_out) + (row * count + word) * tokens + token, found.to(tl.int16), mask=token < tokens)
    elif word == tl.num_programs(1) - 1 and tl.program_id(0) == 0:
        store_scales(roots + line * tokens, tl.where(side == 0, scales, other_scales) + row * tokens,
                     tl.where(side == 0, exponents, other_exponents) + row, tokens, TOKENS)
        left, good = 0.0, 0.0
        for block in range(blocks):
            left += tl.load(parts + (line * blocks + block) * 2)
            good += tl.load(parts + (line * blocks + block) * 2 + 1)
        tl.store(tl.where(side == 0, fit, other_fit) + row, left / tl.maximum(good, 1.0))


def block_of(name: str, product: Product, head_dim: int) -> int:
    """Components that a program of `components_kernel` holds: all, where registers and shared memory suffice. name: of the platform."""
    return head_dim if name == "cuda" and head_dim <= 128 else product.block


def encode_transform(bits: list[float], gains: list[str], bases: list[Basis], *xs: Tensor) -> list[TransformSpan]:
    """One or two tensors [T, R, D] of one shape, each with its bits per element, gain and basis -> a span of each."""
    for x, book in zip(xs, bases):
        require_channels_last(x)
        require_contiguous(book)
    if any(x.shape != xs[0].shape or x.dtype != xs[0].dtype for x in xs):
        raise Unsupported("tensors that are encoded together differ in shape or dtype")
    if any(x.stride() != xs[0].stride() for x in xs):
        xs = [x.contiguous() for x in xs]
    x, product = xs[0], Product.of(xs[0].shape[2], xs[0].device)
    tokens, rows, dim = x.shape
    spans = [_empty(x, *of) for of in zip(bits, gains, bases)]
    blocks = triton.cdiv(tokens, product.tokens)

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(len(xs), rows, *shape, dtype=dtype, device=x.device)

    def both(name: str) -> list[Tensor]:
        """Of the spans or bases of K and V."""
        return [getattr(of, name) for of in ((spans[0], spans[-1]) if hasattr(spans[0], name) else (bases[0], bases[-1]))]

    roots, parts, codes = scratch(tokens), scratch(blocks, 2), scratch(dim, tokens, dtype=torch.uint8)
    before_launch("encode_transform", dim, x.dtype, x.device)
    components_kernel[(blocks, rows, len(xs))](
        xs[0], xs[-1], *both("mean"), *both("vectors"), *both("deviation"), *both("weight"), *both("reach"), roots, parts, codes,
        tokens, x.stride(0), x.stride(1), D=dim, TOKENS=product.tokens, BLOCK=block_of(platform(x.device), product, dim),
        EXACT=product.dtype == tl.float32, num_warps=product.warps, num_stages=product.stages)
    words = [span.words.shape[1] for span in (spans[0], spans[-1])]
    pack_kernel[(triton.cdiv(tokens, PACKED), max(words) + 1, len(xs) * rows)](
        codes, *both("order"), *both("words"), roots, *both("scales"), *both("exponents"), parts, *both("fit"),
        tokens, blocks, *words, rows, BITS=MOST_BITS * dim, TOKENS=PACKED, num_warps=4)
    return spans


def _empty(x: Tensor, bits: float, gain: str, basis: Basis) -> TransformSpan:
    """An uninitialized span for x [T, R, D]."""
    tokens, rows, dim = x.shape

    def of(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(rows, *shape, dtype=dtype, device=x.device)

    return TransformSpan(words=of(torch.int16, words_of(bits, dim), tokens), scales=of(torch.uint8, tokens), exponents=of(torch.int8),
                         fit=of(torch.float32), width=bits, codebook=basis, gain=gain)
