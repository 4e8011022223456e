"""The given frames of a sampling run of LongCat-Video: stored in a quantized cache before the first step, read in every step.

The cache holds one video, which all conditions read, in one batch or separately, and is freed when the run ends.
"""

from __future__ import annotations

import logging
from functools import partial

import comfy.model_management
import torch
from comfy.patcher_extension import WrappersMP

from ...qvg import backends
from ...qvg.attention.cached import CachedAttention
from ...qvg.cache.context import context_settings, forecast_context
from ...qvg.cache.geometry import Geometry, buffers_on
from ...qvg.cache.kv_cache import KVCache
from ...qvg.models.longcat import LONGCAT
from ...qvg.settings import PRESETS, QVGSettings
from ...qvg.units import format_bytes
from ..run_log import RunLog
from .attention import core_attention
from .compiled import EagerCall

KEY = "quantvideogen"
# in transformer_options: the `Given` of the run
GIVEN = "quantvideogen_given"


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
            model.diffusion_model.encode(latents, EagerCall(store))
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
                       rope=LONGCAT.rope, batch=geometry.batch, device=noise.device, dtype=dtype, max_frames=given + new,
                       chunk_frames=given, stored_frames=given)

    def install(self, patched) -> None:
        for kind, wrapper in ((WrappersMP.OUTER_SAMPLE, self.outer_sample), (WrappersMP.PREPARE_SAMPLING, self.prepare_sampling),
                              (WrappersMP.SAMPLER_SAMPLE, self.sampler_sample)):
            patched.remove_wrappers_with_key(kind, KEY)
            patched.add_wrapper_with_key(kind, KEY, wrapper)
