"""What a run will need before its first step: the policy of `codebook_lifetime` on spans without tensors, with the bytes of `sizes`.

A codebook that fits serves for `codebook_frames`; one that does not is replaced earlier. Which it will be depends on the video, so a
forecast is of the usual case, or with `misfit` of the worst.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

from ..settings import PLAIN_BITS, QVGSettings
from . import codebook_lifetime
from .ageing import Limits, holds_to_encode, needs_codebooks
from .codebook_lifetime import Lifetime, Rules
from .geometry import Geometry, workspace_bytes
from .limits import capacity_frames, history_frames, limits, staging_bytes
from .sizes import codebook_bytes, entry_bytes
from .stats import Ratios


@dataclass
class PlannedSpan:
    """A span of one layer as integers; `entry.Entry` is the same with tensors. book: index of its codebook, None without one."""

    first: int
    frames: int
    sink: bool
    key_bits: float
    value_bits: float
    book: int | None = None
    layer: PlannedLayer | None = field(default=None, repr=False, compare=False)

    def __post_init__(self):
        self.last = self.first + self.frames - 1

    @property
    def misfit(self) -> bool:
        """Whether its codebooks fit it poorly; assumed of a span that waits for one."""
        return self.layer.misfit or holds_to_encode(self.layer.settings, self.key_bits, self.value_bits)

    def set_bits(self, key_bits: float, value_bits: float, refit: bool = False) -> None:
        changes = (self.key_bits, key_bits), (self.value_bits, value_bits)
        encoded = refit or any(held in PLAIN_BITS and bits != held for held, bits in changes)
        if self.layer is not None:
            self.layer.count(self, -1)
        self.key_bits, self.value_bits = key_bits, value_bits
        if self.layer is not None:
            if encoded:
                self.book = self.layer.newest_book
            self.layer.count(self, 1)


@dataclass(frozen=True)
class Forecast(Ratios):
    """A run in bytes. stored_bytes: held after the last chunk, on device and host. peak_bytes: on the device, workspace included.
    host_bytes: the most that offloaded spans take. elements: of K and V that are held at the end."""

    frames: int
    held_frames: int
    bf16_bytes: int
    stored_bytes: int
    peak_bytes: int
    workspace_bytes: int
    elements: int
    host_bytes: int = 0


class PlannedLayer:
    """One layer of a run in integers: a `codebook_lifetime.Layer` without tensors. misfit: whether codebooks fit every chunk poorly."""

    def __init__(self, settings: QVGSettings, geometry: Geometry, share: Limits, itemsize: int = 2, misfit: bool = False):
        self.settings, self.geometry, self.share, self.itemsize, self.misfit = settings, geometry, share, itemsize, misfit
        self.spans: list[PlannedSpan] = []
        self.books: list[int] = []
        self.life, self.rules = Lifetime(), Rules(settings, geometry)
        self.largest = 0  # block copied to the host
        self.longest = 0  # frames of a span
        self._sizes: dict[tuple, int] = {}
        # kept up to date, because summing over all spans after every chunk takes time quadratic in a video's length
        self._spans_bytes = self._books_bytes = 0
        self._users: Counter[int] = Counter()

    def count(self, span: PlannedSpan, times: int) -> None:
        """Add a span to the bytes held (times 1), or subtract it (-1)."""
        self._spans_bytes += times * self._span_bytes(span)
        self._use(span.book, times)

    def _use(self, book: int | None, times: int) -> None:
        if book is not None:
            before = self._users[book]
            self._users[book] += times
            if not before or not self._users[book]:
                self._books_bytes += times * self.books[book]

    def evict(self, start: int, stop: int) -> None:
        """Delete `spans[start:stop]`."""
        for span in self.spans[start:stop]:
            self.count(span, -1)
        del self.spans[start:stop]

    @property
    def newest_book(self) -> int | None:
        """None of a codec that trains none."""
        return len(self.books) - 1 if self.books else None

    def book_bytes(self) -> int:
        return self._books_bytes

    def nbytes(self) -> int:
        return sum(self._span_bytes(span, resident=True) for span in self.spans) + self.book_bytes()

    def host_bytes(self) -> int:
        return self.held() if self.settings.offload else 0

    def device_bytes(self) -> int:
        return self.book_bytes() if self.settings.offload else self.held()

    def held(self) -> int:
        """The bytes that `Limits.layer_bytes` limits."""
        return self._spans_bytes + (0 if self.settings.offload else self._books_bytes)

    def append(self, first: int, frames: int, newest: int = 0) -> None:
        """See `cache.layer.LayerCache.append`."""
        codebook_lifetime.store(self, first, frames, newest, self._train, self._keep)

    def _keep(self, first: int, frames: int, sink: bool, bits: tuple[float, float]) -> None:
        book = None if set(bits) <= set(PLAIN_BITS) else self.newest_book
        span = PlannedSpan(first, frames, sink, *bits, book, layer=self)
        self.spans.append(span)
        self.longest = max(self.longest, frames)
        self.count(span, 1)
        if self.settings.offload:
            self.largest = max(self.largest, self._span_bytes(span))

    def _train(self, sink: bool, helpers: list[PlannedSpan], tokens: int) -> None:
        # the layer itself holds its current codebooks
        self._use(self.newest_book, -1)
        self.books.append(sum(codebook_bytes(self.geometry, self.settings.codec, tensor, tokens) for tensor, needed in zip(
            (self.settings.key, self.settings.value), needs_codebooks(self.settings, sink)) if needed))
        self._use(self.newest_book, 1)

    def _span_bytes(self, span: PlannedSpan, resident: bool = False) -> int:
        key = span.frames, span.key_bits, span.value_bits, resident
        if key not in self._sizes:
            settings = replace(self.settings, offload=False, host_gib=0.0) if resident else self.settings
            self._sizes[key] = entry_bytes(self.geometry, settings, span.frames, key[1:3], self.itemsize)
        return self._sizes[key]


def forecast(settings: QVGSettings, geometry: Geometry, frames: int, chunk_frames: int = 3, first_frames: int = 0,
             itemsize: int = 2, misfit: bool = False, read_frames: int | None = None) -> Forecast:
    """The bytes of a run of `frames` latent frames in chunks of `chunk_frames`; with `misfit`, in the worst case.

    first_frames: latent frames of a start image or video that are stored in one pass before the chunks.
    itemsize: bytes of the model's dtype, in which the workspace and 16-bit spans are held. read_frames: see `KVCache`.
    Raises ValueError where the budget is too small, or the settings do not fit the heads.
    """
    share = limits(settings, geometry, chunk_frames, frames, itemsize, read_frames)
    layer = PlannedLayer(settings, geometry, share, itemsize, misfit)
    capacity = read_frames or capacity_frames(settings, max(chunk_frames, first_frames), frames, share.cap_frames)
    starts = ([0] if first_frames else []) + list(range(first_frames, frames, chunk_frames))
    history = read_frames - chunk_frames if read_frames else history_frames(settings, chunk_frames, frames, share.cap_frames)
    staging = staging_bytes(settings, geometry, chunk_frames, history, share, itemsize, first_frames) or 0
    staged = peak = host = longest = 0
    # two branches need it for a chunk's own tokens, too
    workspace = workspace_bytes(geometry, capacity, itemsize) if geometry.branches > 1 else 0
    for start, end in zip(starts, [*starts[1:], frames]):
        if layer.longest > longest:
            longest = layer.longest
            workspace, staged = workspace_bytes(geometry, capacity, itemsize, longest), geometry.stages * staging
        peak = max(peak, geometry.layers * layer.device_bytes() + workspace + staged)
        layer.append(start, end - start)
        peak = max(peak, geometry.layers * layer.device_bytes() + workspace + staged + layer.largest)
        host = max(host, geometry.layers * layer.host_bytes())
    held = sum(span.frames for span in layer.spans)
    return Forecast(
        frames=frames, held_frames=held, bf16_bytes=geometry.bf16_bytes(frames), stored_bytes=geometry.layers * layer.nbytes(),
        peak_bytes=peak, workspace_bytes=workspace, elements=geometry.bf16_bytes(held) // 2, host_bytes=host)
