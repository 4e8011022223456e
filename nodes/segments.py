"""The loop of Continue Video (LongCat, QVG): a video made segment by segment, decoded, carried on and stored as it grows."""

from __future__ import annotations

from dataclasses import dataclass

import comfy.model_management
import comfy.utils
import torch

from ..qvg import backends
from ..qvg.video.segment_file import SegmentFile
from ..qvg.video.segments import Segments
from . import live, where
from .session_saver import SegmentSaver

# of Wan 2.1's latents
CHANNELS, STRIDE = 16, 8


def latent_frames(frames: int) -> int:
    """Latent frames of a video: one for its first frame, then one for each four."""
    return (frames - 1) // 4 + 1


def whole_frames(frames: int) -> int:
    """`frames` rounded down to a number of video frames that fills whole latent frames."""
    return 4 * latent_frames(frames) - 3


@dataclass
class LongVideo:
    """A video made of segments, each of which continues the one before.

    length: video frames of a segment. given_frames: those of them that it continues. carry: "pixels" (decode and encode again) or
    "latents". file: where the video is written while it grows, or None.
    Raises ValueError where a segment would contain no new frame, or the size does not divide into tokens.
    """

    vae: object
    width: int
    height: int
    length: int
    given_frames: int
    segments: int
    carry: str
    file: SegmentFile | None = None

    def __post_init__(self):
        if self.width % 16 or self.height % 16:
            raise ValueError(f"A video of {self.width} x {self.height} pixels does not divide into tokens of 16 x 16. Set width and height "
                             f"to {max(1, self.width // 16) * 16} x {max(1, self.height // 16) * 16}.")
        if latent_frames(self.given_frames) >= latent_frames(self.length):
            raise ValueError(f"Segments of {self.length} frames that continue {self.given_frames} frames contain no new frame; "
                             "raise length, or lower given_frames.")

    def check_given(self, given: torch.Tensor | None) -> None:
        """Raises ValueError where the latents stored beside a video file cannot be continued by a segment of this video."""
        size = (1, CHANNELS, self.height // STRIDE, self.width // STRIDE)
        if given is not None and ((*given.shape[:2], *given.shape[3:]) != size or given.shape[2] > latent_frames(self.given_frames)):
            raise ValueError(f"The latents stored beside {self.file.path.name} have the shape {list(given.shape)}, which belongs to "
                             "another video. Choose another stream_to.")

    def make(self, sampler, start: torch.Tensor | None, made: Segments, saver: SegmentSaver | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Frames [n, H, W, 3] and latents [1, C, F, H, W] of the video, its start included; with a file, of the last segment only.

        sampler: (segment, given latents or None, new latent frames) -> new latents. start: frames [n, height, width, 3].
        made: the segments made so far; new ones are added to it.
        """
        first, opening, pixels = made.done, 0, []
        if self.file is not None and self.file.done:
            first, made.given = self.file.done, self.file.given
        elif start is not None:
            opening = whole_frames(min(self.given_frames, len(start)))
            self._show(pixels, start)
            if not first:
                made.given = self.vae.encode(start[-opening:])
        for number, part in enumerate(made.parts if self.carry == "pixels" else ()):
            self._show(pixels, self._decode(part)[whole_frames(self.given_frames) if number else opening:])
        try:
            for segment in range(first, self.segments):
                comfy.model_management.throw_exception_if_processing_interrupted()
                self._segment(segment, sampler, made, pixels, whole_frames(self.given_frames) if segment else opening, saver)
        finally:
            if saver is not None:
                saver.close(made)
        if self.carry == "latents":
            self._show(pixels, self._decode(made.latents)[opening:])
        return torch.cat(pixels), made.latents if self.file is None else made.parts[-1]

    def _segment(self, segment: int, sampler, made: Segments, pixels: list[torch.Tensor], shown: int, saver: SegmentSaver | None) -> None:
        """Make one more segment, whose first `shown` video frames are already in the video."""
        given, frames = made.given, latent_frames(self.length)
        known = 0 if given is None else given.shape[2]
        text = f"segment {segment + 1} of {self.segments}, {known} of {frames} latent frames given"
        place = where.here()
        live.write(place, place and place.node, text)
        with backends.on_compile(lambda sentence: live.write(place, place and place.node, sentence or text)):
            new = sampler(segment, given, frames - known)
        whole = new if given is None else torch.cat([given.to(new), new], dim=2)
        if self.carry == "latents":
            made.add(new if made.parts else whole, new.shape[2], whole[:, :, -latent_frames(self.given_frames):])
        else:
            decoded = self._decode(whole)
            self._show(pixels, decoded[shown:])
            if saver is not None or segment + 1 < self.segments:
                given = self.vae.encode(decoded[-whole_frames(self.given_frames):])
            made.add(whole, new.shape[2], given)
        if saver is not None:
            saver.segment(made)
        elif self.file is not None:
            made.parts, made.new = [whole], [new.shape[2]]
        if self.file is not None:
            self.file.save(segment + 1, made.given)

    def _show(self, pixels: list[torch.Tensor], frames: torch.Tensor) -> None:
        """Append frames to the video: to the file, or to `pixels`."""
        if self.file is not None:
            self.file.add(frames)
            pixels.clear()
        pixels.append(frames)

    def resized(self, images: torch.Tensor) -> torch.Tensor:
        """Images [n, H, W, 3 or 4], cropped and scaled to the video's size, without alpha."""
        images = images[..., :3].movedim(-1, 1)
        return comfy.utils.common_upscale(images, self.width, self.height, "lanczos", "center").movedim(1, -1)

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        images = self.vae.decode(latents)
        return images.flatten(0, -4).cpu()
