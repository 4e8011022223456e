"""The quantized cache in the real ComfyUI, on a random two-layer causal Wan: mechanics, not picture quality."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from comfy_client import ComfyError
from comfyui_qvg.qvg.demo import PROMPTS, TEXT_DIM
from comfyui_qvg.qvg.models.wan import CausalWan, WanSizes

CONFIG = {"config": json.dumps({"transformer": {"causal_ar": True, "text_dim": TEXT_DIM}})}


@pytest.fixture(scope="module", autouse=True)
def checkpoints(comfy_server):
    """random_causal.safetensors and, without the causal metadata, random_plain.safetensors."""
    torch.manual_seed(0)
    network = CausalWan(WanSizes(dim=256, ffn_dim=256, layers=2, text_dim=TEXT_DIM))
    state = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
    draw = torch.Generator().manual_seed(0)
    for name, tensor in state.items():
        noise = torch.randn(tensor.shape, generator=draw)
        state[name] = 1 + 0.1 * noise if name.endswith("norm_q.weight") or name.endswith("norm_k.weight") else 0.06 * noise
    folder = comfy_server.folder("models", "diffusion_models")
    save_file(state, folder / "random_causal.safetensors", metadata=CONFIG)
    save_file(state, folder / "random_plain.safetensors", metadata={"config": json.dumps({"transformer": {"text_dim": TEXT_DIM}})})


def graph(preset=None, frames=12, block=3, checkpoint="random_causal.safetensors", cfg=1.0, dtype="default", **settings):
    """Core's own autoregressive graph, with our node in it where a preset is named."""
    model = ["load", 0]
    nodes = {
        "load": {"class_type": "UNETLoader", "inputs": {"unet_name": checkpoint, "weight_dtype": dtype}},
        "prompt": {"class_type": "QVGDemoPrompt", "inputs": {"text": PROMPTS[0]}},
        "latent": {"class_type": "EmptyARVideoLatent", "inputs": {"width": 96, "height": 64, "length": 4 * frames - 3, "batch_size": 1}},
        "sampler": {"class_type": "SamplerARVideo", "inputs": {"num_frame_per_block": block}},
    }
    if preset:
        nodes["settings"] = {"class_type": "QVGSettings", "inputs": {"preset": preset, **settings}}
        nodes["quantize"] = {"class_type": "QVGQuantizeKVCache", "inputs": {"model": model, "settings": ["settings", 0]}}
        model = ["quantize", 0]
    nodes |= {
        "sigmas": {"class_type": "BasicScheduler", "inputs": {"model": model, "scheduler": "simple", "steps": 4, "denoise": 1.0}},
        "sample": {"class_type": "SamplerCustom", "inputs": {
            "model": model, "add_noise": True, "noise_seed": 5, "cfg": cfg, "positive": ["prompt", 0], "negative": ["prompt", 0],
            "sampler": ["sampler", 0], "sigmas": ["sigmas", 0], "latent_image": ["latent", 0]}},
        "save": {"class_type": "SaveLatent", "inputs": {"samples": ["sample", 0], "filename_prefix": "qvg"}},
    }
    return nodes


def sample(comfy, **kwargs):
    outputs = comfy.run(graph(**kwargs))
    return load_file(comfy.output_path(outputs["save"]["latents"][0]))["latent_tensor"]


def test_off_is_bit_identical(comfy):
    assert torch.equal(sample(comfy), sample(comfy, preset="Off"))


@pytest.mark.parametrize("block", [1, 2, 3, 5])
def test_sixteen_bits_equal_core(comfy, block):
    """Everything as a sink at 16 bits: our attention and positions over exact keys are core's."""
    exact = sample(comfy, block=block)
    ours = sample(comfy, preset="Balanced", block=block, sink_frames=100, sink_bits="16")
    assert (ours - exact).abs().max() < 1e-3 * exact.abs().max()


@pytest.mark.parametrize("preset", ["Quality", "Balanced", "Smallest", "Tiny", "Paper"])
def test_presets_run_and_leave_the_model_alone(comfy, preset):
    before = sample(comfy)
    quantized = sample(comfy, preset=preset)
    assert quantized.isfinite().all() and not torch.equal(quantized, before)
    assert torch.equal(sample(comfy), before)


def test_other_codecs_and_fractions_of_a_bit(comfy):
    """The chosen codec keeps the cache: an exact one where it holds 16 bits, and closer to it the more bits it has."""
    exact = sample(comfy)
    whole, wide, few = (sample(comfy, preset="Off", codec="transform", key_bits=bits, value_bits=bits) for bits in ("16", "4", "0.75"))
    assert (whole - exact).abs().max() < 1e-3 * exact.abs().max()
    assert 0 < (wide - exact).square().mean() < 0.3 * (few - exact).square().mean()
    with pytest.raises(ComfyError, match=r"key is to hold 0\.5 bits, but the qvg codec holds 1, 2, 3, 4, 8, 16"):
        sample(comfy, preset="Tiny", codec="qvg")


def test_fp8_weights(comfy):
    """Core's own cache cannot hold what fp8 weights compute; ours takes the type of the keys themselves."""
    assert sample(comfy, preset="Balanced", dtype="fp8_e4m3fn").isfinite().all()


@pytest.mark.parametrize(("kwargs", "words"), [
    ({"cfg": 3.0}, "Set cfg to 1"), ({"checkpoint": "random_plain.safetensors"}, "no KV cache to quantize"),
    ({"budget_gib": 0.01, "recent_frames": 0, "sink_frames": 1000, "sink_bits": "16", "frames": 200, "block": 50}, "too small")])
def test_wrong_use_is_refused(comfy, kwargs, words):
    with pytest.raises(ComfyError, match=words):
        sample(comfy, preset="Balanced", **kwargs)
    assert sample(comfy, preset="Balanced").isfinite().all()


def test_unfinished_sigmas_are_refused(comfy):
    nodes = graph(preset="Balanced")
    nodes["half"] = {"class_type": "SplitSigmas", "inputs": {"sigmas": ["sigmas", 0], "step": 2}}
    nodes["sample"]["inputs"]["sigmas"] = ["half", 0]
    with pytest.raises(ComfyError, match="end in 0"):
        comfy.run(nodes)


def test_noise_mask_is_refused(comfy):
    nodes = graph(preset="Balanced")
    nodes["mask"] = {"class_type": "SolidMask", "inputs": {"value": 0.5, "width": 96, "height": 64}}
    nodes["masked"] = {"class_type": "SetLatentNoiseMask", "inputs": {"samples": ["latent", 0], "mask": ["mask", 0]}}
    nodes["sample"]["inputs"]["latent_image"] = ["masked", 0]
    with pytest.raises(ComfyError, match="noise mask"):
        comfy.run(nodes)
