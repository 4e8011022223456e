"""The history of a sampling run's cache, and how it reaches the nodes on the page.

A `RunLog` is attached to the patched MODEL, so that the monitor node finds it behind any LoRA loader. It has a `Run` for each node that
sampled with the MODEL, and holds figures, never tensors. While the model samples, the run writes text on the node that patched the model,
and sends what is new to every monitor of the graph that watches it (`live`), at most four times per second. Sending lets the server's
thread interrupt sampling, so nothing is sent twice.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
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
# between chunks only free memory changes
SECONDS_BETWEEN_SIGNS = 1.0
# a page gets no more moments of a long run than it can draw
MOMENTS_SENT = 300
# per MODEL: one for each node that sampled with it
RUNS_KEPT = 16


class RunLog:
    """The runs of one MODEL. node_id: the id that the node that made it had when it was executed."""

    def __init__(self, settings: QVGSettings, node_id: str | None):
        self.settings, self.node_id = settings, node_id
        self.run = Run(settings)
        self._runs: OrderedDict[str | None, Run] = OrderedDict()

    def start(self, total_frames: int, forecast: Forecast | None) -> None:
        """Start a run at the node that ComfyUI is executing; it becomes `run`."""
        place = where.here()
        self.run = Run(self.settings, place, self.node_id, total_frames, forecast)
        self._runs.pop(place and place.node, None)
        self._runs[place and place.node] = self.run
        while len(self._runs) > RUNS_KEPT:
            self._runs.popitem(last=False)
        self.run.begin()

    def run_of(self, place: where.Place | None) -> Run:
        """The run whose latent the monitor at `place` waits for; the latest run if none of the nodes that it depends on has sampled."""
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
    """One sampling run. history: its `CacheStats` in order. forecast: of its bytes, made before the first step. sampling_seconds: from the
    end of the first pass to the end of the run. own_seconds: the part of it spent on counting, recording and sending."""

    def __init__(self, settings: QVGSettings, place: where.Place | None = None, made_by: str | None = None, total_frames: int = 0,
                 forecast: Forecast | None = None):
        self.settings, self.place, self.total_frames, self.forecast = settings, place, total_frames, forecast
        self.history: list[CacheStats] = []
        self._chart = self._new_chart()
        self.free_bytes = 0
        self.ended = place is None
        self.sampling_seconds = self.own_seconds = 0.0
        self._began: float | None = None
        self._sent = 0
        self._last_update = 0.0
        self._written = ""
        # the server's thread may read the history while it grows
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
        """Record what the cache holds. A callable is called here, so that counting is part of `own_seconds`."""
        with self._own_time():
            now = stats() if callable(stats) else stats
            with self._lock:
                self.history.append(now)
                self._chart.add(now)
            self._show_sometimes()

    def tick(self) -> None:
        """Update the page, unless it was updated a moment ago."""
        with self._own_time():
            self._show_sometimes()

    def say(self, sentence: str) -> None:
        """Show a sentence, such as what the run waits for; an empty one restores the usual text."""
        self._write(sentence or self.text())

    def end(self) -> None:
        """The run has ended, finished or not."""
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
        """Send the current state to the nodes."""
        self._last_update = time.monotonic()
        # read only when it is shown, because it takes time
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
                + (f"; {format_bytes(now.host_bytes)} of it in host memory" if now.host_bytes else ""))

    def notes(self) -> str:
        """A line of figures that the chart does not show."""
        now, device = self.history[-1], comfy.model_management.get_torch_device()
        parts = [f"{now.held_frames} frames, {now.tokens} tokens held"]
        if now.attention:
            # the reason is in the report, and on the node
            parts.append(f"attention {now.attention.partition(' ')[0]}")
        if self.forecast:
            parts.append(f"forecast {format_bytes(self.forecast.stored_bytes)}, peak {format_bytes(self.forecast.peak_bytes)}")
        if device.type != "cpu":
            parts.append(f"{format_bytes(self.free_bytes)} free on {device}")
        parts.append(f"{format_bytes(comfy.model_management.get_free_memory(torch.device('cpu')))} free on the host")
        return "; ".join(parts)

    def state(self) -> dict:
        """The current state as JSON values, without the history."""
        device = comfy.model_management.get_torch_device()
        return {
            "preset": self.settings.name, "latent_frames": self.total_frames, "ended": self.ended,
            "budget_bytes": int(self.settings.budget_gib * GIB), "device": str(device), "free_bytes": self.free_bytes,
            "free_host_bytes": int(comfy.model_management.get_free_memory(torch.device("cpu"))),
            "forecast": asdict(self.forecast) if self.forecast else None,
            "now": self.history[-1].as_dict() if self.history else None}

    def report(self) -> dict:
        """The whole run as JSON values: settings, forecast, current state, seconds, and bytes after each chunk."""
        with self._lock:
            history = list(self.history)
        return self.state() | {
            "now": history[-1].as_dict() if history else None, "settings": asdict(self.settings), "sampling_seconds": self.sampling_seconds,
            "monitor_seconds": self.own_seconds, "history": [point(stats) for stats in history]}

    def page(self) -> dict:
        """The state and the whole chart, as one message for a page. The history of a long run is thinned; the newest moment stays."""
        with self._lock:
            history = self.history[::-(-(-len(self.history) // MOMENTS_SENT) or 1)][::-1]
        chart = self._new_chart(history)
        now = {"now": history[-1].as_dict() if history else None}
        return self.state() | now | {"chart": chart.describe(0, *self._available())}

    def _new_chart(self, history: Sequence[CacheStats] = ()) -> Chart:
        return Chart(self.total_frames, self.forecast, int(self.settings.budget_gib * GIB), history)

    def _available(self) -> tuple[int, str]:
        """The bytes that the cache could take on the device (what it holds there and what is free), and the device's name."""
        # a run that has ended has freed its cache
        now = self.history[-1] if self.history and not self.ended else None
        held = now.stored_bytes - now.host_bytes + now.workspace_bytes if now else 0
        return self.free_bytes + held, str(comfy.model_management.get_torch_device())


def point(stats: CacheStats) -> dict:
    """The bytes at one moment, for the report."""
    keys = ("frames", "stored_bytes", "workspace_bytes", "peak_bytes", "bf16_bytes", "host_bytes", "by_bits")
    return {key: getattr(stats, key) for key in keys} | {"codebook_bytes": stats.by_kind.get("codebooks", 0)}


def plain_stats(caches: list, total_frames: int, frames: int) -> CacheStats:
    """Of ComfyUI's own cache, which it allocates for the whole video. caches: {"k", "v", "end"} per layer; frames: latent frames made so
    far."""
    by_layer = tuple(cache["k"].nbytes + cache["v"].nbytes for cache in caches)
    numbers = sum(cache["k"].numel() + cache["v"].numel() for cache in caches)
    stored = sum(by_layer)
    return CacheStats(
        frames=frames, held_frames=total_frames, tokens=caches[0]["k"].shape[1], elements=numbers, stored_bytes=stored,
        workspace_bytes=0, peak_bytes=stored, bf16_bytes=2 * numbers, by_kind=dict.fromkeys(KINDS, 0) | {"plain": stored},
        by_layer=by_layer, by_bits={8 * caches[0]["k"].element_size(): stored}, attention="exact (ComfyUI's own cache)")
