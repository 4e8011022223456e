"""Tiny networks and VAEs with random weights: mechanics, never picture quality."""

from dataclasses import replace
from functools import partial

import torch
from safetensors.torch import save_file

from comfyui_qvg.qvg.demo import METADATA, TEXT_DIM
from comfyui_qvg.qvg.models.hunyuan_layers import HunyuanSizes
from comfyui_qvg.qvg.models.wan import CausalWan, WanSizes
from comfyui_qvg.qvg.models.wan_vae import WanVAE
from comfyui_qvg.qvg.models.worldplay_hunyuan import WorldPlayHunyuan
from comfyui_qvg.qvg.models.worldplay_wan import WorldWan, WorldWanSizes

WORLDPLAY = {
    "5b": partial(WorldWan, WorldWanSizes(dim=256, ffn_dim=64, layers=2, text_dim=TEXT_DIM)),
    "8b": partial(WorldPlayHunyuan, HunyuanSizes(dim=64, head_dim=32, ffn_dim=64, layers=2, text_dim=TEXT_DIM, glyph_dim=12,
                                                 glyph_hidden=16, image_dim=20))}


def write_random_models(server, name: str, seed: int) -> torch.Generator:
    """NAME.safetensors, which core takes for causal, and NAME_vae.safetensors; returns the generator that drew them."""
    draw = torch.Generator().manual_seed(seed)

    def noise(state, scale):
        return {key: scale * torch.randn(tensor.shape, generator=draw) for key, tensor in state.items()}

    network = CausalWan(WanSizes(dim=256, ffn_dim=256, layers=2, text_dim=TEXT_DIM)).state_dict()
    save_file(noise(network, 0.05), server.folder("models", "diffusion_models") / f"{name}.safetensors", metadata=METADATA)
    save_file(noise(WanVAE(8).state_dict(), 0.1), server.folder("models", "vae") / f"{name}_vae.safetensors")
    return draw


def worldplay_state(variant: str, seed: int = 4, **sizes) -> dict[str, torch.Tensor]:
    """A state dict of HY-WorldPlay in this pack's names. variant: "5b" or "8b". sizes: other ones than those above."""
    draw, state, network = torch.Generator().manual_seed(seed), {}, WORLDPLAY[variant]
    for name, tensor in network.func(replace(*network.args, **sizes)).state_dict().items():
        noise = torch.randn(tensor.shape, generator=draw)
        mean = 1 if "norm" in name and "weight" in name else 0
        state[name] = noise / tensor[0].numel() ** 0.5 if tensor.ndim > 1 else mean + 0.1 * noise
    return state
