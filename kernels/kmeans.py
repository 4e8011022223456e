"""k-means steps for all rows, three launches each. Twin: `qvg.smoothing.kmeans`.

A step begins where the one before ended: means are also written as `assign` takes centroids.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..qvg.dispatch import Unsupported, before_launch
from .assign import MAX_CENTROIDS, PREPARED, assign_kernel, prepare_kernel
from .tiles import Product
from .update import Means


def kmeans(x: Tensor, centroids: Tensor, iterations: int) -> Tensor:
    """x [R, T, D] float32 or bf16, centroids [R, C, D] float32 to start from -> float32 [R, C, D]."""
    rows, tokens, dim = x.shape
    count = centroids.shape[1]
    if count > MAX_CENTROIDS:
        raise Unsupported(f"{count} centroids are more than the {MAX_CENTROIDS} that the kernel tells apart")
    product = Product.of(dim, x.device)
    # distances are products of rounded operands anyhow, and half as much is read
    x, centroids = x.to(product.torch_dtype), centroids.contiguous()
    means = Means(x, count)
    padded = triton.cdiv(count, product.block) * product.block
    table = torch.empty(rows, padded, dim, dtype=product.torch_dtype, device=x.device)
    norms = torch.empty(rows, padded, dtype=torch.float32, device=x.device)
    ids = torch.empty(rows, tokens, dtype=torch.int64, device=x.device)
    outs = [torch.empty(rows, count, dim, dtype=torch.float32, device=x.device) for _ in range(2)]
    before_launch("kmeans", dim, x.dtype, x.device)
    prepare_kernel[(padded // PREPARED, rows)](centroids, table, norms, count, padded, D=dim, BLOCK=PREPARED, num_warps=4)
    for step in range(iterations):
        assign_kernel[(triton.cdiv(tokens, product.tokens), rows)](
            x, table, norms, ids, tokens, padded, x.stride(0), x.stride(1),
            D=dim, TOKENS=product.tokens, BLOCK=product.block, num_warps=product.warps, num_stages=product.stages)
        means(ids, centroids, outs[step % 2], table, norms)
        centroids = outs[step % 2]
    return centroids
