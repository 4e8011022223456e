"""Images and videos as frames of one size: rotated as their metadata says, cropped to the middle, never stretched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

# with 8 bits per channel; Pillow's conversion of others clips bright values
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV")
FORMATS = "Give PNG, JPEG, MP4 or WebM."


def read_frames(paths: list[str | Path], width: int, height: int) -> Tensor:
    """Images and videos, one after the other, as video [1, 3, n, height, width] in -1..1.

    Raises ValueError for a file without a picture, and FileNotFoundError for one that does not exist.
    """
    frames = [np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)) for path in paths for image in _images(Path(path))]
    pixels = torch.from_numpy(np.stack(frames)).float() / 127.5 - 1
    return pixels.permute(3, 0, 1, 2)[None]


def _images(path: Path) -> Iterator[Image.Image]:
    """The frames of a file."""
    if not path.exists():
        raise FileNotFoundError(f"There is no file {path}. {FORMATS}")
    found = 0
    try:
        for image in (_still_image(path) or _video_frames(path)):
            yield image
            found += 1
    except (OSError, av.FFmpegError, IndexError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image or a video ({error}). {FORMATS}") from None
    if not found:
        raise ValueError(f"{path} holds no picture. {FORMATS}")


def _still_image(path: Path) -> list[Image.Image] | None:
    """The image of a file, in a list; None if it is not an image, or an animated one."""
    try:
        with Image.open(path) as image:
            if getattr(image, "n_frames", 1) > 1 or image.mode not in MODES:
                return None
            return [ImageOps.exif_transpose(image).convert("RGB")]
    except Image.UnidentifiedImageError:
        return None


def _video_frames(path: Path) -> Iterator[Image.Image]:
    with av.open(str(path)) as file:
        for frame in file.decode(video=0):
            aspect = frame.sample_aspect_ratio if hasattr(frame, "sample_aspect_ratio") else file.streams.video[0].sample_aspect_ratio
            # resized to square pixels
            width = round(frame.width * aspect) if aspect else frame.width
            image = frame.to_image(width=max(1, width), height=frame.height)
            # rotation: counterclockwise degrees, as the camera was held
            yield image.rotate(frame.rotation, expand=True) if frame.rotation else image
