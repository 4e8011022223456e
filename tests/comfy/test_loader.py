"""Load AR Video Model (QVG) in the real ComfyUI: a training checkpoint as published samples as its repackaged file does."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from comfy_client import ComfyError
from comfyui_qvg.qvg.demo import METADATA, PROMPTS, TEXT_DIM
from comfyui_qvg.qvg.models.wan import CausalWan, WanSizes


@pytest.fixture(scope="module", autouse=True)
def files(comfy_server):
    """One random causal Wan as a training checkpoint, as bare safetensors and as core wants it, and a LoRA."""
    draw = torch.Generator().manual_seed(3)
    network = CausalWan(WanSizes(dim=256, ffn_dim=256, layers=2, text_dim=TEXT_DIM))
    state = {name: 0.05 * torch.randn(tensor.shape, generator=draw) for name, tensor in network.state_dict().items()}
    folder = comfy_server.folder("models", "diffusion_models")
    save_file(state, folder / "loader_core.safetensors", metadata=METADATA)
    save_file(state, folder / "loader.safetensors")
    torch.save({"generator": {}, "generator_ema": {f"model.{name}": tensor for name, tensor in state.items()}}, folder / "loader.pt")
    save_file({"blocks.0.self_attn.q.lora_A.weight": torch.zeros(1, 1)}, folder / "loader_lora.safetensors")
    loras = comfy_server.folder("models", "loras")
    down, up = torch.randn(2, 256, generator=draw), torch.randn(256, 2, generator=draw)
    for name, layer in (("published", "transformer.blocks.1.attn1.to_q"), ("comfy", "diffusion_model.blocks.1.self_attn.q"),
                        ("strange", "lora_unet_down_blocks_0_attn1_to_q")):
        save_file({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}, loras / f"loader_{name}.safetensors")
    torch.save({"generator_lora": {f"base_model.model.blocks.1.self_attn.q.lora_{side}.weight": t for side, t in (("A", down), ("B", up))},
                "critic_lora": {}, "step": 1}, loras / "loader_lora.pt")


def sample(comfy, loader, quantized=False, lora=None):
    model = ["load", 0]
    nodes = {
        "load": loader, "prompt": {"class_type": "QVGDemoPrompt", "inputs": {"text": PROMPTS[0]}},
        "latent": {"class_type": "EmptyARVideoLatent", "inputs": {"width": 96, "height": 64, "length": 21, "batch_size": 1}},
        "sampler": {"class_type": "SamplerARVideo", "inputs": {"num_frame_per_block": 3}},
        "noise": {"class_type": "RandomNoise", "inputs": {"noise_seed": 1}},
    }
    if lora:
        nodes["lora"] = {"class_type": "LoraLoaderModelOnly", "inputs": {"model": model, "lora_name": lora, "strength_model": 1.0}}
        model = ["lora", 0]
    if quantized:
        nodes["quantize"] = {"class_type": "QVGQuantizeKVCache", "inputs": {"model": model}}
        model = ["quantize", 0]
    nodes |= {
        "guider": {"class_type": "BasicGuider", "inputs": {"model": model, "conditioning": ["prompt", 0]}},
        "sigmas": {"class_type": "BasicScheduler", "inputs": {"model": model, "scheduler": "simple", "steps": 4, "denoise": 1.0}},
        "sample": {"class_type": "SamplerCustomAdvanced", "inputs": {
            "noise": ["noise", 0], "guider": ["guider", 0], "sampler": ["sampler", 0], "sigmas": ["sigmas", 0],
            "latent_image": ["latent", 0]}},
        "save": {"class_type": "SaveLatent", "inputs": {"samples": ["sample", 0], "filename_prefix": "loader"}},
    }
    outputs = comfy.run(nodes)
    return load_file(comfy.output_path(outputs["save"]["latents"][0]))["latent_tensor"]


def ours(name, dtype="default"):
    return {"class_type": "QVGLoadARVideoModel", "inputs": {"model_name": name, "weight_dtype": dtype}}


@pytest.mark.parametrize("name", ["loader.pt", "loader.safetensors", "loader_core.safetensors"])
def test_every_wrapping_samples_as_core_does(comfy, name):
    core = {"class_type": "UNETLoader", "inputs": {"unet_name": "loader_core.safetensors", "weight_dtype": "default"}}
    assert torch.equal(sample(comfy, ours(name)), sample(comfy, core))
    found = comfy.wait_for("executed", lambda data: data["node"] == "load")["output"]["qvg_text"][0]
    assert found.startswith(f"{name}: causal Wan 2.1 layout, 2 layers, 2 heads")


def test_fp8_weights_with_the_quantized_cache(comfy):
    assert sample(comfy, ours("loader.pt", "fp8_e4m3fn"), quantized=True).isfinite().all()


def test_a_lora_is_refused(comfy):
    with pytest.raises(ComfyError, match=r"loader_lora\.safetensors is a LoRA, not a model.*LoraLoaderModelOnly"):
        sample(comfy, ours("loader_lora.safetensors"))


def test_loras_of_every_maker_make_the_same_video(comfy):
    """The names of diffusers, LongLive's dict of networks and core's own names."""
    plain, *videos = (sample(comfy, ours("loader.pt"), lora=name) for name in (
        None, "loader_comfy.safetensors", "loader_published.safetensors", "loader_lora.pt"))
    assert not torch.equal(videos[0], plain)
    assert all(torch.equal(video, videos[0]) for video in videos[1:])


def test_a_lora_of_another_model_stops_the_graph(comfy):
    with pytest.raises(ComfyError, match=r"None of this LoRA's 2 keys belongs to the Wan 2\.1 model \(it holds lora_unet_down_blocks_0"):
        sample(comfy, ours("loader.pt"), lora="loader_strange.safetensors")


def test_files_of_both_kinds_are_listed(comfy):
    required = comfy.object_info("QVGLoadARVideoModel")["QVGLoadARVideoModel"]["input"]["required"]
    assert {"loader.pt", "loader.safetensors"} <= set(required["model_name"][1]["options"])
