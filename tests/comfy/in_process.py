"""Tiny random models as ComfyUI's ModelPatchers in the test process itself, and short runs of them. Needs the fixture `comfy_modules`."""

from __future__ import annotations

import torch

from comfyui_qvg.qvg.demo import METADATA, PROMPTS, TEXT_DIM, embed_prompt
from comfyui_qvg.qvg.models.longcat import LongCat
from comfyui_qvg.qvg.models.wan import CausalWan, WanSizes
from longcat_graphs import SIZES


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
