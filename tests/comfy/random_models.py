"""A tiny causal Wan and a VAE with random weights, in the folders of a ComfyUI server: mechanics, never picture quality."""

import torch
from safetensors.torch import save_file

from comfyui_qvg.qvg.demo import METADATA, TEXT_DIM
from comfyui_qvg.qvg.models.wan import CausalWan, WanSizes
from comfyui_qvg.qvg.models.wan_vae import WanVAE


def write_random_models(server, name: str, seed: int) -> torch.Generator:
    """NAME.safetensors, which core takes for causal, and NAME_vae.safetensors; returns the generator that drew them."""
    draw = torch.Generator().manual_seed(seed)

    def noise(state, scale):
        return {key: scale * torch.randn(tensor.shape, generator=draw) for key, tensor in state.items()}

    network = CausalWan(WanSizes(dim=256, ffn_dim=256, layers=2, text_dim=TEXT_DIM)).state_dict()
    save_file(noise(network, 0.05), server.folder("models", "diffusion_models") / f"{name}.safetensors", metadata=METADATA)
    save_file(noise(WanVAE(8).state_dict(), 0.1), server.folder("models", "vae") / f"{name}_vae.safetensors")
    return draw
