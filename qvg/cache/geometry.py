"""The shape of a model's cache, and what follows from it alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

# offloaded tensors begin at multiples of this many bytes, which kernels require of what they read
ALIGN = 128
# attention in eight bits: tokens of a tile of keys, which has a scale of its own, and of which the packed ones are a multiple
TILE, PACKED = 64, 128
# bytes of the workspace, however long a video is, where attention can read a history in pieces
WORKSPACE_LIMIT = 96 << 20
# and on GPUs of so many bytes and more, which are done with a piece sooner than the host with the launches of the next: within 96 MiB an
# H200 took 1.7 to 2.1 times as long for a step of HY-WorldPlay 5B, and 16 to 39 % longer for a chunk behind 60 frames of the causal Wan
LARGE_GPU, LARGE_LIMIT = 36 << 30, 320 << 20


@dataclass(frozen=True)
class Geometry:
    """The shape of a model's cache. grid: tokens (height, width) of a latent frame; heads counts the heads that keep K and V.

    buffers: groups of heads that are held decoded at once, see `buffers_on`. branches: attention branches that read the same keys and
    values, each at positions of its own; a second one needs a copy of every group that is decoded. limit: bytes of the workspace, within
    which the history is decoded a piece at a time (`division`); 0 where it is decoded whole. packs: bytes that attention in eight bits
    makes of an element of K and one of V, beside what is decoded: 2, 1 where values stay as they are, 0 where another attention reads.
    by_piece: whether offloaded spans come to the device a piece at a time, and not a layer at a time; see `HostStore`.
    """

    layers: int
    heads: int
    head_dim: int
    grid: tuple[int, int]
    batch: int = 1
    buffers: int = 1
    branches: int = 1
    limit: int = 0
    packs: int = 0
    by_piece: bool = False

    @property
    def frame_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def rows(self) -> int:
        return self.batch * self.heads

    @property
    def copies(self) -> int:
        """Pairs of K and V of a group of heads in the workspace."""
        return self.buffers * self.branches

    @property
    def stages(self) -> int:
        """Layers, or pieces, whose offloaded spans are on the device at once: one is read while the next comes."""
        return 2 if self.by_piece else min(2, self.layers)

    def bf16_bytes(self, frames: int) -> int:
        """K and V of every layer at two bytes per element."""
        return 2 * 2 * self.layers * frames * self.frame_tokens * self.rows * self.head_dim


def head_group(heads: int) -> int:
    """Heads decoded at a time: the largest divisor that is at most a quarter of them, or 3 of six heads and more.

    Three of twelve heads a call attend as fast as twelve on an H200; two or four of twelve leave the last wave of blocks half empty and
    lose a third. One of the six that each of two GPUs has leaves most of the device idle.
    """
    return fewer_heads(heads, max(heads // 4, 3 if heads >= 6 else 0), heads)


def buffers_on(device_type: str, heads: int) -> int:
    """Groups of heads that are held decoded at once: where there are streams, one is decoded while the group before attends."""
    return 2 if device_type == "cuda" and head_group(heads) < heads else 1


def on_device(geometry: Geometry, device_type: str, limit: int | None = None) -> Geometry:
    """The geometry with what the kind of device decides: buffers, and where `limit` is None, the limit of the workspace."""
    geometry = replace(geometry, buffers=buffers_on(device_type, geometry.heads))
    if limit is None:
        limit = usual_limit(device_type)
    return replace(geometry, limit=limit, by_piece=limit > 0)


def usual_limit(device_type: str, memory: int = 0) -> int:
    """Bytes of the workspace on a kind of device, 0 where the history is decoded whole. memory: bytes of a GPU, 0 for the one here."""
    if not _joins_pieces(device_type):
        return 0
    if device_type == "cuda" and not memory and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return LARGE_LIMIT if memory >= LARGE_GPU else WORKSPACE_LIMIT


def _joins_pieces(device_type: str) -> bool:
    """Whether a fast attention there returns what joins pieces. torch's flash attention does, on NVIDIA from compute capability 8.0 on; on
    AMD it was not tried."""
    if device_type != "cuda" or not torch.cuda.is_available():
        return True
    return not torch.version.hip and torch.cuda.get_device_capability() >= (8, 0)


class Division(NamedTuple):
    """What is decoded at a time: heads, and latent frames, None for all."""

    heads: int
    frames: int | None


def division(geometry: Geometry, itemsize: int = 2) -> Division:
    """Whole latent frames of a group of heads within the limit of the workspace; of fewer heads where that is less than a frame, and at
    least one frame of one head."""
    most = head_group(geometry.heads)
    if not geometry.limit:
        return Division(most, None)
    frames = max(0, geometry.limit - packed_bytes(geometry, 0, most)) // _frame_bytes(geometry, itemsize)
    heads = fewer_heads(geometry.heads, most, frames)
    return Division(heads, max(1, frames // heads))


def at_a_time(heads: int, usual: Division, longest: int) -> Division:
    """What is decoded at a time of spans of up to `longest` latent frames, each of which is decoded whole. heads: of the cache; usual: of
    shorter spans."""
    if usual.frames is None or longest <= usual.frames:
        return usual
    places = usual.heads * usual.frames
    fewer = fewer_heads(heads, usual.heads, places // longest)
    return Division(fewer, max(longest, places // fewer))


def fewer_heads(heads: int, most: int, places: int) -> int:
    """The largest divisor of `heads` that is at most `most` and `places`; at least 1."""
    return max(divisor for divisor in range(1, max(1, min(most, places)) + 1) if heads % divisor == 0)


def workspace_bytes(geometry: Geometry, frames: int, itemsize: int = 2, longest: int = 0) -> int:
    """K and V of a group of heads over `frames` frames, or the most that are decoded at a time, in every copy. longest: frames of the
    longest span, of which one head at least is decoded whole."""
    heads, piece = division(geometry, itemsize)
    places = heads * frames if piece is None else max(heads * min(frames, piece), min(frames, longest))
    return places * _frame_bytes(geometry, itemsize) + packed_bytes(geometry, 0, heads)


def _frame_bytes(geometry: Geometry, itemsize: int) -> int:
    """K and V of one head over one frame, in every copy, and packed."""
    decoded = 2 * geometry.copies * geometry.batch * geometry.frame_tokens * geometry.head_dim * itemsize
    return decoded + packed_bytes(geometry, geometry.frame_tokens, 0)


def packed_bytes(geometry: Geometry, places: int, heads: int) -> int:
    """K and V in eight bits with their scales, in every buffer. places: tokens of one head. heads: at most so many have them, each of
    which is padded."""
    if not geometry.packs:
        return 0
    # a scale of four bytes for a tile takes less than the last byte; a mean and scales of values for each head
    tokens = (places + PACKED * heads) * (geometry.packs * geometry.head_dim + 1)
    return geometry.buffers * (geometry.batch * (tokens + 8 * heads * geometry.head_dim) + (5 * ALIGN if heads else 0))


def aligned(count: int) -> int:
    """Bytes rounded up to a multiple of `ALIGN`."""
    return -(-count // ALIGN) * ALIGN
