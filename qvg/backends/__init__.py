"""Which backend runs an op, and why a preferred one does not. This is all that callers and kernels use.

    backends.run("assign", reference, x, centroids)     # the first backend in order that can
    with backends.force("torch"): ...                   # this backend, or an error with the reason
    with backends.on_compile(print): ...                # called before a kernel is compiled
    with backends.recording(calls): ...                 # counts which backend ran what: backends.summary(calls)
    backends.register(Backend("mine", devices=("cuda",), ops={"assign": assign}))

Every op has a reference implementation in plain torch, which defines it and runs on every device. A backend replaces ops where it can; see
`backend.Backend`. `kernels/`, the built-in one, is a name in `registry` and is imported when an op first meets a device that it serves.
"""

from .backend import Backend
from .execute import run
from .failures import GIVE_UP, Failures, Unsupported, sentence_of
from .launches import before_launch, launching
from .memory import ran_out
from .notices import Calls, note, on_compile, recording, summary
from .registry import OPS, REFERENCE, TRITON, force, names, refusal, register, remove, report

__all__ = [
    "GIVE_UP", "OPS", "REFERENCE", "TRITON", "Backend", "Calls", "Failures", "Unsupported", "before_launch", "force", "launching", "names",
    "note", "on_compile", "ran_out", "recording", "refusal", "register", "remove", "report", "run",
    "sentence_of", "summary",
]
