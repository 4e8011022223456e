"""Progress of a run as a line of text."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from ..units import format_bytes
from .events import ChunkDone, StepDone
from .sampler import Sampler


@dataclass
class Meter:
    """Chunk and step, time left, and after a chunk frames per second and cache size. It counts every event of a generated chunk."""

    steps_done: int = 0
    began: float = field(default_factory=time.monotonic)

    def line(self, event: StepDone | ChunkDone, sampler: Sampler) -> str:
        """The line after another event of a generated chunk."""
        self.steps_done += 1
        run = sampler.run
        seconds = time.monotonic() - self.began
        # the pass that stores takes about as long as a step
        left = (sampler.chunks - event.chunk) * (run.steps + 1) - getattr(event, "step", run.steps) - 1
        text = f"chunk {event.chunk + 1}/{event.chunks}"
        if not isinstance(event, ChunkDone):
            text += f", step {event.step + 1}/{event.steps}"
        text += f", {left * seconds / self.steps_done:.0f} s left"
        if isinstance(event, ChunkDone):
            frames = 4 * event.latents.shape[2]
            text += f", {frames * self.steps_done / (run.steps + 1) / seconds:.1f} frames/s, cache {format_bytes(event.stats.stored_bytes)}"
        return text
