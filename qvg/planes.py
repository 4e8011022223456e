"""Embedded bit planes of a Gaussian residual: one encoding that can be read at 1, 2, 3 or 4 bits.

Plane 0 is the sign. Plane 1 says in which half of its cell the magnitude lies, and planes 2 and 3 split each cell again. Every
split is Lloyd's two-level quantizer inside its cell, so the first b planes are close to the best scalar quantizer of b bits:
mean squared error 0.364, 0.1175, 0.0349, 0.0097 of a unit Gaussian, against 0.3634, 0.1175, 0.0345, 0.0095. To forget is to
drop a plane.

Lloyd's levels minimize the error and so shrink every value. A constant gain folded into the levels undoes that: "energy" keeps the
second moment (1 / sqrt(1 - mse)), "unbiased" keeps the mean of many tokens (1 / (1 - mse)). It costs neither bytes nor time.
"""

from __future__ import annotations

import math
from functools import lru_cache, reduce

import torch
from torch import Tensor

MAX_PLANES = 4


def _density(x: float) -> float:
    return 0.0 if math.isinf(x) else math.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _mass(low: float, high: float) -> float:
    return 0.5 * (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2)))


def _mean(low: float, high: float) -> float:
    return (_density(low) - _density(high)) / _mass(low, high)


def _split(low: float, high: float) -> float:
    """The threshold halfway between the means of the two parts that it makes of a cell."""
    threshold = _mean(low, high)
    for _ in range(200):
        threshold = 0.5 * (_mean(low, threshold) + _mean(threshold, high))
    return threshold


@lru_cache
def cells(planes: int) -> tuple[tuple[float, float], ...]:
    """Intervals of the magnitude, in order, that `planes` planes tell apart: 2 ** (planes - 1) of them."""
    if planes == 1:
        return ((0.0, math.inf),)
    halves = []
    for low, high in cells(planes - 1):
        middle = _split(low, high)
        halves += [(low, middle), (middle, high)]
    return tuple(halves)


def thresholds(planes: int) -> list[float]:
    """Inner borders of `cells(planes)`."""
    return [low for low, _ in cells(planes)[1:]]


def distortion(planes: int) -> float:
    """Mean squared error of Lloyd's levels on a unit Gaussian."""
    return 1.0 - sum(2 * _mass(*cell) * _mean(*cell) ** 2 for cell in cells(planes))


def levels(planes: int, gain: str = "mse") -> list[float]:
    """Magnitude that each cell is read back as, in cell order; `gain` as the module text says."""
    kept = 1.0 - distortion(planes)
    factor = {"mse": 1.0, "energy": 1.0 / math.sqrt(kept), "unbiased": 1.0 / kept}[gain]
    return [factor * _mean(*cell) for cell in cells(planes)]


def pack(bits: Tensor) -> Tensor:
    """bool [..., D] -> uint8 [..., D / 8]; channel i is bit i % 8 of byte i // 8."""
    # eight bytes of 0 or 1 as one whole number: this factor moves the i-th of them to bit 56 + i, and no two to the same bit
    return (bits.view(torch.uint8).view(torch.int64) * 0x0102040810204080).view(torch.uint8)[..., 7::8]


def encode(z: Tensor, planes: int) -> list[Tensor]:
    """Planes of z [..., D], which should look like a unit Gaussian: `planes` tensors uint8 [..., D / 8], most significant first."""
    magnitude = z.abs()
    above = [pack(magnitude >= border) for border in thresholds(planes)]
    # Bit n of the number of borders below a magnitude flips at every 2**n-th of them, so that only whole bytes are counted with.
    return [pack(z >= 0)] + [reduce(torch.bitwise_xor, above[step - 1::step]) for step in (2 ** n for n in range(planes - 2, -1, -1))]


class LevelTable:
    """Reads planes back through a lookup of whole bytes, which on a CPU is several times faster than unpacking bits.

    A row of the table holds the levels of `width` neighbouring channels for every pattern of their bits: whole bytes for one or
    two planes, halves of a byte for three or four.
    """

    def __init__(self, planes: int, gain: str, device):
        self.planes = planes
        self.width = 8 if planes <= 2 else 4
        positive = levels(planes, gain)
        # where a plane's bits of these channels begin in an index; `_halves` leaves them in this order
        begins = (0, 8) if planes <= 2 else (4, 12, 0, 8)
        pattern = torch.arange(2 ** (8 if planes == 1 else 16))
        bit = [[(pattern >> (begin + channel)) & 1 for channel in range(self.width)] for begin in begins[:planes]]
        columns = []
        for channel in range(self.width):
            cell = sum(bit[plane][channel] << (planes - 1 - plane) for plane in range(1, planes)) + torch.zeros_like(pattern)
            columns.append(torch.tensor(positive)[cell] * (2 * bit[0][channel] - 1))
        self.values = torch.stack(columns, dim=1).float().to(device)

    def __call__(self, planes: list[Tensor]) -> Tensor:
        """uint8 [..., D / 8] a plane -> float32 [..., D]."""
        planes = planes[:self.planes]
        index = _halves(planes) if self.width == 4 else planes[0].int()
        if self.planes == 2:
            index.add_(planes[1], alpha=1 << 8)
        return self.values.index_select(0, index.flatten()).view(*index.shape[:-1], -1)


def _halves(planes: list[Tensor]) -> Tensor:
    """Three or four planes uint8 [..., N] -> int32 [..., 2 * N]: the lower halves of their bytes as one index, and the upper ones."""
    if len(planes) == 3:
        planes = [*planes, torch.zeros_like(planes[0])]
    words = torch.stack(planes, dim=-1).view(torch.int32).squeeze(-1)
    index = torch.stack([words, words >> 4], dim=-1).bitwise_and_(0x0F0F0F0F)
    # moves the halves of planes 0 and 1 to bits 20 and 28, between those of 2 and 3 at bits 16 and 24
    return index.mul_(1 + (1 << 20)).bitwise_right_shift_(16).bitwise_and_(0xFFFF).flatten(-2)
