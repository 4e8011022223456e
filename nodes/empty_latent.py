"""Empty Long Video Latent (QVG): an empty latent of any length, given in seconds.

    QVGEmptyLongVideoLatent  seconds (+ VAE) -> LATENT
"""

from __future__ import annotations

import comfy.model_management
import torch
from comfy_api.latest import io

from ..qvg.video import latent_frames


class QVGEmptyLongVideoLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QVGEmptyLongVideoLatent", display_name="Empty Long Video Latent (QVG)", category="QuantVideoGen",
            description="An empty video latent of any length, given in seconds.",
            search_aliases=["qvg", "long video", "empty latent", "seconds"],
            inputs=[
                io.Float.Input("seconds", default=10.0, min=0.1, max=86400.0, step=0.1, tooltip="Length of the video, rounded up to whole "
                                                                                                "latent frames. Default: 10."),
                io.Int.Input("frame_rate", default=16, min=1, max=120, tooltip="The model's frames per second: 16 for Wan 2.1."),
                io.Int.Input("width", default=832, min=16, max=8192, step=16, tooltip="Pixels. Default: 832."),
                io.Int.Input("height", default=480, min=16, max=8192, step=16, tooltip="Pixels. Default: 480."),
                io.Int.Input("batch_size", default=1, min=1, max=64, advanced=True, tooltip="Videos made at the same time. Default: 1."),
                io.Vae.Input("vae", optional=True, tooltip="Channels and strides are read from this VAE; without it, those of Wan 2.1 are "
                                                           "used."),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="For the sampler."),
                     io.Int.Output(display_name="latent_frames", tooltip="Number of latent frames.")])

    @classmethod
    def execute(cls, seconds, frame_rate, width, height, batch_size, vae=None) -> io.NodeOutput:
        channels, space, stride = (16, 8, 4) if vae is None else (
            vae.latent_channels, vae.spacial_compression_encode(), vae.temporal_compression_decode() or 1)
        frames = latent_frames(seconds, frame_rate, stride)
        samples = torch.zeros([batch_size, channels, frames, height // space, width // space],
                              device=comfy.model_management.intermediate_device())
        return io.NodeOutput({"samples": samples}, frames)
