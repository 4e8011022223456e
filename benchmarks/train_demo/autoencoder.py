"""The tiny VAE: L1 and edge loss on procedural clips, with noise on normalized latents in place of a KL term.

During training the latents are normalized by the batch's own statistics, per channel, and noise proportional to that is
added before decoding. So every channel carries signal, no channel can collapse or grow, and the decoder tolerates what
a small diffusion model leaves. At the end the true statistics, and Wan's constants, are folded into the two 1x1x1
convolutions around the latent: whoever normalizes as Wan does sees zero mean and unit variance.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...qvg.demo.scenes import place, random_scene, render
from ...qvg.models.wan_vae import CHANNELS, MEAN, STD, WanVAE
from .clock import Clock, Log

LATENT_NOISE = 0.15


def draw_clips(count: int, frames: int, generator: torch.Generator, device) -> Tensor:
    return render(place([random_scene(generator) for _ in range(count)], generator).to(device), frames)


def edges(video: Tensor) -> tuple[Tensor, Tensor]:
    return video.diff(dim=-1), video.diff(dim=-2)


def train_autoencoder(vae: WanVAE, minutes: float, batch: int, frames: int, rate: float, device) -> None:
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    clock, log = Clock(minutes), Log("vae", 100)
    vae.train()
    while not clock.over():
        for group in optimizer.param_groups:
            group["lr"] = rate * clock.schedule()
        video = draw_clips(batch, frames, generator, device)
        with torch.autocast(device.type, torch.bfloat16):
            latent = vae.posterior(video)[0].float()
            std, mean = torch.std_mean(latent, dim=(0, 2, 3, 4), keepdim=True)
            latent = (latent - mean) / (std + 1e-4)
            noise = LATENT_NOISE * torch.rand(batch, 1, 1, 1, 1, device=device)
            output = vae.decode(latent + noise * torch.randn_like(latent)).float()
        loss = F.l1_loss(output, video)
        loss = loss + sum(F.l1_loss(a, b) for a, b in zip(edges(output), edges(video)))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        log(loss=loss, psnr=-10 * ((output - video) / 2).detach().square().mean().log10())
    vae.eval()


@torch.no_grad()
def fold_statistics(vae: WanVAE, device, clips: int = 64, frames: int = 29) -> None:
    """Make `normalize(vae.encode(video))` zero-mean and unit-variance, and the decoder read what `encode` writes."""
    generator = torch.Generator().manual_seed(2)
    latents = torch.cat([vae.encode(draw_clips(4, frames, generator, device)) for _ in range(clips // 4)])
    std, mean = torch.std_mean(latents, dim=(0, 2, 3, 4))
    wan_mean, wan_std = torch.tensor(MEAN, device=device), torch.tensor(STD, device=device)

    gain = wan_std / std
    vae.conv1.weight[:CHANNELS] *= gain.view(-1, 1, 1, 1, 1)
    vae.conv1.bias[:CHANNELS] = (vae.conv1.bias[:CHANNELS] - mean) * gain + wan_mean
    # the log variance half was never trained: say "certain"
    vae.conv1.weight[CHANNELS:] = 0
    vae.conv1.bias[CHANNELS:] = -10
    vae.conv2.weight /= wan_std.view(1, -1, 1, 1, 1)
    vae.conv2.bias -= vae.conv2.weight.flatten(1) @ wan_mean
