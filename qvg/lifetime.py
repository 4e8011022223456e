"""How long a codebook serves: until it no longer fits what it is asked to code.

Centroids fit the tokens that they were trained on. Those of a start image, of the shot before a cut or of a single frame fit what follows
poorly, and so do those of a small codebook that learned its tokens by heart. What a codebook leaves of a span is known without further
work: a span's token scales are the root mean square of the residual, in units of what the training left, so their mean square is the
**misfit**, 1 on the tokens of the training.

A span is encoded when it comes, with the codebook at hand, and while it is recent it holds bits to spare. When it settles, two things are
known that were not known before: how well the codebook fitted it, and the tokens that came after it. If it fitted poorly, a new codebook
is trained on all that is still recent together with the chunk that arrives, and the span that settles is encoded with that one. So a
settled span lies under a codebook that fits it, at most one codebook is trained every `recent_frames` plus one chunk, and a misfit is read
on the host a whole chunk after it was computed: nothing waits for the device. It is a function of stored bytes, so a resumed run decides
alike.

Before there is a codebook, spans of too few tokens to train one wait as int8, a start image for instance, until the sink is complete or the
first of them settles. Settings without bits to spare (no recent frames, or as many bits as when settled) train for the chunk that follows
one that fitted poorly.

The rules are whole numbers and one truth value a span. The real cache and the forecast call `arrive` alike. Source of shared codebooks and
their warm start: QVG (arXiv 2602.02958), centroid caching; the released code trains one for every span.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from typing import Protocol

from . import budget
from .budget import WAITING_BITS, Geometry, Limits
from .settings import PLAIN_BITS, QVGSettings

# mean square of what is left, in units of the training's, from which a codebook no longer serves
LARGEST_MISFIT = 1.5
# times as many centroids as the present codebook has, from which more tokens are worth a new one
GROWTH = 2


@dataclass
class Lifetime:
    """The present codebook of a layer. frames: latent frames encoded with it; since, until: the latent frames that it was trained on;
    size: centroids of a stage."""

    trained: bool = False
    frames: int = 0
    since: int = 0
    until: int = 0
    size: int = 0

    def covers(self, span: Span) -> bool:
        """Whether the span was among the tokens of the training."""
        return self.since <= span.first and span.last < self.until


class Span(Protocol):
    """misfit: whether its codebooks fit it poorly."""

    first: int
    frames: int
    last: int
    sink: bool
    key_bits: int
    value_bits: int
    misfit: bool

    def set_bits(self, key_bits: int, value_bits: int, refit: bool = False) -> None:
        """Hold fewer bits from now on; with `refit`, under the layer's present codebooks."""


class Layer(Protocol):
    """spans: oldest first, sinks before all others. held: bytes that `Limits.layer_bytes` is of."""

    settings: QVGSettings
    geometry: Geometry
    share: Limits
    itemsize: int
    spans: list[Span]
    life: Lifetime

    def held(self) -> int: ...

    def leave(self, start: int, stop: int) -> None:
        """Delete the spans at those places."""


def arrive(layer: Layer, first: int, frames: int, whole: tuple[int, int], train: Callable[[list[Span], int], None],
           waiting: bool = True) -> tuple[int, int]:
    """Everything that happens in a layer before a span of latent frames is encoded; returns the bits that its K and V are encoded with.

    whole: first latent frame of the chunk that the span is a part of, and its frames. train(helpers, tokens): from now on the layer's
    codebooks are those of the helpers' tokens and the chunk's, so many together. waiting: whether a span may wait for a codebook.
    """
    settings, geometry, life = layer.settings, layer.geometry, layer.life
    sink, newest = first < settings.sink_frames, first + frames - 1
    needs = budget.needs_codebooks(settings, sink)
    bits = budget.first_bits(settings, sink)
    begin = budget.sinks_in(layer.spans, settings)
    if (window := budget.window_of(settings, layer.share)) is not None:
        layer.leave(begin, budget.end_of(layer.spans, newest - window, begin))
    if any(needs):
        helpers = _helpers(layer, whole[0])
        tokens = (whole[1] + sum(span.frames for span in helpers)) * geometry.frame_tokens
        size = max(settings.key.codebook_size(tokens, settings.codec) if needs[0] else 0,
                   settings.value.codebook_size(tokens, settings.codec) if needs[1] else 0)
        leaving = settling(layer, newest, begin)
        if waiting and _waits(layer, sum(whole), size, leaving, sink):
            bits = tuple(max(width, WAITING_BITS) if needed else width for width, needed in zip(bits, needs))
        else:
            if _renews(layer, first, size, leaving):
                train(helpers, tokens)
                begun = not life.trained
                life.trained, life.frames, life.size = True, 0, size
                life.since, life.until = min([whole[0], *(span.first for span in helpers)]), sum(whole)
                if begun:
                    _end_waiting(layer)
            life.frames += frames
            for span in leaving:
                bits_left = budget.settled(span, settings)
                if bits_left is not None and span.misfit and life.covers(span):
                    span.set_bits(*bits_left, refit=True)
    new = budget.entry_bytes(geometry, settings, frames, bits, layer.itemsize)
    # what waits for a codebook has no planes to lose, and `budget.limits` leaves room for it
    share = layer.share if life.trained or not any(needs) else Limits(cap_frames=layer.share.cap_frames)
    budget.relax(layer.spans, newest, settings, share, new, layer.held, layer.leave)
    return bits


def _helpers(layer: Layer, first: int) -> list[Span]:
    """Held spans whose tokens help to train a codebook for a chunk that begins at latent frame `first`: recent ones, and those that settle
    as it comes. Before there is a codebook, all that wait for one."""
    if layer.settings.codec != "qvg":
        return []
    oldest = first - layer.settings.recent_frames if layer.life.trained else 0
    return list(takewhile(lambda span: span.last >= oldest, reversed(layer.spans)))[::-1]


def settling(layer: Layer, newest: int, begin: int) -> list[Span]:
    """Spans from place `begin` on that are no longer recent once latent frame `newest` is stored, and still hold bits to spare."""
    start = old = budget.end_of(layer.spans, newest - layer.settings.recent_frames, begin)
    while start > begin and budget.settled(layer.spans[start - 1], layer.settings) is not None:
        start -= 1
    return layer.spans[start:old]


def _waits(layer: Layer, stop: int, size: int, leaving: list[Span], sink: bool) -> bool:
    settings = layer.settings
    if layer.life.trained or not budget.may_wait(settings, layer.geometry):
        return False
    if size >= max(tensor.centroids for tensor in (settings.key, settings.value) if tensor.bits not in PLAIN_BITS):
        return False
    if sink:
        return stop < settings.sink_frames
    return bool(settings.recent_frames) and not leaving


def _renews(layer: Layer, first: int, size: int, leaving: list[Span]) -> bool:
    settings, life, spans = layer.settings, layer.life, layer.spans
    if not life.trained:
        return True
    if settings.codec != "qvg":
        return life.frames >= settings.epoch_frames
    if first < life.until:
        return False
    if life.frames >= settings.epoch_frames or size >= GROWTH * life.size:
        return True
    if any(span.misfit and not life.covers(span) for span in leaving):
        return True
    # without bits to spare nothing is encoded anew, so that the span that comes is served better than the one before
    keeps = settings.recent_frames and max(settings.key.bits, settings.value.bits) < settings.recent_bits
    return not keeps and bool(spans) and not spans[-1].sink and spans[-1].misfit


def _end_waiting(layer: Layer) -> None:
    """Encode what waited for the first codebook."""
    for span in layer.spans:
        chosen, needs = budget.first_bits(layer.settings, span.sink), budget.needs_codebooks(layer.settings, span.sink)
        held = span.key_bits, span.value_bits
        bits = tuple(min(a, b) if needed and b not in PLAIN_BITS else a for a, b, needed in zip(held, chosen, needs))
        if bits != held:
            span.set_bits(*bits, refit=True)
