"""Shapes of the models whose cache can be planned: numbers alone, no code and no weights.

Sources: the published configurations of each model; a latent frame of Wan 2.1 and HunyuanVideo-1.5 at 832 x 480 is 1560 tokens, one of
Wan 2.2 5B at 1280 x 704 is 880.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..cache.budget import Geometry, buffers_on
from .weights import GGUF, WEIGHTS, weight_type


@dataclass(frozen=True)
class ModelShape:
    """A model's cache and video.

    layers, heads, head_dim: of the self-attention that is cached. stride: pixels (height and width) of a token. size: usual (width,
    height) in pixels. chunk_frames: latent frames of an autoregressive chunk. frame_rate: video frames a second. Every VAE here makes
    one latent frame of the first video frame and one of each four after it. parameters: of the network that samples, 0 where no code here
    could count them. feed_forward: its width and how many matrices it has. gguf: whether GGUF files of it can be sampled here.
    segment_frames: latent frames of a segment, where the model rebuilds its cache for every segment from the frames before it; 0 where the
    cache grows with the video.
    """

    layers: int
    heads: int
    stride: int
    size: tuple[int, int]
    chunk_frames: int
    frame_rate: int = 16
    head_dim: int = 128
    note: str = ""
    segment_frames: int = 0
    parameters: int = 0
    feed_forward: tuple[int, int] = (0, 0)
    gguf: bool = True

    def weight_types(self) -> tuple[str, ...]:
        return tuple(name for name in WEIGHTS if self.gguf or name not in GGUF)

    def weight_bytes(self, weights: str = "bf16") -> int:
        """Of all parameters; what is no matrix of a block is kept in 16 bits. Raises ValueError for a type that cannot be had."""
        weights = weight_type(weights)
        if weights not in self.weight_types():
            raise ValueError(f"This model is not opened from GGUF files, so its weights cannot be {weights}; choose one of "
                             f"{', '.join(self.weight_types())}.")
        kind, dim = WEIGHTS[weights], self.heads * self.head_dim
        down = self.layers * dim * self.feed_forward[0]
        value = self.layers * 2 * dim * dim
        matrices = self.layers * 8 * dim * dim + self.feed_forward[1] * down
        bits = 16 * (self.parameters - matrices) + kind.value * value + kind.down * down + kind.bits * (matrices - value - down)
        return round(bits / 8)

    def geometry(self, width: int = 0, height: int = 0) -> Geometry:
        """Raises ValueError when a side is not positive."""
        width, height = width or self.size[0], height or self.size[1]
        if min(width, height) < self.stride:
            raise ValueError(f"A video of {width} x {height} pixels is smaller than one token; give at least {self.stride} pixels a side.")
        return Geometry(self.layers, self.heads, self.head_dim, (-(-height // self.stride), -(-width // self.stride)),
                        buffers=buffers_on("cuda", self.heads))

    def latent_frames(self, seconds: float) -> int:
        """Latent frames of a video of this length, in whole chunks."""
        frames = 1 + -(-max(0, round(seconds * self.frame_rate) - 1) // 4)
        return -(-frames // self.chunk_frames) * self.chunk_frames

    def seconds(self, frames: int) -> float:
        return (4 * frames - 3) / self.frame_rate


WAN_SMALL = ModelShape(30, 12, 16, (832, 480), 3, parameters=1_418_996_800, feed_forward=(8960, 2))
MODELS = {
    "self-forcing": WAN_SMALL,
    "causal-forcing": WAN_SMALL,
    "longlive": WAN_SMALL,
    "krea-14b": ModelShape(40, 40, 16, (832, 480), 3, parameters=14_288_491_584, feed_forward=(13824, 2)),
    "longcat": ModelShape(
        48, 32, 16, (832, 480), 5, 15, segment_frames=24, parameters=13_581_071_424, feed_forward=(11008, 3), gguf=False,
        note="the cache holds the given latent frames of one segment, 19 at most, however long the video is"),
    "hy-worldplay-5b": ModelShape(30, 24, 32, (1280, 704), 4, 24, note="raw keys and values; the original stores two copies of each"),
    "hy-worldplay-8b": ModelShape(54, 16, 16, (832, 480), 4, 24, note="the original attends to 20 context latents at most"),
}
