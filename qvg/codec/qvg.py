"""The QVG codec: codebooks of what tokens share, scales, and nested bit planes of what is left.

Scales: the residual is divided by the codebook's channel scale, then by the root mean square of its group of channels, which is
stored as E4M3. A power of two per row puts the largest scale of the span between 128 and 256, so that none saturates at 448 however
large the values are (keys and values to 1500 occur).

Axes: T tokens, R rows (batch x heads), D channels, S stages, G scales a token. Source: QVG (arXiv 2602.02958), sections 4.1 and 4.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..registry import CODECS
from . import e4m3, planes, smoothing
from .base import LARGEST, Part, Span, SpanShape, Tables, check_ids, check_largest
from .plain import PlainCodec, PlainSpan
from .smoothing import TOKENS_PER_CENTROID, Codebook
from .tensor_settings import PLAIN_BITS, PLANE_BITS, TensorSettings

# in a file: the smallest channel scale, by which residuals are divided
SMALLEST_SCALE = 2.0**-50


class ByRow(NamedTuple):
    """Views of a span's parts as they lie in memory, kept because it is read often: planes [R, T, D / 8], scales [R, T, G] and
    ids [S, R, T]."""

    planes: list[Tensor]
    scales: Tensor
    ids: Tensor


@dataclass
class PlaneSpan(Span):
    """Residual planes under a shared codebook.

    planes: uint8 [T, R, D / 8] each, sign first
    scales: uint8 (E4M3) [T, R, G], NaN where the tokens were not finite
    exponents: int8 [R], the power of two that multiplies the row's scales
    ids: uint8 [S, T, R]
    """

    planes: list[Tensor]
    scales: Tensor
    exponents: Tensor
    ids: Tensor
    codebook: Codebook
    gain: str
    _by_row: ByRow | None = field(default=None, init=False, repr=False, compare=False)

    @staticmethod
    def empty(x: Tensor, bits: int, codebook: Codebook, groups: int, gain: str) -> PlaneSpan:
        """An uninitialized span for x [T, R, D]. The bytes of a row are contiguous, because rows are read separately."""
        tokens, rows, dim = x.shape

        def buffer(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.uint8, device=x.device).transpose(-3, -2)

        return PlaneSpan(
            planes=[buffer(rows, tokens, dim // 8) for _ in range(bits)], scales=buffer(rows, tokens, groups),
            exponents=torch.empty(rows, dtype=torch.int8, device=x.device),
            ids=torch.empty(codebook.stages, rows, tokens, dtype=torch.uint8, device=x.device).transpose(1, 2),
            codebook=codebook, gain=gain)

    @staticmethod
    def of(tensors: Mapping[str, Tensor], bits: int, codebook: Codebook, gain: str) -> PlaneSpan:
        """The inverse of `tensors`."""
        return PlaneSpan([tensors[f"plane{number}"] for number in range(bits)], tensors["scales"], tensors["exponents"], tensors["ids"],
                         codebook, gain)

    def gather_rows(self) -> PlaneSpan:
        """The same span laid out as `empty` does; in a file it is stored token by token."""
        def gathered(x: Tensor, tokens: int) -> Tensor:
            return x.transpose(tokens, tokens + 1).contiguous().transpose(tokens, tokens + 1)

        parts = [gathered(plane, 0) for plane in self.planes]
        return replace(self, planes=parts, scales=gathered(self.scales, 0), ids=gathered(self.ids, 1))

    @property
    def bits(self) -> int:
        return len(self.planes)

    @property
    def shape(self) -> tuple[int, int, int]:
        tokens, rows, octets = self.planes[0].shape
        return tokens, rows, 8 * octets

    def tensors(self) -> dict[str, Tensor]:
        named = {f"plane{number}": plane for number, plane in enumerate(self.planes)}
        return named | {"scales": self.scales, "exponents": self.exponents, "ids": self.ids}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> PlaneSpan:
        return PlaneSpan.of(tensors, self.bits, self.codebook, self.gain)

    def drop(self, bits: int) -> None:
        del self.planes[bits:]
        self._by_row = None

    @property
    def by_row(self) -> ByRow:
        if self._by_row is None:
            parts = [plane.transpose(0, 1) for plane in self.planes]
            self._by_row = ByRow(parts, self.scales.transpose(0, 1), self.ids.transpose(1, 2))
        return self._by_row

    def decode(self, rows: slice, tables: Tables) -> Tensor:
        return _decode_planes([[self]], rows, tables)[0]

    def misfit(self) -> Tensor:
        squares = (e4m3.decode_scales(self.scales) * e4m3.powers_of_two(self.exponents)[:, None]).square()
        return torch.stack([squares.nanmean(), squares.mean()])


class QVGCodec(PlainCodec):
    name = "qvg"
    nested = True
    adaptive = True
    widths = (*reversed(PLAIN_BITS), *reversed(PLANE_BITS))

    def coded_parts(self, tensor: TensorSettings, bits: int, shape: SpanShape) -> dict[str, Part]:
        tokens, rows, dim = shape
        named = {f"plane{number}": Part(torch.uint8, (tokens, rows, dim // 8), "planes") for number in range(bits)}
        return named | {
            "scales": Part(torch.uint8, (tokens, rows, tensor.groups(dim)), "scales", e4m3=True),
            "exponents": Part(torch.int8, (rows,), "scales", e4m3.EXPONENTS),
            "ids": Part(torch.uint8, (tensor.stages, tokens, rows), "ids")}

    def make_coded(self, tensor: TensorSettings, bits: int, tensors: Mapping[str, Tensor], codebook: Codebook) -> PlaneSpan:
        return PlaneSpan.of(tensors, bits, codebook, tensor.gain).gather_rows()

    def book_size(self, tensor: TensorSettings, tokens: int) -> int:
        """Centroids of a stage. With fewer tokens a centroid, a codebook memorizes its tokens instead of finding what they share."""
        return max(1, min(tensor.centroids, tokens // TOKENS_PER_CENTROID))

    def waits(self, tensor: TensorSettings, tokens: int, dim: int) -> bool:
        return bool(tensor.stages) and self.book_size(tensor, tokens) < tensor.centroids

    def book_parts(self, tensor: TensorSettings, size: int | range, rows: int, dim: int) -> dict[str, Part]:
        stages = tensor.stages
        return {
            "centroids": Part(torch.uint8, (stages, rows, size, dim), "codebooks", e4m3=True),
            "centroid_scale": Part(torch.bfloat16, (stages, rows, 1, dim), "codebooks"),
            "channel_scale": Part(torch.bfloat16, (rows, dim), "codebooks", (SMALLEST_SCALE, LARGEST))}

    def make_book(self, tensors: Mapping[str, Tensor]) -> Codebook:
        return Codebook(**tensors)

    def check_stored(self, tensors: Mapping[str, Tensor], codebook: Codebook, where: str) -> None:
        check_ids(tensors["ids"], codebook.size, where)
        # the largest value that the span can represent
        factors = torch.ldexp(codebook.channel_scale.float().amax(-1), tensors["exponents"].int())
        centroids = codebook.centroid_scale.float().abs().sum(0).max().item() if codebook.stages else 0.0
        most = e4m3.MAX * (4 * factors.max().item() + centroids)
        check_largest(most, where)

    def train(self, xs, tensors, needed, iterations, generator, previous) -> list:
        """K and V in one go where they are alike. Both ways give the same, on a GPU up to the order of additions. On a CPU one after the
        other takes less: launches cost little there, and more of the tokens stays in its caches."""
        tokens, device = xs[0].shape[0], xs[0].device
        cheap = device.type == "cpu" and backends.refusal("kmeans", device)
        if len(xs) > 1 and all(needed) and not cheap:
            alike = {(tensor.stages, self.book_size(tensor, tokens), book and book.centroids.shape)
                     for tensor, book in zip(tensors, previous)}
            if len(alike) == 1:
                stages, count, _ = alike.pop()
                return smoothing.train(list(xs), stages, count, iterations, generator, list(previous))
        return super().train(xs, tensors, needed, iterations, generator, previous)

    def train_one(self, x: Tensor, tensor: TensorSettings, iterations: int, generator: torch.Generator, previous) -> Codebook:
        return smoothing.train([x], tensor.stages, self.book_size(tensor, x.shape[0]), iterations, generator, [previous])[0]

    def encode(self, xs, tensors, bits, codebooks) -> list[Span]:
        groups = [tensor.groups(x.shape[-1]) for x, tensor in zip(xs, tensors)]
        alike = {(count, width, book.centroids.shape) for count, width, book in zip(groups, bits, codebooks) if book is not None}
        if None in codebooks or len(alike) > 1 or set(bits) & set(PLAIN_BITS):
            return super().encode(xs, tensors, bits, codebooks)
        return backends.run("encode", _encode_alike, bits[0], groups[0], [tensor.gain for tensor in tensors], list(codebooks), *xs)

    def encode_one(self, x: Tensor, tensor: TensorSettings, bits: int, codebook: Codebook) -> Span:
        return backends.run("encode", _encode_alike, bits, tensor.groups(x.shape[-1]), [tensor.gain], [codebook], x)[0]

    def joins(self, a: Span, b: Span) -> bool:
        if isinstance(a, PlaneSpan):
            same = isinstance(b, PlaneSpan) and a.codebook is b.codebook
            return same and a.scales.shape == b.scales.shape and a.gain == b.gain
        return super().joins(a, b)

    def decode(self, sides: Sequence[Sequence[Span]], rows: slice, tables: Tables) -> list[Tensor]:
        """Short spans cost more in calls than in arithmetic, so on a CPU this is several times faster than one after the other, and
        faster still where spans of equal bits follow each other."""
        firsts = [spans[0] for spans in sides]
        shapes = {(span.gain, span.scales.shape, span.codebook.centroids.shape) for span in firsts if isinstance(span, PlaneSpan)}
        if (len(shapes) == 1 and all(isinstance(span, PlaneSpan) for span in firsts)
                and all(len({span.bits for span in pair}) == 1 for pair in zip(*sides))):
            return list(_decode_planes(sides, rows, tables))
        return super().decode(sides, rows, tables)

    def decode_side(self, spans: Sequence[Span], rows: slice, tables: Tables) -> Tensor:
        if len(spans) == 1 or isinstance(spans[0], PlainSpan):
            return super().decode_side(spans, rows, tables)
        return _decode_planes([spans], rows, tables)[0]


def _decode_planes(sides: Sequence[Sequence[PlaneSpan]], rows: slice, tables: Tables) -> Tensor:
    """float32 [sides, T of all, r, D] of sides that agree in everything but their codebooks."""
    spans = [span for side in sides for span in side]
    first, parts = spans[0], [span.by_row for span in spans]
    total = len(first.exponents)
    # where few rows are left out, copying them too takes less than slicing many short spans
    sliced = 2 * len(range(total)[rows]) < total

    def joined(tensors: list[Tensor], axis: int = 0) -> Tensor:
        """The rows, which `axis` counts, of tensors that follow each other along the tokens, which the next axis counts."""
        wanted = (slice(None),) * axis + (rows,)
        if sliced:
            tensors = [tensor[wanted] for tensor in tensors]
        x = tensors[0] if len(tensors) == 1 else torch.cat(tensors, axis + 1)
        return x if sliced else x[wanted]

    most, tokens, blank = max(span.bits for span in spans), len(first.scales), torch.zeros_like(parts[0].planes[0])
    held = joined([part.planes[plane] if plane < len(part.planes) else blank for plane in range(most) for part in parts])
    widths = [(bits, tokens * len(list(run))) for bits, run in groupby(span.bits for span in sides[0])]
    levels = tables.get(("levels", first.gain), lambda device: planes.LevelTable(first.gain, device))
    x = levels(held.unflatten(1, (most, len(sides), -1)), widths)
    scale = e4m3.decode_scales(joined([part.scales for part in parts])).unflatten(1, (len(spans), -1))
    powers = e4m3.powers_of_two(torch.stack([span.exponents for span in spans], dim=1)[rows])
    scale = scale.mul_(powers[..., None, None]).unflatten(1, (len(sides), -1)).flatten(2, 3)
    x.unflatten(-1, (scale.shape[-1], -1)).mul_(scale[..., None])
    ids = joined([part.ids for part in parts], axis=1).unflatten(2, (len(sides), -1))
    return smoothing.restore_([side[0].codebook for side in sides], x, ids, rows).permute(1, 2, 0, 3)


def _encode_alike(bits: int, groups: int, gains: list[str], books: list[Codebook], *xs: Tensor) -> list[PlaneSpan]:
    """Tensors [T, R, D] that are alike, as are their codebooks -> a span with `bits` planes of each. The definition of the op `encode`."""
    return [_encode_planes(x, bits, book, groups, gain) for x, book, gain in zip(xs, books, gains)]


def _encode_planes(x: Tensor, bits: int, codebook: Codebook, groups: int, gain: str) -> PlaneSpan:
    """x [T, R, D] -> a span with `bits` planes."""
    tokens, rows, dim = x.shape
    span = PlaneSpan.empty(x, bits, codebook, groups, gain)
    for part in smoothing.row_slices(rows, 4 * tokens * (codebook.size + 5 * dim)):
        residual, ids = smoothing.subtract(x[:, part].float(), codebook, part)
        span.ids[:, :, part] = ids.transpose(1, 2)
        y = residual.transpose(0, 1) * codebook.channel_scale[part].float().reciprocal()
        grouped = y.unflatten(-1, (groups, -1))
        rms = grouped.square().mean(-1).sqrt()
        exponent = e4m3.row_exponents(rms.where(rms.isfinite(), 0).amax((0, 2)))
        span.exponents[part] = exponent.to(torch.int8)
        span.scales[:, part] = e4m3.encode_scales(torch.ldexp(rms, -exponent[:, None]))
        # planes are independent of the power of two, so that a kernel can compute them before it has seen the whole row
        scale = e4m3.rounded(rms)[..., None]
        z = (grouped * torch.where(scale > 0, scale.reciprocal(), 0)).flatten(-2)
        for stored, plane in zip(span.planes, planes.encode(z, bits)):
            stored[:, part] = plane
    return span


QVG = CODECS.register(QVGCodec())
