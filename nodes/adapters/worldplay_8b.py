"""The adapter for HY-WorldPlay 8B. Latent format, VAE, text encoders and image encoder are those of HunyuanVideo-1.5.

What core's text encoder returns is one condition: Qwen2.5-VL's tokens, byT5's of quoted words if there are any, and masks where something
is padded. The start image's SigLIP tokens come with it as `clip_vision_output`.
"""

from __future__ import annotations

from collections.abc import Mapping

import comfy.conds
import comfy.model_base
import comfy.supported_models
import torch
from torch import nn

from ...qvg.models.hunyuan_layers import HunyuanSizes
from ...qvg.models.worldplay_hunyuan import WorldPlayHunyuan, read_sizes, with_start_image
from ...qvg.models.worldplay_schedule import SAMPLING_8B
from .own_model import build, keep_exact, unquantized
from .worldplay import Pass, Walking
from .worldplay import quantize as quantize


class Network(Walking, WorldPlayHunyuan):
    def __init__(self, sizes: HunyuanSizes, dtype=None, device=None, operations=None):
        super().__init__(sizes, operations=operations, device=device, dtype=dtype)
        self.dtype = dtype
        keep_exact(self._exact_layers())

    def _exact_layers(self) -> list[nn.Module]:
        """Those around the blocks and the modulations in them; and all norms, whose input is float32."""
        blocks = [part for block in self.double_blocks for stream in (block.img, block.txt) for part in stream.modulation]
        parts = [part for module in (self.text_in, self.time_in, self.action_in, self.final_layer) for part in module.modules()]
        norms = [module for module in self.modules() if isinstance(module, nn.LayerNorm | nn.RMSNorm)]
        return [*norms, *(part for part in (*blocks, *parts) if hasattr(part, "in_features"))]

    def _walk(self, x, walk: Pass, attend, attention, context, attention_mask=None, txt_byt5=None, clip_fea=None, **kwargs):
        text = walk.prompt(lambda: self.text(context, attention_mask, glyphs=txt_byt5, image=clip_fea, attention=attention))
        x = with_start_image(x, walk.frames, None if walk.image is None else walk.image.to(x))
        if walk.finished:
            self.encode(x, walk.timestep, text, attend, action=walk.action)
            return None
        return WorldPlayHunyuan.forward(self, x, walk.timestep, text, attend, action=walk.action)


class Model(comfy.model_base.BaseModel):
    def __init__(self, config, device=None):
        super().__init__(config, comfy.model_base.ModelType.FLOW, device=device, unet_model=Network)

    def extra_conds(self, **kwargs):
        """What `Network` takes besides latents, from what core's text encoder returns."""
        image = kwargs.get("clip_vision_output")
        found = {"c_crossattn": kwargs.get("cross_attn"), "attention_mask": kwargs.get("attention_mask"),
                 "txt_byt5": kwargs.get("conditioning_byt5small"), "clip_fea": None if image is None else image.last_hidden_state}
        return {name: comfy.conds.CONDRegular(tensor) for name, tensor in found.items() if tensor is not None}


class Config(comfy.supported_models.HunyuanVideo15):
    """ComfyUI's description of the model. The sizes take the place of a network's arguments."""

    unet_config = {}
    sampling_settings = {"shift": SAMPLING_8B.shift}
    supported_inference_dtypes = [torch.bfloat16, torch.float32]

    def __init__(self, sizes: HunyuanSizes):
        super().__init__({"sizes": sizes})

    def get_model(self, state_dict, prefix="", device=None):
        return Model(self, device)

    # core's would rename layers of core's network

    def process_unet_state_dict(self, state_dict):
        return state_dict

    def process_unet_state_dict_for_saving(self, state_dict):
        return state_dict


def load(state: dict[str, torch.Tensor], *, config: Mapping | None = None, dtype: torch.dtype | None = None,
         disable_dynamic: bool = False):
    """A ModelPatcher of a state dict in the names of `qvg.models.worldplay_hunyuan`; see `families.Adapter`. config is not used."""
    state = unquantized(state)
    return build(Config, read_sizes(state), state, dtype, disable_dynamic)


def owns(network: torch.nn.Module) -> bool:
    """Whether a MODEL's network is HY-WorldPlay 8B, loaded by this pack."""
    return isinstance(network, Network)
