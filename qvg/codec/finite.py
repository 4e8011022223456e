"""Numbers that are none, and numbers too large: kept where they came from, and away from what tokens share.

A token with a NaN, an infinity or a number beyond `LARGEST` reads back as NaN, in the group of channels that held it and nowhere else. What
tokens share (codebooks, channel scales, the power of two of a row's scales) is made of the others. In a workspace of float16 numbers that
are beyond its range after decoding become its largest.
"""

from __future__ import annotations

import torch
from torch import Tensor

# sums of squares of so many as a head has are still float32; no network's keys or values come near
LARGEST = 2.0**48


def tame(x: Tensor) -> Tensor:
    """x with zeros in place of what is no number or beyond `LARGEST`."""
    return torch.where(x.abs() <= min(LARGEST, torch.finfo(x.dtype).max), x, 0)


def saturated(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in the range of dtype, where that is float16: what is finite stays so, and what is not, too."""
    if dtype != torch.float16 or x.dtype == dtype:
        return x
    largest = torch.finfo(dtype).max
    return torch.where(x.isinf(), x, x.clamp(-largest, largest))
