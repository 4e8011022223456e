"""One span of K and of V of a layer, with its place in time."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from ..codec import PLAIN_BITS, Span, TensorCodec, tokens_of
from ..codec.misfit import Misfit
from . import ageing, codebook_lifetime

if TYPE_CHECKING:
    from .kv_cache import KVCache


class Side:
    """K or V of one layer: its codec and its current codebook."""

    def __init__(self, codec: TensorCodec):
        self.codec = codec
        self.book = None


class Entry:
    """One span of K and of V with its place in time; the tensors behind a `forecast.PlannedSpan`.

    books are the codebooks of its planes. block: where the spans lie in host memory, of a cache that offloads them; their tensors then are
    on the host.
    """

    def __init__(self, first: int, frames: int, sink: bool, sides: tuple[Side, Side], spans: list[Span], owner: KVCache):
        self.first, self.last, self.frames, self.sink = first, first + frames - 1, frames, sink
        self._sides, self._owner, self._host = sides, owner, owner.host
        self._take(spans)

    def _take(self, spans: list[Span]) -> None:
        self._misfit = Misfit(spans, self._owner.agree)
        self.books = tuple(span.codebook for span in spans)
        self.spans, self.block = (spans, None) if self._host is None else self._host.take_in(spans)
        self._counts: tuple[dict[str, int], tuple[int, int]] | None = None

    @property
    def misfit(self) -> bool:
        """Whether its codebooks fit it poorly; assumed of a span that waits for one. See `codebook_lifetime`."""
        waits = ageing.holds_to_encode(self._owner.settings, self.key_bits, self.value_bits)
        return waits or self._misfit.value > codebook_lifetime.LARGEST_MISFIT

    @property
    def broken(self) -> bool:
        """Whether it is known to hold values that are not finite."""
        return bool(self._misfit.broken)

    def present(self) -> list[Span]:
        """The spans with their tensors on the device."""
        return self.spans if self.block is None else self._host.bring(self.block, self.spans)

    @property
    def counts(self) -> tuple[dict[str, int], tuple[int, int]]:
        """Bytes by kind, and of the two spans. Counted from the tensors once, and again when they change: a long video holds thousands of
        spans, and all of them are counted after every chunk."""
        if self._counts is None:
            parts = [side.codec.bytes_by_kind(span) for side, span in zip(self._sides, self.spans)]
            total = Counter()
            for part in parts:
                total.update(part)
            self._counts = dict(total), tuple(sum(part.values()) for part in parts)
        return self._counts

    @property
    def key_bits(self) -> float:
        return self.spans[0].bits

    @property
    def value_bits(self) -> float:
        return self.spans[1].bits

    def set_bits(self, key_bits: float, value_bits: float, refit: bool = False) -> None:
        """Hold fewer bits from now on. A plain span, or with `refit` any, is encoded again with the layer's current codebooks."""
        spans = list(self.present())
        for number, bits in enumerate((key_bits, value_bits)):
            span, side = spans[number], self._sides[number]
            if bits == span.bits:
                continue
            if span.bits in PLAIN_BITS or (refit and span.codebook is not side.book):
                tokens = tokens_of([span], self._owner.tables, self._owner.workspace.dtype)[0]
                spans[number] = side.codec.encode(tokens, bits, side.book)
            else:
                span.drop(bits)
        self._take(spans)
