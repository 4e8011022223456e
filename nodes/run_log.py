"""What the cache of a patched model held, moment by moment, and how that reaches the nodes on the screen.

A `RunLog` travels with the patched MODEL as an attachment, so that the monitor node finds it after any LoRA loader, and has a `Run` for
each node that sampled with it. It keeps numbers, never tensors. While the model samples, the run writes a line of text on the node that
patched the model, and sends the moments to every monitor in the running graph that watches it (`live`), four times a second at most. Each
message lets the server's thread interrupt the sampling one, so nothing is sent twice.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

import comfy.model_management
import torch

from ..qvg.cache.forecast import Forecast
from ..qvg.cache.stats import KINDS, CacheStats
from ..qvg.report.chart import Chart
from ..qvg.settings import QVGSettings
from ..qvg.units import GIB, format_bytes
from . import live, where

ATTACHMENT = "quantvideogen"
SECONDS_BETWEEN_UPDATES = 0.25
# while a chunk is being made nothing changes but free memory
SECONDS_BETWEEN_SIGNS = 1.0
# of a long run's history a page gets as many moments as it can draw
MOMENTS_SENT = 300
# nodes that sampled with one MODEL
RUNS_KEPT = 16


class RunLog:
    """The runs of one MODEL. node_id: of the node that made it, as it was when it was executed."""

    def __init__(self, settings: QVGSettings, node_id: str | None):
        self.settings, self.node_id = settings, node_id
        self.run = Run(settings)
        self._runs: OrderedDict[str | None, Run] = OrderedDict()

    def start(self, total_frames: int, forecast: Forecast | None) -> None:
        """A run begins, wherever ComfyUI is at this moment; `run` is it from now on."""
        place = where.here()
        self.run = Run(self.settings, place, self.node_id, total_frames, forecast)
        self._runs.pop(place and place.node, None)
        self._runs[place and place.node] = self.run
        while len(self._runs) > RUNS_KEPT:
            self._runs.popitem(last=False)
        self.run.begin()

    def run_of(self, place: where.Place | None) -> Run:
        """The run whose latent the monitor at `place` waits for; the latest where none of the nodes it depends on sampled."""
        before = place and where.upstream(place.graph, place.node, through="samples")
        return next((run for node, run in reversed(self._runs.items()) if before and node in before), self.run)

    def note(self, stats: CacheStats | Callable[[], CacheStats]) -> None:
        self.run.note(stats)

    def tick(self) -> None:
        self.run.tick()

    def say(self, sentence: str) -> None:
        self.run.say(sentence)

    def end(self) -> None:
        self.run.end()

    @property
    def history(self) -> list[CacheStats]:
        return self.run.history

    @property
    def forecast(self) -> Forecast | None:
        return self.run.forecast


class Run:
    """history: `CacheStats` in order; forecast: of its bytes, made before its first step. sampling_seconds: from the end of the first pass
    to the end of the run; own_seconds: what of it went into counting, noting and sending."""

    def __init__(self, settings: QVGSettings, place: where.Place | None = None, made_by: str | None = None, total_frames: int = 0,
                 forecast: Forecast | None = None):
        self.settings, self.place, self.total_frames, self.forecast = settings, place, total_frames, forecast
        self.history: list[CacheStats] = []
        self._chart = Chart(total_frames, forecast, int(settings.budget_gib * GIB))
        self.free_bytes = 0
        self.ended = place is None
        self.sampling_seconds = self.own_seconds = 0.0
        self._began: float | None = None
        self._sent = 0
        self._last_update = 0.0
        self._written = ""
        # a page may ask for the history while it grows
        self._lock = threading.Lock()
        self.source = place and where.quantizer_of(place, made_by)
        self.watched = live.Watched()
        if place is not None:
            nodes = where.monitors_of(place.graph, self.source, place.node)
            self.watched = live.Watched(tuple(nodes), place.workflow, f"{place.prompt}/{place.node}/{time.monotonic_ns()}")

    def begin(self) -> None:
        self.ended = False
        live.keep(self)
        self.show()

    def note(self, stats: CacheStats | Callable[[], CacheStats]) -> None:
        """Take down what the cache holds now; what has to be counted first is counted here, on the log's own time."""
        with self._own_time():
            now = stats() if callable(stats) else stats
            with self._lock:
                self.history.append(now)
                self._chart.add(now)
            self._show_sometimes()

    def tick(self) -> None:
        """Something went on; show it unless something was shown a moment ago."""
        with self._own_time():
            self._show_sometimes()

    def say(self, sentence: str) -> None:
        """Show what the run waits for; with an empty sentence what it shows at other times."""
        self._write(sentence or self.text())

    def end(self) -> None:
        """The run is over, finished or not."""
        self.ended = True
        with self._own_time():
            self.show()

    @contextmanager
    def _own_time(self) -> Iterator[None]:
        began = time.perf_counter()
        if self._began is None:
            self._began = began
        yield
        now = time.perf_counter()
        self.own_seconds += now - began
        self.sampling_seconds = now - self._began

    def _show_sometimes(self) -> None:
        wait = SECONDS_BETWEEN_UPDATES if len(self.history) > self._sent else SECONDS_BETWEEN_SIGNS
        if time.monotonic() - self._last_update >= wait:
            self.show()

    def show(self) -> None:
        """Write the present state on the nodes."""
        self._last_update = time.monotonic()
        # free memory alone can end a run, so it is asked for when it is shown and not before
        self.free_bytes = int(comfy.model_management.get_free_memory())
        self._write(self.text())
        if self.watched.nodes:
            live.send(self.watched, self.state() | {"chart": self._chart.describe(self._sent, *self._available())})
        self._sent = len(self.history)

    def _write(self, text: str) -> None:
        if text != self._written:
            live.write(self.place, self.source, text)
            self._written = text

    @property
    def title(self) -> str:
        done = self.history[-1].frames if self.history else 0
        return f"KV cache, {self.settings.name.capitalize()}, {done} of {self.total_frames} latent frames"

    def text(self) -> str:
        if not self.history:
            return self.title
        now = self.history[-1]
        return (f"{self.title}\n{format_bytes(now.stored_bytes)} instead of {format_bytes(now.bf16_bytes)} in bf16 "
                f"({now.stored_ratio:.2f}x), peak {format_bytes(now.peak_bytes)} ({now.peak_ratio:.2f}x)"
                + (f"; {format_bytes(now.host_bytes)} of it wait in host memory" if now.host_bytes else ""))

    def notes(self) -> str:
        """What the picture of a run does not show as a line."""
        now, device = self.history[-1], comfy.model_management.get_torch_device()
        parts = [f"{now.held_frames} frames, {now.tokens} tokens held"]
        if self.forecast:
            parts.append(f"forecast {format_bytes(self.forecast.stored_bytes)}, peak {format_bytes(self.forecast.peak_bytes)}")
        if device.type != "cpu":
            parts.append(f"{format_bytes(self.free_bytes)} free on {device}")
        parts.append(f"{format_bytes(comfy.model_management.get_free_memory(torch.device('cpu')))} free on the host")
        return "; ".join(parts)

    def state(self) -> dict:
        """The present moment as JSON values, without the history."""
        device = comfy.model_management.get_torch_device()
        return {
            "preset": self.settings.name, "latent_frames": self.total_frames, "ended": self.ended,
            "budget_bytes": int(self.settings.budget_gib * GIB), "device": str(device), "free_bytes": self.free_bytes,
            "free_host_bytes": int(comfy.model_management.get_free_memory(torch.device("cpu"))),
            "forecast": asdict(self.forecast) if self.forecast else None,
            "now": self.history[-1].as_dict() if self.history else None}

    def report(self) -> dict:
        """The whole log as JSON values: settings, forecast, the state at the end, seconds, and bytes after each chunk."""
        with self._lock:
            history = list(self.history)
        return self.state() | {
            "now": history[-1].as_dict() if history else None, "settings": asdict(self.settings), "sampling_seconds": self.sampling_seconds,
            "monitor_seconds": self.own_seconds, "history": [point(stats) for stats in history]}

    def page(self) -> dict:
        """The state and the whole chart, as one message for a page. Of a long history the chart has a part, the newest moment in it."""
        with self._lock:
            history = self.history[::-(-(-len(self.history) // MOMENTS_SENT) or 1)][::-1]
        chart = Chart(self.total_frames, self.forecast, int(self.settings.budget_gib * GIB))
        for stats in history:
            chart.add(stats)
        now = {"now": history[-1].as_dict() if history else None}
        return self.state() | now | {"chart": chart.describe(0, *self._available())}

    def _available(self) -> tuple[int, str]:
        """The most bytes that the cache could take on the device: what it holds, and what is free besides."""
        now = self.history[-1] if self.history else None
        return self.free_bytes + (now.stored_bytes + now.workspace_bytes if now else 0), str(comfy.model_management.get_torch_device())


def point(stats: CacheStats) -> dict:
    """What a chart needs of one moment."""
    keys = ("frames", "stored_bytes", "workspace_bytes", "peak_bytes", "bf16_bytes", "host_bytes", "by_bits")
    return {key: getattr(stats, key) for key in keys} | {"codebook_bytes": stats.by_kind["codebooks"]}


def plain_stats(caches: list, total_frames: int, frames: int) -> CacheStats:
    """Core's own cache, which it allocates for the whole video at once: a list of {"k", "v", "end"} a layer."""
    by_layer = tuple(cache["k"].nbytes + cache["v"].nbytes for cache in caches)
    numbers = sum(cache["k"].numel() + cache["v"].numel() for cache in caches)
    stored = sum(by_layer)
    return CacheStats(
        frames=frames, held_frames=total_frames, tokens=caches[0]["k"].shape[1], elements=numbers, stored_bytes=stored,
        workspace_bytes=0, peak_bytes=stored, bf16_bytes=2 * numbers, by_kind=dict.fromkeys(KINDS, 0) | {"plain": stored},
        by_layer=by_layer, by_bits={8 * caches[0]["k"].element_size(): stored})
