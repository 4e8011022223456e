"""The adapter for LongCat-Video: its ComfyUI model class, and the given frames that a sampling run reads from a quantized cache.

ComfyUI does not know this network, so this module defines the classes that it needs; latent format and text encoder are those of Wan 2.1.
Any ComfyUI sampler makes the new frames. The MODEL that `continue_from` returns first passes the given frames through the network, once
per run, and stores each layer's keys and values. The cache holds one video, which all conditions read, in one batch or separately, and is
freed when the run ends.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import comfy.utils
import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP

from ...qvg import backends
from ...qvg.attention.cached import CachedAttention
from ...qvg.cache.context import context_settings, forecast_context
from ...qvg.cache.geometry import Geometry, buffers_on
from ...qvg.cache.kv_cache import KVCache
from ...qvg.models.longcat import LONGCAT as FAMILY
from ...qvg.models.longcat import LongCat, LongCatSizes
from ...qvg.models.longcat_schedule import SHIFT, cfg_zero
from ...qvg.settings import PRESETS, QVGSettings
from ...qvg.units import format_bytes
from ..run_log import ATTACHMENT, RunLog
from .attention import core_attention
from .compiled import Outside, bare, between, outside
from .patches import LONGCAT, OVERRIDE, check_pass, check_patches

KEY = "quantvideogen"
GIVEN = "quantvideogen_given"
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

    @between
    def forward(self, x, timestep, context, transformer_options={}, **kwargs):  # noqa: B006 (core's signature)
        wrappers = transformer_options.get("wrappers", {}).get(WrappersMP.DIFFUSION_MODEL)
        if not wrappers:
            return self._forward(x, timestep, context, transformer_options, **kwargs)
        return WrapperExecutor.new_class_executor(self._forward, self, [one for some in wrappers.values() for one in some]).execute(
            x, timestep, context, transformer_options, **kwargs)

    @between
    def _forward(self, x, timestep, context, transformer_options={}, **kwargs):  # noqa: B006
        attend, attention = self._attentions(x, transformer_options)
        return super().forward(x, timestep, context, attend=attend, attention=attention).neg_()

    @outside
    def _attentions(self, x, transformer_options: dict):
        """Attention to given and new frames, and attention to the text."""
        check_pass(transformer_options)
        attention = partial(core_attention, transformer_options=transformer_options)
        given: Given | None = transformer_options.get(GIVEN)
        attend = self._attend_all(x.shape, 0, attention) if given is None else given.attend(x.shape[2], attention)
        # without an override compiled code needs no options
        return Outside(attend), Outside(attention) if OVERRIDE in transformer_options else core_attention


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


class Given:
    """The stored given frames of one run."""

    def __init__(self, cache: KVCache, frames: int):
        self.cache, self.frames = cache, frames

    def attend(self, new: int, attention) -> CachedAttention:
        return CachedAttention(self.cache, start_frame=self.frames, frames=new, store=False, attention=attention)


class Hook:
    """Wrappers around one MODEL's sampling runs, which continue `latents` [B or 1, C, F, H, W], in the scale of the VAE."""

    def __init__(self, latents: torch.Tensor, settings: QVGSettings, log: RunLog):
        self.latents, self.settings, self.log = latents, settings, log
        self.reserved = 0

    def outer_sample(self, executor, noise, *args, **kwargs):
        """Forecast the run. Raises ValueError where noise and given frames do not match, or the settings cannot work for them."""
        if noise.ndim != 5 or noise.shape[1:2] + noise.shape[3:] != self.latents.shape[1:2] + self.latents.shape[3:]:
            raise ValueError(f"The new frames have latents of shape {tuple(noise.shape)}, the given ones of {tuple(self.latents.shape)}; "
                             "channels, height and width must be equal.")
        if self.latents.shape[0] not in (1, noise.shape[0]):
            raise ValueError(f"{self.latents.shape[0]} videos are given, but {noise.shape[0]} are made; give one, or as many as are made.")
        patcher = executor.class_obj.model_patcher
        if patcher.get_additional_models_with_key("multigpu"):
            raise ValueError("Given frames are stored on one GPU, but the model was spread over several. Take the MODEL from "
                             "before MultiGPU CFG Split.")
        found = self._forecast(patcher.model, noise.shape[2], self.settings)
        self._check_memory(patcher, noise.shape[2], found.peak_bytes)
        self.reserved = found.peak_bytes
        self.log.start(self.latents.shape[2], found)
        logging.info("QVG: the KV cache of %d given latent frames will take %s, %s at its peak (bf16: %s), preset %s",
                     self.latents.shape[2], *map(format_bytes, (found.stored_bytes, found.peak_bytes, found.bf16_bytes)),
                     self.settings.name)
        try:
            with backends.on_compile(self.log.say):
                return executor(noise, *args, **kwargs)
        finally:
            self.log.end()

    def prepare_sampling(self, executor, model, noise_shape, conds, *args, **kwargs):
        """Make core reserve memory for the cache and for the context pass, as an equivalent number of frames."""
        frame = model.model.memory_required([noise_shape[0], noise_shape[1], 1, *noise_shape[3:]])
        shape = list(noise_shape)
        shape[2] = max(shape[2], self.latents.shape[2]) + -(-self.reserved // max(1, int(frame)))
        return executor(model, shape, conds, *args, **kwargs)

    def sampler_sample(self, executor, guider, sigmas, extra_args, callback, noise, *args, **kwargs):
        """The context pass, between loading the weights and the first step."""
        model, frames = guider.inner_model, self.latents.shape[2]
        cache = self._cache(model, noise)
        options = extra_args["model_options"].setdefault("transformer_options", {})
        try:
            latents = model.process_latent_in(self.latents).to(noise.device, model.get_dtype_inference())
            store = CachedAttention(cache, start_frame=0, frames=frames, store=True, newest=cache.settings.recent_frames,
                                    attention=partial(core_attention, transformer_options=options))
            model.diffusion_model.encode(latents, Outside(store))
            self.log.note(cache.stats())
            options[GIVEN] = Given(cache, frames)
            result = executor(guider, sigmas, extra_args, callback, noise, *args, **kwargs)
            self.log.note(cache.stats())
            return result
        finally:
            options.pop(GIVEN, None)
            cache.free()

    def _geometry(self, model) -> Geometry:
        sizes = model.diffusion_model.sizes
        batch, _, _, height, width = self.latents.shape
        buffers = buffers_on(comfy.model_management.get_torch_device().type, sizes.heads)
        return Geometry(sizes.layers, sizes.heads, sizes.head_dim, (height // 2, width // 2), batch, buffers)

    def _forecast(self, model, new: int, settings: QVGSettings):
        geometry, given = self._geometry(model), self.latents.shape[2]
        itemsize = comfy.model_management.dtype_size(model.get_dtype_inference())
        return forecast_context(context_settings(settings, geometry, given, new, itemsize), geometry, given, new, itemsize)

    def _check_memory(self, patcher, new: int, needed: int) -> None:
        """Raises ValueError for a cache larger than the whole device, naming the presets that would fit."""
        whole, given = comfy.model_management.get_total_memory(patcher.load_device), self.latents.shape[2]
        if needed <= whole:
            return
        fitting = [name.capitalize() for name, preset in PRESETS.items() if self._forecast(patcher.model, new, preset).peak_bytes <= whole]
        ways = f"the preset {' or '.join(fitting)} of Quantize KV Cache (QVG), " if fitting else ""
        raise ValueError(f"The KV cache of {given} given latent frames needs {format_bytes(needed)}, but the device has "
                         f"{format_bytes(whole)} in all. Choose {ways}fewer given_frames, or a smaller video.")

    def _cache(self, model, noise) -> KVCache:
        geometry, given, new, dtype = self._geometry(model), self.latents.shape[2], noise.shape[2], model.get_dtype_inference()
        settings = context_settings(self.settings, geometry, given, new, comfy.model_management.dtype_size(dtype))
        return KVCache(settings, layers=geometry.layers, heads=geometry.heads, head_dim=geometry.head_dim, grid=geometry.grid,
                       rope=FAMILY.rope, batch=geometry.batch, device=noise.device, dtype=dtype, max_frames=given + new, chunk_frames=given,
                       stored_frames=given)

    def install(self, patched) -> None:
        for kind, wrapper in ((WrappersMP.OUTER_SAMPLE, self.outer_sample), (WrappersMP.PREPARE_SAMPLING, self.prepare_sampling),
                              (WrappersMP.SAMPLER_SAMPLE, self.sampler_sample)):
            patched.remove_wrappers_with_key(kind, KEY)
            patched.add_wrapper_with_key(kind, KEY, wrapper)


def owns(network: torch.nn.Module) -> bool:
    """Whether a MODEL's network is LongCat-Video, loaded by this pack."""
    return isinstance(network, LongCat)


def quantize(model, settings: QVGSettings, node_id: str | None = None):
    """A clone of `model` that stores given frames according to `settings`. node_id: the node that shows the run's bytes.

    Raises ValueError when the settings do not fit the heads.
    """
    for tensor in (settings.key, settings.value):
        tensor.groups(model.get_model_object("diffusion_model").sizes.head_dim)
    patched = model.clone()
    patched.set_attachments(ATTACHMENT, RunLog(settings, node_id))
    return patched


def check(model) -> None:
    """Raises ValueError when the model is not LongCat-Video."""
    if not owns(bare(model.get_model_object("diffusion_model"))):
        raise ValueError(f"{type(model.get_model_object('diffusion_model')).__name__} cannot continue a video this way. Load LongCat-Video "
                         "with Load AR Video Model (QVG).")


def settings_of(model) -> QVGSettings:
    """The settings that `quantize` attached; unquantized if it was not used."""
    log: RunLog | None = model.get_attachment(ATTACHMENT)
    return QVGSettings.preset("off") if log is None else log.settings


def note_nothing(model) -> None:
    """Record a run of this model that continues nothing and has no cache."""
    log: RunLog | None = model.get_attachment(ATTACHMENT)
    if log is not None:
        log.start(0, None)
        log.note(KVCache(QVGSettings.preset("off"), layers=1, heads=1, head_dim=8, grid=(1, 1), rope=FAMILY.rope).stats())
        log.end()


def continue_from(model, latents: torch.Tensor):
    """A clone of LongCat-Video whose sampling runs continue `latents` [B or 1, C, F, H, W], stored with the settings of `settings_of`."""
    patched = model.clone()
    settings = settings_of(model)
    Hook(latents, settings, model.get_attachment(ATTACHMENT) or RunLog(settings, None)).install(patched)
    return patched
