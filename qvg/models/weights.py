"""Types in which a model's weights are stored, and their bits per element.

GGUF files store the matrices of a transformer block in groups of 32 or 256 elements with their scales, and everything else (embeddings,
modulation, head) in 16 bits. The mixed types (`_M`, and `Q4_K_S`) give more bits to the value projections and to the second matrix of the
feed-forward. Scaled FP8 files store the same matrices in 8 bits. Sources: ggml's block sizes, and the rules of the tool that makes such
files (city96/ComfyUI-GGUF, tools/lcpp.patch).
"""

from __future__ import annotations

from dataclasses import dataclass

# bits per element: 8 * bytes of a group / elements of a group
Q8_0, Q6_K, Q5_K, Q4_K, Q3_K = 34 * 8 / 32, 210 * 8 / 256, 176 * 8 / 256, 144 * 8 / 256, 110 * 8 / 256


@dataclass(frozen=True)
class WeightType:
    """Bits per element of the matrices of a block. value: of the value projections. down: of the second matrix of the feed-forward."""

    bits: float
    value: float
    down: float

    @classmethod
    def of(cls, bits: float, value: float = 0, down: float = 0) -> WeightType:
        return cls(bits, value or bits, down or bits)


WEIGHTS = {
    "bf16": WeightType.of(16),
    "fp8": WeightType.of(8),
    "Q8_0": WeightType.of(Q8_0),
    "Q6_K": WeightType.of(Q6_K),
    "Q5_K_M": WeightType.of(Q5_K, Q6_K, Q6_K),
    "Q5_K_S": WeightType.of(Q5_K),
    "Q4_K_M": WeightType.of(Q4_K, Q6_K, Q6_K),
    "Q4_K_S": WeightType.of(Q4_K, down=Q5_K),
    "Q3_K_M": WeightType.of(Q3_K, Q4_K, Q4_K),
    "Q3_K_S": WeightType.of(Q3_K),
}
GGUF = tuple(name for name in WEIGHTS if name.startswith("Q"))


def weight_type(name: str) -> str:
    """A key of WEIGHTS, ignoring case. Raises ValueError for an unknown name."""
    found = next((known for known in WEIGHTS if known.lower() == name.lower()), None)
    if found is None:
        raise ValueError(f"There is no weight type {name!r}; choose one of {', '.join(WEIGHTS)}.")
    return found
