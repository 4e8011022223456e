"""The hook into core's causal Wan (comfy/ldm/wan/ar_model.py).

Core's sampler asks the model for per-layer caches, rewinds their "end" after every noisy step, and runs each finished block once more at
timestep 0. Here the caches are stand-ins that only keep "end"; K and V go to a `KVCache`, which stores on the pass at timestep 0 alone.
Object patches on a clone carry the hook, so that the model is untouched in every graph that does not use the node.
"""

from __future__ import annotations

import comfy.patcher_extension
from comfy.ldm.modules.attention import optimized_attention

from ...qvg import budget
from ...qvg.attention import CachedAttention
from ...qvg.budget import Geometry
from ...qvg.cache import KVCache
from ...qvg.settings import QVGSettings

KEY = "quantvideogen"


class Stand:
    """What core's sampler sees of a layer's cache: an "end" that it may move as it likes."""

    def __init__(self):
        self.end = 0

    def __getitem__(self, key: str) -> int:
        return getattr(self, key)

    def __setitem__(self, key: str, value: int) -> None:
        setattr(self, key, value)


class Hook:
    """One patched model: makes the cache of a run, feeds it, and frees it when the run ends, however it ends."""

    def __init__(self, diffusion_model, settings: QVGSettings):
        self.model = diffusion_model
        self.settings = settings
        self.cache: KVCache | None = None
        self.tokens = 0
        self.attend: CachedAttention | None = None
        self.block: tuple[int, int, bool] | None = None
        self.grid: tuple[int, int] | None = None

    def init_kv_caches(self, batch_size, max_seq_len, device, dtype):
        self.free()
        self.tokens = max_seq_len
        return [Stand() for _ in range(self.model.num_layers)]

    def forward_block(self, x, timestep, context, start_frame, kv_caches, crossattn_caches, clip_fea=None):
        frames = x.shape[2]
        self.grid = -(-x.shape[3] // 2), -(-x.shape[4] // 2)
        self.block = start_frame, frames, not bool(timestep.any())
        self.attend = None
        try:
            return type(self.model).forward_block(self.model, x, timestep, context, start_frame, kv_caches, crossattn_caches, clip_fea)
        finally:
            self.attend = None

    def self_attention(self, layer: int):
        module = self.model.blocks[layer].self_attn

        def forward(x, freqs, kv_cache=None, transformer_options={}):  # noqa: B006 (core's signature)
            if kv_cache is None:
                return type(module).forward(module, x, freqs, transformer_options=transformer_options)
            shape = *x.shape[:2], module.num_heads, module.head_dim
            q, k, v = module.norm_q(module.q(x)).view(shape), module.norm_k(module.k(x)).view(shape), module.v(x).view(shape)
            kv_cache["end"] += x.shape[1]
            return module.o(self._pass(q)(layer, q, k, v).flatten(2))

        return forward

    def _pass(self, q) -> CachedAttention:
        """The attention of the block being computed. The cache is made here, where batch, device and dtype are those of real keys."""
        if self.attend is None:
            start, frames, clean = self.block
            if self.cache is None:
                self.cache = KVCache(
                    self.settings, layers=self.model.num_layers, heads=q.shape[2], head_dim=q.shape[3], grid=self.grid,
                    batch=q.shape[0], device=q.device, dtype=q.dtype, max_frames=self.tokens // (self.grid[0] * self.grid[1]),
                    chunk_frames=frames)
            self.attend = CachedAttention(self.cache, start_frame=start, frames=frames, store=clean, attention=_attention)
        return self.attend

    def free(self) -> None:
        self.attend = None
        if self.cache is not None:
            self.cache.free()
            self.cache = None

    # wrappers around ComfyUI's sampling run

    def outer_sample(self, executor, noise, latent_image, sampler, sigmas, denoise_mask=None, *args, **kwargs):
        _refuse_what_core_cannot(executor.class_obj, sigmas, denoise_mask)
        try:
            return executor(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)
        finally:
            self.free()

    def prepare_sampling(self, executor, model, noise_shape, conds, *args, **kwargs):
        """Ask core to leave room for the cache: the node's bytes are added to the latent's as extra batch entries of the estimate."""
        frames, grid = noise_shape[2], (-(-noise_shape[3] // 2), -(-noise_shape[4] // 2))
        geometry = Geometry(self.model.num_layers, self.model.num_heads, self.model.head_dim, grid, noise_shape[0])
        needed = budget.forecast(self.settings, geometry, frames).peak_bytes
        per_frame = model.model.memory_required([noise_shape[0], noise_shape[1], 1, *noise_shape[3:]])
        shape = list(noise_shape)
        shape[2] += int(-(-needed // max(1, per_frame)))
        return executor(model, shape, conds, *args, **kwargs)


def _attention(q, k, v):
    """Core's chosen attention on [B, T, H, D]."""
    out = optimized_attention(q.flatten(2), k.flatten(2), v.flatten(2), heads=q.shape[2])
    return out.view(q.shape)


def _refuse_what_core_cannot(guider, sigmas, denoise_mask) -> None:
    """ValueError for what would fail inside core's autoregressive sampler with a message about tensor shapes."""
    if denoise_mask is not None:
        raise ValueError("The latent has a noise mask, which the autoregressive sampler cannot follow. Remove Set Latent Noise Mask.")
    if len(sigmas) and sigmas[-1] != 0:
        raise ValueError(f"The last sigma is {float(sigmas[-1]):g}, but the autoregressive sampler finishes each block before the next. "
                         "Use sigmas that end in 0.")
    cfg = getattr(guider, "cfg", 1.0)
    if cfg != 1.0:
        raise ValueError(f"cfg is {cfg:g}, but the autoregressive sampler keeps one cache for one condition. Set cfg to 1.")
    count = len(guider.conds.get("positive", ()))
    if count > 1:
        raise ValueError(f"{count} conditions are combined, but the autoregressive sampler keeps one cache for one condition. "
                         "Connect a single prompt.")


def quantize(model, settings: QVGSettings):
    """A clone of `model` whose cache is quantized as `settings` say; with the Off preset, a clone and nothing more.

    Raises ValueError when the model is not a causal Wan, or the settings do not fit its heads.
    """
    diffusion_model = model.get_model_object("diffusion_model")
    if not hasattr(diffusion_model, "init_kv_caches"):
        raise ValueError(
            f"{type(diffusion_model).__name__} is not an autoregressive video model: it has no KV cache to quantize. Load a "
            "Self-Forcing or Causal-Forcing checkpoint whose metadata says causal_ar.")
    patched = model.clone()
    if settings.codec == "plain":
        return patched
    for tensor in (settings.key, settings.value):
        tensor.groups(diffusion_model.head_dim)
    hook = Hook(diffusion_model, settings)
    patched.add_object_patch("diffusion_model.init_kv_caches", hook.init_kv_caches)
    patched.add_object_patch("diffusion_model.forward_block", hook.forward_block)
    for layer in range(diffusion_model.num_layers):
        patched.add_object_patch(f"diffusion_model.blocks.{layer}.self_attn.forward", hook.self_attention(layer))
    kinds = comfy.patcher_extension.WrappersMP
    patched.add_wrapper_with_key(kinds.OUTER_SAMPLE, KEY, hook.outer_sample)
    patched.add_wrapper_with_key(kinds.PREPARE_SAMPLING, KEY, hook.prepare_sampling)
    return patched
