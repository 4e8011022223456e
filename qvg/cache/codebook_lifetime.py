"""How long a codebook serves: until it no longer fits the tokens that it encodes.

Centroids fit the tokens that they were trained on. Codebooks of a start image, of the shot before a cut or of a single frame fit what
follows poorly, and so does a small codebook that memorized its tokens. How well one fits is known without further work: a span's token
scales are the root mean square of the residual, relative to the residual in training, so their mean square is the **misfit**, which is 1 on
the tokens of the training.

A span is encoded when it arrives, with the current codebook, and holds spare bits while it is recent. When it settles, two more things are
known: how well the codebook fitted it, and the tokens that came after it. If the fit was poor, a new codebook is trained on all recent
spans and the arriving chunk, and the settling span is encoded again with it. So a settled span has a codebook that fits, at most one
codebook is trained every `recent_frames` plus one chunk, and a misfit reaches the host a whole chunk after it was computed: nothing waits
for the device. It is a function of stored bytes, so a resumed run makes the same decisions.

Before the first codebook, spans with too few tokens to train one wait as int8, a start image for instance, until the sink is complete or
the first of them settles. Settings without spare bits (no recent frames, or as many bits as when settled) train a new codebook for the
chunk after one with a poor fit.

The rules are integers and one boolean per span. The real cache and the forecast both call `store`. Source of shared codebooks and of their
warm start: QVG (arXiv 2602.02958), centroid caching; the released code trains one for every span.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from ..registry import CODECS
from ..settings import PLAIN_BITS, QVGSettings
from . import ageing
from .ageing import Limits
from .codebooks import WAITING_BITS, keeps_spare_bits, may_wait, too_few
from .geometry import Geometry
from .sizes import entry_bytes

# misfit above which a codebook no longer serves
LARGEST_MISFIT = 1.5
# a new codebook is worth training once it would have this many times the centroids of the current one, or would have seen this many times
# the frames
GROWTH = 2


@dataclass
class Lifetime:
    """The current codebook of a layer. frames: latent frames encoded with it; since, until: the latent frames that it was trained on;
    size: centroids per stage."""

    trained: bool = False
    frames: int = 0
    since: int = 0
    until: int = 0
    size: int = 0

    def covers(self, span: Span) -> bool:
        """Whether the span was among the tokens of the training."""
        return self.since <= span.first and span.last < self.until


class Rules:
    """What the settings and the shape of a cache imply, computed once. needs, trains, bits: indexed by whether a span is a sink."""

    def __init__(self, settings: QVGSettings, geometry: Geometry):
        self.adaptive, self.accumulates = CODECS[settings.codec].adaptive, CODECS[settings.codec].accumulates
        self.needs = tuple(ageing.needs_codebooks(settings, sink) for sink in (False, True))
        self.trains = tuple(map(any, self.needs))
        self.bits = tuple(ageing.first_bits(settings, sink) for sink in (False, True))
        self.waiting_bits = tuple(tuple(max(width, WAITING_BITS) if needed else width for width, needed in zip(*pair))
                                  for pair in zip(self.bits, self.needs))
        self.may_wait = may_wait(settings, geometry)
        self.keeps = keeps_spare_bits(settings)
        self._sizes: dict[tuple[int, bool], int] = {}
        self._settings = settings

    def size(self, tokens: int, sink: bool) -> int:
        """Centroids of a codebook trained on `tokens` tokens."""
        if (tokens, sink) not in self._sizes:
            tensors = zip((self._settings.key, self._settings.value), self.needs[sink])
            self._sizes[tokens, sink] = max(CODECS[self._settings.codec].book_size(tensor, tokens) for tensor, needed in tensors if needed)
        return self._sizes[tokens, sink]


class Span(Protocol):
    """A span of K and of V as the policy sees it. misfit: whether its codebooks fit it poorly."""

    first: int
    frames: int
    last: int
    sink: bool
    key_bits: float
    value_bits: float
    misfit: bool

    def set_bits(self, key_bits: float, value_bits: float, refit: bool = False) -> None:
        """Hold fewer bits from now on; with `refit`, encoded again with the layer's current codebooks."""


class Layer(Protocol):
    """A layer as the policy sees it. spans: oldest first, sinks before all others. held: the bytes that `Limits.layer_bytes` limits."""

    settings: QVGSettings
    geometry: Geometry
    share: Limits
    itemsize: int
    spans: list[Span]
    life: Lifetime
    rules: Rules

    def held(self) -> int: ...

    def evict(self, start: int, stop: int) -> None:
        """Delete `spans[start:stop]`."""


def arrive(layer: Layer, first: int, frames: int, whole: tuple[int, int], train: Callable[[list[Span], int], None],
           waiting: bool = True) -> tuple[int, int]:
    """Age the layer before a span of latent frames is encoded; returns the bits to encode its K and V with.

    whole: first latent frame of the span's chunk, and its frames. train(helpers, tokens): replace the layer's codebooks by ones trained on
    the helpers' tokens and the chunk's, `tokens` in total. waiting: whether the span may wait for a codebook.
    """
    settings, life, rules = layer.settings, layer.life, layer.rules
    sink, newest = first < settings.sink_frames, first + frames - 1
    needs, bits, begin = rules.trains[sink], rules.bits[sink], ageing.sinks_in(layer.spans, settings)
    if (window := ageing.window_of(settings, layer.share)) is not None:
        layer.evict(begin, ageing.end_of(layer.spans, newest - window, begin))
    if needs:
        helpers, leaving = _helpers(layer, whole[0]), ageing.settling(layer.spans, newest, settings, begin)
        tokens = (whole[1] + sum([span.frames for span in helpers])) * layer.geometry.frame_tokens
        size = rules.size(tokens, sink)
        if waiting and _waits(layer, sum(whole), tokens, leaving, sink):
            bits = rules.waiting_bits[sink]
        else:
            if _renews(layer, first, sum(whole), size, leaving):
                train(helpers, tokens)
                begun = not life.trained
                life.trained, life.frames, life.size = True, 0, size
                oldest = min([whole[0], *(span.first for span in helpers)])
                life.since, life.until = min(oldest, life.since) if rules.accumulates and not begun else oldest, sum(whole)
                if begun:
                    _end_waiting(layer)
            life.frames += frames
            for span in leaving:
                if ageing.holds_spare_bits(span, settings) and span.misfit and life.covers(span):
                    span.set_bits(*ageing.settled(span, settings), refit=True)
    # spans that wait for a codebook have no bits to lose, and `limits.limits` keeps space for them
    share = layer.share if life.trained or not needs else Limits(cap_frames=layer.share.cap_frames)
    new = 0 if share.layer_bytes is None else entry_bytes(layer.geometry, settings, frames, bits, layer.itemsize)
    ageing.enforce_limits(layer.spans, newest, settings, share, new, layer.held, layer.evict)
    return bits


def store(layer: Layer, first: int, frames: int, newest: int, train: Callable[[bool, list[Span], int], None],
          keep: Callable[[int, int, bool, tuple[int, int]], None]) -> None:
    """Store a chunk of `frames` latent frames from `first` on, span by span, and age the layer meanwhile.

    newest: the last of them that age apart from the rest, with a codebook of all. train(sink, helpers, tokens): see `arrive`.
    keep(first, frames, sink, bits): encode and keep a span.
    """
    for start, count in ageing.split(first, frames, layer.settings.sink_frames, newest):
        sink = start < layer.settings.sink_frames
        bits = arrive(layer, start, count, (first, frames), partial(train, sink), waiting=not newest)
        keep(start, count, sink, bits)


def _helpers(layer: Layer, first: int) -> list[Span]:
    """Held spans whose tokens help to train a codebook for a chunk that begins at latent frame `first`: recent ones and those that settle
    now. Before the first codebook, all that wait for one."""
    if not layer.rules.adaptive:
        return []
    # settled spans are left out: they hold too few bits to learn from
    oldest = first - layer.settings.recent_frames if layer.life.trained else 0
    if layer.rules.accumulates:
        oldest = max(oldest, layer.life.until)
    start = len(layer.spans)
    while start and layer.spans[start - 1].last >= oldest:
        start -= 1
    return layer.spans[start:]


def _waits(layer: Layer, stop: int, tokens: int, leaving: list[Span], sink: bool) -> bool:
    if layer.life.trained or not layer.rules.may_wait or not too_few(layer.settings, tokens, layer.geometry.head_dim):
        return False
    return stop < layer.settings.sink_frames if sink else bool(layer.settings.recent_frames) and not leaving


def _renews(layer: Layer, first: int, stop: int, size: int, leaving: list[Span]) -> bool:
    settings, life, spans = layer.settings, layer.life, layer.spans
    if not life.trained:
        return True
    if not layer.rules.adaptive:
        return life.frames >= settings.codebook_frames
    if first < life.until:
        return False
    if layer.rules.accumulates:
        if life.until < settings.codebook_frames and stop >= GROWTH * life.until:
            return True
    elif life.frames >= settings.codebook_frames or size >= GROWTH * life.size:
        return True
    if any(span.misfit and not life.covers(span) for span in leaving):
        return True
    # without spare bits no span is encoded again; the arriving span is then better served than the one before
    return not layer.rules.keeps and bool(spans) and not spans[-1].sink and spans[-1].misfit


def _end_waiting(layer: Layer) -> None:
    """Encode the spans that waited for the first codebook."""
    for span in layer.spans:
        chosen, needs, held = layer.rules.bits[span.sink], layer.rules.needs[span.sink], (span.key_bits, span.value_bits)
        bits = tuple(min(a, b) if needed and b not in PLAIN_BITS else a for a, b, needed in zip(held, chosen, needs))
        if bits != held:
            span.set_bits(*bits, refit=True)
