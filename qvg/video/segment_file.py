"""A video file that grows by segments and plays at any moment; beside it, while it is unfinished, what its next segment needs.

    video = SegmentFile(path, key, frame_rate=15)
    for segment in range(video.done, segments):
        ...                                     # continues video.given, unless that is None
        video.add(frames)
        video.save(segment + 1, given)
    video.finish()
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..files import remove_parts
from . import session as storage
from .writer import VideoWriter

KIND = "stream"
SUFFIX = ".safetensors"


def read_position(path: Path, key: str) -> tuple[int, int, Tensor, str] | None:
    """Segments, video frames, given latents and digest of the video at `path`; None if it cannot be continued under this key."""
    try:
        header, stored = storage.read(path.with_suffix(SUFFIX))
        if header["key"] != key:
            return None
        return int(header["done"]), int(header["frames"]), stored["given"], str(header.get("digest", ""))
    except (OSError, *storage.DAMAGE):
        return None


class SegmentFile:
    """A video file held by this process until `finish` or `release`.

    key: identifies what the video is made from. A file is continued only under the same key; without a key, it always starts over.
    done: segments in the file. given: latents [B, C, F, H, W] that the next segment continues, None for the first.
    Raises ValueError if the file cannot be written or continued, see `VideoWriter`.
    """

    def __init__(self, path: str | Path, key: str | None, frame_rate: int):
        self.path, self.key = Path(path), key
        self.done, frames, self.given, digest = (key and read_position(self.path, key)) or (0, 0, None, "")
        self.writer = VideoWriter(self.path, frame_rate, frames=frames, digest=digest)
        remove_parts(self.path.with_suffix(SUFFIX))

    @staticmethod
    def find(folder: str | Path, pattern: str, key: str) -> Path | None:
        """The newest unfinished video in a folder whose name matches the glob pattern and that has this key."""
        videos = [path for path in Path(folder).glob(pattern) if read_position(path, key) is not None]
        return max(videos, key=lambda path: path.stat().st_mtime, default=None)

    def add(self, frames: Tensor) -> None:
        """Append frames [n, H, W, 3] in 0..1."""
        self.writer.write((frames.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu())

    def save(self, done: int, given: Tensor) -> None:
        """Sync the frames to the disk, then the position after them."""
        self.writer.flush()
        if self.key:
            storage.write(self.path.with_suffix(SUFFIX), {
                "kind": KIND, "key": self.key, "done": done, "frames": self.writer.frames, "digest": self.writer.digest},
                {"given": given})
        self.done, self.given = done, given

    def finish(self) -> None:
        """Close the file, and remove what its next segment would need."""
        self.writer.close()
        if self.key:
            self.path.with_suffix(SUFFIX).unlink(missing_ok=True)

    def release(self) -> None:
        """Leave the file for another writer to continue. Does nothing after `finish`."""
        self.writer.release()
