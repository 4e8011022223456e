"""What all kernels share: conversions of a tile [tokens, channels], platforms, and the shapes of matrix products.

Packed bytes are loaded as smaller tiles, one byte in a thread, and repeated along the last axis by joining a tensor with itself, which only
renames registers. A broadcast over a third axis would give the same, but Triton implements it through shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from ..qvg.backends import Unsupported

HEAD_DIMS = (64, 128, 256)


@triton.jit
def repeat2(x, ROWS: tl.constexpr, COLS: tl.constexpr):
    """[ROWS, COLS] -> [ROWS, 2 * COLS], every element twice."""
    return tl.reshape(tl.join(x, x), (ROWS, 2 * COLS))


@triton.jit
def repeat4(x, ROWS: tl.constexpr, COLS: tl.constexpr):
    """[ROWS, COLS] -> [ROWS, 4 * COLS], every element four times."""
    twice = tl.join(x, x)
    return tl.reshape(tl.join(twice, twice), (ROWS, 4 * COLS))


@triton.jit
def e4m3_to_float32(codes, NATIVE: tl.constexpr):
    """uint8 E4M3 codes -> float32. NATIVE: the device has an instruction (NVIDIA from compute capability 8.9).

    Otherwise the fields are shifted into those of a float16, subnormals included. Its exponent has a bias of 15 instead of 7, so the value
    is that float16 times 2^8.
    """
    if NATIVE:
        return codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    wide = codes.to(tl.uint16)
    half = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    return half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def scale_to_float32(codes, NATIVE: tl.constexpr):
    """The same for scales, which may be NaN."""
    x = e4m3_to_float32(codes, NATIVE)
    if not NATIVE:
        x = tl.where((codes & 0x7F) == 0x7F, float("nan"), x)
    return x


@triton.jit
def saturate(x):
    """float32, with finite values clamped to the range of float16."""
    large = (tl.abs(x) > 65504.0) & (tl.abs(x) < float("inf"))
    return tl.where(large, tl.where(x > 0, 65504.0, -65504.0), x)


@triton.jit
def is_finite(x):
    """Elementwise: neither NaN nor infinite."""
    return tl.abs(x) < float("inf")


@triton.jit
def prefetch(pointers):
    """Bring the bytes at `pointers` into the L2 cache (NVIDIA only)."""
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", args=[pointers.to(tl.int64)], dtype=tl.int32,
                              is_pure=False, pack=1)


@triton.jit
def power_of_two(exponent):
    """int -> float32 2^exponent, from -126 to 127."""
    return ((exponent.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def round_to_bfloat16(x):
    """float32 -> the nearest bf16 value, ties to even, as float32. Written out because Triton's interpreter truncates."""
    bits = x.to(tl.uint32, bitcast=True)
    bits += 0x7FFF + ((bits >> 16) & 1)
    # some NaN would become 0
    return tl.where(x == x, (bits & 0xFFFF0000).to(tl.float32, bitcast=True), x)


@triton.jit
def _e4m3_digits(x):
    """Bits of non-negative float32 values, rounded, ties to even, so that E4M3 keeps exactly bit 20 and those above."""
    bits = x.to(tl.int32, bitcast=True)
    return bits + 0x7FFFF + ((bits >> 20) & 1)


@triton.jit
def round_to_e4m3(x):
    """Non-negative float32 -> rounded to the three mantissa bits of E4M3, without its limits of range."""
    return (_e4m3_digits(x) & -1048576).to(tl.float32, bitcast=True)


@triton.jit
def float32_to_e4m3(x):
    """Non-negative float32 -> uint8 E4M3, nearest, ties to even, at most 448."""
    x = tl.minimum(x, 448.0)
    normal = (_e4m3_digits(x) >> 20) - (120 << 3)
    # below 2^-6 codes count steps of 2^-9; adding 2^23 leaves a float32 no bits for a fraction, which rounds it
    small = (x * 512.0 + 8388608.0).to(tl.int32, bitcast=True) & 0xFF
    return tl.where(x < 0.015625, small, normal).to(tl.uint8)


@dataclass(frozen=True)
class Product:
    """Tile sizes and types of a matrix product.

    tokens, block: rows of a tile of tokens and of the centroids that it is multiplied with. dtype: of the operands of a distance product.
    precision: of a product of float32 operands. stages: tiles in flight.
    """

    tokens: int
    block: int
    dtype: tl.dtype
    precision: str
    warps: int
    stages: int = 2

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` for torch."""
        return torch.float32 if self.dtype == tl.float32 else torch.bfloat16

    @staticmethod
    def of(head_dim: int, device: torch.device, tokens: int = 64) -> Product:
        """For a device; see `on`."""
        return Product.on(platform(device), head_dim, tokens)

    @staticmethod
    def on(name: str, head_dim: int, tokens: int = 64) -> Product:
        """For a platform name. Raises Unsupported where no tile fits the registers."""
        if name == "cdna":
            side = 32 if head_dim <= 128 else 16
            return Product(side, side, tl.bfloat16, "ieee", 4 if head_dim <= 64 else 8)
        if name == "rdna":
            # RDNA multiplies from registers only, and has few
            if head_dim > 128:
                raise Unsupported(f"a product over heads of {head_dim} channels does not fit the registers of an RDNA card")
            return Product(32, 32, tl.bfloat16, "ieee", 4 if head_dim <= 64 else 8, stages=1)
        block, warps = 64 if head_dim <= 128 else 32, 4 if head_dim <= 64 else 8
        if name == "interpreter":
            return Product(min(tokens, 64), block, tl.float32, "ieee", warps)
        return Product(min(tokens, 16384 // head_dim), block, tl.bfloat16, "tf32", warps)


@lru_cache
def platform(device: torch.device) -> str:
    """"cuda", "cdna", "rdna", or "interpreter", whose products of bf16 are wrong."""
    if device.type == "cpu":
        return "interpreter"
    if not torch.version.hip:
        return "cuda"
    return "cdna" if torch.cuda.get_device_properties(device).gcnArchName.startswith("gfx9") else "rdna"


@lru_cache
def major(device: torch.device) -> int:
    """Major compute capability of an NVIDIA GPU, 0 for others."""
    return torch.cuda.get_device_capability(device)[0] if platform(device) == "cuda" else 0


def require_channels_last(x: torch.Tensor) -> None:
    """Raises Unsupported unless the channels of x are contiguous and there are kernels for their number."""
    if x.stride(-1) != 1:
        raise Unsupported("channels must be contiguous in memory")
    if x.shape[-1] not in HEAD_DIMS:
        raise Unsupported(no_kernel_for(x.shape[-1]))


def no_kernel_for(head_dim: int) -> str:
    """The reason that `Unsupported` gives for a head dim without a kernel."""
    return f"heads of {head_dim} channels have no kernel; there are kernels for {', '.join(map(str, HEAD_DIMS))}"


@lru_cache
def converts_e4m3(device: torch.device) -> bool:
    """Whether the device has an instruction that converts E4M3."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) >= (8, 9)
