"""A uniform quantizer of a unit Gaussian whose bits are signs of amplitudes.

With b bits the range from -reach to reach is cut into 2^b cells of equal width, and each further bit splits every cell in two. So a value
is a sum of amplitudes, each added or subtracted by one bit. Up to four bits the amplitudes are those with least squared error; from five
bits on the cells' middles are as good and do not depend on the distribution.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

DEEPEST = 8
FITTED = 4
# reaches are whole eighths, and all of them are below this many
REACHES = 33
# in eighths: the reach with least squared error with 0 to 8 bits
REACH = (16, 16, 17, 19, 21, 24, 27, 30, 32)


@lru_cache(maxsize=4)
def amplitudes(gain: str) -> Tensor:
    """float32 [33, 9, 8]: for a reach in eighths and a number of bits, the amplitude of each bit, that of the sign first.

    gain: see `TensorSettings`; it scales the amplitudes of up to four bits.
    """
    table = torch.zeros(REACHES, DEEPEST + 1, DEEPEST)
    for reach in range(1, REACHES):
        for bits in range(1, DEEPEST + 1):
            table[reach, bits, :bits] = torch.tensor(_amplitudes(reach / 8, bits, gain))
    return table


@lru_cache(maxsize=1)
def distortions() -> tuple[float, ...]:
    """Mean squared error of a unit Gaussian that is quantized with 0 to 8 bits, at the best reach."""
    return 1.0, *(_fit(REACH[bits] / 8, bits)[1] for bits in range(1, DEEPEST + 1))


@lru_cache(maxsize=8)
def tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """`distortions` and REACH on a device, kept because a copy would wait for all that the device has to do."""
    return torch.tensor(distortions(), device=device), torch.tensor(REACH, device=device)


def _amplitudes(reach: float, bits: int, gain: str) -> list[float]:
    if bits > FITTED:
        return [reach / 2 ** (place + 1) for place in range(bits)]
    found, error, energy = _fit(reach, bits)
    factor = {"mse": 1.0, "energy": energy ** -0.5, "unbiased": 2 / (1 - error + energy)}[gain]
    return [factor * amplitude for amplitude in found]


def _fit(reach: float, bits: int) -> tuple[list[float], float, float]:
    """Amplitudes with least squared error, that error, and the mean square of the values they represent."""
    cells = 2 ** (bits - 1)
    borders = torch.arange(cells + 1, dtype=torch.float64) * (reach / cells)
    borders[-1] = torch.inf
    below, density = torch.special.ndtr(borders), torch.exp(-borders.square() / 2) / (2 * torch.pi) ** 0.5
    # of the positive half: probability of each cell, and its mean times that
    mass, moment = below.diff(), -density.diff()
    cell, places = torch.arange(cells), torch.arange(1, bits)
    signs = torch.cat([torch.ones(1, cells), ((cell >> (bits - 1 - places[:, None])) & 1) * 2 - 1]).double()
    normal, target = (signs * mass) @ signs.T, signs @ moment
    found = torch.linalg.solve(normal, target)
    energy = 2 * float(found @ normal @ found)
    return found.tolist(), 1 - 4 * float(found @ target) + energy, energy
