"""Training of the tiny world model: which frames a noisy chunk sees, with true cameras, in both branches of attention.

A sequence is what a chunk of a walk reads and the chunk, 20 latent frames in all, clean at timestep 14. Three kinds of steps take turns.

- **growing**: the sequence has a noisy copy, chunk by chunk. A clean chunk attends to the clean ones up to itself, a noisy one to the
  earlier clean ones and itself; so one pass trains chunks that read 0, 4, 8, 12 and 16 frames, whose keys and values are of their time.
- **banked**: a whole walk has a noisy copy, and each chunk, clean or noisy, attends to the clean frames that its camera chose among all
  earlier ones, and to itself. Keys and values are of their time, too, and each chunk reads them at new positions, as a bank is read.
- **rebuilt**: the frames that are read attend to each other, all of them, and four copies of the chunk, at the four noise levels of the
  sampler, attend to them and to themselves. So the context is that of a pass of its own.

Frames take positions from 0 on in every kind. The first frame of a growing sequence and of a walk is given, as a start image is. The
target is the flow, noise minus video. In a second stage a part of the clean frames of the other two kinds is the model's own output, while
the target stays the true clip: it learns to correct its errors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ...qvg.attention.prope import BLOCK
from ...qvg.attention.rope import Rope
from ...qvg.models.worldplay_wan import WorldWan
from ...qvg.video.world import CONTEXT_TIMESTEP, DISTILLED
from ..train_demo.clock import Clock, Log
from .walks import CHUNK, SEQUENCE, Pool, Walks

SIGMAS = DISTILLED[:-1]
# positions of the chunks of growing sequences
GROWING = tuple(range(0, SEQUENCE, CHUNK))
AVERAGED = 0.005  # of the running average that a step replaces
KEEP_SECONDS = 60


@dataclass(frozen=True)
class Kind:
    """A kind of step; past: latent frames that are read. first: the share of sequences that begin where the walk does."""

    growing: bool = False
    banked: bool = False
    past: int = SEQUENCE
    first: float = 0.0

    @property
    def name(self) -> str:
        return "growing" if self.growing else "banked" if self.banked else f"rebuilt from {self.past}"

    @property
    def reads(self) -> tuple[int, ...]:
        """Places in a sequence. With 12 frames, what is left out is not the clip that was found but the oldest of the recent ones."""
        return (*range(CHUNK), *range(2 * CHUNK, SEQUENCE - CHUNK)) if self.past == 12 else tuple(range(self.past))

    @property
    def new(self) -> tuple[int, ...]:
        return tuple(range(self.past, self.past + CHUNK) if self.first == 1 else range(SEQUENCE - CHUNK, SEQUENCE))


GROW, BANK, LONG, MIDDLE = Kind(True, first=0.4), Kind(banked=True), Kind(past=16), Kind(past=12)
# in turn; with 12 and 16 frames some were found, with fewer the walk has just begun
KINDS = (BANK, LONG, GROW, MIDDLE, BANK, LONG, BANK, Kind(past=8, first=1), BANK, LONG, GROW, MIDDLE, BANK, LONG, BANK,
         Kind(past=4, first=1))


def rotated(x: Tensor, turns: Tensor) -> Tensor:
    """RoPE of neighbouring pairs; x [B, T, H, D], turns [T, 1, D / 2] complex."""
    return torch.view_as_real(torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * turns).flatten(-2)


def projected(x: Tensor, blocks: Tensor) -> Tensor:
    """Row vectors of channels times the matrix of their frame; x [B, T, H, D], blocks [B, frames, BLOCK, BLOCK]."""
    rows = x.float().reshape(*blocks.shape[:2], -1, BLOCK)
    return (rows @ blocks).view(x.shape)


def diagonal(matrices: Tensor) -> Tensor:
    """[B, frames, 4, 4] -> [B, frames, BLOCK, BLOCK], the matrix again and again on the diagonal: four channels alone are too narrow."""
    each = torch.eye(BLOCK // 4, device=matrices.device)
    return torch.einsum("ij,bfkl->bfikjl", each, matrices).flatten(4, 5).flatten(2, 3)


def positions(rope: Rope, frames: int, places: Sequence[int], device) -> Tensor:
    """[T, 1, D / 2] complex, of clean frames from position 0 on, and of noisy chunks whose first frames have positions `places`."""
    tables = [rope.tables(0, frames, device), *(rope.tables(place, CHUNK, device) for place in places)]
    return torch.cat([torch.complex(*pair) for pair in tables])[:, None]


class Attend:
    """The `attend` of one pass over `frames` clean frames and then noisy chunks. turns: see `positions`. forward, back: projections
    [B, frames + noisy frames, 4, 4] and their inverses. growing: see the module."""

    def __init__(self, grid: tuple[int, int], frames: int, turns: Tensor, forward: Tensor, back: Tensor, growing: bool):
        self.tokens, self.frames, self.growing = grid[0] * grid[1], frames, growing
        self.turns = turns
        self.queries, self.keys, self.outputs = (diagonal(matrices) for matrices in (forward, back.mT, forward.mT))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        heads = q.shape[2]
        q = torch.cat([rotated(q, self.turns), projected(q, self.queries)], dim=2).to(v.dtype)
        k = torch.cat([rotated(k, self.turns), projected(k, self.keys)], dim=2).to(v.dtype)
        v = torch.cat([v, projected(v, self.keys).to(v.dtype)], dim=2)
        out = (self.grow if self.growing else self.rebuild)(q, k, v)
        return out[:, :, :heads], projected(out[:, :, heads:], self.outputs).to(v.dtype)

    def grow(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, size = len(q), CHUNK * self.tokens
        # [2, B, H, T, D]: clean and noisy
        q, k, v = (x.unflatten(1, (2, -1)).permute(1, 0, 3, 2, 4) for x in (q, k, v))
        outs = []
        for start in range(0, q.shape[3], size):
            seen = [torch.cat([x[:1, :, :, :start].expand(2, -1, -1, -1, -1), x[:, :, :, start:start + size]], dim=3).flatten(0, 1)
                    for x in (k, v)]
            outs.append(F.scaled_dot_product_attention(q[:, :, :, start:start + size].flatten(0, 1), *seen))
        # [2 B, H, T, D] -> [B, 2 T, H, D]
        return torch.cat(outs, dim=2).unflatten(0, (2, batch)).permute(1, 0, 3, 2, 4).flatten(1, 2)

    def rebuild(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        past, size = self.frames * self.tokens, CHUNK * self.tokens
        copies = (q.shape[2] - past) // size
        clean = F.scaled_dot_product_attention(*(x[:, :, :past] for x in (q, k, v)))
        # [B, copies, H, T, D]
        own = [x[:, :, past:].unflatten(2, (copies, size)).transpose(1, 2) for x in (q, k, v)]
        seen = [torch.cat([x[:, None, :, :past].expand(-1, copies, -1, -1, -1), mine], dim=3).flatten(0, 1)
                for x, mine in zip((k, v), own[1:])]
        noisy = F.scaled_dot_product_attention(own[0].flatten(0, 1), *seen).unflatten(0, (-1, copies))
        return torch.cat([clean, noisy.transpose(1, 2).flatten(2, 3)], dim=2).transpose(1, 2)


class AttendBank:
    """The `attend` of a pass over a walk of F frames, clean and then noisy. reads: for each chunk, the clean frames that it reads [B, R].
    turns: of the positions of all that a chunk sees. forward, back: [B, F, 4, 4]."""

    def __init__(self, grid: tuple[int, int], reads: list[Tensor], turns: Tensor, forward: Tensor, back: Tensor):
        self.tokens, self.reads, self.turns = grid[0] * grid[1], reads, turns
        twice = (matrices.repeat(1, 2, 1, 1) for matrices in (forward, back.mT, forward.mT))
        self.queries, self.keys, self.outputs = map(diagonal, twice)
        self.rows = torch.arange(len(forward), device=forward.device)[:, None]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        heads, outs = q.shape[2], []
        far_q, far_k, far_v = projected(q, self.queries), projected(k, self.keys), projected(v, self.keys)
        for number, reads in enumerate(self.reads):
            past = reads.shape[1] * self.tokens
            turns = self.turns[:past + CHUNK * self.tokens]
            query = torch.cat([rotated(self.of_chunk(q, number), turns[past:]), self.of_chunk(far_q, number)], dim=2)
            key = torch.cat([rotated(self.seen(k, number), turns), self.seen(far_k, number)], dim=2)
            value = torch.cat([self.seen(v, number), self.seen(far_v, number).to(v.dtype)], dim=2)
            pair = (x.to(v.dtype).transpose(1, 2) for x in (query, key, value))
            outs.append(F.scaled_dot_product_attention(*pair).transpose(1, 2).unflatten(0, (-1, 2)))
        out = torch.cat(outs, dim=2).flatten(1, 2)
        return out[:, :, :heads], projected(out[:, :, heads:], self.outputs).to(v.dtype)

    def frames(self, x: Tensor) -> Tensor:
        """[B, 2 F N, H, D] -> [B, 2, F, N, H, D]"""
        return x.unflatten(1, (2, -1, self.tokens))

    def of_chunk(self, x: Tensor, number: int) -> Tensor:
        """[2 B, T, H, D] of the chunk itself, clean and noisy."""
        return self.frames(x)[:, :, CHUNK * number:CHUNK * (number + 1)].flatten(2, 3).flatten(0, 1)

    def seen(self, x: Tensor, number: int) -> Tensor:
        """[2 B, T, H, D] of the clean frames that the chunk reads, and of itself."""
        read = self.frames(x)[:, 0][self.rows, self.reads[number]].flatten(1, 2)
        return torch.cat([read.repeat_interleave(2, dim=0), self.of_chunk(x, number)], dim=1)


def initialize(network: WorldWan) -> None:
    """Gates half open, so that all layers learn from the first step."""
    for block in network.blocks:
        with torch.no_grad():
            block.modulation[:, [2, 5]] = 0.5


class Trainer:
    """A network in training, its pool of walks, and its running average. On a GPU each kind of step is recorded once and replayed: a step
    is a few thousand small kernels, and compiling them for shapes that differ takes longer than the training."""

    def __init__(self, network: WorldWan, prompt: Tensor, grid: tuple[int, int], pool: Pool, walks: Walks, device):
        self.network, self.prompt, self.pool, self.device = network, prompt, pool, torch.device(device)
        self.walks, self.grid, rope = walks.to(device), grid, Rope(network.sizes.head_dim, grid)
        # kept on the device, because what is copied to it cannot be recorded
        self.positions = cache(lambda frames, places: positions(rope, frames, places, self.device))
        self.order = cache(lambda frames: torch.tensor(frames, dtype=torch.long, device=self.device))
        self.sigmas = torch.tensor(SIGMAS, device=self.device)
        self.parameters = list(network.parameters())
        self.average = [p.detach().clone() for p in self.parameters]
        self.step = 0

    def draw(self, batch: int, first: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Clips [B, C, SEQUENCE, h, w], projections and their inverses [B, SEQUENCE, 4, 4] and actions [B, SEQUENCE]. first: the share of
        clips that begin where the walk does."""
        pick = torch.randint(len(self.pool.latents), (batch,), device=self.device)
        walk = self.pool.walk[pick]
        chunk = torch.randint(self.walks.chosen.shape[1], (batch,), device=self.device)
        # the first of them has read all that there is
        chunk = chunk * (torch.rand(batch, device=self.device) >= first)
        frames = self.walks.chosen[walk, chunk]
        clip = self.pool.latents[pick[:, None], :, frames].transpose(1, 2).float()
        row = walk[:, None]
        return clip, self.walks.forward[row, frames], self.walks.back[row, frames], self.walks.actions[row, frames]

    def whole(self, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
        """Whole walks, as `draw` returns clips, and the frames [B, R] that each of their chunks reads."""
        pick = torch.randint(len(self.pool.latents), (batch,), device=self.device)
        walk = self.pool.walk[pick]
        early = [self.order(tuple(range(start))).expand(batch, -1) for start in GROWING[:-1]]
        found = self.walks.chosen[walk][:, :, :SEQUENCE - CHUNK].unbind(1)
        return (self.pool.latents[pick].float(), self.walks.forward[walk], self.walks.back[walk], self.walks.actions[walk],
                [*early, *found])

    def flow(self, clean: Tensor, noisy: Tensor, sigma: Tensor, attend: Attend | AttendBank, actions: Tensor) -> Tensor:
        """Flow of the noisy frames. clean [B, C, F, h, w], noisy [B, C, N, h, w]; sigma [B, N]; actions [B, F + N]."""
        timestep = torch.cat([torch.full_like(sigma[:, :1], CONTEXT_TIMESTEP).expand(-1, clean.shape[2]),
                              1000 * sigma + CONTEXT_TIMESTEP * (sigma == 0)], dim=1)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda", cache_enabled=False):
            flow = self.network(torch.cat([clean, noisy], dim=2), timestep, self.prompt.expand(len(clean), -1, -1), attend, action=actions)
        return flow[:, :, clean.shape[2]:].float()

    def attend(self, frames: int, places: tuple[int, ...], forward: Tensor, back: Tensor, growing: bool) -> Attend:
        return Attend(self.grid, frames, self.positions(frames, places), forward, back, growing)

    def bank(self, reads: list[Tensor], forward: Tensor, back: Tensor) -> AttendBank:
        return AttendBank(self.grid, reads, self.positions(SEQUENCE, ()), forward, back)

    def levels(self, batch: int, frames: int = SEQUENCE) -> Tensor:
        """Noise levels [B, frames], one for each chunk."""
        drawn = torch.randint(len(SIGMAS), (batch, frames // CHUNK, 1), device=self.device)
        return self.sigmas[drawn].expand(-1, -1, CHUNK).flatten(1)

    @torch.no_grad()
    def own(self, clip: Tensor, forward: Tensor, back: Tensor, actions: Tensor) -> Tensor:
        """The network's own version of a clip, of which it predicts all chunks from the true ones."""
        attend = self.attend(SEQUENCE, GROWING, forward.repeat(1, 2, 1, 1), back.repeat(1, 2, 1, 1), True)
        # what was not seen before can only be predicted from its own noisy version; the first chunk stays
        sigma = self.levels(len(clip)).clamp(max=SIGMAS[2])
        sigma[:, :CHUNK] = 0
        wide = sigma[:, None, :, None, None]
        noisy = (1 - wide) * clip + wide * torch.randn_like(clip)
        return noisy - wide * self.flow(clip, noisy, sigma, attend, actions.repeat(1, 2))

    def loss(self, kind: Kind, batch: int, own: bool) -> dict[str, Tensor]:
        """The loss to reduce, that of the last chunk, and that of chunks of noise alone."""
        growing, past = kind.growing, kind.past
        if kind.banked:
            # a walk is as long as two sequences
            clip, forward, back, actions, reads = self.whole(max(1, batch // 2))
            batch = len(clip)
        else:
            clip, forward, back, actions = self.draw(batch, kind.first)
        context = clip
        if own and not kind.banked:
            made = self.own(clip, forward, back, actions)
            context = torch.where(torch.rand(batch, 1, 1, 1, 1, device=self.device) < 0.7, made, clip)
        blur = 0.1 * torch.rand(batch, 1, 1, 1, 1, device=self.device).square()
        context = context + blur * torch.randn_like(clip)
        if kind.banked:
            clean, target, order = context, clip, self.order(tuple(range(clip.shape[2])) * 2)
            sigma, attend = self.levels(batch, clip.shape[2]), self.bank(reads, forward, back)
            sigma[:, 0] = 0
        elif growing:
            clean, target, order = context, clip, self.order(tuple(range(SEQUENCE)) * 2)
            sigma, places = self.levels(batch), GROWING
            sigma[:, 0] = 0
        else:
            order = self.order(kind.reads + kind.new * len(SIGMAS))
            clean, target = context[:, :, order[:past]], clip[:, :, order[past:]]
            sigma = self.sigmas[:, None].expand(-1, CHUNK).flatten().expand(batch, -1)
            places = (past,) * len(SIGMAS)
        if not kind.banked:
            attend = self.attend(clean.shape[2], places, forward[:, order], back[:, order], growing)
        wide, noise = sigma[:, None, :, None, None], torch.randn_like(target)
        flow = self.flow(clean, (1 - wide) * target + wide * noise, sigma, attend, actions[:, order])
        error = (flow - (noise - target)).square().mean(dim=(1, 3, 4))
        noisy, most = sigma > 0, sigma == 1
        loss, hardest = ((error * part).sum() / part.sum() for part in (noisy, most))
        return {"loss": loss, "last": error[:, -CHUNK:].mean(), "most noise": hardest}

    def averaged(self) -> dict[str, Tensor]:
        """The network's weights as they are averaged over steps."""
        return {name: value for (name, _), value in zip(self.network.named_parameters(), self.average)}

    def train(self, minutes: float, batch: int, rate: float, own: bool, name: str, keep: Callable[[dict[str, Tensor]], None] | None = None,
              every: int = 200) -> None:
        """keep: called every minute with the averaged weights, because a machine may be taken away."""
        on_gpu = self.device.type == "cuda"
        matrices = [p for p in self.parameters if p.ndim > 1 and min(p.shape[:2]) > 1]
        rest = [p for p in self.parameters if not (p.ndim > 1 and min(p.shape[:2]) > 1)]
        speed = torch.zeros((), device=self.device)
        optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.02}, {"params": rest, "weight_decay": 0.0}],
            lr=speed, betas=(0.9, 0.95), capturable=on_gpu, foreach=on_gpu)

        def update(kind: Kind) -> dict[str, Tensor]:
            losses = self.loss(kind, batch, own)
            losses["loss"].backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            optimizer.step()
            for parameter in self.parameters:
                parameter.grad = None
            with torch.no_grad():
                torch._foreach_lerp_(self.average, self.parameters, AVERAGED)
            return {key: value.detach() for key, value in losses.items()}

        # one memory for all records, of which only one runs at a time
        memory = torch.cuda.graph_pool_handle() if on_gpu else None
        steps = {kind: recorded(update, kind, memory) if on_gpu else partial(update, kind) for kind in dict.fromkeys(KINDS)}
        logs = {kind: Log(f"{name} {kind.name}", every) for kind in steps}
        clock, kept = Clock(minutes), time.monotonic()
        while not clock.over():
            speed.fill_(rate * clock.schedule())
            kind = KINDS[self.step % len(KINDS)]
            losses = steps[kind]()
            logs[kind](**losses)
            self.step += 1
            if self.step % 20 == 0:
                # the clock is the CPU's, which must not run ahead of the device
                losses["loss"].item()
                if keep and time.monotonic() > kept + KEEP_SECONDS:
                    kept = time.monotonic()
                    keep(self.averaged())
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.average)


def recorded(update: Callable[[Kind], dict[str, Tensor]], kind: Kind, memory) -> Callable[[], dict[str, Tensor]]:
    """Warm up, at a rate of 0, so that nothing is learned yet; then record the step as a CUDA graph, and return what replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            update(kind)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=memory):
            losses = update(kind)
    except RuntimeError as error:
        print(f"{kind.name}: kernels are launched one at a time, because they could not be recorded: {error}", flush=True)
        return partial(update, kind)

    def replay() -> dict[str, Tensor]:
        graph.replay()
        return losses

    return replay
