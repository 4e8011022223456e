"""Quant VideoGen's KV cache as a library: plain torch, no ComfyUI, no triton.

    from comfyui_qvg.qvg import KVCache, QVGSettings, Rope, attend

    cache = KVCache(QVGSettings.preset("balanced"), layers=30, heads=12, head_dim=128, grid=(30, 52), rope=Rope, device="cuda")
    out = attend(cache, layer, q, k, v, frames=3)                   # a noisy pass: reads, stores nothing
    out = attend(cache, layer, q, k, v, frames=3, store=True)       # the pass over the finished chunk
    cache.stats().stored_bytes                                      # counted from the tensors that are held

The names below are the public interface. `API_VERSION` rises when one of them changes in a way that breaks callers; everything else in the
package may change at any time. How to add a codec, a model family or a backend: `docs/extending.md`.
"""

from __future__ import annotations

import importlib

API_VERSION = 1

_PUBLIC = {
    "settings": ("PRESETS", "QVGSettings", "TensorSettings"),
    "cache": ("CacheStats", "Geometry", "KVCache"),
    "cache.forecast": ("Forecast", "forecast"),
    "attention": ("CachedAttention", "NoRope", "Rope", "attend", "sdpa", "widened"),
    "codec": ("Codec", "Part", "PlainCodec", "Span", "SpanShape", "Tables"),
    "registry": ("CODECS", "Registry"),
    "models": ("FAMILIES", "Family", "ModelShape"),
    "backends": ("Backend", "Unsupported"),
    "video": ("CachedNetwork", "ChunkDone", "Condition", "Run", "Sampler", "StepDone", "flow_renoise"),
}
# public name -> where it is, and its name there
_PLACES = {name: (module, name) for module, names in _PUBLIC.items() for name in names} | {"register_backend": ("backends", "register")}
__all__ = ["API_VERSION", *sorted(_PLACES)]


def __getattr__(name: str):
    # imported when asked for, so that a script that only plans loads no sampler
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PLACES[name]
    return getattr(importlib.import_module(f".{module}", __name__), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
