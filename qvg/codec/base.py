"""What a codec is: the interface behind which everything lies that differs between ways to keep keys and values.

A **span** is what one chunk of video adds to one layer's K or V. A codec trains what spans share (a **codebook**), encodes tokens to a
span, decodes spans, drops precision, and states once the name, dtype, shape and kind of each tensor of a span and of a codebook: the bytes
of budgets and forecasts, host memory, session files and charts all follow from that statement.

A new codec derives from `plain.PlainCodec`, which keeps 8 and 16 bits for it, and registers itself: `docs/extending.md` has one of 40
lines.

Axes: T tokens, R rows (batch x heads), D channels of a head.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .tensor_settings import PLAIN_BITS, TensorSettings, require

# what values of a stored tensor may be at most: no key or value comes near, and a network can still add many of them in float32
LARGEST = 2.0**40


class SpanShape(NamedTuple):
    """Tokens, rows (batch x heads) and channels of a head."""

    tokens: int
    rows: int
    dim: int


@dataclass(frozen=True)
class Part:
    """One tensor of a span or of a codebook.

    shape: the length of every axis; of a codebook in a file, a range of lengths where several are possible. kind: what the memory chart
    counts it as. within: least and greatest value that a file may hold. e4m3: whether it holds E4M3 codes, none of which may be NaN.
    """

    dtype: torch.dtype
    shape: tuple[int | range, ...]
    kind: str
    within: tuple[float, float] | None = None
    e4m3: bool = False

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass
class Tables:
    """Lookup tables that codecs make on a device as they need them. They live as long as the cache that owns them."""

    device: Any
    _made: dict[Hashable, Any] = field(default_factory=dict)

    def get(self, key: Hashable, make: Callable[[Any], Any]) -> Any:
        """What `make(device)` returned for this key the first time."""
        if key not in self._made:
            self._made[key] = make(self.device)
        return self._made[key]


class Span(ABC):
    """The encoded tokens of one chunk, of one layer's K or V. codebook: what it shares with other spans, or None."""

    codebook: Any

    @property
    @abstractmethod
    def bits(self) -> float:
        """Bits per element that the span holds, scales and codebook not counted."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """T, R, D"""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The span's tensors by the names that `Codec.span_parts` states."""

    @abstractmethod
    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Span:
        """The same span with its tensors elsewhere, such as in host memory. tensors: by the names of `tensors`."""

    @abstractmethod
    def decode(self, rows: slice, tables: Tables) -> Tensor:
        """Some rows as float32 [T, r, D], in memory that the span does not hold."""

    def drop(self, bits: float) -> None:
        """Forget all but the first `bits` bits per element, and free their memory. Codecs that are not nested never get here."""
        raise NotImplementedError

    def misfit(self) -> Tensor | None:
        """How badly the codebook fits, float32 [2] on the span's device: the mean square of what it leaves, in units of what it left of the
        tokens it was trained on (1 where that is unknown), and a value that is not finite if any token was not. None: nothing is known."""
        return None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())


class Codec(ABC):
    """One way to keep keys and values. An instance is hashable and has no state; it is registered in `registry.CODECS` under `name`.

    A codebook, if the codec has any, is an object of its own kind: a frozen dataclass whose fields are its tensors (or `book_tensors` is
    overridden), with `nbytes`, and with `size`, which is what `book_size` returned when it was trained.

    nested: whether a span can drop bits without being encoded anew. adaptive: whether a codebook is replaced as soon as it no longer fits
    (see `cache.codebook_lifetime`); others serve for `codebook_frames`. widths: bits per element that a span can hold, widest first.
    accumulates: whether a codebook is of all tokens that it and those before it were trained on, and so settles as a video goes on.
    options: the codec's own settings with their defaults, see `TensorSettings.options`.
    """

    name: str
    nested = False
    adaptive = False
    accumulates = False
    widths: tuple[float, ...] = (16, 8)
    options: Mapping[str, bool | int | float | str] = {}

    def check(self, settings) -> None:
        """settings: `settings.QVGSettings`. Raises ValueError with a sentence when the codec cannot do what the settings ask for: options
        that it does not know, bits that are not in `widths`, bits to drop that it cannot drop."""
        for name, tensor in (("key", settings.key), ("value", settings.value)):
            unknown = [option for option, _ in tensor.options if option not in self.options]
            if unknown:
                known = f"it knows {', '.join(self.options)}" if self.options else "it has none of its own"
                raise ValueError(f"The {self.name} codec does not know the option {unknown[0]!r} of {name}; {known}.")
            self._check_widths(settings, name, tensor.bits)

    def _check_widths(self, settings, name: str, settled: float) -> None:
        known = ", ".join(map(str, sorted(self.widths)))
        require(settled in self.widths,
                f"{name} is to hold {settled} bits, but the {self.name} codec holds {known}; choose one of these, or another codec.")
        for option, frames in (("sink_bits", settings.sink_frames), ("recent_bits", settings.recent_frames)):
            bits = max(getattr(settings, option), settled)
            require(not frames or bits in self.widths,
                    f"{option} is {bits}, but the {self.name} codec holds {known} bits; choose one of these.")
        recent = max(settings.recent_bits, settled) if settings.recent_frames else settled
        require(self.nested or recent == settled or recent in PLAIN_BITS,
                f"The {self.name} codec cannot drop bits of a span that holds {recent}; set recent_frames to 0, or recent_bits to 8 or 16.")

    def check_heads(self, tensor: TensorSettings, head_dim: int) -> None:
        """Raises ValueError with a sentence when the codec cannot keep heads of so many channels."""
        if head_dim % 8:
            raise ValueError(f"A byte holds bits of 8 channels, so a head dim of {head_dim} cannot be packed; "
                             "it must be a multiple of 8.")
        tensor.groups(head_dim)

    # what a span and a codebook consist of

    @abstractmethod
    def span_parts(self, tensor: TensorSettings, bits: float, shape: SpanShape, dtype: torch.dtype) -> dict[str, Part]:
        """Every tensor of a span that holds `bits`, by name. dtype: of the model, in which 16-bit spans are kept."""

    @abstractmethod
    def book_parts(self, tensor: TensorSettings, size: int | range, rows: int, dim: int) -> dict[str, Part]:
        """Every tensor of a codebook of `size` centroids (or whatever the codec counts), by name."""

    @abstractmethod
    def make_span(self, tensor: TensorSettings, bits: float, tensors: Mapping[str, Tensor], codebook) -> Span:
        """The inverse of `Span.tensors`; tensors may lie in memory as a file has them."""

    @abstractmethod
    def make_book(self, tensors: Mapping[str, Tensor]):
        """The inverse of `book_tensors`."""

    def book_tensors(self, codebook) -> dict[str, Tensor]:
        return {name: getattr(codebook, name) for name in codebook.__dataclass_fields__}

    def book_size(self, tensor: TensorSettings, tokens: int) -> int:
        """Size of a codebook that is trained on so many tokens of a head."""
        return 0

    def waits(self, tensor: TensorSettings, tokens: int, dim: int) -> bool:
        """Whether so few tokens are better kept as int8 until more of them can train a codebook."""
        return False

    def check_stored(self, tensors: Mapping[str, Tensor], codebook, where: str) -> None:
        """Raises ValueError when a file's tensors, each of which is as its `Part` says, contradict the codebook. where: names the span."""
        return

    # tokens to spans and back; K and V come together, so that a codec can do both in one go

    def needs_codebook(self, bits: float) -> bool:
        """Whether tokens are encoded to so many bits with a codebook."""
        return False

    @abstractmethod
    def train(self, xs: Sequence[Tensor], tensors: Sequence[TensorSettings], needed: Sequence[bool], iterations: int,
              generator: torch.Generator, previous: Sequence) -> list:
        """Codebooks of tokens [T, R, D] of K and V, None where none is needed. previous: those before, to start from."""

    @abstractmethod
    def encode(self, xs: Sequence[Tensor], tensors: Sequence[TensorSettings], bits: Sequence[float], codebooks: Sequence) -> list[Span]:
        """Tokens [T, R, D] of K and V to a span each."""

    def joins(self, a: Span, b: Span) -> bool:
        """Whether `decode` can take two spans of one tensor, one behind the other."""
        return False

    def decode(self, sides: Sequence[Sequence[Span]], rows: slice, tables: Tables) -> list[Tensor]:
        """K and V, each given as spans that all join the first, to float32 [T of all, r, D] each, in memory of its own."""
        return [owned(spans[0], spans[0].decode(rows, tables)) for spans in sides]


def check_ids(ids: Tensor, centroids: int, where: str) -> None:
    """Raises ValueError when an id names no centroid."""
    if ids.numel() and int(ids.max()) >= centroids:
        raise ValueError(f"{where}.ids holds {int(ids.max())}, but its codebook has {centroids} centroids")


def check_largest(largest: float, where: str) -> None:
    """Raises ValueError when a span can represent values that are too large, or not finite."""
    if not largest <= LARGEST:
        raise ValueError(f"the values that {where} stands for are up to {largest:g}; they must be at most {LARGEST:g}")


def owned(span: Span, decoded: Tensor) -> Tensor:
    """A copy of `decoded` if it shares memory with the span, because RoPE is applied to it in place."""
    held = {tensor.untyped_storage().data_ptr() for tensor in span.tensors().values()}
    return decoded.clone() if decoded.untyped_storage().data_ptr() in held else decoded
