"""Values and errors as parts of a sentence."""

from __future__ import annotations


def short_repr(value) -> str:
    """A value in at most 60 characters; a long list by its length."""
    if isinstance(value, (list, tuple)) and len(value) > 8:
        return f"a list of {len(value)} values"
    text = f"a {type(value).__name__}" if isinstance(value, dict) else repr(tuple(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def first_line(error: Exception) -> str:
    """The first line of an error's message, in at most 120 characters and without its full stop."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:120].rstrip(" .:")
