"""One video on several devices: every rank computes a share of the tokens, and keeps the history of a share of the heads.

A rank passes its share of each latent frame (rows of it, or columns) through the network. In self-attention an all-to-all turns a share of
the tokens into a share of the heads, so that a rank attends over all tokens for its own heads, and another turns the result back (DeepSpeed
Ulysses, arXiv 2309.14509). The cache of a rank holds its heads alone, and nothing else is communicated.

    ranks = Ranks.of_group()                                # after torch.distributed.init_process_group
    cut = Cut(ranks, grid)
    attend = ShardedAttention(CachedAttention(cache, ...), ranks, cut)
    flow = cut.gather(network(cut.share(x), timestep, context, attend))

Everything else of the network acts on single tokens. The latents that a rank gives it are a share of the picture, which the network takes
for a smaller one. Any number of ranks works that divides the heads, and the rows or the columns of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """The processes that make one video. group: for tensors of the network, NCCL on GPUs. control: for commands and files, on the CPU."""

    rank: int
    size: int
    group: Any = None
    control: Any = None

    @classmethod
    def of_group(cls, timeout: timedelta | None = None) -> Ranks:
        """All processes of the default group, which must have been initialized. timeout: of waits for commands, torch's by default."""
        control = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", timeout=timeout)
        return cls(dist.get_rank(), dist.get_world_size(), None, control)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def heads(self, heads: int) -> int:
        """How many heads a rank keeps. Raises ValueError where the ranks do not divide them."""
        if heads % self.size:
            fits = [size for size in range(1, heads + 1) if heads % size == 0]
            raise ValueError(f"{self.size} ranks do not divide the {heads} heads of this model; use {', '.join(map(str, fits))}.")
        return heads // self.size

    def own(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of an axis that all ranks divide evenly."""
        return x.chunk(self.size, dim)[self.rank]

    def mean(self, x: Tensor) -> Tensor:
        """The mean over ranks, equal on all of them."""
        total = x.clone()
        dist.all_reduce(total, group=self.group)
        return total / self.size

    def least(self, value: int) -> int:
        """The least of what the ranks give, on all of them."""
        least = torch.tensor(value)
        dist.all_reduce(least, op=dist.ReduceOp.MIN, group=self.control)
        return int(least)

    def command(self, value: Any = None) -> Any:
        """What the first rank says, on all of them."""
        said = [value]
        dist.broadcast_object_list(said, src=0, group=self.control)
        return said[0]


class Cut:
    """How a latent frame of `grid` (height, width) tokens is divided: by rows, or where these do not divide, by columns.

    Raises ValueError where neither divides.
    """

    def __init__(self, ranks: Ranks, grid: tuple[int, int]):
        self.ranks, self.grid = ranks, grid
        found = next((axis for axis in range(2) if grid[axis] % ranks.size == 0), None)
        if found is None:
            raise ValueError(f"A latent frame of {grid[1]} x {grid[0]} tokens cannot be divided evenly among {ranks.size} ranks. Choose a "
                             f"width or height that is a multiple of {ranks.size} tokens, or another number of ranks.")
        self.axis = found
        # consecutive tokens of a frame that one rank has
        self.piece = math.prod(grid) // ranks.size if found == 0 else grid[1] // ranks.size

    def share(self, x: Tensor) -> Tensor:
        """Latents [B, C, F, H, W] -> this rank's part of every frame."""
        return self.ranks.own(x, 3 + self.axis).contiguous()

    def gather(self, x: Tensor) -> Tensor:
        """The inverse of `share`, on every rank."""
        parts = [torch.empty_like(x) for _ in range(self.ranks.size)]
        dist.all_gather(parts, x.contiguous(), group=self.ranks.group)
        return torch.cat(parts, dim=3 + self.axis)

    def join(self, parts: Tensor) -> Tensor:
        """Tokens of all ranks [N, ..., t, h, D], frame by frame in each, to those of whole frames [..., T, h, D]. One copy."""
        return parts.unflatten(-3, (-1, self.piece)).movedim(0, -4).flatten(-5, -3)

    def split(self, x: Tensor) -> Tensor:
        """The inverse of `join`. One copy."""
        return x.unflatten(-3, (-1, self.ranks.size, self.piece)).movedim(-4, 0).flatten(-4, -3)


class ShardedAttention:
    """A network's `attend` on one rank. attend: of this rank's heads and all tokens, such as `CachedAttention` or `WorldAttention` over a
    cache of these heads."""

    def __init__(self, attend: Callable, ranks: Ranks, cut: Cut):
        self.attend, self.ranks, self.cut = attend, ranks, cut

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, text: tuple[Tensor, Tensor] | None = None):
        """q, k and v [B, t, H, D] of this rank's tokens, and text keys and values [B, L, H, D], to [B, t, H, D], or as many as `attend`
        returns. Raises ValueError where the ranks do not divide the heads."""
        batch, heads = q.shape[0], self.ranks.heads(q.shape[2])
        # [N, 3, B * t, h * D]: of few axes, so that one kernel makes it. First by the rank that keeps the heads, then by the one that sent
        parts = torch.stack([x.reshape(-1, self.ranks.size, heads * x.shape[3]).transpose(0, 1) for x in (q, k, v)], dim=1)
        parts = self._exchange(parts).unflatten(-1, (heads, -1)).unflatten(-3, (batch, -1))
        q, k, v = self.cut.join(parts).unbind(0)
        more = {} if text is None else {"text": tuple(self.ranks.own(x, 2) for x in text)}
        out = self.attend(layer, q, k, v, **more)
        return tuple(map(self._back, out)) if isinstance(out, tuple) else self._back(out)

    def _back(self, out: Tensor) -> Tensor:
        """[B, T, h, D] of this rank's heads -> [B, t, H, D] of its tokens."""
        return self._exchange(self.cut.split(out)).movedim(0, -3).flatten(-3, -2)

    def _exchange(self, parts: Tensor) -> Tensor:
        """[N, ...]: part n goes to rank n, and comes back as what rank n sent here."""
        sent = parts.contiguous()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.ranks.group)
        return received
