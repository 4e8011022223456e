"""Running an op: the first backend that can, else the reference.

Whatever stands in the way becomes the end of a sentence: a missing package, another device, shapes without a kernel, a kernel that failed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .backend import Backend
from .failures import Unsupported, sentence_of, shapes_of
from .launches import CURRENT, FAILURES, Call, launched
from .memory import ran_out
from .notices import note, tell
from .registry import REFERENCE, candidates, forced, no_candidate, require_op


def run(op: str, reference: Callable, *arguments) -> Any:
    """Run `op` on the first backend that can. Backends and the reference take the same arguments, of which one at least is a tensor.

    Raises Unsupported where `force` asks for a backend that cannot, and ValueError for an unknown op or arguments without a tensor.
    """
    require_op(op)
    device = _device_of(op, arguments)
    reasons = []
    for backend in candidates(op):
        reason = backend.unable(op, device, forced() == backend.name) or _without_gradients(backend, arguments)
        if not reason:
            result, reason = _attempt(backend, op, device, arguments)
            if not reason:
                note(op, backend.name, "; ".join(reasons))
                return result
        reasons.append(reason)
    reason = "; ".join(reasons) or no_candidate()
    if forced() not in (None, REFERENCE):
        raise Unsupported(f"{op} cannot run on {forced()}: {reason}.")
    note(op, REFERENCE, reason)
    return reference(*arguments)


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
        if forced():
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


def _device_of(op: str, arguments: tuple) -> torch.device:
    for x in arguments:
        if isinstance(x, Tensor):
            return x.device
    raise ValueError(f"The op {op!r} got no tensor, so its device is unknown; pass at least one tensor as an argument of its own.")
