"""Training of the tiny VAE: first on still scenes, then on longer and longer clips, with noise on normalized latents instead of a KL term.

During training, latents are normalized by the batch's statistics, per channel, and noise is added before they are decoded. So every channel
carries signal, none can collapse or grow, and the decoder tolerates the errors of a small diffusion model. At the end the real statistics,
and Wan's constants, are folded into the two 1x1x1 convolutions around the latent, so that Wan's normalization gives zero mean and unit
variance.

A network of width 8 consists of a thousand small kernels, so on a GPU a whole step is captured once and replayed.
"""

from __future__ import annotations

from dataclasses import fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...qvg.demo.scenes import HEIGHT, WIDTH, Layout, place, random_scene, render
from ...qvg.models.wan_vae import CHANNELS, MEAN, STD, ResidualBlock, WanVAE
from .clock import Clock, Log

LATENT_NOISE = 0.15
EDGE_WEIGHT = 0.5


class Scenes:
    """Many random scenes on the device; `draw` shifts some of them by a random offset, with wrap-around."""

    def __init__(self, count: int, seed: int, device):
        generator = torch.Generator().manual_seed(seed)
        self.device = torch.device(device)
        self.layout = place([random_scene(generator) for _ in range(count)], generator).to(device)

    def draw(self, batch: int, frames: int) -> Tensor:
        device = self.device
        index = torch.randint(len(self.layout.centre), (batch,), device=device)
        layout = Layout(**{field.name: getattr(self.layout, field.name)[index] for field in fields(Layout)})
        away = torch.rand(batch, 1, 2, device=device)
        layout.centre = torch.stack([layout.centre[..., 0] + away[..., 0] * WIDTH,
                                     layout.centre[..., 1] + away[..., 1] * HEIGHT], dim=-1)
        layout.phase = layout.phase + 64 * torch.rand(batch, 2, device=device)
        return render(layout, frames)


def initialize(vae: WanVAE) -> None:
    """Variance-keeping weights. A still image uses only the newest tap of each convolution, so that one is the largest."""
    for module in vae.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            taps = module.weight.shape[2] if module.weight.ndim == 5 else 1
            nn.init.normal_(module.weight, std=(taps / module.weight[0].numel()) ** 0.5)
            nn.init.zeros_(module.bias)
            if taps == 3 and module.kernel_size[1] == 3:
                module.weight.data[:, :, :2] *= 0.3
    for module in vae.modules():
        if isinstance(module, ResidualBlock):
            module.residual[-1].weight.data *= 0.3


def edges(video: Tensor) -> tuple[Tensor, Tensor]:
    return video.diff(dim=-1), video.diff(dim=-2)


class Stage:
    """One batch size and clip length. A step draws, encodes, decodes and updates without the CPU."""

    def __init__(self, vae: WanVAE, scenes: Scenes, batch: int, frames: int, edge: float):
        self.vae, self.scenes, self.batch, self.frames, self.edge = vae, scenes, batch, frames, edge
        self.device = scenes.device
        self.parameters = list(vae.parameters())
        on_gpu = self.device.type == "cuda"
        self.rate = torch.zeros((), device=self.device)
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=self.rate, betas=(0.9, 0.99), weight_decay=0.0, capturable=on_gpu, foreach=on_gpu)
        self.replay = self.step
        if on_gpu:
            try:
                self.replay = self._record()
            except RuntimeError as error:
                print(f"steps are launched one kernel at a time, because they could not be recorded: {error}", flush=True)

    def step(self) -> None:
        video = self.scenes.draw(self.batch, self.frames)
        with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False):
            latent = self.vae.posterior(video)[0].float()
            std, mean = torch.std_mean(latent, dim=(0, 2, 3, 4), keepdim=True)
            latent = (latent - mean) / (std + 1e-4)
            noise = LATENT_NOISE * torch.rand(self.batch, 1, 1, 1, 1, device=self.device)
            output = self.vae.decode(latent + noise * torch.randn_like(latent)).float()
        error = output - video
        self.error = error.detach().square().mean() / 4
        self.loss = error.abs().mean() + 2 * error.square().mean()
        if self.edge:
            self.loss = self.loss + self.edge * sum(F.l1_loss(a, b) for a, b in zip(edges(output), edges(video)))
        self.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        for parameter in self.parameters:
            parameter.grad = None

    def _record(self):
        """Warm up (at rate 0, so nothing is learned yet), then capture the step as a CUDA graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph.replay

    def train(self, name: str, minutes: float, rate: float) -> None:
        """Steps until the minutes are over. name: in the log."""
        clock, log = Clock(minutes, decay=0.7), Log(name, 250)
        while not clock.over():
            self.rate.fill_(rate * clock.schedule())
            self.replay()
            log(loss=self.loss, error=self.error)
            if log.calls % 20 == 0:
                # the clock is the CPU's, which must not run ahead of the device
                self.error.item()


def train_autoencoder(vae: WanVAE, minutes: float, device, toy: bool, resumed: bool) -> None:
    """Stills, short clips, then clips as long as the memory of the causal convolutions; a resumed network is trained only on the last."""
    if resumed:
        unfold_statistics(vae)
    else:
        initialize(vae)
    scenes = Scenes(64 if toy else 4096, 1, device)
    vae.train()
    # name, batch, frames, weight of edges, rate, share of the minutes
    stages = [("vae images", 24, 1, 0.0, 5e-3, 0.15), ("vae clips", 6, 9, EDGE_WEIGHT, 3e-3, 0.4),
              ("vae long clips", 2, 37, EDGE_WEIGHT, 2e-3, 0.45)]
    if resumed:
        stages = [(*stages[-1][:-1], 1.0)]
    for name, batch, frames, edge, rate, share in stages:
        stage = Stage(vae, scenes, min(batch, 2) if toy else batch, min(frames, 5) if toy else frames, edge)
        stage.train(name, minutes * share, rate)
    vae.eval()


@torch.no_grad()
def fold_statistics(vae: WanVAE, scenes: Scenes, rounds: int = 16, frames: int = 29) -> None:
    """Make `normalize(vae.encode(video))` zero-mean and unit-variance, and the decoder read what `encode` writes."""
    device = scenes.device
    latents = torch.cat([vae.encode(scenes.draw(4, frames)) for _ in range(rounds)])
    std, mean = torch.std_mean(latents, dim=(0, 2, 3, 4))
    wan_mean, wan_std = torch.tensor(MEAN, device=device), torch.tensor(STD, device=device)

    gain = wan_std / std
    vae.conv1.weight[:CHANNELS] *= gain.view(-1, 1, 1, 1, 1)
    vae.conv1.bias[:CHANNELS] = (vae.conv1.bias[:CHANNELS] - mean) * gain + wan_mean
    # the log variance half was never trained: set it to "certain"
    vae.conv1.weight[CHANNELS:] = 0
    vae.conv1.bias[CHANNELS:] = -10
    vae.conv2.weight /= wan_std.view(1, -1, 1, 1, 1)
    vae.conv2.bias -= vae.conv2.weight.flatten(1) @ wan_mean


@torch.no_grad()
def unfold_statistics(vae: WanVAE) -> None:
    """Make the decoder read latents of zero mean and unit variance again."""
    device = vae.conv2.weight.device
    vae.conv2.bias += vae.conv2.weight.flatten(1) @ torch.tensor(MEAN, device=device)
    vae.conv2.weight *= torch.tensor(STD, device=device).view(1, -1, 1, 1, 1)
