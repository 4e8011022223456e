"""Types for argparse that refuse a wrong value with a sentence.

    command.add_argument("--seconds", type=number(above=0, most=86400))
    command.add_argument("--seed", type=whole(0, 2**64 - 1))
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable

import torch

# int() also accepts 1_000 and digits of other scripts, which are more likely typos
WHOLE = re.compile(r"[+-]?[0-9]+")
DEVICES = ("cpu", "cuda", "mps", "xpu")
DAY = 86400
# GiB, more than any machine has
MOST_GIB = 99_999


def whole(least: int, most: int) -> Callable[[str], int]:
    """A whole number from `least` to `most`."""
    def parse(text: str) -> int:
        # int() of thousands of digits is slow
        value = int(text) if WHOLE.fullmatch(text) and len(text) < 30 else None
        if value is None or not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number from {least} to {most}")
        return value

    return parse


def number(least: float = 0.0, most: float = math.inf, above: float | None = None) -> Callable[[str], float]:
    """A finite number from `least`, or above `above`, to `most`."""
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        low = value > above if above is not None else value >= least
        if not (math.isfinite(value) and low and value <= most):
            begin = f"above {above:g}" if above is not None else f"from {least:g}"
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number {begin} to {most:g}")
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
