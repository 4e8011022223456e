"""What the kernels share: how packed bytes become a tile of numbers without leaving the registers of a thread.

A tile is [tokens, channels] and a thread holds eight neighbouring channels of one token: one byte of a bit plane, one
16-byte store of bf16. Packed bytes are loaded as narrow tiles, a byte a thread, and repeated along the last axis by
`tl.join` of a tensor with itself, which only renames registers. A broadcast over a third axis says the same, but
Triton sends it through shared memory.
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
    """[ROWS, COLS] -> [ROWS, 2 * COLS], every element twice in a row."""
    return tl.reshape(tl.join(x, x), (ROWS, 2 * COLS))


@triton.jit
def repeat4(x, ROWS: tl.constexpr, COLS: tl.constexpr):
    twice = tl.join(x, x)
    return tl.reshape(tl.join(twice, twice), (ROWS, 4 * COLS))


@triton.jit
def e4m3_to_float32(codes, NATIVE: tl.constexpr):
    """uint8 E4M3 codes -> float32. NATIVE: the device converts (NVIDIA from compute capability 8.9).

    Elsewhere: moved three bits up the same fields are a float16 whose exponent counts from 15 instead of 7, subnormals
    included, so the value is that float16 times 2^8.
    """
    if NATIVE:
        return codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    wide = codes.to(tl.uint16)
    half = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    return half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def scale_to_float32(codes, NATIVE: tl.constexpr):
    """The same of scales, of which some are NaN."""
    x = e4m3_to_float32(codes, NATIVE)
    if not NATIVE:
        x = tl.where((codes & 0x7F) == 0x7F, float("nan"), x)
    return x


@triton.jit
def saturate(x):
    """float32, of which what is finite is brought into the range of float16."""
    large = (tl.abs(x) > 65504.0) & (tl.abs(x) < float("inf"))
    return tl.where(large, tl.where(x > 0, 65504.0, -65504.0), x)


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def prefetch(pointers):
    """Bring what lies there into the L2 cache (NVIDIA alone)."""
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", args=[pointers.to(tl.int64)], dtype=tl.int32,
                              is_pure=False, pack=1)


@triton.jit
def power_of_two(exponent):
    """int -> float32 2^exponent, -126 to 127."""
    return ((exponent.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def round_to_bfloat16(x):
    """float32 -> the nearest bf16 value, ties to even, still as float32. Spelled out because Triton's interpreter truncates."""
    bits = x.to(tl.uint32, bitcast=True)
    bits += 0x7FFF + ((bits >> 16) & 1)
    # some NaN would become zeros
    return tl.where(x == x, (bits & 0xFFFF0000).to(tl.float32, bitcast=True), x)


@triton.jit
def _e4m3_digits(x):
    """The bits of float32 numbers, not negative, with what E4M3 keeps of them rounded, ties to even, into bit 20 and those above."""
    bits = x.to(tl.int32, bitcast=True)
    return bits + 0x7FFFF + ((bits >> 20) & 1)


@triton.jit
def round_to_e4m3(x):
    """float32, not negative -> with the three bits behind the leading one that E4M3 keeps, at any power of two."""
    return (_e4m3_digits(x) & -1048576).to(tl.float32, bitcast=True)


@triton.jit
def float32_to_e4m3(x):
    """float32, not negative -> uint8 E4M3, nearest, ties to even, 448 at most."""
    x = tl.minimum(x, 448.0)
    normal = (_e4m3_digits(x) >> 20) - (120 << 3)
    # below 2^-6 codes count steps of 2^-9; adding 2^23 leaves a float32 no room for a fraction, which rounds it
    small = (x * 512.0 + 8388608.0).to(tl.int32, bitcast=True) & 0xFF
    return tl.where(x < 0.015625, small, normal).to(tl.uint8)


@dataclass(frozen=True)
class Product:
    """How a matrix product is cut and what it multiplies.

    tokens, block: of a tile and of its counterpart. dtype: of the operands of a distance product. precision: of a
    product of float32 operands. stages: tiles under way at once.
    """

    tokens: int
    block: int
    dtype: tl.dtype
    precision: str
    warps: int
    stages: int = 2

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == tl.float32 else torch.bfloat16

    @staticmethod
    def of(head_dim: int, device: torch.device, tokens: int = 64) -> Product:
        return Product.on(platform(device), head_dim, tokens)

    @staticmethod
    def on(name: str, head_dim: int, tokens: int = 64) -> Product:
        """For a platform by its name. Raises Unsupported where no cut fits the registers."""
        if name == "cdna":
            side = 32 if head_dim <= 128 else 16
            return Product(side, side, tl.bfloat16, "ieee", 4 if head_dim <= 64 else 8)
        if name == "rdna":
            # these multiply from registers alone, of which they have few
            if head_dim > 128:
                raise Unsupported(f"a product over heads of {head_dim} channels does not fit the registers of an RDNA card")
            return Product(32, 32, tl.bfloat16, "ieee", 4 if head_dim <= 64 else 8, stages=1)
        block, warps = 64 if head_dim <= 128 else 32, 4 if head_dim <= 64 else 8
        if name == "interpreter":
            return Product(min(tokens, 64), block, tl.float32, "ieee", warps)
        return Product(min(tokens, 16384 // head_dim), block, tl.bfloat16, "tf32", warps)


@lru_cache
def platform(device: torch.device) -> str:
    """"cuda", "cdna", "rdna", or "interpreter", which multiplies bf16 wrongly."""
    if device.type == "cpu":
        return "interpreter"
    if not torch.version.hip:
        return "cuda"
    return "cdna" if torch.cuda.get_device_properties(device).gcnArchName.startswith("gfx9") else "rdna"


@lru_cache
def major(device: torch.device) -> int:
    """Of the compute capability of an NVIDIA card, 0 elsewhere."""
    return torch.cuda.get_device_capability(device)[0] if platform(device) == "cuda" else 0


def require_channels_last(x: torch.Tensor) -> None:
    """Raises Unsupported when the channels of x do not lie side by side, or their number is none that a kernel is made for."""
    if x.stride(-1) != 1:
        raise Unsupported("channels must lie side by side in memory")
    if x.shape[-1] not in HEAD_DIMS:
        raise Unsupported(no_kernel_for(x.shape[-1]))


def no_kernel_for(head_dim: int) -> str:
    return f"heads of {head_dim} channels have no kernel; there are kernels for {', '.join(map(str, HEAD_DIMS))}"


@lru_cache
def converts_e4m3(device: torch.device) -> bool:
    """Whether the device has an instruction that reads E4M3."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) >= (8, 9)
