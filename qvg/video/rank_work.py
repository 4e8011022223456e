"""What a process does that was started to take part in videos, and what the first rank tells it.

    meeting = Meeting(path, size)                       # a file that does not exist yet, on all ranks
    with joined(meeting, rank, device) as ranks:
        ...                                             # `Ranks` of this video, and of no other

The first rank gives a plan (`rank_plans`), and its weights where a rank does not have them: so all ranks compute with the same numbers,
whatever was loaded or patched there. Then the others `follow`. A process keeps the network until another is asked for, so the next video
begins at once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from ..attention.ranks import Ranks
from ..models import FAMILIES
from .prepare import free_bytes
from .rank_plans import NetworkPlan
from .ranks import follow, peers

# seconds that a rank waits for another one in a pass or for a command, such as while a session is written or frames are decoded
PATIENCE = 3600
# by the thread that watches the other ranks, or by that of the video
ABANDONING = threading.Lock()


@dataclass(frozen=True)
class Meeting:
    """Where the ranks of one video find each other. place: the path of a file that all ranks see, or (host, port) of the first rank."""

    place: str | tuple[str, int]
    size: int

    def store(self, leads: bool) -> dist.Store:
        if isinstance(self.place, str):
            return dist.FileStore(self.place, self.size)
        return dist.TCPStore(*self.place, self.size, is_master=leads, wait_for_workers=False)


@contextmanager
def grouped(device: str, **where) -> Iterator[Ranks]:
    """The ranks of one video inside the block, over NCCL on GPUs and over Gloo on CPUs. where: how they find each other, for
    `init_process_group`; nothing for processes that torchrun started."""
    on_gpu, patience = torch.device(device).type == "cuda", timedelta(seconds=PATIENCE)
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=patience, **where)
    try:
        yield Ranks.of_group(patience)
    except BaseException:
        if on_gpu:
            abandon()
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def joined(meeting: Meeting, rank: int, device: str, store: dist.Store | None = None):
    """As `grouped`, at a meeting. store: of it, where it is open already."""
    return grouped(device, store=store or meeting.store(rank == 0), rank=rank, world_size=meeting.size)


def abandon() -> None:
    """End what this process's GPU is waiting for, of ranks that will not come; NCCL alone would wait for its timeout."""
    with ABANDONING:
        if dist.is_initialized():
            dist.distributed_c10d._abort_process_group()


@dataclass
class Follower:
    """A rank that is not the first. It keeps the network of the last video."""

    device: str
    network: nn.Module | None = field(default=None, init=False)
    weights: str = field(default="", init=False)

    def prepare(self, weights: str) -> tuple[bool, int]:
        """Whether these weights are here, and the free bytes of the device. Other weights are dropped."""
        if weights != self.weights:
            self.network, self.weights = None, ""
        return bool(self.weights), free_bytes(self.device)

    @torch.no_grad()
    def take_part(self, meeting: Meeting, rank: int) -> None:
        """Follow the first rank through one video. Raises RankEnded where it is gone."""
        with joined(meeting, rank, self.device) as ranks:
            plan: NetworkPlan | None = ranks.command()
            if plan is None:
                return
            if ranks.command() == "weights":
                self.network, self.weights = None, ""
                self.network = receive_weights(plan, ranks, self.device)
                self.weights = plan.weights
            model = plan.model(self.network, ranks, self.device)
            try:
                follow(model, ranks, self.device)
            finally:
                for cache in model.caches:
                    cache.free()


def tell_plan(plan: NetworkPlan, network: nn.Module, ranks: Ranks, *, weights: bool) -> None:
    """By the first rank: what the others shall take part in. weights: send them those of `network`, too.

    Raises RankEnded where one is gone.
    """
    with peers():
        ranks.command(plan)
        ranks.command("weights" if weights else "")
        if weights:
            send_weights(network, ranks)


def send_weights(network: nn.Module, ranks: Ranks) -> None:
    """To the ranks that `receive_weights`."""
    state = network.state_dict()
    ranks.command({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()})
    for tensor in state.values():
        dist.broadcast(tensor.contiguous().view(-1).view(torch.uint8), src=0, group=ranks.group)


def receive_weights(plan: NetworkPlan, ranks: Ranks, device) -> nn.Module:
    """The network that the first rank sends."""
    with torch.device("meta"):
        network = FAMILIES[plan.family].network(plan.sizes)
    state = {name: torch.empty(shape, dtype=dtype, device=device) for name, (dtype, shape) in ranks.command().items()}
    for tensor in state.values():
        dist.broadcast(tensor.view(-1).view(torch.uint8), src=0, group=ranks.group)
    network.load_state_dict(state, assign=True)
    return network.requires_grad_(False).eval()
