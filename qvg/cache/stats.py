"""What a cache holds, in bytes counted from its tensors."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field, replace

# what the bytes of spans are counted as; a codec may state other kinds, which follow these
SPAN_KINDS = ("planes", "scales", "ids", "plain")
KINDS = (*SPAN_KINDS[:3], "codebooks", "plain")


class Ratios:
    """What a count and a forecast have in common: bf16_bytes, stored_bytes, peak_bytes and elements, and what follows from them."""

    bf16_bytes: int
    stored_bytes: int
    peak_bytes: int
    elements: int

    @property
    def stored_ratio(self) -> float:
        return self.bf16_bytes / max(1, self.stored_bytes)

    @property
    def peak_ratio(self) -> float:
        return self.bf16_bytes / max(1, self.peak_bytes)

    @property
    def bits_per_element(self) -> float:
        """Stored bits for each element of K and V that is held."""
        return 8 * self.stored_bytes / max(1, self.elements)


@dataclass(frozen=True)
class CacheStats(Ratios):
    """What a cache holds at one moment, in bytes counted from its tensors.

    stored_bytes: spans and codebooks. peak_bytes: the highest sum of stored bytes and workspace so far, on the device. bf16_bytes: all
    frames so far at two bytes per element. frames, held_frames: latent frames stored so far, and those still held. elements: of K and V
    that are held. by_kind: stored bytes by what the codec counts them as. by_layer: stored bytes of each layer. by_bits: stored bytes
    without codebooks, by bits per element. host_bytes: the part of stored_bytes that lies in host memory. backends: which backend ran each
    op, and why a faster one did not; see `backends.summary`. attention: exact or fast, and why; see `attention.choice`.
    """

    frames: int
    held_frames: int
    tokens: int
    elements: int
    stored_bytes: int
    workspace_bytes: int
    peak_bytes: int
    bf16_bytes: int
    by_kind: dict[str, int]
    by_layer: tuple[int, ...]
    by_bits: dict[float, int]
    host_bytes: int = 0
    backends: dict[str, str] = field(default_factory=dict)
    attention: str = ""

    @staticmethod
    def total(parts: list[CacheStats]) -> CacheStats:
        """Of several caches that hold the same frames, such as those of the conditions of a run."""
        first, kinds = parts[0], dict.fromkeys(kind for part in parts for kind in part.by_kind)
        counts = {name: sum(getattr(part, name) for part in parts)
                  for name in ("elements", "stored_bytes", "workspace_bytes", "peak_bytes", "bf16_bytes", "host_bytes")}
        return replace(first, **counts, by_kind={kind: sum(part.by_kind.get(kind, 0) for part in parts) for kind in kinds},
                       by_layer=tuple(map(sum, zip(*(part.by_layer for part in parts)))),
                       by_bits=dict(sum((Counter(part.by_bits) for part in parts), Counter())),
                       backends={op: said for part in parts for op, said in part.backends.items()})

    def as_dict(self) -> dict:
        return asdict(self) | {"ratio": self.stored_ratio, "peak_ratio": self.peak_ratio, "bits_per_element": self.bits_per_element}
