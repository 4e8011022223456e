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
from functools import lru_cache

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
    return ((bits.view(torch.uint8).view(torch.int64) * 0x0102040810204080) >> 56).to(torch.uint8)


def encode(z: Tensor, planes: int) -> list[Tensor]:
    """Planes of z [..., D], which should look like a unit Gaussian: `planes` tensors uint8 [..., D / 8], most significant first."""
    magnitude = z.abs()
    cell = torch.zeros(z.shape, dtype=torch.uint8, device=z.device)
    for border in thresholds(planes):
        cell += magnitude >= border
    return [pack(z >= 0)] + [pack((cell >> (planes - 1 - plane)) & 1 > 0) for plane in range(1, planes)]


class LevelTable:
    """Reads planes back through a lookup of whole bytes, which on a CPU is several times faster than unpacking bits.

    A row of the table holds the levels of `width` neighbouring channels for every pattern of their bits: whole bytes for one or
    two planes, halves of a byte for three or four.
    """

    def __init__(self, planes: int, gain: str, device):
        self.planes = planes
        self.width = 8 if planes <= 2 else 4
        positive = levels(planes, gain)
        # index bit (plane * width + channel)
        pattern = torch.arange(2 ** (planes * self.width))
        bit = [[(pattern >> (plane * self.width + channel)) & 1 for channel in range(self.width)] for plane in range(planes)]
        columns = []
        for channel in range(self.width):
            cell = sum(bit[plane][channel] << (planes - 1 - plane) for plane in range(1, planes)) + torch.zeros_like(pattern)
            columns.append(torch.tensor(positive)[cell] * (2 * bit[0][channel] - 1))
        self.values = torch.stack(columns, dim=1).float().to(device)

    def __call__(self, planes: list[Tensor]) -> Tensor:
        """uint8 [..., D / 8] a plane -> float32 [..., D]."""
        index = planes[0].int()
        if self.width == 8:
            for number, plane in enumerate(planes[1:self.planes], 1):
                index = torch.add(index, plane, alpha=1 << (8 * number))
        else:
            low, high = index & 0x0F, index >> 4
            for number, plane in enumerate(planes[1:self.planes], 1):
                low = torch.add(low, plane & 0x0F, alpha=1 << (4 * number))
                high = torch.add(high, plane >> 4, alpha=1 << (4 * number))
            index = torch.stack([low, high], dim=-1).flatten(-2)
        return self.values.index_select(0, index.flatten()).view(*index.shape[:-1], -1)
