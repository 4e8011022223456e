"""The Wan 2.2 5B variant of HY-WorldPlay: a world that is walked through chunk by chunk, and how it is published.

It is Wan 2.2 TI2V 5B with two additions. Every latent frame has an action, one of 81 labels (9 translations x 9 rotations), whose embedding
is added to that of the frame's timestep. And self-attention has two branches over the same queries, keys and values: one with RoPE, one
with PRoPE, which applies the camera of each token's frame instead of a position (see `attention`). Each has an output layer of its own, and
their outputs are added. As in `models.wan`, the network never sees a cache, positions or cameras; it calls a function for each layer's
self-attention,

    attend(layer, q, k, v) -> (out, out_prope)      # all [B, T, H, D]; q, k and v before RoPE and PRoPE, q and k after their norm

where `out_prope` is the PRoPE branch's output in the camera space of its own frame, that is, after the transform of outputs.

Parameter names are Wan's own, under which LoRAs and FP8 files of Wan 2.2 5B circulate, with `action_embedding` and `self_attn.o_prope`
added; `PUBLISHED` converts the published diffusers layout without copying. Timestep and action embeddings, modulation, norms and the output
layer are computed in float32. The original computes embeddings and output layer in bfloat16.

    model = WorldWan.from_state_dict(state_dict)
    model.encode(context_frames, timestep, prompt, attend, action=labels)     # so that `attend` can store keys and values
    flow = model(x, timestep, prompt, attend, action=labels)                  # [B, C, F, H, W] -> [B, C, F, H, W] float32

The flow points from video to noise: x at noise level s = timestep / 1000 is (1 - s) * video + s * noise, flow = noise - video, and the
video is x - s * flow. Finished frames and a start image have timestep 14 and no noise.
Sources: Wan 2.2; HY-WorldPlay (arXiv 2512.14614) and its published code, wan/.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.functions import Attention, sdpa
from .family import Family, load_weights
from .layout import Layout
from .longcat import CastingLinear, Factory, gated, modulated
from .shape import ModelShape
from .wan import EPS, HEAD_DIM, PATCH, timestep_features, unpatchify
from .worldplay_schedule import LICENCE

# the released model takes the latents of Wan 2.2; one with 16 channels, such as the tiny world model, those of Wan 2.1. So the number of
# channels, `WorldWanSizes.channels`, says which latent format and which VAE a network needs, and nothing else differs
LATENT_CHANNELS = 48
WAN21_CHANNELS = 16
ACTIONS = 81
PUBLISHED = Layout(
    renamed=(
        *((f"condition_embedder.{part}_embedder.linear_{place}.", f"{part}_embedding.{2 * place - 2}.")
          for part in ("text", "time", "action") for place in (1, 2)),
        ("condition_embedder.time_proj.", "time_projection.1."), (".attn1.", ".self_attn."), (".attn2.", ".cross_attn."),
        (".to_q.", ".q."), (".to_k.", ".k."), (".to_v.", ".v."), (".to_out.0.", ".o."), (".to_out_prope.0.", ".o_prope."),
        (".ffn.net.0.proj.", ".ffn.0."), (".ffn.net.2.", ".ffn.2."), (".norm2.", ".norm3."), ("proj_out.", "head.head."),
        (".scale_shift_table", ".modulation"), ("scale_shift_table", "head.modulation")),
    fused=())
# the weights that sizes are read from, and their numbers of axes
SIZING = {"patch_embedding.weight": 5, "text_embedding.0.weight": 2, "action_embedding.0.weight": 2, "blocks.0.ffn.0.weight": 2}

# (layer, q, k, v) -> outputs of the RoPE branch and of the PRoPE branch
AttendTwice = Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
# a prompt: an embedding, or every layer's keys and values of it
Prompt = Tensor | list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class WorldWanSizes:
    """Sizes read from a state dict. The released model: width 3072, 30 layers, 24 heads of 128, 5.29 billion parameters.

    No weight tells the head dim; it is 128 in every Wan.
    """

    dim: int
    ffn_dim: int
    layers: int
    text_dim: int
    channels: int = LATENT_CHANNELS
    freq_dim: int = 256
    head_dim: int = HEAD_DIM

    @property
    def heads(self) -> int:
        return self.dim // self.head_dim

    @classmethod
    def read(cls, state_dict: Mapping[str, Tensor]) -> WorldWanSizes:
        """Sizes from the shapes of a state dict in the layout used here. Raises ValueError when something is missing."""
        missing = [key for key in SIZING if key not in state_dict]
        if missing:
            raise ValueError(f"This is not a state dict of HY-WorldPlay 5B: {', '.join(missing)} is missing. The file may be one part of "
                             "several, or hold another model.")
        dim, channels = state_dict["patch_embedding.weight"].shape[:2]
        return cls(
            dim=dim, channels=channels, ffn_dim=state_dict["blocks.0.ffn.0.weight"].shape[0],
            layers=1 + max(int(key.split(".")[1]) for key in state_dict if key.startswith("blocks.")),
            text_dim=state_dict["text_embedding.0.weight"].shape[1], freq_dim=state_dict["action_embedding.0.weight"].shape[1])


class CastingConv3d(nn.Conv3d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv3d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), self.stride)


class ExactLayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps).to(x.dtype)


class ExactRMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)


# layers that compute in the dtype of their input and norms that compute in float32, whatever the dtype of their weights
TORCH = SimpleNamespace(Linear=CastingLinear, Conv3d=CastingConv3d, LayerNorm=ExactLayerNorm, RMSNorm=ExactRMSNorm)


class Projections(nn.Module):
    """q, k, v, o and the query/key norms over all heads together, the same in self- and cross-attention."""

    def __init__(self, sizes: WorldWanSizes, make: Factory):
        super().__init__()
        self.head_dim = sizes.head_dim
        self.q, self.k, self.v, self.o = (make.linear(sizes.dim, sizes.dim) for _ in range(4))
        self.norm_q, self.norm_k = (make.operations.RMSNorm(sizes.dim, eps=EPS, **make.exact) for _ in range(2))

    def queries(self, x: Tensor) -> Tensor:
        """[B, T, dim] -> [B, T, H, D]."""
        return self.norm_q(self.q(x)).unflatten(-1, (-1, self.head_dim))

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, dim] -> two of [B, T, H, D]."""
        return self.norm_k(self.k(x)).unflatten(-1, (-1, self.head_dim)), self.v(x).unflatten(-1, (-1, self.head_dim))


class TwoBranches(Projections):
    """The projections of self-attention, with an output layer for each branch."""

    def __init__(self, sizes: WorldWanSizes, make: Factory):
        super().__init__(sizes, make)
        self.o_prope = make.linear(sizes.dim, sizes.dim)

    def outputs(self, out: Tensor, out_prope: Tensor) -> Tensor:
        """Two of [B, T, H, D] -> [B, T, dim]."""
        return self.o(out.flatten(2)) + self.o_prope(out_prope.flatten(2))


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward; the first and the last are modulated by the frame's timestep and action."""

    def __init__(self, sizes: WorldWanSizes, make: Factory):
        super().__init__()
        self.modulation = nn.Parameter(torch.zeros(1, 6, sizes.dim, **make.exact))
        self.self_attn = TwoBranches(sizes, make)
        self.norm3 = make.operations.LayerNorm(sizes.dim, eps=EPS, **make.exact)
        self.cross_attn = Projections(sizes, make)
        self.ffn = nn.Sequential(make.linear(sizes.dim, sizes.ffn_dim), nn.GELU(approximate="tanh"), make.linear(sizes.ffn_dim, sizes.dim))

    def forward(self, x: Tensor, time: Tensor, prompt: tuple[Tensor, Tensor], layer: int, attend: AttendTwice,
                attention: Attention) -> Tensor:
        """x [B, F, N, dim] (N tokens a frame), time [B, F, 6, dim] float32, prompt k and v [B, L, H, D] -> [B, F, N, dim]."""
        # [B, F, 1, dim] each
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (self.modulation.to(time) + time).unsqueeze(2).unbind(3)

        tokens = modulated(x, shift_a, scale_a)
        outputs = attend(layer, self.self_attn.queries(tokens), *self.self_attn.keys_values(tokens))
        x = gated(x, gate_a, self.self_attn.outputs(*outputs))

        query = self.cross_attn.queries(self.norm3(x).flatten(1, 2))
        x = x + self.cross_attn.o(attention(query, *prompt).flatten(2)).view_as(x)

        return gated(x, gate_f, self.ffn(modulated(x, shift_f, scale_f)))


class Head(nn.Module):
    """From tokens to latent patches in float32, modulated by the frame's timestep and action."""

    def __init__(self, sizes: WorldWanSizes, make: Factory):
        super().__init__()
        self.head = make.exact_linear(sizes.dim, sizes.channels * math.prod(PATCH))
        self.modulation = nn.Parameter(torch.zeros(1, 2, sizes.dim, **make.exact))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [B, F, N, dim], time [B, F, dim] float32 -> [B, F, N, out] float32."""
        shift, scale = (self.modulation.to(time) + time.unsqueeze(2)).unsqueeze(2).unbind(3)
        return self.head(modulated(x.float(), shift, scale)).unflatten(1, x.shape[1:3])


class WorldWan(nn.Module):
    """HY-WorldPlay 5B. The module's docstring explains `attend`, layouts and types.

    operations: a namespace with Linear, Conv3d, LayerNorm and RMSNorm, torch's own by default. dtype: of the weights.
    Raises ValueError when the heads do not divide the width.
    """

    def __init__(self, sizes: WorldWanSizes, *, operations=TORCH, device=None, dtype: torch.dtype | None = None):
        super().__init__()
        if sizes.dim % sizes.head_dim:
            raise ValueError(f"Heads of {sizes.head_dim} channels do not divide a width of {sizes.dim}; the file may be damaged.")
        self.sizes = sizes
        make, dim = Factory(operations, device, dtype), sizes.dim
        self.patch_embedding = operations.Conv3d(sizes.channels, dim, PATCH, PATCH, **make.exact)
        self.text_embedding = nn.Sequential(
            make.exact_linear(sizes.text_dim, dim), nn.GELU(approximate="tanh"), make.exact_linear(dim, dim))
        self.time_embedding, self.action_embedding = (
            nn.Sequential(make.exact_linear(sizes.freq_dim, dim), nn.SiLU(), make.exact_linear(dim, dim)) for _ in range(2))
        self.time_projection = nn.Sequential(nn.SiLU(), make.exact_linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(sizes, make) for _ in range(sizes.layers))
        self.head = Head(sizes, make)

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> WorldWan:
        """The model that a state dict in either layout describes, weights loaded strictly, in `dtype` (default: as stored)."""
        state = PUBLISHED.convert(state_dict)
        return load_weights(cls, WorldWanSizes.read(state), state, dtype)

    def float32_layers(self) -> list[nn.Module]:
        """The linear layers whose input is float32, whatever the dtype of the rest."""
        parts = (self.time_embedding, self.action_embedding, self.time_projection, self.head)
        # `operations` may supply a Linear that is not torch's
        return [layer for part in parts for layer in part.modules() if hasattr(layer, "in_features")]

    def project_context(self, context: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Text embedding [B, L, text_dim], in the dtype to compute in -> every layer's keys and values [B, L, H, D].

        They are constant while a prompt holds. Rows of zeros are padding, which is attended to like text.
        """
        text = self.text_embedding(context)
        return [block.cross_attn.keys_values(text) for block in self.blocks]

    def encode(self, x: Tensor, timestep: Tensor, context: Prompt, attend: AttendTwice, *, action: Tensor | None = None,
               attention: Attention = sdpa) -> None:
        """Pass finished frames through all layers, so that `attend` can store their keys and values. Arguments as for `forward`."""
        self._transform(x, timestep, context, attend, action, attention)

    def forward(self, x: Tensor, timestep: Tensor, context: Prompt, attend: AttendTwice, *, action: Tensor | None = None,
                attention: Attention = sdpa) -> Tensor:
        """Predict the flow (noise minus video), float32.

        x: latents [B, C, F, H, W] in the dtype to compute in, H and W even. timestep: [B, F], 14 (finished) to 1000 (noise).
        context: text embedding [B, L, text_dim], or the result of `project_context`. action: labels [B, F], whole numbers from 0 to 80,
        9 * translation + rotation; 0, no movement, by default. attention: computes attention to the text.
        Raises ValueError for an odd height or width, and for a timestep or an action that is not one a frame.
        """
        tokens, time = self._transform(x, timestep, context, attend, action, attention)
        return unpatchify(self.head(tokens, time), self._grid(x.shape))

    def _transform(self, x: Tensor, timestep: Tensor, context: Prompt, attend: AttendTwice, action: Tensor | None,
                   attention: Attention) -> tuple[Tensor, Tensor]:
        """Tokens [B, F, N, dim] after the last layer, and the embedding [B, F, dim] of timesteps and actions."""
        self._grid(x.shape)
        time = self._embed_frames(x, timestep, action)
        modulation = self.time_projection(time).unflatten(-1, (6, -1))
        prompt = self.project_context(context.to(x.dtype)) if isinstance(context, Tensor) else context
        # [B, C, F, H, W] -> [B, F, N, dim]
        tokens = self.patch_embedding(x).flatten(3).permute(0, 2, 3, 1).contiguous()
        for layer, block in enumerate(self.blocks):
            tokens = block(tokens, modulation, prompt[layer], layer, attend, attention)
        return tokens, time

    def _embed_frames(self, x: Tensor, timestep: Tensor, action: Tensor | None) -> Tensor:
        """[B, F, dim] float32 of timesteps and actions [B, F]."""
        action = torch.zeros_like(timestep) if action is None else action
        for name, values in (("timestep", timestep), ("action", action)):
            if values.shape != (x.shape[0], x.shape[2]):
                raise ValueError(f"The {name} has the shape {list(values.shape)} for {x.shape[0]} videos of {x.shape[2]} latent frames; "
                                 f"give one a frame, {[x.shape[0], x.shape[2]]}.")
        time, action = (timestep_features(values, self.sizes.freq_dim).float() for values in (timestep, action))
        return self.time_embedding(time) + self.action_embedding(action)

    @staticmethod
    def _grid(shape) -> tuple[int, int]:
        height, width = shape[-2:]
        if height % PATCH[1] or width % PATCH[2]:
            raise ValueError(f"The latent is {width} x {height}; HY-WorldPlay 5B divides it into patches of 2 x 2, so use a video whose "
                             "width and height are multiples of 32 pixels, or of 16 with the VAE of Wan 2.1.")
        return height // PATCH[1], width // PATCH[2]


def is_world_wan(state: Mapping[str, Tensor]) -> bool:
    """Whether this is HY-WorldPlay 5B in either layout: a Wan with an embedding of actions and a second output layer of self-attention."""
    return {"action_embedding.0.weight", "blocks.0.self_attn.o_prope.weight", "head.modulation"} <= {
        ours for name in state for ours in PUBLISHED.our_names(name)}


def refuse(state: Mapping[str, Tensor]) -> str:
    """What keeps a recognized state dict from being a network, for `Family.refuse`."""
    dim, channels = state["patch_embedding.weight"].shape[:2]
    if channels not in (LATENT_CHANNELS, WAN21_CHANNELS):
        return (f"takes {channels} latent channels, where HY-WorldPlay 5B takes the {LATENT_CHANNELS} of Wan 2.2, or the {WAN21_CHANNELS} "
                "of Wan 2.1; it is another model.")
    return f"has width {dim}; Wan heads have {HEAD_DIM} channels, which does not divide it." if dim % HEAD_DIM else ""


HY_WORLDPLAY_5B = Family(
    name="hy-worldplay-5b", title="HY-WorldPlay 5B",
    # source: the published configuration; a latent frame of Wan 2.2 5B at 1280 x 704 is 880 tokens
    shapes={"hy-worldplay-5b": ModelShape(
        30, 24, 32, (1280, 704), 4, 24, context_frames=16, parameters=5_293_225_152, feed_forward=(14336, 2), projections=9, gguf=False,
        size_name="5B", note="the original attends to 16 context latents at most")},
    recognizes=is_world_wan, convert=PUBLISHED.convert, sizing=SIZING, refuse=refuse,
    sizes=WorldWanSizes.read, network=WorldWan, walks=True, lora_name=PUBLISHED.layer_name, adapter=".nodes.adapters.worldplay_5b",
    licence=LICENCE)
