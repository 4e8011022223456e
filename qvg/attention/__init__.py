"""Positions (RoPE), and attention of one chunk over a quantized history."""

from .cached import CachedAttention, attend
from .functions import Attention, sdpa, widened
from .rope import NoRope, Rope

__all__ = ["Attention", "CachedAttention", "NoRope", "Rope", "attend", "sdpa", "widened"]
