"""Images and videos that people have, as frames of a size: turned as their metadata says, cropped around the middle, never squeezed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

# with 8 bits a channel; of others Pillow's conversion cuts off what is brighter
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV")
FORMATS = "Give PNG, JPEG, MP4 or WebM."


def read_frames(paths: list[str | Path], width: int, height: int) -> Tensor:
    """Images and videos, one after the other, as video [1, 3, n, height, width] in -1..1.

    Raises ValueError for a file that holds no picture, and FileNotFoundError for one that is not there.
    """
    frames = [np.asarray(fitted(image, width, height)) for path in paths for image in _pictures(Path(path))]
    pixels = torch.from_numpy(np.stack(frames)).float() / 127.5 - 1
    return pixels.permute(3, 0, 1, 2)[None]


def fitted(image: Image.Image, width: int, height: int) -> Image.Image:
    """The middle of an image, at another size."""
    return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)


def _pictures(path: Path) -> Iterator[Image.Image]:
    if not path.exists():
        raise FileNotFoundError(f"There is no file {path}. {FORMATS}")
    found = 0
    try:
        for image in (_still(path) or _moving(path)):
            yield image
            found += 1
    except (OSError, av.FFmpegError, IndexError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image or a video ({error}). {FORMATS}") from None
    if not found:
        raise ValueError(f"{path} holds no picture. {FORMATS}")


def _still(path: Path) -> list[Image.Image] | None:
    """The image of a file in a list; None where it is no image, or one that moves."""
    try:
        with Image.open(path) as image:
            if getattr(image, "n_frames", 1) > 1 or image.mode not in MODES:
                return None
            return [ImageOps.exif_transpose(image).convert("RGB")]
    except Image.UnidentifiedImageError:
        return None


def _moving(path: Path) -> Iterator[Image.Image]:
    with av.open(str(path)) as file:
        for frame in file.decode(video=0):
            shape = frame.sample_aspect_ratio if hasattr(frame, "sample_aspect_ratio") else file.streams.video[0].sample_aspect_ratio
            # pixels that are not square are made so
            width = round(frame.width * shape) if shape else frame.width
            image = frame.to_image(width=max(1, width), height=frame.height)
            # degrees against the clock, as the camera was held
            yield image.rotate(frame.rotation, expand=True) if frame.rotation else image
