"""The given frames of a sampling run of LongCat-Video: stored in a quantized cache before the first step, read in every step.

The cache holds one video, which all conditions read, in one batch or separately, and is freed when the run ends.
"""

from __future__ import annotations

import logging

import comfy.model_management
import torch
from comfy.patcher_extension import WrappersMP

from ...qvg import backends
from ...qvg.attention.cached import CachedAttention
from ...qvg.cache.context import context_settings, forecast_context
from ...qvg.cache.geometry import Geometry, on_device
from ...qvg.cache.kv_cache import KVCache
from ...qvg.models.longcat import LONGCAT
from ...qvg.settings import QVGSettings
from ...qvg.units import format_bytes
from ..memory_check import fitting_presets
from ..run_log import RunLog
from .attention import attention_to, reading
from .compiled import EagerCall

KEY = "quantvideogen"
# in transformer_options: the `Given` of the run
GIVEN = "quantvideogen_given"


class Given:
    """The stored given frames of one run."""

    def __init__(self, cache: KVCache, frames: int):
        self.cache, self.frames = cache, frames

    def attend(self, new: int, options: dict) -> CachedAttention:
        """options: transformer_options of the pass."""
        return CachedAttention(self.cache, start_frame=self.frames, frames=new, store=False, attention=attention_to(options, self.cache))


class Hook:
    """Wrappers around one MODEL's sampling runs, which continue `latents` [B or 1, C, F, H, W], in the scale of the VAE. shares: of the
    heads, of which this process keeps one."""

    def __init__(self, latents: torch.Tensor, settings: QVGSettings, log: RunLog, shares: int = 1):
        self.latents, self.settings, self.log, self.shares = latents, settings, log, shares
        self.reserved = 0
        self.reading: dict = {}

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
        self.reading = self._reading(executor.class_obj)
        found = self._forecast(patcher.model, noise.shape[2], self.settings)
        self.check_memory(patcher.model, noise.shape[2], comfy.model_management.get_total_memory(patcher.load_device))
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

    def _reading(self, guider) -> dict:
        return reading(self.settings, guider.model_options, guider.model_patcher.model.diffusion_model.sizes.head_dim)

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
                                    attention=attention_to(options, cache))
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
        geometry = Geometry(sizes.layers, max(1, sizes.heads // self.shares), sizes.head_dim, (height // 2, width // 2), batch,
                            packs=self.reading["packs"])
        return on_device(geometry, comfy.model_management.get_torch_device().type, self.reading["workspace_limit"])

    def _forecast(self, model, new: int, settings: QVGSettings):
        geometry, given = self._geometry(model), self.latents.shape[2]
        itemsize = comfy.model_management.dtype_size(model.get_dtype_inference())
        return forecast_context(context_settings(settings, geometry, given, new, itemsize), geometry, given, new, itemsize)

    def check_memory(self, model, new: int, room: int, of: str = "the device has {} in all") -> None:
        """Raises ValueError for a cache larger than `room` bytes, naming the presets that would fit. of: says what they are."""
        def peak_of(settings: QVGSettings) -> int:
            return self._forecast(model, new, settings).peak_bytes

        needed = peak_of(self.settings)
        if needed <= room:
            return
        raise ValueError(f"The KV cache of {self.latents.shape[2]} given latent frames needs {format_bytes(needed)}, but "
                         f"{of.format(format_bytes(room))}. Choose {fitting_presets(peak_of, room)}fewer given_frames, or a smaller video.")

    def _cache(self, model, noise) -> KVCache:
        geometry, given, new, dtype = self._geometry(model), self.latents.shape[2], noise.shape[2], model.get_dtype_inference()
        settings = context_settings(self.settings, geometry, given, new, comfy.model_management.dtype_size(dtype))
        return KVCache(settings, layers=geometry.layers, heads=geometry.heads, head_dim=geometry.head_dim, grid=geometry.grid,
                       rope=LONGCAT.rope, batch=geometry.batch, device=noise.device, dtype=dtype, max_frames=given + new,
                       chunk_frames=given, stored_frames=given, **self.reading)

    def install(self, patched) -> None:
        for kind, wrapper in ((WrappersMP.OUTER_SAMPLE, self.outer_sample), (WrappersMP.PREPARE_SAMPLING, self.prepare_sampling),
                              (WrappersMP.SAMPLER_SAMPLE, self.sampler_sample)):
            patched.remove_wrappers_with_key(kind, KEY)
            patched.add_wrapper_with_key(kind, KEY, wrapper)
