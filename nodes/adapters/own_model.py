"""ComfyUI models of networks that ComfyUI does not know: from a state dict to a ModelPatcher."""

from __future__ import annotations

from collections.abc import Callable

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from torch import nn


def keep_exact(layers) -> None:
    """Layers whose input may have another dtype than their weights. A file may store them in scaled FP8; core would then round their
    input to FP8, too."""
    for layer in layers:
        layer.comfy_cast_weights = True
        layer._full_precision_mm = True


def forward_in_wrappers(network, x, timestep, context, transformer_options: dict, **kwargs):
    """`network._forward`, inside the wrappers that other nodes put around a diffusion model."""
    wrappers = transformer_options.get("wrappers", {}).get(WrappersMP.DIFFUSION_MODEL)
    if not wrappers:
        return network._forward(x, timestep, context, transformer_options, **kwargs)
    executor = WrapperExecutor.new_class_executor(network._forward, network, [one for some in wrappers.values() for one in some])
    return executor.execute(x, timestep, context, transformer_options, **kwargs)


def unquantized(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state with quantized weights named as core's present layers name them."""
    return comfy.utils.convert_old_quants(state, "")[0]


def build(make_config: Callable, sizes, state: dict[str, torch.Tensor], dtype: torch.dtype | None, disable_dynamic: bool):
    """A ModelPatcher of the model that `make_config(sizes)` describes.

    make_config: a class of core's `supported_models` kind. state: in the names of its network, from `unquantized`. dtype: of the weights,
    by default what ComfyUI chooses.
    """
    management = comfy.model_management
    config = make_config(sizes)
    config.quant_config = comfy.utils.detect_layer_quantization(state, "")
    stored = None if config.quant_config else comfy.utils.weight_dtype(state)
    kept = dtype or management.unet_dtype(model_params=comfy.utils.calculate_parameters(state), weight_dtype=stored,
                                          supported_dtypes=config.supported_inference_dtypes)
    device, offload = management.get_torch_device(), management.unet_offload_device()
    config.set_inference_dtype(kept, management.unet_manual_cast(None if config.quant_config else kept, device,
                                                                 config.supported_inference_dtypes))
    model: nn.Module = config.get_model(state)
    patcher_class = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = patcher_class(model, load_device=device, offload_device=offload)
    if not management.is_device_cpu(offload):
        model.to(offload)
    model.load_model_weights(state, "", assign=patcher.is_dynamic())
    return patcher
