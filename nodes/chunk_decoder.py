"""Decodes chunks of latents with ComfyUI's Wan VAE as they come, with the frames of one decode of the whole video."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_management
import comfy.ops
import torch
from comfy.ldm.wan.vae import count_cache_layers


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Core checks for an interrupt in every layer; inside, it does not. An interrupt in the middle of a decoder pass would lose the
    inputs that its causal convolutions keep, and with them all later frames."""
    check, comfy.ops.run_every_op = comfy.ops.run_every_op, lambda: None
    try:
        yield
    finally:
        comfy.ops.run_every_op = check


class CoreDecoder:
    """Core's Wan VAE, with the last inputs of its causal convolutions kept from chunk to chunk.

    Core's decoder looks back two frames within a call. So after the first frame it must get two at a time, and an odd one waits for the
    next chunk, or for `last`. patcher: the network's, which must stay loaded beside the VAE.
    """

    def __init__(self, vae, patcher):
        self.vae, self.patcher = vae, patcher
        self.memory = [None] * count_cache_layers(vae.first_stage_model.decoder)
        self.started = self.failed = False
        self.waiting: torch.Tensor | None = None

    def __call__(self, latents: torch.Tensor, last: bool = False) -> Iterator[torch.Tensor]:
        """Latents [1, C, f, H, W] as VAE Decode takes them -> parts [1, 3, n, 8H, 8W] of the video in -1..1.

        What an interrupt leaves undecoded comes first the next time. After a pass that failed nothing comes, because the kept inputs are
        lost.
        """
        self.waiting = latents if self.waiting is None else torch.cat([self.waiting, latents], 2)
        return self._parts(last)

    def _parts(self, last: bool) -> Iterator[torch.Tensor]:
        while not self.failed and (left := self.waiting.shape[2]) and (left > 1 or last or not self.started):
            count = min(left, 2) if self.started else 1
            part = self._decode(self.waiting[:, :, :count])
            self.waiting, self.started = self.waiting[:, :, count:], True
            yield part

    @torch.no_grad()
    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        vae = self.vae
        # both are named, so that loading the VAE does not unload the network
        comfy.model_management.load_models_gpu([self.patcher, vae.patcher],
                                               memory_required=vae.memory_used_decode(latents.shape, vae.vae_dtype))
        try:
            with interrupts_deferred():
                z = vae.first_stage_model.conv2(latents.to(vae.device, vae.vae_dtype))
                return torch.cat(vae.first_stage_model.decoder(z, feat_cache=self.memory, feat_idx=[0]), 2)
        except BaseException:
            # the pass has overwritten part of the kept inputs, and a copy of them would take as much memory again
            self.failed = True
            raise
