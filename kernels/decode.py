"""Decode spans into the workspace: planes, scales, the centroids of every stage, and RoPE for K, in one pass.

Twin: `qvg.cache.LayerCache.read`. A `Reader` keeps one row of addresses, strides and levels per span, so that one launch
covers all spans of one kind, K and V together: spans of different lengths, epochs and codebook sizes differ only in
their rows. Kinds that need other code (another number of planes, 8-bit sinks, paper mode) take a launch each.

A program decodes one head over `TOKENS * STEPS` tokens, a tile of TOKENS at a time. The head stays the same so that
its codebook stays in the L1 cache, where the centroids are gathered from.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..qvg import planes
from ..qvg.codec import PaperSpan, PlainSpan, PlaneSpan
from ..qvg.dispatch import Unsupported
from .tiles import (
    HEAD_DIMS,
    converts_e4m3,
    e4m3_to_float32,
    no_kernel_for,
    power_of_two,
    repeat2,
    repeat4,
    repeat8,
    round_to_bfloat16,
)

PLANES, PAPER, INT8, PLAIN = (tl.constexpr(kind) for kind in range(4))
MAX_LEVELS = 8
# positions are divided in float32, which tells neighbouring tokens apart up to here
MAX_TOKENS = 1 << 20
MIN_FRAMES = 64

# columns of a job: addresses, then sizes and places, then strides in elements
DATA = tl.constexpr(0)  # four planes, or packed codes, or plain numbers in the first
SCALES = tl.constexpr(4)
ZEROS = tl.constexpr(5)
IDS = tl.constexpr(6)
CENTROIDS = tl.constexpr(7)
CENTROID_SCALE = tl.constexpr(8)
CHANNEL_SCALE = tl.constexpr(9)
EXPONENTS = tl.constexpr(10)
COUNT = tl.constexpr(11)  # tokens of the span
START = tl.constexpr(12)  # its first token in the workspace
IS_VALUE = tl.constexpr(13)
FRAME = tl.constexpr(14)  # position of its first frame
DATA_STRIDES = tl.constexpr(15)  # token, row
SCALE_STRIDES = tl.constexpr(17)  # token, row
ID_STRIDES = tl.constexpr(19)  # stage, token, row
CENTROID_STRIDES = tl.constexpr(22)  # stage, row
COLUMNS = tl.constexpr(24)


@dataclass(frozen=True)
class Kind:
    """What the compiler must know of a span: spans that agree in it share a launch."""

    code: int
    bits: int = 0
    stages: int = 0
    groups: int = 1
    zeros: bool = False


@dataclass(frozen=True)
class Tiling:
    """tokens: of a tile, chosen so that a thread holds eight channels; steps: tiles of a program."""

    tokens: int
    steps: int
    warps: int

    @staticmethod
    def of(head_dim: int) -> Tiling:
        return Tiling(tokens=2048 // head_dim, steps=8, warps=8)


@triton.jit
def _address(job, COLUMN: tl.constexpr, dtype: tl.constexpr):
    """A pointer out of the job table; torch aligns what it allocates, which the compiler cannot know."""
    return tl.multiple_of(tl.load(job + COLUMN).to(tl.pointer_type(dtype)), 16)


@triton.jit
def _bits(plane, offsets, mask, ROWS: tl.constexpr, COLS: tl.constexpr, GROUPS: tl.constexpr):
    """One plane as bool [ROWS, GROUPS, channels of a group]."""
    packed = tl.load(plane + offsets, mask=mask, other=0).to(tl.int32)
    bits = ((repeat8(packed, ROWS, COLS // 8) >> (tl.arange(0, COLS) % 8)[None, :]) & 1) != 0
    return tl.reshape(bits, (ROWS, GROUPS, COLS // GROUPS))


@triton.jit
def _pair(angles, pair, frame, line, column, mask, PAIRS: tl.constexpr, TIME: tl.constexpr, SPACE: tl.constexpr):
    row = tl.where(pair < TIME, frame, tl.where(pair < TIME + SPACE, line, column))
    return tl.load(angles + row * PAIRS + pair, mask=mask, other=0)


@triton.jit
def _turns(angles, frame, line, column, mask, ROWS: tl.constexpr, PAIRS: tl.constexpr, TIME: tl.constexpr,
           SPACE: tl.constexpr):
    """cos and sin [ROWS, PAIRS] from a table of pairs (cos, sin) held as one int64 each.

    frame, line and column [ROWS, 1] are the table's rows for channel pairs that turn with that axis.
    """
    pair = 4 * tl.arange(0, PAIRS // 4)[None, :]
    p0 = _pair(angles, pair, frame, line, column, mask, PAIRS, TIME, SPACE)
    p1 = _pair(angles, pair + 1, frame, line, column, mask, PAIRS, TIME, SPACE)
    p2 = _pair(angles, pair + 2, frame, line, column, mask, PAIRS, TIME, SPACE)
    p3 = _pair(angles, pair + 3, frame, line, column, mask, PAIRS, TIME, SPACE)
    both = tl.reshape(tl.join(tl.join(p0, p2), tl.join(p1, p3)), (ROWS, PAIRS))
    return both.to(tl.int32).to(tl.float32, bitcast=True), (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)


# numbers that change during a video would each be compiled for anew
@triton.jit(do_not_specialize=["first_job", "first_head", "all_heads", "heads", "rows", "origin", "frames", "height", "width"])
def decode_kernel(
    jobs, levels, angles, keys, values,
    first_job, first_head, all_heads, heads, rows, batch_stride, token_stride, head_stride, origin, frames, height, width,
    KIND: tl.constexpr, BITS: tl.constexpr, STAGES: tl.constexpr, GROUPS: tl.constexpr, HAS_ZEROS: tl.constexpr,
    D: tl.constexpr, TIME: tl.constexpr, SPACE: tl.constexpr, TOKENS: tl.constexpr, STEPS: tl.constexpr,
    NATIVE_E4M3: tl.constexpr,
):
    """One head of TOKENS * STEPS tokens of one span. Grid: (blocks of tokens of the longest span, batch * heads, spans)."""
    number = first_job + tl.program_id(2)
    job = jobs + number * COLUMNS
    first = tl.program_id(0) * (TOKENS * STEPS)
    count = tl.load(job + COUNT).to(tl.int32)
    if first >= count:
        return
    first64 = first.to(tl.int64)
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    row = (batch * all_heads + first_head + head).to(tl.int64)
    channel = tl.arange(0, D)[None, :]
    across = tl.zeros((TOKENS, 1), tl.int32) + channel
    dtype: tl.constexpr = keys.dtype.element_ty

    is_value = tl.load(job + IS_VALUE) != 0
    out = tl.where(is_value, values.to(tl.int64), keys.to(tl.int64)).to(tl.pointer_type(dtype))
    out = tl.multiple_of(out, 16)
    out += batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride
    out += (tl.load(job + START) + first64) * token_stride

    # bases are 64 bits wide and stand at the block's first token, so that 32 bits reach the rest of it. All of a job that
    # the loop needs is read before it: the stores inside would make the compiler read it again
    data_token = tl.load(job + DATA_STRIDES)
    data_row = row * tl.load(job + DATA_STRIDES + 1) + first64 * data_token
    data_token = data_token.to(tl.int32)
    if KIND == PLAIN:
        data = _address(job, DATA, dtype) + data_row
    elif KIND == INT8:
        data = _address(job, DATA, tl.int8) + data_row
    else:
        data = _address(job, DATA, tl.uint8) + data_row
    if KIND == PLANES:
        plane1 = _address(job, DATA + (1 if BITS > 1 else 0), tl.uint8) + data_row
        plane2 = _address(job, DATA + (2 if BITS > 2 else 0), tl.uint8) + data_row
        plane3 = _address(job, DATA + (3 if BITS > 3 else 0), tl.uint8) + data_row
        level = levels + number * 8
        l0, l1, l2, l3 = tl.load(level), tl.load(level + 1), tl.load(level + 2), tl.load(level + 3)
        l4, l5, l6, l7 = tl.load(level + 4), tl.load(level + 5), tl.load(level + 6), tl.load(level + 7)
        unit = power_of_two(tl.load(_address(job, EXPONENTS, tl.int8) + row))
        channels = tl.load(_address(job, CHANNEL_SCALE, tl.bfloat16) + row * D + across).to(tl.float32) * unit
    if KIND != PLAIN:
        scale_token = tl.load(job + SCALE_STRIDES)
        scales = _address(job, SCALES, tl.bfloat16 if KIND == INT8 else tl.uint8)
        scale_row = row * tl.load(job + SCALE_STRIDES + 1) + first64 * scale_token
        scale_token = scale_token.to(tl.int32)
        scales += scale_row
        group = tl.arange(0, GROUPS)[None, :]
        if HAS_ZEROS:
            zeros = _address(job, ZEROS, tl.uint8) + scale_row
    if STAGES > 0:
        id_token = tl.load(job + ID_STRIDES + 1)
        id_stage = tl.load(job + ID_STRIDES)
        ids = _address(job, IDS, tl.uint8) + row * tl.load(job + ID_STRIDES + 2) + first64 * id_token
        id_token = id_token.to(tl.int32)
        centroids = _address(job, CENTROIDS, tl.bfloat16 if KIND == PAPER else tl.uint8)
        centroid_stage = tl.multiple_of(tl.load(job + CENTROID_STRIDES), 16)
        centroids += row * tl.multiple_of(tl.load(job + CENTROID_STRIDES + 1), 16)
        units = ()
        if KIND == PLANES:
            for stage in tl.static_range(STAGES):
                unit_at = (stage * rows + row) * D + across
                units = units + (tl.load(_address(job, CENTROID_SCALE, tl.bfloat16) + unit_at).to(tl.float32),)
    first_frame = tl.load(job + FRAME).to(tl.int32) + origin

    for step in range(STEPS):
        local = step * TOKENS + tl.arange(0, TOKENS)
        index = first + local
        inside = index < count
        mask = inside[:, None]

        if KIND != PLAIN:
            scale = tl.load(scales + local[:, None] * scale_token + group, mask=mask, other=0)
            scale = scale.to(tl.float32) if KIND == INT8 else e4m3_to_float32(scale, NATIVE_E4M3)
            scale = scale[:, :, None]
        if KIND == PLANES:
            at = local[:, None] * data_token + tl.arange(0, D // 8)[None, :]
            positive = _bits(data, at, mask, TOKENS, D, GROUPS)
            size = l0 * scale
            if BITS > 1:
                bit1 = _bits(plane1, at, mask, TOKENS, D, GROUPS)
                if BITS == 2:
                    size = tl.where(bit1, l1 * scale, size)
                else:
                    bit2 = _bits(plane2, at, mask, TOKENS, D, GROUPS)
                    if BITS == 3:
                        high = tl.where(bit2, l3 * scale, l2 * scale)
                        size = tl.where(bit1, high, tl.where(bit2, l1 * scale, size))
                    else:
                        bit3 = _bits(plane3, at, mask, TOKENS, D, GROUPS)
                        high = tl.where(bit2, tl.where(bit3, l7 * scale, l6 * scale), tl.where(bit3, l5 * scale, l4 * scale))
                        low = tl.where(bit2, tl.where(bit3, l3 * scale, l2 * scale), tl.where(bit3, l1 * scale, size))
                        size = tl.where(bit1, high, low)
            x = tl.reshape(tl.where(positive, size, -size), (TOKENS, D)) * channels
        elif KIND == PAPER:
            packed = tl.load(data + local[:, None] * data_token + tl.arange(0, D * BITS // 8)[None, :], mask=mask, other=0)
            if BITS == 2:
                codes = (repeat4(packed.to(tl.int32), TOKENS, D // 4) >> (6 - 2 * (channel % 4))) & 3
            else:
                codes = (repeat2(packed.to(tl.int32), TOKENS, D // 2) >> (4 - 4 * (channel % 2))) & 15
            x = codes.to(tl.float32)
            if not HAS_ZEROS:
                x -= 2 ** (BITS - 1) - 1
        else:
            x = tl.load(data + local[:, None] * data_token + channel, mask=mask, other=0).to(tl.float32)

        if KIND == PAPER or KIND == INT8:
            x = tl.reshape(x, (TOKENS, GROUPS, D // GROUPS)) * scale
            if HAS_ZEROS:
                zero = tl.load(zeros + local[:, None] * scale_token + group, mask=mask, other=0)
                x += e4m3_to_float32(zero, NATIVE_E4M3)[:, :, None]
            x = tl.reshape(x, (TOKENS, D))

        for stage in tl.static_range(STAGES):
            chosen = tl.load(ids + stage * id_stage + local * id_token, mask=inside, other=0).to(tl.int32)
            codes = tl.load(centroids + stage * centroid_stage + chosen[:, None] * D + channel)
            if KIND == PAPER:
                x += codes.to(tl.float32)
            else:
                x += e4m3_to_float32(codes, NATIVE_E4M3) * units[stage]
        if KIND == PAPER:
            # the released package rounds to bf16 before anything else sees the value
            x = round_to_bfloat16(x)

        if not is_value:
            # quotients by way of float32, far cheaper than integer division: half a token keeps them away from whole
            # numbers by more than their rounding while a span has no more than MAX_TOKENS
            frame = ((index.to(tl.float32) + 0.5) / (height * width)).to(tl.int32)
            place = index - frame * height * width
            line = ((place.to(tl.float32) + 0.5) / width).to(tl.int32)
            column = frames + height + place - line * width
            frame += first_frame
            line += frames
            cos, sin = _turns(angles, frame[:, None], line[:, None], column[:, None], mask, TOKENS, D // 2, TIME, SPACE)
            even, odd = tl.split(tl.reshape(x, (TOKENS, D // 2, 2)))
            x = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (TOKENS, D))
        tl.store(out + local[:, None] * token_stride + channel, x.to(dtype), mask=mask)


class Angles:
    """cos and sin of every position that a cache has met, shared by its layers.

    table: int64 [frames + height + width, D / 2], cos in the low half and sin in the high; a row fills the channel pairs
    that turn with its own axis. Row `origin` is frame 0.
    """

    def __init__(self, rope):
        self._rope, self.frames, self.origin, self.table = rope, 0, 0, None

    def reach(self, first: int, last: int, device) -> None:
        """Make the table cover frames `first` to `last`, with room for a video that grows."""
        if -self.origin <= first and last < self.frames - self.origin:
            return
        self.origin = max(self.origin, -2 * first)
        self.frames = self.origin + max(2 * last, MIN_FRAMES)
        counts = (self.frames, *self._rope.grid)
        table = torch.zeros(sum(counts), sum(self._rope.dims) // 2, 2, device=device)
        row = pair = 0
        for start, count, dim in zip((-self.origin, 0, 0), counts, self._rope.dims):
            turns = self._rope.angles(torch.arange(start, start + count, device=device), dim)
            table[row:row + count, pair:pair + dim // 2] = torch.stack([turns.cos(), turns.sin()], dim=-1).float()
            row, pair = row + count, pair + dim // 2
        self.table = table.view(torch.int64)[..., 0]


@dataclass(frozen=True)
class Row:
    """What the job table says of a span. It does not keep the span, whose memory must be free when the cache lets it go."""

    span: weakref.ref
    bits: int
    kind: Kind
    columns: list[int]
    levels: list[float]


class Reader:
    """Reads spans given as (key span, value span, frames, position of the first), oldest first. It holds addresses."""

    def __init__(self, rope, head_dim: int, dtype: torch.dtype, device, angles: Angles | None = None):
        if head_dim not in HEAD_DIMS:
            raise Unsupported(no_kernel_for(head_dim))
        self._angles = angles or Angles(rope)
        self._rope, self._tile, self._head_dim = rope, Tiling.of(head_dim), head_dim
        self._dtype, self._device = dtype, torch.device(device)
        self._rows: dict[int, Row] = {}
        self._places: list[tuple[int, int, int]] | None = None
        self._launches: list[tuple[Kind, int, int, int]] = []

    def _row(self, span) -> Row | None:
        row = self._rows.get(id(span))
        return row if row is not None and row.span() is span and row.bits == span.bits else None

    def update(self, entries: list[tuple]) -> None:
        """Take these spans from now on. Raises Unsupported with the reason when one is beyond the kernel."""
        places = [(id(key), id(value), position) for key, value, _, position in entries]
        if places == self._places and all(self._row(span) for entry in entries for span in entry[:2]):
            return
        self._places = None
        frame_tokens = self._rope.grid[0] * self._rope.grid[1]
        kinds, kept, start = defaultdict(list), {}, 0
        for key, value, frames, position in entries:
            tokens = frames * frame_tokens
            if tokens > MAX_TOKENS:
                raise Unsupported(f"a span of {tokens} tokens is longer than the {MAX_TOKENS} that the kernel's positions allow")
            for is_value, span in enumerate((key, value)):
                row = kept[id(span)] = self._row(span) or Row(weakref.ref(span), span.bits, *_describe(span, self._dtype))
                columns = row.columns.copy()
                columns[COUNT.value:FRAME.value + 1] = tokens, start, is_value, position
                kinds[row.kind].append((columns, row.levels))
            start += tokens
        self._rows, self._launches = kept, []
        jobs = [job for same in kinds.values() for job in same]
        before = 0
        for kind, same in kinds.items():
            longest = max(columns[COUNT.value] for columns, _ in same)
            self._launches.append((kind, before, len(same), triton.cdiv(longest, self._tile.tokens * self._tile.steps)))
            before += len(same)
        if jobs:
            self._jobs = self._send(torch.tensor([columns for columns, _ in jobs], dtype=torch.int64))
            self._levels = self._send(torch.tensor([levels for _, levels in jobs], dtype=torch.float32))
            self._angles.reach(min(entry[3] for entry in entries), max(entry[3] + entry[2] for entry in entries) - 1, self._device)
        self._places = places

    def _send(self, table: Tensor) -> Tensor:
        # from pinned memory the copy waits for nothing that the device still has to do
        return table.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else table

    def __call__(self, heads: slice, all_heads: int, keys: Tensor, values: Tensor) -> None:
        """Fill keys and values [B, T, h, D] with some heads of every span."""
        if keys.stride() != values.stride() or keys.stride(-1) != 1 or keys.dtype != self._dtype or values.dtype != self._dtype:
            raise Unsupported(f"keys and values must be {self._dtype} and lie alike in memory, channels last")
        batch, _, count, _ = keys.shape
        time, space, _ = (dim // 2 for dim in self._rope.dims)
        tile, native = self._tile, converts_e4m3(keys.device)
        for kind, first, spans, blocks in self._launches:
            decode_kernel[(blocks, batch * count, spans)](
                self._jobs, self._levels, self._angles.table, keys, values,
                first, heads.start, all_heads, count, batch * all_heads, *keys.stride()[:3],
                self._angles.origin, self._angles.frames, *self._rope.grid,
                KIND=kind.code, BITS=kind.bits, STAGES=kind.stages, GROUPS=kind.groups, HAS_ZEROS=kind.zeros,
                D=self._head_dim, TIME=time, SPACE=space, TOKENS=tile.tokens, STEPS=tile.steps,
                NATIVE_E4M3=native, num_warps=tile.warps)


def read(layer, heads: slice, keys: Tensor, values: Tensor, shift: int = 0) -> None:
    """`qvg.cache.LayerCache.read`; the layer and its cache keep what one read can leave to the next."""
    owner = layer.owner
    if owner.angles is None:
        owner.angles = Angles(owner.rope)
    if layer.reader is None:
        layer.reader = Reader(owner.rope, owner.geometry.head_dim, keys.dtype, keys.device, owner.angles)
    layer.reader.update([(*entry.spans, entry.frames, entry.first - (0 if entry.sink else shift)) for entry in layer.entries])
    layer.reader(heads, owner.geometry.heads, keys, values)


def _describe(span, dtype: torch.dtype) -> tuple[Kind, list[int], list[float]]:
    """Kind, job row and levels of a span."""
    columns, levels = [0] * COLUMNS.value, [0.0] * MAX_LEVELS
    if isinstance(span, PlaneSpan):
        book, data, scales = span.codebook, span.planes, span.scales
        kind = Kind(PLANES.value, span.bits, book.stages, scales.shape[-1])
        found = planes.levels(span.bits, span.gain)
        levels[:len(found)] = found
        columns[CENTROID_SCALE.value] = book.centroid_scale.data_ptr()
        columns[CHANNEL_SCALE.value] = book.channel_scale.data_ptr()
        columns[EXPONENTS.value] = span.exponents.data_ptr()
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
        columns[CENTROID_STRIDES.value:COLUMNS.value] = book.centroids.stride()[:2]
    return kind, columns, levels
