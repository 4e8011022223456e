"""Embedded bit planes of a Gaussian residual: one encoding that can be read at 1, 2, 3 or 4 bits.

Plane 0 is the sign. Plane 1 says in which half of its cell the magnitude lies, and planes 2 and 3 split each cell again. Every
split is Lloyd's two-level quantizer inside its cell, so the first b planes are close to the best b-bit scalar quantizer:
mean squared error 0.364, 0.1175, 0.0349, 0.0097 of a unit Gaussian, against 0.3634, 0.1175, 0.0345, 0.0095. To forget is to
drop a plane. Source of the idea: embedded quantization; figures from this module's own functions.

Lloyd's levels minimize the error and therefore shrink every value. A constant gain in the levels undoes that: "energy" keeps the
second moment (1 / sqrt(1 - mse)), "unbiased" keeps the mean of many tokens (1 / (1 - mse)). It costs neither bytes nor time.
"""

from __future__ import annotations

import math
from functools import lru_cache, reduce

import torch
from torch import Tensor

MAX_PLANES = 4
PATTERNS = 4 ** MAX_PLANES  # of the bits of two channels


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
    # eight bytes of 0 or 1 as one integer: this factor moves the i-th of them to bit 56 + i, and no two to the same bit
    return (bits.view(torch.uint8).view(torch.int64) * 0x0102040810204080).view(torch.uint8)[..., 7::8]


def encode(z: Tensor, planes: int) -> list[Tensor]:
    """Planes of z [..., D], which should look like a unit Gaussian: `planes` tensors uint8 [..., D / 8], most significant first."""
    borders, magnitude = thresholds(planes), z.abs()
    above = torch.empty(1 + len(borders), *z.shape, dtype=torch.bool, device=z.device)
    torch.ge(z, 0, out=above[0])
    for border, out in zip(borders, above[1:]):
        torch.ge(magnitude, border, out=out)
    sign, *above = pack(above)
    # Bit n of the number of borders below a magnitude flips at every 2**n-th of them, so that only whole bytes are counted with.
    return [sign] + [reduce(torch.bitwise_xor, above[step - 1::step]) for step in (2 ** n for n in range(planes - 2, -1, -1))]


class LevelTable:
    """Reads planes back through a lookup of two channels at a time, several times faster on a CPU than unpacking bits.

    An entry of the table holds the levels of two neighbouring channels, for every pattern of their bits and every number of planes. The
    table is small enough for a core's L1 cache, which one for whole bytes is not.
    """

    def __init__(self, gain: str, device):
        pattern, rows = torch.arange(PATTERNS), []
        for planes in range(1, MAX_PLANES + 1):
            bit = [[(pattern >> (2 * plane + channel)) & 1 for channel in range(2)] for plane in range(planes)]
            magnitude = torch.tensor(levels(planes, gain), dtype=torch.float32)
            cell = [sum(bit[plane][channel] << (planes - 1 - plane) for plane in range(1, planes)) + 0 * pattern for channel in range(2)]
            pairs = torch.stack([magnitude[cell[channel]] * (2 * bit[0][channel] - 1) for channel in range(2)], dim=1)
            # an index comes as a signed byte, so that the upper half is first
            rows.append(pairs.roll(PATTERNS // 2, 0))
        self.values = torch.cat(rows).view(torch.int64).flatten().to(device)
        # Two neighbouring bits of every byte of a word, for each of their four places, and what brings them together in the highest
        # byte: no two products of it fall on the same bit.
        self.masks = torch.tensor([3, 12, 48, -64], dtype=torch.int8).repeat_interleave(4).view(torch.int32).to(device)
        self.factors = torch.tensor([0x01041040 >> shift for shift in (0, 2, 4, 6)], dtype=torch.int32, device=device)

    def __call__(self, planes: Tensor, widths: list[tuple[int, int]]) -> Tensor:
        """planes uint8 [..., P, N, T, D / 8], zero where a token holds fewer; widths: (planes, number of tokens) of consecutive runs of
        tokens, T in all -> float32 [..., N, T, D]."""
        first, *others = planes.int().unbind(-4)
        for number, plane in enumerate(others, 1):
            first.add_(plane, alpha=1 << (8 * number))
        index = (first[..., None] & self.masks).mul_(self.factors).bitwise_right_shift_(24)
        start = 0
        for held, tokens in widths:
            index[..., start:start + tokens, :, :].add_(PATTERNS * (held - 1) + PATTERNS // 2)
            start += tokens
        return self.values.index_select(0, index.flatten()).view(torch.float32).view(*first.shape[:-1], -1)
