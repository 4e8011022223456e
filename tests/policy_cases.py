"""What the hand-written tables of the ageing policy share: the settings, the notation, and a cache beside its forecast."""

from dataclasses import replace

import torch

from comfyui_qvg.qvg.attention.rope import Rope
from comfyui_qvg.qvg.cache.ageing import Limits
from comfyui_qvg.qvg.cache.forecast import PlannedLayer
from comfyui_qvg.qvg.cache.geometry import Geometry
from comfyui_qvg.qvg.cache.kv_cache import KVCache
from comfyui_qvg.qvg.settings import PRESETS, QVGSettings, TensorSettings

# 256 tokens a frame of one head of 8 channels: a frame of K or of V is 2,048 numbers, a plane of it 256 bytes, its scales 256
GRID, DIM = (16, 16), 8
GEOMETRY = Geometry(layers=1, heads=1, head_dim=DIM, grid=GRID)
FEW = TensorSettings(stages=1, centroids=2)
NO_CENTROIDS = TensorSettings(stages=0)
# three sink frames of 4 bits, three recent frames of 4 bits, and 2 bits behind them
BASE = QVGSettings(key=FEW, value=FEW, iterations=1)
PAPER = replace(PRESETS["paper"].both(centroids=2, stages=1), iterations=1)


def parse(text):
    """"0+3=4/2 3+1=16/8" -> [(0, 3, 4, 2), (3, 1, 16, 8)]"""
    spans = []
    for word in text.split():
        place, bits = word.split("=")
        spans.append((*map(int, place.split("+")), *map(int, bits.split("/"))))
    return spans


def held(spans):
    return [(span.first, span.frames, span.key_bits, span.value_bits) for span in spans]


def cache_of(settings, share=None, layers=1):
    cache = KVCache(settings, layers=layers, heads=1, head_dim=DIM, grid=GRID, rope=Rope, dtype=torch.float32)
    if share is not None:
        cache.limits = share
    return cache


def tokens(frames, seed=0):
    return torch.randn(2, 1, frames * GEOMETRY.frame_tokens, 1, DIM, generator=torch.Generator().manual_seed(seed))


def check(settings, chunks, expected, share=None):
    """A real cache and a planned one, chunk by chunk, against a hand-written column."""
    assert len(chunks) == len(expected)
    real, planned = cache_of(settings, share).layers[0], PlannedLayer(settings, GEOMETRY, share or Limits(), itemsize=4)
    first = 0
    for number, (frames, line) in enumerate(zip(chunks, expected)):
        real.append(*tokens(frames, number), frames)
        planned.append(first, frames)
        first += frames
        assert held(real.entries) == parse(line), f"the cache after chunk {number}"
        assert held(planned.spans) == parse(line), f"the forecast after chunk {number}"
        assert real.next_frame == first
        for entry in real.entries:
            # what an entry says of itself is what its tensors are
            tables = entry._owner.tables
            assert all(span.decode(slice(None), tables).shape[0] == entry.frames * GEOMETRY.frame_tokens for span in entry.spans)
