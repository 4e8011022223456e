"""Latents to pixels and back, a few frames at a time, with the results of one pass over the whole video."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..files import short_repr
from ..models.wan_vae import WanVAE, denormalize, normalize


class ChunkDecoder:
    """Decodes a video chunk by chunk: latents [B, 16, f, H, W] as the network makes them -> the next frames [B, 3, n, 8H, 8W] in about
    -1..1. The last inputs of the VAE's causal convolutions are kept from call to call."""

    def __init__(self, vae: WanVAE):
        self.vae = vae
        self.memory: dict[nn.Module, Tensor] = {}

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        z = denormalize(latents).to(self.vae.conv2.weight.dtype)
        parts = [self.vae.decoder(self.vae.conv2(z[:, :, index:index + 1], {}), self.memory) for index in range(z.shape[2])]
        return torch.cat(parts, dim=2)

    def state(self) -> dict[str, Tensor]:
        """The kept inputs, by the names of their layers."""
        names = {module: name for name, module in self.vae.decoder.named_modules()}
        return {names[module]: tensor for module, tensor in self.memory.items()}

    def restore(self, state: dict[str, Tensor], shape: tuple[int, ...], frames: int) -> None:
        """Continue from a `state` taken after `frames` latent frames of `shape` (B, C, H, W).

        Raises ValueError if it is not a state of this VAE, or lacks a layer.
        """
        expected = self.vae.decoder.memory_shapes(shape, frames)
        for name in sorted(expected.keys() | state.keys()):
            if name not in expected:
                raise ValueError(f"The saved decoder has a layer {name[:100]!r}, which this VAE lacks. Load the VAE that made the video.")
            if name not in state or tuple(state[name].shape) != expected[name]:
                found = f"has shape {short_repr(list(state[name].shape))}" if name in state else "is missing"
                raise ValueError(f"The saved decoder's layer {name} {found}, where this VAE has {list(expected[name])}. Load the VAE that "
                                 "made the video, or use an earlier checkpoint.")
        modules, weight = dict(self.vae.decoder.named_modules()), self.vae.conv2.weight
        self.memory = {modules[name]: tensor.to(weight) for name, tensor in state.items()}


class PixelFrames(ChunkDecoder):
    """The same as pixels uint8 [n, 8H, 8W, 3] on the CPU, for a `VideoWriter`, of the first video of a batch."""

    def __call__(self, latents: Tensor) -> Tensor:
        return to_bytes(super().__call__(latents)[0])

    def restore(self, state: dict[str, Tensor], shape: tuple[int, ...], frames: int) -> None:
        """See `ChunkDecoder.restore`. Raises ValueError for the session of a video in latents, too."""
        if frames and not state:
            raise ValueError("The session is of a video in latents, which has no pictures to continue. Give the --out of its .latent file.")
        super().restore(state, shape, frames)


@torch.no_grad()
def encode_stream(vae: WanVAE, video: Tensor) -> Tensor:
    """Video [B, 3, n, 8H, 8W] in -1..1 -> latents [B, 16, F, H, W] as the network reads them, with the memory of encoding four frames.

    Frames after the last whole group of four are dropped.
    """
    memory: dict[nn.Module, Tensor] = {}
    stops = range(1, video.shape[2] + 1, 4)
    parts = [vae.encoder(video[:, :, max(0, stop - 4):stop].to(vae.conv1.weight), memory) for stop in stops]
    return normalize(torch.cat([vae.conv1(part, {}).chunk(2, dim=1)[0] for part in parts], dim=2)).float()


def to_bytes(video: Tensor) -> Tensor:
    """Video [3, F, H, W] in -1..1 -> pixels uint8 [F, H, W, 3] on the CPU."""
    return video.permute(1, 2, 3, 0).float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).cpu()
