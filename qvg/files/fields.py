"""What plain data from a file must be, stated as data: a line for each field, and a sentence for each value that is something else.

    POINT = record(x=integer(0, 100), y=integer(0, 100), name=optional(text()))
    POINT({"x": 3, "y": 4, "name": None}, "point")      # the same values
    POINT({"x": 3, "y": -4, "name": None}, "point")     # FieldError: point.y is -4; it must be a whole number from 0 to 100

A kind is a callable (value, where) -> value. `where` names the value in the sentence. No kind accepts a value of another type because it
would happen to work: true is no number, and 3.0 no whole one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

Kind = Callable[[Any, str], Any]


class FieldError(ValueError):
    """A value that cannot be, as a sentence without its full stop."""


def short_repr(value) -> str:
    """A value as part of a sentence."""
    if isinstance(value, (list, tuple)) and len(value) > 8:
        return f"a list of {len(value)} values"
    text = f"a {type(value).__name__}" if isinstance(value, dict) else repr(tuple(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def require(good: bool, where: str, value, rule: str) -> None:
    """Raises FieldError unless `good`."""
    if not good:
        raise FieldError(f"{where} is {short_repr(value)}; it must be {rule}")


def integer(low: int, high: int) -> Kind:
    def check(value, where: str) -> int:
        require(type(value) is int and low <= value <= high, where, value, f"a whole number from {low} to {high}")
        return value

    return check


def real_number(low: float, high: float) -> Kind:
    def check(value, where: str) -> float:
        good = type(value) in (int, float) and math.isfinite(value) and low <= value <= high
        require(good, where, value, f"a number from {low:g} to {high:g}")
        return value

    return check


def text(most: int = 100_000) -> Kind:
    def check(value, where: str) -> str:
        require(isinstance(value, str) and len(value) <= most, where, value, f"a text of at most {most} characters")
        return value

    return check


def boolean(value, where: str) -> bool:
    require(isinstance(value, bool), where, value, "true or false")
    return value


def anything(value, where: str):
    return value


def one_of(*choices: str) -> Kind:
    def check(value, where: str) -> str:
        require(isinstance(value, str) and value in choices, where, value, f"one of {', '.join(choices)}")
        return value

    return check


def optional(kind: Kind) -> Kind:
    """What may be null instead."""
    return lambda value, where: None if value is None else kind(value, where)


def list_of(kind: Kind, least: int = 0, most: int = 1_000_000) -> Kind:
    """A list whose values are all of one kind."""
    def check(value, where: str) -> list:
        length = f"of {least}" if least == most else f"of {least} to {most}"
        require(isinstance(value, list) and least <= len(value) <= most, where, value, f"a list {length} values")
        return [kind(part, f"{where}[{index}]") for index, part in enumerate(value)]

    return check


def tuple_of(*kinds: Kind) -> Kind:
    """A list with a kind for each of its values."""
    def check(value, where: str) -> list:
        require(isinstance(value, list) and len(value) == len(kinds), where, value, f"a list of {len(kinds)} values")
        return [kind(part, f"{where}[{index}]") for index, (kind, part) in enumerate(zip(kinds, value))]

    return check


def mapping(kind: Kind) -> Kind:
    """An object whose values are all of one kind, under any names."""
    def check(value, where: str) -> dict:
        require(isinstance(value, dict), where, value, "an object")
        return {name: kind(part, f"{where}[{short_repr(name)}]") for name, part in value.items()}

    return check


def record(older: dict[str, Any] | None = None, /, **kinds: Kind) -> Kind:
    """An object of just these fields. older: values of those that an older release did not write, by name."""
    defaults = older or {}

    def check(value, where: str) -> dict:
        require(isinstance(value, dict), where, value, "an object")
        for name in value:
            if name not in kinds:
                raise FieldError(f"{where} has a field {short_repr(name)}, which this release does not know")
        for name in kinds:
            if name not in value and name not in defaults:
                raise FieldError(f"{where} lacks its field {name}")
        return {name: kind(value.get(name, defaults.get(name)), f"{where}.{name}") for name, kind in kinds.items()}

    return check


def partial_record(**kinds: Kind) -> Kind:
    """An object that has these fields and any others; only these are given."""
    def check(value, where: str) -> dict:
        require(isinstance(value, dict), where, value, "an object")
        return record(**kinds)({name: value[name] for name in kinds if name in value}, where)

    return check
