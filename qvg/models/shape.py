"""Sizes of one model, as far as a memory plan needs them. No code of the model and no weights are involved."""

from __future__ import annotations

from dataclasses import dataclass

from ..cache.geometry import Geometry, on_device
from .weights import GGUF, WEIGHTS, weight_type


@dataclass(frozen=True)
class ModelShape:
    """A model's cache and video.

    layers, heads, head_dim: of the self-attention that is cached. stride: pixels (height and width) per token. size: usual (width,
    height) in pixels. chunk_frames: latent frames per autoregressive chunk. frame_rate: video frames per second. The VAE of every model
    here maps the first video frame to one latent frame, and each four frames after it to one more.
    note: a sentence for the plan. segment_frames: latent frames per segment, for a model that rebuilds its cache for every segment; 0 for
    a cache that grows with the video. context_frames: latent frames before a chunk that a world model reads at most, 0 for other models.
    parameters: of the denoising network, 0 if unknown. feed_forward: its width and its number of
    matrices. projections: number of a layer's attention matrices. gguf: whether GGUF files of it can be sampled. size_name: what a
    checkpoint of this many layers and this width is called.
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
    context_frames: int = 0
    parameters: int = 0
    feed_forward: tuple[int, int] = (0, 0)
    projections: int = 8
    gguf: bool = True
    size_name: str = ""

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim

    def weight_types(self) -> tuple[str, ...]:
        """Keys of `weights.WEIGHTS` in which this model's weights exist."""
        return tuple(name for name in WEIGHTS if self.gguf or name not in GGUF)

    def weight_bytes(self, weights: str = "bf16") -> int:
        """Bytes of all parameters; everything but the matrices of the blocks stays in 16 bits.

        Raises ValueError for a type in which the weights do not exist.
        """
        weights = weight_type(weights)
        if weights not in self.weight_types():
            raise ValueError(f"This model is not opened from GGUF files, so its weights cannot be {weights}; choose one of "
                             f"{', '.join(self.weight_types())}.")
        kind, dim = WEIGHTS[weights], self.dim
        down = self.layers * dim * self.feed_forward[0]
        value = self.layers * 2 * dim * dim
        matrices = self.layers * self.projections * dim * dim + self.feed_forward[1] * down
        bits = 16 * (self.parameters - matrices) + kind.value * value + kind.down * down + kind.bits * (matrices - value - down)
        return round(bits / 8)

    def geometry(self, width: int = 0, height: int = 0) -> Geometry:
        """The cache's geometry on a GPU, for a video of this size in pixels; 0 means the usual size. Raises ValueError for less than one
        token."""
        width, height = width or self.size[0], height or self.size[1]
        if min(width, height) < self.stride:
            raise ValueError(f"A video of {width} x {height} pixels is smaller than one token; give at least {self.stride} pixels a side.")
        grid = -(-height // self.stride), -(-width // self.stride)
        return on_device(Geometry(self.layers, self.heads, self.head_dim, grid), "cuda")

    def latent_frames(self, seconds: float) -> int:
        """Latent frames of a video of this length, rounded up to whole chunks."""
        frames = 1 + -(-max(0, round(seconds * self.frame_rate) - 1) // 4)
        return -(-frames // self.chunk_frames) * self.chunk_frames

    def seconds(self, frames: int) -> float:
        """Length of a video of `frames` latent frames."""
        return (4 * frames - 3) / self.frame_rate
