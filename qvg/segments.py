"""A video that is made in segments, on disk: the file that grows, and what its next segment needs.

    video = SegmentFile(path, key, frame_rate=15)
    for segment in range(video.done, segments):
        ...                                     # continues video.given, unless that is None
        video.add(frames)
        video.save(segment + 1, given, shown)
    video.finish()

A segment needs nothing of the past but the latents that it continues, so a run that was stopped, by whatever, goes on behind the last
whole segment and makes the same video. `key` says what the video is made from; a file is gone on with only under the same key.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .storage import write_atomically
from .stream import VideoWriter

VERSION = 1
HEADER = "qvg_segments"
SUFFIX = ".safetensors"
# what a file that is not ours, or is damaged, can raise
DAMAGE = (SafetensorError, OSError, KeyError, TypeError, ValueError)


def _read(path: Path, key: str) -> tuple[dict, Tensor] | None:
    """Position and given latents of the video at `path`; None where there is none with this key to go on with."""
    try:
        with safe_open(path.with_suffix(SUFFIX), framework="pt") as file:
            header = json.loads(file.metadata()[HEADER])
            if (header["version"], header["key"]) != (VERSION, key):
                return None
            return {name: int(header[name]) for name in ("done", "frames", "shown")}, file.get_tensor("given")
    except DAMAGE:
        return None


class SegmentFile:
    """done: segments in the file. given: latents [B, C, F, H, W] that the next one continues, None for the first; shown: how many of its
    video frames the file has already. Raises ValueError where the file cannot be written or gone on with."""

    def __init__(self, path: str | Path, key: str, frame_rate: int):
        self.path, self.key = Path(path), key
        self.done, self.shown, frames = 0, 0, 0
        self.given: Tensor | None = None
        found = _read(self.path, key)
        if found is not None:
            position, self.given = found
            self.done, self.shown, frames = position["done"], position["shown"], position["frames"]
        self.writer = VideoWriter(self.path, frame_rate, frames=frames)

    @staticmethod
    def find(folder: str | Path, pattern: str, key: str) -> Path | None:
        """The newest unfinished video of a folder whose name fits the pattern (of `Path.glob`) and that has this key."""
        videos = [path for path in Path(folder).glob(pattern) if _read(path, key) is not None]
        return max(videos, key=lambda path: path.stat().st_mtime, default=None)

    def add(self, frames: Tensor) -> None:
        """Append frames [n, H, W, 3] in 0..1."""
        self.writer.write((frames.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu())

    def save(self, done: int, given: Tensor, shown: int) -> None:
        """See the frames onto the disk, then the position behind them."""
        self.writer.cut()
        self.done, self.given, self.shown = done, given, shown
        header = {"version": VERSION, "key": self.key, "done": done, "shown": shown, "frames": self.writer.frames}
        write_atomically(self.path.with_suffix(SUFFIX), lambda place: save_file(
            {"given": given.contiguous().cpu()}, place, {HEADER: json.dumps(header)}))

    def finish(self) -> None:
        """Close the file; there is nothing left to go on with."""
        self.writer.close()
        self.path.with_suffix(SUFFIX).unlink(missing_ok=True)
