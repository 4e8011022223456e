"""Frames to a file that plays while it grows, in memory that does not grow.

    decoder, writer = ChunkDecoder(vae), VideoWriter("ball.mp4", frame_rate=16)
    for latents in chunks:
        writer.write(to_bytes(decoder(latents)[0]))
        writer.flush()                          # everything so far is on the disk, whatever happens next
    writer.close()

Each flush encodes its frames with an encoder of their own and appends them. So a run that was killed can continue after the frames that its
session remembers, and makes the same file as a run that never stopped. Frames are kept until they are on the disk, so a flush that fails
can be repeated.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from ..files import Lock, Taken, check_place, remove_parts
from .container_file import FORMATS, ContainerFile
from .image_files import ImageFiles
from .latent_file import SUFFIX as LATENTS
from .latent_file import LatentFile
from .written import Written


class VideoWriter:
    """Pixels to .mp4 (H.264), .webm (VP9), or .png for numbered images; latents to .latent (`latent_file`).

    frame_rate: frames per second. quality: constant rate factor, lower is better. frames, digest: of an earlier writer, to continue its
    file after so many frames; the rest of the file is cut off. overwrite: replace another video, at the first flush.
    Raises ValueError for another suffix, or if the file is not what the earlier writer left; for a new file that cannot be made, its
    subclasses `files.Taken`, `files.InUse` and `files.PlaceError`.
    """

    def __init__(self, path: str | Path, frame_rate: int, *, quality: int | None = None, frames: int = 0, digest: str = "",
                 overwrite: bool = False):
        self.path, self.frame_rate = Path(path), frame_rate
        suffix = self.path.suffix.lower()
        if suffix not in (*FORMATS, ".png", LATENTS):
            raise ValueError(f"A video cannot be written as {self.path.suffix or 'a file without a suffix'}; use .mp4, .webm, .png or "
                             f"{LATENTS}.")
        self._target = self._target_of(suffix, quality)
        self._waiting: list[tuple[int, np.ndarray]] = []
        self._written, self._new = Written(frames), False
        check_place(self._target.tried)
        self._lock = Lock(self.path)
        try:
            remove_parts(self.path, self._target.pattern)
            if frames:
                self._written = self._target.resume(frames, digest)
            else:
                self._create(overwrite)
        except BaseException:
            self._lock.release()
            raise

    def _target_of(self, suffix: str, quality: int | None) -> ImageFiles | LatentFile | ContainerFile:
        if suffix in (".png", LATENTS):
            return (ImageFiles if suffix == ".png" else LatentFile)(self.path)
        return ContainerFile(self.path, self.frame_rate, quality)

    @property
    def frames(self) -> int:
        """How many frames are on the disk, without those written since the last flush."""
        return self._written.frames

    @property
    def digest(self) -> str:
        """Identifies what is on the disk."""
        return self._written.digest

    def _create(self, overwrite: bool) -> None:
        existing = self._target.existing()
        if existing is not None and not overwrite:
            raise Taken(f"{existing} already exists. Choose another name.")
        self._new = existing is None
        if self._new:
            self._target.create()

    def write(self, pixels: Tensor) -> None:
        """Append pixels uint8 [F, H, W, 3], or the frames of a `LatentFrames`, which the next flush brings to the disk."""
        for frame in pixels.numpy():
            number = self._waiting[-1][0] + 1 if self._waiting else self.frames
            self._waiting.append((number, frame))

    def flush(self) -> None:
        """Encode what was written since the last flush, append it, and sync it to the disk.

        If that fails, with OSError or an interrupt, the frames are kept for the next flush.
        """
        # an interrupt may have come between the last frame on the disk and this list
        self._waiting = [(number, frame) for number, frame in self._waiting if number >= self.frames]
        if self._waiting:
            for written in self._target.append(self._waiting, self._written):
                self._written = written
        self._waiting = []

    def close(self) -> None:
        """Flush and write the index by which players seek. A file without frames is removed.

        Raises OSError if the disk refuses; the file then plays up to the last flush that succeeded.
        """
        try:
            self.flush()
            if self.frames:
                self._target.finish(self._written)
        finally:
            self.release()

    def release(self) -> None:
        """Leave the file as it is, for another writer to continue. A new one without frames is removed."""
        if self._lock.held and self._new and not self.frames:
            self._target.discard()
        self._lock.release()
