"""The preset Off on core's causal Wan: nothing is quantized, and core's own cache is measured."""

from __future__ import annotations

from comfy.patcher_extension import WrappersMP

from ..run_log import RunLog, plain_stats
from .checks import check_run, is_autoregressive
from .compiled import check_compiled, eager, eager_shell, original
from .wan_core import KEY, PATCHES, block_state, compute_dtype


class PlainHook:
    """The preset Off: core's own cache, whose bytes are recorded in the log."""

    def __init__(self, model, log: RunLog):
        self.model, self.log = model, log
        self.frames = 0

    @property
    def network(self):
        return original(self.model.diffusion_model)

    def get_dtype(self):
        return compute_dtype(self.model)

    @eager_shell
    def forward(self, x, timestep, context, clip_fea=None, time_dim_concat=None, transformer_options={}, **kwargs):  # noqa: B006
        network, state = self._begin(transformer_options)
        if state is None:
            return type(network).forward(network, x, timestep, context, clip_fea=clip_fea, time_dim_concat=time_dim_concat,
                                         transformer_options=transformer_options, **kwargs)
        return type(network).forward_block(network, x, timestep[:, None].expand(-1, x.shape[2]), context, *state, clip_fea)

    @eager
    def _begin(self, transformer_options: dict):
        return self.network, block_state(transformer_options)

    def init_kv_caches(self, batch_size, max_seq_len, device, dtype):
        caches = type(self.network).init_kv_caches(self.network, batch_size, max_seq_len, device, dtype)
        # allocated whole, from the first frame to the last
        for frames in (0, self.frames):
            self.log.note(plain_stats(caches, self.frames, frames))
        return caches

    def outer_sample(self, executor, noise, latent_image, sampler, sigmas, denoise_mask=None, *args, **kwargs):
        guider = executor.class_obj
        check_compiled(guider.model_options)
        if is_autoregressive(sampler):
            check_run(guider, noise, sampler, sigmas, denoise_mask)
        own, self.model = self.model, guider.model_patcher.model
        self.frames = noise.shape[2] if noise.ndim == 5 else 0
        self.log.start(self.frames, None)
        try:
            return executor(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)
        finally:
            self.model = own
            self.log.end()

    def install(self, patched) -> None:
        for name, patch in zip(PATCHES, (self.init_kv_caches, self.forward, self.get_dtype)):
            patched.add_object_patch(name, patch)
        patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, self.outer_sample)
