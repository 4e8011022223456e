"""`qvg generate` under torchrun: the processes that make one video together."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn

from ..attention.ranks import Cut, Ranks
from ..video.job import Job
from ..video.rank_work import abandon, grouped
from ..video.ranks import ENDED, RankEnded, follow, ranked
from ..video.walk_job import WalkJob
from .source import Source


@contextmanager
def processes(device: str) -> Iterator[tuple[Ranks | None, str]]:
    """The ranks and the device of this process; None and `device` unless torchrun started it. Every process has a GPU of its own."""
    if not dist.is_torchelastic_launched():
        yield None, device
        return
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        device = f"cuda:{dist.get_node_local_rank()}"
    with grouped(device) as ranks:
        if ranks.leads:
            _end_with_torchrun(on_gpu)
        yield ranks, device


def _end_with_torchrun(on_gpu: bool) -> None:
    """Have SIGTERM raise RankEnded: torchrun sends it when one of the processes has ended, and the first saves what is finished.

    Python runs a handler once its main thread comes back from what it called, and from a GPU that waits for a rank that is gone it does
    not. So another thread, which the signal reaches through a pipe, ends that wait.
    """
    signal.signal(signal.SIGTERM, _ended)
    if not on_gpu:
        return
    numbers, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    threading.Thread(target=_abandon_at, args=(numbers, signal.SIGTERM), name="qvg torchrun", daemon=True).start()


def _abandon_at(numbers: int, number: int) -> None:
    """numbers: a pipe that signals are written to. number: that of the signal."""
    while os.read(numbers, 1) != bytes([number]):
        pass
    abandon()


def _ended(*_) -> None:
    raise RankEnded(ENDED.format(reason="torchrun ends them all"))


def leave(code: int) -> int:
    """The exit status `code`, with which a process that torchrun started ends here and now.

    Threads of torch.distributed that outlive a video abort a process now and then while Python is torn down ("terminate called without an
    active exception"), and torchrun then reports a finished video as failed.
    """
    if dist.is_torchelastic_launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def check_division(ranks: Ranks, network: nn.Module, grid: tuple[int, int]) -> None:
    """Raises ValueError where the ranks do not divide the heads of a network or a latent frame of `grid` tokens (height, width)."""
    ranks.heads(network.sizes.heads)
    Cut(ranks, grid)


def follow_job(ranks: Ranks, device: str) -> int:
    """Take part in the job that the first rank gives; 0 once it is done. The first rank alone says what was wrong."""
    # Ctrl-C reaches all processes; the first one saves, for which it needs the others
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    given: tuple[Source, Job | WalkJob] | None = ranks.command()
    if given is None:
        return 0
    opened = given[0].open(device)
    model = ranked(opened.network, opened.embed, replace(given[1], device=device), ranks)
    try:
        follow(model, ranks, device)
    finally:
        for cache in model.caches:
            cache.free()
    return 0
