"""What spans, codebooks and the workspace take in whole bytes, from what the codec states of their parts.

So that prediction (`forecast`) and count agree: the same statement describes the tensors that are made.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from ..codec import Codec, SpanShape, TensorSettings
from ..registry import CODECS
from ..settings import QVGSettings
from .geometry import Geometry, aligned

# only the size matters here, and models have one of these
DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}


@lru_cache(maxsize=4096)
def _parts(codec: Codec, tensor: TensorSettings, bits: float, shape: SpanShape, itemsize: int) -> tuple[int, ...]:
    return tuple(part.nbytes for part in codec.span_parts(tensor, bits, shape, DTYPES[itemsize]).values())


def span_parts(geometry: Geometry, kind: str, tensor: TensorSettings, frames: int, bits: float, itemsize: int = 2) -> tuple[int, ...]:
    """Bytes of each tensor of one span of K or of V, without its codebook. kind: name of a codec; itemsize: bytes of the model's dtype."""
    shape = SpanShape(frames * geometry.frame_tokens, geometry.rows, geometry.head_dim)
    return _parts(CODECS[kind], tensor, bits, shape, itemsize)


def span_bytes(geometry: Geometry, kind: str, tensor: TensorSettings, frames: int, bits: float, itemsize: int = 2) -> int:
    """One span of K or of V, without its codebook."""
    return sum(span_parts(geometry, kind, tensor, frames, bits, itemsize))


def entry_bytes(geometry: Geometry, settings: QVGSettings, frames: int, bits: tuple[float, float], itemsize: int = 2) -> int:
    """A span of K and of V where they lie: on the device, or in one block of host memory."""
    parts = [part for tensor, width in zip((settings.key, settings.value), bits)
             for part in span_parts(geometry, settings.codec, tensor, frames, width, itemsize)]
    return sum(map(aligned, parts)) if settings.offload else sum(parts)


def codebook_bytes(geometry: Geometry, kind: str, tensor: TensorSettings, tokens: int) -> int:
    """A codebook of K or of V that is trained on `tokens` tokens of a head."""
    codec = CODECS[kind]
    return sum(part.nbytes for part in codec.book_parts(tensor, codec.book_size(tensor, tokens), geometry.rows, geometry.head_dim).values())
