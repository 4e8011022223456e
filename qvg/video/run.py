"""What a run is: how many frames, in which chunks, over which noise levels, from which seed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

# four steps at shift 5, which Self-Forcing was distilled to
SELF_FORCING_SIGMAS = (1.0, 0.9375, 5 / 6, 0.625, 0.0)
NOISES = ("private", "core")
SOLVERS = ("renoise", "euler")
# almost three days of video
MAX_FRAMES = 1_000_000
MAX_CHUNK, MAX_SIGMAS, MAX_SIGMA = 256, 10_001, 10_000.0


@dataclass(frozen=True)
class Run:
    """The fields of a run. Two runs with equal fields, weights and settings make equal videos.

    frames: latent frames of the whole video, including given start frames.
    chunk_frames: latent frames generated together. first_alone: the first frame is a chunk of its own. first_frames: latent frames of the
    first chunk, 0 for as many as the others.
    sigmas: noise levels in falling order. A flow model needs at most 1; more is for a `renoise` of your own (see `Sampler`). A chunk is
    finished if the last sigma is 0.
    context_noise: noise level of a finished chunk in the pass that stores it, from 0 to below 1.
    recache_frames: how many of the newest latent frames are stored again when the prompt changes (LongLive, arXiv 2509.22622).
    noise: "private" (equal on every device) or "core" (ComfyUI's per-step seeds, drawn on the latents' device).
    solver: from one noise level to the next, "renoise" (fresh noise on the prediction) or "euler" (a step along the flow, no noise).
    Raises ValueError for a value outside these limits.
    """

    frames: int
    chunk_frames: int = 3
    sigmas: tuple[float, ...] = SELF_FORCING_SIGMAS
    seed: int = 0
    first_alone: bool = False
    context_noise: float = 0.0
    recache_frames: int = 0
    noise: str = "private"
    solver: str = "renoise"
    first_frames: int = 0

    def __post_init__(self):
        object.__setattr__(self, "sigmas", tuple(map(float, self.sigmas)))
        # the limits of a session file: one that cannot be read back would be noticed only after hours of work
        for name, low, high in (("frames", 1, MAX_FRAMES), ("chunk_frames", 1, MAX_CHUNK), ("first_frames", 0, MAX_CHUNK),
                                ("recache_frames", 0, MAX_FRAMES), ("seed", 0, 2**64 - 1)):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise ValueError(f"{name} is {value!r}; it must be a whole number, at least {low} and at most {high}.")
        if type(self.first_alone) is not bool:
            raise ValueError(f"first_alone is {self.first_alone!r}; it must be true or false.")
        falling = all(higher > lower for higher, lower in zip(self.sigmas, self.sigmas[1:]))
        if not 2 <= len(self.sigmas) <= MAX_SIGMAS or not falling or self.sigmas[0] > MAX_SIGMA or self.sigmas[-1] < 0:
            raise ValueError(f"The sigmas are {self.listed_sigmas}; give 2 to {MAX_SIGMAS} of them that fall from at most {MAX_SIGMA:g} to "
                             "at least 0.")
        if not 0 <= self.context_noise < 1:
            raise ValueError(f"context_noise is {self.context_noise:g}; it must be at least 0 and below 1.")
        for name, choices in (("noise", NOISES), ("solver", SOLVERS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}.")

    @property
    def steps(self) -> int:
        """Denoising steps of a chunk."""
        return len(self.sigmas) - 1

    @property
    def opening(self) -> int:
        """Latent frames of a chunk that nothing precedes."""
        return 1 if self.first_alone else self.first_frames or self.chunk_frames

    @property
    def listed_sigmas(self) -> str:
        """The sigmas as part of a sentence."""
        return ", ".join(f"{sigma:g}" for sigma in self.sigmas) or "empty"

    def chunk_lengths(self, first: int, stop: int) -> Iterator[int]:
        """Lengths of the chunks generated from latent frame `first` to `stop`. The last is shorter if they do not divide evenly."""
        while first < stop:
            length = min(self.chunk_frames if first else self.opening, stop - first)
            yield length
            first += length

    def chunk_count(self, first: int, stop: int) -> int:
        """How many `chunk_lengths` there are."""
        opening = 0 if first else min(self.opening, stop)
        return bool(opening) + math.ceil(max(0, stop - first - opening) / self.chunk_frames)

    def start_chunk_lengths(self, frames: int) -> list[int]:
        """Lengths of the chunks in which given start frames are stored. An odd remainder comes first, so a start image is alone."""
        remainder = frames % self.chunk_frames
        return [remainder] * bool(remainder) + [self.chunk_frames] * (frames // self.chunk_frames)
