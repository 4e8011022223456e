"""What kernels could not do, so that a slow failure is not repeated.

A kernel that fails is skipped at the same shapes alone, because another shape may work. After `GIVE_UP` shapes it is skipped at all of
them, because a failing compiler takes seconds each time.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import is_dataclass
from typing import Any

from torch import Tensor

# shapes at which one variant of a kernel may fail before it is no longer tried
GIVE_UP = 3


class Unsupported(ValueError):
    """An op that a backend cannot run; the text is the reason, as the end of a sentence."""


class Failures:
    """Reasons by what was launched and by the shapes of the call."""

    def __init__(self):
        self._reasons: dict[tuple, dict[Hashable, str]] = {}

    def add(self, launch: tuple, shapes: Hashable, reason: str) -> bool:
        """Record a failure. Returns whether `launch` is given up at all shapes."""
        reasons = self._reasons.setdefault(launch, {})
        reasons[shapes] = reason
        return len(reasons) >= GIVE_UP

    def reason(self, launch: tuple, shapes: Hashable) -> str:
        """Why `launch` is not to be tried at these shapes; empty when it is."""
        reasons = self._reasons.get(launch)
        if not reasons:
            return ""
        return next(iter(reasons.values())) if len(reasons) >= GIVE_UP else reasons.get(shapes, "")

    def items(self) -> Iterator[tuple[tuple, str]]:
        """(launch, reason) of every failure."""
        return ((launch, reason) for launch, reasons in self._reasons.items() for reason in reasons.values())

    def __contains__(self, launch: object) -> bool:
        """Whether `launch` has failed at any shapes."""
        return launch in self._reasons


def sentence_of(error: BaseException) -> str:
    """An exception in one line: its type and the first line of its text."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def shapes_of(x: Any) -> Hashable:
    """Shapes and dtypes of an op's arguments. It keeps no tensor alive."""
    if isinstance(x, Tensor):
        return x.dtype, x.shape
    if isinstance(x, (tuple, list)):
        return tuple(map(shapes_of, x))
    if is_dataclass(x):
        return tuple(map(shapes_of, vars(x).values()))
    return x if isinstance(x, (int, str)) else type(x).__name__
