"""Positions (RoPE, PRoPE), and attention of one chunk over a quantized history, whole or a piece at a time (`pieces`)."""

from .cached import CachedAttention, attend
from .choice import attention_of, choose
from .functions import Attention, sdpa, widened
from .prope import Prope
from .rope import NoRope, Rope

__all__ = ["Attention", "CachedAttention", "NoRope", "Prope", "Rope", "attend", "attention_of", "choose", "sdpa", "widened"]
