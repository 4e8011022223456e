"""One span of K or V as named tensors and back, for what keeps spans elsewhere: a file (`storage`), or host memory (`offload`)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..settings import PLAIN_BITS, TensorSettings
from . import paper_codes as paper
from .spans import PaperSpan, PlainSpan, PlaneSpan, Span


def span_tensors(span: Span) -> dict[str, Tensor]:
    if isinstance(span, PlaneSpan):
        named = {f"plane{number}": plane for number, plane in enumerate(span.planes)}
        return named | {"scales": span.scales, "exponents": span.exponents, "ids": span.ids}
    if isinstance(span, PlainSpan):
        return {"data": span.data} | ({} if span.scales is None else {"scales": span.scales})
    named = {"codes": span.codes.codes, "scales": span.codes.scales, "ids": span.ids}
    return named if span.codes.zeros is None else named | {"zeros": span.codes.zeros}


def span_layout(codec: str, tensor: TensorSettings, bits: int, tokens: int, rows: int, dim: int,
                dtype: torch.dtype) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """What `span_tensors` gives: dtype and shape by name."""
    byte, token = torch.uint8, (tokens, rows)
    scales = (*token, tensor.groups(dim))
    if bits == 16:
        return {"data": (dtype, (*token, dim))}
    if bits == 8:
        return {"data": (torch.int8, (*token, dim)), "scales": (torch.bfloat16, scales)}
    ids = (byte, (tensor.stages, *token))
    if codec == "paper":
        layout = {"codes": (byte, (*token, dim * bits // 8)), "scales": (byte, scales), "ids": ids}
        return layout if tensor.symmetric else layout | {"zeros": (byte, scales)}
    planes = {f"plane{number}": (byte, (*token, dim // 8)) for number in range(bits)}
    return planes | {"scales": (byte, scales), "exponents": (torch.int8, (rows,)), "ids": ids}


def make_span(codec: str, bits: int, parts: Mapping[str, Tensor], book, gain: str) -> Span:
    """The inverse of `span_tensors`."""
    if bits in PLAIN_BITS:
        return PlainSpan(parts["data"], parts.get("scales"))
    if codec == "paper":
        return PaperSpan(paper.PaperCodes(parts["codes"], parts["scales"], parts.get("zeros")), parts["ids"], book, bits)
    return PlaneSpan([parts[f"plane{number}"] for number in range(bits)], parts["scales"], parts["exponents"], parts["ids"], book, gain)


def with_tensors(span: Span, parts: Mapping[str, Tensor]) -> Span:
    """The same span with its tensors elsewhere; `parts` has the names that `span_tensors` gives."""
    codec = "paper" if isinstance(span, PaperSpan) else "qvg"
    return make_span(codec, span.bits, parts, span.codebook, getattr(span, "gain", ""))
