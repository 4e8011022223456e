"""Decode spans into the workspace: planes, scales, the centroids of every stage, and RoPE for K, in one pass.

Twin: `qvg.cache.LayerCache.read`. A `Reader` keeps one row of addresses, strides and levels per span, so that one launch
covers all spans of one kind, K and V together: spans of different lengths, epochs and codebook sizes differ only in
their rows. Kinds that need other code (another number of planes, 8-bit sinks, paper mode) take a launch each.

A program decodes one head at the same places of all frames of a span, a tile of TOKENS at a time: the angles that its keys turn by are
those of few places. What the kernel waits for is memory: the streams of planes, scales and ids are brought into the L2 cache when a program
starts, and stores are the first to leave it, because a workspace is larger.
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
from ..qvg.dispatch import Unsupported, before_launch, launching
from ..qvg.rope import axis_dims
from .halves import pair
from .octets import (
    bfloat16_octet,
    dequantize,
    dequantize_pairs,
    e4m3_octet,
    factors_of,
    fetch,
    octet_of,
    octets,
    tile_of,
    turn,
    turn_pairs,
    words_of,
)
from .tiles import (
    HEAD_DIMS,
    converts_e4m3,
    major,
    no_kernel_for,
    platform,
    power_of_two,
    prefetch,
    repeat2,
    repeat4,
    round_to_bfloat16,
    saturate,
    scale_to_float32,
)

PLANES, PAPER, INT8, PLAIN = (tl.constexpr(kind) for kind in range(4))
MAX_LEVELS = 8
# offsets of a row's bytes within a span of planes are 32 bits wide
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
FRAMES = tl.constexpr(11)  # of the span
START = tl.constexpr(12)  # its first token in the workspace
IS_VALUE = tl.constexpr(13)
FRAME = tl.constexpr(14)  # position of its first frame
DATA_STRIDES = tl.constexpr(15)  # token, row
SCALE_STRIDES = tl.constexpr(17)  # token, row
ID_STRIDES = tl.constexpr(19)  # stage, token, row
CENTROID_STRIDES = tl.constexpr(22)  # stage, row
COLUMNS = tl.constexpr(24)


# tokens of a program, about: longer ones leave multiprocessors idle at the end, shorter ones begin too often
PROGRAM = 144


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
    """tokens: of a tile, chosen so that a thread holds an octet, or two where it computes in halves; registers: of a thread at most.

    Few enough registers that many threads are under way, and none spills; `qvg bench kernels --only tune` measures other choices.
    """

    tokens: int
    warps: int
    registers: int | None = None
    halves: bool = False

    @property
    def limits(self) -> dict[str, int]:
        return {} if self.registers is None else {"maxnreg": self.registers}

    def share(self, frames: int) -> int:
        """Tiles of places that a program takes of each of `frames` frames."""
        return max(1, round(PROGRAM / (self.tokens * frames)))

    @staticmethod
    def of(head_dim: int, name: str, bits: int = 2, major: int = 9, halves: bool = False) -> Tiling:
        """For a platform by its name, see `tiles.platform`; major: of NVIDIA's compute capability."""
        if name == "interpreter":
            return Tiling(tokens=4096 // head_dim, warps=8, halves=halves)
        # so few registers would spill from capability 10 on
        few = name == "cuda" and major < 10
        registers = (72 if bits < 4 else 96) if few else None
        return Tiling(tokens=(2048 if halves else 1024) // head_dim, warps=4, registers=registers, halves=halves)


@triton.jit
def _address(job, COLUMN: tl.constexpr, dtype: tl.constexpr):
    """A pointer out of the job table; torch aligns what it allocates, which the compiler cannot know."""
    return tl.multiple_of(tl.load(job + COLUMN).to(tl.pointer_type(dtype)), 16)


# numbers that change during a video would each be compiled for anew
@triton.jit(do_not_specialize=["first_job", "first_head", "all_heads", "origin", "frames", "places", "share"])
def decode_kernel(
    jobs, levels, angles, keys, values,
    first_job, first_head, all_heads, batches, batch_stride, token_stride, head_stride, origin, frames, places, share,
    KIND: tl.constexpr, BITS: tl.constexpr, STAGES: tl.constexpr, GROUPS: tl.constexpr, HAS_ZEROS: tl.constexpr,
    D: tl.constexpr, TIME: tl.constexpr, TOKENS: tl.constexpr, HALVES: tl.constexpr, NVIDIA: tl.constexpr, NATIVE_E4M3: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """One head at `share` tiles of places of every frame of one span. Grid: (blocks of places, heads, spans * batches)."""
    number = first_job + tl.program_id(2) // batches
    job = jobs + number * COLUMNS
    span_frames = tl.load(job + FRAMES).to(tl.int32)
    batch = tl.program_id(2) % batches
    head = tl.program_id(1)
    rows = batches * all_heads
    row = (batch * all_heads + first_head + head).to(tl.int64)
    # of a token's octets a thread holds one of each part
    PARTS: tl.constexpr = 2 if HALVES else 1
    OCTETS: tl.constexpr = D // PARTS // 8
    channel = tl.arange(0, D // PARTS)[None, :]
    octet = tl.arange(0, OCTETS)[None, :]
    dtype: tl.constexpr = keys.dtype.element_ty

    is_value = tl.load(job + IS_VALUE) != 0
    out = tl.where(is_value, values.to(tl.int64), keys.to(tl.int64)).to(tl.pointer_type(dtype))
    out = tl.multiple_of(out, 16)
    out += batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride
    out += tl.load(job + START) * token_stride

    # all of a job that the loop needs is read before it: the stores inside would make the compiler read it again
    data_token = tl.load(job + DATA_STRIDES)
    data_row = row * tl.load(job + DATA_STRIDES + 1)
    if KIND == PLAIN:
        data = _address(job, DATA, dtype) + data_row
    elif KIND == INT8:
        data = _address(job, DATA, tl.int8) + data_row
    else:
        data = _address(job, DATA, tl.uint8) + data_row
    if KIND != PLAIN:
        scale_token = tl.load(job + SCALE_STRIDES)
        scale_row = row * tl.load(job + SCALE_STRIDES + 1)
        scales = _address(job, SCALES, tl.bfloat16 if KIND == INT8 else tl.uint8) + scale_row
        group = tl.arange(0, GROUPS)[None, :]
        if HAS_ZEROS:
            zeros = _address(job, ZEROS, tl.uint8) + scale_row
    ids, id_token, id_stage = data, 0, 0
    if STAGES > 0:
        id_token = tl.load(job + ID_STRIDES + 1)
        id_stage = tl.load(job + ID_STRIDES)
        ids = _address(job, IDS, tl.uint8) + row * tl.load(job + ID_STRIDES + 2)
        centroid_stage = tl.multiple_of(tl.load(job + CENTROID_STRIDES), 16)
        centroid_row = row * tl.multiple_of(tl.load(job + CENTROID_STRIDES + 1), 16)
        centroids = _address(job, CENTROIDS, tl.bfloat16 if KIND == PAPER else tl.uint8) + centroid_row
    if KIND == PLANES:
        plane1 = _address(job, DATA + (1 if BITS > 1 else 0), tl.uint8) + data_row
        plane2 = _address(job, DATA + (2 if BITS > 2 else 0), tl.uint8) + data_row
        plane3 = _address(job, DATA + (3 if BITS > 3 else 0), tl.uint8) + data_row
        level = ()
        for n in tl.static_range(1 << (BITS - 1)):
            level = level + (tl.load(levels + number * 8 + n),)
        unit = power_of_two(tl.load(_address(job, EXPONENTS, tl.int8) + row))
        channel_scale = _address(job, CHANNEL_SCALE, tl.int64) + row * (D // 4) + 2 * octet
        centroid_scale = _address(job, CENTROID_SCALE, tl.int64) + row * (D // 4) + 2 * octet
        sizes = ()
        for n in tl.static_range(1 << (BITS - 1)):
            sizes = sizes + (pair(level[n], level[n], NVIDIA) if HALVES else level[n] * unit,)
        if HALVES:
            factors = ()
            for part in tl.static_range(PARTS):
                factors = factors + (factors_of(channel_scale + part * (2 * OCTETS), centroid_scale + part * (2 * OCTETS), rows * (D // 4),
                                                unit, STAGES, NVIDIA, NATIVE_E4M3),)
        else:
            channels = bfloat16_octet(channel_scale)
            units = ()
            for stage in tl.static_range(STAGES):
                units = units + (bfloat16_octet(centroid_scale + stage * rows * (D // 4)),)
    first_frame = tl.load(job + FRAME).to(tl.int32) + origin

    first = tl.program_id(0) * (share * TOKENS)
    if PREFETCH:
        # while stores keep the memory busy, bytes come later than the next tile can wait. A warp asks for those of a frame
        end = tl.minimum(first + share * TOKENS, places) - 1
        lane = tl.arange(0, 128)
        for start in range(0, span_frames, 4):
            before = tl.minimum(start + lane // 32, span_frames - 1) * places
            line = (before + first) * (D // 8) + tl.minimum(lane % 32 * 128, (end - first) * (D // 8))
            prefetch(data + line)
            if BITS > 1:
                prefetch(plane1 + line)
            sector = before + tl.minimum(first + lane % 32 * 32, end)
            prefetch(scales + sector * GROUPS)
            for stage in tl.static_range(STAGES):
                prefetch(ids + stage * id_stage + sector)
    within = tl.arange(0, TOKENS)[:, None]
    # beyond the end of a frame its last token is read and written again, which is cheaper than a mask on each
    place = tl.minimum(first + within, places - 1)
    local = place
    frame = 0
    if KIND == PLANES:
        ahead = fetch(local, octet, data, plane1, plane2, plane3, scales, ids, id_stage, BITS, STAGES, GROUPS, OCTETS, PARTS)
    for _ in range(tl.minimum(share, tl.cdiv(places - first, TOKENS)) * span_frames):
        # a tile of every frame in turn, so that the angles of its places are still in the cache
        more = frame + 1 < span_frames
        first = tl.where(more, first, first + TOKENS)
        next_frame = tl.where(more, frame + 1, 0)
        next_place = tl.minimum(first + within, places - 1)
        next_local = next_frame * places + next_place
        if KIND == PLANES:
            bits, scale, chosen = ahead
            words = ()
            for stage in tl.static_range(STAGES):
                codes = centroids.to(tl.pointer_type(tl.int64)) + stage * (centroid_stage // 8)
                codes += chosen[stage].to(tl.int32) * (D // 8) + octet
                parts = ()
                for part in tl.static_range(PARTS):
                    parts = parts + (tl.load(codes + part * OCTETS),)
                words = words + (parts,)
            # the next tile's bytes are on their way while this one is computed
            ahead = fetch(next_local, octet, data, plane1, plane2, plane3, scales, ids, id_stage, BITS, STAGES, GROUPS, OCTETS, PARTS)
            if not HALVES:
                scale = scale_to_float32(scale[0], NATIVE_E4M3)
                m = ()
                for n in tl.static_range(1 << (BITS - 1)):
                    m = m + (sizes[n] * scale,)
                x = ()
                for c in tl.static_range(8):
                    x = x + (dequantize(bits[0], c, BITS, m) * channels[c],)
                for stage in tl.static_range(STAGES):
                    found = e4m3_octet(words[stage][0], NATIVE_E4M3)
                    y = ()
                    for c in tl.static_range(8):
                        y = y + (x[c] + found[c] * units[stage][c],)
                    x = y
        else:
            if KIND == PAPER:
                packed = tl.load(data + local * data_token + tl.arange(0, D * BITS // 8)[None, :])
                if BITS == 2:
                    codes = (repeat4(packed.to(tl.int32), TOKENS, D // 4) >> (6 - 2 * (channel % 4))) & 3
                else:
                    codes = (repeat2(packed.to(tl.int32), TOKENS, D // 2) >> (4 - 4 * (channel % 2))) & 15
                tile = codes.to(tl.float32)
                if not HAS_ZEROS:
                    tile -= 2 ** (BITS - 1) - 1
            else:
                tile = tl.load(data + local * data_token + channel).to(tl.float32)
            if KIND != PLAIN:
                scale = tl.load(scales + local * scale_token + group)
                scale = scale.to(tl.float32) if KIND == INT8 else scale_to_float32(scale, NATIVE_E4M3)
                tile = tl.reshape(tile, (TOKENS, GROUPS, D // GROUPS)) * scale[:, :, None]
                if HAS_ZEROS:
                    tile += scale_to_float32(tl.load(zeros + local * scale_token + group), NATIVE_E4M3)[:, :, None]
                tile = tl.reshape(tile, (TOKENS, D))
            if KIND == PAPER:
                for stage in tl.static_range(STAGES):
                    chosen = tl.load(ids + stage * id_stage + local * id_token).to(tl.int32)
                    tile += tl.load(centroids + stage * centroid_stage + chosen * D + channel).to(tl.float32)
                # the released package rounds to bf16 before anything else sees the value
                tile = round_to_bfloat16(tile)
            x = octets(tile, TOKENS, D)

        # rows of the angles' table, in octets
        of_time, of_place = (first_frame + frame) * (D // 8), (frames + place) * (D // 8)
        for part in tl.static_range(PARTS):
            if HALVES:
                found = ()
                for stage in tl.static_range(STAGES):
                    found = found + (words[stage][part],)
                x = dequantize_pairs(bits[part], scale[part], found, sizes, factors[part], BITS, STAGES, NVIDIA, NATIVE_E4M3)
            if not is_value:
                # an octet turns by four pairs; those that turn with time end between the second and the third of one
                left, right = of_place, of_place
                if 4 * part * OCTETS < TIME:
                    pairs = 4 * (octet + part * OCTETS)
                    left = tl.where(pairs < TIME, of_time, of_place)
                    right = tl.where(pairs + 2 < TIME, of_time, of_place)
                # not so at the octet where time ends, but a thread holds one octet, and what matters is that threads stand along a row
                if HALVES:
                    left = angles + tl.max_contiguous(2 * left + octet, (1, OCTETS))
                    right = angles + tl.max_contiguous(2 * right + octet, (1, OCTETS))
                    x = turn_pairs(x, tl.load(left + part * OCTETS), tl.load(right + (part * OCTETS + D // 8)), NVIDIA)
                else:
                    left = angles + tl.max_contiguous(4 * left + octet, (1, OCTETS))
                    right = angles + tl.max_contiguous(4 * right + octet, (1, OCTETS))
                    x0, x1 = turn(x[0], x[1], tl.load(left))
                    x2, x3 = turn(x[2], x[3], tl.load(left + D // 8))
                    x4, x5 = turn(x[4], x[5], tl.load(right + D // 4))
                    x6, x7 = turn(x[6], x[7], tl.load(right + 3 * (D // 8)))
                    x = (x0, x1, x2, x3, x4, x5, x6, x7)
            at = out + local.to(tl.int64) * token_stride
            if HALVES and NVIDIA:
                at = at.to(tl.pointer_type(tl.int32)) + tl.arange(0, D // PARTS // 2)[None, :]
                tl.store(at + part * (D // PARTS // 2), words_of(x, factors[part][2], TOKENS, D // PARTS), cache_modifier=".cs")
            else:
                if HALVES:
                    x = octet_of(x, factors[part][2])
                whole = tile_of(x, TOKENS, D // PARTS)
                if dtype == tl.float16:
                    whole = saturate(whole)
                tl.store(at + channel + part * (D // PARTS), whole.to(dtype), cache_modifier=".cs")
        frame, place, local = next_frame, next_place, next_local


class Angles:
    """cos and sin of every position that a cache has met, shared by its layers.

    table: int64 [frames + places, 4, D / 8], cos in the low half and sin in the high; the four pairs of an octet of channels lie one
    after the other along the middle axis. A row of a frame fills the pairs that turn with time, a row of a place those that turn with
    its line and column. Row `origin` is frame 0.
    pairs: int64 [frames + places, 2, D / 8], the same as float16, two pairs a number.
    """

    def __init__(self, rope):
        self._rope, self.frames, self.origin, self.table, self.pairs = rope, 0, 0, None, None

    def reach(self, first: int, last: int, device) -> None:
        """Make the table cover frames `first` to `last`, with room for a video that grows."""
        if -self.origin <= first and last < self.frames - self.origin:
            return
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
        self._rope, self._platform, self._head_dim = rope, platform(torch.device(device)), head_dim
        self._major = major(device)
        self._dtype, self._device = dtype, torch.device(device)
        self._halves = computes_in_halves(self._platform, self._major, dtype)
        self._rows: dict[int, Row] = {}
        self._places: list[tuple[int, int, int]] | None = None
        self._launches: list[tuple[tuple, Kind, Tiling, int, int, int]] = []

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
                raise Unsupported(f"a span of {tokens} tokens is longer than the {MAX_TOKENS} that the kernel's offsets allow")
            for is_value, span in enumerate((key, value)):
                row = kept[id(span)] = self._row(span) or Row(weakref.ref(span), span.bits, *_describe(span, self._dtype, self._halves))
                columns = row.columns.copy()
                columns[FRAMES.value:FRAME.value + 1] = frames, start, is_value, position
                kinds[row.kind].append((columns, row.levels))
            start += tokens
        self._rows, self._launches = kept, []
        jobs = [job for same in kinds.values() for job in same]
        before = 0
        for kind, same in kinds.items():
            tile = Tiling.of(self._head_dim, self._platform, kind.bits, self._major, self._halves and kind.code == PLANES.value)
            variant = "decode", kind, self._head_dim, self._dtype, self._device
            before_launch(*variant)
            self._launches.append((variant, kind, tile, before, len(same), tile.share(max(columns[FRAMES.value] for columns, _ in same))))
            before += len(same)
        if jobs:
            self._jobs = _send(torch.tensor([columns for columns, _ in jobs], dtype=torch.int64), self._device)
            self._levels = _send(torch.tensor([levels for _, levels in jobs], dtype=torch.float32), self._device)
            self._angles.reach(min(entry[3] for entry in entries), max(entry[3] + entry[2] for entry in entries) - 1, self._device)
        self._places = places

    def __call__(self, heads: slice, all_heads: int, keys: Tensor, values: Tensor) -> None:
        """Fill keys and values [B, T, h, D] with some heads of every span."""
        if keys.stride() != values.stride() or keys.stride(-1) != 1 or keys.dtype != self._dtype or values.dtype != self._dtype:
            raise Unsupported(f"keys and values must be {self._dtype} and lie alike in memory, channels last")
        batch, _, count, _ = keys.shape
        native, time = converts_e4m3(keys.device), self._rope.dims[0] // 2
        height, width = self._rope.grid
        for variant, kind, tile, first, spans, share in self._launches:
            launching(*variant)
            decode_kernel[(triton.cdiv(height * width, share * tile.tokens), count, spans * batch)](
                self._jobs, self._levels, self._angles.pairs if tile.halves else self._angles.table, keys, values,
                first, heads.start, all_heads, batch, *keys.stride()[:3],
                self._angles.origin, self._angles.frames, height * width, share,
                KIND=kind.code, BITS=kind.bits, STAGES=kind.stages, GROUPS=kind.groups, HAS_ZEROS=kind.zeros,
                D=self._head_dim, TIME=time, TOKENS=tile.tokens, HALVES=tile.halves, NVIDIA=self._platform == "cuda", NATIVE_E4M3=native,
                PREFETCH=native and kind.code == PLANES.value, num_warps=tile.warps, **tile.limits)


def _send(table: Tensor, device: torch.device) -> Tensor:
    # from pinned memory the copy waits for nothing that the device still has to do
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def read(layer, heads: slice, keys: Tensor, values: Tensor, shift: int = 0) -> None:
    """`qvg.cache.LayerCache.read`; the layer and its cache keep what one read can leave to the next."""
    owner = layer.owner
    if owner.angles is None:
        owner.angles = Angles(owner.rope)
    if layer.reader is None:
        layer.reader = Reader(owner.rope, owner.geometry.head_dim, keys.dtype, keys.device, owner.angles)
    layer.reader.update([(*entry.spans, entry.frames, entry.first - (0 if entry.sink else shift)) for entry in layer.present()])
    try:
        layer.reader(heads, owner.geometry.heads, keys, values)
    except BaseException:
        # what failed may be one of several kinds, of which the next read is to ask again
        layer.reader = None
        raise


def recover(spans: list, tables, like: Tensor) -> list[Tensor]:
    """`qvg.codec.tokens_of`: each span is read as the values are, in one launch over all its rows."""
    return [_recover(span, like.dtype, like.device) for span in spans]


def _recover(span, dtype: torch.dtype, device: torch.device) -> Tensor:
    tokens, rows, dim = span.shape
    if dim not in HEAD_DIMS:
        raise Unsupported(no_kernel_for(dim))
    if tokens > MAX_TOKENS:
        raise Unsupported(f"a span of {tokens} tokens is longer than the {MAX_TOKENS} that the kernel's offsets allow")
    name, capability = platform(device), major(device)
    halves = computes_in_halves(name, capability, dtype) and isinstance(span, PlaneSpan)
    kind, columns, levels = _describe(span, dtype, halves)
    columns[FRAMES.value:FRAME.value + 1] = 1, 0, 1, 0
    jobs, sizes = (_send(torch.tensor([row], dtype=of), device) for row, of in ((columns, torch.int64), (levels, torch.float32)))
    tile = Tiling.of(dim, name, kind.bits, capability, halves)
    share, native = tile.share(1), converts_e4m3(device)
    out = torch.empty(1, tokens, rows, dim, dtype=dtype, device=device)
    before_launch("recover", kind, dim, dtype, device)
    # of the angles nothing is read, so any table will do
    decode_kernel[(triton.cdiv(tokens, share * tile.tokens), rows, 1)](
        jobs, sizes, jobs, out, out, 0, 0, rows, 1, *out.stride()[:3], 0, 0, tokens, share,
        KIND=kind.code, BITS=kind.bits, STAGES=kind.stages, GROUPS=kind.groups, HAS_ZEROS=kind.zeros,
        D=dim, TIME=axis_dims(dim)[0] // 2, TOKENS=tile.tokens, HALVES=tile.halves, NVIDIA=name == "cuda", NATIVE_E4M3=native,
        PREFETCH=native and kind.code == PLANES.value, num_warps=tile.warps, **tile.limits)
    return out[0]


def computes_in_halves(name: str, major: int, dtype: torch.dtype) -> bool:
    """Whether planes are decoded in float16, of whose 11 bits a bf16 workspace keeps 8. name: see `tiles.platform`; major: of NVIDIA's
    compute capability, which has products of bf16 from 8 on."""
    return dtype == torch.bfloat16 and (name == "interpreter" or (name == "cuda" and major >= 8))


def _by_bits(levels: list[float]) -> list[float]:
    """Levels in cell order as `octets.dequantize_pairs` takes them: number n multiplies the bits that n has, the lowest plane 1's."""
    bits = len(levels).bit_length() - 1
    # of a cell's number the first plane is the highest bit
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
            raise Unsupported("the bytes of a row do not lie together in memory, as PlaneSpan.gather_rows lays them")
        found = planes.levels(span.bits, span.gain)
        levels[:len(found)] = _by_bits(found) if halves else found
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
