"""The LongCat-Video network: a video transformer that continues what it is given, segment by segment.

What makes a token part of the given video or of the new one is not in the weights but in what it may look at. Given latent frames see
each other alone, have timestep 0 and never see the prompt; new frames see everything. Keys and values of given frames therefore do not
depend on the step, the prompt or the noise, and one pass over them (`encode`) serves every denoising step of a segment. As in
`models.wan`, the network never sees a cache: it asks a callable for each layer's self-attention,

    attend(layer, q, k, v) -> out        # all [B, T, H, D]; q and k after their norm and before RoPE

Parameter names are those of the files that circulate for ComfyUI, with separate q, k and v, since LoRAs and scaled FP8 weights exist for
them; `names.split_layout` turns the official layout (one qkv, one kv_linear) into it without copying. Modulation, norms, the timestep's
embedding and the output layer are computed in float32, and `operations` supplies the layers, so that ComfyUI can cast and offload them.

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

from ..attention.cached import Attention, sdpa
from ..attention.rope import Rope, rotate
from .names import split_layout, split_names
from .wan import PATCH, Attend, unpatchify

EPS = 1e-6

def is_longcat(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether this is LongCat-Video in either layout: a Wan-like network with SwiGLU and a modulation layer in every block."""
    return {"blocks.0.ffn.w3.weight", "blocks.0.norm3.weight", "head.modulation.1.weight"} <= {
        new for name in state_dict for new in split_names(name)}


@dataclass(frozen=True)
class LongCatSizes:
    """What a state dict says about itself. The released model: 4096 wide, 48 layers of 32 heads of 128, 13.6 billion parameters."""

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
        needed = ("patch_embedding.weight", "text_embedding.0.weight", "time_embedding.mlp.0.weight", "blocks.0.ffn.w1.weight",
                  "blocks.0.self_attn.norm_q.weight", "head.head.weight")
        missing = [key for key in needed if key not in state_dict]
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
    """A linear layer that computes in the type of its input, whatever its weights are kept in."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


TORCH = SimpleNamespace(Linear=CastingLinear, Conv3d=nn.Conv3d, LayerNorm=nn.LayerNorm, RMSNorm=nn.RMSNorm)


class Factory:
    """Makes layers. Bulk weights are kept in `dtype`; what needs its precision stays at 16 bits or more where that is one byte."""

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
    """q, k, v, o and the query/key norms of one head: what self- and cross-attention have in common."""

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

        The first `given` frames do not see the text; without text nobody does.
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
    """LongCat-Video. See the module's text for `attend`, layouts and types.

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
        state = split_layout(state_dict)
        with torch.device("meta"):
            model = cls(LongCatSizes.read(state))
        model.load_state_dict({key: value.to(dtype or value.dtype) for key, value in state.items()}, assign=True)
        return model.requires_grad_(False).eval()

    def float32_layers(self) -> list[nn.Module]:
        """The linear layers that are given float32 whatever type the rest computes in."""
        parts = [self.time_embedding, self.head, *(block.modulation for block in self.blocks)]
        # `operations` may bring a Linear that is none of torch's
        return [layer for part in parts for layer in part.modules() if hasattr(layer, "in_features")]

    def embed_text(self, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Text embedding [B, L, text_dim] -> [B, L, dim].

        mask [B, L] is true where there is text; without it, rows of zeros are padding, as ComfyUI's text encoder leaves them. Padding is
        zero behind the projection, whose bias would make words of it, and is attended to like text.
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

        x: latents [B, C, F, H, W] in the type to compute in, H and W even. timestep: [B] or [B, F], 0 (finished) to 1000 (noise).
        context, mask: see `embed_text`. given: leading frames of x that are given; their timestep is 0 whatever it says.
        attend: without one, given and new frames attend as the module's text says, from frame 0. attention: what computes the rest.
        Raises ValueError for an odd height or width.
        """
        # the original rounds timesteps to the type that it computes in
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
            raise ValueError(f"The latent is {width} x {height}; LongCat-Video cuts it into 2 x 2 patches, so use a video whose width and "
                             "height are multiples of 16 pixels.")
        return height // PATCH[1], width // PATCH[2]

    def _attend_all(self, shape, given: int, attention: Attention) -> Attend:
        grid = self._grid(shape)
        rope, cut = Rope(self.sizes.head_dim, grid), given * grid[0] * grid[1]
        angles = None

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            nonlocal angles
            if angles is None:
                angles = [part[:, None] for part in rope.tables(0, shape[2], q.device)]
            q, k = turned(q, *angles), turned(k, *angles)
            new = attention(q[:, cut:], k, v)
            return torch.cat([attention(q[:, :cut], k[:, :cut], v[:, :cut]), new], dim=1) if cut else new

        return attend


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rope.rotate` of a whole video x [B, T, H, D], head by head, since its float32 copies would exceed all else."""
    out = torch.empty_like(x)
    for head in range(x.shape[2]):
        out[:, :, head] = rotate(x[:, :, head:head + 1], cos, sin)[:, :, 0]
    return out
