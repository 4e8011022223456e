"""Elements as the model made them, or as int8 with a scale: for sinks, for frames that wait for a codebook, and for no quantization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..registry import CODECS
from .base import Codec, Part, Span, SpanShape, Tables, owned
from .tensor_settings import PLAIN_BITS, TensorSettings, require

INT8_MAX = 127


@dataclass
class PlainSpan(Span):
    """Tokens as they are, or as int8 with a bfloat16 scale a group.

    data: [T, R, D] in the model's dtype, or int8
    scales: bfloat16 [T, R, G], or None for 16 bits
    """

    data: Tensor
    scales: Tensor | None = None
    codebook = None

    @property
    def bits(self) -> int:
        return 16 if self.scales is None else 8

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.data.shape)

    def tensors(self) -> dict[str, Tensor]:
        return {"data": self.data} | ({} if self.scales is None else {"scales": self.scales})

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> PlainSpan:
        return PlainSpan(**tensors)

    def decode(self, rows: slice, tables: Tables) -> Tensor:
        x = self.data[:, rows].to(torch.float32, copy=True)
        if self.scales is not None:
            x.unflatten(-1, (self.scales.shape[-1], -1)).mul_(self.scales[:, rows].float()[..., None])
        return x

    def misfit(self) -> Tensor | None:
        if self.scales is None:
            return None
        scales = self.scales.float()
        return torch.stack([torch.ones_like(scales[0, 0, 0]), scales.mean()])


def encode_int8(x: Tensor, groups: int) -> PlainSpan:
    """x [T, R, D] to int8 with the absolute maximum of a group as its scale."""
    grouped = x.float().unflatten(-1, (groups, -1))
    scale = (grouped.abs().amax(-1) / INT8_MAX).bfloat16()
    scale[scale == 0] = 1
    codes = (grouped / scale.float()[..., None]).round().clamp(-INT8_MAX, INT8_MAX)
    return PlainSpan(codes.flatten(-2).to(torch.int8), scale)


class PlainCodec(Codec):
    """8 or 16 bits for every span; the base of codecs that keep their sinks so. Those override the methods below `# other bits`."""

    name = "plain"

    def check(self, settings) -> None:
        for name, tensor in (("key", settings.key), ("value", settings.value)) if self.name == PlainCodec.name else ():
            require(tensor.bits in PLAIN_BITS,
                    f"{name} is to hold {tensor.bits} bits, but the plain codec (the preset Off) holds 8 or 16 "
                    "alone; choose one of them, or another preset.")
        super().check(settings)

    def needs_codebook(self, bits: float) -> bool:
        return bits not in PLAIN_BITS

    def span_parts(self, tensor: TensorSettings, bits: float, shape: SpanShape, dtype: torch.dtype) -> dict[str, Part]:
        if bits == 16:
            return {"data": Part(dtype, tuple(shape), "plain")}
        if bits == 8:
            scales = shape.tokens, shape.rows, tensor.groups(shape.dim)
            return {"data": Part(torch.int8, tuple(shape), "plain"), "scales": Part(torch.bfloat16, scales, "plain")}
        return self.coded_parts(tensor, bits, shape)

    def make_span(self, tensor: TensorSettings, bits: float, tensors: Mapping[str, Tensor], codebook) -> Span:
        if bits in PLAIN_BITS:
            return PlainSpan(**tensors)
        return self.make_coded(tensor, bits, tensors, codebook)

    def train(self, xs, tensors, needed, iterations, generator, previous) -> list:
        return [self.train_one(x, tensor, iterations, generator, before) if need else None
                for x, tensor, need, before in zip(xs, tensors, needed, previous)]

    def encode(self, xs, tensors, bits, codebooks) -> list[Span]:
        return [self._encode_one(x, tensor, width, book) for x, tensor, width, book in zip(xs, tensors, bits, codebooks)]

    def _encode_one(self, x: Tensor, tensor: TensorSettings, bits: float, codebook) -> Span:
        if bits == 16:
            return PlainSpan(x.clone(memory_format=torch.contiguous_format))
        if bits == 8:
            return encode_int8(x, tensor.groups(x.shape[-1]))
        return self.encode_one(x, tensor, bits, codebook)

    def joins(self, a: Span, b: Span) -> bool:
        return isinstance(a, PlainSpan) and isinstance(b, PlainSpan) and a.bits == b.bits == 16

    def decode(self, sides: Sequence[Sequence[Span]], rows: slice, tables: Tables) -> list[Tensor]:
        return [self.decode_side(spans, rows, tables) for spans in sides]

    def decode_side(self, spans: Sequence[Span], rows: slice, tables: Tables) -> Tensor:
        """Spans of K or of V that join the first, float32 [T of all, r, D]."""
        if len(spans) == 1:
            return owned(spans[0], spans[0].decode(rows, tables))
        return torch.cat([span.data[:, rows] for span in spans]).float()

    # other bits: what a codec that derives from this one defines

    def coded_parts(self, tensor: TensorSettings, bits: float, shape: SpanShape) -> dict[str, Part]:
        """`span_parts` of a span that is not plain."""
        raise NotImplementedError(f"The {self.name} codec holds 8 or 16 bits, not {bits}.")

    def make_coded(self, tensor: TensorSettings, bits: float, tensors: Mapping[str, Tensor], codebook) -> Span:
        """`make_span` of a span that is not plain."""
        raise NotImplementedError(f"The {self.name} codec holds 8 or 16 bits, not {bits}.")

    def book_parts(self, tensor: TensorSettings, size: int | range, rows: int, dim: int) -> dict[str, Part]:
        return {}

    def make_book(self, tensors: Mapping[str, Tensor]):
        return None

    def train_one(self, x: Tensor, tensor: TensorSettings, iterations: int, generator: torch.Generator, previous):
        """A codebook of x [T, R, D]; None where the codec has none."""
        return None

    def encode_one(self, x: Tensor, tensor: TensorSettings, bits: float, codebook) -> Span:
        """x [T, R, D] to a span that is not plain."""
        raise NotImplementedError(f"The {self.name} codec holds 8 or 16 bits, not {bits}.")


PLAIN = CODECS.register(PlainCodec())
