"""What the cache of a patched model's latest run held, moment by moment, and the lines of text that say so on the nodes.

A `RunLog` travels with the patched MODEL as an attachment, so that the monitor node finds it after any LoRA loader. It keeps
numbers, never tensors. While the model samples it writes to the node that patched the model and to every monitor in the
running graph that watches it.
"""

from __future__ import annotations

import time
from dataclasses import asdict

from server import PromptServer

from ..qvg.budget import Forecast
from ..qvg.cache import KINDS, CacheStats
from ..qvg.chart import format_bytes
from ..qvg.settings import QVGSettings

ATTACHMENT = "quantvideogen"
MONITOR = "QVGMemoryMonitor"
SECONDS_BETWEEN_TEXTS = 0.25


class RunLog:
    """history: `CacheStats` of the latest run in order; forecast: of its bytes, made before its first step."""

    def __init__(self, settings: QVGSettings, node_id: str | None):
        self.settings, self.node_id = settings, node_id
        self.history: list[CacheStats] = []
        self.forecast: Forecast | None = None
        self.total_frames = 0
        self._nodes: list[str] = []
        self._last_text = 0.0

    def start(self, total_frames: int, forecast: Forecast | None) -> None:
        self.history, self.total_frames, self.forecast = [], total_frames, forecast
        self._nodes = [self.node_id] if self.node_id else []
        self._nodes += [node for prompt in _running_prompts() for node in monitors_of(prompt, self.node_id)]
        self.show()

    def note(self, stats: CacheStats) -> None:
        self.history.append(stats)
        if time.monotonic() - self._last_text >= SECONDS_BETWEEN_TEXTS:
            self.show()

    def show(self) -> None:
        """Write the present state on the nodes."""
        self._last_text = time.monotonic()
        for node in self._nodes:
            send_text(self.text(), node)

    @property
    def title(self) -> str:
        done = self.history[-1].frames if self.history else 0
        return f"KV cache, {self.settings.name.capitalize()}, {done} of {self.total_frames} latent frames"

    def text(self) -> str:
        lines = [self.title]
        if self.history:
            now = self.history[-1]
            lines += [
                f"now {format_bytes(now.stored_bytes)}, bf16 {format_bytes(now.bf16_bytes)}: {now.ratio:.2f}x, "
                f"{now.bits_per_number:.2f} bits a number",
                f"peak {format_bytes(now.peak_bytes)} with workspace: {now.peak_ratio:.2f}x",
                *layer_table(now.by_layer)]
        if self.forecast:
            lines.append(
                f"forecast {format_bytes(self.forecast.stored_bytes)}, peak {format_bytes(self.forecast.peak_bytes)}, "
                f"bf16 {format_bytes(self.forecast.bf16_bytes)}")
        return "\n".join(lines)

    def report(self) -> dict:
        """The whole log as JSON values: settings, forecast, the state at the end, and bytes after each chunk."""
        keys = ("frames", "stored_bytes", "workspace_bytes", "peak_bytes", "bf16_bytes")
        return {
            "settings": asdict(self.settings), "latent_frames": self.total_frames,
            "forecast": asdict(self.forecast) if self.forecast else None,
            "now": self.history[-1].as_dict() if self.history else None,
            "history": [{key: getattr(stats, key) for key in keys} for stats in self.history]}


def layer_table(by_layer: tuple[int, ...]) -> list[str]:
    """One line for each run of layers that hold equally much: "layers 0-29: 1.4 MiB each"."""
    lines, first = [], 0
    for layer in range(1, len(by_layer) + 1):
        if layer == len(by_layer) or by_layer[layer] != by_layer[first]:
            name = f"layer {first}" if layer - first == 1 else f"layers {first}-{layer - 1}"
            lines.append(f"{name}: {format_bytes(by_layer[first])}" + (" each" if layer - first > 1 else ""))
            first = layer
    return lines


def plain_stats(caches: list, total_frames: int, frames: int) -> CacheStats:
    """Core's own cache, which it allocates for the whole video at once: a list of {"k", "v", "end"} a layer."""
    by_layer = tuple(cache["k"].nbytes + cache["v"].nbytes for cache in caches)
    numbers = sum(cache["k"].numel() + cache["v"].numel() for cache in caches)
    stored = sum(by_layer)
    return CacheStats(
        frames=frames, held_frames=total_frames, tokens=caches[0]["k"].shape[1], numbers=numbers, stored_bytes=stored,
        workspace_bytes=0, peak_bytes=stored, bf16_bytes=2 * numbers, by_kind=dict.fromkeys(KINDS, 0) | {"plain": stored},
        by_layer=by_layer)


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


def _running_prompts() -> list[dict]:
    """Graphs being executed. Asked at sampling time, because a cached node does not see what was added to the graph since."""
    queue = getattr(getattr(PromptServer, "instance", None), "prompt_queue", None)
    return [item[2] for item in queue.get_current_queue_volatile()[0]] if queue is not None else []
