"""LongCat-Video as a ComfyUI model: the classes that ComfyUI needs of a network that it does not know.

Latent format and text encoder are those of Wan 2.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import comfy.utils
import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP

from ...qvg.models.longcat import LongCat, LongCatSizes
from ...qvg.models.longcat_schedule import SHIFT, cfg_zero
from .attention import core_attention
from .compiled import EagerCall, eager, eager_shell
from .longcat_given import GIVEN, Given
from .patches import LONGCAT, OVERRIDE, check_pass, check_patches

CHECKS = "quantvideogen_checks"


class Network(LongCat):
    """LongCat-Video with ComfyUI's interface: its choice of attention, and a flow that points from video to noise."""

    def __init__(self, sizes: LongCatSizes, dtype=None, device=None, operations=None):
        super().__init__(sizes, operations=operations, device=device, dtype=dtype)
        self.dtype = dtype
        for layer in self.float32_layers():
            layer.comfy_cast_weights = True
            # if a file stores such a layer in scaled FP8, core would round its input to FP8, too
            layer._full_precision_mm = True

    @eager_shell
    def forward(self, x, timestep, context, transformer_options={}, **kwargs):  # noqa: B006 (core's signature)
        wrappers = transformer_options.get("wrappers", {}).get(WrappersMP.DIFFUSION_MODEL)
        if not wrappers:
            return self._forward(x, timestep, context, transformer_options, **kwargs)
        return WrapperExecutor.new_class_executor(self._forward, self, [one for some in wrappers.values() for one in some]).execute(
            x, timestep, context, transformer_options, **kwargs)

    @eager_shell
    def _forward(self, x, timestep, context, transformer_options={}, **kwargs):  # noqa: B006
        attend, attention = self._attentions(x, transformer_options)
        return super().forward(x, timestep, context, attend=attend, attention=attention).neg_()

    @eager
    def _attentions(self, x, transformer_options: dict):
        """Attention to given and new frames, and attention to the text."""
        check_pass(transformer_options)
        attention = partial(core_attention, transformer_options=transformer_options)
        given: Given | None = transformer_options.get(GIVEN)
        attend = self._attend_all(x.shape, 0, attention) if given is None else given.attend(x.shape[2], attention)
        # without an override compiled code needs no options
        return EagerCall(attend), EagerCall(attention) if OVERRIDE in transformer_options else core_attention


class Model(comfy.model_base.BaseModel):
    def __init__(self, config, device=None):
        super().__init__(config, comfy.model_base.ModelType.FLOW, device=device, unet_model=Network)


class Config(comfy.supported_models.WAN21_T2V):
    """ComfyUI's description of the model. The sizes take the place of a network's arguments."""

    unet_config = {}
    sampling_settings = {"shift": SHIFT}
    supported_inference_dtypes = [torch.bfloat16, torch.float32]

    def __init__(self, sizes: LongCatSizes):
        super().__init__({"sizes": sizes})
        self.memory_usage_factor = sizes.dim / 2222

    def get_model(self, state_dict, prefix="", device=None):
        return Model(self, device)


def load(state: dict[str, torch.Tensor], *, config: Mapping | None = None, dtype: torch.dtype | None = None,
         disable_dynamic: bool = False):
    """A ModelPatcher of a state dict in the names of `qvg.models.longcat`; see `families.Adapter`. config is not used."""
    management = comfy.model_management
    state, _ = comfy.utils.convert_old_quants(state, "")
    config = Config(LongCatSizes.read(state))
    config.quant_config = comfy.utils.detect_layer_quantization(state, "")
    stored = None if config.quant_config else comfy.utils.weight_dtype(state)
    kept = dtype or management.unet_dtype(model_params=comfy.utils.calculate_parameters(state), weight_dtype=stored,
                                          supported_dtypes=config.supported_inference_dtypes)
    device, offload = management.get_torch_device(), management.unet_offload_device()
    config.set_inference_dtype(kept, management.unet_manual_cast(None if config.quant_config else kept, device,
                                                                 config.supported_inference_dtypes))
    model = config.get_model(state)
    patcher_class = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = patcher_class(model, load_device=device, offload_device=offload)
    if not management.is_device_cpu(offload):
        model.to(offload)
    model.load_model_weights(state, "", assign=patcher.is_dynamic())
    patcher.set_model_sampler_cfg_function(lambda args: cfg_zero(args["cond"], args["uncond"], args["cond_scale"]))
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, CHECKS, checked)
    return patcher


def checked(executor, *args, **kwargs):
    """Wraps a sampling run. Raises ValueError where another node's patch cannot work with this network."""
    check_patches(executor.class_obj, LONGCAT)
    return executor(*args, **kwargs)
