"""A quantized cache for core's causal Wan and core's own sampler.

Core's sampler asks the model for one cache per layer, rewinds their "end" after every noisy step, and runs each finished chunk once more at
timestep 0. Here those caches are stubs that only have "end". Keys and values go to a `KVCache`, which stores in the pass at timestep 0
only.
"""

from __future__ import annotations

import logging
import math

import comfy.model_management
import torch
from comfy.patcher_extension import WrappersMP

from ...qvg import backends
from ...qvg.attention.cached import CachedAttention
from ...qvg.cache import forecast as forecasts
from ...qvg.cache.geometry import Geometry, on_device
from ...qvg.cache.kv_cache import KVCache
from ...qvg.models.wan import WAN
from ...qvg.settings import QVGSettings
from ...qvg.units import format_bytes
from ..ranks.mark import split_of
from ..run_log import RunLog
from .attention import attention_to, reading
from .checks import check_run, evaluated, is_autoregressive
from .compiled import eager, eager_shell, original
from .passes import Passes
from .patches import CAUSAL, check_pass, check_patches
from .wan_core import ATTENTION_PATCH, KEY, PATCHES, CacheStub, block_state, compute_dtype

# float32 latents of the whole video that a run holds: noise, the start, their mixture, the result
WHOLE_LATENTS = 4


class Hook:
    """A quantized cache, created when a run first attends and freed when the run ends, for whatever reason.

    model: core's BaseModel around the causal Wan that samples. During a run it is that of the run's own patcher, which may be another copy
    of the same weights. settings, log: of the node.
    """

    def __init__(self, model, settings: QVGSettings, log: RunLog):
        self.model, self.settings, self.log = model, settings, log
        self.cache: KVCache | None = None
        self.attend: CachedAttention | None = None
        self.block: tuple[int, int, bool] | None = None
        self.options: dict | None = None
        self.grid: tuple[int, int] | None = None
        self.frames = 0
        self.chunk_frames = 0
        self.pass_frames = self.given = 0
        self.reading: dict = {}
        self.reserved = 0
        self.passes = Passes()

    @property
    def network(self):
        return original(self.model.diffusion_model)

    # patches of the model

    def get_dtype(self):
        return compute_dtype(self.model)

    def init_kv_caches(self, batch_size, max_seq_len, device, dtype):
        self.free()
        return [CacheStub() for _ in range(self.network.num_layers)]

    @eager_shell
    def forward(self, x, timestep, context, clip_fea=None, time_dim_concat=None, transformer_options={}, **kwargs):  # noqa: B006
        network, state, again = self._begin(x, timestep, transformer_options)
        if state is None:
            return type(network).forward(network, x, timestep, context, clip_fea=clip_fea, time_dim_concat=time_dim_concat,
                                         transformer_options=transformer_options, **kwargs)
        if again:
            return torch.zeros_like(x)
        try:
            return type(network).forward_block(network, x, timestep[:, None].expand(-1, x.shape[2]), context, *state, clip_fea)
        finally:
            self._end()

    @eager
    def _begin(self, x, timestep, transformer_options: dict):
        """The network, `block_state` of the pass, and whether its chunk is already stored: guidance that evaluates the network twice does
        so in the storing pass, too, where the result is not used."""
        state = block_state(transformer_options)
        if state is None:
            return self.network, None, False
        check_pass(transformer_options)
        self.block = state[0], x.shape[2], self.passes.is_clean(timestep)
        self.options = transformer_options
        return self.network, state, self.block[2] and self.cache is not None and self.cache.frames > state[0]

    @eager
    def _end(self) -> None:
        self.attend = self.options = None
        if self.block[2] and self.cache is not None:
            self.log.note(self.cache.stats)
        else:
            self.log.tick()

    def self_attention(self, layer: int):
        @eager
        def forward(x, freqs, kv_cache=None, transformer_options={}):  # noqa: B006 (core's signature)
            module = self.network.blocks[layer].self_attn
            if kv_cache is None:
                return type(module).forward(module, x, freqs, transformer_options=transformer_options)
            shape = *x.shape[:2], module.num_heads, module.head_dim
            q, k, v = module.norm_q(module.q(x)).view(shape), module.norm_k(module.k(x)).view(shape), module.v(x).view(shape)
            kv_cache["end"] += x.shape[1]
            return module.o(self._pass(q)(layer, q, k, v).flatten(2))

        return forward

    def _pass(self, q) -> CachedAttention:
        """Attention for the pass. The cache is created here, because batch, device and dtype are those of the actual keys."""
        if self.attend is None:
            start, frames, clean = self.block
            if self.cache is None:
                self.cache = KVCache(
                    self.settings, layers=self.network.num_layers, heads=q.shape[2], head_dim=q.shape[3], grid=self.grid, rope=WAN.rope,
                    batch=q.shape[0], device=q.device, dtype=q.dtype, max_frames=self.frames, chunk_frames=self.chunk_frames,
                    **self.reading)
            self.attend = CachedAttention(self.cache, start_frame=start, frames=frames, store=clean,
                                          attention=attention_to(self.options, self.cache))
        return self.attend

    def free(self) -> None:
        self.attend = None
        if self.cache is not None:
            self.cache.free()
            self.cache = None

    # wrappers around ComfyUI's sampling run

    def outer_sample(self, executor, noise, latent_image, sampler, sigmas, denoise_mask=None, *args, **kwargs):
        guider = executor.class_obj
        check_patches(guider, CAUSAL)
        check_run(guider, noise, sampler, sigmas, denoise_mask)
        own, self.model = self.model, guider.model_patcher.model
        try:
            self._plan(guider, noise.shape, sampler)
            self.passes.expect(sampler, sigmas, bool(self.given))
            with backends.on_compile(self.log.say):
                return executor(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)
        finally:
            self.free()
            self.model = own
            self.log.end()

    def _plan(self, guider, shape, sampler) -> None:
        """Forecast the run. Raises ValueError when the settings cannot work for it."""
        start = guider.model_options.get("transformer_options", {}).get("ar_config", {}).get("initial_latent")
        self.frames, self.grid = shape[2], (-(-shape[3] // 2), -(-shape[4] // 2))
        self.chunk_frames = min(getattr(sampler, "extra_options", {}).get("num_frame_per_block", 3), self.frames)
        self.reading = reading(self.settings, guider.model_options, self.network.head_dim)
        # of this GPU, where others have the other heads
        split = split_of(guider.model_patcher)
        heads = self.network.num_heads // (split.shares if split else 1)
        geometry = on_device(Geometry(self.network.num_layers, heads, self.network.head_dim, self.grid, shape[0],
                                      packs=self.reading["packs"]),
                             comfy.model_management.get_torch_device().type, self.reading["workspace_limit"])
        itemsize = comfy.model_management.dtype_size(self.get_dtype())
        forecast = forecasts.forecast(self.settings, geometry, self.frames, self.chunk_frames,
                                   first_frames=0 if start is None else start.shape[2], itemsize=itemsize)
        own_caches = getattr(sampler, "keeps_own_caches", False)
        # core stores the given frames in one pass; how another pack's sampler does it is unknown
        given = 0 if own_caches or start is None else start.shape[2]
        self.given = given
        self.pass_frames = max(self.chunk_frames, given) if own_caches or is_autoregressive(sampler) else self.frames
        # a sampler that keeps its own caches has one per condition
        self.reserved = forecast.peak_bytes * (len(evaluated(guider)) if own_caches else 1)
        self.reserved += WHOLE_LATENTS * 4 * math.prod(shape)
        self.log.start(self.frames, forecast)
        logging.info("QVG: the KV cache of %d latent frames will take %s, %s at its peak (bf16: %s), preset %s", self.frames,
                     *map(format_bytes, (forecast.stored_bytes, forecast.peak_bytes, forecast.bf16_bytes)), self.settings.name)

    def prepare_sampling(self, executor, model, noise_shape, conds, *args, **kwargs):
        """Make core reserve memory for one pass and for the cache.

        Core estimates a pass over the whole video, for which it would move weights off the device, and knows nothing of the cache. It
        accepts a number of frames only, so it gets the number that needs as much memory.
        """
        frame = model.model.memory_required([noise_shape[0], noise_shape[1], 1, *noise_shape[3:]])
        shape, management = list(noise_shape), comfy.model_management
        if management.xformers_enabled() or management.pytorch_attention_flash_attention():
            # a pass, and the same again for encoding; other attention kernels also need memory for the scores of the whole history
            shape[2] = min(shape[2], 2 * self.pass_frames)
        shape[2] += -(-self.reserved // max(1, int(frame)))
        return executor(model, shape, conds, *args, **kwargs)

    def install(self, patched) -> None:
        for name, patch in zip(PATCHES, (self.init_kv_caches, self.forward, self.get_dtype)):
            patched.add_object_patch(name, patch)
        for layer in range(self.network.num_layers):
            patched.add_object_patch(ATTENTION_PATCH.format(layer), self.self_attention(layer))
        patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, self.outer_sample)
        patched.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, self.prepare_sampling)
        self.passes.install(patched, KEY)
