"""What a backend is: functions for some ops on some devices, or the module that has them, and the reasons why it cannot run one."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

# the name of the folder of the pack, however it was imported
_PACK = __package__.rpartition(".qvg.")[0]


@dataclass(frozen=True, eq=False)
class Backend:
    """An implementation of some ops on some devices.

    name: for `force` and reports. devices: torch's device types; ROCm devices are "cuda". ops: functions by names in `registry.OPS`. Each
    takes the arguments of its reference and raises Unsupported for those that it cannot run. module: instead of `ops`, the module that has
    them, with a leading dot relative to this pack. It is imported when an op first meets one of the devices. It has a mapping OPS and may
    have FORCED_DEVICES, more device types that it serves inside `force` only. title, requirement: the names of the backend and of its
    devices in sentences. priority: higher ones are tried first; kernels/ has 0. gradients: whether its functions are differentiable.
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
        """Its name in sentences."""
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

    def unable(self, op: str, device: torch.device, forced: bool) -> str:
        """Why it cannot run `op` on this device at any shape; empty when it may. forced: inside `force` with its name."""
        served = device.type in self.devices
        if served or forced:
            functions, more_devices, reason = self.loaded
            if reason:
                return reason
            if op not in functions:
                return f"there is no {self.label} kernel for {op}"
            served = served or device.type in more_devices
        return "" if served else f"{self.label} kernels need {self.requirement or ' or '.join(self.devices)}, not {device.type}"
