"""Decode transform spans into the workspace: a product of a token's bits and a matrix, its scale, the mean, and RoPE for K.

References: `qvg.codec.transform` and `qvg.cache.read.read`. One launch reads all spans of one width, K and V together (`jobs`). The
matrix is that of `bit_vectors`. As in `decode`, a program decodes one head at the same places of all frames of a span, and after the
product a thread holds octets of channels.

GPUs of compute capability 9 have another kernel for a bf16 workspace, `hopper_decode`.
"""

from __future__ import annotations

import logging

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..qvg.backends import Failures, Unsupported, note, ran_out, sentence_of
from .decode import Tiling, apply_rope, store
from .jobs import COLUMNS, DATA, EXPONENTS, FRAME, FRAMES, IS_VALUE, MEAN, SCALES, START, VECTORS, address
from .octets import octets
from .tiles import major, platform, power_of_two, scale_to_float32

# of a multiprocessor in a launch on Hopper, and tiles of places that one decodes at least and at most
PROGRAMS, LEAST_TILES, MOST_TILES = 4, 2, 8
ON_HOPPER = "decode on Hopper"
_hopper_failures = Failures()


def on_hopper(head_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether to decode with `hopper_decode`."""
    return major(device) == 9 and dtype == torch.bfloat16 and head_dim in (64, 128) and (device, head_dim) not in _hopper_failures


def leave_hopper(used: bool, error: Exception, out: Tensor) -> bool:
    """After an error: whether `hopper_decode` may have caused it, which is then not used again for such heads on this device."""
    if not used or ran_out(error) or isinstance(error, Unsupported):
        return False
    # a Triton without Gluon or with another version of it; the kernel for any GPU needs neither
    reason = sentence_of(error)
    _hopper_failures.add((out.device, out.shape[-1]), None, reason)
    logging.warning("QVG: from here on heads of %s channels are decoded by the kernel for any GPU: %s", out.shape[-1], reason)
    note(ON_HOPPER, reason=reason)
    return True


def tiling(words: int, head_dim: int, name: str, on_hopper: bool) -> Tiling:
    """For a platform name (`tiles.platform`)."""
    if on_hopper:
        from . import hopper_decode

        cut = hopper_decode.Cut.of(words)
        return Tiling(tokens=cut.tokens, warps=cut.tokens // 16, registers=cut.registers, halves=True)
    if name == "interpreter":
        return Tiling(tokens=4096 // head_dim, warps=8)
    if name == "rdna":
        return Tiling(tokens=16, warps=8 if words * head_dim >= 2048 else 4)
    # more words would spill
    size = words * head_dim
    return Tiling(tokens=(8192 if size < 768 or (head_dim > 64 and size <= 4096) else 4096) // head_dim, warps=8 if size >= 2048 else 4)


def share_of(tiles: int, device: torch.device) -> int:
    """Tiles of places of a program on Hopper, of so many in a launch: few enough that all multiprocessors have work to the end, and many,
    because every program loads its vectors."""
    places = PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count
    return max(LEAST_TILES, min(MOST_TILES, round(tiles / places)))


def stages(words: int, head_dim: int, name: str) -> int:
    """2, with which vectors are loaded while the tile before is multiplied, where they do not fill shared memory."""
    return 2 if words * head_dim <= 1280 and name != "rdna" else 1


def launch(words: int, tile: Tiling, grid: tuple[int, int, int], native: bool, shared: dict, arguments: tuple) -> None:
    """Spans of `words` words. shared: constants that both kernels have. Of the tilings only Hopper's computes in halves, as to angles."""
    if tile.halves:
        from . import hopper_decode

        hopper_decode.decode_kernel[grid](*arguments, WORDS=words, **hopper_decode.Cut.of(words).constants, **shared)
    else:
        name = platform(arguments[0].device)
        decode_transform_kernel[grid](*arguments, WORDS=words, TOKENS=tile.tokens, NVIDIA=name == "cuda", NATIVE_E4M3=native,
                                      num_stages=stages(words, shared["D"], name), **shared)


@triton.jit
def _add_words(tile, words, tokens, local, vectors, FIRST: tl.constexpr, COUNT: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr):
    """tile plus the product of COUNT words of tokens `local` from the word FIRST on, and their vectors."""
    dtype: tl.constexpr = vectors.dtype.element_ty
    bit = tl.arange(0, 16)[None, None, :]
    held = tl.load(words + ((FIRST + tl.arange(0, COUNT))[None, :] * tokens + local[:, None])).to(tl.int32)[:, :, None]
    if dtype == tl.bfloat16:
        signs = (((held << (15 - bit)) & 0x8000) ^ 0xBF80).to(tl.int16).to(dtype, bitcast=True)
    else:
        signs = ((held >> bit & 1) * 2 - 1).to(dtype)
    found = tl.load(vectors + ((16 * FIRST + tl.arange(0, 16 * COUNT))[:, None] * D + tl.arange(0, D)[None, :]))
    return tl.dot(tl.reshape(signs, (TOKENS, 16 * COUNT)), found, tile, input_precision="ieee")


@triton.jit
def _product(words, tokens, local, vectors, WORDS: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr):
    """Bits times their vectors, float32 [TOKENS, D], as many words at a time as registers allow."""
    MOST: tl.constexpr = 8 if D <= 128 else 4 if WORDS <= 32 else 2
    tile = tl.zeros((TOKENS, D), tl.float32)
    for word in tl.static_range(0, WORDS - MOST + 1, MOST):
        tile = _add_words(tile, words, tokens, local, vectors, word, MOST, D, TOKENS)
    for power in tl.static_range(3):
        # the words that are left, four, two and one at a time
        if MOST > (4 >> power) and WORDS & (4 >> power):
            tile = _add_words(tile, words, tokens, local, vectors, WORDS - WORDS % (8 >> power), 4 >> power, D, TOKENS)
    return tile


@triton.jit(do_not_specialize=["first_job", "first_head", "all_heads", "origin", "frames", "places", "share"])
def decode_transform_kernel(
    jobs, vectors, angles, keys, values,
    first_job, first_head, all_heads, batches, batch_stride, token_stride, head_stride, origin, frames, places, share,
    WORDS: tl.constexpr, D: tl.constexpr, TIME: tl.constexpr, TOKENS: tl.constexpr, NVIDIA: tl.constexpr, NATIVE_E4M3: tl.constexpr,
):
    """One head at `share` tiles of places of every frame of one span, to keys or values [batches, T, h, D]; see `decode.decode_kernel`.

    vectors: of `BitVectors.make`. Grid: (blocks of places, heads, spans * batches).
    """
    job = jobs + (first_job + tl.program_id(2) // batches) * COLUMNS
    span_frames = tl.load(job + FRAMES).to(tl.int32)
    batch, head = tl.program_id(2) % batches, tl.program_id(1)
    row = (batch * all_heads + first_head + head).to(tl.int64)
    tokens = span_frames * places
    dtype: tl.constexpr = keys.dtype.element_ty
    channel, octet = tl.arange(0, D)[None, :], tl.arange(0, D // 8)[None, :]

    is_value = tl.load(job + IS_VALUE) != 0
    out = tl.where(is_value, values.to(tl.int64), keys.to(tl.int64)).to(tl.pointer_type(dtype))
    out = tl.multiple_of(out, 16)
    out += batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride
    out += tl.load(job + START) * token_stride
    words = address(job, DATA, tl.int16) + row * WORDS * tokens
    scales = address(job, SCALES, tl.uint8) + row * tokens
    unit = power_of_two(tl.load(address(job, EXPONENTS, tl.int8) + row))
    mean = tl.load(address(job, MEAN, tl.float32) + row * D + channel)
    line, lines = batch * tl.num_programs(1) + head, batches * tl.num_programs(1)
    vectors += (tl.load(job + VECTORS) * lines + line * WORDS) * (16 * D)
    vectors = tl.multiple_of(vectors, 16)
    first_frame = tl.load(job + FRAME).to(tl.int32) + origin

    first = tl.program_id(0) * (share * TOKENS)
    within = tl.arange(0, TOKENS)
    frame = 0
    for _ in range(tl.minimum(share, tl.cdiv(places - first, TOKENS)) * span_frames):
        # past the end of a frame its last token is decoded and stored again, which is cheaper than masks
        place = tl.minimum(first + within, places - 1)
        local = frame * places + place
        tile = _product(words, tokens, local, vectors, WORDS, D, TOKENS)
        scale = scale_to_float32(tl.load(scales + local), NATIVE_E4M3) * unit
        x = octets(tile * scale[:, None] + mean, TOKENS, D)
        of_time, of_place = (first_frame + frame) * (D // 8), ((frames + place) * (D // 8))[:, None]
        if not is_value:
            x = apply_rope(x, angles, of_time, of_place, octet, 0, D, TIME, D // 8, False, NVIDIA, False)
        store(out + local.to(tl.int64)[:, None] * token_stride, x, channel, 1.0, 0, dtype, D, TOKENS, 1, NVIDIA)
        more = frame + 1 < span_frames
        first = tl.where(more, first, first + TOKENS)
        frame = tl.where(more, frame + 1, 0)
