"""The KV cache of one run: encoded as it comes, read a few heads at a time, forgotten plane by plane.

A `KVCache` holds one `LayerCache` per layer and one workspace that all of them share. `append` encodes a finished chunk at once, so the
bf16 cache never exists. `read` decodes some heads of the whole history into the workspace, K with RoPE applied. Precision goes by age:
sinks and recent frames hold more, old spans settle to fewer planes, and under a memory budget the oldest lose planes and then leave.

Every byte that is reported is counted from tensors that are held. A cache belongs to one run; nothing is stored at module level.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..backends import dispatch
from ..codec import spans as codec
from ..codec.finite import saturated
from ..codec.spans import LevelTables, Span, TensorCodec
from ..settings import PLAIN_BITS, QVGSettings
from . import budget, lifetime
from .budget import Geometry, Limits
from .host import HostStore
from .lifetime import Lifetime, Rules
from .workspace import Workspace

SPAN_KINDS = ("planes", "scales", "ids", "plain")
KINDS = (*SPAN_KINDS[:3], "codebooks", "plain")

# tokens decoded in one go, in float32; a span of the released models has as many
READ_TOKENS = 4680
# newest spans of a layer that are looked at for tokens that are no numbers: those of two chunks, which a sink may cut
WATCHED = 4
BROKEN = ("QVG: keys or values of the model were no numbers (NaN or infinite), or beyond all bounds, when latent frame %d was stored. They "
          "read back as NaN and spoil no others in the cache. A model that overflows in float16 is the usual cause; use bf16 or fp32.")
# torch's generators know so many
SEEDS = 2**64


@dataclass(frozen=True)
class CacheStats:
    """What a cache holds at one moment, in bytes counted from its tensors.

    stored_bytes: spans and codebooks; peak_bytes: the most that stored bytes and workspace were together so far; bf16_bytes: what all
    frames seen so far take at two bytes a number. held_frames: latent frames still in the cache. by_bits: stored bytes without codebooks,
    by the bits in which their numbers are held. host_bytes: what offloaded spans take in host memory; they are part of stored_bytes, while
    peak_bytes is of the device. backends: what did each op so far, and why not something faster; see `dispatch.summary`.
    """

    frames: int
    held_frames: int
    tokens: int
    numbers: int
    stored_bytes: int
    workspace_bytes: int
    peak_bytes: int
    bf16_bytes: int
    by_kind: dict[str, int]
    by_layer: tuple[int, ...]
    by_bits: dict[int, int]
    host_bytes: int = 0
    backends: dict[str, str] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        return self.bf16_bytes / max(1, self.stored_bytes)

    @property
    def peak_ratio(self) -> float:
        return self.bf16_bytes / max(1, self.peak_bytes)

    @property
    def bits_per_element(self) -> float:
        """Stored bits for each number that is held."""
        return 8 * self.stored_bytes / max(1, self.numbers)

    @staticmethod
    def total(parts: list[CacheStats]) -> CacheStats:
        """Of several caches that hold the same frames, such as those of the conditions of a run."""
        first = parts[0]
        counts = {name: sum(getattr(part, name) for part in parts)
                  for name in ("numbers", "stored_bytes", "workspace_bytes", "peak_bytes", "bf16_bytes", "host_bytes")}
        return replace(first, **counts, by_kind={kind: sum(part.by_kind[kind] for part in parts) for kind in first.by_kind},
                       by_layer=tuple(map(sum, zip(*(part.by_layer for part in parts)))),
                       by_bits=dict(sum((Counter(part.by_bits) for part in parts), Counter())),
                       backends={op: said for part in parts for op, said in part.backends.items()})

    def as_dict(self) -> dict:
        return asdict(self) | {"ratio": self.ratio, "peak_ratio": self.peak_ratio, "bits_per_element": self.bits_per_element}


class Side:
    """K or V of one layer: its codec and the codebook of the present epoch."""

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
        self._misfit = codec.Misfit(spans)
        self.books = tuple(span.codebook for span in spans)
        self.spans, self.block = (spans, None) if self._host is None else self._host.take_in(spans)
        self._counts: tuple[tuple[int, ...], tuple[int, int]] | None = None

    @property
    def misfit(self) -> bool:
        """Whether its codebooks fit it poorly; of a span that is held plainly nobody knows. See `lifetime`."""
        waits = budget.holds_to_encode(self._owner.settings, self.key_bits, self.value_bits)
        return waits or self._misfit.value > lifetime.LARGEST_MISFIT

    @property
    def broken(self) -> bool:
        """Whether it is known to hold what is no number."""
        return bool(self._misfit.broken)

    def present(self) -> list[Span]:
        """The spans with their tensors on the device."""
        return self.spans if self.block is None else self._host.bring(self.block, self.spans)

    @property
    def counts(self) -> tuple[tuple[int, ...], tuple[int, int]]:
        """Bytes of each of `SPAN_KINDS`, and of the two spans. Counted from the tensors once, and again when they change: a long video
        holds thousands of spans, and all of them are asked after every chunk."""
        if self._counts is None:
            parts = [span.bytes_by_kind() for span in self.spans]
            self._counts = (tuple(sum(part.get(kind, 0) for part in parts) for kind in SPAN_KINDS),
                            tuple(sum(part.values()) for part in parts))
        return self._counts

    @property
    def key_bits(self) -> int:
        return self.spans[0].bits

    @property
    def value_bits(self) -> int:
        return self.spans[1].bits

    def set_bits(self, key_bits: int, value_bits: int, refit: bool = False) -> None:
        """Hold fewer bits from now on. What is held plainly, or all with `refit`, is encoded with the layer's present codebooks."""
        spans = list(self.present())
        for number, bits in enumerate((key_bits, value_bits)):
            span, side = spans[number], self._sides[number]
            if bits == span.bits:
                continue
            if span.bits in PLAIN_BITS or (refit and span.codebook is not side.book):
                tokens = codec.tokens_of([span], self._owner.tables, self._owner.workspace.dtype)[0]
                spans[number] = side.codec.encode(tokens, bits, side.book)
            else:
                span.drop(bits)
        self._take(spans)


class Before:
    """The codebooks of a layer before a chunk was stored, for a pass that fails. It does not keep them: what no span uses is gone."""

    def __init__(self, layer: LayerCache):
        self.frame, self._life, self._random = layer.next_frame, replace(layer.life), layer.generator.get_state()
        self._books = [side.book and weakref.ref(side.book) for side in layer.sides]

    def restore(self, layer: LayerCache) -> bool:
        """Whether the codebooks are still there, and are the layer's again."""
        books = [book and book() for book in self._books]
        if any(reference and book is None for reference, book in zip(self._books, books)):
            return False
        for side, book in zip(layer.sides, books):
            side.book = book
        layer.life = self._life
        layer.generator.set_state(self._random)
        return True


class LayerCache:
    """The history of one layer. K comes after its norm and before RoPE, V as it is; both [B, T, H, D]."""

    def __init__(self, owner: KVCache, number: int):
        settings = owner.settings
        self.owner, self.number = owner, number
        self.settings, self.geometry, self.itemsize = settings, owner.geometry, owner.itemsize
        self.spans: list[Entry] = []
        self.reader = None  # what the kernel that decodes keeps between reads
        self.sides = tuple(
            Side(TensorCodec(settings.codec, tensor, owner.geometry.head_dim, settings.iterations))
            for tensor in (settings.key, settings.value))
        # a stream of random numbers a layer: the order in which layers append does not matter
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
    def tokens(self) -> int:
        return self.held_frames * self.owner.geometry.frame_tokens

    def append(self, key: Tensor, value: Tensor, frames: int, newest: int = 0) -> None:
        """Encode and keep a finished chunk of `frames` latent frames; key and value [B, T, H, D].

        newest: the last of them that age apart from the rest, under a codebook of all; for a history that arrives whole.
        Raises ValueError when the shapes are not those that the cache was made for.
        """
        geometry, settings = self.owner.geometry, self.owner.settings
        expected = (geometry.batch, frames * geometry.frame_tokens, geometry.heads, geometry.head_dim)
        for name, x in (("key", key), ("value", value)):
            if tuple(x.shape) != expected:
                raise ValueError(f"The {name} of {frames} frames has shape {tuple(x.shape)}; this cache was made for {expected}.")
        dtype = self.owner.workspace.dtype
        pair = [saturated(x, dtype).to(dtype).transpose(0, 1).flatten(1, 2) for x in (key, value)]  # [T, B * H, D]
        start, whole = 0, (self.next_frame, frames)
        self._before = Before(self)
        for first, count in budget.split(self.next_frame, frames, settings.sink_frames, newest):
            stop = start + count * geometry.frame_tokens
            sink, part = first < settings.sink_frames, [x[start:stop] for x in pair]
            bits = lifetime.arrive(self, first, count, whole, partial(self._train, pair, sink), waiting=not newest)
            spans = codec.encode([side.codec for side in self.sides], part, bits, [side.book for side in self.sides])
            self.spans.append(Entry(first, count, sink, self.sides, spans, self.owner))
            start = stop
        self.next_frame += frames
        self.owner._note_peak(self)

    def _train(self, pair: list[Tensor], sink: bool, helpers: list[Entry], tokens: int) -> None:
        """New codebooks of the helpers' tokens and the chunk's, K and V [T, R, D]."""
        known = [codec.tokens_of(entry.present(), self.owner.tables, pair[0].dtype) for entry in helpers]
        whole = [torch.cat([*(both[number] for both in known), x]) if known else x for number, x in enumerate(pair)]
        needs = budget.needs_codebooks(self.settings, sink)
        books = codec.train([side.codec for side in self.sides], whole, needs, self.generator, [side.book for side in self.sides])
        for side, book in zip(self.sides, books):
            side.book = book

    def leave(self, start: int, stop: int) -> None:
        """Delete the entries at those places."""
        del self.spans[start:stop]

    def rewind(self, first: int) -> None:
        """Forget what was stored from latent frame `first` on."""
        kept = [entry for entry in self.entries if entry.last < first]
        books = [side.book for side in self.sides]
        gone = sum(entry.frames for entry in self.entries[len(kept):] if any(budget.needs_codebooks(self.settings, entry.sink)))
        self.spans, self.next_frame = kept, min(first, self.next_frame)
        self.life.frames, self.life.until = max(0, self.life.frames - gone), min(self.life.until, first)
        if any(own is book for entry in kept for own, book in zip(entry.books, books) if book is not None):
            return
        # what was trained for the chunk that is gone is trained again when it comes again, from where it was begun
        before, self._before = self._before, None
        if before is None or before.frame != first or not before.restore(self):
            last = next((entry for entry in reversed(kept) if any(book is not None for book in entry.books)), None)
            for side, book in zip(self.sides, (None, None) if last is None else last.books):
                side.book = book
            size = max((book.centroids.shape[2] for side in self.sides if (book := side.book) is not None), default=0)
            self.life = Lifetime(trained=last is not None, size=size)

    @property
    def most_planes(self) -> int:
        """Of the widest span, sinks excepted; 1 where none has one to lose."""
        # without a codebook there are no planes
        return budget.most_planes(self.spans, self.settings) if self.life.trained or self.settings.codec == "plain" else 1

    def narrow(self, most: int = 0) -> bool:
        """Take a plane from every span that holds `most` of them, or as many as the widest; False where none has one to lose."""
        most = most or self.most_planes
        if most > 1:
            budget.narrow_widest(self.spans, self.settings, most)
        return most > 1

    def forget_before(self, frame: int) -> None:
        """Let the spans before a latent frame leave, sinks excepted."""
        self.spans = [entry for entry in self.spans if entry.sink or entry.first >= frame]

    def present(self) -> list:
        """The entries with their tensors on the device, where offloaded ones stay until the layer after the next is read."""
        host = self.owner.host
        return self.entries if host is None else host.fetch(self.owner.layers, self.number)

    def read(self, heads: slice, keys: Tensor, values: Tensor, shift: int = 0) -> None:
        """Decode the whole history of some heads: keys and values [B, T, h, D] are filled, oldest token first, K with RoPE at its
        absolute frame less `shift`, sinks excepted."""
        dispatch.run("decode", LayerCache._read, self, heads, keys, values, shift)

    def _read(self, heads: slice, keys: Tensor, values: Tensor, shift: int) -> None:
        geometry, tables = self.owner.geometry, self.owner.tables
        for group in self._alike():
            entries = [entry for _, entry in group]
            for batch in range(geometry.batch):
                rows = slice(batch * geometry.heads + heads.start, batch * geometry.heads + heads.stop)
                key, value = codec.decode([[entry.spans[side] for entry in entries] for side in range(2)], rows, tables)
                runs, done = _runs(group, shift), 0
                key = self.owner.rope.turn(key, [(first, frames) for _, first, frames in runs])
                key, value = (saturated(x, keys.dtype) for x in (key, value))
                for start, _, frames in runs:
                    count = frames * geometry.frame_tokens
                    at, part = slice(start * geometry.frame_tokens, start * geometry.frame_tokens + count), slice(done, done + count)
                    keys[batch, at] = key[part]
                    values[batch, at] = value[part]
                    done += count

    def _alike(self) -> list[list[tuple[int, Entry]]]:
        """The entries with the frames that are held before each, in groups that can be decoded in one go, each within `READ_TOKENS`."""
        most, before, groups, room = READ_TOKENS // self.owner.geometry.frame_tokens, 0, [], []
        for entry in self.present():
            for number, group in enumerate(groups):
                if room[number] >= entry.frames and all(codec.like(a, b) for a, b in zip(group[0][1].spans, entry.spans)):
                    group.append((before, entry))
                    room[number] -= entry.frames
                    break
            else:
                groups.append([(before, entry)])
                room.append(most - entry.frames)
            before += entry.frames
        for group in groups:
            group.sort(key=lambda member: [span.bits for span in member[1].spans])
        return groups

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
        """Without what visits."""
        return self.nbytes if self.owner.host is None else self._codebook_bytes()

    def held(self) -> int:
        """What `budget.Limits.layer_bytes` is of."""
        return self.nbytes if self.owner.host is None else self.host_bytes

    def bytes_by_kind(self) -> dict[str, int]:
        columns = zip(*(entry.counts[0] for entry in self.entries))
        return dict.fromkeys(KINDS, 0) | dict(zip(SPAN_KINDS, map(sum, columns))) | {"codebooks": self._codebook_bytes()}

    def bytes_by_bits(self) -> dict[int, int]:
        total = {}
        for entry in self.entries:
            for span, count in zip(entry.spans, entry.counts[1]):
                total[span.bits] = total.get(span.bits, 0) + count
        return total


def _runs(group: list[tuple[int, Entry]], shift: int) -> list[tuple[int, int, int]]:
    """Frames held before it, position of its first frame, and frames, of every stretch of entries that follow each other in time."""
    runs = []
    for start, entry in group:
        position = entry.first - (0 if entry.sink else shift)
        if runs and runs[-1][0] + runs[-1][2] == start and runs[-1][1] + runs[-1][2] == position:
            start, position, frames = runs.pop()
            runs.append((start, position, frames + entry.frames))
        else:
            runs.append((start, position, entry.frames))
    return runs


class KVCache:
    """All layers of one run.

    grid: tokens (height, width) of a latent frame. rope: makes the model's positions of head dim and grid, such as
    `attention.rope.Rope`. max_frames: latent frames of the whole video where known; the workspace is then
    allocated once. chunk_frames: latent frames of a chunk, which a memory budget must leave room for. stored_frames: latent frames that are
    stored at most, where that is less than what those two say.
    Raises ValueError when the settings cannot serve this shape, or the budget is too small for it.
    """

    def __init__(self, settings: QVGSettings, *, layers: int, heads: int, head_dim: int, grid: tuple[int, int], batch: int = 1,
                 rope: Callable[[int, tuple[int, int]], Any], device="cpu", dtype: torch.dtype = torch.bfloat16,
                 max_frames: int | None = None, chunk_frames: int = 3, stored_frames: int | None = None):
        self.settings = settings
        self.geometry = Geometry(layers, heads, head_dim, grid, batch, budget.buffers_on(torch.device(device).type, heads))
        self.itemsize = dtype.itemsize
        self.limits: Limits = budget.limits(settings, self.geometry, chunk_frames, max_frames, self.itemsize)
        self.rules = Rules(settings, self.geometry)
        self.rope = rope(head_dim, grid)
        self.tables = LevelTables(device)
        self.angles = None  # what the kernel that decodes knows of positions, the same for every layer
        self.workspace = Workspace(self.geometry, dtype, device, budget.capacity_frames(
            settings, chunk_frames, max_frames, self.limits.cap_frames))
        if stored_frames is None:
            stored_frames = budget.history_frames(settings, chunk_frames, max_frames, self.limits.cap_frames)
        self._staging = budget.staging_bytes(settings, self.geometry, chunk_frames, stored_frames, self.limits, self.itemsize)
        self.host = HostStore(device, self._staging) if settings.offload else None
        self.layers = [LayerCache(self, number) for number in range(layers)]
        self.peak_bytes = 0
        self.calls: dispatch.Calls = {}
        self.said: set[str] = set()  # warnings of this run
        self._held: dict[int, int] = {}  # bytes of each layer as counted last

    @property
    def frames(self) -> int:
        """Latent frames that every layer has stored so far."""
        return min((layer.next_frame for layer in self.layers), default=0)

    def head_slices(self) -> list[slice]:
        group = self.workspace.group
        return [slice(start, start + group) for start in range(0, self.geometry.heads, group)]

    def _note_peak(self, changed: LayerCache | None = None) -> None:
        """Count again what every layer holds, or only the one that changed, and the peak with it."""
        if changed is None:
            self._held.clear()
        for layer in self.layers:
            if layer is changed or layer.number not in self._held:
                self._held[layer.number] = layer.device_bytes
        visiting = 0 if self.host is None else self.host.device_bytes
        self.peak_bytes = max(self.peak_bytes, sum(self._held.values()) + self.workspace.nbytes + visiting)

    def recount(self) -> None:
        """Count all layers when next asked what they hold."""
        self._held.clear()

    def rewind(self, first: int) -> None:
        """Forget what was stored from latent frame `first` on. What older spans lost meanwhile does not come back."""
        self.recount()
        for layer in self.layers:
            layer.rewind(first)

    def shrink(self) -> str | None:
        """See `shrink`."""
        return shrink([self])

    def _warn_of_broken(self) -> None:
        """Once a run, as soon as a device has told of the newest spans, for which nobody waits: mostly a chunk later."""
        if BROKEN not in self.said:
            found = [entry.first for layer in self.layers for entry in layer.entries[-WATCHED:] if entry.broken]
            if found:
                self.said.add(BROKEN)
                logging.warning(BROKEN, min(found))

    def stats(self) -> CacheStats:
        self._warn_of_broken()
        layers = [layer.bytes_by_kind() for layer in self.layers]
        self._held = {layer.number: sum(counts.values()) if self.host is None else counts["codebooks"]
                      for layer, counts in zip(self.layers, layers)}
        self._note_peak(self.layers[-1])
        by_kind = {kind: sum(layer[kind] for layer in layers) for kind in KINDS}
        by_bits = {}
        for layer in self.layers:
            for bits, count in layer.bytes_by_bits().items():
                by_bits[bits] = by_bits.get(bits, 0) + count
        held = min((layer.held_frames for layer in self.layers), default=0)
        return CacheStats(
            frames=self.frames, held_frames=held, tokens=held * self.geometry.frame_tokens,
            numbers=self.geometry.bf16_bytes(held) // 2, stored_bytes=sum(by_kind.values()),
            workspace_bytes=self.workspace.nbytes, peak_bytes=self.peak_bytes, bf16_bytes=self.geometry.bf16_bytes(self.frames),
            by_kind=by_kind, by_layer=tuple(sum(layer.values()) for layer in layers), by_bits=dict(sorted(by_bits.items())),
            host_bytes=sum(layer.host_bytes for layer in self.layers), backends=dispatch.summary(self.calls))

    def free(self) -> None:
        """Give all memory back; the cache is empty and can be used again."""
        self.workspace.free()
        self._held.clear()
        self.calls.clear()
        self.said.clear()
        self.layers = [LayerCache(self, number) for number in range(self.geometry.layers)]
        if self.host is not None:
            self.host.close()
            self.host = HostStore(self.host.device, self._staging)


def shrink(caches: Sequence[KVCache]) -> str | None:
    """Give up the next cheapest thing to need less memory and say what it was: half of the heads that are decoded at a time, then a plane
    of the widest spans, then the older half of the history. None when nothing is left to give.

    All caches of a run, such as those of its conditions, give up the same, because guidance compares what they predict.
    """
    layers = [layer for cache in caches for layer in cache.layers]
    for cache in caches:
        cache.recount()
        if cache.host is not None:
            cache.host.shrink()
    if sum(cache.workspace.halve() for cache in caches):
        return f"Memory did not suffice: heads are now decoded {caches[0].workspace.group} at a time."
    # a pass that failed may have let spans age in some layers and caches and not yet in others
    if (most := max(layer.most_planes for layer in layers)) > 1:
        for layer in layers:
            layer.narrow(most)
        return "Memory did not suffice: the widest spans of the KV cache lost a bit plane."
    movable = min(([entry for entry in layer.entries if not entry.sink] for layer in layers), key=len, default=[])
    if len(movable) < 2:
        return None
    for layer in layers:
        layer.forget_before(movable[len(movable) // 2].first)
    return "Memory did not suffice: the older half of the history left the KV cache."
