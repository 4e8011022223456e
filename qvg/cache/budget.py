"""What a cache takes in whole bytes, and what goes first where that is too much.

The formulas mirror the tensors of `codec` one by one, so that prediction (`forecast`) and count agree. Nothing here touches torch.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter

from ..settings import PLAIN_BITS, QVGSettings, TensorSettings
from ..units import GIB

FIRST, LAST = attrgetter("first"), attrgetter("last")
# offloaded tensors begin at multiples of this, which kernels ask of what they read
ALIGN = 128
# in which spans wait for the first codebook; see `lifetime`
WAITING_BITS = 8


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


def codebook_bytes(geometry: Geometry, kind: str, tensor: TensorSettings, tokens: int) -> int:
    """A codebook of K or of V that is trained on `tokens` tokens of a head."""
    rows, dim = geometry.rows, geometry.head_dim
    centroids = tensor.stages * rows * tensor.codebook_size(tokens, kind) * dim
    if kind == "paper":
        return 2 * centroids
    return centroids + 2 * tensor.stages * rows * dim + 2 * rows * dim


def split(first: int, frames: int, sink_frames: int, newest: int = 0) -> list[tuple[int, int]]:
    """(first, frames) of a chunk's spans: one, cut at the end of the sink where the chunk straddles it, and before its newest frames."""
    stop = first + frames
    cuts = sorted({cut for cut in (sink_frames, stop - newest) if first < cut < stop})
    return [(start, end - start) for start, end in zip([first, *cuts], [*cuts, stop])]


def first_bits(settings: QVGSettings, sink: bool) -> tuple[int, int]:
    """Bits of K and V that a new span is encoded with."""
    least = settings.sink_bits if sink else settings.recent_bits if settings.recent_frames else 0
    return max(least, settings.key.bits), max(least, settings.value.bits)


def needs_codebooks(settings: QVGSettings, sink: bool) -> tuple[bool, bool]:
    """Whether a new span's K and V are or will be held in planes (or paper codes)."""
    plain = sink and settings.sink_bits in PLAIN_BITS
    return settings.key.bits not in PLAIN_BITS and not plain, settings.value.bits not in PLAIN_BITS and not plain


def holds_to_encode(settings: QVGSettings, key_bits: int, value_bits: int) -> bool:
    """Whether a span holds K or V plainly that is to become planes."""
    pairs = (key_bits, settings.key.bits), (value_bits, settings.value.bits)
    return any(held in PLAIN_BITS and chosen not in PLAIN_BITS for held, chosen in pairs)


def waiting_frames(settings: QVGSettings, geometry: Geometry, chunk_frames: int) -> int:
    """Most latent frames that wait as int8 for the first codebook: all but the last of the sink, or all that are recent."""
    if not may_wait(settings, geometry):
        return 0
    if settings.sink_frames and settings.sink_bits not in PLAIN_BITS:
        return settings.sink_frames - 1
    return settings.recent_frames and settings.recent_frames + chunk_frames - 1


def may_wait(settings: QVGSettings, geometry: Geometry) -> bool:
    """Whether a frame has too few tokens for a codebook, so that spans may wait as int8; see `lifetime`."""
    return settings.codec == "qvg" and any(tensor.stages and tensor.bits not in PLAIN_BITS and tensor.codebook_size(geometry.frame_tokens)
                                           < tensor.centroids for tensor in (settings.key, settings.value))


def keeps_spare_bits(settings: QVGSettings) -> bool:
    """Whether both K and V of a span hold more bits while it is recent than when it settles."""
    return bool(settings.recent_frames) and max(settings.key.bits, settings.value.bits) < settings.recent_bits


def shortest_life(settings: QVGSettings, chunk_frames: int) -> int:
    """Fewest latent frames between two codebooks of a layer, however poorly they fit; see `lifetime`."""
    if settings.codec != "qvg":
        # each serves whole chunks
        return -(-settings.codebook_frames // chunk_frames) * chunk_frames
    return min(settings.codebook_frames, chunk_frames + settings.recent_frames if keeps_spare_bits(settings) else chunk_frames)


def enforce_limits(spans: list, newest: int, settings: QVGSettings, share: Limits, new: int, held: Callable[[], int],
          leave: Callable[[int, int], None]) -> None:
    """Make room in a layer, whose spans are listed oldest first, before `new` bytes of frames up to `newest` are stored.

    Spans that lie behind the window (or behind what a budget can hold at all) leave; spans that are no longer recent fall to their
    settled bits; then, while what is `held()` and the new bytes exceed the layer's share, the widest old span loses a plane (the
    oldest of equals), then recent ones do, and at last the oldest leaves. Sinks stay as they are. `leave(start, stop)` deletes those
    places of the list. Works on `forecast.PlannedSpan` and `cache.Entry` alike.

    A long video has thousands of spans, so they are searched and not walked: sinks come first, and no later span holds fewer bits than
    an earlier one, because all begin alike and each step above takes from the oldest first.
    """
    begin = sinks_in(spans, settings)
    if (window := window_of(settings, share)) is not None:
        leave(begin, end_of(spans, newest - window, begin))
    for span in settling(spans, newest, settings, begin):
        span.set_bits(*settled(span, settings))
    while share.layer_bytes is not None and held() + new > share.layer_bytes:
        if begin == len(spans):
            return
        for stop in (end_of(spans, newest - settings.recent_frames, begin), len(spans)):
            most = _planes(spans[stop - 1], settings) if stop > begin else 1
            if most > 1:
                _narrow(spans[bisect_left(spans, most, begin, stop, key=lambda span: _planes(span, settings))], settings)
                break
        else:
            leave(begin, begin + 1)


def window_of(settings: QVGSettings, share: Limits) -> int | None:
    """Latent frames that are kept besides the sink; None where all are."""
    if settings.window_frames and share.cap_frames:
        return min(settings.window_frames, share.cap_frames)
    return settings.window_frames or share.cap_frames or None


def end_of(spans: list, frame: int, begin: int) -> int:
    """The place behind the spans that end at `frame` or before."""
    return bisect_right(spans, frame, begin, key=LAST)


def sinks_in(spans: list, settings: QVGSettings) -> int:
    """How many of the spans, which begin with them, are sinks."""
    return bisect_left(spans, settings.sink_frames, key=FIRST)


def settling(spans: list, newest: int, settings: QVGSettings, begin: int) -> list:
    """Spans from place `begin` on that are no longer recent once latent frame `newest` is stored, and still hold bits to spare."""
    start = old = end_of(spans, newest - settings.recent_frames, begin)
    while start > begin and settled(spans[start - 1], settings) is not None:
        start -= 1
    return spans[start:old]


def settled(span, settings: QVGSettings) -> tuple[int, int] | None:
    """The bits that a span is to fall to with age; None where it holds no more than those."""
    key, value = settings.key.bits, settings.value.bits
    if span.key_bits <= key and span.value_bits <= value:
        return None
    return min(span.key_bits, key), min(span.value_bits, value)


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


def most_planes(spans: list, settings: QVGSettings) -> int:
    """Of the widest span, sinks excepted; 1 where none has one to lose."""
    return max((_planes(span, settings) for span in spans if not span.sink), default=1)


def narrow_widest(spans: list, settings: QVGSettings, most: int) -> None:
    """Take a plane from every span that holds `most` of them, more than one, sinks excepted."""
    for span in spans:
        if not span.sink and _planes(span, settings) == most:
            _narrow(span, settings)


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

    waiting_bits = tuple(max(WAITING_BITS, bits) for bits in first_bits(settings, sink=bool(sink)))
    waiting = entry(waiting_frames(settings, geometry, chunk_frames), waiting_bits) + newest

    def spans(frames: int) -> int:
        at_sink_bits = (settings.sink_bits, settings.sink_bits)
        held = bool(sink) * entry(sink, at_sink_bits) + (-(-frames // chunk_frames) - 1) * entry(chunk_frames, least) + newest
        return max(held, waiting)

    # the largest that a codebook can be: trained on a chunk and all that is recent
    book = sum(codebook_bytes(geometry, settings.codec, tensor, pool_frames(settings, chunk_frames) * geometry.frame_tokens)
               for tensor in tensors if tensor.bits not in PLAIN_BITS)

    def books(frames: int) -> int:
        # Codebooks that stay are limited together with the spans, which give way. Offloaded spans are limited by themselves, so that all
        # that their codebooks can come to is set apart: with the sink's and one that is only begun
        if settings.offload:
            others = 0 if settings.codec == "qvg" else sink
            return book * (2 + -(-(others + frames + chunk_frames) // shortest_life(settings, chunk_frames)))
        # each serves whole chunks
        return book * (1 + -(-frames // (-(-settings.codebook_frames // chunk_frames) * chunk_frames)))

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


def pool_frames(settings: QVGSettings, chunk_frames: int) -> int:
    """Most latent frames that a codebook is trained on."""
    if settings.codec != "qvg":
        return chunk_frames
    return chunk_frames + max(settings.sink_frames, settings.recent_frames + chunk_frames - 1)


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
    waiting = tuple(max(WAITING_BITS, bits) for bits in first_bits(settings, sink=bool(sink)))
    most = max(most, min(history, waiting_frames(settings, geometry, chunk_frames)) * entry_bytes(geometry, settings, 1, waiting, itemsize))
    return most if share.layer_bytes is None else min(most, share.layer_bytes)
