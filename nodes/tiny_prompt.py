"""Tiny Scene Prompt (QVG): conditioning for the tiny model, which needs no text encoder, and a start image.

    QVGDemoPrompt  text -> CONDITIONING, IMAGE
"""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..qvg.demo import PROMPTS
from ..qvg.demo.prompts import embed_scene, parse_prompt
from ..qvg.demo.scenes import HEIGHT, WIDTH, place, render


class QVGDemoPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QVGDemoPrompt", display_name="Tiny Scene Prompt (QVG)", category="QuantVideoGen",
            description="A prompt for the tiny model that comes with the pack, and a start image that shows it.",
            search_aliases=["qvg", "tiny", "demo", "prompt", "start image"],
            inputs=[
                io.String.Input(
                    "text", multiline=True, default=PROMPTS[0],
                    tooltip="One or two shapes and, after 'over', a background, in the tiny model's words. Colours: red orange yellow "
                            "green cyan blue purple pink white. Patterns: plain striped dotted. Shapes: circle square triangle star "
                            "ring. Motion: still, or moving or racing left, right, up, down. Background: dots stripes checks waves, "
                            "still or panning with a direction."),
                io.Int.Input("seed", default=0, min=0, max=2**31 - 1, optional=True, advanced=True, control_after_generate=False,
                             tooltip="Positions and sizes of the shapes in start_image. The conditioning does not depend on it. Default: "
                                     "0."),
            ],
            outputs=[
                io.Conditioning.Output(display_name="conditioning", tooltip="For the tiny model only."),
                io.Image.Output(display_name="start_image",
                                tooltip=f"The scene's first frame, {WIDTH} x {HEIGHT} pixels, for AR Video I2V."),
            ])

    @classmethod
    def execute(cls, text, seed=0) -> io.NodeOutput:
        scene = parse_prompt(text)
        picture = render(place([scene], torch.Generator().manual_seed(seed)), frames=1)[:, :, 0]
        return io.NodeOutput([[embed_scene(scene), {}]], picture.movedim(1, -1) / 2 + 0.5)
