"""The history of one layer: encoded as it comes, aged by the policy, read a few heads at a time."""

from __future__ import annotations

import weakref
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..codec import TensorCodec, encode, tokens_of, train
from ..codec.finite import saturated
from ..registry import CODECS
from ..settings import COARSE
from . import ageing, codebook_lifetime
from .ageing import Limits
from .codebook_lifetime import Lifetime
from .entry import Entry, Side
from .host import ALL, Place
from .read import Held, History, read
from .stats import KINDS

if TYPE_CHECKING:
    from .kv_cache import KVCache

# torch's generators have this many seeds
SEEDS = 2**64


class Piece(NamedTuple):
    """Some entries of a layer: their place in `LayerCache.seen`, and their latent frames. coarse: of few bits, see `settings.COARSE`."""

    part: slice
    frames: int
    coarse: bool


class Before:
    """The codebooks of a layer before a chunk was stored, for a pass that fails. They are not kept alive: those that no span uses are
    gone."""

    def __init__(self, layer: LayerCache):
        self.frame, self._life, self._random = layer.next_frame, replace(layer.life), layer.generator.get_state()
        self._books = [None if side.book is None else weakref.ref(side.book) for side in layer.sides]

    def restore(self, layer: LayerCache) -> bool:
        """Whether the codebooks are still there, and are the layer's again."""
        books = [None if reference is None else reference() for reference in self._books]
        if any(reference is not None and book is None for reference, book in zip(self._books, books)):
            return False
        for side, book in zip(layer.sides, books):
            side.book = book
        layer.life = self._life
        layer.generator.set_state(self._random)
        return True


class LayerCache:
    """The history of one layer. K comes after its norm and before RoPE, V unchanged; both [B, T, H, D]."""

    def __init__(self, owner: KVCache, number: int):
        settings = owner.settings
        self.owner, self.number = owner, number
        self.settings, self.geometry, self.itemsize = settings, owner.geometry, owner.itemsize
        self.spans: list[Entry] = []
        self.codec, self.memo = CODECS[settings.codec], {}
        self.sides = tuple(
            Side(TensorCodec(settings.codec, tensor, owner.geometry.head_dim, settings.iterations))
            for tensor in (settings.key, settings.value))
        # a generator per layer, so that the order in which layers append does not matter
        self.generator = torch.Generator().manual_seed((settings.seed * 1_000_003 + number) % SEEDS)
        self.life, self.rules = Lifetime(), owner.rules
        self.next_frame = 0
        self._before: Before | None = None

    @property
    def share(self) -> Limits:
        return self.owner.limits

    @property
    def entries(self) -> list[Entry]:
        """Oldest first."""
        return self.spans

    @property
    def held_frames(self) -> int:
        return sum(entry.frames for entry in self.entries)

    @property
    def seen(self) -> list[Entry]:
        """The entries that `read` decodes, oldest first: all, or those with a frame that `KVCache.choose` named."""
        chosen = self.owner.chosen
        if chosen is None:
            return self.entries
        return [entry for entry in self.entries if not chosen.isdisjoint(range(entry.first, entry.last + 1))]

    @property
    def seen_frames(self) -> list[int]:
        """The latent frames that `read` decodes, oldest first."""
        return [frame for entry in self.seen for frame in range(entry.first, entry.last + 1)]

    @property
    def tokens(self) -> int:
        """That `read` decodes."""
        return sum(entry.frames for entry in self.seen) * self.owner.geometry.frame_tokens

    def append(self, key: Tensor, value: Tensor, frames: int, newest: int = 0) -> None:
        """Encode and keep a finished chunk of `frames` latent frames; key and value [B, T, H, D].

        newest: the last of them that age apart from the rest, under a codebook of all; for a history that is stored in one call.
        Raises ValueError when the shapes are not those that the cache was made for.
        """
        geometry = self.geometry
        expected = (geometry.batch, frames * geometry.frame_tokens, geometry.heads, geometry.head_dim)
        for name, x in (("key", key), ("value", value)):
            if tuple(x.shape) != expected:
                raise ValueError(f"The {name} of {frames} frames has shape {tuple(x.shape)}; this cache was made for {expected}.")
        dtype = self.owner.workspace.dtype
        pair = [saturated(x, dtype).to(dtype).transpose(0, 1).flatten(1, 2) for x in (key, value)]  # [T, B * H, D]
        begin = self.next_frame
        self._before = Before(self)

        def keep(first: int, count: int, sink: bool, bits: tuple[int, int]) -> None:
            at = slice((first - begin) * geometry.frame_tokens, (first - begin + count) * geometry.frame_tokens)
            spans = encode([side.codec for side in self.sides], [x[at] for x in pair], bits, [side.book for side in self.sides])
            self.spans.append(Entry(first, count, sink, self.sides, spans, self.owner))

        codebook_lifetime.store(self, begin, frames, newest, partial(self._train, pair), keep)
        self.next_frame += frames
        self.owner._note_peak(self)

    def _train(self, pair: list[Tensor], sink: bool, helpers: list[Entry], tokens: int) -> None:
        """New codebooks of the helpers' tokens and the chunk's, K and V [T, R, D]."""
        known = [tokens_of(entry.present(), self.owner.tables, pair[0].dtype) for entry in helpers]
        whole = [torch.cat([*(both[number] for both in known), x]) if known else x for number, x in enumerate(pair)]
        needs = ageing.needs_codebooks(self.settings, sink)
        books = train([side.codec for side in self.sides], whole, needs, self.generator, [side.book for side in self.sides])
        for side, book in zip(self.sides, books):
            side.book = book

    def evict(self, start: int, stop: int) -> None:
        """Delete the entries in `spans[start:stop]`."""
        del self.spans[start:stop]

    def rewind(self, first: int) -> None:
        """Forget what was stored from latent frame `first` on."""
        kept = [entry for entry in self.entries if entry.last < first]
        books = [side.book for side in self.sides]
        gone = sum(entry.frames for entry in self.entries[len(kept):] if any(ageing.needs_codebooks(self.settings, entry.sink)))
        self.spans, self.next_frame = kept, min(first, self.next_frame)
        self.life.frames, self.life.until = max(0, self.life.frames - gone), min(self.life.until, first)
        if any(own is book for entry in kept for own, book in zip(entry.books, books) if book is not None):
            return
        # a codebook that was trained for the chunk that is gone is trained again when that comes again, from the same start
        before, self._before = self._before, None
        if before is None or before.frame != first or not before.restore(self):
            last = next((entry for entry in reversed(kept) if any(book is not None for book in entry.books)), None)
            for side, book in zip(self.sides, (None, None) if last is None else last.books):
                side.book = book
            size = max((book.size for side in self.sides if (book := side.book) is not None), default=0)
            self.life = Lifetime(trained=last is not None, size=size)

    @property
    def widest(self) -> float:
        """Bits of the widest span, sinks excepted; 0 where none has any to drop."""
        # before the first codebook nothing is encoded
        return ageing.widest(self.spans, self.settings) if self.life.trained or not any(self.rules.needs[False]) else 0

    def drop_bits(self, most: float = 0) -> bool:
        """Spans of `most` bits, or the widest, drop to the next fewer; False where none has any to drop."""
        most = most or self.widest
        if most:
            ageing.narrow_widest(self.spans, self.settings, most)
        return bool(most)

    def forget_before(self, frame: int) -> None:
        """Evict the spans before a latent frame, sinks excepted."""
        self.spans = [entry for entry in self.spans if entry.sink or entry.first >= frame]

    def present(self, part: slice = ALL, following: Place | None = None) -> list:
        """The entries that are read, or a part of them, with their tensors on the device. Offloaded ones stay there until the layer, or the
        piece, after the next is read. following: what is read next, by default as much of the next layer."""
        owner = self.owner
        if owner.host is None:
            return self.seen[part]
        if not owner.geometry.by_piece:
            return owner.host.fetch(owner.layers, self.number)[part]
        following = following or (self.next, part)
        return owner.host.fetch_piece((self, part), following, () if owner.workspace.side is None else (owner.workspace.side,))

    @property
    def next(self) -> LayerCache:
        """The layer that is read after this one: the first after the last."""
        return self.owner.layers[(self.number + 1) % len(self.owner.layers)]

    def pieces(self, most: int, apart: bool = True) -> list[Piece]:
        """What `read` decodes, in parts of at most `most` latent frames, of whole spans. apart: that are all coarse or all not."""
        parts: list[Piece] = []
        for index, entry in enumerate(self.seen):
            coarse = max(entry.key_bits, entry.value_bits) <= COARSE
            if parts and (parts[-1].coarse == coarse or not apart) and parts[-1].frames + entry.frames <= most:
                before = parts.pop()
                parts.append(Piece(slice(before.part.start, index + 1), before.frames + entry.frames, before.coarse and coarse))
            else:
                parts.append(Piece(slice(index, index + 1), entry.frames, coarse))
        return parts

    def read(self, heads: slice, keys: Tensor, values: Tensor, shift: int = 0, part: slice = ALL, following: Place | None = None) -> None:
        """Decode the history of some heads, all of it or what `KVCache.choose` named, or a part from `pieces`: keys and values [B, T, h, D]
        are filled, oldest token first, K with RoPE at its absolute frame less `shift`, sinks excepted. following: see `present`."""
        owner = self.owner
        held = [Held(*entry.spans, entry.frames, entry.first - (0 if entry.sink else shift)) for entry in self.present(part, following)]
        memo = self.memo if part == ALL else self.memo.setdefault(part.start, {})
        read(History(held, self.codec, self.geometry.heads, owner.rope, owner.tables, owner.memo, memo), heads, keys, values)

    @property
    def nbytes(self) -> int:
        return sum(sum(entry.counts[1]) for entry in self.entries) + self._codebook_bytes()

    def _codebook_bytes(self) -> int:
        held = [side.book for side in self.sides] + [book for entry in self.spans for book in entry.books]
        books = {id(book): book for book in held if book is not None}
        return sum(book.nbytes for book in books.values())

    @property
    def host_bytes(self) -> int:
        return sum(entry.block.nbytes for entry in self.entries if entry.block is not None)

    @property
    def device_bytes(self) -> int:
        """Without staged spans."""
        return self.nbytes if self.owner.host is None else self._codebook_bytes()

    def held(self) -> int:
        """The bytes that `ageing.Limits.layer_bytes` limits."""
        return self.nbytes if self.owner.host is None else self.host_bytes

    def bytes_by_kind(self) -> dict[str, int]:
        total = dict.fromkeys(KINDS, 0)
        for entry in self.entries:
            for kind, count in entry.counts[0].items():
                total[kind] = total.get(kind, 0) + count
        total["codebooks"] += self._codebook_bytes()
        return total

    def bytes_by_bits(self) -> dict[int, int]:
        total = {}
        for entry in self.entries:
            for span, count in zip(entry.spans, entry.counts[1]):
                total[span.bits] = total.get(span.bits, 0) + count
        return total
