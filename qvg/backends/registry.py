"""The ops, and the backends that implement them, in the order in which they are tried.

`register(Backend(...))` adds one, anywhere and at any time. `execute` uses the first that can; `report` tells what is known before that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from operator import attrgetter

import torch

from ..registry import Registry
from .backend import Backend
from .launches import FAILURES

OPS = {
    "assign": "nearest centroid of every token",
    "update": "means of the tokens of each centroid",
    "kmeans": "centroids of tokens, repeated steps of those two",
    "store": "centroids to bytes, and the tokens minus their centroids",
    "encode": "tokens to bit planes", "encode_transform": "tokens to bits of components",
    "eigh": "eigenvectors of symmetric matrices",
    "rotate": "RoPE on tokens",
    "rotate_chunk": "RoPE on a chunk's own queries and keys, and its tokens into the workspace",
    "project": "PRoPE on tokens, and RoPE of the same",
    "recover": "spans to tokens, keys before RoPE",
    "decode": "spans to keys and values, with RoPE",
    "attend": "attention in eight bits",
    "join": "attention to parts of the keys, joined",
}
# the name of the reference implementations, which are in plain torch
REFERENCE = "torch"
_backends: Registry[Backend] = Registry("backend")
_forced: ContextVar[str | None] = ContextVar("qvg_backend", default=None)


def register(backend: Backend) -> Backend:
    """Add a backend. Raises ValueError when its name is taken or it implements something that is not an op."""
    if backend.name == REFERENCE:
        raise ValueError(f"{REFERENCE!r} is the name of the reference implementations; choose another name.")
    for op in backend.ops or ():
        require_op(op)
    return _backends.register(backend)


def remove(name: str) -> None:
    """Undo `register`."""
    _backends.remove(name)


def forced() -> str | None:
    """The backend that `force` asks for here, if any."""
    return _forced.get()


def names() -> list[str]:
    """All backends in the order in which they are tried."""
    return [*(backend.name for backend in _ordered()), REFERENCE]


def _ordered() -> list[Backend]:
    known = list(_backends.values())
    # an op runs thousands of times per chunk, mostly with one backend
    return known if len(known) < 2 else sorted(known, key=attrgetter("priority"), reverse=True)


@contextmanager
def force(backend: str) -> Iterator[None]:
    """Inside, every op runs on this backend, or raises Unsupported with the reason. Raises ValueError for an unknown name."""
    if backend not in names():
        raise ValueError(f"There is no backend {backend!r}; choose one of {', '.join(names())}.")
    token = _forced.set(backend)
    try:
        yield
    finally:
        _forced.reset(token)


def refusal(op: str, device: torch.device | str) -> str:
    """Why only the reference runs `op` on this device, as far as is known and be it at some shapes; empty when a backend does."""
    backend, reason = _expected(op, torch.device(device))
    return reason if backend == REFERENCE else ""


def report(device: torch.device | str) -> list[tuple[str, str, str]]:
    """(op, the backend that runs it on this device as far as is known, why no preferred one does) of every op."""
    return [(op, *_expected(op, torch.device(device))) for op in OPS]


def _expected(op: str, device: torch.device) -> tuple[str, str]:
    require_op(op)
    reasons = []
    for backend in candidates(op):
        reason = backend.unable(op, device, forced() == backend.name) or _earlier_failure(backend, op, device)
        if not reason:
            return backend.name, "; ".join(reasons)
        reasons.append(reason)
    return REFERENCE, "; ".join(reasons) or no_candidate()


def candidates(op: str) -> list[Backend]:
    """The backends to try, in order. Those that are known not to implement the op are left out without a word."""
    if (name := forced()) is not None:
        return [] if name == REFERENCE else [_backends[name]]
    return [backend for backend in _ordered() if backend.ops is None or op in backend.ops]


def no_candidate() -> str:
    """Why the reference runs an op that has no candidates."""
    return f"{REFERENCE} was asked for" if forced() == REFERENCE else "no backend implements it"


def _earlier_failure(backend: Backend, op: str, device: torch.device) -> str:
    return next((reason for (name, on, of, *_), reason in FAILURES.items() if (name, on.type, of) == (backend.name, device.type, op)), "")


def require_op(op: str) -> None:
    """Raises ValueError for an unknown op."""
    if op not in OPS:
        raise ValueError(f"There is no op {op!r}; the ops are {', '.join(OPS)}.")


TRITON = register(Backend("triton", ("cuda",), module=".kernels.ops", title="Triton", requirement="a CUDA or ROCm device", priority=0))
