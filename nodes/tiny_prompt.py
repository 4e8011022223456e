"""Tiny Scene Prompt (QVG): words for the embedded tiny model, which needs no text encoder.

    QVGDemoPrompt  text -> CONDITIONING
"""

from __future__ import annotations

from comfy_api.latest import io

from ..qvg.demo.prompts import embed_prompt


class QVGDemoPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QVGDemoPrompt", display_name="Tiny Scene Prompt (QVG)", category="model/conditioning/autoregressive",
            description="Describes a scene to the tiny model that comes with the pack.",
            search_aliases=["qvg", "tiny", "demo", "prompt"],
            inputs=[io.String.Input("text", multiline=True, default="red striped circle moving right, blue square still, "
                                    "over green dots panning left",
                                    tooltip="One or two shapes and a background, in the tiny model's words.")],
            outputs=[io.Conditioning.Output(display_name="conditioning", tooltip="For the tiny model alone.")])

    @classmethod
    def execute(cls, text) -> io.NodeOutput:
        return io.NodeOutput([[embed_prompt(text), {}]])
