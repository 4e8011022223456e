"""The 8B variant of HY-WorldPlay: HunyuanVideo-1.5 that follows a camera and actions, chunk by chunk, and how it is published.

Text and video have weights of their own in every layer. Text attends only to text and has timestep 0, so its keys and values do not
depend on the video and are computed once a prompt (`text`). A frame attends to the text, to context frames and to its own chunk,
twice: once with positions (RoPE), once with cameras (PRoPE). As in `models.wan`, the network never sees a cache, positions or cameras:
it calls a function for each layer,

    attend(layer, q, k, v, text=(tk, tv)) -> (out, out_prope)

q, k, v and both results are [B, T, H, D], raw: q and k after their norm, before RoPE and PRoPE. tk and tv [B, L, H, D] are the layer's
text, which has neither. The original attends to [text, context, chunk] in both branches, all to all, and `out_prope` is already
transformed back. Context frames are clean and pass through the network first (`encode`), with timestep 14 and their own actions; they
attend to the text and to each other.

Each latent frame has its own timestep and action. The flow points from video to noise, as in `models.wan`: x at noise level s is
(1 - s) * video + s * noise, and flow = noise - video. `hunyuan_layers` says in which precision what is computed. Parameter names are
those of the published files, grouped by `PUBLISHED`, which converts without copying.

    model = WorldPlayHunyuan.from_state_dict(state_dict)
    text = model.text(prompt, image=siglip)                                     # once per prompt
    model.encode(context, timesteps, text, attend, action=labels)               # once per chunk
    flow = model(x, timesteps, text, attend, action=labels)                     # [B, 65, F, H, W] -> [B, 32, F, H, W]

Source: HY-WorldPlay (arXiv 2512.14614), hyvideo/models/transformers/worldplay_1_5_transformer.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..attention.functions import Attention, sdpa
from ..attention.rope import Rope
from .family import Family, load_weights
from .hunyuan_layers import EPS, TORCH, FeedForward, HunyuanSizes, NumberEmbedding, modulated
from .hunyuan_text import TextTokens
from .layout import Layout
from .longcat import Factory
from .shape import ModelShape
from .worldplay_schedule import CONTEXT_TIMESTEP as CONTEXT_TIMESTEP
from .worldplay_schedule import LICENCE

THETA = 256.0
PATCH = (1, 1, 1)
PUBLISHED = Layout(
    renamed=(
        ("txt_in.", "text_in.refiner."), ("byt5_in.", "text_in.glyphs."), ("vision_in.", "text_in.image."),
        ("cond_type_embedding.", "text_in.kinds."), (".individual_token_refiner.blocks.", ".blocks."),
        (".c_embedder.linear_1.", ".c_embedder.fc1."), (".c_embedder.linear_2.", ".c_embedder.fc2."),
        (".self_attn_qkv.", ".self_attn.qkv."), (".self_attn_proj.", ".self_attn.o."), (".adaLN_modulation.", ".modulation."),
        (".img_attn_prope_proj.", ".img.prope."),
        *((f".{side}{theirs}", f".{side}{ours}") for side in ("img", "txt") for theirs, ours in (
            ("_attn_q_norm.", ".norm_q."), ("_attn_k_norm.", ".norm_k."), ("_attn_q.", ".q."), ("_attn_k.", ".k."), ("_attn_v.", ".v."),
            ("_attn_proj.", ".o."), ("_mod.linear.", ".modulation.1."), ("_mlp.", ".mlp.")))),
    fused=())
# the weights that sizes are read from, and their numbers of axes
SIZING = {"img_in.proj.weight": 5, "double_blocks.0.img.norm_q.weight": 1, "double_blocks.0.img.mlp.fc1.weight": 2,
          "text_in.refiner.input_embedder.weight": 2, "text_in.glyphs.fc1.weight": 2, "text_in.image.proj.1.weight": 2,
          "time_in.mlp.0.weight": 2, "final_layer.linear.weight": 2}
# inputs and layers of other HunyuanVideo models, which HY-WorldPlay does not have
OTHERS = ("guidance_in", "time_r_in", "vector_in", "single_blocks")

Keys = tuple[Tensor, Tensor]
Attend = Callable[..., tuple[Tensor, Tensor]]


def read_sizes(state_dict: Mapping[str, Tensor]) -> HunyuanSizes:
    """Sizes from the shapes of a state dict in the names used here. Raises ValueError when something is missing."""
    missing = [key for key in SIZING if key not in state_dict]
    if missing:
        raise ValueError(f"This is not a HY-WorldPlay 8B state dict: {', '.join(missing)} is missing. The file may be damaged, or hold "
                         "another model.")
    dim, inputs = state_dict["img_in.proj.weight"].shape[:2]
    glyph_hidden, glyph_dim = state_dict["text_in.glyphs.fc1.weight"].shape
    return HunyuanSizes(
        dim=dim, inputs=inputs, head_dim=state_dict["double_blocks.0.img.norm_q.weight"].shape[0],
        ffn_dim=state_dict["double_blocks.0.img.mlp.fc1.weight"].shape[0],
        layers=1 + max(int(key.split(".")[1]) for key in state_dict if key.startswith("double_blocks.")),
        channels=state_dict["final_layer.linear.weight"].shape[0], text_dim=state_dict["text_in.refiner.input_embedder.weight"].shape[1],
        glyph_dim=glyph_dim, glyph_hidden=glyph_hidden, image_dim=state_dict["text_in.image.proj.1.weight"].shape[1],
        freq_dim=state_dict["time_in.mlp.0.weight"].shape[1])


class HunyuanRope(Rope):
    """Channels 2i and 2i + 1 are a pair, as in `Rope`. Of 128 channels, 16 rotate with the frame, 56 each with the row and the column."""

    def __init__(self, head_dim: int, grid: tuple[int, int]):
        super().__init__(head_dim, grid, THETA)
        side = 2 * (7 * head_dim // 32)
        self.dims = (head_dim - 2 * side, side, side)


class Stream(nn.Module):
    """The layers of one block that text or video has for itself."""

    def __init__(self, sizes: HunyuanSizes, make: Factory):
        super().__init__()
        self.heads = sizes.heads
        self.modulation = make.modulation(sizes.dim, 6 * sizes.dim)
        self.q, self.k, self.v, self.o = (make.linear(sizes.dim, sizes.dim) for _ in range(4))
        self.norm_q, self.norm_k = (make.operations.RMSNorm(sizes.head_dim, eps=EPS, **make.exact) for _ in range(2))
        self.mlp = FeedForward(make.linear(sizes.dim, sizes.ffn_dim), nn.GELU(approximate="tanh"), make.linear(sizes.ffn_dim, sizes.dim))

    def keys_values(self, x: Tensor) -> Keys:
        """[B, T, dim] -> two of [B, T, H, D]."""
        k, v = (layer(x).unflatten(-1, (self.heads, -1)) for layer in (self.k, self.v))
        return self.norm_k(k), v

    def queries(self, x: Tensor) -> Tensor:
        """[B, T, dim] -> [B, T, H, D]."""
        return self.norm_q(self.q(x).unflatten(-1, (self.heads, -1)))

    def modulations(self, time: Tensor) -> tuple[Tensor, ...]:
        """[B, F, dim] -> shift, scale and gate of attention, then of feed-forward, [B, F, 1, dim] each."""
        return self.modulation(time).unsqueeze(2).chunk(6, dim=-1)


class VideoStream(Stream):
    def __init__(self, sizes: HunyuanSizes, make: Factory):
        super().__init__(sizes, make)
        self.prope = make.linear(sizes.dim, sizes.dim)

    def forward(self, x: Tensor, time: Tensor, text: Keys, layer: int, attend: Attend) -> Tensor:
        """x [B, F, N, dim] (N tokens a frame), time [B, F, dim], text k and v [B, L, H, D] -> [B, F, N, dim]."""
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = self.modulations(time)
        tokens = modulated(x, shift_a, scale_a)
        out, out_prope = attend(layer, self.queries(tokens), *self.keys_values(tokens), text=text)
        out = self.o(out.flatten(2)) + self.prope(out_prope.flatten(2))
        x = x + gate_a * out.view_as(x)
        return x + gate_f * self.mlp(modulated(x, shift_f, scale_f)).view_as(x)


class TextStream(Stream):
    def forward(self, x: Tensor, time: Tensor, attention: Attention, last: bool) -> tuple[Tensor, Keys]:
        """x [B, 1, L, dim], time [B, 1, dim] -> the same after this layer, and the layer's k and v [B, L, H, D].

        last: nothing follows but the keys and values, so x is returned as it is.
        """
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = self.modulations(time)
        tokens = modulated(x, shift_a, scale_a)
        keys = self.keys_values(tokens)
        if last:
            return x, keys
        out = self.o(attention(self.queries(tokens), *keys).flatten(2))
        x = x + gate_a * out.unsqueeze(1)
        return x + gate_f * self.mlp(modulated(x, shift_f, scale_f)).unsqueeze(1), keys


class Block(nn.Module):
    def __init__(self, sizes: HunyuanSizes, make: Factory):
        super().__init__()
        self.img, self.txt = VideoStream(sizes, make), TextStream(sizes, make)


class Patches(nn.Module):
    """From latents to tokens; a patch is one latent pixel."""

    def __init__(self, sizes: HunyuanSizes, make: Factory):
        super().__init__()
        self.proj = make.operations.Conv3d(sizes.inputs, sizes.dim, PATCH, PATCH, **make.exact)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, F, H, W] -> [B, F, N, dim]."""
        return self.proj(x).flatten(3).permute(0, 2, 3, 1).contiguous()


class Head(nn.Module):
    """From tokens to latents, modulated by the frame's timestep and action."""

    def __init__(self, sizes: HunyuanSizes, make: Factory):
        super().__init__()
        self.linear = make.exact_linear(sizes.dim, sizes.channels)
        self.modulation = make.modulation(sizes.dim, 2 * sizes.dim)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [B, F, N, dim], time [B, F, dim] -> [B, F, N, channels]."""
        shift, scale = self.modulation(time).unsqueeze(2).chunk(2, dim=-1)
        return self.linear(modulated(x, shift, scale)).unflatten(1, x.shape[1:3])


class WorldPlayHunyuan(nn.Module):
    """HY-WorldPlay 8B. The module's docstring explains `attend` and what is computed when.

    operations: a namespace with Linear, Conv3d, LayerNorm, RMSNorm and Embedding, torch's own by default. dtype: of the weights.
    Raises ValueError when the heads do not divide the width.
    """

    def __init__(self, sizes: HunyuanSizes, *, operations=TORCH, device=None, dtype: torch.dtype | None = None):
        super().__init__()
        if sizes.dim % sizes.head_dim:
            raise ValueError(f"Heads of {sizes.head_dim} channels do not divide a width of {sizes.dim}; the file may be damaged.")
        self.sizes = sizes
        make = Factory(operations, device, dtype)
        self.img_in = Patches(sizes, make)
        self.text_in = TextTokens(sizes, make)
        self.time_in, self.action_in = NumberEmbedding(sizes, make), NumberEmbedding(sizes, make)
        self.double_blocks = nn.ModuleList(Block(sizes, make) for _ in range(sizes.layers))
        self.final_layer = Head(sizes, make)

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> WorldPlayHunyuan:
        """The model that a state dict in either layout describes, weights loaded strictly, in `dtype` (default: as stored)."""
        state = PUBLISHED.convert(state_dict)
        return load_weights(cls, read_sizes(state), state, dtype)

    def text(self, context: Tensor, mask: Tensor | None = None, *, glyphs: Tensor | None = None, glyph_mask: Tensor | None = None,
             image: Tensor | None = None, attention: Attention = sdpa) -> list[Keys]:
        """Every layer's text keys and values [B, L, H, D], constant while prompt and image hold.

        context: Qwen2.5-VL's tokens of the prompt [B, L, text_dim] in the dtype to compute in. glyphs: byT5's tokens of quoted words
        [B, M, glyph_dim]. image: SigLIP's tokens of the start image [B, N, image_dim]; a negative prompt has them, too. Masks [B, L]
        and [B, M] are 0 where there is padding, which is left out.
        Raises ValueError where prompts of one batch differ in length.
        """
        timestep = torch.zeros(len(context), 1, device=context.device)
        x = self.text_in(context, mask, glyphs, glyph_mask, image, timestep, attention).unsqueeze(1)
        time, keys = self.time_in(timestep, context.dtype), []
        for number, block in enumerate(self.double_blocks, 1):
            x, layer = block.txt(x, time, attention, number == len(self.double_blocks))
            keys.append(layer)
        return keys

    def encode(self, x: Tensor, timestep: Tensor, text: list[Keys], attend: Attend, *, action: Tensor) -> None:
        """Pass clean context frames through all layers, so that `attend` can store their keys and values. Arguments as in `forward`; the
        original's timestep is CONTEXT_TIMESTEP."""
        self._transform(x, timestep, text, attend, action)

    def forward(self, x: Tensor, timestep: Tensor, text: list[Keys], attend: Attend, *, action: Tensor) -> Tensor:
        """Predict the flow (noise minus video) [B, channels, F, H, W] of a chunk.

        x: latents, image condition and mask [B, inputs, F, H, W], see `with_start_image`, in the dtype to compute in. timestep: [B, F],
        0 to 1000 (noise). action: labels [B, F], 0 to 80.
        """
        tokens, time = self._transform(x, timestep, text, attend, action)
        # [B, F, N, channels] -> [B, channels, F, H, W]
        return self.final_layer(tokens, time).permute(0, 3, 1, 2).unflatten(3, x.shape[-2:])

    def _transform(self, x: Tensor, timestep: Tensor, text: list[Keys], attend: Attend, action: Tensor) -> Keys:
        tokens = self.img_in(x)
        time = self.time_in(timestep, x.dtype) + self.action_in(action, x.dtype)
        for layer, block in enumerate(self.double_blocks):
            tokens = block.img(tokens, time, text[layer], layer, attend)
        return tokens, time


def with_start_image(latents: Tensor, frames: Sequence[int], image: Tensor | None = None) -> Tensor:
    """Latents [B, C, F, H, W] of the video's latent frames `frames`, with the image condition and its mask, [B, 2 C + 1, F, H, W].

    image: latents of the start image [B or 1, C, 1, H, W]. They are the condition of frame 0, with a mask of ones; all else is zero. Frame
    0 itself is noise at first like any other.
    """
    condition, mask = torch.zeros_like(latents), torch.zeros_like(latents[:, :1])
    if image is not None and 0 in frames:
        first = list(frames).index(0)
        condition[:, :, first], mask[:, :, first] = image[:, :, 0], 1
    return torch.cat([latents, condition, mask], dim=1)


def is_worldplay_8b(state: Mapping[str, Tensor]) -> bool:
    """Whether this is HunyuanVideo-1.5 with HY-WorldPlay's action input and camera branch, in either layout."""
    return {"action_in.mlp.0.weight", "double_blocks.0.img.q.weight", "double_blocks.0.img.prope.weight"} <= {
        ours for name in state for ours in PUBLISHED.our_names(name)}


def refuse(state: Mapping[str, Tensor]) -> str:
    """What else a HunyuanVideo network has; see `Family.refuse`."""
    if found := [part for part in OTHERS if any(name.startswith(f"{part}.") for name in state)]:
        return f"has {', '.join(found)}, which HY-WorldPlay 8B does not have; choose a file that its authors published."
    inputs, channels = state["img_in.proj.weight"].shape[1], state["final_layer.linear.weight"].shape[0]
    if inputs != 2 * channels + 1:
        return (f"takes {inputs} channels and returns {channels}; HY-WorldPlay 8B takes latents, an image condition and a mask, "
                f"{2 * channels + 1} in all. Choose a file that its authors published.")
    return ""


HY_WORLDPLAY_8B = Family(
    name="hy-worldplay-8b", title="HY-WorldPlay 8B",
    # source: the published configuration; a latent frame of 832 x 480 is 1560 tokens
    shapes={"hy-worldplay-8b": ModelShape(
        54, 16, 16, (832, 480), 4, 24, context_frames=20, parameters=8_557_933_856, feed_forward=(8192, 4), projections=9, gguf=False,
        size_name="8.6B", note="the original attends to 20 context latents at most")},
    recognizes=is_worldplay_8b, blocks="double_blocks", embeddings=("img_in",), convert=PUBLISHED.convert,
    fragments=("img_attn_prope_proj.",), own=("double_blocks.",), sizing=SIZING, refuse=refuse, sizes=read_sizes,
    network=WorldPlayHunyuan, rope=HunyuanRope, walks=True, lora_name=PUBLISHED.layer_name, adapter=".nodes.adapters.worldplay_8b",
    licence=LICENCE)
