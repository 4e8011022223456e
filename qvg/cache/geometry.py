"""The shape of a model's cache, and what follows from it alone."""

from __future__ import annotations

from dataclasses import dataclass

# offloaded tensors begin at multiples of this many bytes, which kernels require of what they read
ALIGN = 128


@dataclass(frozen=True)
class Geometry:
    """The shape of a model's cache. grid: tokens (height, width) of a latent frame; heads counts the heads that keep K and V.

    buffers: groups of heads that are held decoded at once, see `buffers_on`.
    """

    layers: int
    heads: int
    head_dim: int
    grid: tuple[int, int]
    batch: int = 1
    buffers: int = 1

    @property
    def frame_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def rows(self) -> int:
        return self.batch * self.heads

    @property
    def staged_layers(self) -> int:
        """Layers whose offloaded spans are on the device at once: one is read while the next comes."""
        return min(2, self.layers)

    def bf16_bytes(self, frames: int) -> int:
        """K and V of every layer at two bytes per element."""
        return 2 * 2 * self.layers * frames * self.frame_tokens * self.rows * self.head_dim


def head_group(heads: int) -> int:
    """Heads decoded at a time: the largest divisor that is at most a quarter of them.

    The workspace then is a quarter of one layer. Three of twelve heads a call attend as fast as twelve on an H200; two or four
    of twelve leave the last wave of blocks half empty and lose a third.
    """
    return max(divisor for divisor in range(1, max(1, heads // 4) + 1) if heads % divisor == 0)


def buffers_on(device_type: str, heads: int) -> int:
    """Groups of heads that are held decoded at once: where there are streams, one is decoded while the group before attends."""
    return 2 if device_type == "cuda" and head_group(heads) < heads else 1


def workspace_bytes(geometry: Geometry, frames: int, itemsize: int = 2) -> int:
    """K and V of a group of heads over `frames` frames, decoded, for each of the buffers."""
    tokens = frames * geometry.frame_tokens
    return 2 * geometry.buffers * geometry.batch * tokens * head_group(geometry.heads) * geometry.head_dim * itemsize


def aligned(count: int) -> int:
    """Bytes rounded up to a multiple of `ALIGN`."""
    return -(-count // ALIGN) * ALIGN
