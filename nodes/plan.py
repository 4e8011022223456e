"""Plan KV Memory (QVG): what a video's cache will need, before anything is loaded. The figures are those of `qvg plan`.

    QVGPlanMemory  model name, size, seconds -> table, JSON, longest length that fits
"""

from __future__ import annotations

import comfy.model_management
from comfy_api.latest import io

from ..qvg.models.catalogue import MODELS
from ..qvg.models.weights import WEIGHTS
from ..qvg.report import plan
from ..qvg.units import GIB
from .kv_cache import LABELS
from .live import TEXT

UNCOUNTED = "not counted"


class QVGPlanMemory(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QVGPlanMemory", display_name="Plan KV Memory (QVG)", category="QuantVideoGen", is_output_node=True,
            description="Forecasts how many GiB the KV cache of a video takes at every preset, and the longest video that fits.",
            search_aliases=["memory", "vram", "kv cache", "forecast", "how long", "qvg"],
            inputs=[
                io.Combo.Input("model", options=list(MODELS), tooltip="The model whose layers and heads are counted."),
                io.Int.Input("width", default=0, min=0, max=8192, step=16, tooltip="Pixels; 0 is the model's usual width."),
                io.Int.Input("height", default=0, min=0, max=8192, step=16, tooltip="Pixels; 0 is the model's usual height."),
                io.Float.Input("seconds", default=30.0, min=0.1, max=36000.0, step=0.5, tooltip="Length of the video. Default: 30."),
                io.Combo.Input("preset", options=list(LABELS), default="Balanced", tooltip="The preset for which the output longest is "
                                                                                           "computed. Default: Balanced."),
                io.Float.Input("memory_gib", default=0.0, min=0.0, max=10000.0, step=0.5, optional=True,
                               tooltip="GiB that the cache may take, model weights not included. 0 is what is free on this device when the "
                                       "node runs."),
                io.Boolean.Input("offload", default=False, optional=True, advanced=True,
                                 tooltip="Plan for a cache in host memory, as with offload in QVG Settings. Default: off."),
                io.Combo.Input("weights", options=[UNCOUNTED, *WEIGHTS], default=UNCOUNTED, optional=True,
                               tooltip="Data type of the model's weights, to count them too: memory_gib is then a whole card (0: this "
                                       "one), from which the weights and 2 GiB for activations are subtracted. Default: not counted."),
            ],
            outputs=[
                io.String.Output(display_name="table", tooltip="One line per preset: stored, peak, ratios, whether it fits."),
                io.String.Output(display_name="report", tooltip="JSON, with all sizes in bytes."),
                io.Int.Output(display_name="longest", tooltip="Video frames of the longest video that fits, for the length of a latent "
                                                              "node; 0 if not even one chunk fits."),
            ])

    @classmethod
    def fingerprint_inputs(cls, memory_gib=0.0, **_):
        # free memory changes while the inputs stay
        return memory_gib or float(comfy.model_management.get_free_memory())

    @classmethod
    def execute(cls, model, width, height, seconds, preset, memory_gib=0.0, offload=False, weights=UNCOUNTED) -> io.NodeOutput:
        if weights == UNCOUNTED:
            weights, memory = "", memory_gib or comfy.model_management.get_free_memory() / GIB
        else:
            memory = plan.left_for_cache(model, memory_gib or comfy.model_management.get_total_memory() / GIB, weights,
                                         required=True)
        found = plan.plan(model, size=(width, height), seconds=seconds, vram_gib=memory, offload=offload, weights=weights)
        table = plan.render(found, memory)
        # a Wan VAE makes one frame of the first latent frame and four of each other
        frames = found["presets"][LABELS[preset]]["longest_latent_frames"]
        return io.NodeOutput(table, plan.to_json(found), 4 * frames - 3 if frames else 0, ui={TEXT: [plan.brief(found, memory)]})
