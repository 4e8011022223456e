"""What the cache of a patched model's latest run held, moment by moment, and how that reaches the nodes on the screen.

A `RunLog` travels with the patched MODEL as an attachment, so that the monitor node finds it after any LoRA loader. It keeps
numbers, never tensors. While the model samples it writes a line of text on the node that patched the model, and sends the
moments to every monitor in the running graph that watches it (`live`), four times a second at most.
"""

from __future__ import annotations

import time
from dataclasses import asdict

import comfy.model_management
import torch
from server import PromptServer

from ..qvg.budget import GIB, Forecast
from ..qvg.cache import KINDS, CacheStats
from ..qvg.chart import format_bytes
from ..qvg.settings import QVGSettings
from . import live

ATTACHMENT = "quantvideogen"
MONITOR = "QVGMemoryMonitor"
SECONDS_BETWEEN_UPDATES = 0.25


class RunLog:
    """history: `CacheStats` of the latest run in order; forecast: of its bytes, made before its first step."""

    def __init__(self, settings: QVGSettings, node_id: str | None):
        self.settings, self.node_id = settings, node_id
        self.history: list[CacheStats] = []
        self.forecast: Forecast | None = None
        self.total_frames = 0
        self.free_bytes = 0
        self.ended = True
        self.watched = live.Watched()
        self._sent = 0
        self._last_update = 0.0

    def start(self, total_frames: int, forecast: Forecast | None) -> None:
        self.history, self.total_frames, self.forecast = [], total_frames, forecast
        self.ended, self._sent = False, 0
        self.watched = live.watch(self, self.node_id, lambda graph: monitors_of(graph, self.node_id))
        self.show()

    def note(self, stats: CacheStats) -> None:
        self.history.append(stats)
        self.tick()

    def tick(self) -> None:
        """Something went on; show it unless something was shown a moment ago."""
        if time.monotonic() - self._last_update >= SECONDS_BETWEEN_UPDATES:
            self.show()

    def end(self) -> None:
        """The run is over, finished or not."""
        self.ended = True
        self.show()

    def show(self) -> None:
        """Write the present state on the nodes."""
        self._last_update = time.monotonic()
        # free memory alone can end a run, so it is asked for when it is shown and not before
        self.free_bytes = int(comfy.model_management.get_free_memory())
        if self.node_id:
            send_text(self.text(), self.node_id)
        if self.watched.nodes:
            live.send(self.watched, self.state() | {"points": [point(stats) for stats in self.history[self._sent:]]})
        self._sent = len(self.history)

    @property
    def title(self) -> str:
        done = self.history[-1].frames if self.history else 0
        return f"KV cache, {self.settings.name.capitalize()}, {done} of {self.total_frames} latent frames"

    def text(self) -> str:
        if not self.history:
            return self.title
        now = self.history[-1]
        return (f"{self.title}\n{format_bytes(now.stored_bytes)} instead of {format_bytes(now.bf16_bytes)} in bf16 ({now.ratio:.2f}x), "
                f"peak {format_bytes(now.peak_bytes)} ({now.peak_ratio:.2f}x)"
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
        """The whole log as JSON values: settings, forecast, the state at the end, and bytes after each chunk."""
        return self.state() | {"settings": asdict(self.settings), "history": [point(stats) for stats in self.history]}


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
        frames=frames, held_frames=total_frames, tokens=caches[0]["k"].shape[1], numbers=numbers, stored_bytes=stored,
        workspace_bytes=0, peak_bytes=stored, bf16_bytes=2 * numbers, by_kind=dict.fromkeys(KINDS, 0) | {"plain": stored},
        by_layer=by_layer, by_bits={8 * caches[0]["k"].element_size(): stored})


def monitors_of(prompt: dict, source: str | None) -> list[str]:
    """Ids of the monitors in a graph (API format) whose model comes from the node `source`, directly or through others."""
    found = []
    for monitor, node in prompt.items():
        if node.get("class_type") != MONITOR:
            continue
        waiting, seen = [node["inputs"].get("model")], set()
        while waiting:
            link = waiting.pop()
            if not isinstance(link, list) or link[0] in seen:
                continue
            seen.add(link[0])
            waiting += prompt.get(link[0], {}).get("inputs", {}).values()
        if source in seen:
            found.append(monitor)
    return found


def send_text(text: str, node_id: str) -> None:
    # outside a server (a script that imports the nodes) there is nobody to tell
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.send_progress_text(text, node_id)

