"""The ops, the backends that can run them, and the choice between them.

A backend is data: `register(Backend(...))` adds one, anywhere and at any time. Backends are tried in the order of their priority; the first
that can runs the op, else its reference does. Whatever stands in the way becomes the end of a sentence: a missing package, another device,
shapes without a kernel, a kernel that failed.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ..registry import Registry
from .failures import Unsupported, sentence_of, shapes_of
from .launches import CURRENT, FAILURES, Call, launched
from .memory import ran_out
from .notices import note, tell

OPS = {
    "assign": "nearest centroid of every token",
    "update": "means of the tokens of each centroid",
    "kmeans": "centroids of tokens, repeated steps of those two",
    "store": "centroids to bytes, and the tokens minus their centroids",
    "encode": "tokens to bit planes",
    "rotate": "RoPE on tokens",
    "rotate_chunk": "RoPE on a chunk's own queries and keys, and its tokens into the workspace",
    "recover": "spans to tokens, keys before RoPE",
    "decode": "spans to keys and values, with RoPE",
}
# the name of the reference implementations, which are in plain torch
REFERENCE = "torch"
# the name of the folder of the pack, however it was imported
_PACK = __package__.rpartition(".qvg.")[0]


@dataclass(frozen=True, eq=False)
class Backend:
    """An implementation of some ops on some devices.

    name: for `force` and reports. devices: torch's device types; ROCm devices are "cuda". ops: functions by the names in `OPS`; each takes
    the arguments of its reference and raises Unsupported where it cannot. module: instead of `ops`, where they come from: imported when an
    op first meets one of the devices, it has a mapping `OPS`, and may have `FORCED_DEVICES`, types that it serves only inside `force`. A
    leading dot is relative to this pack. title, requirement: how sentences call the backend and the devices. priority: higher ones are
    tried first; kernels/ has 0. gradients: whether its functions are differentiable.
    """

    name: str
    devices: tuple[str, ...]
    ops: Mapping[str, Callable] | None = None
    module: str = ""
    title: str = ""
    requirement: str = ""
    priority: int = 10
    gradients: bool = False

    @property
    def label(self) -> str:
        return self.title or self.name

    @cached_property
    def loaded(self) -> tuple[Mapping[str, Callable], tuple[str, ...], str]:
        """Functions by op, further devices inside `force`, and why there are none."""
        if self.ops is not None:
            return self.ops, (), ""
        try:
            module = importlib.import_module(self.module, _PACK)
        except ImportError as error:
            return {}, (), f"{self.name} cannot be imported ({error})"
        return module.OPS, getattr(module, "FORCED_DEVICES", ()), ""

    def unable(self, op: str, device: torch.device) -> str:
        """Why it runs `op` on this device at no shape; empty when it may."""
        served = device.type in self.devices
        if served or _forced.get() == self.name:
            functions, more_devices, reason = self.loaded
            if reason:
                return reason
            if op not in functions:
                return f"there is no {self.label} kernel for {op}"
            served = served or device.type in more_devices
        return "" if served else f"{self.label} kernels need {self.requirement or ' or '.join(self.devices)}, not {device.type}"


_backends: Registry[Backend] = Registry("backend")
_forced: ContextVar[str | None] = ContextVar("qvg_backend", default=None)


def register(backend: Backend) -> Backend:
    """Add a backend. Raises ValueError when its name is taken or it implements something that is not an op."""
    if backend.name == REFERENCE:
        raise ValueError(f"{REFERENCE!r} is the name of the reference implementations; choose another name.")
    for op in backend.ops or ():
        _require_op(op)
    return _backends.register(backend)


def remove(name: str) -> None:
    """Undo `register`."""
    _backends.remove(name)


def names() -> list[str]:
    """All backends in the order in which they are tried."""
    return [*(backend.name for backend in _ordered()), REFERENCE]


def _ordered() -> list[Backend]:
    return sorted(_backends.values(), key=attrgetter("priority"), reverse=True)


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


def run(op: str, reference: Callable, *arguments) -> Any:
    """Run `op` on the first backend that can. Backends and the reference take the same arguments, of which one at least is a tensor.

    Raises Unsupported where `force` asks for a backend that cannot, and ValueError for an unknown op or arguments without a tensor.
    """
    _require_op(op)
    device = _device_of(op, arguments)
    reasons = []
    for backend in _candidates(op):
        reason = backend.unable(op, device) or _without_gradients(backend, arguments)
        if not reason:
            result, reason = _attempt(backend, op, device, arguments)
            if not reason:
                note(op, backend.name, "; ".join(reasons))
                return result
        reasons.append(reason)
    reason, forced = "; ".join(reasons) or _no_candidate(), _forced.get()
    if forced not in (None, REFERENCE):
        raise Unsupported(f"{op} cannot run on {forced}: {reason}.")
    note(op, REFERENCE, reason)
    return reference(*arguments)


def refusal(op: str, device: torch.device | str) -> str:
    """Why only the reference runs `op` on this device, as far as is known and be it at some shapes; empty when a backend does."""
    backend, reason = _expected(op, torch.device(device))
    return reason if backend == REFERENCE else ""


def report(device: torch.device | str) -> list[tuple[str, str, str]]:
    """(op, the backend that runs it on this device as far as is known, why no preferred one does) of every op."""
    return [(op, *_expected(op, torch.device(device))) for op in OPS]


def _expected(op: str, device: torch.device) -> tuple[str, str]:
    _require_op(op)
    reasons = []
    for backend in _candidates(op):
        reason = backend.unable(op, device) or _earlier_failure(backend, op, device)
        if not reason:
            return backend.name, "; ".join(reasons)
        reasons.append(reason)
    return REFERENCE, "; ".join(reasons) or _no_candidate()


def _candidates(op: str) -> list[Backend]:
    """The backends to try, in order. Those that are known not to implement the op are left out without a word."""
    forced = _forced.get()
    if forced is not None:
        return [] if forced == REFERENCE else [_backends[forced]]
    return [backend for backend in _ordered() if backend.ops is None or op in backend.ops]


def _no_candidate() -> str:
    return f"{REFERENCE} was asked for" if _forced.get() == REFERENCE else "no backend implements it"


def _earlier_failure(backend: Backend, op: str, device: torch.device) -> str:
    return next((reason for (name, on, of, *_), reason in FAILURES.items() if (name, on.type, of) == (backend.name, device.type, op)), "")


def _without_gradients(backend: Backend, arguments: tuple) -> str:
    if backend.gradients or not torch.is_grad_enabled() or not any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
        return ""
    return f"{backend.label} kernels have no gradients"


def _attempt(backend: Backend, op: str, device: torch.device, arguments: tuple) -> tuple[Any, str]:
    """The backend's result, and why there is none."""
    before, call = launched(), Call(arguments, (backend.name, device, op))
    if reason := call.known_failure:
        return None, reason
    token = CURRENT.set(call)
    try:
        with _current_device(device):
            return backend.loaded[0][op](*arguments), ""
    except Unsupported as error:
        return None, str(error)
    except Exception as error:
        if error is call.listener_error or isinstance(error, torch.OutOfMemoryError):
            raise
        if ran_out(error):
            # a launch without memory raises another type. The caller frees memory and retries; the kernel is not to blame
            raise torch.OutOfMemoryError(str(error)) from error
        # a missing or failing compiler raises many types, and the reference needs none
        if _forced.get():
            raise
        return None, _record_failure(backend, op, call, error)
    finally:
        CURRENT.reset(token)
        if launched() > before:
            tell("")


def _record_failure(backend: Backend, op: str, call: Call, error: Exception) -> str:
    """Remember that the kernel failed at these shapes; returns why, as the end of a sentence."""
    reason = f"the {backend.label} kernel failed ({sentence_of(error)})"
    log = logging.debug if any(reason == known for _, known in FAILURES.items()) else logging.warning
    given_up = FAILURES.add(call.launch, shapes_of(call.arguments), reason)
    log("QVG: %s runs without %s from here on, at %s: %s", op, backend.name,
        "all shapes of this kind" if given_up else "these shapes", reason)
    return reason


def _current_device(device: torch.device):
    """Kernels launch on the current CUDA device, which may not be that of the tensors."""
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        return torch.cuda.device(device)
    return nullcontext()


def _require_op(op: str) -> None:
    if op not in OPS:
        raise ValueError(f"There is no op {op!r}; the ops are {', '.join(OPS)}.")


def _device_of(op: str, arguments: tuple) -> torch.device:
    for x in arguments:
        if isinstance(x, Tensor):
            return x.device
    raise ValueError(f"The op {op!r} got no tensor, so its device is unknown; pass at least one tensor as an argument of its own.")


TRITON = register(Backend("triton", ("cuda",), module=".kernels.ops", title="Triton", requirement="a CUDA or ROCm device", priority=0))
