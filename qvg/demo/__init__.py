"""The tiny model: a causal Wan and a Wan VAE, 16 MB together, trained from scratch on procedural scenes.

    network, vae = load_tiny()
    prompt = network.project_context(embed_prompt(PROMPTS[0]))

The files open in ComfyUI's own UNETLoader and VAELoader. `benchmarks/train_demo` made them.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ..models.wan import CausalWan
from ..models.wan_vae import WanVAE
from .prompts import TEXT_DIM, embed_prompt
from .scenes import HEIGHT, WIDTH

__all__ = ["GRID", "HEIGHT", "LATENT", "NETWORK_PATH", "PROMPTS", "TEXT_DIM", "VAE_PATH", "WEIGHTS", "WIDTH", "embed_prompt", "load_tiny"]

# folders named as ComfyUI's, whose loaders look into them
WEIGHTS = Path(__file__).parent / "weights"
NETWORK_FILE = "qvg_tiny_causal_wan.safetensors"
VAE_FILE = "qvg_tiny_vae.safetensors"
NETWORK_PATH = WEIGHTS / "diffusion_models" / NETWORK_FILE
VAE_PATH = WEIGHTS / "vae" / VAE_FILE

# ComfyUI recognizes a causal Wan checkpoint, and a text width other than Wan's, only by this metadata
METADATA = {"config": json.dumps({"transformer": {"causal_ar": True, "text_dim": TEXT_DIM}})}

LATENT = (HEIGHT // 8, WIDTH // 8)  # rows, columns of a latent frame
GRID = (HEIGHT // 16, WIDTH // 16)  # rows, columns of tokens
CHUNK_FRAMES = 3

PROMPTS = (
    "red striped circle moving right, blue square still, over green dots panning left",
    "yellow star racing right, over purple waves panning up",
    "cyan dotted ring moving left, pink triangle moving up, over blue checks still",
    "white plain circle moving down, over orange stripes panning right",
    "green striped square racing left, white star still, over red dots panning down",
    "orange dotted circle racing up, over cyan waves still",
    "pink striped triangle moving right, yellow ring moving left, over blue stripes panning up",
    "blue plain star moving left, over white checks panning right",
    "purple striped ring still, green dotted star moving down, over yellow dots panning left",
    "red plain triangle racing down, cyan plain square racing right, over purple waves panning left",
)


def load_tiny(dtype: torch.dtype = torch.float32) -> tuple[CausalWan, WanVAE]:
    """The trained network and autoencoder on the CPU."""
    from safetensors.torch import load_file

    network = CausalWan.from_state_dict(load_file(NETWORK_PATH), dtype)
    return network, WanVAE.from_state_dict(load_file(VAE_PATH), dtype)
