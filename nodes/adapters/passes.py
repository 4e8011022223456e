"""Which pass of core's autoregressive sampler is the one over a finished chunk, without waiting for the device to say so.

The sampler tells a pass its noise level in a tensor on the device. To look at it is to wait for all that the device still has to do, in
every pass. But the order of the passes is known: a start image, then for each chunk as many noisy ones as there are steps, and a clean one.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, cycle

import torch
from comfy.patcher_extension import WrappersMP

from .checks import is_autoregressive


class Passes:
    """clean: whether the present pass is over a finished chunk; None where the sampler is not core's, and has to be asked."""

    def __init__(self):
        self.clean: bool | None = None
        self._order: Iterator[bool] = iter(())
        self._told: tuple[bool, torch.Tensor, torch.cuda.Event] | None = None

    def expect(self, sampler, sigmas, given: bool) -> None:
        """A run begins. given: whether it starts with frames that are stored before the first chunk."""
        order = chain([True] * given, cycle([False] * (len(sigmas) - 1) + [True]))
        self.clean, self._told, self._order = None, None, order if is_autoregressive(sampler) else iter(())

    def predict_noise(self, executor, *args, **kwargs):
        """Around what the sampler calls once a pass, however often guidance then calls the network."""
        self.clean = next(self._order, None)
        return executor(*args, **kwargs)

    def is_clean(self, timestep: torch.Tensor) -> bool:
        """Of the present pass, whose noise levels are those."""
        if self.clean is None or timestep.device.type == "cpu":
            return not bool(timestep.any())
        if timestep.device.type == "cuda":
            self._compare(timestep)
        return self.clean

    def _compare(self, timestep: torch.Tensor) -> None:
        """Raises RuntimeError where an earlier pass was not what the order says, once the device has said so."""
        if self._told is not None and self._told[2].query():
            clean, noisy, _ = self._told
            if clean == bool(noisy):
                raise RuntimeError("The passes of this sampler do not come in the order of Sampler AR Video, so that a noisy chunk "
                                   "would be stored. A node on this model changes how often it is called; remove it.")
            self._told = None
        if self._told is None:
            noisy = torch.empty((), dtype=torch.bool, pin_memory=True)
            noisy.copy_(timestep.any(), non_blocking=True)
            self._told = self.clean, noisy, torch.cuda.current_stream(timestep.device).record_event()

    def install(self, patched, key: str) -> None:
        patched.remove_wrappers_with_key(WrappersMP.PREDICT_NOISE, key)
        patched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, key, self.predict_noise)
