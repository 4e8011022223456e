"""Rotary position embedding (RoPE) over time, height and width, in float32 whatever the model computes in.

Wan rotates neighbouring channel pairs and splits a head's channels between the three axes: for a head of 128, 44 channels rotate with
the frame, 42 with the row and 42 with the column. Positions built in bf16 collide past 256 frames (257 becomes 256), so positions
here are integers and angles are float32 from float64 frequencies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends

REMEMBERED = 256  # lists of positions, some kB each


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Channels that rotate with time, height and width. Source: Wan 2.1, rope_params."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


class Rope:
    """Angles for one head dim and one patch grid (height, width) in tokens. Raises ValueError for an odd head dim.

    dims: channels that rotate with time, height and width, in this order. Channels 2i and 2i + 1 are a pair. A subclass may change `dims`
    and `angles`; the pairing and the order of the axes are also those of `rotate_chunk` and of kernels, which read only these two.
    """

    def __init__(self, head_dim: int, grid: tuple[int, int], theta: float = 10000.0):
        if head_dim % 2:
            raise ValueError(f"RoPE rotates channel pairs, but a head dim of {head_dim} is odd; use an even one.")
        self.grid = grid
        self.theta = theta
        self.dims = axis_dims(head_dim)
        self._space: Tensor | None = None  # cos and sin of rows and columns, the same for every frame
        self._places: Tensor | None = None  # the same as unit complex numbers [h * w, 1, pairs], for a CPU
        self._times: dict[tuple[tuple[int, int], ...], Tensor] = {}

    def angles(self, positions: Tensor, dim: int) -> Tensor:
        """[N] positions -> [N, dim / 2] angles, float64 where the device has it."""
        dtype = _angle_dtype(positions.device)
        # made on the device where it has float64, because a copy from the host would wait for all that the device has to do
        place = positions.device if dtype == torch.float64 else "cpu"
        exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=place) / dim
        frequencies = (1.0 / self.theta**exponents).to(positions.device, dtype)
        return positions.to(dtype)[:, None] * frequencies

    def space(self, device) -> Tensor:
        """cos and sin, [2, h * w, pairs that rotate with height and width] float32, of every place of a frame."""
        height, width = self.grid
        if self._space is None or self._space.device != torch.device(device):
            rows, columns = (self.angles(torch.arange(count, device=device), dim) for count, dim in zip(self.grid, self.dims[1:]))
            space = torch.cat([rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)], dim=-1).flatten(0, 1)
            self._space = torch.stack([space.cos(), space.sin()]).float()
        return self._space

    def tables(self, first: int, frames: int, device) -> tuple[Tensor, Tensor]:
        """cos and sin, [frames * h * w, head_dim / 2] float32, of `frames` frames from absolute frame `first`."""
        height, width = self.grid
        time = self.angles(torch.arange(first, first + frames, device=device), self.dims[0])
        time = torch.stack([time.cos(), time.sin()]).float()
        shape = (2, frames, height * width)
        both = torch.cat([time[:, :, None].expand(*shape, -1), self.space(device)[:, None].expand(*shape, -1)], dim=-1).flatten(1, 2)
        return both[0], both[1]

    def rotate_frames_(self, x: Tensor, runs: Sequence[tuple[int, int]]) -> Tensor:
        """Apply RoPE to x [T, R, D] float32 at positions given as runs of (first frame, frames), with T = frames * h * w tokens in all.
        Returns the result; x is overwritten on a CPU."""
        if x.device.type != "cpu":
            tables = [self.tables(first, frames, x.device) for first, frames in runs]
            cos, sin = tables[0] if len(tables) == 1 else map(torch.cat, zip(*tables))
            return rotate(x, cos[:, None], sin[:, None])
        # every frame rotates alike in space and every place alike in time, so nothing as large as x is needed
        if self._places is None:
            self._places = torch.complex(*self.space("cpu"))[:, None]
        time = self._rotations(tuple(runs))
        pairs = torch.view_as_complex(x.unflatten(0, (len(time), -1)).unflatten(-1, (-1, 2)))
        pairs[..., :time.shape[-1]].mul_(time)
        pairs[..., time.shape[-1]:].mul_(self._places)
        return x

    def _rotations(self, runs: tuple[tuple[int, int], ...]) -> Tensor:
        """[frames, 1, 1, pairs that rotate with time] unit complex numbers, the same for every layer and step and so remembered."""
        if runs not in self._times:
            if len(self._times) >= REMEMBERED:
                self._times.clear()
            time = self.angles(torch.cat([torch.arange(first, first + frames) for first, frames in runs]), self.dims[0])
            self._times[runs] = torch.complex(time.cos().float(), time.sin().float())[:, None, None]
        return self._times[runs]

    def apply(self, x: Tensor, first: int, frames: int) -> Tensor:
        """RoPE on x [B, T, H, D] with T = frames * h * w tokens, frame-major, from absolute frame `first`. Returns x's dtype.

        Raises ValueError when the tokens are not those of so many frames.
        """
        if x.shape[1] != frames * self.grid[0] * self.grid[1]:
            raise ValueError(f"{x.shape[1]} tokens were given for {frames} frames of {self.grid[0]} x {self.grid[1]} tokens.")
        cos, sin = self.tables(first, frames, x.device)
        return rotate(x, cos[:, None], sin[:, None])


class NoRope(Rope):
    """Positions of a model whose keys need none, or carry theirs already: nothing is rotated."""

    def angles(self, positions: Tensor, dim: int) -> Tensor:
        return torch.zeros(len(positions), dim // 2, dtype=_angle_dtype(positions.device), device=positions.device)

    def rotate_frames_(self, x: Tensor, runs: Sequence[tuple[int, int]]) -> Tensor:
        return x


def _angle_dtype(device) -> torch.dtype:
    # MPS has no float64; float32 holds every position below 2**24 exactly and the product to a relative 6e-8
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel pairs (2i, 2i + 1) of x [..., D] by angles given as cos and sin [..., D / 2], in float32."""
    return backends.run("rotate", _rotate, x, cos, sin)


def rotate_chunk(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, out: tuple[Tensor, Tensor] | None = None) -> list[Tensor]:
    """Queries and keys [B, T, H, D] rotated by angles given as cos and sin [T, 1, D / 2].

    out: keys and values [b, T, h, D] that the first h heads of the first b of the batch are copied to, keys rotated and values as they are.
    """
    return backends.run("rotate_chunk", _rotate_chunk, q, k, v, cos, sin, out)


def _rotate_chunk(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, out: tuple[Tensor, Tensor] | None) -> list[Tensor]:
    rotated = [rotate(x, cos, sin) for x in (q, k)]
    for target, x in zip(out or (), (rotated[1], v)):
        target[:] = x[:len(target), :, :target.shape[2]]
    return rotated


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if x.device.type == "cpu":
        # a pair is a complex number: one pass in place of seven
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return rotated.flatten(-2).to(x.dtype)
