"""What a kernel tells the registry while it runs an op: which variant it is about to launch.

So a failure is attributed to the variant that failed, and users hear of a compilation before it takes its time.
"""

from __future__ import annotations

import logging
from contextvars import ContextVar
from dataclasses import dataclass

from .failures import Failures, Unsupported, shapes_of
from .notices import tell

# failed launches of all backends by (backend, device, op, *variant)
FAILURES = Failures()
# variants that this process has launched
_launched: set[tuple] = set()


@dataclass
class Call:
    """An op that a backend is running.

    launch: (backend, device, op, *variant) of its latest launch. listener_error: what an `on_compile` listener raised meanwhile.
    """

    arguments: tuple
    launch: tuple
    listener_error: BaseException | None = None

    @property
    def known_failure(self) -> str:
        """Why this launch is not to be tried again at these shapes; empty when it is."""
        # other launches must not pay for this one's failure: shapes are only collected if it has failed somewhere
        return FAILURES.reason(self.launch, shapes_of(self.arguments)) if self.launch in FAILURES else ""


CURRENT: ContextVar[Call | None] = ContextVar("qvg_call", default=None)


def before_launch(op: str, *variant) -> None:
    """A kernel calls this before it launches. variant: everything that it is compiled for, and the device.

    Fires the `on_compile` callbacks on a variant's first launch. Raises Unsupported with the reason where the variant has failed before.
    """
    call = launching(op, *variant)
    if call is not None and (reason := call.known_failure):
        raise Unsupported(reason)
    key = op, *variant
    if key not in _launched:
        # Triton may find it compiled on disk; then the sentence is shown for a moment only
        sentence = f"Compiling GPU kernels (first run): {op}"
        logging.info("QVG: %s", sentence)
        try:
            tell(sentence)
        except BaseException as error:
            if call is not None:
                call.listener_error = error
            raise
        _launched.add(key)


def launching(op: str, *variant) -> Call | None:
    """A kernel that prepared several launches calls this before each, so that a failure is attributed to the right one."""
    call = CURRENT.get()
    if call is not None:
        call.launch = *call.launch[:2], op, *variant
    return call


def launched() -> int:
    """How many variants this process has launched."""
    return len(_launched)
