"""The Wan 2.1 text-to-video family: its network in plain torch, made for generating a video chunk by chunk, and how it is published.

A Self-Forcing, Causal-Forcing or plain Wan 2.1 T2V state dict loads with `CausalWan.from_state_dict`, which reads every size from the
tensors. What makes the network causal is not in the weights but in which tokens a token attends to. The caller decides that: `forward`
calls a function for each layer's self-attention,

    attend(layer, q, k, v) -> out        # all [B, T, H, D]; q and k after their norm and before RoPE

which owns positions, history and storage. Without one, every token attends to every other and positions start at frame 0, as in plain
Wan.

Each latent frame has its own timestep, so finished frames (timestep 0) and noisy ones can share a pass.
Norms are computed in float32. Structure: Wan 2.1, wan/modules/model.py; sizes as in ComfyUI's comfy/ldm/wan/model.py.

    model = CausalWan.from_state_dict(state_dict)
    prompt = model.project_context(embedding)                   # once per prompt
    flow = model(latents, timesteps, prompt, attend=attend)     # [B, C, F, H, W] -> [B, C, F, H, W]
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.rope import Rope
from .family import Family, load_weights
from .shape import ModelShape

HEAD_DIM = 128
PATCH = (1, 2, 2)
EPS = 1e-6
LATENT_CHANNELS = 16
DEFAULT_TEXT_DIM = 4096

# the weights that sizes are read from, and their numbers of axes
SIZING = {"patch_embedding.weight": 5, "text_embedding.0.weight": 2, "time_embedding.0.weight": 2, "blocks.0.ffn.0.weight": 2,
          "head.head.weight": 2}
# our names -> those of the diffusers edition; the first that fits counts
DIFFUSERS = (
    ("self_attn.norm_", "attn1.norm_"), ("cross_attn.norm_", "attn2.norm_"), ("self_attn.o", "attn1.to_out.0"),
    ("cross_attn.o", "attn2.to_out.0"), ("self_attn.", "attn1.to_"), ("cross_attn.", "attn2.to_"), ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"), ("norm3", "norm2"), ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"), ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"), ("time_projection.1", "condition_embedder.time_proj"),
    ("head.head", "proj_out"), ("head.modulation", "scale_shift_table"), (".modulation", ".scale_shift_table"))

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class WanSizes:
    """Sizes read from a Wan state dict. dim = 128 * heads; text_dim is 4096 in every released model."""

    dim: int
    ffn_dim: int
    layers: int
    text_dim: int
    channels: int = 16
    freq_dim: int = 256

    @property
    def heads(self) -> int:
        return self.dim // HEAD_DIM

    @property
    def head_dim(self) -> int:
        return HEAD_DIM

    @classmethod
    def read(cls, state_dict: Mapping[str, Tensor]) -> WanSizes:
        """Sizes from the shapes. Raises ValueError when this is not a Wan 2.1 text-to-video state dict."""
        missing = [key for key in SIZING if key not in state_dict]
        if missing:
            raise ValueError(
                f"This is not a Wan 2.1 text-to-video state dict: {', '.join(missing)} is missing. "
                "Load the weights of a Wan 2.1 T2V model and strip any prefix such as 'model.' from its keys.")
        dim, channels = state_dict["patch_embedding.weight"].shape[:2]
        return cls(
            dim=dim,
            ffn_dim=state_dict["blocks.0.ffn.0.weight"].shape[0],
            layers=1 + max(int(key.split(".")[1]) for key in state_dict if key.startswith("blocks.")),
            text_dim=state_dict["text_embedding.0.weight"].shape[1],
            channels=channels,
            freq_dim=state_dict["time_embedding.0.weight"].shape[1])


class RMSNorm(nn.Module):
    """Root-mean-square norm over the channels of all heads together, computed in float32."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), EPS).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """LayerNorm over channels, computed in float32, returned in x's dtype."""
    weight, bias = (None if p is None else p.float() for p in (weight, bias))
    return F.layer_norm(x.float(), (x.shape[-1],), weight, bias, EPS).to(x.dtype)


class AffineLayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias)


class Projections(nn.Module):
    """q, k, v, o and the query/key norms, the same in self- and cross-attention."""

    def __init__(self, dim: int):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim), RMSNorm(dim)

    def queries(self, x: Tensor) -> Tensor:
        """[B, T, dim] -> [B, T, H, D]."""
        return self.norm_q(self.q(x)).unflatten(-1, (-1, HEAD_DIM))

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, dim] -> two of [B, T, H, D]."""
        return self.norm_k(self.k(x)).unflatten(-1, (-1, HEAD_DIM)), self.v(x).unflatten(-1, (-1, HEAD_DIM))


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward; the first and the last are modulated by the frame's timestep."""

    def __init__(self, dim: int, ffn_dim: int):
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        self.self_attn = Projections(dim)
        self.norm3 = AffineLayerNorm(dim)
        self.cross_attn = Projections(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim))

    def forward(self, x: Tensor, time: Tensor, prompt: tuple[Tensor, Tensor], layer: int, attend: Attend) -> Tensor:
        """x [B, F, N, dim] (N tokens a frame), time [B, F, 6, dim], prompt k and v [B, L, H, D] -> [B, F, N, dim]."""
        modulation = (self.modulation.to(time.dtype) + time).unsqueeze(2)
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = modulation.unbind(3)

        tokens = (layer_norm(x) * (1 + scale_a) + shift_a).flatten(1, 2)
        out = attend(layer, self.self_attn.queries(tokens), *self.self_attn.keys_values(tokens))
        x = x + gate_a * self.self_attn.o(out.flatten(2)).view_as(x)

        query = self.cross_attn.queries(self.norm3(x).flatten(1, 2))
        x = x + self.cross_attn.o(scaled_attention(query, *prompt).flatten(2)).view_as(x)

        return x + gate_f * self.ffn(layer_norm(x) * (1 + scale_f) + shift_f)


class Head(nn.Module):
    """From tokens to latent patches, modulated by the frame's timestep."""

    def __init__(self, dim: int, out: int):
        super().__init__()
        self.head = nn.Linear(dim, out)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [B, F, N, dim], time [B, F, dim] -> [B, F, N, out]."""
        shift, scale = (self.modulation.to(time.dtype) + time.unsqueeze(2)).unsqueeze(2).unbind(3)
        return self.head(layer_norm(x) * (1 + scale) + shift)


class CausalWan(nn.Module):
    """Wan 2.1 T2V with its original parameter names. The module's docstring explains `attend`."""

    def __init__(self, sizes: WanSizes):
        super().__init__()
        if sizes.dim % HEAD_DIM:
            raise ValueError(
                f"Wan's heads have {HEAD_DIM} channels, so its width cannot be {sizes.dim}; "
                f"use a multiple of {HEAD_DIM}.")
        self.sizes = sizes
        dim = sizes.dim
        self.patch_embedding = nn.Conv3d(sizes.channels, dim, PATCH, PATCH)
        self.text_embedding = nn.Sequential(
            nn.Linear(sizes.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(sizes.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(dim, sizes.ffn_dim) for _ in range(sizes.layers))
        self.head = Head(dim, sizes.channels * PATCH[1] * PATCH[2])

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> CausalWan:
        """The model that a state dict describes, weights loaded strictly, in `dtype` (default: as stored)."""
        return load_weights(cls, WanSizes.read(state_dict), state_dict, dtype)

    @property
    def dtype(self) -> torch.dtype:
        return self.blocks[0].self_attn.q.weight.dtype

    def project_context(self, context: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Text embedding [B, L, text_dim] -> every layer's cross-attention k and v [B, L, H, D].

        They are constant while a prompt holds, so a sampler computes them once per prompt.
        """
        text = self.text_embedding(context.to(self.dtype))
        return [block.cross_attn.keys_values(text) for block in self.blocks]

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor | list, attend: Attend | None = None) -> Tensor:
        """Predict the flow (noise minus video).

        x: latents [B, C, F, H, W], H and W even. timestep: [B, F], 0 (finished) to 1000 (noise).
        context: text embedding [B, L, text_dim], or the result of `project_context`.
        Raises ValueError for an odd height or width.
        """
        height, width = x.shape[-2:]
        if height % PATCH[1] or width % PATCH[2]:
            raise ValueError(
                f"The latent is {width} x {height}; Wan divides it into patches of 2 x 2, so use an even width and height.")
        grid = (height // PATCH[1], width // PATCH[2])
        prompt = self.project_context(context) if isinstance(context, Tensor) else context
        attend = attend or bidirectional(grid, x.shape[2])

        # [B, C, F, H, W] -> [B, F, N, dim]
        patches = self.patch_embedding(x.to(self.patch_embedding.weight.dtype))
        tokens = patches.flatten(3).permute(0, 2, 3, 1).to(self.dtype)
        time = self.time_embedding(timestep_features(timestep, self.sizes.freq_dim).to(self.dtype))
        modulation = self.time_projection(time).unflatten(-1, (6, -1))
        for layer, block in enumerate(self.blocks):
            tokens = block(tokens, modulation, prompt[layer], layer, attend)
        return unpatchify(self.head(tokens, time), grid).to(x.dtype)


def timestep_features(timestep: Tensor, dim: int) -> Tensor:
    """[B, F] -> [B, F, dim]: cosines, then sines, of geometrically spaced frequencies; float64 where the device has it."""
    precise = torch.float32 if timestep.device.type == "mps" else torch.float64
    half = dim // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=precise, device=timestep.device) / half)
    angles = timestep.to(precise)[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def unpatchify(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B, F, N, 4 * C], the elements of a patch ordered (row, column, channel) -> [B, C, F, H, W]."""
    batch, frames = patches.shape[:2]
    x = patches.view(batch, frames, *grid, PATCH[1], PATCH[2], -1)
    return x.permute(0, 6, 1, 2, 4, 3, 5).reshape(batch, -1, frames, grid[0] * PATCH[1], grid[1] * PATCH[2])


def scaled_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain softmax attention, [B, T, H, D] each."""
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def bidirectional(grid: tuple[int, int], frames: int) -> Attend:
    """Plain Wan's self-attention: every token attends to every other, positions from frame 0."""
    rope = Rope(HEAD_DIM, grid)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_attention(rope.apply(q, 0, frames), rope.apply(k, 0, frames), v)

    return attend


def is_wan(state: Mapping[str, Tensor]) -> bool:
    """Whether this is a Wan 2.1 state dict. Variants with other inputs pass, too; `refuse` and `refusals` name them. HY-WorldPlay 5B, with
    an embedding of actions, is a family of its own."""
    return "patch_embedding.weight" in state and "head.modulation" in state and "action_embedding.0.weight" not in state


def refuse(state: Mapping[str, Tensor]) -> str:
    """What keeps a Wan from being causal text-to-video; see `Family.refuse`."""
    dim, channels = state["patch_embedding.weight"].shape[:2]
    if channels != LATENT_CHANNELS:
        kind = {36: "an image-to-video Wan", 48: "a Wan 2.2 5B"}.get(channels, "another Wan")
        return (f"is {kind}: it takes {channels} latent channels. ComfyUI's autoregressive model takes "
                f"{LATENT_CHANNELS}; choose a causal checkpoint of Wan 2.1 text-to-video.")
    return f"has width {dim}; Wan heads have {HEAD_DIM} channels, which does not divide it." if dim % HEAD_DIM else ""


def diffusers_name(name: str) -> tuple[str, int, int]:
    """A parameter's name in the diffusers edition, for `Family.lora_name`."""
    for ours, theirs in DIFFUSERS:
        if name.startswith(ours) or f".{ours.lstrip('.')}" in name:
            return name.replace(ours, theirs), 0, 1
    return name, 0, 1


def causal_metadata(sizes: WanSizes, config: Mapping) -> dict[str, str]:
    """Safetensors metadata that makes ComfyUI build its causal network; the weights do not say that they are causal.

    config: what the file's own metadata says, see `checkpoint.Description`.
    """
    transformer = {**config, "causal_ar": True}
    if sizes.text_dim != DEFAULT_TEXT_DIM:
        transformer["text_dim"] = sizes.text_dim
    return {"config": json.dumps({"transformer": transformer})}


SMALL = ModelShape(30, 12, 16, (832, 480), 3, parameters=1_418_996_800, feed_forward=(8960, 2),
                   size_name="1.3B, the size of Self-Forcing, Causal-Forcing and LongLive")
# sources: the models' published configurations; a latent frame of 832 x 480 is 1560 tokens
WAN = Family(
    name="wan", title="Wan 2.1", layout="causal Wan 2.1 layout", examples="Self-Forcing, Causal-Forcing, LongLive, Krea Realtime",
    shapes={
        "self-forcing": SMALL, "causal-forcing": SMALL, "longlive": SMALL,
        "krea-14b": ModelShape(40, 40, 16, (832, 480), 3, parameters=14_288_491_584, feed_forward=(13824, 2),
                               size_name="14B, the size of Krea Realtime")},
    recognizes=is_wan, sizing=SIZING, refuse=refuse, sizes=WanSizes.read, network=CausalWan, lora_name=diffusers_name,
    adapter=".nodes.adapters.wan")
