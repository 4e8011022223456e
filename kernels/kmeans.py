"""k-means for all rows, three launches an iteration. Reference: `qvg.codec.kmeans.kmeans`.

The launch that computes means also prepares them as the centroids of the next iteration.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..qvg.backends import before_launch
from .assign import Search
from .tiles import Product
from .update import Means


def kmeans(x: Tensor, centroids: Tensor, iterations: int) -> Tensor:
    """x [R, T, D] float32 or bf16, centroids [R, C, D] float32 to start from -> float32 [R, C, D]."""
    # the operands of distances are rounded anyway, and this halves what is loaded
    x, centroids = x.to(Product.of(x.shape[-1], x.device).torch_dtype), centroids.contiguous()
    search, means = Search(x, centroids.shape[1]), Means(x, centroids.shape[1])
    ids = torch.empty(x.shape[:2], dtype=torch.int64, device=x.device)
    outs = [torch.empty_like(centroids) for _ in range(2)]
    before_launch("kmeans", x.shape[-1], x.dtype, x.device)
    search.prepare(centroids)
    for step in range(iterations):
        search(ids)
        means(ids, centroids, outs[step % 2], search.table, search.norms)
        centroids = outs[step % 2]
    return centroids
