"""Eigenvectors of small symmetric matrices by Jacobi rotations, without a wait of the host. Reference: `torch.linalg.eigh`.

cuSOLVER takes 37 ms for 24 matrices of 128 x 128 on an H200 and blocks the host until then. Here a program takes a matrix through a fixed
number of sweeps. A sweep rotates every pair of rows once, D / 2 pairs at a time in the order of a round-robin tournament. Kept are V, whose
rows become the eigenvectors, and V A, so that what a rotation needs are dot products, and rounding errors do not add up in a matrix that
is rotated from both sides. Source: Golub and Van Loan, Matrix Computations, section 8.5.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..qvg.backends import Unsupported, before_launch
from .tiles import HEAD_DIMS, no_kernel_for, platform

# so many that a basis costs at most a few thousandths of a bit per element, if its variances range over six orders of magnitude
SWEEPS = 6
# elements that a program holds of each of four tensors
HELD = 4096


@triton.jit
def eigh_kernel(matrices, turned, vectors, values, D: tl.constexpr, PAIRS: tl.constexpr, SWEEPS: tl.constexpr):
    """Eigenvalues float32 [R, D] and vectors [R, D, D], a vector a row, of matrices [R, D, D]. turned: scratch like these, V A.

    Grid: (R,).
    """
    at = tl.program_id(0).to(tl.int64) * (D * D)
    matrices, turned, vectors, values = matrices + at, turned + at, vectors + at, values + tl.program_id(0) * D
    column, pair = tl.arange(0, D)[None, :], tl.arange(0, PAIRS)
    for start in range(0, D, PAIRS):
        row = (start + pair)[:, None]
        tl.store(turned + row * D + column, tl.load(matrices + row * D + column))
        tl.store(vectors + row * D + column, tl.where(row == column, 1.0, 0.0))
    tl.debug_barrier()
    for turn in range(SWEEPS * (D - 1)):
        step = turn % (D - 1)
        for start in range(0, D // 2, PAIRS):
            place = start + pair
            # everyone meets everyone: all move on by one in a circle, but the last stays
            p = ((step + place) % (D - 1))[:, None] * D + column
            q = tl.where(place == 0, D - 1, (step - place + D - 1) % (D - 1))[:, None] * D + column
            vp, vq, ap, aq = tl.load(vectors + p), tl.load(vectors + q), tl.load(turned + p), tl.load(turned + q)
            far = (tl.sum(aq * vq, axis=1) - tl.sum(ap * vp, axis=1)) / (2.0 * tl.sum(ap * vq, axis=1))
            tangent = tl.where(far >= 0, 1.0, -1.0) / (tl.abs(far) + tl.sqrt(1.0 + far * far))
            # rows that are orthogonal already, or not finite
            tangent = tl.where(tl.abs(tangent) <= 1.0, tangent, 0.0)
            cosine = 1.0 / tl.sqrt(1.0 + tangent * tangent)
            sine = (cosine * tangent)[:, None]
            cosine = cosine[:, None]
            tl.store(vectors + p, cosine * vp - sine * vq)
            tl.store(vectors + q, sine * vp + cosine * vq)
            tl.store(turned + p, cosine * ap - sine * aq)
            tl.store(turned + q, sine * ap + cosine * aq)
        tl.debug_barrier()
    for start in range(0, D, PAIRS):
        row = (start + pair)[:, None] * D + column
        tl.store(values + start + pair, tl.sum(tl.load(turned + row) * tl.load(vectors + row), axis=1))


def eigh(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric matrices [R, D, D] float32 -> eigenvalues [R, D], ascending, and vectors [R, D, D], a vector a column."""
    rows, dim, _ = x.shape
    if dim not in HEAD_DIMS:
        raise Unsupported(no_kernel_for(dim))
    if platform(x.device) in ("cdna", "rdna"):
        raise Unsupported("whether a barrier orders stores to memory is known of NVIDIA's GPUs only")
    turned, vectors, values = torch.empty_like(x), torch.empty_like(x), torch.empty(rows, dim, device=x.device)
    before_launch("eigh", dim, x.device)
    eigh_kernel[(rows,)](x.contiguous(), turned, vectors, values, D=dim, PAIRS=min(dim // 2, HELD // dim), SWEEPS=SWEEPS, num_warps=32,
                         num_stages=1)
    values, order = values.sort(dim=-1, stable=True)
    return values, vectors.gather(1, order[..., None].expand_as(vectors)).mT
