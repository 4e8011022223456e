"""Semantic-Aware Smoothing: what tokens share is subtracted before they are quantized.

k-means over the tokens of each head finds centroids; each token keeps the id of its nearest one and only the difference is
quantized (QVG, arXiv 2602.02958, section 4.1). A second codebook over what the first one leaves is the next stage of Progressive
Residual Quantization (section 4.2).

A codebook is trained once and then serves many spans: later spans only look up their nearest centroids, so the table is paid for once.
Centroids are stored as E4M3 with a scale per channel; the residual is taken against the stored values, so their rounding error is quantized
with the rest instead of being lost.

Axes: T tokens, R rows (batch x heads; each row has its own codebook), C centroids, D channels, S stages.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from . import e4m3
from .finite import zero_nonfinite
from .kmeans import assign, draw, gather_centroids, kmeans

# with fewer tokens per centroid a codebook memorizes its tokens instead of finding what they share
TOKENS_PER_CENTROID = 36
# limit of the float32 residuals of a slice of rows, and of their distances to centroids where those are materialized
SCRATCH_BYTES = 64 << 20
KERNEL_SCRATCH_BYTES = 128 << 20
# a codebook that starts from the previous one takes this many times fewer k-means iterations
WARM = 4
# most tokens per centroid to train on; a context that is stored in one call has several times as many, which would find the same
SEEN = 64


@dataclass(frozen=True)
class Codebook:
    """Centroids of every stage and the channel scales of the residual, shared by the spans encoded with it.

    centroids: uint8 (E4M3) [S, R, C, D]
    centroid_scale: bfloat16 [S, R, 1, D], multiplies the E4M3 values; powers of two, except in older session files
    channel_scale: bfloat16 [R, D], root mean square of the residual in each channel
    """

    centroids: Tensor
    centroid_scale: Tensor
    channel_scale: Tensor

    @property
    def nbytes(self) -> int:
        return self.centroids.nbytes + self.centroid_scale.nbytes + self.channel_scale.nbytes

    @property
    def stages(self) -> int:
        return self.centroids.shape[0]

    @property
    def size(self) -> int:
        """Centroids of a stage."""
        return self.centroids.shape[2]

    def values(self, stage: int | slice, rows: slice = slice(None)) -> Tensor:
        """Centroids of a stage as float32 [R, C, D], or of several [S, R, C, D]."""
        return e4m3.decode(self.centroids[stage, rows]) * self.centroid_scale[stage, rows]


def restore_(books: list[Codebook], residual: Tensor, ids: Tensor, rows: slice) -> Tensor:
    """Undo `subtract` and the channel scales, for N tensors with a codebook each, all of one shape.

    residual float32 [r, N, T, D], which is overwritten; ids uint8 [S, r, N, T] -> float32 [r, N, T, D].
    """
    channel = torch.stack([book.channel_scale[rows] for book in books], dim=1).float()[:, :, None]
    if not books[0].stages:
        return residual.mul_(channel)
    values = e4m3.decode(torch.stack([book.centroids[:, rows] for book in books]))
    values *= torch.stack([book.centroid_scale[:, rows] for book in books]).float()
    count, stages, heads, size, dim = values.shape
    place = torch.arange(0, count * stages * heads * size, size, dtype=torch.int32, device=ids.device)
    # [S, r, N, T] -> the centroids of every token and row, side by side
    index = (ids.int() + place.view(count, stages, heads, 1).permute(1, 2, 0, 3)).movedim(0, -1).reshape(-1, stages)
    table = values.view(-1, dim)
    if ids.device.type == "cpu":
        # fetches and adds all stages in one pass, ten times as fast as any other gather
        sums = F.embedding_bag(index, table, mode="sum")
    else:
        sums = F.embedding(index, table).sum(1)
    return sums.view_as(residual).addcmul_(residual, channel)


def row_slices(rows: int, bytes_per_row: int, limit: int = SCRATCH_BYTES) -> list[slice]:
    """Slices of the row axis whose scratch stays under `limit` (one row at least)."""
    step = max(1, min(rows, limit // max(1, bytes_per_row)))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def store(x: Tensor, found: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centroids float32 [R, C, D] of x [R, T, D] in stored form, and the residual of x against them.

    -> (centroids uint8 (E4M3) [R, C, D], their scale bfloat16 [R, 1, D], residual float32 [R, T, D])
    """
    return backends.run("store", _store, x, found)


def _store(x: Tensor, found: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # the next power of two, so that scaled centroids are exact in bf16; E4M3 is a float, so that costs no precision
    scale = (found.abs().amax(1, keepdim=True) / e4m3.MAX).view(torch.int32).add_(0x7FFFFF).bitwise_and_(0x7F800000).view(torch.float32)
    scale = scale.bfloat16()
    scale[scale == 0] = 1
    codes = e4m3.encode(found / scale.float())
    stored = e4m3.decode(codes) * scale.float()
    return codes, scale, x - gather_centroids(stored, assign(x.float(), stored))


def train(xs: list[Tensor], stages: int, count: int, iterations: int, generator: torch.Generator,
          previous: list[Codebook | None]) -> list[Codebook]:
    """A codebook of each of the tensors [T, R, D], which have one shape. previous: the codebooks before, to start from if all shapes match.

    `stages` may be 0: then there are no centroids, only channel scales. With more than `SEEN` tokens per centroid only every second, third
    and so on is used. All tensors together take as many launches as one, and draw the same random numbers as one after the other.
    """
    if stages:
        xs = [x[::max(1, x.shape[0] // (SEEN * count))] for x in xs]
    (tokens, rows, dim), sides, device = xs[0].shape, len(xs), xs[0].device
    codes = torch.empty(sides, stages, rows, count, dim, dtype=torch.uint8, device=device)
    scales = torch.empty(sides, stages, rows, 1, dim, dtype=torch.bfloat16, device=device)
    rms = torch.empty(sides, rows, dim, dtype=torch.float32, device=device)
    warm = all(book is not None and book.centroids.shape == codes.shape[1:] for book in previous)

    def by_side(x: Tensor) -> Tensor:
        return x.unflatten(0, (sides, -1))

    if warm:
        # the previous centroids are close: the paper's centroid caching
        iterations = max(1, iterations // WARM)
    else:
        # every slice of rows starts from the same tokens, whatever the slices are
        drawn = draw(tokens, count, sides * stages, generator, device).view(sides, stages, count)
    # the kernels make no [tokens, centroids] matrix, and fewer slices are fewer launches
    kernels = not backends.refusal("kmeans", device)
    scratch = (2 * dim, KERNEL_SCRATCH_BYTES) if kernels else (2 * count + 3 * dim, SCRATCH_BYTES)

    def train_rows(part: slice) -> None:
        residual = zero_nonfinite(torch.cat([x[:, part].transpose(0, 1) for x in xs]))
        if warm:
            starts = torch.cat([book.values(slice(None), part) for book in previous], 1)
        for stage in range(stages):
            start = starts[stage] if warm else torch.cat([x[:, at[stage]] for x, at in zip(by_side(residual), drawn)]).float()
            code, scale, residual = store(residual, kmeans(residual, start, iterations))
            codes[:, stage, part], scales[:, stage, part] = by_side(code), by_side(scale)
        rms[:, part] = by_side(residual.float().square().mean(1).sqrt())

    waiting = row_slices(rows, sides * 4 * tokens * scratch[0], scratch[1])[::-1]
    while waiting:
        part = waiting.pop()
        try:
            train_rows(part)
        except torch.OutOfMemoryError:
            # fewer rows at a time give the same result and need less memory
            middle = (part.start + part.stop) // 2
            if middle == part.start:
                raise
            waiting += [slice(middle, part.stop), slice(part.start, middle)]
    # few tokens say little about a channel, and a centroid may have memorized them: missing tokens count as the row's mean
    missing = max(0, TOKENS_PER_CENTROID - tokens)
    power = rms.square()
    mean = power.mean(-1, keepdim=True)
    if missing:
        rms = ((tokens * power + missing * mean) / (tokens + missing)).sqrt()
    # a channel that is zero here may not be later: it gets a thousandth of the row's scale
    rms = rms.clamp(min=1e-3 * mean.sqrt())
    rms[rms == 0] = 1
    return [Codebook(*parts) for parts in zip(codes, scales, rms.bfloat16())]


def subtract(x: Tensor, codebook: Codebook, rows: slice) -> tuple[Tensor, Tensor]:
    """x [T, r, D] float32 of the given rows -> (residual [r, T, D] float32, ids uint8 [S, r, T])."""
    residual = x.transpose(0, 1).contiguous()
    ids = torch.empty(codebook.stages, *residual.shape[:2], dtype=torch.uint8, device=x.device)
    for stage in range(codebook.stages):
        values = codebook.values(stage, rows)
        nearest = assign(residual, values)
        ids[stage] = nearest
        residual = residual - gather_centroids(values, nearest)
    return residual, ids
