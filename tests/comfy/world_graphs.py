"""Tiny random HY-WorldPlay checkpoints in the published layouts, in the folders of a ComfyUI server, and graphs over them."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from comfy_client import Graph
from comfyui_qvg.qvg.models import worldplay_hunyuan, worldplay_wan
from random_models import worldplay_state

PUBLISHED = {"5b": worldplay_wan.PUBLISHED.layer_name, "8b": worldplay_hunyuan.PUBLISHED.layer_name}
SIZES = {"5b": (96, 64), "8b": (48, 32)}
MOVES = "right-11, left-12"  # 24 latent frames: turn away, turn back
PROMPTS = "red circle moving right, over blue dots still", "blue square still, over green stripes still"
# core's VAEs of these models have sizes fixed in code, of a gigabyte
VAE_NODE = f"""
import sys

sys.path.insert(0, {str(Path(__file__).parent)!r})


class TinyWorldVAE:
    RETURN_TYPES, FUNCTION, CATEGORY = ("VAE",), "load", "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {{"required": {{"variant": ("STRING",)}}}}

    def load(self, variant):
        from in_process import world_vae

        return (world_vae(variant),)


NODE_CLASS_MAPPINGS = {{"TinyWorldVAE": TinyWorldVAE}}
"""


def prepare(server) -> None:
    """Before a server starts: its checkpoints, and the node that makes VAEs."""
    models = server.folder("models", "diffusion_models")
    for variant, published in PUBLISHED.items():
        state = worldplay_state(variant)
        save_file({_renamed(name, published): tensor for name, tensor in state.items()}, models / f"world_{variant}.safetensors")
    (server.folder("custom_nodes") / "tiny_world_vae.py").write_text(VAE_NODE)


def _renamed(name: str, published) -> str:
    layer, dot, last = name.rpartition(".")
    if last in ("weight", "bias"):
        return f"{published(layer)[0]}{dot}{last}"
    return published(name)[0]


def build(variant="5b", preset="Balanced", moves=MOVES, save=None, load=None, **settings) -> Graph:
    """World Walk over a tiny model. save, load: sessions."""
    graph = Graph()
    model = graph.add("load", "QVGLoadARVideoModel", model_name=f"world_{variant}.safetensors", weight_dtype="default")
    model = graph.add("quantize", "QVGQuantizeKVCache", model=model, settings=graph.add("settings", "QVGSettings", preset=preset))
    prompts = [graph.add(name, "QVGDemoPrompt", text=text) for name, text in zip(("positive", "negative"), PROMPTS)]
    width, height = SIZES[variant]
    settings = {"width": width, "height": height, "seed": 3, "schedule": "distilled", "steps": 2, "cfg": 1.0,
                "memory": "rebuild"} | settings
    if save:
        settings["sampler"] = graph.add("keep", "QVGSaveVideoSession", sampler=graph.add("sampler", "KSamplerSelect", sampler_name="euler"),
                                        name=save, every_chunks=1)
    if load:
        settings["session"] = graph.add("session", "QVGLoadVideoSession", name=load)
    else:
        settings["start_image"] = graph.add("start", "EmptyImage", width=width, height=height, batch_size=1, color=0xC04020)
    graph.add("walk", "QVGWorldWalk", model=model, positive=prompts[0], negative=prompts[1],
              vae=graph.add("vae", "TinyWorldVAE", variant=variant),
              camera_path=graph.add("path", "QVGCameraPath", source="moves", moves=moves, frames=0), **settings)
    graph.add("save", "SaveLatent", samples=["walk", 1], filename_prefix="walk")
    graph.add("size", "GetImageSize", image=["walk", 0])
    graph.add("count", "PreviewAny", source=["size", 2])
    graph.add("monitor", "QVGMemoryMonitor", model=["quantize", 0], samples=["walk", 1])
    graph.add("report", "PreviewAny", source=["monitor", 1])
    return graph


def results(comfy, outputs):
    """(latents, frames, the monitor's report, the node's text)"""
    latents = load_file(comfy.output_path(outputs["save"]["latents"][0]))["latent_tensor"]
    return latents, int(outputs["count"]["text"][0]), json.loads(outputs["report"]["text"][0]), outputs["walk"]["qvg_text"][0]
