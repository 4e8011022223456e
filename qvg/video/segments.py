"""A video that is made in segments, on disk: so that it can be gone on with, and while it grows.

A segment needs nothing of the past but the latents that it continues. So a run that was stopped, by whatever, goes on behind the last
whole segment and makes the same video. `Segments` is all that it needs, as a session file under the rules of `storage`:

    made = Segments.load(path, fingerprint(network))            # or Segments(carry, given_frames)
    while made.done < wanted:
        ...                                     # continues made.given, unless that is None
        made.add(part, new, given)
        made.save(path, fingerprint(network))

`SegmentFile` is a video that plays at any moment, and beside it what its next segment needs:

    video = SegmentFile(path, key, frame_rate=15)
    for segment in range(video.done, segments):
        ...                                     # continues video.given, unless that is None
        video.add(frames)
        video.save(segment + 1, given)
    video.finish()
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ..files.places import remove_parts
from . import session as storage
from .session import SessionError
from .stream import VideoWriter

KIND = "segments"
SUFFIX = ".safetensors"


def digest(images: Tensor) -> str:
    """A name of frames [n, H, W, 3]."""
    return hashlib.sha256(images.float().contiguous().cpu().numpy().tobytes()).hexdigest()[:32]


@dataclass
class Segments:
    """The segments of a video that are made.

    carry: "pixels" where a segment continues frames that were decoded and encoded again, else "latents". given_frames: video frames that
    a segment continues. start: `digest` of the frames that the video begins with, "" without any.
    parts: latents [1, C, F, H, W] that are decoded together: of each segment, and with "pixels" those that it continues before its own.
    new: latent frames by which each part makes the video longer, all of the first. given: latents that the next segment continues.
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
        """Another segment, and what the next one continues."""
        self.parts.append(part)
        self.new.append(part.shape[2] if not self.new else new)
        self.given = given

    def save(self, path: str | Path, fingerprint: str) -> None:
        """Write a session, whole or not at all. Raises OSError where the disk refuses."""
        storage.write(path, {
            "kind": KIND, "fingerprint": fingerprint, "carry": self.carry, "given_frames": self.given_frames, "start": self.start,
            "new": self.new}, {"given": self.given} | {f"part{number}": part for number, part in enumerate(self.parts)})


@dataclass(frozen=True)
class SegmentSession:
    """A checked session file of a video in segments."""

    path: Path
    fingerprint: str
    made: Segments

    @property
    def latents(self) -> Tensor:
        return self.made.latents

    def resume(self, fingerprint: str, wanted: Segments, segments: int, width: int, height: int) -> Segments:
        """The segments to go on behind, which may be added to. Raises SessionError where a run of so many segments of width x height
        latents, that would begin as `wanted`, cannot."""
        name, made = self.path.name, self.made
        if fingerprint != self.fingerprint:
            raise SessionError(f"{name} was saved with another model than the one that is loaded. Load the model that made it.")
        for what, found, asked in (("carry", made.carry, wanted.carry), ("given_frames", made.given_frames, wanted.given_frames)):
            if found != asked:
                raise SessionError(f"{name} was made with {what} {found}, but this run has {asked}. Use the value it was made with.")
        if tuple(made.given.shape[3:]) != (height, width):
            raise SessionError(f"{name} is of latents {made.given.shape[4]} x {made.given.shape[3]} (width x height), but this run has "
                               f"{width} x {height}. Use the size it was made with.")
        if wanted.start and wanted.start != made.start:
            raise SessionError(f"{name} does not begin with the frames that are connected to start. Connect those that it was made from, "
                               "or none.")
        if made.done >= segments:
            raise SessionError(f"{name} has {made.done} segments already. Raise segments to go on.")
        return replace(made, parts=list(made.parts), new=list(made.new))


def load(path: str | Path) -> SegmentSession | storage.Session:
    """A session of either kind: of segments, or of a causal model. Raises as `storage.load`."""
    path = Path(path)
    header, stored = storage.read(path)
    if header.get("kind") != KIND:
        return storage.session_of(path, header, stored)
    parts = [stored[f"part{number}"] for number in range(len(header["new"]))]
    made = Segments(header["carry"], header["given_frames"], header["start"], parts, header["new"], stored["given"])
    return SegmentSession(path, header["fingerprint"], made)



def _position(path: Path, key: str) -> tuple[int, int, Tensor, str] | None:
    """Segments, video frames, given latents and digest of the video at `path`; None where there is none with this key to go on with."""
    try:
        header, stored = storage.read(path.with_suffix(SUFFIX))
        if header["key"] != key:
            return None
        return int(header["done"]), int(header["frames"]), stored["given"], str(header.get("digest", ""))
    except (OSError, *storage.DAMAGE):
        return None


class SegmentFile:
    """done: segments in the file. given: latents [B, C, F, H, W] that the next one continues, None for the first. key: what the video is
    made from; a file is gone on with only under the same key, and without one it always begins anew. Nobody else can write to the file
    until `finish` or `release`.
    Raises ValueError where the file cannot be written or gone on with, see `VideoWriter`."""

    def __init__(self, path: str | Path, key: str | None, frame_rate: int):
        self.path, self.key = Path(path), key
        self.done, frames, self.given, digest = (key and _position(self.path, key)) or (0, 0, None, "")
        self.writer = VideoWriter(self.path, frame_rate, frames=frames, digest=digest)
        remove_parts(self.path.with_suffix(SUFFIX))

    @staticmethod
    def find(folder: str | Path, pattern: str, key: str) -> Path | None:
        """The newest unfinished video of a folder whose name fits the pattern (of `Path.glob`) and that has this key."""
        videos = [path for path in Path(folder).glob(pattern) if _position(path, key) is not None]
        return max(videos, key=lambda path: path.stat().st_mtime, default=None)

    def add(self, frames: Tensor) -> None:
        """Append frames [n, H, W, 3] in 0..1."""
        self.writer.write((frames.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu())

    def save(self, done: int, given: Tensor) -> None:
        """See the frames onto the disk, then the position behind them."""
        self.writer.cut()
        if self.key:
            storage.write(self.path.with_suffix(SUFFIX), {
                "kind": "stream", "key": self.key, "done": done, "frames": self.writer.frames, "digest": self.writer.digest},
                {"given": given})
        self.done, self.given = done, given

    def finish(self) -> None:
        """Close the file; there is nothing left to go on with."""
        self.writer.close()
        if self.key:
            self.path.with_suffix(SUFFIX).unlink(missing_ok=True)

    def release(self) -> None:
        """Leave the file to be gone on with, by this process or another. Does nothing behind `finish`."""
        self.writer.release()
