"""Attention as ComfyUI computes it, in the layout of this pack."""

from __future__ import annotations

from comfy.ldm.modules.attention import optimized_attention


def core_attention(q, k, v, transformer_options=None):
    """The attention that the user chose for ComfyUI, or a node's override of it. q [B, T, H, D], k and v [B, N, H, D] -> [B, T, H, D]."""
    out = optimized_attention(q.flatten(2), k.flatten(2), v.flatten(2), heads=q.shape[2], transformer_options=transformer_options)
    return out.view(q.shape)
