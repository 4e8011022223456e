"""A video as numbered PNG images: ball.png -> ball_000000.png, ball_000001.png and so on."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from ..files import write_atomically
from .written import Written, chained_digest


class ImageFiles:
    """The images beside `path`. pattern: for `glob`, their names."""

    def __init__(self, path: Path):
        self.path, self.tried = path, image_path(path, 0)
        self.pattern = f"{glob.escape(path.stem)}_{'[0-9]' * 6}.png"

    def existing(self) -> Path | None:
        return next(iter(self._images()), None)

    def create(self) -> None:
        """Nothing: an image appears with its first frame."""

    def discard(self) -> None:
        """Nothing: without frames there are no images."""

    def finish(self, written: Written) -> None:
        """Nothing: every image is whole."""

    def resume(self, frames: int, digest: str) -> Written:
        """Keep the first `frames` images. Raises ValueError if one is missing, or the last is not what was written before."""
        expected = [image_path(self.path, number) for number in range(frames)]
        present = set(expected) & set(self._images())
        if len(present) < frames:
            missing = next(path for path in expected if path not in present)
            raise ValueError(f"{missing} is missing: {frames - len(present)} of the {frames} images that were written before are gone. Put "
                             "them back, or start over.")
        found = chained_digest(b"", expected[-1].read_bytes())
        if digest and found != digest:
            raise ValueError(f"{expected[-1]} is not the image that was written before. Put it back, or start over.")
        return Written(frames, 0, found)

    def append(self, frames: list[tuple[int, np.ndarray]], before: Written) -> Iterator[Written]:
        """Write numbered frames uint8 [H, W, 3]; yields what is on the disk after each."""
        if not before.size:
            # images of a longer video, or of a run that was killed
            for path in self._images():
                if path.stem[-6:] >= f"{before.frames:06d}":
                    path.unlink()
        for number, frame in frames:
            path, image = image_path(self.path, number), Image.fromarray(frame)
            write_atomically(path, partial(image.save, format="png"))
            yield Written(number + 1, 1, chained_digest(b"", path.read_bytes()))

    def _images(self) -> list[Path]:
        return sorted(self.path.parent.glob(self.pattern))


def image_path(path: Path, number: int) -> Path:
    """Where frame `number` of the images of `path` is."""
    return path.with_name(f"{path.stem}_{number:06d}.png")
