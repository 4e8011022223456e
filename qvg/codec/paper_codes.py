"""QVG as released (arXiv 2602.02958, package quant-videogen 0.1.0), bit for bit: for comparison.

Each stage subtracts the centroid that its id names, and the last residual is cut into blocks of neighbouring channels.
A symmetric block keeps one scale, absmax / (2^(bits-1) - 1), so that "two bits" are the three levels -1, 0 and 1 and
the fourth code is never used. An asymmetric block keeps a scale and a zero point, (max - min) / (2^bits - 1) and min,
and uses every code.

Equal bytes ask for equal rounding, and the released kernels round in places that are easy to miss:

- every stage's residual is rounded to the dtype of x before the next stage sees it (bf16 in, bf16 between stages);
- absmax is multiplied by 1 / 7 (or the span by 1 / 3 or 1 / 15) rounded to fp32, which is what their compiler makes
  of the division; where the true quotient lies half way between two E4M3 values, the product lies above it;
- scales and zero points are rounded to E4M3 first, saturating at 448, and codes are taken against the rounded ones;
- a quotient that falls half way rounds away from zero, not to even;
- a scale that underflows to zero turns an all-zero block into 0 / 0, which the clamp makes its upper limit in the
  recorded data (the decoded value is zero whatever the code);
- a block with a non-finite value reads back as NaN (the released package does not define this);
- decoding adds the centroids to the residual in fp32, first stage first, and rounds once.

Clustering is left out: the released k-means starts from the global random state and sums with float atomics, so
its centroids cannot be reproduced. Centroids and ids are arguments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import e4m3

SMALLEST_SCALE = 1e-10


@dataclass(frozen=True)
class PaperCodes:
    """The residual of T tokens in R rows, as the released package stores it.

    codes:  uint8 [T, R, D * bits / 8], the first channel in the highest bits of its byte
    scales: E4M3 bytes as uint8 [T, R, D / block]
    zeros:  like scales in the asymmetric mode, else None
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.codes, self.scales, self.zeros) if part is not None)


def encode(
    x: Tensor, centroids: Tensor, ids: Tensor, *, bits: int, block: int, symmetric: bool = True
) -> PaperCodes:
    """Quantize the residual of x after S stages of centroids.

    x: [T, R, D] bf16 or fp32, a row being one head of one batch entry.
    centroids: [S, R, C, D], ids: uint8 [S, T, R]; S may be 0.
    Raises ValueError when bits is not 2 or 4, or when block does not divide D.
    """
    _require(bits, block, x.shape[-1])
    residual = x
    for stage, names in zip(centroids, ids, strict=True):
        residual = (residual - _gather(stage, names)).to(x.dtype)
    blocks = residual.float().unflatten(-1, (-1, block))  # [T, R, D / block, block]
    if symmetric:
        top = 2 ** (bits - 1) - 1
        scales, zeros = _scale(blocks.abs().amax(-1), top), None
        codes = top + _round_away(blocks / e4m3.decode_scales(scales)[..., None]).nan_to_num(nan=top).clamp(-top, top)
    else:
        top = 2**bits - 1
        low, high = blocks.aminmax(dim=-1)
        scales, zeros = _scale(high - low, top), e4m3.encode(low)
        steps = (blocks - e4m3.decode_scales(zeros)[..., None]) / e4m3.decode_scales(scales)[..., None]
        codes = _round_away(steps).nan_to_num(nan=0).clamp(0, top)
    return PaperCodes(_pack(codes.flatten(-2).to(torch.uint8), bits), scales, zeros)


def decode(
    parts: PaperCodes, centroids: Tensor, ids: Tensor, *, bits: int, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Undo `encode`, given the same centroids and ids: [T, R, D] in dtype. The block size follows from the shapes."""
    steps = _unpack(parts.codes, bits).float().unflatten(-1, (parts.scales.shape[-1], -1))
    scales = e4m3.decode_scales(parts.scales)[..., None]
    if parts.zeros is None:
        blocks = (steps - (2 ** (bits - 1) - 1)) * scales
    else:
        blocks = steps * scales + e4m3.decode_scales(parts.zeros)[..., None]
    x = blocks.flatten(-2)
    for stage, names in zip(centroids, ids, strict=True):
        x = x + _gather(stage, names)
    return x.to(dtype)


def _gather(centroids: Tensor, ids: Tensor) -> Tensor:
    """The centroid of each token: centroids [R, C, D], ids [T, R] -> [T, R, D]."""
    rows = torch.arange(centroids.shape[0], device=centroids.device)
    return centroids[rows, ids.long()]


def _pack(codes: Tensor, bits: int) -> Tensor:
    """[..., D] codes -> [..., D * bits / 8] bytes, the first channel in the highest bits."""
    return (codes.unflatten(-1, (-1, 8 // bits)) << _shifts(bits, codes.device)).sum(-1, dtype=torch.uint8)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    return ((packed[..., None] >> _shifts(bits, packed.device)) & (2**bits - 1)).flatten(-2)


def _shifts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(8 - bits, -1, -bits, dtype=torch.uint8, device=device)


def _round_away(x: Tensor) -> Tensor:
    whole = x.abs().floor()
    return torch.copysign(whole + (x.abs() - whole >= 0.5), x)


def _scale(span: Tensor, steps: int) -> Tensor:
    reciprocal = torch.tensor(1 / steps, dtype=torch.float32, device=span.device)
    return e4m3.encode_scales((span * reciprocal).clamp_min(SMALLEST_SCALE))


def _require(bits: int, block: int, channels: int) -> None:
    if bits not in (2, 4):
        raise ValueError(f"The paper codec stores 2 or 4 bits, not {bits}. Choose 2 or 4, or the qvg codec.")
    if block < 1 or channels % block:
        raise ValueError(
            f"A head of {channels} channels cannot be cut into blocks of {block}. Choose a block that divides it."
        )
