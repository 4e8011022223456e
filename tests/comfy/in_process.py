"""Tiny random models as ComfyUI's ModelPatchers in the test process itself, and short runs of them. Needs the fixture `comfy_modules`."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from comfyui_qvg.qvg.demo import METADATA, PROMPTS, TEXT_DIM, embed_prompt
from comfyui_qvg.qvg.models.longcat import LongCat
from comfyui_qvg.qvg.models.wan import CausalWan, WanSizes
from longcat_graphs import SIZES
from random_models import worldplay_state


def causal_model():
    """Core's causal Wan."""
    import comfy.sd

    draw = torch.Generator().manual_seed(2)
    state = CausalWan(WanSizes(dim=256, ffn_dim=256, layers=2, text_dim=TEXT_DIM)).state_dict()
    state = {name: 0.05 * torch.randn(tensor.shape, generator=draw) for name, tensor in state.items()}
    return comfy.sd.load_diffusion_model_state_dict(state, metadata=METADATA)


def longcat_model():
    from comfyui_qvg.nodes.adapters import longcat

    draw = torch.Generator().manual_seed(8)
    state = {}
    for name, tensor in LongCat(SIZES).state_dict().items():
        if tensor.ndim > 1:
            state[name] = torch.randn(tensor.shape, generator=draw) * 1.2 / tensor[0].numel() ** 0.5
        else:
            state[name] = (1 if "norm" in name and "weight" in name else 0) + 0.3 * torch.randn(tensor.shape, generator=draw)
    return longcat.load(state)


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sample_causal(model, cfg=1.0, sampler=None, frames=9, sigmas=(1.0, 0.8333, 0.0), conditions=None, callback=None):
    """Latents of a video in chunks of 3: core's autoregressive run, or that of another SAMPLER."""
    import comfy.sample
    import comfy.samplers

    positive, negative = conditions or ([[embed_prompt(text), {}]] for text in PROMPTS[:2])
    sampler = sampler or comfy.samplers.ksampler("ar_video", {"num_frame_per_block": 3})
    return comfy.sample.sample_custom(model, drawn(0, 1, 16, frames, 8, 12), cfg, sampler, torch.tensor(sigmas), positive, negative,
                                      torch.zeros(1, 16, frames, 8, 12), disable_pbar=True, seed=0, callback=callback)


def sample_longcat(model, cfg=4.0, given=3, sigmas=(1.0, 0.8, 0.5, 0.0), conditions=None, callback=None):
    """Latents of two new frames that continue `given` ones."""
    import comfy.sample
    import comfy.samplers

    from comfyui_qvg.nodes.adapters import longcat

    positive, negative = conditions or ([[drawn(seed, 1, 12, SIZES.text_dim), {}]] for seed in (1, 2))
    if given:
        model = longcat.continue_from(model, drawn(5, 1, 16, given, 8, 12))
    return comfy.sample.sample_custom(model, drawn(0, 1, 16, 2, 8, 12), cfg, comfy.samplers.ksampler("euler"), torch.tensor(sigmas),
                                      positive, negative, torch.zeros(1, 16, 2, 8, 12), disable_pbar=True, seed=0, callback=callback)


def world_model(variant: str, preset: str | None = None, seed: int = 4):
    """HY-WorldPlay. variant: "5b" or "8b"; preset: of Quantize KV Cache (QVG), None without that node."""
    from comfyui_qvg.nodes.adapters import worldplay_5b, worldplay_8b
    from comfyui_qvg.qvg.settings import QVGSettings

    adapter = {"5b": worldplay_5b, "8b": worldplay_8b}[variant]
    model = adapter.load(worldplay_state(variant, seed))
    return model if preset is None else adapter.quantize(model, QVGSettings.preset(preset))


@contextmanager
def small_world_vaes():
    """Inside, core builds the VAEs of Wan 2.2 and of HunyuanVideo 1.5 small enough for a test. Their sizes are fixed in core's code."""
    import comfy.ldm.hunyuan_video.vae_refiner as hunyuan
    import comfy.ldm.wan.vae2_2 as wan

    encoder, decoder = hunyuan.Encoder, hunyuan.Decoder

    class SmallWanVAE(wan.WanVAE):
        def __init__(self, **sizes):
            super().__init__(**sizes | {"dim": 8, "dec_dim": 8})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wan, "WanVAE", SmallWanVAE)
        for name, network in (("Encoder", encoder), ("Decoder", decoder)):
            patch.setattr(hunyuan, name, lambda network=network, **sizes: network(**sizes | {"block_out_channels": [8, 16, 16, 32, 64]}))
        yield


@contextmanager
def small_siglip():
    """Inside, core builds the image encoder of HunyuanVideo 1.5 with two narrow layers, of the published width."""
    import comfy.clip_vision

    build = comfy.clip_vision.ClipVisionModel.__init__

    def small(self, config):
        build(self, json.loads(Path(config).read_text()) | {"num_hidden_layers": 2, "intermediate_size": 64})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.clip_vision.ClipVisionModel, "__init__", small)
        yield


def world_vae(variant: str):
    """A VAE of ComfyUI with random weights for HY-WorldPlay's latents: core's code, small layers."""
    import comfy.ldm.hunyuan_video.vae_refiner as hunyuan
    import comfy.ldm.wan.vae2_2 as wan
    import comfy.sd

    draw = torch.Generator().manual_seed(6)
    with small_world_vaes():
        if variant == "5b":
            network = wan.WanVAE(dim=8, z_dim=48, temperal_downsample=[False, True, True])
        else:
            sizes = {"in_channels": 3, "out_channels": 3, "num_res_blocks": 2, "ffactor_spatial": 16, "ffactor_temporal": 4,
                     "downsample_match_channel": True, "upsample_match_channel": True, "z_channels": 32}
            network = torch.nn.ModuleDict({"encoder": hunyuan.Encoder(**sizes), "decoder": hunyuan.Decoder(**sizes)})
        state = {name: 0.1 * torch.randn(tensor.shape, generator=draw) for name, tensor in network.state_dict().items()}
        return comfy.sd.VAE(sd=state)


def sample_walk(model, cfg=1.0, frames=12, memory="rebuild", conditions=None, callback=None):
    """Latents of a walk of HY-WorldPlay 5B, without a VAE."""
    from comfyui_qvg.nodes.adapters import worldplay
    from comfyui_qvg.nodes.adapters.worldplay_scene import WalkMemory
    from comfyui_qvg.nodes.run_log import ATTACHMENT
    from comfyui_qvg.nodes.walk import Walk, walk_through
    from comfyui_qvg.qvg.video import Run
    from comfyui_qvg.qvg.video.camera_moves import walk

    prompts = conditions or [[[drawn(seed, 1, 12, TEXT_DIM), {}]] for seed in (1, 2)]
    shape, path = (1, 48, frames, 4, 6), walk(f"right-{frames - 1}")
    plan = WalkMemory(model, worldplay.settings_of(model), memory, shape, prompts[:1 + (cfg != 1)])
    run = Run(frames=frames, chunk_frames=4, sigmas=(1.0, 0.8, 0.0), solver="euler")
    made = Walk(path, run, plan, cfg, drawn(5, 1, 48, 1, 4, 6), log=model.get_attachment(ATTACHMENT))
    return walk_through(model, *prompts, made, callback or (lambda *_: None))
