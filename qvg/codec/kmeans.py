"""k-means over the tokens of each row: assign, update, and the loop of both.

Each op has a kernel in `kernels/`; the functions here are their definition. Axes: R rows, T tokens, C centroids, D channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends


def assign(x: Tensor, centroids: Tensor) -> Tensor:
    """Nearest centroid of each token: x [R, T, D], centroids [R, C, D], both float32 -> int64 [R, T]. Of equally near ones the reference
    takes the lower id, and a kernel any."""
    return backends.run("assign", _assign, x, centroids)


def _assign(x: Tensor, centroids: Tensor) -> Tensor:
    # |x|^2 is the same for every centroid and is left out
    half_norms = 0.5 * centroids.square().sum(-1)
    return torch.baddbmm(half_norms[:, None], x, centroids.transpose(1, 2), alpha=-1.0).argmin(-1)


def draw(tokens: int, count: int, times: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Indices of distinct tokens for k-means to start from, int64 [times, count]. A CPU generator, so that every device draws the same."""
    # a copy from pinned memory does not block the host
    drawn = torch.empty(times, count, dtype=torch.int64, pin_memory=device.type == "cuda")
    for numbers in drawn:
        numbers.copy_(torch.randperm(tokens, generator=generator)[:count])
    return drawn.to(device, non_blocking=True)


def kmeans(x: Tensor, start: Tensor, iterations: int) -> Tensor:
    """k-means centroids of x [R, T, D] from `start` [R, C, D] float32, of the same shape; T >= C.

    An iteration moves each centroid to the mean of its nearest tokens. A centroid without tokens moves to a token: of its share of T / C
    neighbouring tokens, the one farthest from its own centroid.
    """
    return backends.run("kmeans", _kmeans, x, start, iterations)


def _kmeans(x: Tensor, start: Tensor, iterations: int) -> Tensor:
    x, centroids = x.float(), start
    for _ in range(iterations):
        centroids = update(x, assign(x, centroids), centroids)
    return centroids


def update(x: Tensor, ids: Tensor, centroids: Tensor) -> Tensor:
    """The centroids after an iteration [R, C, D], where x [R, T, D] is assigned to `ids` [R, T] of `centroids`; see `kmeans`.

    Sums are matrix products with the one-hot assignment: no float atomics, so two runs give the same bits.
    """
    return backends.run("update", _update, x, ids, centroids)


def _update(x: Tensor, ids: Tensor, centroids: Tensor) -> Tensor:
    count = centroids.shape[1]
    one_hot = F.one_hot(ids, count).to(x.dtype)
    sizes = one_hot.sum(1)
    means = torch.bmm(one_hot.transpose(1, 2), x) / sizes.clamp(min=1)[..., None]
    empty = sizes == 0
    if x.device.type == "cpu" and not empty.any():  # elsewhere the check would block the host
        return means
    share = x.shape[1] // count
    error = (x - gather_centroids(centroids, ids)).square().sum(-1)
    worst = error[:, :share * count].unflatten(1, (count, share)).argmax(-1) + share * torch.arange(count, device=x.device)
    candidates = x.gather(1, worst[..., None].expand_as(means))
    return torch.where(empty[..., None], candidates, means)


def gather_centroids(values: Tensor, ids: Tensor) -> Tensor:
    """The centroid of each token: values [R, C, D], ids int64 [R, T] -> [R, T, D]. On a CPU four times as fast as `gather`."""
    rows, count = values.shape[:2]
    return F.embedding(ids + torch.arange(0, rows * count, count, device=ids.device)[:, None], values.flatten(0, 1))
