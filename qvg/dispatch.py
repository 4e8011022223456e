"""Which backend does an op, and why another one does not.

    dispatch.run("assign", twin, x, centroids)      # the fastest backend that can
    with dispatch.force("torch"): ...               # this one or an error that says why not
    with dispatch.on_compile(print): ...            # told when a kernel is about to be compiled

Every op has a torch twin, which is its definition and runs on every device. `kernels/` holds the same ops in Triton for CUDA and ROCm;
it is imported when an op first meets such a device, never before, and what stands in its way is kept as a sentence: triton is missing,
the device is another, the kernel did not compile, these shapes have no kernel. A refused op falls back to its twin.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("triton", "torch")
OPS = {
    "assign": "nearest centroid of every token",
    "update": "means of the tokens of each centroid",
    "kmeans": "centroids of tokens, step after step of those two",
    "store": "centroids to bytes, and what they leave of tokens",
    "encode": "tokens to bit planes",
    "rotate": "RoPE on tokens",
    "turn": "RoPE on a chunk's own queries and keys, and its tokens into the workspace",
    "decode": "spans to keys and values, with RoPE",
}

# device types that kernels are chosen for; ROCm calls itself cuda
_DEVICES = ("cuda",)
_forced: ContextVar[str | None] = ContextVar("qvg_backend", default=None)
# what a kernel that had been chosen said when it ran: (op, device type) -> sentence
_failures: dict[tuple[str, str], str] = {}
_listeners: ContextVar[tuple[Callable[[str], None], ...]] = ContextVar("qvg_listeners", default=())
# kernels that this process has launched, each with what it was compiled for
_launched: set[tuple] = set()


class Unsupported(ValueError):
    """An op that a backend cannot do; the text says why."""


@contextmanager
def force(backend: str) -> Iterator[None]:
    """Inside, every op runs on this backend, or raises Unsupported with the reason. Raises ValueError for an unknown name."""
    if backend not in BACKENDS:
        raise ValueError(f"There is no backend {backend!r}; choose one of {', '.join(BACKENDS)}.")
    token = _forced.set(backend)
    try:
        yield
    finally:
        _forced.reset(token)


@contextmanager
def on_compile(listener: Callable[[str], None]) -> Iterator[None]:
    """Inside, `listener` gets a sentence before a kernel is compiled, and an empty one when that is done. Listeners around it do, too."""
    token = _listeners.set((*_listeners.get(), listener))
    try:
        yield
    finally:
        _listeners.reset(token)


def before_launch(op: str, *variant) -> None:
    """For kernels to call before a launch. variant: what the compiler must know of it, and the device."""
    key = op, *variant
    if key not in _launched:
        _launched.add(key)
        # where Triton finds it on the disk, compiled in an earlier run, this is said for a moment only
        sentence = f"Compiling GPU kernels (first run): {op}"
        logging.info("QVG: %s", sentence)
        _tell(sentence)


def _tell(sentence: str) -> None:
    for listener in _listeners.get():
        listener(sentence)


@cache
def _kernels() -> tuple[dict[str, Callable], str]:
    """Kernels by op, and why there are none."""
    try:
        from ..kernels import ops
    except ImportError as error:
        return {}, f"triton cannot be imported ({error})"
    return ops.OPS, ""


@cache
def _interprets() -> bool:
    """Whether Triton runs its kernels in Python, on any device, as the tests make it do."""
    from ..kernels import ops

    return ops.INTERPRETED


def refusal(op: str, device: torch.device | str) -> str:
    """Why Triton does not do this op on this device as far as is known; empty when it does."""
    if _forced.get() == "torch":
        return "torch was asked for"
    device = torch.device(device)
    elsewhere = f"Triton kernels need a CUDA or ROCm device, not {device.type}"
    if device.type not in _DEVICES and _forced.get() != "triton":
        return elsewhere
    kernels, reason = _kernels()
    if reason:
        return reason
    if op not in kernels:
        return f"there is no Triton kernel for {op}"
    if device.type not in _DEVICES and not (device.type == "cpu" and _interprets()):
        return elsewhere
    return _failures.get((op, device.type), "")


def run(op: str, twin: Callable, *arguments) -> Any:
    """Do `op` with the first backend that can. The twin and the kernel take the same arguments, a tensor among them."""
    device = next(x.device for x in arguments if isinstance(x, Tensor))
    forced = _forced.get()
    if forced == "torch":
        return twin(*arguments)
    reason = refusal(op, device)
    if not reason and torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
        reason = "Triton kernels have no gradients"
    if not reason:
        launched = len(_launched)
        try:
            with _current(device):
                return _kernels()[0][op](*arguments)
        except Unsupported as error:
            reason = str(error)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # a compiler that is missing or fails shows itself in many types; the twin needs none
            if forced:
                raise
            reason = f"the Triton kernel failed ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
            _failures[op, device.type] = reason
            logging.warning("QVG: %s runs in plain torch from here on: %s", op, reason)
        finally:
            if len(_launched) > launched:
                _tell("")
    if forced:
        raise Unsupported(f"{op} cannot run on {forced}: {reason}.")
    return twin(*arguments)


def _current(device: torch.device):
    """Triton launches on the current device, which may be another than the tensors'."""
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        return torch.cuda.device(device)
    return nullcontext()


def report(device: torch.device | str) -> list[tuple[str, str, str]]:
    """(op, backend, why not Triton) of every op on this device."""
    rows = []
    for op in OPS:
        reason = refusal(op, device)
        rows.append((op, "torch" if reason else "triton", reason))
    return rows
