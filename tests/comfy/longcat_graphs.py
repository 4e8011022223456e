"""A tiny random LongCat-Video in the official layout, with what belongs to it, and graphs over it."""

import json

import torch
from safetensors.torch import load_file, save_file

from comfy_client import Graph
from comfyui_qvg.qvg.models.longcat import PUBLISHED, LongCat, LongCatSizes
from comfyui_qvg.qvg.models.wan_vae import WanVAE

SIZES = LongCatSizes(dim=64, head_dim=16, ffn_dim=128, layers=2, text_dim=64, time_dim=16, freq_dim=32)
WIDTH, HEIGHT = 64, 48
LORA = "lora___lorahyphen___blocks___lorahyphen___1___lorahyphen___attn___lorahyphen___qkv"
PROMPTS = "red circle moving right, over blue dots still", "blue square still, over green stripes still"


def write_files(comfy_server) -> None:
    """One random model in both layouts and in parts, another one, a VAE, and one LoRA as published and as ComfyUI names it."""
    draw = torch.Generator().manual_seed(8)

    def noise(*shape, scale=1.0):
        return scale * torch.randn(shape, generator=draw)

    split = {}
    for name, tensor in LongCat(SIZES).state_dict().items():
        if tensor.ndim > 1:
            split[name] = noise(*tensor.shape, scale=1.2 / tensor[0].numel() ** 0.5)
        else:
            split[name] = (1 if "norm" in name and "weight" in name else 0) + noise(*tensor.shape, scale=0.3)
    official = {}
    for name, tensor in split.items():
        official.setdefault(PUBLISHED.published_name(name)[0], []).append(tensor)
    official = {name: torch.cat(parts) for name, parts in official.items()}
    models = comfy_server.folder("models", "diffusion_models")
    save_file(split, models / "longcat_split.safetensors")
    save_file(official, models / "longcat.safetensors")
    save_file(official | {"blocks.0.ffn.w1.weight": official["blocks.0.ffn.w1.weight"].flip(0)}, models / "longcat_other.safetensors")
    for number in (1, 2):
        save_file(dict(list(official.items())[number - 1::2]), models / f"longcat-0000{number}-of-00002.safetensors")

    vae = {name: noise(*tensor.shape, scale=0.1) for name, tensor in WanVAE(8).state_dict().items()}
    save_file(vae, comfy_server.folder("models", "vae") / "longcat_vae.safetensors")

    loras = comfy_server.folder("models", "loras")
    down, ups = noise(6, 64, scale=0.3), [noise(64, 2, scale=0.3) for _ in range(3)]
    published = {f"{LORA}.lora_down.weight": down, f"{LORA}.alpha_scale": torch.tensor(0.5)}
    published |= {f"{LORA}.lora_up.blocks.{number}.weight": up for number, up in enumerate(ups)}
    save_file(published, loras / "longcat_published.safetensors")
    named = {}
    for part, up, rows in zip("qkv", ups, down.chunk(3)):
        key = f"diffusion_model.blocks.1.self_attn.{part}"
        named |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": rows.contiguous(), f"{key}.alpha": torch.tensor(1.0)}
    save_file(named, loras / "longcat_named.safetensors")


def build(file="longcat.safetensors", dtype="default", preset="Balanced", lora=None, start=0, color=0xC04020, save=None, load=None, every=1,
          sampler=None, **settings) -> Graph:
    """Continue Video over the tiny model. start: how many frames are given, of that color. save, load: sessions, saved after `every`
    segments. sampler: of KSamplerSelect."""
    graph = Graph()
    model = graph.add("load", "QVGLoadARVideoModel", model_name=file, weight_dtype=dtype)
    if lora is not None:
        model = graph.add("lora", "LoraLoaderModelOnly", model=model, lora_name=f"longcat_{lora}.safetensors", strength_model=1.0)
    if preset is not None:
        model = graph.add("quantize", "QVGQuantizeKVCache", model=model, settings=graph.add("settings", "QVGSettings", preset=preset))
    prompts = [graph.add(name, "QVGDemoPrompt", text=text) for name, text in zip(("positive", "negative"), PROMPTS)]
    settings = {"width": WIDTH, "height": HEIGHT, "length": 17, "given_frames": 9, "segments": 1, "seed": 3, "steps": 2, "cfg": 4.0,
                "schedule": "base", "carry": "pixels", "fine_tail": False} | settings
    if start:
        settings["start"] = graph.add("start", "EmptyImage", width=WIDTH, height=HEIGHT, batch_size=start, color=color)
    if sampler or save:
        settings["sampler"] = graph.add("sampler", "KSamplerSelect", sampler_name=sampler or "euler")
    if save:
        settings["sampler"] = graph.add("keep", "QVGSaveVideoSession", sampler=settings["sampler"], name=save, every_chunks=every)
    if load:
        settings["session"] = graph.add("session", "QVGLoadVideoSession", name=load)
    graph.add("continue", "QVGLongCatContinue", model=model, positive=prompts[0], negative=prompts[1],
              vae=graph.add("vae", "VAELoader", vae_name="longcat_vae.safetensors"), **settings)
    graph.add("save", "SaveLatent", samples=["continue", 1], filename_prefix="longcat")
    graph.add("size", "GetImageSize", image=["continue", 0])
    graph.add("count", "PreviewAny", source=["size", 2])
    if preset is not None:
        graph.add("monitor", "QVGMemoryMonitor", model=["quantize", 0], samples=["continue", 1])
        graph.add("report", "PreviewAny", source=["monitor", 1])
    return graph


def run(comfy, graph):
    """(latents, how many frames, the monitor's report or None)"""
    outputs = comfy.run(graph)
    latents = load_file(comfy.output_path(outputs["save"]["latents"][0]))["latent_tensor"]
    assert latents.isfinite().all()
    report = json.loads(outputs["report"]["text"][0]) if "report" in outputs else None
    return latents, int(outputs["count"]["text"][0]), report
