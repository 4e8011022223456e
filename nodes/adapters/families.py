"""The ComfyUI side of model families: which adapter runs a family, and which family a loaded MODEL belongs to.

An adapter is a module with the functions of `Adapter`. `Family.adapter` names it as data, so that qvg/ never imports ComfyUI; a leading
dot stands for this pack, any other name is absolute, so another pack can bring a family with its adapter.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from ...qvg.models import FAMILIES, Family
from ...qvg.settings import QVGSettings
from .compiled import original

PACK = __package__.rpartition(".nodes.")[0]


class Adapter(Protocol):
    """What a family's adapter module must define, as functions."""

    def load(self, state: dict[str, Tensor], *, config: Mapping, dtype=None, disable_dynamic: bool = False):
        """A ModelPatcher of a state dict that `open_checkpoint` read. config: `Description.config`. dtype: of the weights, by default
        what ComfyUI chooses."""

    def owns(self, network: nn.Module) -> bool:
        """Whether a MODEL's network is of this family."""

    def quantize(self, model, settings: QVGSettings, node_id: str | None = None):
        """A clone of a MODEL whose KV cache is quantized while it samples. node_id: the node that shows the run's bytes."""


def adapter_of(family: Family) -> Adapter:
    """The module that runs a family in ComfyUI. Raises ValueError for a family without one."""
    if not family.adapter:
        raise ValueError(f"{family.title} has no ComfyUI adapter in this pack. Load a model of "
                         f"{', '.join(other.title for other in FAMILIES.values() if other.adapter)}.")
    return importlib.import_module(family.adapter, package=PACK)


def family_of(network: nn.Module) -> Family | None:
    """The family of a MODEL's network, compiled or not; None for a network without a KV cache."""
    return next((family for family in FAMILIES.values() if family.adapter and adapter_of(family).owns(original(network))), None)
