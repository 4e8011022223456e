"""How the elements of keys and values are kept. `base` is the interface; one codec a file: `plain`, `qvg`, `paper`, `transform`."""

from . import paper, plain, qvg, transform  # noqa: F401 (each registers itself)
from .base import Codec, Part, Span, SpanShape, Tables
from .pair import TensorCodec, encode, tokens_of, train
from .plain import PlainCodec, PlainSpan
from .tensor_settings import PLAIN_BITS, PLANE_BITS, TensorSettings

__all__ = [
    "PLAIN_BITS", "PLANE_BITS", "Codec", "Part", "PlainCodec", "PlainSpan", "Span", "SpanShape", "Tables", "TensorCodec", "TensorSettings",
    "encode", "tokens_of", "train",
]
