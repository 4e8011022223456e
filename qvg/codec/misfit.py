"""What is learned about a span from its own bytes, without waiting for the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from .base import Span


class Misfit:
    """How badly codebooks fit a span of K and of V, the larger of both; see `Span.misfit`.

    value: 1 of spans without codebooks. broken: whether a token was not finite; None while that is unknown. On a GPU both are on their
    way to the host until they are asked for. agree: makes what was found of some heads the mean over all, where other ranks hold the
    others.
    """

    def __init__(self, spans: Sequence[Span], agree: Callable[[torch.Tensor], torch.Tensor] | None = None):
        found = [known for span in spans if (known := span.misfit()) is not None]
        self._found, self._event = None, None
        if found:
            stacked = torch.stack(found)
            self._found = (stacked if agree is None else agree(stacked)).amax(0)
        if found and self._found.device.type == "cuda":
            host = torch.empty(2, pin_memory=True)
            host.copy_(self._found, non_blocking=True)
            self._found, self._event = host, torch.cuda.current_stream(self._found.device).record_event()

    @property
    def value(self) -> float:
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return 1.0 if self._found is None else float(self._found[0])

    @property
    def broken(self) -> bool | None:
        if self._found is None:
            return False
        if self._found.device.type != "cpu" or (self._event is not None and not self._event.query()):
            return None
        return not math.isfinite(self._found[1])
