"""Attention as ComfyUI computes it, in the layout of this pack."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import comfy.model_management
from comfy.ldm.modules.attention import attention_pytorch, optimized_attention

from ...qvg.attention import choice, pieces
from ...qvg.cache.kv_cache import KVCache
from ...qvg.settings import QVGSettings
from .patches import OVERRIDE, home

# core's functions that round queries, keys and values
ROUNDING = {"attention_sage": "SageAttention", "attention3_sage": "SageAttention 3", "attention_comfy_kitchen_int8": "Comfy Kitchen"}


def core_attention(q, k, v, transformer_options=None):
    """The attention that the user chose for ComfyUI, or a node's override of it. q [B, T, H, D], k and v [B, N, H, D] -> [B, T, H, D]."""
    out = optimized_attention(q.flatten(2), k.flatten(2), v.flatten(2), heads=q.shape[2], transformer_options=transformer_options)
    return out.view(q.shape)


def attention_of(options: dict) -> Callable:
    """`core_attention` with a pass's transformer_options, to attend to a history exactly."""
    attention = partial(core_attention, transformer_options=options)
    if in_pieces(options):
        attention.partial = pieces.partial
    return attention


def in_pieces(options: dict) -> bool:
    """Whether a history may be attended to a piece at a time: where core calls torch's attention and no node another. Other kernels
    do not return what joins the pieces."""
    return optimized_attention is attention_pytorch and OVERRIDE not in options


def attention_to(options: dict, *caches: KVCache) -> Callable:
    """Attention to the history in caches of equal settings, as these ask for it; see `qvg.attention.choice`."""
    return choice.attention_of(*caches, exact=attention_of(options), own=own_attention(options))


def reading(settings: QVGSettings, model_options: dict, head_dim: int) -> dict:
    """`workspace_limit` and `packs` of the `KVCache` of a run with these model_options, and heads of `head_dim` channels.

    Raises ValueError where attention cannot be what the settings ask for.
    """
    options = model_options.get("transformer_options", {})
    device = comfy.model_management.get_torch_device()
    own = own_attention(options)
    found = choice.choose(settings, device, attention_of(options), own, head_dim)
    return {"workspace_limit": None if hasattr(found.function, "partial") else 0,
            "packs": choice.packs(settings, device, own, head_dim)}


def own_attention(options: dict) -> str:
    """Who computes attention instead of core, or for core by rounding what it gets; empty where it is computed exactly."""
    override = options.get(OVERRIDE)
    if override is not None:
        return home(override) or "a function of another node"
    return ROUNDING.get(optimized_attention.__name__, "")
