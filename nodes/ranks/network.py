"""The network of a MODEL in plain torch, with its weights as they are patched, which every rank computes with."""

from __future__ import annotations

from uuid import uuid4
from weakref import WeakKeyDictionary

import comfy.lora
import torch
from torch import nn

from ...qvg.files import first_line
from ...qvg.models import Family
from ...qvg.models.family import load_weights
from ..adapters.compiled import original
from ..adapters.families import family_of
from ..adapters.lora import PREFIX
from ..adapters.wan_core import compute_dtype

# a loaded model -> a name for its weights, without patches
_names: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def weights_name(patcher) -> str:
    """The same for the same weights with the same patches, and for nothing else."""
    return f"{_names.setdefault(patcher.model, uuid4().hex)} {patcher.patches_uuid} {compute_dtype(patcher.model)}"


def heads_of(network: nn.Module) -> int:
    """Heads of a MODEL's network: core's causal Wan, or one of this pack."""
    network = original(network)
    return network.sizes.heads if hasattr(network, "sizes") else network.num_heads


def plain_network(patcher, device: torch.device) -> tuple[Family, nn.Module]:
    """The family of a MODEL and its network in plain torch, in the dtype that ComfyUI computes in. What is on the device already is not
    copied.

    Raises ValueError for weights that only ComfyUI can read.
    """
    core, dtype = original(patcher.model.diffusion_model), compute_dtype(patcher.model)
    family = family_of(core)
    state = {name: _weight(patcher, name, tensor, device, dtype) for name, tensor in core.state_dict().items()}
    try:
        return family, load_weights(family.network, family.sizes(state), state, None)
    except RuntimeError as error:
        raise ValueError(f"The weights of this model cannot be given to other GPUs: {first_line(error)}. Load them with Load AR Video "
                         "Model (QVG), unquantized.") from error


def _weight(patcher, name: str, tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    if type(tensor) not in (torch.Tensor, nn.Parameter) or not tensor.is_floating_point():
        raise ValueError(f"The weights of this model are quantized ({name} is {type(tensor).__name__}, {tensor.dtype}), and cannot be "
                         "given to other GPUs. Load a file in bf16 or fp16; weight_dtype may be fp8_e4m3fn.")
    key = PREFIX + name
    patches = patcher.patches.get(key)
    # weights that ComfyUI holds on the device are patched; others are when they are used
    if not patches or key in patcher.backup:
        return tensor.to(device, dtype)
    return comfy.lora.calculate_weight(patches, tensor.to(device, torch.float32, copy=True), key).to(dtype)
