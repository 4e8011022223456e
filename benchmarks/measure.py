"""Timing, environment and output of the benchmarks."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import cache
from pathlib import Path

import torch

from ..qvg.cache import codebook_lifetime
from ..qvg.commands import arguments
from ..qvg.commands.results import prepare_folder
from ..qvg.files import write_atomically

FLUSH_BYTES = 256 << 20
# long enough for the host to queue the timed work, so that the device never waits for it
AHEAD_CYCLES = 1_500_000


def environment(device: torch.device, command: str) -> dict:
    """Hardware, versions, command and date, which belong to every figure."""
    try:
        from triton import __version__ as triton_version
    except ImportError:
        triton_version = "absent"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.processor() or platform.machine()} (CPU)"
    return {"device": name, "torch": torch.__version__, "triton": triton_version, "python": platform.python_version(),
            "command": command, "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")}


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


def table(columns: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A markdown table; floats get three figures."""
    def text(value) -> str:
        if isinstance(value, float):
            return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
        return "" if value is None else str(value)

    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(map(text, row)) + " |" for row in rows])


def add_places(parser: argparse.ArgumentParser) -> None:
    """--out, --overwrite and --device."""
    add_out(parser)
    parser.add_argument("--device", type=arguments.device, default="cuda" if torch.cuda.is_available() else "cpu")


def add_out(parser: argparse.ArgumentParser) -> None:
    """--out and --overwrite."""
    parser.add_argument("--out", type=Path, default=Path("qvg-bench"))
    parser.add_argument("--overwrite", action="store_true", help="replace the results of an earlier run in that folder")


def claim(options: argparse.Namespace, name: str) -> None:
    """Raises ValueError, before anything is measured, where the results could not be written or would replace others."""
    prepare_folder(options.out, (f"{name}.json", f"{name}.md"), options.overwrite)


def write(out: Path, name: str, result: dict, markdown: str, show: bool = True) -> None:
    """NAME.json and NAME.md under `out`. show: print the markdown, too."""
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / f"{name}.json", lambda part: part.write_text(json.dumps(result, indent=1) + "\n"))
    place = result["environment"]
    head = ", ".join(f"{key} {place[key]}" for key in ("device", "torch", "triton", "python", "date"))
    text = f"## qvg bench {name}\n\n{head}\n\n    {place['command']}\n\n{markdown}\n"
    write_atomically(out / f"{name}.md", lambda part: part.write_text(text))
    if show:
        print(text, flush=True)


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
