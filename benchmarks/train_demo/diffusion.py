"""Training of the tiny causal Wan: teacher forcing, then training on its own context.

One sequence has a clip twice, clean at timestep 0 and noisy. A clean token attends to clean chunks up to its own, as in the sampler's clean
pass; a noisy token attends to the earlier clean chunks and its own noisy chunk, as in a sampling step. So one pass trains all chunks of the
clip. The target is the flow (noise minus video), and the noise levels are mostly the four at which released models are sampled.

A model trained on exact context drifts when it runs on its own output. In the second stage, part of the clean half is the model's own
output, several passes deep, while the target is still the true clip: it learns to correct its errors.

Half of the steps use chunks of 3 frames from the start, on clips that begin as text describes them; the other half have a first chunk of
one frame, as when a video continues a still image, on clips that begin anywhere.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...qvg.attention.rope import Rope, rotate
from ...qvg.demo import CHUNK_FRAMES, GRID
from ...qvg.models.wan import HEAD_DIM, CausalWan
from .clock import Clock, Log

SIGMAS = (1.0, 0.9375, 0.8333, 0.625)
SHIFT = 5.0

# normalized latents [N, 16, F, H, W] and prompts [N, L, text_dim]
Pool = tuple[Tensor, Tensor]


class TeacherForcing:
    """The `attend` of a [clean, noisy] sequence of `frames` + `frames` frames.

    What a token may see is the same for a whole chunk, so each chunk is a plain attention over the keys that it sees:
    no mask, and no work on what a mask would hide.
    """

    def __init__(self, frames: int, first_alone: bool, device):
        tokens = GRID[0] * GRID[1]
        frame = torch.arange(frames, device=device)
        self.chunk_of_frame = (frame + 2) // CHUNK_FRAMES if first_alone else frame // CHUNK_FRAMES
        sizes = torch.bincount(self.chunk_of_frame).cumsum(0).tolist()
        self.borders = [(tokens * start, tokens * stop) for start, stop in zip([0, *sizes], sizes)]
        cos, sin = Rope(HEAD_DIM, GRID).tables(0, frames, device)
        self.cos, self.sin = (table.repeat(2, 1)[:, None] for table in (cos, sin))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.see(rotate(q, self.cos, self.sin), rotate(k, self.cos, self.sin), v.to(q.dtype))

    @torch.compiler.disable
    def see(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        half = q.shape[2] // 2
        clean, noisy = [], []
        for start, stop in self.borders:
            clean.append(F.scaled_dot_product_attention(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop]))
            seen = [torch.cat([x[:, :, :start], x[:, :, half + start:half + stop]], dim=2) for x in (k, v)]
            noisy.append(F.scaled_dot_product_attention(q[:, :, half + start:half + stop], *seen))
        return torch.cat([*clean, *noisy], dim=2).transpose(1, 2)


class Trainer:
    """A network in training, its pools of clips, and its running average."""

    def __init__(self, network: CausalWan, pools: dict[str, Pool], device, fast: bool):
        self.network, self.pools, self.device = network, pools, device
        self.average = [p.detach().clone() for p in network.parameters()]
        if fast:
            for block in network.blocks:
                block.compile(dynamic=True)

    def _flow(self, clean: Tensor, noisy: Tensor, sigma: Tensor, prompt: Tensor, attend: TeacherForcing) -> Tensor:
        """Flow of the noisy half. clean, noisy [B, C, F, H, W]; sigma [B, F]."""
        timestep = torch.cat([torch.zeros_like(sigma), 1000 * sigma], dim=1)
        with torch.autocast(self.device.type, torch.bfloat16):
            flow = self.network(torch.cat([clean, noisy], dim=2), timestep, prompt, attend)
        return flow[:, :, clean.shape[2]:].float()

    def _sigmas(self, batch: int, attend: TeacherForcing) -> Tensor:
        """Noise levels [B, F], one per chunk."""
        chunks = int(attend.chunk_of_frame[-1]) + 1
        levels = torch.tensor(SIGMAS, device=self.device)
        sigma = levels[torch.randint(len(SIGMAS), (batch, chunks), device=self.device)]
        uniform = torch.rand(batch, chunks, device=self.device)
        shifted = SHIFT * uniform / (1 + (SHIFT - 1) * uniform)
        sigma = torch.where(torch.rand(batch, chunks, device=self.device) < 0.15, shifted, sigma)
        return sigma[:, attend.chunk_of_frame]

    @torch.no_grad()
    def _own_context(self, clip: Tensor, prompt: Tensor, attend: TeacherForcing, depth: int) -> Tensor:
        """The network's own version of the clip: each round predicts all chunks from those of the previous round, in two steps."""
        context = clip
        for _ in range(depth):
            sigma = self._sigmas(clip.shape[0], attend).clamp(max=1.0)
            # the first chunk can only be predicted from its own noisy version: keep it near the clip
            sigma = torch.where(attend.chunk_of_frame == 0, sigma.clamp(max=SIGMAS[2]), sigma)
            guess = clip
            for level in (sigma, sigma.clamp(max=SIGMAS[-1])):
                wide = level[:, None, :, None, None]
                noisy = (1 - wide) * guess + wide * torch.randn_like(clip)
                guess = noisy - wide * self._flow(context, noisy, level, prompt, attend)
            context = guess
        return context

    def train(self, minutes: float, batch: int, frames: int, rate: float, own_context: bool, name: str) -> None:
        clock, log = Clock(minutes), Log(name, 50)
        # what steps take turns with: clips, how many, of how many frames, and whether on the network's own context
        turns = [("text", batch, frames, own_context), ("image", batch, frames, own_context)]
        if own_context:
            # starting from text alone is the hardest to learn, so it gets half of the steps, on beginnings only
            short = self.pools["short"][0].shape[2]
            turns = [turns[0], ("short", 8 * batch, short, False), turns[1], ("short", 8 * batch, short, False)]
        layouts = {turn[0]: TeacherForcing(turn[2], turn[0] == "image", self.device) for turn in turns}
        parameters = list(self.network.parameters())
        matrices = [p for p in parameters if p.ndim > 1 and min(p.shape[:2]) > 1]
        rest = [p for p in parameters if not (p.ndim > 1 and min(p.shape[:2]) > 1)]
        optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.02}, {"params": rest, "weight_decay": 0.0}],
            lr=rate, betas=(0.9, 0.95), fused=self.device.type == "cuda")
        step = 0
        while not clock.over():
            for group in optimizer.param_groups:
                group["lr"] = rate * clock.schedule()
            kind, batch, frames, on_own = turns[step % len(turns)]
            attend = layouts[kind]
            latents, prompts = self.pools[kind]
            pick = torch.randint(len(latents), (batch,), device=self.device)
            clip, prompt = latents[pick, :, :frames].float(), prompts[pick]
            context = clip
            if on_own:
                own = self._own_context(clip, prompt, attend, depth=1 + step % 3)
                trust = torch.rand(batch, 1, 1, 1, 1, device=self.device) < 0.6
                context = torch.where(trust, own, clip)
            blur = 0.1 * torch.rand(batch, 1, 1, 1, 1, device=self.device).square()
            context = context + blur * torch.randn_like(clip)

            sigma = self._sigmas(batch, attend)
            wide, noise = sigma[:, None, :, None, None], torch.randn_like(clip)
            flow = self._flow(context, (1 - wide) * clip + wide * noise, sigma, prompt, attend)
            error = (flow - (noise - clip)).square().mean(dim=(1, 3, 4))
            loss = error.mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(self.average, parameters, max(0.005, 1 / (step + 1)))
            log(loss=loss, first=error[:, attend.chunk_of_frame == 0].mean(), last=error[:, -1].mean())
            step += 1
        with torch.no_grad():
            torch._foreach_copy_(parameters, self.average)
