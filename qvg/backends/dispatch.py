"""Which backend does an op, and why another one does not.

    dispatch.run("assign", reference, x, centroids)      # the fastest backend that can
    with dispatch.force("torch"): ...               # this one or an error that says why not
    with dispatch.on_compile(print): ...            # told when a kernel is about to be compiled
    with dispatch.recording(calls): ...             # which backend did what, and why: dispatch.summary(calls)

Every op has a reference implementation, which is its definition and runs on every device. `kernels/` holds the same ops in Triton for CUDA
and ROCm; it is imported when an op first meets such a device, never before, and what stands in its way is kept as a sentence: triton is
missing, the device is another, the kernel did not compile, these shapes have no kernel. A refused op falls back to its reference; where a
kernel fails, it does at these shapes alone, until it has failed at `GIVE_UP` of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, is_dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .memory import ran_out

BACKENDS = ("triton", "torch")
OPS = {
    "assign": "nearest centroid of every token",
    "update": "means of the tokens of each centroid",
    "kmeans": "centroids of tokens, step after step of those two",
    "store": "centroids to bytes, and what they leave of tokens",
    "encode": "tokens to bit planes",
    "rotate": "RoPE on tokens",
    "turn": "RoPE on a chunk's own queries and keys, and its tokens into the workspace",
    "recover": "spans to tokens, keys before RoPE",
    "decode": "spans to keys and values, with RoPE",
}

# shapes at which a variant of a kernel may fail before it is tried at no others, because a compiler that fails takes its time at each
GIVE_UP = 3

# device types that kernels are chosen for; ROCm calls itself cuda
_DEVICES = ("cuda",)
_forced: ContextVar[str | None] = ContextVar("qvg_backend", default=None)
# what kernels said when they failed: (device, op, *variant) of the launch -> shapes of the call -> sentence
_failures: dict[tuple, dict[tuple, str]] = {}
_listeners: ContextVar[tuple[Callable[[str], None], ...]] = ContextVar("qvg_listeners", default=())
# kernels that this process has launched, each with what it was compiled for
_launched: set[tuple] = set()
# calls by op and by why it was not Triton that did them, which is empty where it did
Calls = dict[tuple[str, str], int]
_records: ContextVar[tuple[Calls, ...]] = ContextVar("qvg_records", default=())


@dataclass
class _Call:
    """An op that a kernel is doing. launch: (device, op, *variant) of what it launched last; unheard: what a listener of that raised."""

    arguments: tuple
    launch: tuple
    unheard: BaseException | None = None


_call: ContextVar[_Call | None] = ContextVar("qvg_call", default=None)


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


@contextmanager
def recording(calls: Calls) -> Iterator[None]:
    """Inside, `calls` counts what each backend does; see `summary`. Records around it do not count it again."""
    token = _records.set((calls,))
    try:
        yield
    finally:
        _records.reset(token)


def note(op: str, reason: str) -> None:
    """Count a call in the records around it. reason: why it was not the fastest kernel that did it."""
    for calls in _records.get():
        calls[op, reason] = calls.get((op, reason), 0) + 1


def summary(calls: Calls) -> dict[str, str]:
    """The backend of each op that was done, as a sentence's end: "triton", "torch (why)", or how many calls were in torch and why."""
    found = {}
    for op in dict.fromkeys(op for op, _ in calls):
        reasons = {reason: count for (name, reason), count in calls.items() if name == op and reason}
        done, refused = calls.get((op, ""), 0), sum(reasons.values())
        why = f"({'; '.join(reasons)})"
        if not refused:
            found[op] = "triton"
        elif op not in OPS:
            found[op] = f"not used {why}"
        else:
            found[op] = f"torch {why}" if not done else f"triton; {refused} of {done + refused} calls in torch {why}"
    return found


def before_launch(op: str, *variant) -> None:
    """For kernels to call before a launch. variant: what the compiler must know of it, and the device.

    Raises Unsupported with the reason where it failed at these shapes, or so often that it is not tried again.
    """
    call = launching(op, *variant)
    if call is not None and (reason := _known_to_fail(call)):
        raise Unsupported(reason)
    key = op, *variant
    if key not in _launched:
        # where Triton finds it on the disk, compiled in an earlier run, this is said for a moment only
        sentence = f"Compiling GPU kernels (first run): {op}"
        logging.info("QVG: %s", sentence)
        try:
            _tell(sentence)
        except BaseException as error:
            if call is not None:
                call.unheard = error
            raise
        _launched.add(key)


def launching(op: str, *variant) -> _Call | None:
    """For kernels that prepare several launches and do them later: that this one comes now."""
    call = _call.get()
    if call is not None:
        call.launch = call.launch[0], op, *variant
    return call


def _tell(sentence: str) -> None:
    for listener in _listeners.get():
        listener(sentence)


@cache
def _kernels() -> tuple[dict[str, Callable], str]:
    """Kernels by op, and why there are none."""
    try:
        from ...kernels import ops
    except ImportError as error:
        return {}, f"triton cannot be imported ({error})"
    return ops.OPS, ""


@cache
def _interprets() -> bool:
    """Whether Triton runs its kernels in Python, on any device, as the tests make it do."""
    from ...kernels import ops

    return ops.INTERPRETED


def refusal(op: str, device: torch.device | str) -> str:
    """Why Triton does not do this op on this device as far as is known, be it at some shapes; empty when it does."""
    device = torch.device(device)
    failed = (reason for launch, shapes in _failures.items() if (launch[0].type, launch[1]) == (device.type, op)
              for reason in shapes.values())
    return _unable(op, device) or next(failed, "")


def _unable(op: str, device: torch.device) -> str:
    """Why Triton does this op on this device at no shape."""
    if _forced.get() == "torch":
        return "torch was asked for"
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
    return ""


def run(op: str, reference: Callable, *arguments) -> Any:
    """Do `op` with the first backend that can. The reference and the kernel take the same arguments, a tensor among them."""
    device = next(x.device for x in arguments if isinstance(x, Tensor))
    forced = _forced.get()
    reason = _unable(op, device)
    if not reason and torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
        reason = "Triton kernels have no gradients"
    if not reason:
        done, reason = _launch(op, device, arguments)
        if not reason:
            note(op, "")
            return done
    if forced == "triton":
        raise Unsupported(f"{op} cannot run on {forced}: {reason}.")
    note(op, reason)
    return reference(*arguments)


def _launch(op: str, device: torch.device, arguments: tuple) -> tuple[Any, str]:
    """What the kernel gives, and why it does not."""
    launched, call = len(_launched), _Call(arguments, (device, op))
    if reason := _known_to_fail(call):
        return None, reason
    token = _call.set(call)
    try:
        with _current(device):
            return _kernels()[0][op](*arguments), ""
    except Unsupported as error:
        return None, str(error)
    except Exception as error:
        if error is call.unheard or isinstance(error, torch.OutOfMemoryError):
            raise
        if ran_out(error):
            # as a launch says it that found no room; who asked knows what to give up, and the kernel is as good as before
            raise torch.OutOfMemoryError(str(error)) from error
        # a compiler that is missing or fails shows itself in many types; the reference needs none
        if _forced.get():
            raise
        return None, _failed(op, call, error)
    finally:
        _call.reset(token)
        if len(_launched) > launched:
            _tell("")


def _failed(op: str, call: _Call, error: Exception) -> str:
    """Write down that the kernel failed at these shapes; returns why, as a sentence's end."""
    reason = f"the Triton kernel failed ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
    log = logging.debug if any(reason in shapes.values() for shapes in _failures.values()) else logging.warning
    shapes = _failures.setdefault(call.launch, {})
    shapes[_shapes(call.arguments)] = reason
    log("QVG: %s runs in plain torch from here on, at %s: %s", op,
        "these shapes" if len(shapes) < GIVE_UP else "all shapes of this kind", reason)
    return reason


def _known_to_fail(call: _Call) -> str:
    shapes = _failures.get(call.launch)
    if not shapes:
        return ""
    return next(iter(shapes.values())) if len(shapes) >= GIVE_UP else shapes.get(_shapes(call.arguments), "")


def _shapes(x) -> Any:
    """What tells calls apart, without keeping what is in them."""
    if isinstance(x, Tensor):
        return x.dtype, x.shape
    if isinstance(x, (tuple, list)):
        return tuple(map(_shapes, x))
    if is_dataclass(x):
        return tuple(map(_shapes, vars(x).values()))
    return x if isinstance(x, (int, str)) else type(x).__name__


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
