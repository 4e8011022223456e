"""One video by several processes: the first samples, the others follow it.

    model = RankedNetwork(network, [Condition(prompt, cache)], ranks)       # on every rank, with the cache of its heads (`rank_cache`)
    if ranks.leads:
        with Leader(model, ranks) as leader:
            for event in Sampler(leader, run, shape): ...
    else:
        follow(model, ranks)

Sampler, sessions, streaming and decoding are the first rank's. It tells the others what to do (`Ranks.command`), and they do the same with
their share. All decisions of a cache follow from bytes that are counted alike on every rank and from how well codebooks fit, which is the
mean over ranks, so no rank ever decides otherwise than the others.

A session has the heads of all ranks (`rank_sessions`), so any number of ranks can continue it.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..attention.cached import CachedAttention
from ..attention.ranks import Cut, Ranks, ShardedAttention
from ..cache.geometry import usual_limit
from ..cache.kv_cache import KVCache
from ..settings import QVGSettings
from . import rank_sessions
from .cameras import CameraPath
from .network import CachedNetwork, Condition
from .prepare import cache_of, model_of, segments_of
from .run import Run
from .segment_model import SegmentModel
from .walk_job import WalkInputs, WalkJob
from .walk_model import walk_of
from .world import WorldCondition, WorldModel

if TYPE_CHECKING:
    from .job import Job

ENDED = ("Another rank of this video ended ({reason}). Finished chunks are in the file and in the session, from which the video can be "
         "continued; start all ranks again.")


class RankEnded(RuntimeError):
    """Another rank ended in the middle of a video."""


@contextmanager
def peers():
    """Inside, the errors that torch.distributed raises when another rank is gone become a RankEnded with a sentence."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if isinstance(error, RankEnded) or not _of_a_connection(error):
            raise
        raise RankEnded(ENDED.format(reason=str(error).strip().splitlines()[0][:120])) from error


@contextmanager
def uninterrupted():
    """Inside, Ctrl-C waits for the end of the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting, before = [], signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, lambda *what: waiting.append(what))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if waiting:
        raise KeyboardInterrupt


def _of_a_connection(error: RuntimeError) -> bool:
    text = str(error)
    return isinstance(error, dist.DistError) or any(word in text for word in ("Connection", "gloo", "NCCL", "Timed out", "peer"))


def rank_options(network: nn.Module, ranks: Ranks, device) -> dict:
    """What makes a cache that of one rank, called by all ranks at once: the heads that it keeps, and what all decide alike, also where
    their GPUs differ. Raises ValueError where the ranks do not divide the heads, and RankEnded where one is gone."""
    heads = ranks.heads(network.sizes.heads)
    with peers():
        limit = ranks.least(usual_limit(torch.device(device).type))
    return {"heads": heads, "agree": ranks.mean, "workspace_limit": limit}


def rank_cache(network: nn.Module, settings: QVGSettings, run: Run, grid: tuple[int, int], ranks: Ranks, *, device="cpu", **options
               ) -> KVCache:
    """As `prepare.cache_of`, for one rank, see `rank_options`; a memory budget is of each device."""
    return cache_of(network, settings, run, grid, device=device, **rank_options(network, ranks, device), **options)


class RankedNetwork(CachedNetwork):
    """A `CachedNetwork` on one rank. Its caches hold the rank's heads; latents in and out are those of whole frames."""

    def __init__(self, network: nn.Module, conditions: Sequence[Condition], ranks: Ranks, **options):
        super().__init__(network, conditions, **options)
        self.ranks = ranks
        self.cut = Cut(ranks, self.caches[0].geometry.grid)

    def _attend(self, cache: KVCache, **options) -> ShardedAttention:
        return ShardedAttention(CachedAttention(cache, **options), self.ranks, self.cut)

    def denoise(self, x: Tensor, sigma: float, first: int, *, prompt_frame: int, store: bool) -> Tensor:
        """See `Model`; called on every rank with the same arguments."""
        with peers():
            return self.cut.gather(super().denoise(self.cut.share(x), sigma, first, prompt_frame=prompt_frame, store=store))

    def shrink(self) -> None:
        """Nothing is given up: a rank that ran out of memory in the middle of a pass has left the others waiting."""


class RankedWorld(WorldModel):
    """A `WorldModel` on one rank. Its scenes have this rank's share of the start image (`Cut.share`), and its caches this rank's heads;
    `latents` are of whole frames."""

    def __init__(self, conditions: Sequence[WorldCondition], path: CameraPath, ranks: Ranks, **options):
        super().__init__(conditions, path, **options)
        self.ranks = ranks
        self.cut = Cut(ranks, self.caches[0].geometry.grid)

    def _attend(self, *arguments, **options) -> ShardedAttention:
        return ShardedAttention(super()._attend(*arguments, **options), self.ranks, self.cut)

    def _finished(self, frames: Sequence[int]) -> Tensor:
        return self.cut.share(super()._finished(frames))

    def _whole(self, clean: Tensor) -> Tensor:
        return self.cut.gather(clean)

    def denoise(self, x: Tensor, sigma: float, first: int, *, prompt_frame: int, store: bool) -> Tensor:
        """See `Model`; called on every rank with the same arguments."""
        with peers():
            return self.cut.gather(super().denoise(self.cut.share(x), sigma, first, prompt_frame=prompt_frame, store=store))

    def shrink(self) -> None:
        """See `RankedNetwork.shrink`."""


class RankedSegments(SegmentModel):
    """A `SegmentModel` on one rank, whose cache holds the rank's heads. Latents in and out are those of whole frames, and so are those
    that are kept."""

    def __init__(self, network: nn.Module, prompt, cache: KVCache, ranks: Ranks, **options):
        super().__init__(network, prompt, cache, **options)
        self.ranks = ranks
        self.cut = Cut(ranks, cache.geometry.grid)

    def _sharded(self, attend) -> ShardedAttention:
        return ShardedAttention(attend, self.ranks, self.cut)

    def _share(self, x: Tensor) -> Tensor:
        return self.cut.share(x)

    def _whole(self, x: Tensor) -> Tensor:
        return self.cut.gather(x)

    def denoise(self, x: Tensor, sigma: float, first: int, *, prompt_frame: int, store: bool) -> Tensor:
        """See `Model`; called on every rank with the same arguments."""
        with peers():
            return super().denoise(x, sigma, first, prompt_frame=prompt_frame, store=store)

    def shrink(self) -> None:
        """See `RankedNetwork.shrink`."""


class Leader:
    """The first rank's `Model`: what is asked of it is asked of all ranks, what it knows is its own. As a context manager, it lets the
    others end.

    A pass is never broken off by Ctrl-C, which is raised after it: the others would wait for the rest of it.
    """

    def __init__(self, model: RankedNetwork | RankedWorld | RankedSegments, ranks: Ranks):
        self.model, self.ranks = model, ranks
        self._within = False  # a pass, in which the others expect no command

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    @property
    def lost(self) -> bool:
        """Whether a pass was broken off, after which the others can be told nothing."""
        return self._within

    def __enter__(self) -> Leader:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if not self._within and not isinstance(error, RankEnded):
            self.tell("end")

    def tell(self, name: str, *arguments: Any) -> None:
        """Have the others do something; see `follow`. Raises RankEnded where they cannot hear it."""
        if self._within:
            raise RankEnded(ENDED.format(reason="a pass was broken off"))
        with peers():
            self.ranks.command((name, arguments))

    def denoise(self, x: Tensor, sigma: float, first: int, *, prompt_frame: int, store: bool) -> Tensor:
        self.tell("denoise", tuple(x.shape), sigma, first, prompt_frame, store)
        x, self._within = x.contiguous(), True
        with uninterrupted():
            with peers():
                dist.broadcast(x, src=0, group=self.ranks.group)
            found = self.model.denoise(x, sigma, first, prompt_frame=prompt_frame, store=store)
            self._within = False
        return found

    def rewind(self, first: int) -> None:
        self.tell("rewind", first)
        self.model.rewind(first)

    def remember(self, latents: list[Tensor]) -> None:
        """Have all ranks begin with finished latents, on the CPU; of segments and of walks."""
        self.tell("remember", [tuple(part.shape) for part in latents])
        with peers():
            self.model.remember(rank_sessions.remembered([], latents, self.ranks))

    def shrink(self) -> None:
        """See `RankedNetwork.shrink`."""


def ranked(network: nn.Module, embed: Callable[[str], Tensor] | WalkInputs, job: Job | WalkJob, ranks: Ranks
           ) -> RankedNetwork | RankedSegments | RankedWorld:
    """This rank's model of a job; arguments and errors as for `prepare.prepare`."""
    options = rank_options(network, ranks, job.device)
    if isinstance(job, WalkJob):
        return walk_of(network, embed, job, make=partial(RankedWorld, ranks=ranks), share=Cut(ranks, job.grid).share, **options)
    of, make = (segments_of, RankedSegments) if job.given else (model_of, RankedNetwork)
    return of(network, embed, job, make=partial(make, ranks=ranks), **options)


def follow(model: RankedNetwork | RankedWorld | RankedSegments, ranks: Ranks, device) -> None:
    """Do what the first rank says until it ends. Raises RankEnded when it is gone."""
    while True:
        with peers():
            name, arguments = ranks.command()
        if name == "end":
            return
        if name == "denoise":
            shape, sigma, first, prompt_frame, store = arguments
            x = torch.empty(shape, dtype=torch.float32, device=device)
            with peers():
                dist.broadcast(x, src=0, group=ranks.group)
            model.denoise(x, sigma, first, prompt_frame=prompt_frame, store=store)
        elif name == "rewind":
            model.rewind(*arguments)
        elif name == "remember":
            with peers():
                model.remember(rank_sessions.remembered(*arguments, None, ranks))
        else:
            with peers():
                {"save": rank_sessions.take_part, "restore": rank_sessions.receive}[name](*arguments, model.caches, ranks)
