"""FP8 E4M3 as bytes.

Codes are kept as uint8 and read through a table of 256 float32 values, because MPS has no float8 type and because indexing works
the same everywhere. E4M3FN: 1 sign, 4 exponent, 3 mantissa bits, largest 448, no infinity; 0x7F and 0xFF are NaN, which only scales use.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX = 448.0
# of a row's scales in a file: powers of two that are normal numbers of float32
EXPONENTS = (-126, 127)
NAN = 0x7F
# from this many codes on, a CPU converts faster by way of float16, for which it has instructions
MANY = 16384


def table(device=None) -> Tensor:
    """[256] float32: the value of every byte."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().to(device)


def encode(x: Tensor) -> Tensor:
    """x -> uint8 codes of the same shape, nearest value, ties to even; values beyond +-448 become +-448."""
    x = x.float().clamp(-MAX, MAX)
    if x.device.type == "mps":
        return encode(x.cpu()).to(x.device)
    return x.to(torch.float8_e4m3fn).view(torch.uint8)


def encode_scales(x: Tensor) -> Tensor:
    """x, not negative -> uint8 codes; NaN where x is not finite."""
    return encode(x).masked_fill_(~x.isfinite(), NAN)


def decode_scales(codes: Tensor) -> Tensor:
    """uint8 codes, some of which may be NaN -> float32."""
    return decode(codes).masked_fill_((codes & NAN) == NAN, torch.nan)


def row_exponents(largest: Tensor) -> Tensor:
    """Largest scale of each row -> int32, the power of two that the row's scales are divided by, so that their largest is in [128, 256)."""
    # frexp: largest = mantissa * 2 ** exponent with the mantissa in [0.5, 1)
    return torch.frexp(largest).exponent.clamp(-100, 100) - 8


def powers_of_two(exponents: Tensor) -> Tensor:
    """int8 -> float32, exactly."""
    return exponents.int().add_(127).bitwise_left_shift_(23).view(torch.float32)


def rounded(x: Tensor) -> Tensor:
    """float32, not negative, with the three bits behind the leading one that E4M3 keeps, ties to even, at any power of two."""
    bits = x.view(torch.int32)
    return (bits + 0x7FFFF + ((bits >> 20) & 1)).bitwise_and_(-1 << 20).view(torch.float32)


def decode(codes: Tensor) -> Tensor:
    """uint8 codes, none of them NaN -> float32."""
    if codes.device.type == "mps":
        return table(codes.device)[codes.long()]
    if codes.device.type == "cpu" and codes.numel() >= MANY:
        # the bits of a float16 that is 256 times smaller: with int8's sign above them, and once more where float16 has another bit
        halves = codes.view(torch.int8).to(torch.int16).mul_(1 << 7).bitwise_and_(~(1 << 14)).view(torch.float16)
        return halves.float().mul_(256)
    return codes.view(torch.float8_e4m3fn).float()
