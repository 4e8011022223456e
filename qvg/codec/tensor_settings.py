"""How K or V alone is stored: the settings that every codec is given."""

from __future__ import annotations

from dataclasses import dataclass

GAINS = ("energy", "unbiased", "mse")
PLANE_BITS = (1, 2, 3, 4)
PLAIN_BITS = (8, 16)
# what any codec may hold besides 8 and 16: eighths of a bit per element, from and up to so many bits
MOST_BITS, LEAST_BITS, EIGHTHS = 4, 0.25, 8
GROUPS = (8, 16, 32, 64, 128, 256)
MAX_STAGES = 4
MAX_CENTROIDS = 256


def require(condition: bool, sentence: str) -> None:
    """Raises ValueError with the sentence unless the condition holds."""
    if not condition:
        raise ValueError(sentence)


def require_bits(name: str, value) -> float:
    """The same number, an int where it is whole. Raises ValueError unless it is 8 or 16, or from 0.25 to 4 in steps of 0.125."""
    good = type(value) in (int, float) and (value in PLAIN_BITS or (LEAST_BITS <= value <= MOST_BITS and EIGHTHS * value % 1 == 0))
    require(good, f"{name} is {value!r}; choose bits per element from {LEAST_BITS} to {MOST_BITS} in steps of {1 / EIGHTHS}, "
                  "or 8 or 16 for plain storage.")
    return int(value) if value == int(value) else value


def require_int(name: str, value, low: int, high: int, hint: str = "") -> None:
    good = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    require(good, f"{name} is {value!r}; it must be a whole number from {low} to {high}.{hint}")


@dataclass(frozen=True)
class TensorSettings:
    """How K or V alone is stored. Raises ValueError with a sentence for a value outside the limits.

    bits: bits per element, of which each codec holds some (`Codec.widths`): 1 to 4, and fractions of a bit with the transform codec;
        8 or 16 for plain storage without codebooks.
    stages: codebooks subtracted one after the other (0 to 4), paper section 4.2.
    centroids: entries of each codebook (1 to 256); fewer are used where a codebook would be trained on too few tokens each.
    group: channels that share a scale; a head narrower than this is one group.
    gain: what the levels preserve: "energy" (for keys: softmax weights keep their size), "unbiased" (for values: means of many tokens stay
        exact) or "mse" (Lloyd's own levels, which shrink).
    symmetric: paper codec only: absmax levels around zero, or min-max levels with a zero point.
    options: settings of a codec's own, as sorted (name, value) pairs; `Codec.options` lists the names it knows.
    """

    bits: float = 2
    stages: int = 1
    centroids: int = MAX_CENTROIDS
    group: int = 64
    gain: str = "energy"
    symmetric: bool = True
    options: tuple[tuple[str, bool | int | float | str], ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "bits", require_bits("bits", self.bits))
        require_int("stages", self.stages, 0, MAX_STAGES)
        require_int("centroids", self.centroids, 1, MAX_CENTROIDS, " An id is one byte.")
        require(type(self.group) is int and self.group in GROUPS,
                f"group is {self.group!r}; choose 8, 16, 32, 64, 128 or 256 channels to a scale.")
        require(self.gain in GAINS, f"gain is {self.gain!r}; choose one of {', '.join(GAINS)}.")
        require(isinstance(self.symmetric, bool), f"symmetric is {self.symmetric!r}; it must be true or false.")
        try:
            pairs = tuple(sorted((name, value) for name, value in self.options))
        except (TypeError, ValueError):
            pairs = None
        plain = pairs is not None and all(isinstance(name, str) and type(value) in (bool, int, float, str) for name, value in pairs)
        require(plain, f"options is {self.options!r}; give pairs of a name and a number, text or truth value.")
        object.__setattr__(self, "options", pairs)

    def option(self, name: str, default=None):
        """The value of one of `options`."""
        return dict(self.options).get(name, default)

    def groups(self, head_dim: int) -> int:
        """Scales that one token of one head holds. Raises ValueError when the groups do not divide a head."""
        group = min(self.group, head_dim)
        require(head_dim % group == 0,
                f"This model's heads have {head_dim} channels, which groups of {group} do not divide; choose a smaller group size.")
        return head_dim // group
