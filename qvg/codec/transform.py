"""Transform coding: each bit of a token adds or subtracts a vector.

    token = mean + scale * sum over its bits of (+1 or -1) * amplitude * component

The components are those of a `basis.Basis`, and the bits of a token come in the order of the squared error that they take away. So every
prefix of them is the best code of its length, spans hold any fraction of a bit per element, and to forget is to cut the tail off. Decoding
is one product of bits with a matrix.

Axes: T tokens, R rows (batch x heads), D channels of a head, W words of 16 bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import backends
from ..registry import CODECS
from . import basis, e4m3
from .base import LARGEST, Part, Span, SpanShape, Tables, check_largest
from .basis import Basis
from .finite import zero_nonfinite
from .plain import PlainCodec, PlainSpan
from .smoothing import row_slices
from .tensor_settings import GROUPS, PLAIN_BITS, TensorSettings
from .uniform import DEEPEST, REACHES

WORD = 16
# an id of a component is a byte
MOST_CHANNELS = 256
# with fewer tokens for each channel, a basis fits them alone
TOKENS_PER_CHANNEL = 4
# what a basis leaves beyond what it left in training counts this many times, so that one that leaves a fifth more is replaced: unlike
# centroids it takes next to no bytes, and there is no search
STRICTNESS = 2.5
# a token's scale is at least that of its largest component over half the steps of its range: the few components out of range would
# otherwise leave half of the error
HALF_STEPS = 128
# components with bits have less than this share of the largest weight of a row, those without it
WITH_BITS = 0.5


def words_of(bits: float, dim: int) -> int:
    """Words of a token that holds `bits` bits per element."""
    return -(-int(bits * dim) // WORD)


@dataclass
class TransformSpan(Span):
    """words: int16 [R, W, T], the first bit of a word is its lowest
    scales: uint8 (E4M3) [R, T], NaN where the token was not finite
    exponents: int8 [R], the power of two that multiplies the row's scales
    fit: float32 [R], mean squared error that the basis leaves of these tokens, relative to those that it was made of
    """

    words: Tensor
    scales: Tensor
    exponents: Tensor
    fit: Tensor
    width: float
    codebook: Basis
    gain: str

    @property
    def bits(self) -> float:
        return self.width

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.scales.shape[1], self.scales.shape[0], self.codebook.mean.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        return {"words": self.words, "scales": self.scales, "exponents": self.exponents, "fit": self.fit}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> TransformSpan:
        return TransformSpan(**tensors, width=self.bits, codebook=self.codebook, gain=self.gain)

    def drop(self, bits: float) -> None:
        self.words, self.width = self.words[:, :words_of(bits, self.shape[2])].clone(), bits

    def decode(self, rows: slice, tables: Tables) -> Tensor:
        return _decode([self], rows)

    def misfit(self) -> Tensor:
        fit = 1 + STRICTNESS * (self.fit.mean() - 1)
        return torch.stack([fit, torch.where((self.scales == e4m3.NAN).any(), torch.nan, fit)])


class TransformCodec(PlainCodec):
    """stages, centroids, group and symmetric of `TensorSettings` have no meaning here."""

    name = "transform"
    nested = adaptive = accumulates = True
    widths = (*reversed(PLAIN_BITS), 4, 3, 2.5, 2, 1.75, 1.5, 1.25, 1, 0.75, 0.5)

    def check_heads(self, tensor: TensorSettings, head_dim: int) -> None:
        super().check_heads(replace(tensor, group=min(GROUPS)), head_dim)
        if head_dim > MOST_CHANNELS:
            raise ValueError(f"The transform codec keeps heads of up to {MOST_CHANNELS} channels; this model's have {head_dim}.")

    def coded_parts(self, tensor: TensorSettings, bits: float, shape: SpanShape) -> dict[str, Part]:
        tokens, rows, dim = shape
        return {"words": Part(torch.int16, (rows, words_of(bits, dim), tokens), "planes"),
                "scales": Part(torch.uint8, (rows, tokens), "scales", e4m3=True),
                "exponents": Part(torch.int8, (rows,), "scales", e4m3.EXPONENTS),
                "fit": Part(torch.float32, (rows,), "scales", (0, LARGEST))}

    def make_coded(self, tensor: TensorSettings, bits: float, tensors: Mapping[str, Tensor], codebook: Basis) -> TransformSpan:
        return TransformSpan(**tensors, width=bits, codebook=codebook, gain=tensor.gain)

    def book_size(self, tensor: TensorSettings, tokens: int) -> int:
        return Basis.size

    def waits(self, tensor: TensorSettings, tokens: int, dim: int) -> bool:
        return tokens < TOKENS_PER_CHANNEL * dim

    def book_parts(self, tensor: TensorSettings, size: int | range, rows: int, dim: int) -> dict[str, Part]:
        half = torch.bfloat16
        return {"mean": Part(torch.float32, (rows, dim), "codebooks", (-LARGEST, LARGEST)),
                "vectors": Part(half, (rows, dim, dim), "codebooks", (-1, 1)),
                "deviation": Part(half, (rows, dim), "codebooks", (0, LARGEST)),
                "weight": Part(half, (rows, dim), "codebooks", (0, torch.finfo(half).max)),
                "reach": Part(torch.uint8, (rows, dim), "codebooks", (1, REACHES - 1)),
                "order": Part(torch.uint8, (rows, basis.MOST_BITS * dim), "codebooks", (0, dim - 1)),
                "seen": Part(torch.float32, (1,), "codebooks", (1, LARGEST))}

    def make_book(self, tensors: Mapping[str, Tensor]) -> Basis:
        return Basis(**tensors)

    def check_stored(self, tensors: Mapping[str, Tensor], codebook: Basis, where: str) -> None:
        most = int(torch.nn.functional.one_hot(codebook.order.long()).sum(1).max())
        if most > DEEPEST:
            raise ValueError(f"the basis of {where} gives a component {most} bits; it must be at most {DEEPEST}")
        # the largest value that the span can represent
        scale = e4m3.MAX * torch.ldexp(codebook.deviation.float().amax(-1), tensors["exponents"].int()).max().item()
        check_largest(REACHES * codebook.mean.shape[1] * scale, where)

    def train_one(self, x: Tensor, tensor: TensorSettings, iterations: int, generator: torch.Generator, previous) -> Basis:
        return basis.train([x], [int(tensor.bits * x.shape[2])], [previous])[0]

    def train(self, xs, tensors, needed, iterations, generator, previous) -> list:
        if not all(needed):
            return super().train(xs, tensors, needed, iterations, generator, previous)
        return basis.train(xs, [int(tensor.bits * x.shape[2]) for tensor, x in zip(tensors, xs)], previous)

    def encode(self, xs, tensors, bits, codebooks) -> list[Span]:
        if set(bits) & set(PLAIN_BITS):
            return super().encode(xs, tensors, bits, codebooks)
        gains = [tensor.gain for tensor in tensors]
        return backends.run("encode_transform", _encode, list(bits), gains, list(codebooks), *xs)

    def encode_one(self, x: Tensor, tensor: TensorSettings, bits: float, codebook: Basis) -> TransformSpan:
        return backends.run("encode_transform", _encode, [bits], [tensor.gain], [codebook], x)[0]

    def joins(self, a: Span, b: Span) -> bool:
        if isinstance(a, TransformSpan):
            return isinstance(b, TransformSpan) and a.codebook is b.codebook and a.bits == b.bits and a.gain == b.gain
        return super().joins(a, b)

    def decode_side(self, spans: Sequence[Span], rows: slice, tables: Tables) -> Tensor:
        if isinstance(spans[0], PlainSpan):
            return super().decode_side(spans, rows, tables)
        return _decode(spans, rows)


def _decode(spans: Sequence[TransformSpan], rows: slice) -> Tensor:
    """float32 [T of all, r, D] of spans that join the first."""
    first = spans[0]
    words = torch.cat([span.words[rows].mT for span in spans], dim=1)[..., None]
    bits = (words >> torch.arange(WORD, dtype=torch.int16, device=words.device)).bitwise_and_(1).flatten(2)
    vectors = basis.bit_vectors(first.codebook, bits.shape[2], rows, first.gain).float()
    scale = torch.cat([e4m3.decode_scales(span.scales[rows]) * e4m3.powers_of_two(span.exponents[rows, None]) for span in spans], dim=1)
    signs = bits.float().mul_(2).sub_(1)
    return torch.bmm(signs, vectors).mul_(scale[..., None]).add_(first.codebook.mean[rows, None]).transpose(0, 1)


def _encode(bits: list[float], gains: list[str], bases: list[Basis], *xs: Tensor) -> list[TransformSpan]:
    """Tensors [T, R, D] to a span each. The definition of the op `encode_transform`."""
    return [_encode_tokens(x, *of) for x, *of in zip(xs, bits, gains, bases)]


def _encode_tokens(x: Tensor, bits: float, gain: str, book: Basis) -> TransformSpan:
    tokens, rows, dim = x.shape
    width = words_of(bits, dim)
    words = torch.empty(rows, width, tokens, dtype=torch.int16, device=x.device)
    scales = torch.empty(rows, tokens, dtype=torch.uint8, device=x.device)
    exponents, fit = torch.empty(rows, dtype=torch.int8, device=x.device), torch.empty(rows, device=x.device)
    for part in row_slices(rows, 4 * tokens * (4 * dim + 2 * WORD * width)):
        kept = x[:, part].transpose(0, 1)
        bad = (kept != zero_nonfinite(kept)).any(-1)
        y = torch.bmm(zero_nonfinite(kept).float() - book.mean[part, None], book.vectors[part].float().mT)
        deviation = book.deviation[part].float()
        squares = y.square().masked_fill_(bad[..., None], 0)
        weight = book.weight[part].float()
        fit[part] = (squares.sum(1) * weight).sum(-1) / (~bad).sum(-1).clamp(min=1)
        step = 2 ** DEEPEST * 4 / (book.reach[part].float() * deviation)
        scale = torch.maximum((squares.sum(-1) / deviation.square().sum(-1, keepdim=True)).sqrt(), _least_scale(squares, step, weight))
        exponent = e4m3.row_exponents(scale.amax(1))
        scaled = e4m3.encode_scales(torch.ldexp(scale, -exponent[:, None]))
        stored = torch.ldexp(e4m3.decode(scaled), exponent[:, None])
        exponents[part], scales[part] = exponent.to(torch.int8), scaled.masked_fill_(bad, e4m3.NAN)
        z = y * torch.where(stored > 0, stored.reciprocal(), 0)[..., None]
        codes = (z * step[:, None]).floor_().clamp_(-128, 127).add_(128).to(torch.uint8)
        words[part] = _packed(codes, book.order[part, :WORD * width].long()).mT
    return TransformSpan(words, scales, exponents, fit, bits, book, gain)


def _least_scale(squares: Tensor, step: Tensor, weight: Tensor) -> Tensor:
    """Squared components [R, T, D] to the scale [R, T] below which one with bits would be too far out of its range."""
    step = torch.where(weight < WITH_BITS * weight.amax(-1, keepdim=True), step, 0)
    return (squares * step.square()[:, None]).amax(-1).sqrt_().div_(HALF_STEPS)


def _packed(codes: Tensor, order: Tensor) -> Tensor:
    """Codes uint8 [R, T, D] to the bits of components order [R, N]: int16 [R, T, N / 16]."""
    place, _ = basis.places(order)
    shift = (DEEPEST - 1 - place).to(torch.uint8)[:, None]
    bits = (codes.gather(2, order[:, None].expand(-1, codes.shape[1], -1)) >> shift).bitwise_and_(1).to(torch.int16)
    return (bits.unflatten(2, (-1, WORD)) << torch.arange(WORD, dtype=torch.int16, device=bits.device)).sum(3, dtype=torch.int16)


TRANSFORM = CODECS.register(TransformCodec())
