"""Non-finite and far too large values: they stay where they came from, and out of what tokens share.

A token with a NaN, an infinity or a value beyond `LARGEST` reads back as NaN, in its group of channels and nowhere else. What tokens share
(codebooks, channel scales, the power of two of a row's scales) is computed from the others. In a float16 workspace, values beyond its range
become its largest.
"""

from __future__ import annotations

import torch
from torch import Tensor

# the sum of squares over a head is still finite in float32; no network's keys or values come near
LARGEST = 2.0**48


def zero_nonfinite(x: Tensor) -> Tensor:
    """x with zeros in place of values that are not finite or beyond `LARGEST`."""
    return torch.where(x.abs() <= min(LARGEST, torch.finfo(x.dtype).max), x, 0)


def saturated(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x clamped to the range of float16 where that is the dtype; infinities and NaN are kept."""
    if dtype != torch.float16 or x.dtype == dtype:
        return x
    largest = torch.finfo(dtype).max
    return torch.where(x.isinf(), x, x.clamp(-largest, largest))
