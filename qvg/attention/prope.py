"""PRoPE: where a token was seen from, given to attention as the projection of its frame's camera, in float32 in any model.

With P = lift(K) w2c, the 4 x 4 projection of a frame's camera, each group of four neighbouring channels of a head is a vector of
homogeneous coordinates. Queries are multiplied by the transpose of P, keys and values by its inverse, and what attention returns by P:

    q' . k' = (P_q^T q) . (P_k^-1 k) = q . (P_q P_k^-1) k

so attention knows the projection of one camera relative to the other, and no world: moving all cameras together changes nothing. A model
attends twice, once with RoPE and once with PRoPE, from the same queries, keys and values, and projects the two results apart. Nothing but
the frame's camera enters, so keys and values are cached raw and read back for any set of frames.

On a GPU one kernel reads tokens once and writes both what PRoPE and what RoPE makes of them (`project`).

Source: Li et al. 2025, "Cameras as Relative Positional Encoding" (arXiv 2507.10496). HY-WorldPlay gives it all channels of a head, where
the paper rotates half of them with the place in the picture, and it leaves the principal point out of K.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from .rope import rotate

# a group of four channels alone is too narrow a product: with blocks of 32 channels on the diagonal it takes a tenth of the time on a CPU
# and half of it on an H200
BLOCK = 32
PIECE = 1 << 23  # elements converted to float32 at a time, 32 MiB
REMEMBERED = 64  # sets of frames, a few hundred kB each

Frames = slice | Sequence[int]
ALL = slice(None)


class Turn(NamedTuple):
    """RoPE in the same pass. cos, sin: [T, 1, D / 2] float32. out: where rotated tokens are written, [B, T, h, D]; it may be the tokens
    themselves."""

    cos: Tensor
    sin: Tensor
    out: Tensor


class Prope:
    """Projections of F cameras, for heads of `head_dim` channels and frames of `grid` (height, width) tokens.

    cameras: world to camera [F, 4, 4]; the last row is 0 0 0 1. intrinsics: [F, 3, 3] in widths and heights of the picture, of which the
    focal lengths are used; None leaves K out (GTA). `frames` says which cameras the tokens of a call belong to, in their order, each with
    height * width tokens; by default all.
    Raises ValueError for a head dim that is no multiple of 4 and for matrices of other shapes or with values that are not finite.
    """

    def __init__(self, head_dim: int, grid: tuple[int, int], cameras: Tensor, intrinsics: Tensor | None = None):
        if head_dim % 4:
            raise ValueError(f"PRoPE multiplies groups of four channels, but a head dim of {head_dim} is no multiple of 4.")
        self.head_dim, self.grid = head_dim, grid
        self.frame_tokens = grid[0] * grid[1]
        projection, inverse = projections(cameras, intrinsics)
        self._matrices = {"queries": projection.mT, "keys": inverse, "outputs": projection}
        self._chosen: dict[tuple, Tensor] = {}

    def queries(self, q: Tensor, frames: Frames = ALL, out: Tensor | None = None, turn: Turn | None = None) -> Tensor:
        """P^T q of queries [B, T, H, D], for any number of heads, in q's dtype.

        out: where to write, [B, T, H, D] in any dtype; it may be q itself. turn: rotate them as well.
        Raises ValueError when T is not the tokens of `frames`.
        """
        return self._apply(q, frames, "queries", out, turn)

    def keys(self, k: Tensor, frames: Frames = ALL, out: Tensor | None = None, turn: Turn | None = None) -> Tensor:
        """P^-1 k of keys [B, T, H, D]; see `queries`."""
        return self._apply(k, frames, "keys", out, turn)

    values = keys  # values are multiplied by the same matrices

    def keys_values(self, k: Tensor, v: Tensor, frames: Frames, out: tuple[Tensor, Tensor], turn: Turn | None = None,
                    part: slice = ALL) -> None:
        """`keys` and `values` at once, to `out`; the keys alone are rotated. part: which of `frames` the tokens are of."""
        self._apply(k, frames, "keys", out[0], turn, (v, out[1]), part)

    def outputs(self, x: Tensor, frames: Frames = ALL, out: Tensor | None = None) -> Tensor:
        """P x of what attention returned, [B, T, H, D], for the frames of the queries; see `queries`."""
        return self._apply(x, frames, "outputs", out)

    def _apply(self, x: Tensor, frames: Frames, kind: str, out: Tensor | None, turn: Turn | None = None,
               other: tuple[Tensor, Tensor] | None = None, part: slice = ALL) -> Tensor:
        chosen = range(*frames.indices(len(self._matrices[kind]))) if isinstance(frames, slice) else tuple(frames)
        count = len(chosen[part])
        if x.shape[1] != count * self.frame_tokens:
            raise ValueError(f"{x.shape[1]} tokens were given for {count} frames of {self.grid[0]} x {self.grid[1]} tokens.")
        out = torch.empty_like(x) if out is None else out
        project(x, self._of(kind, chosen, x.device)[part], out, turn, other)
        return out

    def _of(self, kind: str, chosen: Sequence[int], device: torch.device) -> Tensor:
        """Matrices [frames, 4, 4] float32 on the device; the same for every layer and step and so remembered."""
        key = (kind, tuple(chosen), device)
        if key not in self._chosen:
            if len(self._chosen) >= REMEMBERED:
                self._chosen.clear()
            self._chosen[key] = self._matrices[kind][list(chosen)].to(device, torch.float32).contiguous()
        return self._chosen[key]


def project(x: Tensor, matrices: Tensor, out: Tensor, turn: Turn | None = None, other: tuple[Tensor, Tensor] | None = None) -> None:
    """Every four channels of tokens x [B, T, h, D] times the matrix of their frame, written to `out`.

    matrices: [F, 4, 4] float32; T is a multiple of F. out: [B, T, h, D] in any dtype; it may be x itself. turn: x is rotated as well, to
    another place than `out`. other: tokens and the place for them, like x and `out`, that are multiplied by the same matrices.
    """
    if len(matrices):
        backends.run("project", _project, x, matrices, out, turn, other)


def _project(x: Tensor, matrices: Tensor, out: Tensor, turn: Turn | None, other: tuple[Tensor, Tensor] | None) -> None:
    rotated = None if turn is None else rotate(x, turn.cos, turn.sin)
    groups = math.gcd(x.shape[-1], BLOCK) // 4
    # [frames, BLOCK, BLOCK], the transposed matrix repeated along the diagonal, for vectors on the left
    blocks = matrices.new_zeros(len(matrices), groups, 4, groups, 4)
    blocks.diagonal(dim1=1, dim2=3)[:] = matrices.mT[..., None]
    blocks = blocks.view(len(matrices), 4 * groups, 4 * groups)
    tokens = x.shape[1] // len(matrices)
    step = max(1, PIECE // max(1, x[:, :tokens].numel()))
    for source, target in [(x, out), *([] if other is None else [other])]:
        for first in range(0, len(matrices), step):
            part = slice(first * tokens, (first + step) * tokens)
            piece = source[:, part]
            vectors = piece.float().reshape(len(x), -1, piece[:1, :tokens].numel() // blocks.shape[-1], blocks.shape[-1])
            target[:, part] = (vectors @ blocks[first:first + step]).view(piece.shape)
    if turn is not None:
        turn.out[:] = rotated


def projections(cameras: Tensor, intrinsics: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(P, its inverse), [F, 4, 4] float64 on the CPU, of world-to-camera matrices [F, 4, 4] and intrinsics [F, 3, 3].

    P = diag(fx, fy, 1, 1) w2c. Raises ValueError for other shapes, values that are not finite, and focal lengths of 0.
    """
    cameras = _checked(cameras, 4, "World-to-camera matrices")
    inverse = torch.zeros_like(cameras)
    rotation = cameras[:, :3, :3].mT
    inverse[:, :3, :3] = rotation
    inverse[:, :3, 3:] = -rotation @ cameras[:, :3, 3:]
    inverse[:, 3, 3] = 1
    if intrinsics is None:
        return cameras, inverse
    intrinsics = _checked(intrinsics, 3, "Intrinsics")
    if len(intrinsics) != len(cameras):
        raise ValueError(f"{len(cameras)} cameras were given with {len(intrinsics)} intrinsics; give one of each for every latent frame.")
    focal = intrinsics.diagonal(dim1=1, dim2=2)[:, :2]
    if (focal == 0).any():
        raise ValueError("A focal length of 0 was given; intrinsics hold fx and fy on their diagonal, above 0.")
    scale = torch.ones(len(cameras), 4, dtype=torch.float64)
    scale[:, :2] = focal
    return scale[:, :, None] * cameras, inverse / scale[:, None]


def _checked(matrices: Tensor, size: int, what: str) -> Tensor:
    """Matrices [F, size, size] as float64 on the CPU."""
    if matrices.ndim != 3 or matrices.shape[1:] != (size, size):
        raise ValueError(f"{what} have the shape {list(matrices.shape)}; give [frames, {size}, {size}].")
    matrices = matrices.detach().to("cpu", torch.float64)
    if not matrices.isfinite().all():
        raise ValueError(f"{what} hold values that are not finite; every value must be a number.")
    return matrices
