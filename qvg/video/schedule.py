"""Prompts by the clock: which prompt applies to a latent frame.

    0s: a red ball rolls over a table
    6.5s: the ball falls
      and breaks in two
    1:05: somebody sweeps up

A line without a time continues the prompt above it; a text without any time is one prompt for the whole video. A prompt applies from the
first chunk that begins at or after its time. Times are seconds, frame rates are frames per second, and `stride` is how many video frames a
latent frame covers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

TIME = re.compile(r"\s*(?:(?P<minutes>\d+):(?P<rest>[0-5]?\d(?:\.\d+)?)|(?P<seconds>\d+(?:\.\d+)?)\s*s)\s*:(?P<text>.*)")

# seconds, four months
MAX_SECONDS = 10_000_000


def first_frame(seconds: float, frame_rate: float, stride: int = 4) -> int:
    """The first latent frame that begins at or after a time. Latent frame 0 is one video frame, each later one `stride` of them."""
    # a time with few digits may be slightly later than the frame that it means
    video_frame = math.ceil(seconds * frame_rate - 1e-6)
    return 0 if video_frame <= 0 else 1 + math.ceil((video_frame - 1) / stride)


def latent_frames(seconds: float, frame_rate: float, stride: int = 4) -> int:
    """Latent frames of a video that lasts at least `seconds`; at least 1."""
    return max(1, first_frame(seconds, frame_rate, stride))


@dataclass(frozen=True)
class Schedule:
    """Prompts with the seconds at which they begin, in rising order from 0. Raises ValueError otherwise."""

    entries: tuple[tuple[float, str], ...]

    def __post_init__(self):
        if not self.entries or self.entries[0][0] != 0:
            found = f"begins at {self.entries[0][0]:g}s" if self.entries else "is empty"
            raise ValueError(f"The prompt schedule {found}; its first prompt must begin at 0s.")
        for (before, _), (after, text) in zip(self.entries, self.entries[1:]):
            if after <= before:
                raise ValueError(f"'{text}' begins at {after:g}s, after a prompt at {before:g}s; write the prompts in order of time.")
        for seconds, text in self.entries:
            if not seconds <= MAX_SECONDS:
                raise ValueError(f"A prompt begins at {seconds:g}s; a video has at most {MAX_SECONDS} seconds.")
            if not text:
                raise ValueError(f"The prompt at {seconds:g}s is empty; describe what the video shows from then on.")

    @staticmethod
    def parse(text: str) -> Schedule:
        """Parse the notation in this module's docstring. Raises ValueError for a schedule that is not valid."""
        entries: list[list] = []
        for line in text.splitlines():
            if found := TIME.fullmatch(line):
                seconds = float(found["seconds"]) if found["seconds"] else 60 * float(found["minutes"]) + float(found["rest"])
                entries.append([seconds, found["text"].strip()])
            elif line.strip():
                if not entries:
                    entries.append([0.0, ""])
                entries[-1][1] = f"{entries[-1][1]} {line.strip()}".strip()
        return Schedule(tuple((seconds, prompt) for seconds, prompt in entries))

    def at(self, seconds: float) -> str:
        """The prompt at a time."""
        return next(text for begin, text in reversed(self.entries) if begin <= seconds)

    def at_frame(self, frame: int, frame_rate: float, stride: int = 4) -> str:
        """The prompt of a chunk that begins at a latent frame."""
        return next(text for begin, text in reversed(self.entries) if first_frame(begin, frame_rate, stride) <= frame)

    def __str__(self) -> str:
        # with every digit, because sessions store this text
        return "\n".join(f"{Decimal(repr(seconds)):f}s: {text}" for seconds, text in self.entries)


class PromptTrack:
    """A schedule as a network's context, for `network.Condition`.

    project: from a prompt to what the network takes as context, such as keys and values for each layer's cross-attention. It is called at
    each switch, and only its latest result is kept.
    """

    def __init__(self, schedule: Schedule, project: Callable[[str], Any], frame_rate: float, stride: int = 4):
        self.schedule, self.project, self.frame_rate, self.stride = schedule, project, frame_rate, stride
        self._latest: tuple[str, Any] | None = None

    def name(self, frame: int) -> str:
        """The prompt at a latent frame."""
        return self.schedule.at_frame(frame, self.frame_rate, self.stride)

    def context(self, frame: int):
        """The projected prompt at a latent frame."""
        name = self.name(frame)
        if self._latest is None or self._latest[0] != name:
            self._latest = None
            self._latest = name, self.project(name)
        return self._latest[1]
