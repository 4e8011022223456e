"""Which attention reads the history of a cache, exact or in eight bits, and why: one place for library, command and nodes.

    attention = attention_of(cache)             # noted in the cache, whose `stats` say it
    function, sentence = choose(settings, "cuda", head_dim=128)

*exact* gives keys and values to an attention function as they were decoded. *fast* attends in eight bits to what is held in few
(`settings.COARSE`), and exactly to the rest: sinks, recent frames and the chunk itself (`functions.eight_bits`). *auto* is fast only where
nothing speaks against it: closed loops have shown that the bits which are kept lose next to nothing by it, a kernel runs it, and it was
measured to be faster on this kind of GPU.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch

from .. import backends
from ..cache.kv_cache import KVCache
from ..settings import COARSE, QVGSettings
from . import fast
from .functions import Attention, eight_bits, sdpa

# codec -> most bits per element of old frames with which closed loops lost at most 0.3 dB; see benchmarks/RESULTS.md, "Attention in eight
# bits"
HARMLESS = {"transform": 1.25}
# compute capabilities of NVIDIA GPUs -> whether `qvg bench generate` found fast to be faster than exact; see benchmarks/RESULTS.md
FASTER: dict[tuple[int, int], bool] = {(9, 0): False}


class Choice(NamedTuple):
    """sentence: such as "exact (as set)"."""

    function: Attention
    sentence: str


def choose(settings: QVGSettings, device: torch.device | str, exact: Attention = sdpa, own: str = "", head_dim: int = 128) -> Choice:
    """The attention that these settings ask for on this device.

    exact: the function for "exact". own: who computes attention instead, such as "SageAttention", if that may round queries, keys and
    values, which are then not rounded again. head_dim: of the model; released ones have 128.
    Raises ValueError where fast is asked for and somebody else computes attention.
    """
    device = torch.device(device)
    if settings.attention == "exact":
        return Choice(exact, "exact (as set)")
    slow = backends.refusal("attend", device) or fast.refusal(head_dim)
    if settings.attention == "fast":
        if own:
            raise ValueError(f"The settings ask for attention in eight bits (fast), but {own} computes attention here, and nothing is "
                             "rounded twice. Set attention to auto or exact, or remove what computes it.")
        return Choice(eight_bits, f"fast (as set; in plain torch, which is slow: {slow})" if slow else "fast (as set)")
    reason = f"{own} computes attention" if own else _loss(settings) or slow or _speed(device)
    if reason:
        return Choice(exact, f"exact ({reason})")
    return Choice(eight_bits, f"fast (it loses next to nothing with {settings.key_value_bits:g} bits, and is faster on this GPU)")


def packs(settings: QVGSettings, device: torch.device | str, own: str = "", head_dim: int = 128) -> int:
    """`Geometry.packs` of a cache that is read as `choose` says."""
    if choose(settings, device, own=own, head_dim=head_dim).function is not eight_bits:
        return 0
    return 0 if backends.refusal("attend", device) or fast.refusal(head_dim) else fast.packs(torch.device(device))


def attention_of(*caches: KVCache, exact: Attention = sdpa, own: str = "") -> Attention:
    """The attention for caches of equal settings on one device, such as those of guidance; see `choose`. The choice is noted in each, and
    logged once a run."""
    function, sentence = choose(caches[0].settings, caches[0].workspace.device, exact, own, caches[0].geometry.head_dim)
    for cache in caches:
        cache.attention = sentence
    said = caches[0].said
    if sentence not in said:
        said.add(sentence)
        logging.info("QVG: attention over the KV cache: %s", sentence)
    return function


def _loss(settings: QVGSettings) -> str:
    """Why attention in eight bits might lose more than next to nothing with these settings; empty where it is known not to."""
    bits, codec = settings.key_value_bits, settings.codec
    if bits > COARSE:
        return f"nothing is held in {COARSE:g} bits or fewer"
    if bits <= HARMLESS.get(codec, 0):
        return ""
    known = " and ".join(f"{name} up to {most:g} bits" for name, most in HARMLESS.items())
    return f"attention in eight bits was shown to lose next to nothing with {known}, not with {codec} and {bits:g} bits"


def _speed(device: torch.device) -> str:
    """Why attention in eight bits might not be faster here; empty where it is known to be."""
    if device.type != "cuda" or torch.version.hip:
        name = "AMD GPUs" if torch.version.hip else device.type
    else:
        capability = torch.cuda.get_device_capability(device)
        name, faster = f"GPUs of compute capability {capability[0]}.{capability[1]}", FASTER.get(capability)
        if faster is not None:
            return "" if faster else f"attention in eight bits is slower on {name}"
    return f"attention in eight bits has not been measured to be faster on {name}"
