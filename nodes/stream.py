"""Stream Video to File (QVG): frames are decoded and written while the video is made.

    QVGStreamVideo  SAMPLER, VAE -> SAMPLER that writes a file as the chunks come
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import comfy.model_management
import comfy.ops
import folder_paths
import torch
from comfy.ldm.wan.vae import WanVAE, count_cache_layers
from comfy_api.latest import io

from ..qvg.files import InUse, Taken
from ..qvg.video.decode import to_bytes
from ..qvg.video.writer import VideoWriter
from .outputs import SIZES, check_prefix, places
from .session import own

AT_A_TIME = 12  # latent frames between cuts, of a video that is there already
FORMATS = {"MP4 (H.264)": ".mp4", "WebM (VP9)": ".webm", "PNG images": ".png"}


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Core looks for an interrupt in every layer. Inside, it waits: one in the middle of a pass of the decoder would lose what its
    convolutions saw last, and with that all frames behind it."""
    check, comfy.ops.run_every_op = comfy.ops.run_every_op, lambda: None
    try:
        yield
    finally:
        comfy.ops.run_every_op = check


class CoreDecoder:
    """Core's Wan VAE with what its causal convolutions saw last; the frames of one decode of the whole.

    Core's decoder remembers the frames of one call, and reaches back two: so after the first frame it must be given two at a time, and
    an odd one waits for the next chunk, or for `last`.
    """

    def __init__(self, vae, patcher):
        self.vae, self.patcher = vae, patcher
        self.memory = [None] * count_cache_layers(vae.first_stage_model.decoder)
        self.begun = self.broken = False
        self.waiting: torch.Tensor | None = None

    def __call__(self, latents: torch.Tensor, last: bool = False) -> Iterator[torch.Tensor]:
        """[1, C, f, H, W] as VAE Decode takes them -> parts [1, 3, n, 8H, 8W] of the video, -1..1. What an interrupt leaves undecoded
        comes first the next time; behind a pass that failed nothing comes, because it lacks what was seen last."""
        self.waiting = latents if self.waiting is None else torch.cat([self.waiting, latents], 2)
        return self._parts(last)

    def _parts(self, last: bool) -> Iterator[torch.Tensor]:
        while not self.broken and (left := self.waiting.shape[2]) and (left > 1 or last or not self.begun):
            count = min(left, 2) if self.begun else 1
            part = self._decode(self.waiting[:, :, :count])
            self.waiting, self.begun = self.waiting[:, :, count:], True
            yield part

    @torch.no_grad()
    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        vae = self.vae
        # both are named, so that the network is not sent away to make room for the VAE
        comfy.model_management.load_models_gpu([self.patcher, vae.patcher],
                                               memory_required=vae.memory_used_decode(latents.shape, vae.vae_dtype))
        try:
            with _undisturbed():
                z = vae.first_stage_model.conv2(latents.to(vae.device, vae.vae_dtype))
                return torch.cat(vae.first_stage_model.decoder(z, feat_cache=self.memory, feat_idx=[0]), 2)
        except BaseException:
            # half a pass has replaced some of it, and a copy to go back to would take as much memory again
            self.broken = True
            raise


# node id -> the path that its latest execution announced, so that two nodes of a graph announce two
_announced: dict[str, Path] = {}


def announce(prefix: str, ending: str, node_id: str | None) -> Path | None:
    """Where the next video of a node will go, unless another takes that place; None where the name depends on the video's size."""
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
    """Part of an `ARSampler`. The file is chosen when sampling starts, because ComfyUI runs a sampler again without the nodes before it.

    announced: where it goes if nothing is there."""

    vae: object
    prefix: str
    ending: str
    frame_rate: int
    announced: Path | None

    def open(self, sampler, base, session) -> Streamer:
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
    def __init__(self, place: StreamTo, base, writer: VideoWriter):
        self.base, self.writer = base, writer
        self.decode = CoreDecoder(place.vae, base.current_patcher)
        self.done = 0
        logging.info("QVG: the video grows in %s", writer.path)

    def resume(self, video) -> None:
        for first in range(0, video.shape[2], AT_A_TIME):
            self._write(video[:, :, :first + AT_A_TIME])

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
        """Bring the file up to the end of the latents [B, C, F, H, W]; of a batch, the first video."""
        new, self.done = video[:1, :, self.done:], video.shape[2]
        for part in self.decode(self.base.process_latent_out(new), last):
            self.writer.write(to_bytes(part[0]))
        # where the disk refuses, the writer keeps the frames for the next time
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
        own(sampler)
        if not isinstance(vae.first_stage_model, WanVAE):
            raise ValueError(f"{type(vae.first_stage_model).__name__} cannot decode chunk by chunk. Load a Wan 2.1 VAE, or decode the "
                             "whole video with VAE Decode.")
        ending = FORMATS[format]
        announced = announce(filename_prefix, ending, cls.hidden.unique_id)
        shown = announced or Path(folder_paths.get_output_directory()) / f"{filename_prefix}_{ending}"
        return io.NodeOutput(sampler.changed(stream=StreamTo(vae, filename_prefix, ending, frame_rate, announced)), str(shown))
