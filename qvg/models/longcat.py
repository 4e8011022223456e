"""The LongCat-Video family: a video transformer that continues given frames, segment by segment, and how it is published.

Given latent frames attend only to each other, have timestep 0 and do not attend to the prompt; new frames attend to everything. Keys and
values of given frames therefore do not depend on the step, the prompt or the noise, and one pass over them (`encode`) serves every
denoising step of a segment. As in `models.wan`, the network never sees a cache: it calls a function for each layer's self-attention,

    attend(layer, q, k, v) -> out        # all [B, T, H, D]; q and k after their norm and before RoPE

Parameter names are those of the files that circulate for ComfyUI, with separate q, k and v, because LoRAs and scaled FP8 weights exist for
them; `PUBLISHED` converts the official layout (one qkv, one kv_linear) without copying. Modulation, norms, the timestep's embedding and
the output layer are computed in float32, and `operations` supplies the layers, so that ComfyUI can cast and offload them.

    model = LongCat.from_state_dict(state_dict)
    model.encode(given, CachedAttention(cache, start_frame=0, frames=19, store=True))
    attend = CachedAttention(cache, start_frame=19, frames=5, store=False)
    flow = model(x, timesteps, context, attend=attend)              # [B, C, F, H, W] -> [B, C, F, H, W] float32

The flow points from noise to video: x at noise level s is (1 - s) * video + s * noise, and flow = video - noise.
Source: LongCat-Video (arXiv 2510.22200), longcat_video/modules/longcat_video_dit.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.functions import Attention, sdpa
from ..attention.rope import Rope, rotate
from .family import Family, load_weights
from .layout import Layout
from .shape import ModelShape
from .wan import PATCH, Attend, unpatchify

EPS = 1e-6
PUBLISHED = Layout(
    renamed=(
        ("x_embedder.proj.", "patch_embedding."), ("t_embedder.", "time_embedding."), ("y_embedder.y_proj.", "text_embedding."),
        ("final_layer.linear.", "head.head."), (".adaLN_modulation.", ".modulation."), ("final_layer.modulation.", "head.modulation."),
        (".pre_crs_attn_norm.", ".norm3."), (".attn.", ".self_attn."), (".q_linear.", ".q."), ("attn.proj.", "attn.o."),
        (".q_norm.", ".norm_q."), (".k_norm.", ".norm_k.")),
    fused=((".self_attn.qkv.", (".self_attn.q.", ".self_attn.k.", ".self_attn.v.")),
           (".cross_attn.kv_linear.", (".cross_attn.k.", ".cross_attn.v."))))
# the weights that sizes are read from, and their numbers of axes
SIZING = {"patch_embedding.weight": 5, "text_embedding.0.weight": 2, "time_embedding.mlp.0.weight": 2, "blocks.0.ffn.w1.weight": 2,
          "blocks.0.self_attn.norm_q.weight": 1, "head.head.weight": 2}


@dataclass(frozen=True)
class LongCatSizes:
    """Sizes read from a state dict. The released model: width 4096, 48 layers, 32 heads of 128, 13.6 billion parameters."""

    dim: int
    head_dim: int
    ffn_dim: int
    layers: int
    text_dim: int
    time_dim: int = 512
    freq_dim: int = 256
    channels: int = 16

    @property
    def heads(self) -> int:
        return self.dim // self.head_dim

    @classmethod
    def read(cls, state_dict: Mapping[str, Tensor]) -> LongCatSizes:
        """Sizes from the shapes of a state dict in the layout used here. Raises ValueError when something is missing."""
        missing = [key for key in SIZING if key not in state_dict]
        if missing:
            raise ValueError(f"This is not a LongCat-Video state dict: {', '.join(missing)} is missing. The file may be one part of "
                             "several, or hold another model.")
        dim, channels = state_dict["patch_embedding.weight"].shape[:2]
        time_dim, freq_dim = state_dict["time_embedding.mlp.0.weight"].shape
        return cls(
            dim=dim, channels=channels, time_dim=time_dim, freq_dim=freq_dim,
            head_dim=state_dict["blocks.0.self_attn.norm_q.weight"].shape[0], ffn_dim=state_dict["blocks.0.ffn.w1.weight"].shape[0],
            layers=1 + max(int(key.split(".")[1]) for key in state_dict if key.startswith("blocks.")),
            text_dim=state_dict["text_embedding.0.weight"].shape[1])


class CastingLinear(nn.Linear):
    """A linear layer that computes in the dtype of its input, whatever the dtype of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


TORCH = SimpleNamespace(Linear=CastingLinear, Conv3d=nn.Conv3d, LayerNorm=nn.LayerNorm, RMSNorm=nn.RMSNorm)


class Factory:
    """Makes layers. Bulk weights are stored in `dtype`; precision-critical ones in 16 bits at least, even if `dtype` has 8."""

    def __init__(self, operations, device, dtype: torch.dtype | None):
        self.operations = operations
        self.bulk = {"device": device, "dtype": dtype}
        self.exact = {"device": device, "dtype": torch.bfloat16 if dtype is not None and dtype.itemsize == 1 else dtype}

    def linear(self, inner: int, outer: int, bias: bool = True) -> nn.Module:
        return self.operations.Linear(inner, outer, bias=bias, **self.bulk)

    def exact_linear(self, inner: int, outer: int) -> nn.Module:
        return self.operations.Linear(inner, outer, **self.exact)

    def modulation(self, time_dim: int, outer: int) -> nn.Sequential:
        return nn.Sequential(nn.SiLU(), self.exact_linear(time_dim, outer))


class Projections(nn.Module):
    """q, k, v, o and the query/key norms of one head, the same in self- and cross-attention."""

    def __init__(self, sizes: LongCatSizes, make: Factory):
        super().__init__()
        self.head_dim = sizes.head_dim
        self.q, self.k, self.v, self.o = (make.linear(sizes.dim, sizes.dim) for _ in range(4))
        self.norm_q, self.norm_k = (make.operations.RMSNorm(sizes.head_dim, eps=EPS, **make.exact) for _ in range(2))

    def queries(self, x: Tensor) -> Tensor:
        """[B, T, dim] -> [B, T, H, D]."""
        return self.norm_q(self.q(x).unflatten(-1, (-1, self.head_dim)))

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, dim] -> two of [B, T, H, D]."""
        k, v = (layer(x).unflatten(-1, (-1, self.head_dim)) for layer in (self.k, self.v))
        return self.norm_k(k), v


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, sizes: LongCatSizes, make: Factory):
        super().__init__()
        self.w1, self.w3 = (make.linear(sizes.dim, sizes.ffn_dim, bias=False) for _ in range(2))
        self.w2 = make.linear(sizes.ffn_dim, sizes.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)).mul_(self.w3(x)))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x [B, F, N, dim] normed and modulated in float32, as tokens [B, F * N, dim] of x's dtype."""
    out = F.layer_norm(x.float(), (x.shape[-1],), eps=EPS)
    return torch.addcmul(shift, out, 1 + scale).to(x.dtype).flatten(1, 2)


def gated(x: Tensor, gate: Tensor, out: Tensor) -> Tensor:
    """x + gate * out in float32, in x's dtype; x [B, F, N, dim], out [B, F * N, dim]."""
    return torch.addcmul(x.float(), gate, out.view_as(x).float()).to(x.dtype)


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward; the first and the last are modulated by the frame's timestep."""

    def __init__(self, sizes: LongCatSizes, make: Factory):
        super().__init__()
        self.modulation = make.modulation(sizes.time_dim, 6 * sizes.dim)
        self.self_attn = Projections(sizes, make)
        self.norm3 = make.operations.LayerNorm(sizes.dim, eps=EPS, **make.exact)
        self.cross_attn = Projections(sizes, make)
        self.ffn = FeedForward(sizes, make)

    def forward(self, x: Tensor, time: Tensor, text: Tensor | None, given: int, layer: int, attend: Attend,
                attention: Attention) -> Tensor:
        """x [B, F, N, dim] (N tokens a frame), time [B, F, time_dim] float32, text [B, L, dim] -> [B, F, N, dim].

        The first `given` frames do not attend to the text; without text no frame does.
        """
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = self.modulation(time).unsqueeze(2).chunk(6, dim=-1)

        tokens = modulated(x, shift_a, scale_a)
        out = attend(layer, self.self_attn.queries(tokens), *self.self_attn.keys_values(tokens))
        x = gated(x, gate_a, self.self_attn.o(out.flatten(2)))

        if text is not None:
            new = x[:, given:]
            query = self.cross_attn.queries(self.norm3(new).flatten(1, 2))
            out = attention(query, *self.cross_attn.keys_values(text)).flatten(2)
            new = new + self.cross_attn.o(out).view_as(new)
            x = torch.cat([x[:, :given], new], dim=1) if given else new

        return gated(x, gate_f, self.ffn(modulated(x, shift_f, scale_f)))


class TimeEmbedding(nn.Module):
    """Sinusoids of the timestep through two layers, all in float32."""

    def __init__(self, sizes: LongCatSizes, make: Factory):
        super().__init__()
        self.freq_dim = sizes.freq_dim
        self.mlp = nn.Sequential(make.exact_linear(sizes.freq_dim, sizes.time_dim), nn.SiLU(),
                                 make.exact_linear(sizes.time_dim, sizes.time_dim))

    def forward(self, timestep: Tensor) -> Tensor:
        """[B, F] -> [B, F, time_dim] float32."""
        half = self.freq_dim // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half)
        angles = timestep.float()[..., None] * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class Head(nn.Module):
    """From tokens to latent patches in float32, modulated by the frame's timestep."""

    def __init__(self, sizes: LongCatSizes, make: Factory):
        super().__init__()
        self.head = make.exact_linear(sizes.dim, sizes.channels * math.prod(PATCH))
        self.modulation = make.modulation(sizes.time_dim, 2 * sizes.dim)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [B, F, N, dim], time [B, F, time_dim] -> [B, F, N, out] float32."""
        shift, scale = self.modulation(time).unsqueeze(2).chunk(2, dim=-1)
        return self.head(modulated(x, shift, scale).float()).unflatten(1, x.shape[1:3])


class LongCat(nn.Module):
    """LongCat-Video. The module's docstring explains `attend`, layouts and types.

    operations: a namespace with Linear, Conv3d, LayerNorm and RMSNorm, torch's own by default. dtype: of the weights.
    Raises ValueError when the heads do not divide the width.
    """

    def __init__(self, sizes: LongCatSizes, *, operations=TORCH, device=None, dtype: torch.dtype | None = None):
        super().__init__()
        if sizes.dim % sizes.head_dim:
            raise ValueError(f"Heads of {sizes.head_dim} channels do not divide a width of {sizes.dim}; the file may be damaged.")
        self.sizes = sizes
        make = Factory(operations, device, dtype)
        self.patch_embedding = operations.Conv3d(sizes.channels, sizes.dim, PATCH, PATCH, **make.exact)
        self.text_embedding = nn.Sequential(
            make.exact_linear(sizes.text_dim, sizes.dim), nn.GELU(approximate="tanh"), make.exact_linear(sizes.dim, sizes.dim))
        self.time_embedding = TimeEmbedding(sizes, make)
        self.blocks = nn.ModuleList(Block(sizes, make) for _ in range(sizes.layers))
        self.head = Head(sizes, make)

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> LongCat:
        """The model that a state dict in either layout describes, weights loaded strictly, in `dtype` (default: as stored)."""
        state = PUBLISHED.convert(state_dict)
        return load_weights(cls, LongCatSizes.read(state), state, dtype)

    def float32_layers(self) -> list[nn.Module]:
        """The linear layers whose input is float32, whatever the dtype of the rest."""
        parts = [self.time_embedding, self.head, *(block.modulation for block in self.blocks)]
        # `operations` may supply a Linear that is not torch's
        return [layer for part in parts for layer in part.modules() if hasattr(layer, "in_features")]

    def embed_text(self, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Text embedding [B, L, text_dim] -> [B, L, dim].

        mask [B, L] is true where there is text; without it, rows of zeros are padding, as ComfyUI's text encoder returns them. Padding is
        zeroed again after the projection, which has a bias, and is attended to like text.
        """
        present = context.any(-1) if mask is None else mask.bool()
        return self.text_embedding(context) * present[..., None]

    def encode(self, given: Tensor, attend: Attend) -> None:
        """Pass clean latents [B, C, F, H, W] through all layers, so that `attend` can store their keys and values."""
        timestep = torch.zeros(given.shape[0], given.shape[2], device=given.device)
        self._transform(given, timestep, None, 0, attend, sdpa)

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor, mask: Tensor | None = None, *, given: int = 0,
                attend: Attend | None = None, attention: Attention = sdpa) -> Tensor:
        """Predict the flow (video minus noise), float32.

        x: latents [B, C, F, H, W] in the dtype to compute in, H and W even. timestep: [B] or [B, F], 0 (finished) to 1000 (noise).
        context, mask: see `embed_text`. given: number of leading frames of x that are given; their timestep is taken as 0.
        attend: without one, given and new frames attend as the module's docstring says, from frame 0. attention: computes attention to
        the text, and to frames if there is no `attend`.
        Raises ValueError for an odd height or width.
        """
        # the original rounds timesteps to its compute dtype
        timestep = timestep.to(x.dtype)
        if timestep.ndim == 1:
            timestep = timestep[:, None].expand(-1, x.shape[2])
        if given:
            timestep = torch.cat([torch.zeros_like(timestep[:, :given]), timestep[:, given:]], dim=1)
        attend = attend or self._attend_all(x.shape, given, attention)
        tokens, time = self._transform(x, timestep, self.embed_text(context.to(x.dtype), mask), given, attend, attention)
        return unpatchify(self.head(tokens, time), self._grid(x.shape))

    def _transform(self, x: Tensor, timestep: Tensor, text: Tensor | None, given: int, attend: Attend,
                   attention: Attention) -> tuple[Tensor, Tensor]:
        self._grid(x.shape)
        # [B, C, F, H, W] -> [B, F, N, dim]
        tokens = self.patch_embedding(x).flatten(3).permute(0, 2, 3, 1).contiguous()
        time = self.time_embedding(timestep)
        for layer, block in enumerate(self.blocks):
            tokens = block(tokens, time, text, given, layer, attend, attention)
        return tokens, time

    @staticmethod
    def _grid(shape) -> tuple[int, int]:
        height, width = shape[-2:]
        if height % PATCH[1] or width % PATCH[2]:
            raise ValueError(f"The latent is {width} x {height}; LongCat-Video divides it into patches of 2 x 2, so use a video "
                             "whose width and height are multiples of 16 pixels.")
        return height // PATCH[1], width // PATCH[2]

    def _attend_all(self, shape, given: int, attention: Attention) -> Attend:
        grid = self._grid(shape)
        rope, cut = Rope(self.sizes.head_dim, grid), given * grid[0] * grid[1]
        angles = None

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            nonlocal angles
            if angles is None:
                angles = [part[:, None] for part in rope.tables(0, shape[2], q.device)]
            q, k = rotated(q, *angles), rotated(k, *angles)
            new = attention(q[:, cut:], k, v)
            return torch.cat([attention(q[:, :cut], k[:, :cut], v[:, :cut]), new], dim=1) if cut else new

        return attend


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rope.rotate` of a whole video x [B, T, H, D], head by head to keep its float32 copies small."""
    out = torch.empty_like(x)
    for head in range(x.shape[2]):
        out[:, :, head] = rotate(x[:, :, head:head + 1], cos, sin)[:, :, 0]
    return out


def is_longcat(state: Mapping[str, Tensor]) -> bool:
    """Whether this is LongCat-Video in either layout: a Wan-like network with SwiGLU and a modulation layer in every block."""
    return {"blocks.0.ffn.w3.weight", "blocks.0.norm3.weight", "head.modulation.1.weight"} <= {
        ours for name in state for ours in PUBLISHED.our_names(name)}


LONGCAT = Family(
    name="longcat", title="LongCat-Video",
    # source: the published configuration; a latent frame of 832 x 480 is 1560 tokens
    shapes={"longcat": ModelShape(
        48, 32, 16, (832, 480), 5, 15, segment_frames=24, parameters=13_581_071_424, feed_forward=(11008, 3), gguf=False, size_name="13.6B",
        note="the cache holds the given latent frames of one segment, 19 at most, however long the video is")},
    recognizes=is_longcat, embeddings=("patch_embedding", "x_embedder"), convert=PUBLISHED.convert, fragments=("pre_crs_attn_norm.",),
    sizing=SIZING, sizes=LongCatSizes.read, network=LongCat, lora_name=PUBLISHED.layer_name, adapter=".nodes.adapters.longcat")
