"""The forecast of a context that is rebuilt for every segment, against what a real cache then holds."""

from dataclasses import replace

import pytest
import torch

from comfyui_qvg.qvg.attention import CachedAttention
from comfyui_qvg.qvg.budget import GIB, Geometry
from comfyui_qvg.qvg.cache import KVCache
from comfyui_qvg.qvg.context import context_settings, forecast_context
from comfyui_qvg.qvg.models.catalogue import MODELS
from comfyui_qvg.qvg.settings import PRESETS, QVGSettings

GEOMETRY = Geometry(layers=2, heads=4, head_dim=32, grid=(4, 6))


def filled(settings, given, new):
    """A cache that a context pass stored and a pass over new frames has read."""
    cache = KVCache(settings, layers=GEOMETRY.layers, heads=GEOMETRY.heads, head_dim=GEOMETRY.head_dim, grid=GEOMETRY.grid,
                    dtype=torch.bfloat16, max_frames=given + new)
    draw = torch.Generator().manual_seed(0)
    for frames, start, store in ((given, 0, True), (new, given, False)):
        attend = CachedAttention(cache, start_frame=start, frames=frames, store=store)
        shape = 1, frames * GEOMETRY.frame_tokens, GEOMETRY.heads, GEOMETRY.head_dim
        for layer in range(GEOMETRY.layers):
            attend(layer, *(torch.randn(shape, generator=draw, dtype=torch.bfloat16) for _ in range(3)))
    return cache.stats()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("given", "new"), [(5, 2), (1, 6)])
def test_the_forecast_is_what_is_held(preset, given, new):
    settings = context_settings(PRESETS[preset], GEOMETRY, given, new)
    found, held = forecast_context(settings, GEOMETRY, given, new), filled(settings, given, new)
    assert (held.stored_bytes, held.peak_bytes, held.workspace_bytes, held.bf16_bytes) == (
        found.stored_bytes, found.peak_bytes, found.workspace_bytes, found.bf16_bytes)


def test_a_budget_narrows_and_then_refuses():
    balanced = QVGSettings.preset("balanced")
    wide = forecast_context(context_settings(balanced.both(bits=4), GEOMETRY, 5, 2), GEOMETRY, 5, 2).peak_bytes
    narrow = context_settings(replace(balanced.both(bits=4), budget_gib=(wide - 1) / GIB), GEOMETRY, 5, 2)
    assert (narrow.key.bits, narrow.value.bits) == (3, 3)
    assert filled(narrow, 5, 2).peak_bytes < wide
    with pytest.raises(ValueError, match=r"5 given latent frames and the workspace need 0\.00 GiB"):
        context_settings(replace(balanced, budget_gib=1e-7), GEOMETRY, 5, 2)


def test_longcat_at_its_largest_context():
    """19 given latent frames at 832 x 480 stay within 3.6 GiB with Balanced, the workspace of a GPU included."""
    geometry = replace(MODELS["longcat"].geometry(), buffers=2)
    found = forecast_context(context_settings(QVGSettings.preset("balanced"), geometry, 19, 5), geometry, 19, 5)
    assert found.bf16_bytes == 22230 << 20
    assert found.peak_bytes < 3.6 * GIB
