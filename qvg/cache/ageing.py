"""Which frames hold how many bits at what age, and what is given up first when memory runs short: a policy in integers, without tensors.

The real cache and the forecast hold spans of different kinds and call the same functions.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter

from ..registry import CODECS
from ..settings import PLAIN_BITS, QVGSettings

FIRST, LAST = attrgetter("first"), attrgetter("last")


@dataclass(frozen=True)
class Limits:
    """What a memory budget leaves to one layer. None means no limit.

    layer_bytes: spans and codebooks of one layer, or its spans alone where they are offloaded; cap_frames: latent frames that can be held
    besides the sink.
    """

    layer_bytes: int | None = None
    cap_frames: int | None = None


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
    """Whether a new span's K and V are or will be encoded with a codebook."""
    codec, plain = CODECS[settings.codec], sink and settings.sink_bits in PLAIN_BITS
    return codec.needs_codebook(settings.key.bits) and not plain, codec.needs_codebook(settings.value.bits) and not plain


def holds_to_encode(settings: QVGSettings, key_bits: float, value_bits: float) -> bool:
    """Whether a span holds K or V in 8 or 16 bits that will be encoded to fewer."""
    key = key_bits in PLAIN_BITS and settings.key.bits not in PLAIN_BITS
    return key or (value_bits in PLAIN_BITS and settings.value.bits not in PLAIN_BITS)


def enforce_limits(spans: list, newest: int, settings: QVGSettings, share: Limits, new: int, held: Callable[[], int],
          evict: Callable[[int, int], None]) -> None:
    """Free space in a layer, whose spans are listed oldest first, before `new` bytes of frames up to `newest` are stored.

    Spans beyond the window (or beyond what a budget can hold at all) are evicted; spans that are no longer recent drop to their settled
    bits; then, while `held()` plus the new bytes exceed the layer's share, the widest old span drops to fewer bits (the oldest of equals),
    then recent ones do, and finally the oldest is evicted. Sinks are untouched. `evict(start, stop)` deletes `spans[start:stop]`. Works on
    `forecast.PlannedSpan` and `entry.Entry` alike.

    A long video has thousands of spans, so they are searched by bisection: sinks come first, and no later span holds fewer bits than an
    earlier one, because all start alike and each step above takes from the oldest first.
    """
    begin = sinks_in(spans, settings)
    if (window := window_of(settings, share)) is not None:
        evict(begin, end_of(spans, newest - window, begin))
    for span in settling(spans, newest, settings, begin):
        span.set_bits(*settled(span, settings))
    while share.layer_bytes is not None and held() + new > share.layer_bytes:
        if begin == len(spans):
            return
        for stop in (end_of(spans, newest - settings.recent_frames, begin), len(spans)):
            most = _width(spans[stop - 1], settings) if stop > begin else 0
            if most > least_bits(settings):
                _narrow(spans[bisect_left(spans, most, begin, stop, key=lambda span: _width(span, settings))], settings)
                break
        else:
            evict(begin, begin + 1)


def window_of(settings: QVGSettings, share: Limits) -> int | None:
    """Latent frames that are kept besides the sink; None if all are."""
    if settings.window_frames and share.cap_frames:
        return min(settings.window_frames, share.cap_frames)
    return settings.window_frames or share.cap_frames or None


def end_of(spans: list, frame: int, begin: int) -> int:
    """Index after the spans that end at `frame` or before."""
    return bisect_right(spans, frame, begin, key=LAST)


def sinks_in(spans: list, settings: QVGSettings) -> int:
    """Number of sinks, which come first."""
    return bisect_left(spans, settings.sink_frames, key=FIRST)


def settling(spans: list, newest: int, settings: QVGSettings, begin: int) -> list:
    """Spans from index `begin` on that are no longer recent once latent frame `newest` is stored, and still hold spare bits."""
    start = old = end_of(spans, newest - settings.recent_frames, begin)
    while start > begin and holds_spare_bits(spans[start - 1], settings):
        start -= 1
    return spans[start:old]


def settled(span, settings: QVGSettings) -> tuple[int, int]:
    """The bits that a span holds once it is old."""
    return min(span.key_bits, settings.key.bits), min(span.value_bits, settings.value.bits)


def holds_spare_bits(span, settings: QVGSettings) -> bool:
    """Whether a span holds more bits than `settled` says."""
    return span.key_bits > settings.key.bits or span.value_bits > settings.value.bits


def least_bits(settings: QVGSettings) -> float:
    """Bits per element below which no span drops."""
    return min(CODECS[settings.codec].widths)


def _width(span, settings: QVGSettings) -> float:
    """Bits of K or V, the more of them, of which the span can drop some; 0 where it cannot."""
    if not CODECS[settings.codec].nested:
        return 0
    chosen = (span.key_bits, settings.key.bits), (span.value_bits, settings.value.bits)
    return max((bits for bits, settled in chosen if settled not in PLAIN_BITS), default=0)


def _narrow(span, settings: QVGSettings) -> None:
    """Drop to the next fewer bits that the codec holds."""
    most, widths = _width(span, settings), CODECS[settings.codec].widths
    bits = []
    for now, settled in ((span.key_bits, settings.key.bits), (span.value_bits, settings.value.bits)):
        if now != most or settled in PLAIN_BITS:
            bits.append(now)
        else:
            bits.append(settled if now in PLAIN_BITS else max(width for width in widths if width < now))
    span.set_bits(*bits)


def widest(spans: list, settings: QVGSettings) -> float:
    """Bits of the widest span, sinks excepted; 0 if none has any to drop."""
    most = max((_width(span, settings) for span in spans if not span.sink), default=0)
    return most if most > least_bits(settings) else 0


def narrow_widest(spans: list, settings: QVGSettings, most: float) -> None:
    """Spans that hold `most` bits drop to the next fewer, sinks excepted."""
    for span in spans:
        if not span.sink and _width(span, settings) == most:
            _narrow(span, settings)
