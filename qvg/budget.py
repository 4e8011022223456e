"""What a video will need before its first step, in whole bytes.

The formulas mirror the tensors of `codec` one by one, and `forecast` walks through a run chunk by chunk with the same rules as
`cache`, so that prediction and count agree. Nothing here touches torch.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from .settings import PLAIN_BITS, QVGSettings, TensorSettings

GIB = 1 << 30
# offloaded tensors begin at multiples of this, which kernels ask of what they read
ALIGN = 128


@dataclass(frozen=True)
class Geometry:
    """The shape of a model's cache. grid: tokens (height, width) of a latent frame; heads counts the heads that keep K and V.

    buffers: groups of heads that are held decoded at once, see `buffers_on`.
    """

    layers: int
    heads: int
    head_dim: int
    grid: tuple[int, int]
    batch: int = 1
    buffers: int = 1

    @property
    def frame_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def rows(self) -> int:
        return self.batch * self.heads

    @property
    def staged_layers(self) -> int:
        """Layers whose offloaded spans are on the device at once: one is read while the next comes."""
        return min(2, self.layers)

    def bf16_bytes(self, frames: int) -> int:
        """K and V of every layer at two bytes a number."""
        return 2 * 2 * self.layers * frames * self.frame_tokens * self.rows * self.head_dim


def head_group(heads: int) -> int:
    """Heads decoded at a time: the largest divisor that is at most a quarter of them.

    The workspace then is a quarter of one layer. Three of twelve heads a call attend as fast as twelve on an H200; two or four
    of twelve leave the last wave of blocks half empty and lose a third.
    """
    return max(divisor for divisor in range(1, max(1, heads // 4) + 1) if heads % divisor == 0)


def buffers_on(device_type: str, heads: int) -> int:
    """Groups of heads that are held decoded at once: where there are streams, one is decoded while the group before attends."""
    return 2 if device_type == "cuda" and head_group(heads) < heads else 1


def workspace_bytes(geometry: Geometry, frames: int, itemsize: int = 2) -> int:
    """K and V of a group of heads over `frames` frames, decoded, for each of the buffers."""
    tokens = frames * geometry.frame_tokens
    return 2 * geometry.buffers * geometry.batch * tokens * head_group(geometry.heads) * geometry.head_dim * itemsize


def span_parts(geometry: Geometry, kind: str, tensor: TensorSettings, frames: int, bits: int, itemsize: int = 2) -> list[int]:
    """Bytes of each tensor of one span of K or of V, without its codebook."""
    tokens, rows, dim = frames * geometry.frame_tokens, geometry.rows, geometry.head_dim
    numbers = tokens * rows * dim
    scales, ids = tokens * rows * tensor.groups(dim), tensor.stages * tokens * rows
    if bits == 16:
        return [numbers * itemsize]
    if bits == 8:
        return [numbers, 2 * scales]
    if kind == "paper":
        return [numbers * bits // 8, scales, 0 if tensor.symmetric else scales, ids]
    return [*[numbers // 8] * bits, scales, rows, ids]


def span_bytes(geometry: Geometry, kind: str, tensor: TensorSettings, frames: int, bits: int, itemsize: int = 2) -> int:
    """One span of K or of V, without its codebook."""
    return sum(span_parts(geometry, kind, tensor, frames, bits, itemsize))


def aligned(count: int) -> int:
    return -(-count // ALIGN) * ALIGN


def entry_bytes(geometry: Geometry, settings: QVGSettings, frames: int, bits: tuple[int, int], itemsize: int = 2) -> int:
    """A span of K and of V where they lie: on the device, or in one block of host memory."""
    parts = [part for tensor, width in zip((settings.key, settings.value), bits)
             for part in span_parts(geometry, settings.codec, tensor, frames, width, itemsize)]
    return sum(map(aligned, parts)) if settings.offload else sum(parts)


def codebook_bytes(geometry: Geometry, kind: str, tensor: TensorSettings, frames: int) -> int:
    """A codebook of K or of V that is trained on a span of `frames` frames."""
    rows, dim = geometry.rows, geometry.head_dim
    centroids = tensor.stages * rows * tensor.codebook_size(frames * geometry.frame_tokens) * dim
    if kind == "paper":
        return 2 * centroids
    return centroids + 2 * tensor.stages * rows * dim + 2 * rows * dim


@dataclass
class PlannedSpan:
    """A span of one layer as integers; `cache.Entry` is the same thing with tensors. epoch counts codebooks from 0; None has none."""

    first: int
    frames: int
    sink: bool
    key_bits: int
    value_bits: int
    epoch: int | None = None
    layer: PlannedLayer | None = field(default=None, repr=False, compare=False)

    @property
    def last(self) -> int:
        return self.first + self.frames - 1

    def set_bits(self, key_bits: int, value_bits: int) -> None:
        if self.layer is not None:
            self.layer.count(self, -1)
        self.key_bits, self.value_bits = key_bits, value_bits
        if self.layer is not None:
            self.layer.count(self, 1)


def split(first: int, frames: int, sink_frames: int, newest: int = 0) -> list[tuple[int, int]]:
    """(first, frames) of a chunk's spans: one, cut at the end of the sink where the chunk straddles it, and before its newest frames."""
    stop = first + frames
    cuts = sorted({cut for cut in (sink_frames, stop - newest) if first < cut < stop})
    return [(start, end - start) for start, end in zip([first, *cuts], [*cuts, stop])]


def first_bits(settings: QVGSettings, sink: bool) -> tuple[int, int]:
    """Bits of K and V that a new span is encoded with."""
    least = settings.sink_bits if sink else settings.recent_bits if settings.recent_frames else 0
    return max(least, settings.key.bits), max(least, settings.value.bits)


def needs_codebook(settings: QVGSettings, tensor: TensorSettings, sink: bool) -> bool:
    """Whether a new span's K or V is or will be held in planes (or paper codes)."""
    return tensor.bits not in PLAIN_BITS and not (sink and settings.sink_bits in PLAIN_BITS)


def relax(spans: list, newest: int, settings: QVGSettings, share: Limits, new: int, held: Callable[[], int],
          leave: Callable[[int, int], None]) -> None:
    """Make room in a layer, whose spans are listed oldest first, before `new` bytes of frames up to `newest` are stored.

    Spans that lie behind the window (or behind what a budget can hold at all) leave; spans that are no longer recent fall to their
    settled bits; then, while what is `held()` and the new bytes exceed the layer's share, the widest old span loses a plane (the
    oldest of equals), then recent ones do, and at last the oldest leaves. Sinks stay as they are. `leave(start, stop)` deletes those
    places of the list. Works on `PlannedSpan` and `cache.Entry` alike.

    A long video has thousands of spans, so they are searched and not walked: sinks come first, and no later span holds fewer bits than
    an earlier one, because all begin alike and each step above takes from the oldest first.
    """
    begin = bisect_left(spans, True, key=lambda span: not span.sink)
    window = min((frames for frames in (settings.window_frames, share.cap_frames) if frames), default=None)
    if window is not None:
        leave(begin, _end_of(spans, newest - window, begin))
    old = _end_of(spans, newest - settings.recent_frames, begin)
    start = old
    while start > begin and _settled(spans[start - 1], settings) is not None:
        start -= 1
    for span in spans[start:old]:
        span.set_bits(*_settled(span, settings))
    while share.layer_bytes is not None and held() + new > share.layer_bytes:
        if begin == len(spans):
            return
        for stop in (_end_of(spans, newest - settings.recent_frames, begin), len(spans)):
            most = _planes(spans[stop - 1], settings) if stop > begin else 1
            if most > 1:
                _narrow(spans[bisect_left(spans, most, begin, stop, key=lambda span: _planes(span, settings))], settings)
                break
        else:
            leave(begin, begin + 1)


def _end_of(spans: list, frame: int, begin: int) -> int:
    """The place behind the spans that end at `frame` or before."""
    return bisect_right(spans, frame, begin, key=lambda span: span.last)


def _settled(span, settings: QVGSettings) -> tuple[int, int] | None:
    """The bits that a span is to fall to with age; None where it holds no more than those."""
    bits = min(span.key_bits, settings.key.bits), min(span.value_bits, settings.value.bits)
    return None if bits == (span.key_bits, span.value_bits) else bits


def _planes(span, settings: QVGSettings) -> int:
    """Planes that the span could lose one of; 1 where there is nothing to lose."""
    if settings.codec != "qvg":
        return 1
    chosen = (span.key_bits, settings.key.bits), (span.value_bits, settings.value.bits)
    return max((bits for bits, settled in chosen if settled not in PLAIN_BITS), default=1)


def _narrow(span, settings: QVGSettings) -> None:
    most = _planes(span, settings)
    bits = []
    for now, settled in ((span.key_bits, settings.key.bits), (span.value_bits, settings.value.bits)):
        if now != most or settled in PLAIN_BITS:
            bits.append(now)
        else:
            bits.append(settled if now in PLAIN_BITS else now - 1)
    span.set_bits(*bits)


def narrow_widest(spans: list, settings: QVGSettings) -> bool:
    """Take a plane from every span that holds the most of them, sinks excepted; False where none has one to lose."""
    movable = [span for span in spans if not span.sink]
    most = max((_planes(span, settings) for span in movable), default=1)
    if most > 1:
        for span in movable:
            if _planes(span, settings) == most:
                _narrow(span, settings)
    return most > 1


@dataclass(frozen=True)
class Limits:
    """What a memory budget leaves to one layer. None means no limit.

    layer_bytes: spans and codebooks of one layer, or its spans alone where they are offloaded; cap_frames: latent frames that can be held
    besides the sink.
    """

    layer_bytes: int | None = None
    cap_frames: int | None = None


def limits(settings: QVGSettings, geometry: Geometry, chunk_frames: int, total_frames: int | None, itemsize: int = 2) -> Limits:
    """Share a budget between the workspace and the layers.

    Raises ValueError where the budget cannot hold the sink, one older chunk and the chunk being made.
    """
    if not settings.budget_gib and not settings.host_gib:
        return Limits()
    budget, host = (int(gib * GIB) if gib else None for gib in (settings.budget_gib, settings.host_gib))
    sink = min(settings.sink_frames, total_frames or settings.sink_frames)
    tensors = settings.key, settings.value
    least = tuple(1 if settings.codec == "qvg" and tensor.bits not in PLAIN_BITS else tensor.bits for tensor in tensors)

    def entry(frames: int, bits: tuple[int, int]) -> int:
        return entry_bytes(geometry, settings, frames, bits, itemsize)

    def seen(frames: int) -> int:
        most = sink + frames + 2 * chunk_frames - 1
        return most if total_frames is None else min(most, total_frames)

    # the newest is encoded before it can lose planes
    newest = entry(chunk_frames, first_bits(settings, sink=False))
    on_way = max(newest, sink and entry(min(sink, chunk_frames), first_bits(settings, sink=True)))

    def spans(frames: int) -> int:
        at_sink_bits = (settings.sink_bits, settings.sink_bits)
        return bool(sink) * entry(sink, at_sink_bits) + (-(-frames // chunk_frames) - 1) * entry(chunk_frames, least) + newest

    def books(frames: int) -> int:
        # offloaded spans are limited by themselves, so that all that their codebooks can come to is set apart: with the sink's epoch and
        # one that is only begun
        epochs = 2 + -(-(frames + chunk_frames) // settings.epoch_frames) if settings.offload else 1 + -(-frames // settings.epoch_frames)
        return epochs * sum(codebook_bytes(geometry, settings.codec, tensor, chunk_frames) for tensor in tensors)

    def apart(frames: int) -> int:
        """Bytes on the device that are not the spans'."""
        workspace = workspace_bytes(geometry, seen(frames), itemsize)
        return workspace + (geometry.layers * books(frames) + on_way if settings.offload else 0)

    copies = geometry.staged_layers if settings.offload else geometry.layers

    def needed(frames: int) -> int:
        return apart(frames) + copies * (spans(frames) + (0 if settings.offload else books(frames)))

    def fits(frames: int) -> bool:
        return (budget is None or needed(frames) <= budget) and (host is None or geometry.layers * spans(frames) <= host)

    if not fits(chunk_frames):
        if budget is not None and needed(chunk_frames) > budget:
            raise ValueError(
                f"A memory budget of {settings.budget_gib:g} GiB is too small: the first frames, one chunk and the workspace need "
                f"{needed(chunk_frames) / GIB:.3g} GiB at one plane. Raise the budget, or lower the resolution or the sink frames.")
        raise ValueError(
            f"A limit of {settings.host_gib:g} GiB for offloaded spans is too small: the first frames and one chunk need "
            f"{geometry.layers * spans(chunk_frames) / GIB:.3g} GiB at one plane. Raise it, or lower the resolution or the sink frames.")
    most = (total_frames or 1_000_000) - sink
    low, high = chunk_frames, max(chunk_frames, most)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    shares = ([] if budget is None else [(budget - apart(low)) // copies]) + ([] if host is None else [host // geometry.layers])
    return Limits(min(shares) // ALIGN * ALIGN if settings.offload else min(shares), low)


def capacity_frames(settings: QVGSettings, chunk_frames: int, total_frames: int | None, cap_frames: int | None) -> int | None:
    """Most latent frames that a pass can see, its own included; None where nothing limits them."""
    most = [total_frames] if total_frames else []
    for window in (settings.window_frames, cap_frames):
        if window:
            # the oldest span leaves with its last frame, so it may overhang the window by a chunk less one
            most.append(settings.sink_frames + window + 2 * chunk_frames - 1)
    return min(most, default=None)


def history_frames(settings: QVGSettings, chunk_frames: int, total_frames: int | None, cap_frames: int | None) -> int | None:
    """Most latent frames that a pass can find stored; None where nothing limits them."""
    capacity = capacity_frames(settings, chunk_frames, total_frames, cap_frames)
    if capacity is None:
        return None
    if capacity == total_frames:
        return total_frames - ((total_frames - 1) % chunk_frames + 1)
    return capacity - chunk_frames


def staging_bytes(settings: QVGSettings, geometry: Geometry, chunk_frames: int, history: int | None, share: Limits,
                  itemsize: int = 2) -> int | None:
    """The most that the spans of a layer take while `history` frames of it are stored: what visits the device at once."""
    if not settings.offload or history is None:
        return None
    sink = min(history, settings.sink_frames)
    recent = min(history - sink, settings.recent_frames + chunk_frames - 1)
    # frame by frame, which takes no less than any longer spans do
    most = sum(frames * entry_bytes(geometry, settings, 1, bits, itemsize) for frames, bits in (
        (sink, first_bits(settings, sink=True)), (recent, first_bits(settings, sink=False)),
        (history - sink - recent, (settings.key.bits, settings.value.bits))))
    return most if share.layer_bytes is None else min(most, share.layer_bytes)


@dataclass(frozen=True)
class Forecast:
    """A run in bytes. stored_bytes is what is held when the last chunk has been stored, wherever it lies; peak_bytes, on the device, counts
    the workspace; host_bytes is the most that offloaded spans take."""

    frames: int
    held_frames: int
    bf16_bytes: int
    stored_bytes: int
    peak_bytes: int
    workspace_bytes: int
    numbers: int
    host_bytes: int = 0

    @property
    def stored_ratio(self) -> float:
        return self.bf16_bytes / max(1, self.stored_bytes)

    @property
    def peak_ratio(self) -> float:
        return self.bf16_bytes / max(1, self.peak_bytes)

    @property
    def bits_per_number(self) -> float:
        return 8 * self.stored_bytes / max(1, self.numbers)


class PlannedLayer:
    """One layer of a run in integers: the rules of `cache.LayerCache` without the tensors."""

    def __init__(self, settings: QVGSettings, geometry: Geometry, share: Limits, itemsize: int = 2):
        self.settings, self.geometry, self.share, self.itemsize = settings, geometry, share, itemsize
        self.spans: list[PlannedSpan] = []
        self.books: list[int] = []
        self.epoch_frames = 0
        self.largest = 0  # of the blocks that went to the host
        self._sizes: dict[tuple, int] = {}
        # kept up to date, because a sum over all spans after every chunk takes time with the square of a video's length
        self._spans_bytes = self._books_bytes = 0
        self._users: Counter[int] = Counter()

    def count(self, span: PlannedSpan, times: int) -> None:
        """Add a span to what is held (times 1), or take it from there (-1)."""
        self._spans_bytes += times * self._span_bytes(span)
        if span.epoch is not None:
            before = self._users[span.epoch]
            self._users[span.epoch] += times
            if not before or not self._users[span.epoch]:
                self._books_bytes += times * self.books[span.epoch]

    def leave(self, start: int, stop: int) -> None:
        """Delete the spans at those places."""
        for span in self.spans[start:stop]:
            self.count(span, -1)
        del self.spans[start:stop]

    def book_bytes(self) -> int:
        return self._books_bytes

    def nbytes(self) -> int:
        return sum(self._span_bytes(span, resident=True) for span in self.spans) + self.book_bytes()

    def host_bytes(self) -> int:
        return self.limited_bytes() if self.settings.offload else 0

    def device_bytes(self) -> int:
        return self.book_bytes() if self.settings.offload else self.limited_bytes()

    def limited_bytes(self) -> int:
        """What `Limits.layer_bytes` is of."""
        return self._spans_bytes + (0 if self.settings.offload else self._books_bytes)

    def append(self, first: int, frames: int, newest: int = 0) -> None:
        """See `cache.LayerCache.append`."""
        for start, count in split(first, frames, self.settings.sink_frames, newest):
            sink = start < self.settings.sink_frames
            span = PlannedSpan(start, count, sink, *first_bits(self.settings, sink), layer=self)
            new, books = self._span_bytes(span), self._place_in_epoch(span, frames if newest else count)
            relax(self.spans, span.last, self.settings, self.share, new + (0 if self.settings.offload else books), self.limited_bytes,
                  self.leave)
            self.spans.append(span)
            self.count(span, 1)
            if self.settings.offload:
                self.largest = max(self.largest, new)

    def _place_in_epoch(self, span: PlannedSpan, trained_on: int) -> int:
        """Give the span its codebooks; returns the bytes of those that have to be trained for it, on so many frames."""
        tensors = [tensor for tensor in (self.settings.key, self.settings.value)
                   if needs_codebook(self.settings, tensor, span.sink)]
        if not tensors:
            return 0
        new = 0
        if not self.books or self.epoch_frames >= self.settings.epoch_frames:
            new = sum(codebook_bytes(self.geometry, self.settings.codec, tensor, trained_on) for tensor in tensors)
            self.books.append(new)
            self.epoch_frames = 0
        span.epoch = len(self.books) - 1
        self.epoch_frames += span.frames
        return new

    def _span_bytes(self, span: PlannedSpan, resident: bool = False) -> int:
        key = span.frames, span.key_bits, span.value_bits, resident
        if key not in self._sizes:
            settings = replace(self.settings, offload=False, host_gib=0.0) if resident else self.settings
            self._sizes[key] = entry_bytes(self.geometry, settings, span.frames, key[1:3], self.itemsize)
        return self._sizes[key]


def forecast(settings: QVGSettings, geometry: Geometry, frames: int, chunk_frames: int = 3, first_frames: int = 0,
             itemsize: int = 2) -> Forecast:
    """The bytes of a run of `frames` latent frames in chunks of `chunk_frames`.

    first_frames: latent frames of a start image or video that are stored in one pass before the chunks.
    itemsize: bytes of the model's own number type, in which the workspace and 16-bit spans are held.
    Raises ValueError where the budget is too small, or the settings do not fit the heads.
    """
    share = limits(settings, geometry, chunk_frames, frames, itemsize)
    layer = PlannedLayer(settings, geometry, share, itemsize)
    capacity = capacity_frames(settings, max(chunk_frames, first_frames), frames, share.cap_frames)
    starts = ([0] if first_frames else []) + list(range(first_frames, frames, chunk_frames))
    history = history_frames(settings, chunk_frames, frames, share.cap_frames)
    staging = staging_bytes(settings, geometry, chunk_frames, history, share, itemsize) or 0
    workspace = visiting = peak = host = 0
    for start, end in zip(starts, [*starts[1:], frames]):
        if layer.spans:
            workspace, visiting = workspace_bytes(geometry, capacity, itemsize), geometry.staged_layers * staging
        peak = max(peak, geometry.layers * layer.device_bytes() + workspace + visiting)
        layer.append(start, end - start)
        peak = max(peak, geometry.layers * layer.device_bytes() + workspace + visiting + layer.largest)
        host = max(host, geometry.layers * layer.host_bytes())
    held = sum(span.frames for span in layer.spans)
    return Forecast(
        frames=frames, held_frames=held, bf16_bytes=geometry.bf16_bytes(frames), stored_bytes=geometry.layers * layer.nbytes(),
        peak_bytes=peak, workspace_bytes=workspace, numbers=geometry.bf16_bytes(held) // 2, host_bytes=host)
