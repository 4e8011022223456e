"""Attention in eight bits: what was kept in two needs no sixteen to be multiplied.

    out, lse = attend(q, k, v)                      # as `pieces.partial`, by a kernel where there is one
    out, lse = fast(q, k, v)                        # the definition

Keys lose their mean, which one vector a head holds, and become int8 with a scale for every tile of tokens; queries become int8 with a scale
a row. The mean comes back in the log-sum-exp, as the query's product with it, so every piece of a history may have a mean of its own.
Exponentials and values become E4M3, values with a scale a channel, and their products are accumulated afresh for every tile, because
Hopper's E4M3 products keep about 14 bits: over tens of thousands of keys one running accumulator is wrong by a third. E4M3 for queries and
keys would cost far more than int8 does.

This is the definition, in plain torch and float32; kernels compute the same products on tensor cores. They may leave exponentials and
values in 16 bits, and they take exponentials relative to the largest logit so far instead of the row's, so E4M3 rounds them at other
places. Source of the scheme: SageAttention 2 (arXiv 2411.10958), whose smoothing of keys this is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import backends
from ..cache.geometry import TILE

# channels of the heads for which there are kernels
HEAD_DIMS = (64, 128)
# queries whose logits are computed at a time
ROWS = 256
INT8, E4M3 = 127.0, 448.0
# below it a scale would be denormal
TINY = 1e-20
# bytes -> uint8 [n], see `Workspace.packing`
Space = Callable[[int], Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor, space: Space | None = None) -> tuple[Tensor, Tensor]:
    """Attention of q [C * B, T, H, D] to k and v [B, N, H, D]: the output [C * B, T, H, D] in q's dtype and the log-sum-exp [C * B, T, H]
    float32. The conditions of a CFG batch, one after the other in q, share a history. space: gives the memory that a kernel packs keys and
    values to, which it no longer needs when later work of the current stream uses it; by default it allocates its own."""
    return backends.run("attend", fast, q, k, v, space)


def packs(device: torch.device) -> int:
    """`Geometry.packs` where a kernel attends on this device: keys, and with products in E4M3 values, too."""
    e4m3 = device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) >= (8, 9)
    return 2 if e4m3 else 1


def refusal(head_dim: int) -> str:
    """Why no kernel attends to heads of so many channels, as the end of a sentence; empty where one does."""
    if head_dim in HEAD_DIMS:
        return ""
    return f"heads of {head_dim} channels have no kernel for attention in eight bits, only those of {' and '.join(map(str, HEAD_DIMS))}"


def fast(q: Tensor, k: Tensor, v: Tensor, space: Space | None = None) -> tuple[Tensor, Tensor]:
    """The same in plain torch, which packs nothing."""
    scale, batch = q.shape[-1] ** -0.5, len(k)
    dtype = q.dtype
    q, k, v = (x.transpose(1, 2).float() for x in (q, k, v))
    mean = k.mean(2, keepdim=True)
    keys, values = _whole_numbers(_tiles(k - mean), (-2, -1)), _rounded_values(v)
    outs, sums = [], []
    for rows in q.split(ROWS, dim=2):
        of_condition = [_attend(_whole_numbers(part, (-1,)), keys, values, k.shape[2], scale) for part in rows.split(batch)]
        out, lse = (torch.cat(parts) for parts in zip(*of_condition))
        outs.append(out)
        sums.append(lse + (rows @ mean.mT.repeat(len(rows) // batch, 1, 1, 1))[..., 0] * scale)
    return torch.cat(outs, dim=2).transpose(1, 2).to(dtype), torch.cat(sums, dim=2).transpose(1, 2)


def _tiles(x: Tensor) -> Tensor:
    """[B, H, N, D] -> [B, H, tiles, TILE, D], with zeros behind the last token."""
    missing = -x.shape[2] % TILE
    return torch.nn.functional.pad(x, (0, 0, 0, missing)).unflatten(2, (-1, TILE))


def _whole_numbers(x: Tensor, shared: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """int8 as float32, and the scale that the axes `shared` have in common."""
    most = x.abs().amax(shared, keepdim=True).clamp(min=TINY)
    return (x * _divided(INT8, most)).round(), most / INT8


def _divided(number: float, x: Tensor) -> Tensor:
    """number / x, rounded once, which torch does to two tensors only."""
    return torch.full_like(x, number) / x


def _rounded(x: Tensor) -> Tensor:
    """float32 -> the nearest that E4M3 has."""
    return x.cpu().to(torch.float8_e4m3fn).float().to(x.device) if x.device.type == "mps" else x.to(torch.float8_e4m3fn).float()


def _rounded_values(v: Tensor) -> Tensor:
    """[B, H, N, D] -> E4M3 with a scale a channel, multiplied back, [B, H, tiles, TILE, D]."""
    most = v.abs().amax(2, keepdim=True).clamp(min=TINY)
    return _tiles(_rounded(v * _divided(E4M3, most)) * (most / E4M3))


def _attend(queries: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor], values: Tensor, count: int, scale: float) -> tuple[Tensor, Tensor]:
    """Some rows [B, H, R, D] over all tiles. Exponentials are relative to the row's maximum, so they are 0 to 1 and lie well in E4M3."""
    logits = torch.einsum("bhrd,bhtnd->bhrtn", queries[0], keys[0])
    logits = logits * (queries[1] * scale)[..., None] * keys[1][:, :, None, :, :, 0]
    logits = logits.flatten(3)[..., :count]
    most = logits.amax(-1, keepdim=True)
    weights = (logits - most).exp()
    lse = weights.sum(-1).log() + most[..., 0]
    # the sum is of what is not rounded, as in the kernel, where it is accumulated in float32
    rounded = _rounded(weights * E4M3)
    rounded = torch.nn.functional.pad(rounded, (0, -count % TILE)).unflatten(-1, (-1, TILE))
    out = torch.einsum("bhrtn,bhtnd->bhrd", rounded, values) / E4M3
    return out / weights.sum(-1, keepdim=True), lse
