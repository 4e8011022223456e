"""QVG Settings and Quantize KV Cache (QVG): the one node that a graph needs, and its settings.

    QVGSettings         preset and expert settings -> QVG_SETTINGS
    QVGQuantizeKVCache  MODEL (+ QVG_SETTINGS) -> MODEL whose cache is quantized while it samples
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from aiohttp import web
from comfy_api.latest import io
from server import PromptServer

from ..qvg.settings import ATTENTIONS, COARSE, CODECS, PLAIN_BITS, PRESETS, QVGSettings, TensorSettings
from .adapters.families import adapter_of, family_of

Settings = io.Custom("QVG_SETTINGS")
LABELS = {name.capitalize(): name for name in PRESETS}
KEEP = "preset"
ROUTE = "/qvg/presets"
# inputs that apply to keys and values alike -> fields of both
SHARED = {"stages": "stages", "centroids": "centroids", "group_size": "group"}
# inputs that no preset sets
PLAIN = ("budget_gib", "seed", "offload", "host_gib", "attention")


def codecs() -> list[str]:
    """Those to choose from: the others do no more than all do with 8 and 16 bits."""
    return sorted((name for name in CODECS if min(CODECS[name].widths) < min(PLAIN_BITS)), reverse=True)


def values_of(settings: QVGSettings) -> dict:
    """The values of the inputs of QVG Settings that correspond to these settings, by input name and in their types."""
    key, value = settings.key, settings.value
    return {
        "key_bits": str(key.bits), "value_bits": str(value.bits), "stages": key.stages, "centroids": key.centroids,
        "group_size": str(key.group), "sink_frames": settings.sink_frames, "sink_bits": str(settings.sink_bits),
        "recent_frames": settings.recent_frames, "recent_bits": str(settings.recent_bits), "window_frames": settings.window_frames,
        "codec": settings.codec}


async def presets(request: web.Request) -> web.Response:
    """The values of each preset, which the node shows (web/js/settings.js), and those of codebooks with another codec than the preset's."""
    codebooks = {name: value for name, value in values_of(QVGSettings()).items() if name in SHARED}
    return web.json_response({"presets": {label: values_of(PRESETS[name]) for label, name in LABELS.items()}, "codebooks": codebooks})


def add_route() -> None:
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.routes.get(ROUTE)(presets)


def knob(name: str, options: Sequence, tooltip: str) -> io.Combo.Input:
    return io.Combo.Input(name, options=[KEEP, *map(str, options)], default=KEEP, advanced=True, optional=True,
                          tooltip=f"{tooltip} 'preset', the default, takes the preset's value.")


def count(name: str, high: int, tooltip: str) -> io.Int.Input:
    return io.Int.Input(name, default=-1, min=-1, max=high, advanced=True, optional=True,
                        tooltip=f"{tooltip} -1, the default, takes the preset's value.")


class QVGSettingsNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        bits = sorted({width for name in codecs() for width in CODECS[name].widths})
        return io.Schema(
            node_id="QVGSettings", display_name="QVG Settings", category="QuantVideoGen",
            description="How many bits per element the KV cache of an autoregressive video model keeps.",
            search_aliases=["kv cache", "quantize", "long video", "2-bit", "vram", "qvg"],
            inputs=[
                io.Combo.Input("preset", options=list(LABELS), default="Balanced",
                               tooltip="Off: the model's own cache. Quality: closest to bf16. Balanced: the default. Smallest: for long "
                                       "video or a small card. Tiny: for the longest video. Paper: QVG as released, for comparison."),
                knob("key_bits", bits,
                     "Bits per element of old keys. More are closer to bf16; fewer allow longer video. Fractions of a bit need the codec "
                     "transform."),
                knob("value_bits", bits,
                     "Bits per element of old values. More are closer to bf16; fewer allow longer video. Fractions of a bit need the codec "
                     "transform."),
                count("stages", 4,
                      "Codebooks subtracted one after another (0 to 4); each costs 1/16 bit per element. More are closer to bf16, and "
                      "slower. The codec transform has none."),
                count("centroids", 256,
                      "Entries of a codebook (1 to 256). More are closer to bf16, and slower. The codec transform has none."),
                knob("group_size", [16, 32, 64, 128],
                     "Channels that share a scale; fewer are more exact and cost more bits. With the codec transform it matters for 8 bits "
                     "only."),
                count("sink_frames", 1000,
                      "First latent frames, kept permanently at sink_bits. More are closer to bf16 and take more memory."),
                knob("sink_bits", bits,
                     "Bits per element of the first frames. More are closer to bf16; fewer allow longer video."),
                count("recent_frames", 1000,
                      "Newest latent frames, held at recent_bits until newer ones follow. More are closer to bf16 and take more memory."),
                knob("recent_bits", bits,
                     "Bits per element of the newest frames. More are closer to bf16; fewer allow longer video."),
                count("window_frames", 100000, "Latent frames kept besides the first ones; 0 keeps all. Set it for endless video."),
                io.Float.Input("budget_gib", default=0.0, min=0.0, max=1000.0, step=0.1, advanced=True, optional=True,
                               tooltip="Memory budget of cache and workspace in GiB. Above it, the oldest frames lose bits, then are "
                                       "dropped. 0, the default, is no limit. Set it when the card is shared or the video is endless."),
                io.Int.Input("seed", default=0, min=0, max=2**31 - 1, advanced=True, optional=True, control_after_generate=False,
                             tooltip="Seed of k-means, which the codec transform does not need. It does not change the sampler's noise. "
                                     "Default: 0."),
                io.Boolean.Input("offload", default=False, advanced=True, optional=True,
                                 tooltip="Keep the cache in host memory (RAM) and copy it to the GPU one layer ahead of the computation. "
                                         "The video is the same; the GPU holds two layers instead of all. Default: off; turn it on when "
                                         "the card is full and RAM is not."),
                io.Float.Input("host_gib", default=0.0, min=0.0, max=100000.0, step=0.5, advanced=True, optional=True,
                               tooltip="Host memory budget of offloaded frames in GiB. Above it, the oldest frames lose bits, then are "
                                       "dropped. 0, the default, is no limit."),
                # new ones are the last, because saved graphs have values by their place
                knob("codec", codecs(),
                     "How keys and values are kept. transform: bits for the directions in which tokens differ most. qvg: codebooks and "
                     "whole bits of what is left. paper: QVG as released."),
                io.Combo.Input("attention", options=list(ATTENTIONS), default=ATTENTIONS[0], advanced=True, optional=True,
                               tooltip="How the model attends to the cache. exact: as without quantization. fast: in eight bits to what is "
                                       f"held in {COARSE:g} bits or fewer, and exactly to the rest. auto, the default: fast where that "
                                       "loses next to nothing and is known to be faster on this GPU; the monitor says which and why."),
            ],
            outputs=[Settings.Output(display_name="settings", tooltip="For Quantize KV Cache (QVG).")])

    @classmethod
    def execute(cls, preset, **knobs) -> io.NodeOutput:
        return io.NodeOutput(changed(QVGSettings.preset(LABELS[preset]), knobs))


def changed(settings: QVGSettings, knobs: dict) -> QVGSettings:
    """A preset's settings with the values of the node's other inputs, by their names; KEEP and -1 keep the preset's value."""
    given = {name: value for name, value in knobs.items() if name not in PLAIN and value not in (KEEP, -1)}
    codec = given.pop("codec", settings.codec)
    given = {name: float(value) if name.endswith("_bits") else int(value) for name, value in given.items()}
    # a preset of another codec may have none of what this one needs
    shared = {} if codec == settings.codec else {field: getattr(TensorSettings(), field) for field in (*SHARED.values(), "options")}
    shared |= {field: given.pop(name) for name, field in SHARED.items() if name in given}
    sides = {}
    for side in ("key", "value"):
        bits = given.pop(f"{side}_bits", None)
        sides[side] = replace(getattr(settings, side), **shared if bits is None else shared | {"bits": bits})
    return replace(settings, codec=codec, **given, **sides, **{name: knobs[name] for name in PLAIN if name in knobs})


class QVGQuantizeKVCache(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QVGQuantizeKVCache", display_name="Quantize KV Cache (QVG)", category="QuantVideoGen",
            description="Keeps the KV cache of an autoregressive video model in one or two bits per element while it samples.",
            search_aliases=["kv cache", "quantize", "long video", "2-bit", "vram", "qvg", "self forcing", "causal forcing"],
            inputs=[
                io.Model.Input("model", tooltip="A causal video model (Self-Forcing, Causal-Forcing), LongCat-Video, or HY-WorldPlay."),
                Settings.Input("settings", optional=True, tooltip="From QVG Settings; without it, the preset Balanced."),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The same weights with a quantized cache.")],
            hidden=[io.Hidden.unique_id])

    @classmethod
    def execute(cls, model, settings=None) -> io.NodeOutput:
        network = model.get_model_object("diffusion_model")
        family = family_of(network)
        if family is None:
            raise ValueError(f"{type(network).__name__} is not an autoregressive video model: it has no KV cache to quantize. Load a "
                             "Self-Forcing or Causal-Forcing checkpoint with Load AR Video Model (QVG).")
        return io.NodeOutput(adapter_of(family).quantize(model, settings or QVGSettings.preset("balanced"), cls.hidden.unique_id))
