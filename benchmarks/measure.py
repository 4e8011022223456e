"""Timing of the benchmarks, and what all of them use to report."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch

from ..qvg.cache import codebook_lifetime
from ..qvg.commands.results import add_out, add_places, claim, write
from ..qvg.report.environment import environment
from ..qvg.report.table import table

__all__ = ["add_out", "add_places", "claim", "command_line", "copy_bandwidth", "environment", "kernel_microseconds", "largest_misfit",
           "microseconds", "progress", "table", "write"]

FLUSH_BYTES = 256 << 20
# long enough for the host to queue the timed work, so that the device never waits for it
AHEAD_CYCLES = 1_500_000


@cache
def _flush(device: torch.device) -> torch.Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)


def microseconds(function: Callable, device: torch.device, repeats: int = 20, cold: bool = True, ahead: bool = True) -> float:
    """Median time of a call on the device. cold: the L2 cache is filled with something else first. ahead: the host queues the call
    while the device is still busy; without it, the host's own time counts where it is the longer one."""
    if device.type != "cuda":
        function()
        times = []
        for _ in range(min(repeats, 3)):
            start = time.perf_counter()
            function()
            times.append(1e6 * (time.perf_counter() - start))
        return statistics.median(times)
    for _ in range(3):
        function()
    pairs = []
    for _ in range(repeats):
        if cold:
            _flush(device).zero_()
        if ahead:
            torch.cuda._sleep(AHEAD_CYCLES)
        else:
            torch.cuda.synchronize(device)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize(device)
    return statistics.median(1e3 * start.elapsed_time(end) for start, end in pairs)


def kernel_microseconds(function: Callable) -> float:
    """Sum of the times of one call's kernels on a CUDA device, without the gaps in which a call of many launches waits for the host."""
    function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages())


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Bytes per second, read and written, of a copy in device memory."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / (1e-6 * microseconds(lambda: target.copy_(source), device, cold=False))


def command_line(name: str, arguments: Sequence[str]) -> str:
    return " ".join(["qvg bench", name, *arguments])


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def largest_misfit(value: float) -> Iterator[None]:
    """Inside, a codebook is used until its residuals exceed this multiple of those of its training; see `qvg.cache.codebook_lifetime`."""
    before, codebook_lifetime.LARGEST_MISFIT = codebook_lifetime.LARGEST_MISFIT, value
    try:
        yield
    finally:
        codebook_lifetime.LARGEST_MISFIT = before
