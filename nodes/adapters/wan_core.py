"""What the hooks use of core's causal Wan and of its sampler (comfy/ldm/wan/ar_model.py, comfy_extras/nodes_ar_video.py)."""

from __future__ import annotations

KEY = "quantvideogen"
PATCHES = ("diffusion_model.init_kv_caches", "diffusion_model.forward", "get_dtype")
ATTENTION_PATCH = "diffusion_model.blocks.{}.self_attn.forward"


def compute_dtype(model):
    """The dtype that the network computes in. Core's sampler uses the dtype of the weights for its cache and for the start image, which
    does not work with fp8 weights."""
    return model.manual_cast_dtype or model.diffusion_model.dtype


def block_state(transformer_options: dict) -> tuple[int, list, list] | None:
    """What core's sampler passes to its causal network: first frame, KV caches, cross-attention caches. None in a run of another
    sampler."""
    state = transformer_options.get("ar_state")
    return state and tuple(state[key] for key in ("start_frame", "kv_caches", "crossattn_caches"))


class CacheStub:
    """What core's sampler gets as a layer's cache: an "end" that it may move freely; the keys and values are in the `KVCache`."""

    def __init__(self):
        self.end = 0

    def __getitem__(self, key: str) -> int:
        return getattr(self, key)

    def __setitem__(self, key: str, value: int) -> None:
        setattr(self, key, value)
