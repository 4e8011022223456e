"""The text side of HunyuanVideo-1.5: one row of tokens from an image, quoted words and a prompt.

    image    SigLIP's tokens of the start image, 729
    glyphs   byT5's tokens of the words that the prompt puts in quotation marks, at most 256
    text     Qwen2.5-VL's tokens of the prompt, at most 1000, refined by two blocks that attend to the prompt alone

They are concatenated in this order, without padding. What is absent has no tokens. The text side always has timestep 0.
Source: HY-WorldPlay, hyvideo/models/transformers/worldplay_1_5_transformer.py and modules/token_refiner.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..attention.functions import Attention
from .hunyuan_layers import EPS, FeedForward, HunyuanSizes, NumberEmbedding, normed
from .longcat import Factory

REFINER_BLOCKS = 2
# rows of the embedding that tells the kinds of tokens apart
TEXT, GLYPHS, IMAGE = range(3)


class SelfAttention(nn.Module):
    def __init__(self, sizes: HunyuanSizes, make: Factory):
        super().__init__()
        self.heads = sizes.heads
        self.qkv, self.o = make.exact_linear(sizes.dim, 3 * sizes.dim), make.exact_linear(sizes.dim, sizes.dim)

    def forward(self, x: Tensor, attention: Attention) -> Tensor:
        # [B, L, 3 * dim] -> three of [B, L, H, D]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return self.o(attention(q, k, v).flatten(2))


class RefinerBlock(nn.Module):
    """Self-attention and feed-forward, gated by the prompt's mean."""

    def __init__(self, sizes: HunyuanSizes, make: Factory):
        super().__init__()
        self.norm1, self.norm2 = (make.operations.LayerNorm(sizes.dim, eps=EPS, **make.exact) for _ in range(2))
        self.self_attn = SelfAttention(sizes, make)
        self.mlp = FeedForward(make.exact_linear(sizes.dim, sizes.ffn_dim), nn.SiLU(), make.exact_linear(sizes.ffn_dim, sizes.dim))
        self.modulation = make.modulation(sizes.dim, 2 * sizes.dim)

    def forward(self, x: Tensor, mean: Tensor, attention: Attention) -> Tensor:
        """x [B, L, dim], mean [B, 1, dim] -> [B, L, dim]."""
        gate_a, gate_f = self.modulation(mean).chunk(2, dim=-1)
        x = x + gate_a * self.self_attn(normed(self.norm1, x, x.dtype), attention)
        return x + gate_f * self.mlp(normed(self.norm2, x, x.dtype))


class Refiner(nn.Module):
    def __init__(self, sizes: HunyuanSizes, make: Factory):
        super().__init__()
        self.input_embedder = make.exact_linear(sizes.text_dim, sizes.dim)
        self.t_embedder = NumberEmbedding(sizes, make)
        self.c_embedder = FeedForward(make.exact_linear(sizes.text_dim, sizes.dim), nn.SiLU(), make.exact_linear(sizes.dim, sizes.dim))
        self.blocks = nn.ModuleList(RefinerBlock(sizes, make) for _ in range(REFINER_BLOCKS))

    def forward(self, text: Tensor, timestep: Tensor, attention: Attention) -> Tensor:
        """[B, L, text_dim] without padding, timestep [B, 1] -> [B, L, dim]."""
        mean = text.mean(1, keepdim=True, dtype=torch.float32).to(text.dtype)
        mean = self.t_embedder(timestep, text.dtype) + self.c_embedder(mean)
        x = self.input_embedder(text)
        for block in self.blocks:
            x = block(x, mean, attention)
        return x


class GlyphMapper(nn.Module):
    def __init__(self, sizes: HunyuanSizes, make: Factory):
        super().__init__()
        hidden = sizes.glyph_hidden
        self.layernorm = make.operations.LayerNorm(sizes.glyph_dim, **make.exact)
        self.fc1, self.fc2 = make.exact_linear(sizes.glyph_dim, hidden), make.exact_linear(hidden, hidden)
        self.fc3 = make.exact_linear(hidden, sizes.dim)
        self.activation = nn.GELU()

    def forward(self, glyphs: Tensor) -> Tensor:
        """[B, L, glyph_dim] -> [B, L, dim]."""
        x = self.activation(self.fc1(normed(self.layernorm, glyphs, glyphs.dtype)))
        return self.fc3(self.activation(self.fc2(x)))


class ImageProjection(nn.Module):
    def __init__(self, sizes: HunyuanSizes, make: Factory):
        super().__init__()
        norm = make.operations.LayerNorm
        self.proj = nn.Sequential(norm(sizes.image_dim, **make.exact), make.exact_linear(sizes.image_dim, sizes.image_dim), nn.GELU(),
                                  make.exact_linear(sizes.image_dim, sizes.dim), norm(sizes.dim, **make.exact))

    def forward(self, image: Tensor) -> Tensor:
        """[B, L, image_dim] -> [B, L, dim] float32."""
        first, inner, activation, outer, last = self.proj
        return normed(last, outer(activation(inner(normed(first, image, image.dtype)))), torch.float32)


class TextTokens(nn.Module):
    """The row of tokens that the module's docstring describes."""

    def __init__(self, sizes: HunyuanSizes, make: Factory):
        super().__init__()
        self.refiner, self.glyphs, self.image = Refiner(sizes, make), GlyphMapper(sizes, make), ImageProjection(sizes, make)
        self.kinds = make.operations.Embedding(3, sizes.dim, **make.exact)

    def forward(self, text: Tensor, mask: Tensor | None, glyphs: Tensor | None, glyph_mask: Tensor | None, image: Tensor | None,
                timestep: Tensor, attention: Attention) -> Tensor:
        """text [B, L, text_dim], glyphs [B, M, glyph_dim], image [B, N, image_dim], masks [B, L] and [B, M] -> [B, tokens, dim].

        With an image the tokens are float32, as the original's are, otherwise they have the text's dtype.
        Raises ValueError where prompts of one batch differ in length.
        """
        dtype = text.dtype
        kinds = self.kinds(torch.arange(3, device=text.device)).to(dtype)
        tokens = [self.refiner(present(text, mask), timestep, attention) + kinds[TEXT]]
        if glyphs is not None:
            tokens.insert(0, self.glyphs(present(glyphs.to(dtype), glyph_mask)) + kinds[GLYPHS])
        if image is not None:
            tokens.insert(0, self.image(image.to(dtype)) + kinds[IMAGE])
            tokens = [part.float() for part in tokens]
        return torch.cat(tokens, dim=1)


def present(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Tokens [B, L, dim] without padding: those where mask [B, L] is not 0. Raises ValueError where their numbers differ."""
    if mask is None:
        return tokens
    numbers = mask.bool().sum(1).tolist()
    if len(set(numbers)) > 1:
        raise ValueError(f"The prompts of one batch have {' and '.join(map(str, numbers))} tokens, which cannot share a batch "
                         "without padding; compute the text of each prompt by itself.")
    return tokens[mask.bool()].view(len(tokens), numbers[0], tokens.shape[-1])
