"""Values on a command line, as types for argparse: what is not one of them is refused with a sentence, never taken as another.

    command.add_argument("--seconds", type=number(above=0, most=86400))
    command.add_argument("--seed", type=whole(0, 2**64 - 1))
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable

import torch

# one text each: numbers of other scripts, 1_000 and 0x10 are no slips of the finger that should pass
WHOLE = re.compile(r"[+-]?[0-9]+")
DEVICES = ("cpu", "cuda", "mps", "xpu")
DAY = 86400
# GiB that no machine has
MOST_GIB = 99_999


def whole(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        # of numbers with thousands of digits, too
        value = int(text) if WHOLE.fullmatch(text) and len(text) < 30 else None
        if value is None or not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is no whole number from {least} to {most}")
        return value

    return parse


def number(least: float = 0.0, most: float = math.inf, above: float | None = None) -> Callable[[str], float]:
    """From `least`, or from anything above `above`, to `most`."""
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        low = value > above if above is not None else value >= least
        if not (math.isfinite(value) and low and value <= most):
            begin = f"above {above:g}" if above is not None else f"from {least:g}"
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is no number {begin} to {most:g}")
        return value

    return parse


def budget(text: str) -> float | str:
    """GiB, or "auto"."""
    if text == "auto":
        return text
    try:
        return number(most=MOST_GIB)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, nor auto") from None


def device(text: str) -> str:
    """A device on which torch can make a tensor."""
    try:
        if torch.device(text).type not in DEVICES:
            raise ValueError(f"choose one of {', '.join(DEVICES)}")
        torch.zeros(1, device=text)
    except (RuntimeError, AssertionError, NotImplementedError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise argparse.ArgumentTypeError(f"{text[:40]!r} cannot be used here ({reason[0]})") from None
    return text
