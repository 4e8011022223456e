"""Common baselines for quantized KV caches, for the closed loop: all of their levels used, keys before RoPE.

Each replaces a `qvg.codec.TensorCodec` and makes spans that count their own bytes. Codes have 2 or 4 bits, scales and zero points are E4M3
bytes, and levels range from the smallest to the largest value of a group (asymmetric min-max).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from ..qvg.codec import Span, TensorCodec, e4m3

GROUP = 64


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., N] below 2 ** bits -> uint8 [..., N * bits / 8]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return (codes.unflatten(-1, (-1, 8 // bits)) << shifts).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int) -> Tensor:
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> shifts) & (2**bits - 1)).flatten(-2)


@dataclass
class MinMax:
    """Values [..., N] in groups of neighbours along the last axis."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int

    @staticmethod
    def encode(x: Tensor, bits: int, group: int) -> MinMax:
        grouped = x.float().unflatten(-1, (-1, group))
        low, high = grouped.aminmax(dim=-1)
        zeros = e4m3.encode(low)
        scales = e4m3.encode(((high - e4m3.decode(zeros)) / (2**bits - 1)).clamp(min=2**-9))
        steps = (grouped - e4m3.decode(zeros)[..., None]) / e4m3.decode(scales)[..., None]
        codes = steps.round().clamp(0, 2**bits - 1).to(torch.uint8)
        return MinMax(pack(codes.flatten(-2), bits), scales, zeros, bits)

    def decode(self) -> Tensor:
        codes = unpack(self.codes, self.bits).float().unflatten(-1, (self.scales.shape[-1], -1))
        return (codes * e4m3.decode(self.scales)[..., None] + e4m3.decode(self.zeros)[..., None]).flatten(-2)


@dataclass
class MinMaxSpan(Span):
    """layout: "channels" (groups of a token's channels), "tokens" (groups of tokens of one channel) or "hadamard" (channels, rotated)."""

    data: MinMax
    layout: str
    size: tuple[int, int, int]
    codebook = None

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.size

    @property
    def bits(self) -> int:
        return self.data.bits

    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self.data.codes, "scales": self.data.scales, "zeros": self.data.zeros}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> MinMaxSpan:
        return replace(self, data=replace(self.data, **tensors))

    def decode(self, rows: slice, tables) -> Tensor:
        """float32 [T, r, D]"""
        x = self.data.decode()
        if self.layout == "tokens":
            return x.permute(2, 0, 1)[:, rows]
        x = x[:, rows]
        return x @ hadamard(x.shape[-1], x.device) if self.layout == "hadamard" else x


@cache
def hadamard(size: int, device: torch.device) -> Tensor:
    """Orthogonal and symmetric, so its own inverse; size is a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (matrix / size**0.5).to(device)


class Baseline(TensorCodec):
    """A codec without codebooks whose groups have the given layout."""

    def __init__(self, layout: str):
        self.layout = layout

    def train(self, x: Tensor, generator, previous=None) -> None:
        return None

    def encode(self, x: Tensor, bits: int, codebook=None) -> MinMaxSpan:
        """x [T, R, D] -> a span."""
        (tokens, _, dim), shape = x.shape, tuple(x.shape)
        if self.layout == "tokens":
            group = max(size for size in range(1, GROUP + 1) if tokens % size == 0 and size * bits % 8 == 0)
            return MinMaxSpan(MinMax.encode(x.permute(1, 2, 0), bits, group), self.layout, shape)
        if self.layout == "hadamard":
            x = x.float() @ hadamard(dim, x.device)
        return MinMaxSpan(MinMax.encode(x, bits, min(GROUP, dim)), self.layout, shape)

    def bytes_by_kind(self, span: MinMaxSpan) -> dict[str, int]:
        return {"planes": span.data.codes.nbytes, "scales": span.data.scales.nbytes + span.data.zeros.nbytes}


# codecs of K and V
BASELINES = {
    "RTN asymmetric": ("channels", "channels"),
    "KIVI, keys before RoPE": ("tokens", "channels"),
    "QuaRot-style Hadamard": ("hadamard", "hadamard"),
}
