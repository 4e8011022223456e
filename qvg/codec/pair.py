"""K and V of a layer, each with its settings, through one codec: train, encode, decode, and tokens back from spans."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .. import backends
from ..registry import CODECS
from .base import Codec, Span, SpanShape, Tables
from .tensor_settings import TensorSettings


class TensorCodec:
    """A codec with the settings of K or of V. Holds no data.

    kind: name of a registered codec. iterations: k-means steps a codebook.
    Raises ValueError when the settings cannot serve heads of `head_dim` channels.
    """

    def __init__(self, kind: str, settings: TensorSettings, head_dim: int, iterations: int):
        self.codec: Codec = CODECS[kind]
        self.codec.check_heads(settings, head_dim)
        self.settings, self.iterations = settings, iterations

    def train(self, x: Tensor, generator: torch.Generator, previous=None):
        """A codebook of x [T, R, D]; previous: the codebook before, where k-means starts."""
        return self.codec.train([x], [self.settings], [True], self.iterations, generator, [previous])[0]

    def encode(self, x: Tensor, bits: float, codebook=None) -> Span:
        """x [T, R, D] to a span that holds `bits`."""
        return self.codec.encode([x], [self.settings], [bits], [codebook])[0]

    def bytes_by_kind(self, span: Span) -> dict[str, int]:
        """Bytes of a span's tensors by what the codec counts them as."""
        kinds, total = _kinds(self.codec, self.settings, span.bits, SpanShape(*span.shape)), {}
        for name, tensor in span.tensors().items():
            total[kinds[name]] = total.get(kinds[name], 0) + tensor.nbytes
        return total


@lru_cache(maxsize=4096)
def _kinds(codec: Codec, settings: TensorSettings, bits: float, shape: SpanShape) -> dict[str, str]:
    # of any dtype of the model's, which decides no kind
    return {name: part.kind for name, part in codec.span_parts(settings, bits, shape, torch.float32).items()}


def train(codecs: Sequence[TensorCodec], pair: Sequence[Tensor], needed: Sequence[bool], generator: torch.Generator,
          previous: Sequence) -> list:
    """Codebooks of K and V [T, R, D], None where none is needed."""
    if any(type(one) is not TensorCodec for one in codecs):
        return [one.train(x, generator, before) if need else None for one, x, need, before in zip(codecs, pair, needed, previous)]
    first = codecs[0]
    return first.codec.train(pair, [one.settings for one in codecs], needed, first.iterations, generator, previous)


def encode(codecs: Sequence[TensorCodec], pair: Sequence[Tensor], bits: Sequence[int], books: Sequence) -> list[Span]:
    """K and V [T, R, D] to a span each, in one go unless one of them is encoded in a way of its own."""
    if any(type(one) is not TensorCodec for one in codecs):
        return [one.encode(x, width, book) for one, x, width, book in zip(codecs, pair, bits, books)]
    return codecs[0].codec.encode(pair, [one.settings for one in codecs], bits, books)


def tokens_of(spans: Sequence[Span], tables: Tables, dtype: torch.dtype) -> list[Tensor]:
    """The tokens of every row of spans, keys before RoPE: [T, R, D] of each in the model's dtype."""
    return backends.run("recover", _tokens_of, spans, tables, torch.empty(0, dtype=dtype, device=tables.device))


def _tokens_of(spans: Sequence[Span], tables: Tables, like: Tensor) -> list[Tensor]:
    return [span.decode(slice(None), tables).to(like.dtype) for span in spans]
