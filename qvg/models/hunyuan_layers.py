"""Layers that the two sides of HunyuanVideo-1.5, text and video, have in common, and the torch layers they are made of by default.

Precision is that of the original under autocast: linear layers compute in the dtype of the latents or of the text, norms in float32, and
a norm's output is scaled and shifted in float32 by a modulation that was computed in the narrower dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .longcat import CastingLinear, Factory
from .wan import timestep_features

EPS = 1e-6


@dataclass(frozen=True)
class HunyuanSizes:
    """Sizes of a network. The released model: width 2048, 54 layers, 16 heads of 128, 8.6 billion parameters.

    inputs: channels of latents, image condition and mask together. glyph_dim, glyph_hidden: byT5's width and the hidden one of its
    mapper. image_dim: SigLIP's width.
    """

    dim: int
    head_dim: int
    ffn_dim: int
    layers: int
    channels: int = 32
    inputs: int = 65
    text_dim: int = 3584
    glyph_dim: int = 1472
    glyph_hidden: int = 2048
    image_dim: int = 1152
    freq_dim: int = 256

    @property
    def heads(self) -> int:
        return self.dim // self.head_dim


class CastingConv3d(nn.Conv3d):
    """A convolution that computes in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class CastingLayerNorm(nn.LayerNorm):
    """A LayerNorm that computes in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class CastingRMSNorm(nn.RMSNorm):
    """An RMSNorm whose weights may have another dtype than its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


TORCH = SimpleNamespace(Linear=CastingLinear, Conv3d=CastingConv3d, LayerNorm=CastingLayerNorm, RMSNorm=CastingRMSNorm,
                        Embedding=nn.Embedding)


class FeedForward(nn.Module):
    """Two layers with an activation between them."""

    def __init__(self, first: nn.Module, activation: nn.Module, second: nn.Module):
        super().__init__()
        self.fc1, self.activation, self.fc2 = first, activation, second

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class NumberEmbedding(nn.Module):
    """A timestep or an action as a vector: sinusoids through two layers."""

    def __init__(self, sizes: HunyuanSizes, make: Factory):
        super().__init__()
        self.freq_dim = sizes.freq_dim
        self.mlp = nn.Sequential(make.exact_linear(sizes.freq_dim, sizes.dim), nn.SiLU(), make.exact_linear(sizes.dim, sizes.dim))

    def forward(self, number: Tensor, dtype: torch.dtype) -> Tensor:
        """[...] -> [..., dim] in `dtype`."""
        return self.mlp(timestep_features(number, self.freq_dim).to(dtype))


def normed(norm: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A norm with weights, computed in float32."""
    return norm(x.float()).to(dtype)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x [B, F, N, dim] normed, scaled and shifted in float32, as tokens [B, F * N, dim] of the modulation's dtype."""
    out = F.layer_norm(x.float(), (x.shape[-1],), eps=EPS)
    return torch.addcmul(shift.float(), out, 1 + scale.float()).to(shift.dtype).flatten(1, 2)
