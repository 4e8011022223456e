"""Stream Video to File (QVG): decodes frames and writes them while the video is made.

    QVGStreamVideo  SAMPLER, VAE -> SAMPLER that writes a file as the chunks come
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import folder_paths
import torch
from comfy.ldm.wan.vae import WanVAE
from comfy_api.latest import io

from ..qvg.files import InUse, Taken
from ..qvg.video.decode import to_bytes
from ..qvg.video.writer import VideoWriter
from .chunk_decoder import decoder_of
from .outputs import SIZES, check_prefix, places
from .session import require_ar_sampler

# latent frames between two flushes, when the frames of a resumed session are written
FLUSH_FRAMES = 12
FORMATS = {"MP4 (H.264)": ".mp4", "WebM (VP9)": ".webm", "PNG images": ".png"}


# node id -> the path that its latest execution announced, so that two nodes of a graph announce different paths
_announced: dict[str, Path] = {}


def announce(prefix: str, ending: str, node_id: str | None) -> Path | None:
    """Where the next video of a node will go unless another file takes the place; None if the name depends on the video's size."""
    if any(token in prefix for token in SIZES):
        check_prefix(prefix)
        return None
    others = {path for node, path in _announced.items() if node != node_id}
    path = next(path for path, _ in places(prefix, ending) if path not in others)
    if node_id is not None:
        _announced[node_id] = path
    return path


@dataclass(frozen=True)
class StreamTo:
    """What Stream Video to File (QVG) chose. announced: the file, if it does not exist yet when sampling starts.

    The file is opened when sampling starts, because ComfyUI can run a sampler again without the nodes before it.
    """

    vae: object
    prefix: str
    ending: str
    frame_rate: int
    announced: Path | None

    def open(self, sampler, base, session) -> Streamer:
        """Called by the `ARSampler` when sampling starts."""
        return Streamer(self, base, self._writer(*sampler.shape[2:]))

    def _writer(self, rows: int, columns: int) -> VideoWriter:
        pixels = self.vae.spacial_compression_decode()
        numbered = (path for path, _ in places(self.prefix, self.ending, columns * pixels, rows * pixels))
        for path in chain([self.announced] if self.announced else [], numbered):
            try:
                return VideoWriter(path, self.frame_rate)
            except (Taken, InUse):
                continue


class Streamer:
    """A recorder of an `ARSampler` or a walk: its methods are called as the video grows. video: the latents so far [B, C, F, H, W].

    newest: the frames that were written last [n, H, W, 3], uint8.
    """

    def __init__(self, place: StreamTo, base, writer: VideoWriter):
        self.base, self.writer = base, writer
        self.decode = decoder_of(place.vae, base.current_patcher)
        self.done = 0
        self.newest: torch.Tensor | None = None
        logging.info("QVG: streaming the video to %s", writer.path)

    def resume(self, video) -> None:
        """Write the frames of a resumed session."""
        for first in range(0, video.shape[2], FLUSH_FRAMES):
            self._write(video[:, :, :first + FLUSH_FRAMES])

    def chunk(self, event, video) -> None:
        self._write(video)

    def close(self, video) -> None:
        try:
            # an interrupt may have come between a chunk and its frames
            self._write(video, last=True)
        finally:
            self.writer.close()
            logging.info("QVG: %d frames are in %s", self.writer.frames, self.writer.path)

    def release(self) -> None:
        self.writer.release()

    def _write(self, video, last: bool = False) -> None:
        """Decode and write what the file lacks; of a batch, the first video."""
        new, self.done = video[:1, :, self.done:], video.shape[2]
        frames = []
        for part in self.decode(self.base.process_latent_out(new), last):
            frames.append(to_bytes(part[0]))
            self.writer.write(frames[-1])
        if frames:
            self.newest = torch.cat(frames)
        # if the disk refuses, the writer keeps the frames for the next flush
        self.writer.flush()


class QVGStreamVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QVGStreamVideo", display_name="Stream Video to File (QVG)", category="QuantVideoGen",
            description="Writes the video to a file while it is made: it can be watched as it grows, and an interrupt keeps what was "
                        "written.",
            search_aliases=["qvg", "save video", "live", "mp4", "webm", "preview"],
            inputs=[
                io.Sampler.Input("sampler", tooltip="From AR Video Sampler (QVG)."),
                io.Vae.Input("vae", tooltip="A Wan 2.1 VAE; frames are decoded chunk by chunk, as if all at once."),
                io.String.Input("filename_prefix", default="video/qvg",
                                tooltip="File name below the output folder; a number is added. Takes %date:yyyy-MM-dd%, %width% and the "
                                        "other tokens of ComfyUI's save nodes. Default: video/qvg."),
                io.Combo.Input("format", options=list(FORMATS), default="MP4 (H.264)", tooltip="MP4 plays everywhere. PNG is lossless. "
                                                                                               "Default: MP4 (H.264)."),
                io.Int.Input("frame_rate", default=16, min=1, max=120, tooltip="Frames per second: 16 for Wan 2.1."),
            ],
            outputs=[io.Sampler.Output(display_name="sampler", tooltip="The same sampler, which now writes the file."),
                     io.String.Output(display_name="path",
                                      tooltip="The file being written. If it exists when sampling starts, the next free number is used, "
                                              "and the log names it.")],
            hidden=[io.Hidden.unique_id])

    @classmethod
    def execute(cls, sampler, vae, filename_prefix, format, frame_rate) -> io.NodeOutput:
        require_ar_sampler(sampler)
        if not isinstance(vae.first_stage_model, WanVAE):
            raise ValueError(f"{type(vae.first_stage_model).__name__} cannot decode chunk by chunk. Load a Wan 2.1 VAE, or decode the "
                             "whole video with VAE Decode.")
        ending = FORMATS[format]
        announced = announce(filename_prefix, ending, cls.hidden.unique_id)
        shown = announced or Path(folder_paths.get_output_directory()) / f"{filename_prefix}_{ending}"
        return io.NodeOutput(sampler.changed(stream=StreamTo(vae, filename_prefix, ending, frame_rate, announced)), str(shown))
