"""LongCat-Video as a ComfyUI model: the classes that ComfyUI needs of a network that it does not know.

Latent format and text encoder are those of Wan 2.1.
"""

from __future__ import annotations

from collections.abc import Mapping

import comfy.model_base
import comfy.supported_models
import torch
from comfy.patcher_extension import WrappersMP

from ...qvg.models.longcat import LongCat, LongCatSizes
from ...qvg.models.longcat_schedule import SHIFT, cfg_zero
from .attention import attention_of, core_attention
from .compiled import EagerCall, eager, eager_shell
from .longcat_given import GIVEN, Given
from .own_model import build, forward_in_wrappers, keep_exact, unquantized
from .patches import LONGCAT, OVERRIDE, check_pass, check_patches

CHECKS = "quantvideogen_checks"


class Network(LongCat):
    """LongCat-Video with ComfyUI's interface: its choice of attention, and a flow that points from video to noise."""

    def __init__(self, sizes: LongCatSizes, dtype=None, device=None, operations=None):
        super().__init__(sizes, operations=operations, device=device, dtype=dtype)
        self.dtype = dtype
        keep_exact(self.float32_layers())

    @eager_shell
    def forward(self, x, timestep, context, transformer_options={}, **kwargs):  # noqa: B006 (core's signature)
        return forward_in_wrappers(self, x, timestep, context, transformer_options, **kwargs)

    @eager_shell
    def _forward(self, x, timestep, context, transformer_options={}, **kwargs):  # noqa: B006
        attend, attention = self._attentions(x, transformer_options)
        return super().forward(x, timestep, context, attend=attend, attention=attention).neg_()

    @eager
    def _attentions(self, x, transformer_options: dict):
        """Attention to given and new frames, and attention to the text."""
        check_pass(transformer_options)
        attention = attention_of(transformer_options)
        given: Given | None = transformer_options.get(GIVEN)
        attend = self._attend_all(x.shape, 0, attention) if given is None else given.attend(x.shape[2], transformer_options)
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
    state = unquantized(state)
    patcher = build(Config, LongCatSizes.read(state), state, dtype, disable_dynamic)
    patcher.set_model_sampler_cfg_function(lambda args: cfg_zero(args["cond"], args["uncond"], args["cond_scale"]))
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, CHECKS, checked)
    return patcher


def checked(executor, *args, **kwargs):
    """Wraps a sampling run. Raises ValueError where another node's patch cannot work with this network."""
    check_patches(executor.class_obj, LONGCAT)
    return executor(*args, **kwargs)
