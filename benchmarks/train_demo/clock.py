"""Training for a fixed time: stages end after their minutes, and learning rates depend on the time left."""

from __future__ import annotations

import math
import time


class Clock:
    """`minutes` of wall time from now. The learning-rate `schedule` warms up, holds, and decays to zero at the end."""

    def __init__(self, minutes: float, warmup: float = 0.03, decay: float = 0.5):
        self.start, self.seconds = time.monotonic(), max(minutes * 60, 1e-6)
        self.warmup, self.decay = warmup, decay

    def progress(self) -> float:
        return min((time.monotonic() - self.start) / self.seconds, 1.0)

    def over(self) -> bool:
        return self.progress() >= 1

    def schedule(self) -> float:
        done = self.progress()
        rise = min(1.0, 0.02 + done / self.warmup)
        fall = max(0.0, (done - (1 - self.decay)) / self.decay)
        return rise * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * fall)))


class Log:
    """Prints means of what it is given, every `every` calls, with the pace."""

    def __init__(self, name: str, every: int):
        self.name, self.every, self.calls, self.sums = name, every, 0, {}
        self.since = time.monotonic()

    def __call__(self, **values) -> None:
        self.calls += 1
        for key, value in values.items():
            self.sums[key] = self.sums.get(key, 0) + value.detach()
        if self.calls % self.every == 0:
            means = "  ".join(f"{key} {float(value) / self.every:.4f}" for key, value in self.sums.items())
            pace = (time.monotonic() - self.since) / self.every
            print(f"{self.name} {self.calls:6d}  {means}  {1000 * pace:.0f} ms a step", flush=True)
            self.sums, self.since = {}, time.monotonic()
