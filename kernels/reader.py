"""Launches of `decode`: a `Reader` keeps the job table and the levels of a layer's spans between reads. Reference: `qvg.cache.read.read`.

One launch reads all spans of one kind, K and V together. A row of the table is built once and kept while its span is unchanged.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ..qvg.attention.rope import axis_dims
from ..qvg.backends import Unsupported, before_launch, launching
from ..qvg.cache.read import History
from ..qvg.codec import planes
from ..qvg.codec.paper import PaperSpan
from ..qvg.codec.plain import PlainSpan
from ..qvg.codec.qvg import PlaneSpan
from ..qvg.codec.transform import TransformSpan
from . import decode_transform
from .bit_vectors import BitVectors
from .decode import Tiling, computes_in_halves, decode_kernel
from .jobs import (
    CENTROID_SCALE,
    CENTROID_STRIDES,
    CENTROIDS,
    CHANNEL_SCALE,
    COLUMNS,
    DATA,
    DATA_STRIDES,
    EXPONENTS,
    FRAME,
    FRAMES,
    ID_STRIDES,
    IDS,
    INT8,
    MEAN,
    PAPER,
    PLAIN,
    PLANES,
    SCALE_STRIDES,
    SCALES,
    TRANSFORM,
    VECTORS,
    ZEROS,
    Kind,
    send,
)
from .tiles import HEAD_DIMS, converts_e4m3, major, no_kernel_for, platform

MAX_LEVELS = 8
# offsets within a row of a span of planes have 32 bits
MAX_TOKENS = 1 << 20
MIN_FRAMES = 64


class Angles:
    """cos and sin of all positions of a run, shared by its layers.

    table: int64 [frames + places, 4, D / 8], cos in the low half and sin in the high. The middle axis are the four channel pairs of an
    octet. A frame's row has the pairs that rotate with time, a place's row those that rotate with its line and column. Row `origin` is
    frame 0. pairs: int64 [frames + places, 2, D / 8], the same as float16, two angles in an element.
    """

    def __init__(self, rope):
        self._rope, self.frames, self.origin, self.table, self.pairs = rope, 0, 0, None, None
        # what was replaced, because the second stream may not have read it yet; lengths double, so it takes no more than what replaced it
        self._before: list[tuple[Tensor, Tensor]] = []
        self._made: torch.cuda.Event | None = None

    def reach(self, first: int, last: int, device) -> None:
        """Make the table cover frames `first` to `last`, and more, because a video grows."""
        if -self.origin <= first and last < self.frames - self.origin:
            return
        if self.table is not None:
            self._before.append((self.table, self.pairs))
        self.origin = max(self.origin, -2 * first)
        self.frames = self.origin + max(2 * last, MIN_FRAMES)
        height, width = self._rope.grid
        times = self._rope.angles(torch.arange(-self.origin, self.frames - self.origin, device=device), self._rope.dims[0])
        space = self._rope.space(device)
        table = torch.zeros(self.frames + height * width, sum(self._rope.dims) // 2, 2, device=device)
        table[:self.frames, :times.shape[1]] = torch.stack([times.cos(), times.sin()], dim=-1).float()
        table[self.frames:, times.shape[1]:] = space.movedim(0, -1)
        self.pairs = table.half().flatten(1).view(torch.int64).unflatten(1, (-1, 2)).mT.contiguous()
        self.table = table.view(torch.int64).unflatten(1, (-1, 4))[..., 0].mT.contiguous()
        if self.table.device.type == "cuda":
            self._made = torch.cuda.current_stream(device).record_event()

    def wait(self) -> None:
        """Make the current stream wait for the table: a group of heads that reads an early piece on one stream gets the table that the
        group before made on the other, for a later piece."""
        if self._made is None:
            return
        if self._made.query():
            self._made = None
        else:
            torch.cuda.current_stream(self.table.device).wait_event(self._made)


@dataclass(frozen=True)
class Row:
    """A span's row of the job table, and its levels. The reference is weak, so that the span is freed when the cache evicts it."""

    span: weakref.ref
    bits: int
    kind: Kind
    columns: list[int]
    levels: list[float]


class Reader:
    """Decodes spans given as (key span, value span, frames, position of the first frame), oldest first. It keeps addresses, not tensors."""

    def __init__(self, rope, head_dim: int, dtype: torch.dtype, device, angles: Angles | None = None):
        if head_dim not in HEAD_DIMS:
            raise Unsupported(no_kernel_for(head_dim))
        self._angles = angles or Angles(rope)
        self._rope, self._head_dim, self._dtype, self._device = rope, head_dim, dtype, torch.device(device)
        self._halves = computes_in_halves(platform(self._device), major(self._device), dtype)
        self.on_hopper = decode_transform.on_hopper(head_dim, dtype, self._device)
        self._rows: dict[int, Row] = {}
        self._places: list[tuple[int, int, int]] | None = None
        self._launches: list[tuple[tuple, Kind, Tiling, int, int, int]] = []

    def _row(self, span) -> Row | None:
        row = self._rows.get(id(span))
        return row if row is not None and row.span() is span and row.bits == span.bits else None

    def update(self, entries: list[tuple]) -> None:
        """Read these spans from now on. Raises Unsupported with the reason when the kernel cannot decode one of them."""
        places = [(id(key), id(value), position) for key, value, _, position in entries]
        if places == self._places and all(self._row(span) for entry in entries for span in entry[:2]):
            return
        self._places = None
        frame_tokens = self._rope.grid[0] * self._rope.grid[1]
        kinds, kept, start, vectors = defaultdict(list), {}, 0, BitVectors(self._head_dim, self._device)
        for key, value, frames, position in entries:
            tokens = frames * frame_tokens
            if tokens > MAX_TOKENS:
                raise Unsupported(f"a span of {tokens} tokens is longer than the {MAX_TOKENS} that the kernel's offsets allow")
            for is_value, span in enumerate((key, value)):
                row = kept[id(span)] = self._row(span) or Row(weakref.ref(span), span.bits, *_describe(span, self._dtype, self._halves))
                columns = row.columns.copy()
                columns[FRAMES.value:FRAME.value + 1] = frames, start, is_value, position
                if row.kind.code == TRANSFORM.value:
                    columns[VECTORS.value] = vectors.add(span)
                kinds[row.kind].append((columns, row.levels))
            start += tokens
        self._rows, self._launches = kept, []
        jobs = [job for same in kinds.values() for job in same]
        before = 0
        for kind, same in kinds.items():
            tile = _tiling(kind, self._head_dim, self._dtype, self._device, self.on_hopper)
            variant = "decode", kind, self._head_dim, self._dtype, self._device
            before_launch(*variant)
            self._launches.append((variant, kind, tile, before, len(same), tile.share(max(columns[FRAMES.value] for columns, _ in same))))
            before += len(same)
        if jobs:
            self._jobs = send(torch.tensor([columns for columns, _ in jobs], dtype=torch.int64), self._device)
            self._levels = send(torch.tensor([levels for _, levels in jobs], dtype=torch.float32), self._device)
            vectors.send()
            self._angles.reach(min(entry[3] for entry in entries), max(entry[3] + entry[2] for entry in entries) - 1, self._device)
        self._vectors, self._places = vectors, places

    def __call__(self, heads: slice, all_heads: int, keys: Tensor, values: Tensor) -> None:
        """Write some heads of every span to keys and values [B, T, h, D]."""
        if keys.stride() != values.stride() or keys.stride(-1) != 1 or keys.dtype != self._dtype or values.dtype != self._dtype:
            raise Unsupported(f"keys and values must be {self._dtype} with equal strides, channels last")
        self._angles.wait()
        batch, _, count, _ = keys.shape
        places, vectors = self._rope.grid[0] * self._rope.grid[1], self._vectors.make(batch, heads, all_heads, self.on_hopper)
        for variant, kind, tile, first, spans, share in self._launches:
            launching(*variant)
            if kind.code == TRANSFORM.value and self.on_hopper:
                share = decode_transform.share_of(triton.cdiv(places, tile.tokens) * count * spans * batch, self._device)
            _launch(kind, tile, (triton.cdiv(places, share * tile.tokens), count, spans * batch), self._head_dim, self._rope.dims[0] // 2, (
                self._jobs, vectors if kind.code == TRANSFORM.value else self._levels,
                self._angles.pairs if tile.halves else self._angles.table, keys, values, first, heads.start, all_heads, batch,
                *keys.stride()[:3], self._angles.origin, self._angles.frames, places, share))


def _tiling(kind: Kind, head_dim: int, dtype: torch.dtype, device: torch.device, on_hopper: bool) -> Tiling:
    name, capability = platform(device), major(device)
    if kind.code == TRANSFORM.value:
        return decode_transform.tiling(kind.bits, head_dim, name, on_hopper)
    return Tiling.of(head_dim, name, kind.bits, capability, kind.code == PLANES.value and computes_in_halves(name, capability, dtype))


def _launch(kind: Kind, tile: Tiling, grid: tuple[int, int, int], head_dim: int, time: int, arguments: tuple) -> None:
    """time: channel pairs that rotate with time. arguments: of the kernel, in order."""
    device = arguments[0].device
    native, shared = converts_e4m3(device), {"D": head_dim, "TIME": time, "num_warps": tile.warps, **tile.limits}
    if kind.code == TRANSFORM.value:
        decode_transform.launch(kind.bits, tile, grid, native, shared, arguments)
    else:
        decode_kernel[grid](
            *arguments, KIND=kind.code, BITS=kind.bits, STAGES=kind.stages, GROUPS=kind.groups, HAS_ZEROS=kind.zeros, TOKENS=tile.tokens,
            HALVES=tile.halves, NVIDIA=platform(device) == "cuda", NATIVE_E4M3=native, PREFETCH=native and kind.code == PLANES.value,
            **shared)


def read(history: History, heads: slice, keys: Tensor, values: Tensor) -> None:
    """`qvg.cache.read.read`; angles are kept for all layers of a run, the job table for the layer."""
    angles = history.run_memo.get("angles")
    if angles is None:
        angles = history.run_memo["angles"] = Angles(history.rope)
    reader = history.memo.get("reader")
    if reader is None:
        reader = history.memo["reader"] = Reader(history.rope, keys.shape[-1], keys.dtype, keys.device, angles)
    reader.update(history.held)
    try:
        reader(heads, history.heads, keys, values)
    except BaseException as error:
        # if one of several kinds failed, the next read must check all of them again
        history.memo.clear()
        if not isinstance(error, Exception) or not decode_transform.leave_hopper(reader.on_hopper, error, keys):
            raise
        read(history, heads, keys, values)


def recover(spans: list, tables, like: Tensor) -> list[Tensor]:
    """`qvg.codec.pair.tokens_of`: each span is decoded like values, without RoPE, in one launch over all its rows."""
    return [_recover(span, like.dtype, like.device) for span in spans]


def _recover(span, dtype: torch.dtype, device: torch.device) -> Tensor:
    tokens, rows, dim = span.shape
    if dim not in HEAD_DIMS:
        raise Unsupported(no_kernel_for(dim))
    if tokens > MAX_TOKENS:
        raise Unsupported(f"a span of {tokens} tokens is longer than the {MAX_TOKENS} that the kernel's offsets allow")
    kind, columns, levels = _describe(span, dtype, computes_in_halves(platform(device), major(device), dtype))
    columns[FRAMES.value:FRAME.value + 1] = 1, 0, 1, 0
    jobs = send(torch.tensor([columns], dtype=torch.int64), device)
    on_hopper = decode_transform.on_hopper(dim, dtype, device)
    if kind.code == TRANSFORM.value:
        vectors = BitVectors(dim, device)
        vectors.add(span)
        vectors.send()
        levels = vectors.make(1, slice(0, rows), rows, on_hopper)
    else:
        levels = send(torch.tensor([levels], dtype=torch.float32), device)
    tile = _tiling(kind, dim, dtype, device, on_hopper)
    share = tile.share(1)
    if kind.code == TRANSFORM.value and on_hopper:
        share = decode_transform.share_of(triton.cdiv(tokens, tile.tokens) * rows, device)
    out = torch.empty(1, tokens, rows, dim, dtype=dtype, device=device)
    before_launch("recover", kind, dim, dtype, device)
    try:
        # values use no angles, so any table is valid
        _launch(kind, tile, (triton.cdiv(tokens, share * tile.tokens), rows, 1), dim, axis_dims(dim)[0] // 2, (
            jobs, levels, jobs, out, out, 0, 0, rows, 1, *out.stride()[:3], 0, 0, tokens, share))
    except Exception as error:
        if not decode_transform.leave_hopper(on_hopper and kind.code == TRANSFORM.value, error, out):
            raise
        return _recover(span, dtype, device)
    return out[0]


def _by_bits(levels: list[float]) -> list[float]:
    """Levels in cell order as the coefficients that `octet_pairs.dequantize_pairs` uses: element n multiplies the bits set in n, of which
    the lowest is that of plane 1."""
    bits = len(levels).bit_length() - 1
    # plane 1 is the highest bit of a cell's index
    found = [levels[sum((n >> b & 1) << (bits - 1 - b) for b in range(bits))] for n in range(len(levels))]
    for b in range(bits):
        found = [(x - found[n - (1 << b)]) / 2 if n >> b & 1 else x for n, x in enumerate(found)]
    return found


def _describe(span, dtype: torch.dtype, halves: bool) -> tuple[Kind, list[int], list[float]]:
    """Kind, job row and levels of a span."""
    columns, levels = [0] * COLUMNS.value, [0.0] * MAX_LEVELS
    if isinstance(span, PlaneSpan):
        book, data, scales = span.codebook, span.planes, span.scales
        kind = Kind(PLANES.value, span.bits, book.stages, scales.shape[-1])
        if any(part.stride(0) != part.shape[-1] for part in (*data, scales)) or span.ids.stride(1) != 1:
            raise Unsupported("the bytes of a row are not contiguous in memory, as PlaneSpan.gather_rows makes them")
        found = planes.levels(span.bits, span.gain)
        levels[:len(found)] = _by_bits(found) if halves else found
        columns[CENTROID_SCALE.value] = book.centroid_scale.data_ptr()
        columns[CHANNEL_SCALE.value] = book.channel_scale.data_ptr()
        columns[EXPONENTS.value] = span.exponents.data_ptr()
    elif isinstance(span, TransformSpan):
        if not all(part.is_contiguous() for part in span.tensors().values()):
            raise Unsupported("the words of a span are not contiguous in memory")
        kind, book, data, scales = Kind(TRANSFORM.value, span.words.shape[1]), span.codebook, [span.words], span.scales
        columns[EXPONENTS.value], columns[MEAN.value] = span.exponents.data_ptr(), book.mean.data_ptr()
    elif isinstance(span, PaperSpan):
        book, data, scales = span.codebook, [span.codes.codes], span.codes.scales
        zeros = span.codes.zeros
        kind = Kind(PAPER.value, span.bits, len(book.centroids), scales.shape[-1], zeros is not None)
        columns[ZEROS.value] = 0 if zeros is None else zeros.data_ptr()
    elif isinstance(span, PlainSpan):
        book, data, scales = None, [span.data], span.scales
        if scales is None and span.data.dtype != dtype:
            raise Unsupported(f"a plain span holds {span.data.dtype}, the workspace {dtype}")
        kind = Kind(PLAIN.value) if scales is None else Kind(INT8.value, groups=scales.shape[-1])
    else:
        raise Unsupported(f"a {type(span).__name__} has no kernel")
    for number, part in enumerate(data):
        columns[DATA.value + number] = part.data_ptr()
    columns[DATA_STRIDES.value:SCALE_STRIDES.value] = data[0].stride()[:2]
    if scales is not None:
        columns[SCALES.value] = scales.data_ptr()
        columns[SCALE_STRIDES.value:ID_STRIDES.value] = scales.stride()[:2]
    if kind.stages:
        columns[IDS.value], columns[CENTROIDS.value] = span.ids.data_ptr(), book.centroids.data_ptr()
        columns[ID_STRIDES.value:CENTROID_STRIDES.value] = span.ids.stride()
        columns[CENTROID_STRIDES.value:MEAN.value] = book.centroids.stride()[:2]
    return kind, columns, levels
