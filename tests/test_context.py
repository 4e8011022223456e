"""The forecast of a context that is rebuilt for every segment, against what a real cache then holds."""

from dataclasses import replace

import pytest
import torch

from comfyui_qvg.benchmarks.planes import PLANES
from comfyui_qvg.qvg.attention.cached import CachedAttention
from comfyui_qvg.qvg.attention.rope import Rope
from comfyui_qvg.qvg.cache.context import context_settings, forecast_context
from comfyui_qvg.qvg.cache.geometry import Geometry
from comfyui_qvg.qvg.cache.kv_cache import KVCache
from comfyui_qvg.qvg.models.catalogue import MODELS
from comfyui_qvg.qvg.settings import PRESETS
from comfyui_qvg.qvg.units import GIB

GEOMETRY = Geometry(layers=2, heads=4, head_dim=32, grid=(4, 6))


def filled(settings, given, new):
    """A cache that a context pass stored and a pass over new frames has read."""
    cache = KVCache(settings, layers=GEOMETRY.layers, heads=GEOMETRY.heads, head_dim=GEOMETRY.head_dim, grid=GEOMETRY.grid, rope=Rope,
                    dtype=torch.bfloat16, max_frames=given + new)
    draw = torch.Generator().manual_seed(0)
    for frames, start, store in ((given, 0, True), (new, given, False)):
        attend = CachedAttention(cache, start_frame=start, frames=frames, store=store, newest=settings.recent_frames)
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
    balanced = PLANES["balanced"]
    wide = forecast_context(context_settings(balanced.both(bits=4), GEOMETRY, 5, 2), GEOMETRY, 5, 2).peak_bytes
    narrow = context_settings(replace(balanced.both(bits=4), budget_gib=(wide - 1) / GIB), GEOMETRY, 5, 2)
    assert (narrow.key.bits, narrow.value.bits) == (3, 3)
    assert filled(narrow, 5, 2).peak_bytes < wide
    with pytest.raises(ValueError, match=r"5 given latent frames and the workspace need 0\.00 GiB"):
        context_settings(replace(balanced, budget_gib=1e-7), GEOMETRY, 5, 2)


@pytest.mark.parametrize("given", range(1, 20))
def test_longcat_at_every_context(given):
    """Up to 19 given latent frames at 832 x 480 stay within 3.6 GiB with Balanced, the workspace of a GPU included."""
    geometry = replace(MODELS["longcat"].geometry(), buffers=2)
    settings = context_settings(PLANES["balanced"], geometry, given, 24 - given)
    found = forecast_context(settings, geometry, given, 24 - given)
    assert (settings.recent_frames, settings.recent_bits) == (3, 3)
    assert found.bf16_bytes == given * 1170 << 20
    assert found.peak_bytes <= 3.6 * GIB


@pytest.mark.parametrize(("changes", "recent"), [
    ({}, (3, 3)), ({"recent_frames": 5}, (5, 3)), ({"recent_bits": 2}, (0, 4)), ({"bits": 1}, (3, 2)), ({"bits": 4}, (0, 4)),
    ({"bits": 8}, (0, 4)), ({"value_bits": 1}, (3, 2)), ({"recent_frames": 0}, (0, 4))])
def test_the_newest_frames_hold_one_plane_more(changes, recent):
    """Only where recent frames are asked to hold more than old ones; sinks and windows are left out."""
    changes = dict(changes)
    balanced = PLANES["balanced"]
    if "bits" in changes:
        balanced = balanced.both(bits=changes.pop("bits"))
    if "value_bits" in changes:
        balanced = replace(balanced, value=replace(balanced.value, bits=changes.pop("value_bits")))
    found = context_settings(replace(balanced, window_frames=4, **changes), GEOMETRY, 8, 2)
    assert (found.recent_frames, found.sink_frames, found.window_frames) == (recent[0], 0, 0)
    assert not recent[0] or found.recent_bits == recent[1]


def test_presets_without_planes_are_stored_whole():
    for settings in (PRESETS["off"], PLANES["quality"], PRESETS["paper"]):
        assert context_settings(settings, GEOMETRY, 8, 2).recent_frames == 0
    # a bit more than 1.25 is 2.5, the next that the codec holds
    found = context_settings(PRESETS["balanced"], GEOMETRY, 8, 2)
    assert (found.key.bits, found.recent_bits, found.recent_frames) == (1.25, 2.5, 3)


@pytest.mark.parametrize("given", [2, 3, 8])
def test_old_given_frames_are_what_they_were_without_recent_ones(given):
    """One codebook serves both spans; the newest three are nearer to what was stored, the others equal to the bit."""
    settings = context_settings(PLANES["balanced"], GEOMETRY, given, 2)
    plain = replace(settings, recent_frames=0)
    draw = torch.Generator().manual_seed(0)
    shape = 1, given * GEOMETRY.frame_tokens, GEOMETRY.heads, GEOMETRY.head_dim
    pair = [torch.randn(shape, generator=draw) for _ in range(2)]
    read, bits = [], []
    for chosen in (settings, plain):
        cache = KVCache(chosen, layers=1, heads=GEOMETRY.heads, head_dim=GEOMETRY.head_dim, grid=GEOMETRY.grid, rope=Rope,
                        dtype=torch.float32)
        cache.layers[0].append(*pair, given, chosen.recent_frames)
        out = [torch.empty(shape) for _ in range(2)]
        cache.layers[0].read(slice(0, GEOMETRY.heads), *out)
        read.append(out[1])
        bits.append([(entry.first, entry.key_bits, entry.value_bits) for entry in cache.layers[0].entries])
    assert bits[1] == [(0, 2, 2)]
    assert bits[0] == ([(0, 2, 2), (given - 3, 3, 3)] if given > 3 else [(0, 3, 3)])
    cut = max(0, given - 3) * GEOMETRY.frame_tokens
    assert torch.equal(read[0][:, :cut], read[1][:, :cut])
    near, far = ((out[:, cut:] - pair[1][:, cut:]).square().mean() for out in read)
    assert near < 0.5 * far


def test_a_budget_gives_the_newest_frames_up_before_a_plane_of_all():
    balanced = PLANES["balanced"]
    whole = forecast_context(context_settings(balanced, GEOMETRY, 8, 2), GEOMETRY, 8, 2).peak_bytes
    found = context_settings(replace(balanced, budget_gib=(whole - 1) / GIB), GEOMETRY, 8, 2)
    assert (found.key.bits, found.value.bits, found.recent_frames) == (2, 2, 0)
    assert context_settings(replace(balanced, budget_gib=whole / GIB), GEOMETRY, 8, 2).recent_frames == 3
