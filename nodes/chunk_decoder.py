"""Decodes chunks of latents with ComfyUI's VAEs as they come, with the frames of one decode of the whole video where the VAE allows it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_management
import comfy.ops
import torch
from comfy.ldm.wan import vae2_2
from comfy.ldm.wan.vae import WanVAE, count_cache_layers

from ..qvg.backends.memory import ran_out


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Core checks for an interrupt in every layer; inside, it does not. An interrupt in the middle of a decoder pass would lose the
    inputs that its causal convolutions keep, and with them all later frames."""
    check, comfy.ops.run_every_op = comfy.ops.run_every_op, lambda: None
    try:
        yield
    finally:
        comfy.ops.run_every_op = check


class ChunkDecoder:
    """A VAE that decodes parts of a video in order. patcher: the network's, which must stay loaded beside the VAE, or None."""

    def __init__(self, vae, patcher):
        self.vae, self.patcher = vae, patcher
        self.failed = False

    def __call__(self, latents: torch.Tensor, last: bool = False) -> Iterator[torch.Tensor]:
        """Latents [1, C, f, H, W] as VAE Decode takes them -> parts [1, 3, n, H', W'] of the video in -1..1.

        last: no more will come. After a pass that failed nothing comes, because what it kept is lost.
        """
        raise NotImplementedError

    @torch.no_grad()
    def _pass(self, latents: torch.Tensor, decode) -> torch.Tensor:
        """decode: a function of the latents on the VAE's device and in its dtype."""
        vae = self.vae
        # both are named, so that loading the VAE does not unload the network
        comfy.model_management.load_models_gpu([patcher for patcher in (self.patcher, vae.patcher) if patcher is not None],
                                               memory_required=vae.memory_used_decode(latents.shape, vae.vae_dtype))
        try:
            with interrupts_deferred():
                return decode(latents.to(vae.device, vae.vae_dtype))
        except BaseException:
            # the pass has overwritten part of what was kept, and a copy of that would take as much memory again
            self.failed = True
            raise


class CoreDecoder(ChunkDecoder):
    """Core's VAE of Wan 2.1, with the last inputs of its causal convolutions kept from chunk to chunk.

    Core's decoder looks back two frames within a call. So after the first frame it must get two at a time, and an odd one waits for the
    next chunk, or for `last`. What an interrupt leaves undecoded comes first the next time.
    """

    def __init__(self, vae, patcher):
        super().__init__(vae, patcher)
        self.memory = [None] * count_cache_layers(vae.first_stage_model.decoder)
        self.started = False
        self.waiting: torch.Tensor | None = None

    def __call__(self, latents: torch.Tensor, last: bool = False) -> Iterator[torch.Tensor]:
        self.waiting = latents if self.waiting is None else torch.cat([self.waiting, latents], 2)
        return self._parts(last)

    def _parts(self, last: bool) -> Iterator[torch.Tensor]:
        while not self.failed and (left := self.waiting.shape[2]) and (left > 1 or last or not self.started):
            count = min(left, 2) if self.started else 1
            part = self._pass(self.waiting[:, :, :count], self._decode)
            self.waiting, self.started = self.waiting[:, :, count:], True
            yield part

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        network = self.vae.first_stage_model
        return torch.cat(network.decoder(network.conv2(latents), feat_cache=self.memory, feat_idx=[0]), 2)


class Wan22Decoder(ChunkDecoder):
    """Core's VAE of Wan 2.2, which decodes one latent frame after another in any case."""

    def __init__(self, vae, patcher):
        super().__init__(vae, patcher)
        self.memory = [None] * vae2_2.count_conv3d(vae.first_stage_model.decoder)
        self.started = False
        self.waiting: list[torch.Tensor] = []

    def __call__(self, latents: torch.Tensor, last: bool = False) -> Iterator[torch.Tensor]:
        self.waiting += latents.split(1, dim=2) if latents.shape[2] else []
        return self._parts()

    def _parts(self) -> Iterator[torch.Tensor]:
        while self.waiting and not self.failed:
            part = self._pass(self.waiting[0], self._decode)
            self.started = True
            del self.waiting[0]
            yield part

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        network = self.vae.first_stage_model
        out = network.decoder(network.conv2(latents), feat_cache=self.memory, feat_idx=[0], first_chunk=not self.started)
        return vae2_2.unpatchify(out, patch_size=2)


class OverlapDecoder(ChunkDecoder):
    """Any other video VAE of four frames a latent frame. Its layers may look at the whole video, so each part is decoded together with some
    latent frames before it, and comes out nearly as from the whole."""

    OVERLAP = 4

    def __init__(self, vae, patcher):
        super().__init__(vae, patcher)
        self.before: torch.Tensor | None = None

    def __call__(self, latents: torch.Tensor, last: bool = False) -> Iterator[torch.Tensor]:
        if self.failed or not latents.shape[2]:
            return
        whole = latents if self.before is None else torch.cat([self.before, latents], 2)
        part = self._pass(whole, self.vae.first_stage_model.decode)
        if self.before is not None:
            part = part[:, :, -4 * latents.shape[2]:]
        self.before = whole[:, :, -self.OVERLAP:]
        yield part


def decoder_of(vae, patcher) -> ChunkDecoder:
    """The decoder for a VAE of ComfyUI. patcher: see `ChunkDecoder`."""
    kinds = {WanVAE: CoreDecoder, vae2_2.WanVAE: Wan22Decoder}
    make = next((made for kind, made in kinds.items() if isinstance(vae.first_stage_model, kind)), OverlapDecoder)
    return make(vae, patcher)


def decode(vae, latents: torch.Tensor) -> torch.Tensor:
    """Frames [n, H', W', 3] in 0..1 of a whole video, latents [1, C, F, H, W], on the CPU. Where the VAE allows it, the device holds the
    frames of one latent frame at a time."""
    if isinstance(vae.first_stage_model, vae2_2.WanVAE):
        parts = (vae.process_output(part.to(vae.output_device).float()) for part in Wan22Decoder(vae, None)(latents))
        try:
            return torch.cat([part[0].movedim(0, -1).cpu() for part in parts])
        except Exception as error:
            if not ran_out(error):
                raise
            # core's own decodes in tiles then
            comfy.model_management.soft_empty_cache()
    return vae.decode(latents).flatten(0, -4).cpu()
