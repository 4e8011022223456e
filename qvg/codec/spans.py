"""Encode tokens to a span, decode a span to tokens: the two words that everything else uses.

A **span** is what one chunk of video adds to one layer's K or V. There are three kinds with one interface: `PlaneSpan` (codebooks,
scales and bit planes), `PlainSpan` (16 or 8 bits, for sinks and for no quantization at all) and `PaperSpan` (QVG as released). Each
counts its own bytes from its tensors, by kind, and can be decoded for any slice of its rows.

Axes: T tokens, R rows (batch x heads), D channels, S stages, G scales a token.

Scales: the residual is divided by the channel scale of its epoch, then by the root mean square of its group of channels, which is
stored as E4M3. A power of two per row puts the largest scale of the span between 128 and 256, so that none saturates at 448 however
large the values are (keys and values to 1500 occur).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import dispatch
from ..settings import PLAIN_BITS, TensorSettings
from . import e4m3, planes, smoothing
from . import paper_codes as paper
from .finite import tame
from .smoothing import Codebook

INT8_MAX = 127


class LevelTables:
    """The lookup tables of one cache, made as they are asked for; they live as long as the cache does."""

    def __init__(self, device):
        self.device = device
        self._tables: dict[str, planes.LevelTable] = {}

    def __call__(self, gain: str) -> planes.LevelTable:
        if gain not in self._tables:
            self._tables[gain] = planes.LevelTable(gain, self.device)
        return self._tables[gain]


class ByRow(NamedTuple):
    """A span's parts as they lie in memory, made once because it is read often: views of planes [R, T, D / 8], scales [R, T, G] and
    ids [S, R, T], which take no memory of their own."""

    planes: list[Tensor]
    scales: Tensor
    ids: Tensor


@dataclass
class PlaneSpan:
    """Residual planes under a shared codebook.

    planes: uint8 [T, R, D / 8] each, sign first
    scales: uint8 (E4M3) [T, R, G], NaN where the tokens held what is no number
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
        """Room for x [T, R, D], uninitialized. What belongs to a row lies together in memory, because rows are read by themselves."""
        tokens, rows, dim = x.shape

        def room(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.uint8, device=x.device).transpose(-3, -2)

        return PlaneSpan(
            planes=[room(rows, tokens, dim // 8) for _ in range(bits)], scales=room(rows, tokens, groups),
            exponents=torch.empty(rows, dtype=torch.int8, device=x.device),
            ids=torch.empty(codebook.stages, rows, tokens, dtype=torch.uint8, device=x.device).transpose(1, 2),
            codebook=codebook, gain=gain)

    def gather_rows(self) -> PlaneSpan:
        """The same span laid out as `empty` does; from a file it comes token by token."""
        def gathered(x: Tensor, tokens: int) -> Tensor:
            return x.transpose(tokens, tokens + 1).contiguous().transpose(tokens, tokens + 1)

        parts = [gathered(plane, 0) for plane in self.planes]
        return replace(self, planes=parts, scales=gathered(self.scales, 0), ids=gathered(self.ids, 1))

    @property
    def bits(self) -> int:
        return len(self.planes)

    @property
    def shape(self) -> tuple[int, int, int]:
        """T, R, D"""
        tokens, rows, octets = self.planes[0].shape
        return tokens, rows, 8 * octets

    def bytes_by_kind(self) -> dict[str, int]:
        return {"planes": sum(p.nbytes for p in self.planes), "scales": self.scales.nbytes + self.exponents.nbytes,
                "ids": self.ids.nbytes}

    def drop(self, bits: int) -> None:
        """Forget all but the first `bits` planes; their memory is given back at once."""
        del self.planes[bits:]
        self._by_row = None

    @property
    def by_row(self) -> ByRow:
        if self._by_row is None:
            parts = [plane.transpose(0, 1) for plane in self.planes]
            self._by_row = ByRow(parts, self.scales.transpose(0, 1), self.ids.transpose(1, 2))
        return self._by_row

    def decode(self, rows: slice, tables: LevelTables) -> Tensor:
        """float32 [T, r, D]"""
        return _decode_planes([[self]], rows, tables)[0]


@dataclass
class PlainSpan:
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
        """T, R, D"""
        return tuple(self.data.shape)

    def bytes_by_kind(self) -> dict[str, int]:
        return {"plain": self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)}

    def decode(self, rows: slice, tables: LevelTables) -> Tensor:
        """float32 [T, r, D]"""
        # what is decoded is overwritten, and this must not be
        x = self.data[:, rows].to(torch.float32, copy=True)
        if self.scales is not None:
            x.unflatten(-1, (self.scales.shape[-1], -1)).mul_(self.scales[:, rows].float()[..., None])
        return x


@dataclass
class PaperSpan:
    """QVG as released: packed integer codes over bf16 centroids.

    codes: what `paper.encode` gives; ids: uint8 [S, T, R]
    """

    codes: paper.PaperCodes
    ids: Tensor
    codebook: PaperCodebook
    bits: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """T, R, D"""
        tokens, rows, packed = self.codes.codes.shape
        return tokens, rows, 8 * packed // self.bits

    def bytes_by_kind(self) -> dict[str, int]:
        return {"planes": self.codes.codes.nbytes, "scales": self.codes.nbytes - self.codes.codes.nbytes,
                "ids": self.ids.nbytes}

    def decode(self, rows: slice, tables: LevelTables) -> Tensor:
        """float32 [T, r, D]; the values are the released package's bf16 ones"""
        zeros = None if self.codes.zeros is None else self.codes.zeros[:, rows]
        codes = paper.PaperCodes(self.codes.codes[:, rows], self.codes.scales[:, rows], zeros)
        return paper.decode(codes, self.codebook.centroids[:, rows], self.ids[:, :, rows], bits=self.bits).float()


@dataclass(frozen=True)
class PaperCodebook:
    """centroids: bfloat16 [S, R, C, D]"""

    centroids: Tensor

    @property
    def nbytes(self) -> int:
        return self.centroids.nbytes


Span = PlaneSpan | PlainSpan | PaperSpan


class Misfit:
    """What the codebooks of a span of K and of V leave of it, in units of what they left of the tokens they were trained on.

    value: mean square of the token scales, the larger of both; 1 of spans without planes. broken: whether a token of a span that has scales
    was no number; None while nobody knows. On a GPU both are on their way to the host until the value is asked for.
    """

    def __init__(self, spans: list[Span]):
        # other codecs, such as those of a benchmark, have no scales that are known here
        found = [_mean_squares(span) for span in spans if isinstance(span, Span) and span.bits < 16]
        self._found, self._event = torch.stack(found).amax(0) if found else None, None
        if found and self._found.device.type == "cuda":
            host = torch.empty(2, pin_memory=True)
            host.copy_(self._found, non_blocking=True)
            self._found, self._event = host, torch.cuda.current_stream(self._found.device).record_event()

    @property
    def value(self) -> float:
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return 1.0 if self._found is None else float(self._found[0])

    @property
    def broken(self) -> bool | None:
        if self._found is None:
            return False
        if self._found.device.type != "cpu" or (self._event is not None and not self._event.query()):
            return None
        return not math.isfinite(self._found[1])


def _mean_squares(span: Span) -> Tensor:
    """float32 [2]: of a span's scales without those that are no numbers, of which nothing is known, 1 where there are no planes; and of all
    of its scales."""
    if isinstance(span, PlaneSpan):
        squares = (e4m3.decode_scales(span.scales) * _powers_of_two(span.exponents)[:, None]).square()
        return torch.stack([squares.nanmean(), squares.mean()])
    scales = e4m3.decode_scales(span.codes.scales) if isinstance(span, PaperSpan) else span.scales.float()
    return torch.stack([torch.ones_like(scales[0, 0, 0]), scales.mean()])


def _powers_of_two(exponents: Tensor) -> Tensor:
    """int8 -> float32, exactly."""
    return exponents.int().add_(127).bitwise_left_shift_(23).view(torch.float32)


def like(a: Span, b: Span) -> bool:
    """Whether `decode` can take two spans of one tensor in one go."""
    if type(a) is not type(b) or a.codebook is not b.codebook:
        return False
    if isinstance(a, PlaneSpan):
        return a.scales.shape == b.scales.shape and a.gain == b.gain
    return isinstance(a, PlainSpan) and a.bits == b.bits == 16


def decode(sides: list[list[Span]], rows: slice, tables: LevelTables) -> list[Tensor]:
    """K and V, each given as spans that are all `like` the first: float32 [T of all, r, D] of each.

    Short spans cost more in calls than in arithmetic, so on a CPU this is several times faster than one after the other, and faster
    still where spans of equal bits follow each other.
    """
    firsts = [spans[0] for spans in sides]
    shapes = {(span.gain, span.scales.shape, span.codebook.centroids.shape) for span in firsts if isinstance(span, PlaneSpan)}
    if (len(shapes) == 1 and all(isinstance(span, PlaneSpan) for span in firsts)
            and all(len({span.bits for span in pair}) == 1 for pair in zip(*sides))):
        return list(_decode_planes(sides, rows, tables))
    return [_decode_side(spans, rows, tables) for spans in sides]


def _decode_side(spans: list[Span], rows: slice, tables: LevelTables) -> Tensor:
    if len(spans) == 1:
        return spans[0].decode(rows, tables)
    if isinstance(spans[0], PlainSpan):
        return torch.cat([span.data[:, rows] for span in spans]).float()
    return _decode_planes([spans], rows, tables)[0]


def _decode_planes(sides: list[list[PlaneSpan]], rows: slice, tables: LevelTables) -> Tensor:
    """float32 [sides, T of all, r, D] of sides that agree in everything but their codebooks."""
    spans = [span for side in sides for span in side]
    first, parts = spans[0], [span.by_row for span in spans]
    total = len(first.exponents)
    # where few rows are left out, to copy them too takes less than to slice many short spans
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
    x = tables(first.gain)(held.unflatten(1, (most, len(sides), -1)), widths)
    scale = e4m3.decode_scales(joined([part.scales for part in parts])).unflatten(1, (len(spans), -1))
    powers = _powers_of_two(torch.stack([span.exponents for span in spans], dim=1)[rows])
    scale = scale.mul_(powers[..., None, None]).unflatten(1, (len(sides), -1)).flatten(2, 3)
    x.unflatten(-1, (scale.shape[-1], -1)).mul_(scale[..., None])
    ids = joined([part.ids for part in parts], axis=1).unflatten(2, (len(sides), -1))
    return smoothing.restore([side[0].codebook for side in sides], x, ids, rows).permute(1, 2, 0, 3)


class TensorCodec:
    """Trains, encodes and ages one of the two tensors as its settings say. Holds no data.

    Raises ValueError when the settings cannot serve heads of `head_dim` channels.
    """

    def __init__(self, kind: str, settings: TensorSettings, head_dim: int, iterations: int):
        if head_dim % 8:
            raise ValueError(f"A byte of a plane holds 8 channels, so a head dim of {head_dim} cannot be packed; "
                             "it must be a multiple of 8.")
        self.kind = kind
        self.settings = settings
        self.groups = settings.groups(head_dim)
        self.iterations = iterations

    def needs_codebook(self, bits: int) -> bool:
        return bits not in PLAIN_BITS

    def train(self, x: Tensor, generator: torch.Generator, previous=None) -> Codebook | PaperCodebook:
        """A codebook of x [T, R, D]. `previous`, the epoch before, is where k-means starts."""
        count = self.settings.codebook_size(x.shape[0], self.kind)
        if self.kind == "paper":
            return _train_paper(x.bfloat16(), self.settings.stages, count, self.iterations, generator)
        return smoothing.train([x], self.settings.stages, count, self.iterations, generator, [previous])[0]

    def encode(self, x: Tensor, bits: int, codebook=None) -> Span:
        """x [T, R, D] -> a span that holds `bits`; codebook is needed unless bits is 8 or 16."""
        if bits == 16:
            return PlainSpan(x.clone(memory_format=torch.contiguous_format))
        if bits == 8:
            return _encode_int8(x, self.groups)
        if self.kind == "paper":
            x = x.bfloat16()
            ids = _paper_ids(x, codebook.centroids)
            codes = paper.encode(x, codebook.centroids, ids, bits=bits, block=min(self.settings.group, x.shape[-1]),
                                 symmetric=self.settings.symmetric)
            return PaperSpan(codes, ids, codebook, bits)
        return dispatch.run("encode", _encode_alike, bits, self.groups, [self.settings.gain], [codebook], x)[0]


def tokens_of(spans: list[Span], tables: LevelTables, dtype: torch.dtype) -> list[Tensor]:
    """The tokens of every row of spans, keys before RoPE: [T, R, D] of each in the dtype of the model."""
    return dispatch.run("recover", _tokens_of, spans, tables, torch.empty(0, dtype=dtype, device=tables.device))


def _tokens_of(spans: list[Span], tables: LevelTables, like: Tensor) -> list[Tensor]:
    return [span.decode(slice(None), tables).to(like.dtype) for span in spans]


def train(codecs: list[TensorCodec], pair: list[Tensor], needs: list[bool], generator: torch.Generator, previous: list) -> list:
    """Codebooks of K and V [T, R, D], None where none is needed: at once where they are alike, else as `TensorCodec.train` does each.

    Both ways give the same, on a GPU up to the order of additions. On a CPU each by itself takes less: launches cost little there, and
    more of the tokens stays in its caches.
    """
    tokens, device = pair[0].shape[0], pair[0].device
    cheap = device.type == "cpu" and dispatch.refusal("kmeans", device)
    if all(needs) and not cheap and {codec.kind for codec in codecs} == {"qvg"}:
        alike = {(codec.settings.stages, codec.settings.codebook_size(tokens), codec.iterations, book and book.centroids.shape)
                 for codec, book in zip(codecs, previous)}
        if len(alike) == 1:
            stages, count, iterations, _ = alike.pop()
            return smoothing.train(pair, stages, count, iterations, generator, previous)
    return [codec.train(x, generator, book) if needed else None for codec, x, book, needed in zip(codecs, pair, previous, needs)]


def encode(codecs: list[TensorCodec], pair: list[Tensor], bits: list[int], books: list) -> list[Span]:
    """K and V [T, R, D] at once, where one call can do both; otherwise as `TensorCodec.encode` does each."""
    alike = {(codec.kind, codec.groups, width, book.centroids.shape) for codec, width, book in zip(codecs, bits, books) if book is not None}
    if None in books or len(alike) > 1 or codecs[0].kind == "paper" or set(bits) & set(PLAIN_BITS):
        return [codec.encode(x, width, book) for codec, x, width, book in zip(codecs, pair, bits, books)]
    return dispatch.run("encode", _encode_alike, bits[0], codecs[0].groups, [codec.settings.gain for codec in codecs], books, *pair)


def _encode_alike(bits: int, groups: int, gains: list[str], books: list[Codebook], *xs: Tensor) -> list[PlaneSpan]:
    """Tensors [T, R, D] that are alike, as are their codebooks -> a span with `bits` planes of each."""
    return [_encode_planes(x, bits, book, groups, gain) for x, book, gain in zip(xs, books, gains)]


def _encode_int8(x: Tensor, groups: int) -> PlainSpan:
    grouped = x.float().unflatten(-1, (groups, -1))
    scale = (grouped.abs().amax(-1) / INT8_MAX).bfloat16()
    scale[scale == 0] = 1
    codes = (grouped / scale.float()[..., None]).round().clamp(-INT8_MAX, INT8_MAX)
    return PlainSpan(codes.flatten(-2).to(torch.int8), scale)


def _encode_planes(x: Tensor, bits: int, codebook: Codebook, groups: int, gain: str) -> PlaneSpan:
    """x [T, R, D] -> a span with `bits` planes."""
    tokens, rows, dim = x.shape
    span = PlaneSpan.empty(x, bits, codebook, groups, gain)
    count = codebook.centroids.shape[2]
    for part in smoothing.row_slices(rows, 4 * tokens * (count + 5 * dim)):
        residual, ids = smoothing.subtract(x[:, part].float(), codebook, part)
        span.ids[:, :, part] = ids.transpose(1, 2)
        y = residual.transpose(0, 1) * codebook.channel_scale[part].float().reciprocal()
        grouped = y.unflatten(-1, (groups, -1))
        rms = grouped.square().mean(-1).sqrt()
        # frexp: largest = mantissa * 2 ** exponent with the mantissa in [0.5, 1), so that the row's largest scale is in [128, 256)
        exponent = torch.frexp(rms.where(rms.isfinite(), 0).amax((0, 2))).exponent.clamp(-100, 100) - 8
        span.exponents[part] = exponent.to(torch.int8)
        span.scales[:, part] = e4m3.encode_scales(torch.ldexp(rms, -exponent[:, None]))
        # planes take no notice of the power of two, so that a kernel knows them before it has seen the whole row
        scale = e4m3.rounded(rms)[..., None]
        z = (grouped * torch.where(scale > 0, scale.reciprocal(), 0)).flatten(-2)
        for stored, plane in zip(span.planes, planes.encode(z, bits)):
            stored[:, part] = plane
    return span


def _train_paper(x: Tensor, stages: int, count: int, iterations: int, generator: torch.Generator) -> PaperCodebook:
    """bf16 codebooks of x [T, R, D] bf16. The residual between stages is rounded to bf16, as the released package does."""
    residual, found = tame(x).transpose(0, 1), []
    for start in smoothing.draw(x.shape[0], count, stages, generator, x.device):
        values = smoothing.kmeans(residual, residual[:, start].float(), iterations).bfloat16()
        found.append(values)
        ids = smoothing.assign(residual.float(), values.float())
        residual = residual - smoothing.gather_centroids(values, ids)
    return PaperCodebook(torch.stack(found) if found else x.new_empty(0, x.shape[1], 0, x.shape[2]))


def _paper_ids(x: Tensor, centroids: Tensor) -> Tensor:
    """Nearest ids uint8 [S, T, R] of x [T, R, D] bf16, stage after stage."""
    residual, found = x.transpose(0, 1), []
    for values in centroids:
        ids = smoothing.assign(residual.float(), values.float())
        found.append(ids.transpose(0, 1).to(torch.uint8))
        residual = residual - smoothing.gather_centroids(values, ids)
    return torch.stack(found) if found else torch.empty(0, *x.shape[:2], dtype=torch.uint8, device=x.device)
