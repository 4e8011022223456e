"""QVG as released, as a codec: packed integer codes over bf16 centroids, one codebook a span. For comparison with ours.

`paper_codes` has the arithmetic, bit for bit. Axes: T tokens, R rows, D channels, S stages, C centroids.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..registry import CODECS
from . import e4m3, kmeans, paper_codes
from .base import Part, Span, SpanShape, Tables, check_ids
from .finite import zero_nonfinite
from .plain import PlainCodec
from .tensor_settings import PLAIN_BITS, TensorSettings, require

BITS = (4, 2)
BLOCKS = (16, 32, 64, 128)
# the released code's 256 centroids are trained on three latent frames of Self-Forcing, 18 tokens each
TOKENS_PER_CENTROID = 18


@dataclass(frozen=True)
class PaperCodebook:
    """centroids: bfloat16 [S, R, C, D]"""

    centroids: Tensor

    @property
    def nbytes(self) -> int:
        return self.centroids.nbytes

    @property
    def size(self) -> int:
        return self.centroids.shape[2]


@dataclass
class PaperSpan(Span):
    """codes: what `paper_codes.encode` gives; ids: uint8 [S, T, R]; width: bits of a code."""

    codes: paper_codes.PaperCodes
    ids: Tensor
    codebook: PaperCodebook
    width: int

    @property
    def bits(self) -> int:
        return self.width

    @property
    def shape(self) -> tuple[int, int, int]:
        tokens, rows, packed = self.codes.codes.shape
        return tokens, rows, 8 * packed // self.bits

    def tensors(self) -> dict[str, Tensor]:
        named = {"codes": self.codes.codes, "scales": self.codes.scales, "ids": self.ids}
        return named if self.codes.zeros is None else named | {"zeros": self.codes.zeros}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> PaperSpan:
        return _span(tensors, self.codebook, self.width)

    def decode(self, rows: slice, tables: Tables) -> Tensor:
        """The values are the released package's bf16 ones."""
        zeros = None if self.codes.zeros is None else self.codes.zeros[:, rows]
        codes = paper_codes.PaperCodes(self.codes.codes[:, rows], self.codes.scales[:, rows], zeros)
        return paper_codes.decode(codes, self.codebook.centroids[:, rows], self.ids[:, :, rows], bits=self.bits).float()

    def misfit(self) -> Tensor:
        scales = e4m3.decode_scales(self.codes.scales)
        return torch.stack([torch.ones_like(scales[0, 0, 0]), scales.mean()])


def _span(tensors: Mapping[str, Tensor], codebook: PaperCodebook, bits: int) -> PaperSpan:
    return PaperSpan(paper_codes.PaperCodes(tensors["codes"], tensors["scales"], tensors.get("zeros")), tensors["ids"], codebook, bits)


class PaperCodec(PlainCodec):
    name = "paper"
    widths = (*reversed(PLAIN_BITS), *BITS)

    def check(self, settings) -> None:
        for tensor in (settings.key, settings.value):
            require(tensor.bits in BITS, f"The paper codec stores 2 or 4 bits, not {tensor.bits}; choose 2 or 4, or the qvg codec.")
            require(tensor.group in BLOCKS, f"The paper codec scales blocks of 16, 32, 64 or 128 channels, not {tensor.group}.")
        require(not settings.recent_frames or settings.recent_bits in PLAIN_BITS,
                f"The paper codec cannot drop bits of a span that holds {settings.recent_bits}; set recent_frames to 0, or recent_bits "
                "to 8 or 16.")
        require(not settings.sink_frames or settings.sink_bits in (*BITS, *PLAIN_BITS),
                f"The paper codec cannot hold a sink in {settings.sink_bits} bits; choose 2, 4, 8 or 16.")
        super().check(settings)

    def coded_parts(self, tensor: TensorSettings, bits: int, shape: SpanShape) -> dict[str, Part]:
        tokens, rows, dim = shape
        scales = Part(torch.uint8, (tokens, rows, tensor.groups(dim)), "scales", e4m3=True)
        parts = {"codes": Part(torch.uint8, (tokens, rows, dim * bits // 8), "planes"), "scales": scales,
                 "ids": Part(torch.uint8, (tensor.stages, tokens, rows), "ids")}
        return parts if tensor.symmetric else parts | {"zeros": scales}

    def make_coded(self, tensor: TensorSettings, bits: int, tensors: Mapping[str, Tensor], codebook: PaperCodebook) -> PaperSpan:
        return _span(tensors, codebook, bits)

    def book_size(self, tensor: TensorSettings, tokens: int) -> int:
        return max(1, min(tensor.centroids, tokens // TOKENS_PER_CENTROID))

    def book_parts(self, tensor: TensorSettings, size: int | range, rows: int, dim: int) -> dict[str, Part]:
        return {"centroids": Part(torch.bfloat16, (tensor.stages, rows, size, dim), "codebooks")}

    def make_book(self, tensors: Mapping[str, Tensor]) -> PaperCodebook:
        return PaperCodebook(**tensors)

    def check_stored(self, tensors: Mapping[str, Tensor], codebook: PaperCodebook, where: str) -> None:
        check_ids(tensors["ids"], codebook.size, where)

    def train_one(self, x: Tensor, tensor: TensorSettings, iterations: int, generator: torch.Generator, previous) -> PaperCodebook:
        """The residual between stages is rounded to bf16, as the released package does."""
        x, stages, count = x.bfloat16(), tensor.stages, self.book_size(tensor, x.shape[0])
        residual, found = zero_nonfinite(x).transpose(0, 1), []
        for start in kmeans.draw(x.shape[0], count, stages, generator, x.device):
            values = kmeans.kmeans(residual, residual[:, start].float(), iterations).bfloat16()
            found.append(values)
            ids = kmeans.assign(residual.float(), values.float())
            residual = residual - kmeans.gather_centroids(values, ids)
        return PaperCodebook(torch.stack(found) if found else x.new_empty(0, x.shape[1], 0, x.shape[2]))

    def encode_one(self, x: Tensor, tensor: TensorSettings, bits: int, codebook: PaperCodebook) -> PaperSpan:
        x = x.bfloat16()
        ids = _nearest_ids(x, codebook.centroids)
        codes = paper_codes.encode(x, codebook.centroids, ids, bits=bits, block=min(tensor.group, x.shape[-1]), symmetric=tensor.symmetric)
        return PaperSpan(codes, ids, codebook, bits)


def _nearest_ids(x: Tensor, centroids: Tensor) -> Tensor:
    """uint8 [S, T, R] of x [T, R, D] bf16, stage after stage."""
    residual, found = x.transpose(0, 1), []
    for values in centroids:
        ids = kmeans.assign(residual.float(), values.float())
        found.append(ids.transpose(0, 1).to(torch.uint8))
        residual = residual - kmeans.gather_centroids(values, ids)
    return torch.stack(found) if found else torch.empty(0, *x.shape[:2], dtype=torch.uint8, device=x.device)


PAPER = CODECS.register(PaperCodec())
