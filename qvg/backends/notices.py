"""What users are told: kernels that are being compiled, and which backend ran each op of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

# number of calls by (op, backend that ran it, why no preferred one did). No backend: something optional that was not used
Calls = dict[tuple[str, str, str], int]

_listeners: ContextVar[tuple[Callable[[str], None], ...]] = ContextVar("qvg_listeners", default=())
_records: ContextVar[tuple[Calls, ...]] = ContextVar("qvg_records", default=())


@contextmanager
def on_compile(listener: Callable[[str], None]) -> Iterator[None]:
    """Inside, `listener` is called with a sentence before a kernel is compiled, and with "" afterwards; so are outer listeners."""
    token = _listeners.set((*_listeners.get(), listener))
    try:
        yield
    finally:
        _listeners.reset(token)


def tell(sentence: str) -> None:
    """Call every listener of `on_compile`."""
    for listener in _listeners.get():
        listener(sentence)


@contextmanager
def recording(calls: Calls) -> Iterator[None]:
    """Inside, `calls` counts which backend runs what; see `summary`. An outer recording does not count these calls."""
    token = _records.set((calls,))
    try:
        yield
    finally:
        _records.reset(token)


def note(op: str, backend: str = "", reason: str = "") -> None:
    """Count a call. reason: why no preferred backend ran it. Without a backend: `op` names an optional kernel that was not used."""
    for calls in _records.get():
        calls[op, backend, reason] = calls.get((op, backend, reason), 0) + 1


def summary(calls: Calls) -> dict[str, str]:
    """The backend of each op that was run, for example "triton", "torch (why)" or "triton; 3 of 5 calls in torch (why)"."""
    return {op: _sentence({key[1:]: count for key, count in calls.items() if key[0] == op}) for op in dict.fromkeys(op for op, *_ in calls)}


def _sentence(calls: dict[tuple[str, str], int]) -> str:
    # a backend that was preferred and could has no reason, and comes first
    order = dict.fromkeys(backend for backend, _ in sorted(calls, key=lambda key: bool(key[1])))
    parts = []
    for backend in order:
        count = sum(number for key, number in calls.items() if key[0] == backend)
        share = f"{count} of {sum(calls.values())} calls in " if parts else ""
        why = "; ".join(reason for key, reason in calls if key == backend and reason)
        parts.append(share + (backend or "not used") + (f" ({why})" if why else ""))
    return "; ".join(parts)
