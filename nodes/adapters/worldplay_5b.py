"""The adapter for HY-WorldPlay 5B. Latent format, VAE and text encoder are those of Wan 2.2 TI2V 5B; a network of this layout with 16
latent channels has latent format and VAE of Wan 2.1."""

from __future__ import annotations

from collections.abc import Mapping

import comfy.latent_formats
import comfy.model_base
import comfy.supported_models
import torch

from ...qvg.models.worldplay_schedule import SAMPLING_5B
from ...qvg.models.worldplay_wan import WAN21_CHANNELS, WorldWan, WorldWanSizes
from .own_model import build, keep_exact, unquantized
from .worldplay import Pass, Walking
from .worldplay import quantize as quantize


class Network(Walking, WorldWan):
    def __init__(self, sizes: WorldWanSizes, dtype=None, device=None, operations=None):
        super().__init__(sizes, operations=operations, device=device, dtype=dtype)
        self.dtype = dtype
        keep_exact(self.float32_layers())

    def _walk(self, x, walk: Pass, attend, attention, context, **kwargs):
        prompt = walk.prompt(lambda: self.project_context(context))
        if walk.finished:
            self.encode(x, walk.timestep, prompt, attend, action=walk.action, attention=attention)
            return None
        return WorldWan.forward(self, x, walk.timestep, prompt, attend, action=walk.action, attention=attention)


class Model(comfy.model_base.BaseModel):
    def __init__(self, config, device=None):
        super().__init__(config, comfy.model_base.ModelType.FLOW, device=device, unet_model=Network)


class Config(comfy.supported_models.WAN22_T2V):
    """ComfyUI's description of the model. The sizes take the place of a network's arguments."""

    unet_config = {}
    sampling_settings = {"shift": SAMPLING_5B.shift}
    supported_inference_dtypes = [torch.bfloat16, torch.float32]

    def __init__(self, sizes: WorldWanSizes):
        super().__init__({"sizes": sizes})
        if sizes.channels == WAN21_CHANNELS:
            self.latent_format = comfy.latent_formats.Wan21()
        self.memory_usage_factor = sizes.dim / 2222

    def get_model(self, state_dict, prefix="", device=None):
        return Model(self, device)


def load(state: dict[str, torch.Tensor], *, config: Mapping | None = None, dtype: torch.dtype | None = None,
         disable_dynamic: bool = False):
    """A ModelPatcher of a state dict in the names of `qvg.models.worldplay_wan`; see `families.Adapter`. config is not used."""
    state = unquantized(state)
    return build(Config, WorldWanSizes.read(state), state, dtype, disable_dynamic)


def owns(network: torch.nn.Module) -> bool:
    """Whether a MODEL's network is HY-WorldPlay 5B, loaded by this pack."""
    return isinstance(network, Network)
