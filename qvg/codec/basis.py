"""The basis of a head: the principal components of its tokens, and the order in which a token's bits are spent on them.

Covariance is a running one: a new basis continues from what the one before was made of, so that a basis of few tokens is soon replaced by
one that fits. A Karhunen-Loeve transform makes components independent; each next bit goes where it takes away most squared error (reverse
water-filling in whole bits, 0 to 8 a component: Cover and Thomas, Elements of Information Theory, section 10.3.3).

Axes: T tokens, R rows (batch x heads), D channels of a head, which are as many components; N bits of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import backends
from .finite import zero_nonfinite
from .smoothing import row_slices
from .tensor_settings import MOST_BITS
from .uniform import DEEPEST, REACHES, amplitudes, tables

# bits per element for which quantizers have their best reach: between those of recent spans, which gain most by it, and of settled ones,
# which lose little
TUNED_BITS = 3
# a component below this share of the mean variance has rounding errors for a direction
LEAST_SHARE = 1e-6
# tokens seen before count at most this many times the new ones, so that a basis follows a cut
MEMORY = 8
# tokens whose products a GPU adds up together
AT_ONCE = 1024


@dataclass(frozen=True)
class Basis:
    """What spans of a head share.

    mean: float32 [R, D]; rounded to bfloat16 it would shift all keys of a span against those of others
    vectors: bfloat16 [R, D, D], a component a row, by falling variance
    deviation: bfloat16 [R, D], square roots of the variances
    weight: bfloat16 [R, D], share of a component's variance that bits leave, over the sum of what they leave of all
    reach: uint8 [R, D], half the range of a component's quantizer, in eighths of its deviation
    order: uint8 [R, 4 D], the component that each bit of a token belongs to
    seen: float32 [1], tokens that the covariance is of
    """

    mean: Tensor
    vectors: Tensor
    deviation: Tensor
    weight: Tensor
    reach: Tensor
    order: Tensor
    seen: Tensor
    size = 1

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, name).nbytes for name in self.__dataclass_fields__)


def train(xs: Sequence[Tensor], bits: Sequence[int], previous: Sequence[Basis | None]) -> list[Basis]:
    """The bases of tensors [T, R, D], each of its tokens and of those that its previous basis has seen. bits: of a settled token
    of each, whose error `weight` measures. The eigenvectors of all are found together, which takes a GPU as long as those of one."""
    means, covariances, seen = zip(*map(_moments, xs, previous))
    found = backends.run("eigh", torch.linalg.eigh, torch.cat(covariances))
    variances, vectors = (part.split([x.shape[1] for x in xs]) for part in found)
    return list(map(_basis, means, seen, variances, vectors, bits))


def _moments(x: Tensor, previous: Basis | None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [R, D] of tokens [T, R, D] and those that `previous` has seen, covariance [R, D, D] around it, and their number [1]."""
    tokens, rows, dim = x.shape
    mean, covariance = torch.empty(rows, dim, device=x.device), torch.empty(rows, dim, dim, device=x.device)
    for part in row_slices(rows, 8 * tokens * dim):
        y = zero_nonfinite(x[:, part]).float().transpose(0, 1)
        mean[part] = y.mean(1)
        covariance[part] = _products(y, mean[part], tokens if x.device.type == "cpu" else AT_ONCE).div_(tokens)
    seen = torch.full((1,), float(tokens), device=x.device)
    if previous is not None:
        before = previous.seen.clamp(max=MEMORY * tokens)
        seen = before + tokens
        share, moved = before / seen, previous.mean - mean
        covariance = covariance.lerp(_covariance(previous), share) + share * (1 - share) * _outer(moved)
        mean = mean + share * moved
    return mean, covariance, seen


def _products(y: Tensor, mean: Tensor, at_once: int) -> Tensor:
    """Sums over T of the outer products of tokens [R, T, D] around their mean [R, D], float32 [R, D, D]; `at_once` tokens in a product."""
    rows, tokens, dim = y.shape
    if tokens <= at_once:
        y = y - mean[:, None]
        return torch.bmm(y.mT, y)
    # a product a row would occupy as many multiprocessors as there are rows, for as long as it takes to add up all tokens
    parts = -(-tokens // at_once)
    padded = y.new_zeros(rows, parts * at_once, dim)
    torch.sub(y, mean[:, None], out=padded[:, :tokens])
    padded = padded.view(rows * parts, at_once, dim)
    return torch.bmm(padded.mT, padded).view(rows, parts, dim, dim).sum(1)


def _basis(mean: Tensor, seen: Tensor, variances: Tensor, vectors: Tensor, bits: int) -> Basis:
    """From eigenvalues [R, D], ascending, and eigenvectors [R, D, D], one a column."""
    variances, vectors = variances.flip(-1), vectors.flip(-1).mT
    mean_variance = variances.clamp(min=0).mean(-1, keepdim=True)
    # one token says nothing of how far the next is from it, and a few next to nothing; from a hundred on this is negligible
    unknown = (mean.square().mean(-1, keepdim=True) + mean_variance) / seen ** 3
    least = LEAST_SHARE * mean_variance + unknown + torch.finfo(torch.float32).tiny
    deviation = torch.maximum(variances, least).sqrt().bfloat16()
    variances = deviation.float().square()
    distortion, best = tables(mean.device)
    dim = variances.shape[1]
    order = _order(variances, distortion)[:, :MOST_BITS * dim]
    left = distortion[_held(order[:, :bits], dim)]
    # a component cannot exceed the token's scale by more than this; a sixteenth more, because the scale is rounded
    bound = (8 * (1 + 1 / 16) * (variances.sum(-1, keepdim=True) / variances).sqrt()).ceil().clamp(max=REACHES - 1)
    reach = torch.minimum(best[_held(order[:, :TUNED_BITS * dim], dim)], bound)
    weight = left / (variances * left).sum(-1, keepdim=True)
    return Basis(mean, vectors.bfloat16().contiguous(), deviation, weight.bfloat16(), reach.to(torch.uint8), order.to(torch.uint8), seen)


def _outer(x: Tensor) -> Tensor:
    return x[:, :, None] * x[:, None]


def _covariance(basis: Basis) -> Tensor:
    """float32 [R, D, D]"""
    scaled = basis.vectors.float() * basis.deviation.float()[..., None]
    return torch.bmm(scaled.mT, scaled)


def _order(variances: Tensor, distortion: Tensor) -> Tensor:
    """Variances [R, D] to the component of each of 8 D bits, in the order of the squared error that they take away."""
    taken = variances[:, :, None] * (distortion[:-1] - distortion[1:])
    return taken.flatten(1).argsort(dim=1, descending=True, stable=True) // DEEPEST


def _held(order: Tensor, components: int) -> Tensor:
    """Bits of each component [R, D] among bits that belong to components order [R, N]."""
    return order.new_zeros(len(order), components).scatter_add_(1, order, torch.ones_like(order))


def places(order: Tensor) -> tuple[Tensor, Tensor]:
    """Of bits that belong to components order [R, N]: the place of each among its component's bits, and how many those are."""
    components, bit = order.sort(dim=1, stable=True)
    first, end = (torch.searchsorted(components, components, right=right) for right in (False, True))
    number = torch.arange(order.shape[1], device=order.device)
    return tuple(torch.empty_like(order).scatter_(1, bit, found) for found in (number - first, end - first))


def bit_vectors(basis: Basis, bits: int, rows: slice, gain: str) -> Tensor:
    """What each of the first `bits` bits of a token adds or subtracts: bfloat16 [R, N, D]."""
    order = basis.order[rows, :bits].long()
    place, held = places(order)
    amplitude = amplitudes(gain).to(order.device)[basis.reach[rows].long().gather(1, order), held, place]
    amplitude = amplitude * basis.deviation[rows].float().gather(1, order)
    vectors = basis.vectors[rows].gather(1, order[..., None].expand(-1, -1, basis.vectors.shape[2]))
    return (amplitude[..., None] * vectors.float()).bfloat16()
