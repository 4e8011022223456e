"""Checks of plain data from a file, stated as a schema: a line per field, and a sentence for each value that does not fit.

    POINT = record(x=integer(0, 100), y=integer(0, 100), name=optional(text()))
    POINT({"x": 3, "y": 4, "name": None}, "point")      # the same values
    POINT({"x": 3, "y": -4, "name": None}, "point")     # FieldError: point.y is -4; it must be a whole number from 0 to 100

A check is a function (value, where) -> value. `where` names the value in the sentence. Types are strict: true is not a number, and 3.0 is
not a whole number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .sentences import short_repr

Check = Callable[[Any, str], Any]


class FieldError(ValueError):
    """A value that does not fit, as a sentence without its full stop."""


def require(good: bool, where: str, value, rule: str) -> None:
    """Raises FieldError unless `good`."""
    if not good:
        raise FieldError(f"{where} is {short_repr(value)}; it must be {rule}")


def integer(low: int, high: int) -> Check:
    """A whole number within limits."""
    def check(value, where: str) -> int:
        require(type(value) is int and low <= value <= high, where, value, f"a whole number from {low} to {high}")
        return value

    return check


def real_number(low: float, high: float) -> Check:
    """A finite number within limits."""
    def check(value, where: str) -> float:
        good = type(value) in (int, float) and math.isfinite(value) and low <= value <= high
        require(good, where, value, f"a number from {low:g} to {high:g}")
        return value

    return check


def text(most: int = 100_000) -> Check:
    """A string of limited length."""
    def check(value, where: str) -> str:
        require(isinstance(value, str) and len(value) <= most, where, value, f"a text of at most {most} characters")
        return value

    return check


def boolean(value, where: str) -> bool:
    require(isinstance(value, bool), where, value, "true or false")
    return value


def anything(value, where: str):
    return value


def one_of(*choices: str) -> Check:
    """One of several strings."""
    def check(value, where: str) -> str:
        require(isinstance(value, str) and value in choices, where, value, f"one of {', '.join(choices)}")
        return value

    return check


def optional(inner: Check) -> Check:
    """A value, or null."""
    return lambda value, where: None if value is None else inner(value, where)


def list_of(inner: Check, least: int = 0, most: int = 1_000_000) -> Check:
    """A list of limited length, with one check for all of its values."""
    def check(value, where: str) -> list:
        length = f"of {least}" if least == most else f"of {least} to {most}"
        require(isinstance(value, list) and least <= len(value) <= most, where, value, f"a list {length} values")
        return [inner(part, f"{where}[{index}]") for index, part in enumerate(value)]

    return check


def tuple_of(*inner: Check) -> Check:
    """A list with a check for each of its values."""
    def check(value, where: str) -> list:
        require(isinstance(value, list) and len(value) == len(inner), where, value, f"a list of {len(inner)} values")
        return [one(part, f"{where}[{index}]") for index, (one, part) in enumerate(zip(inner, value))]

    return check


def mapping(inner: Check) -> Check:
    """An object with any names, and one check for all of its values."""
    def check(value, where: str) -> dict:
        require(isinstance(value, dict), where, value, "an object")
        return {name: inner(part, f"{where}[{short_repr(name)}]") for name, part in value.items()}

    return check


def record(older: dict[str, Any] | None = None, /, **fields: Check) -> Check:
    """An object of exactly these fields. older: values of the fields that an older release did not write."""
    defaults = older or {}

    def check(value, where: str) -> dict:
        require(isinstance(value, dict), where, value, "an object")
        for name in value:
            if name not in fields:
                raise FieldError(f"{where} has a field {short_repr(name)}, which this release does not know")
        for name in fields:
            if name not in value and name not in defaults:
                raise FieldError(f"{where} lacks its field {name}")
        return {name: inner(value.get(name, defaults.get(name)), f"{where}.{name}") for name, inner in fields.items()}

    return check


def partial_record(**fields: Check) -> Check:
    """An object that has these fields and perhaps others; returns only these."""
    def check(value, where: str) -> dict:
        require(isinstance(value, dict), where, value, "an object")
        return record(**fields)({name: value[name] for name in fields if name in value}, where)

    return check
