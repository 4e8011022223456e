"""A video made in segments (LongCat-Video), as a session file from which it can be continued.

A segment depends only on the latents that it continues. So an interrupted run continues after the last whole segment and makes the same
video. The file follows the rules of `session`.

    made = load(path).resume(fingerprint, wanted, segments, width, height)      # or Segments(carry, given_frames)
    while made.done < wanted:
        ...                                     # continues made.given, unless that is None
        made.add(part, new, given)
        made.save(path, fingerprint)
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from . import session as storage
from .sampler import Sampler
from .segment_model import SegmentModel
from .session import SessionError
from .session_parts import WALK_KIND
from .walk_session import WalkSession, walk_of

KIND = "segments"


def digest(images: Tensor) -> str:
    """Identifies frames [n, H, W, 3]."""
    return hashlib.sha256(images.float().contiguous().cpu().numpy().tobytes()).hexdigest()[:32]


@dataclass
class Segments:
    """The finished segments of a video.

    carry: "pixels" if a segment continues frames that were decoded and encoded again, else "latents". given_frames: how many video
    frames a segment continues. start: `digest` of the frames that the video begins with, or "".
    parts: latents [1, C, F, H, W] that are decoded together, one per segment; with "pixels", those that it continues come before its own.
    new: how many latent frames of each part are its own. given: latents that the next segment continues.
    """

    carry: str
    given_frames: int
    start: str = ""
    parts: list[Tensor] = field(default_factory=list)
    new: list[int] = field(default_factory=list)
    given: Tensor | None = None

    @property
    def done(self) -> int:
        return len(self.new)

    @property
    def latents(self) -> Tensor:
        """The video so far [1, C, F, H, W]."""
        return torch.cat([part[:, :, part.shape[2] - new:] for part, new in zip(self.parts, self.new)], dim=2)

    def add(self, part: Tensor, new: int, given: Tensor) -> None:
        """Add a segment, and what the next one continues. All frames of the first part are its own."""
        self.parts.append(part)
        self.new.append(part.shape[2] if not self.new else new)
        self.given = given

    def save(self, path: str | Path, fingerprint: str, extra: Mapping | None = None, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Write a session file, whole or not at all; extra and tensors as for `session.save`. Raises OSError if the disk refuses."""
        stored = {f"extra.{name}": tensor for name, tensor in (tensors or {}).items()}
        storage.write(path, {
            "kind": KIND, "fingerprint": fingerprint, "carry": self.carry, "given_frames": self.given_frames, "start": self.start,
            "new": self.new, "extra": dict(extra or {})},
            stored | {"given": self.given} | {f"part{number}": part for number, part in enumerate(self.parts)})


@dataclass(frozen=True)
class SegmentSession:
    """A checked session file of a video in segments."""

    path: Path
    fingerprint: str
    made: Segments
    extra: dict = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def frames_done(self) -> int:
        """Latent frames of the video so far."""
        return sum(self.made.new)

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, C, H, W) of a latent frame."""
        given = self.made.given.shape
        return (*given[:2], *given[3:])

    def restore(self, sampler: Sampler, fingerprint: str) -> None:
        """Move an unused sampler of a `SegmentModel` behind the last segment, or change nothing and raise SessionError."""
        model: SegmentModel = sampler.model
        wanted = Segments("latents", video_frames(model.given))
        made = self.resume(fingerprint, wanted, self.made.done + 1, *reversed(sampler.shape[2:]))
        if self.frames_done > sampler.run.frames:
            raise SessionError(f"{self.path.name} holds {self.frames_done} latent frames already, but the run is {sampler.run.frames} "
                               "long. Ask for a longer video.")
        model.remember([part.float() for part in made.parts])
        sampler.frames_done, sampler.chunk = self.frames_done, made.done

    @property
    def latents(self) -> Tensor:
        """The video so far [1, C, F, H, W]."""
        return self.made.latents

    def resume(self, fingerprint: str, wanted: Segments, segments: int, width: int, height: int) -> Segments:
        """A copy of the segments, to continue with.

        wanted: how the run would begin without a session. Raises SessionError if a run of `segments` segments of width x height latents
        cannot continue this session.
        """
        name, made = self.path.name, self.made
        if fingerprint != self.fingerprint:
            raise SessionError(f"{name} was saved with another model than the one that is loaded. Load the model that made it.")
        for what, found, asked in (("carry", made.carry, wanted.carry), ("given_frames", made.given_frames, wanted.given_frames)):
            if found != asked:
                raise SessionError(f"{name} was made with {what} {found}, but this run has {asked}. Use the value it was made with.")
        if tuple(made.given.shape[3:]) != (height, width):
            raise SessionError(f"{name} has latents of {made.given.shape[4]} x {made.given.shape[3]} (width x height), but this run has "
                               f"{width} x {height}. Use the size it was made with.")
        if wanted.start and wanted.start != made.start:
            raise SessionError(f"{name} does not begin with the frames that are connected to start. Connect those that it was made from, "
                               "or none.")
        if made.done >= segments:
            raise SessionError(f"{name} already has {made.done} segments. Raise segments to continue it.")
        return replace(made, parts=list(made.parts), new=list(made.new))


def video_frames(frames: int) -> int:
    """Video frames of so many latent frames."""
    return 4 * frames - 3


def save_sampler(path: str | Path, sampler: Sampler, *, fingerprint: str, extra: Mapping | None = None,
                 tensors: Mapping[str, Tensor] | None = None) -> None:
    """Write the session of a sampler of a `SegmentModel` between two segments. Frames that it started with are part of the first.

    Raises OSError if the disk refuses, ValueError when the sampler is in the middle of storing a segment, or has made none.
    """
    model: SegmentModel = sampler.model
    if not sampler.settled or not sampler.chunk:
        raise ValueError(storage.UNSETTLED)
    opening = len(model.latents) - sampler.chunk + 1
    parts = [torch.cat(model.latents[:opening], dim=2), *model.latents[opening:]]
    made = Segments("latents", video_frames(model.given), parts=parts, new=[part.shape[2] for part in parts], given=model.last(model.given))
    made.save(path, fingerprint, extra, tensors)


def load(path: str | Path) -> SegmentSession | storage.Session | WalkSession:
    """Read and check a session of any kind: of segments, of a walk, or of a causal model. Raises as `session.load`."""
    path = Path(path)
    header, stored = storage.read(path)
    if header.get("kind") == WALK_KIND:
        return walk_of(path, header, stored)
    if header.get("kind") != KIND:
        return storage.session_of(path, header, stored)
    parts = [stored[f"part{number}"] for number in range(len(header["new"]))]
    made = Segments(header["carry"], header["given_frames"], header["start"], parts, header["new"], stored["given"])
    tensors = {name.removeprefix("extra."): tensor for name, tensor in stored.items() if name.startswith("extra.")}
    return SegmentSession(path, header["fingerprint"], made, header["extra"], tensors)
