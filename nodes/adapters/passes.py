"""Tells the pass over a finished chunk from noisy ones, in runs of core's autoregressive sampler, without synchronizing with the device.

The sampler passes the noise level as a tensor on the device, and reading it would synchronize in every pass. But the order of the passes is
known: the start image, then for each chunk one noisy pass per step and a clean one.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, cycle

import torch
from comfy.patcher_extension import WrappersMP

from .checks import is_autoregressive


class Passes:
    """clean: whether the current pass is over a finished chunk; None with another sampler, whose noise levels must be read."""

    def __init__(self):
        self.clean: bool | None = None
        self._order: Iterator[bool] = iter(())
        self._told: tuple[bool, torch.Tensor, torch.cuda.Event] | None = None

    def expect(self, sampler, sigmas, given: bool) -> None:
        """Start a run. given: whether it stores start frames before the first chunk."""
        order = chain([True] * given, cycle([False] * (len(sigmas) - 1) + [True]))
        self.clean, self._told, self._order = None, None, order if is_autoregressive(sampler) else iter(())

    def predict_noise(self, executor, *args, **kwargs):
        """Wraps what the sampler calls once per pass, however often guidance then evaluates the network."""
        self.clean = next(self._order, None)
        return executor(*args, **kwargs)

    def is_clean(self, timestep: torch.Tensor) -> bool:
        """Whether the current pass is over a finished chunk. timestep: its noise levels."""
        if self.clean is None or timestep.device.type == "cpu":
            return not bool(timestep.any())
        if timestep.device.type == "cuda":
            self._compare(timestep)
        return self.clean

    def _compare(self, timestep: torch.Tensor) -> None:
        """Raises RuntimeError where an earlier pass was not what the order predicts, once its noise level has arrived."""
        if self._told is not None and self._told[2].query():
            clean, noisy, _ = self._told
            if clean == bool(noisy):
                raise RuntimeError("The passes of this sampler are not in the order of Sampler AR Video, so that a noisy chunk "
                                   "would be stored. A node on this model changes how often it is called; remove it.")
            self._told = None
        if self._told is None:
            noisy = torch.empty((), dtype=torch.bool, pin_memory=True)
            noisy.copy_(timestep.any(), non_blocking=True)
            self._told = self.clean, noisy, torch.cuda.current_stream(timestep.device).record_event()

    def install(self, patched, key: str) -> None:
        patched.remove_wrappers_with_key(WrappersMP.PREDICT_NOISE, key)
        patched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, key, self.predict_noise)
