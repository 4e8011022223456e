"""Bytes of a whole run that were worked out by hand: what a forecast adds up, and what a real cache then takes."""

from dataclasses import replace

import pytest
import torch

from byte_cases import BARE, EIGHT, EVEN
from comfyui_qvg.qvg.attention.rope import Rope
from comfyui_qvg.qvg.cache.forecast import Forecast, forecast
from comfyui_qvg.qvg.cache.kv_cache import KVCache
from comfyui_qvg.qvg.settings import QVGSettings


def test_what_holds_nothing_has_a_ratio():
    stats = KVCache(BARE, layers=2, heads=1, head_dim=8, grid=(16, 16), rope=Rope).stats()
    assert (stats.stored_ratio, stats.peak_ratio, stats.bits_per_element) == (0, 0, 0)
    assert stats.as_dict()["ratio"] == 0 and stats.by_bits == {}
    empty = Forecast(1, 0, 0, 0, 0, 0, 0)
    assert (empty.stored_ratio, empty.peak_ratio, empty.bits_per_element) == (0, 0, 0)


def test_chunks_of_three_where_nothing_else_is_said():
    """Frames of the window, and two chunks less one frame."""
    cache = KVCache(replace(EIGHT, window_frames=2), layers=1, heads=1, head_dim=8, grid=(16, 16), rope=Rope, dtype=torch.bfloat16)
    cache.workspace.views(1)
    assert cache.workspace.nbytes == 7 * 8192
    assert forecast(replace(EIGHT, window_frames=2), EVEN, 12).workspace_bytes == 7 * 8192


# Two layers, 10 frames, two sinks in 16 bits (8,192 bytes a frame), a window of 4: what each layer holds after every chunk is
# 2 * 8192 + 5120, then 3 * 5120 more, then those without the first, then the last frame and the chunk before
WALKED = replace(EIGHT, sink_frames=2, sink_bits=16, window_frames=4)
PAIR = replace(EVEN, layers=2)


def fill(settings, chunks, **options):
    """A real cache of `PAIR` in bf16 after passes over chunks; where each pass reads what is behind it."""
    cache = KVCache(settings, layers=2, heads=1, head_dim=8, grid=(16, 16), rope=Rope, dtype=torch.bfloat16, max_frames=sum(chunks),
                    **options)
    for frames in chunks:
        for layer in cache.layers:
            if layer.tokens:
                keys, values = cache.workspace.views(layer.tokens + 256 * frames)
                layer.read(slice(0, 1), keys[:, :layer.tokens], values[:, :layer.tokens])
            layer.append(*torch.randn(2, 1, 256 * frames, 1, 8).bfloat16(), frames)
    return cache.stats()


def test_a_forecast():
    found = forecast(WALKED, PAIR, 10, 3)
    most, last = 2 * 8192 + 6 * 5120, 2 * 8192 + 4 * 5120
    assert (found.stored_bytes, found.held_frames, found.workspace_bytes) == (2 * last, 6, 10 * 8192)
    assert found.peak_bytes == 2 * most + 10 * 8192
    assert found.bf16_bytes == 2 * 10 * 8192 and found.elements == 2 * 6 * 4096 and found.host_bytes == 0
    assert found.stored_ratio == pytest.approx(163840 / 73728) and found.peak_ratio == pytest.approx(163840 / 176128)
    assert found.bits_per_element == pytest.approx(12)
    stats = fill(WALKED, [3, 3, 3, 1])
    assert (stats.stored_bytes, stats.peak_bytes, stats.held_frames, stats.elements) == (2 * last, 2 * most + 10 * 8192, 6, 49152)
    assert all(isinstance(count, int) for count in (stats.elements, stats.stored_bytes, stats.peak_bytes, found.elements, found.peak_bytes))
    assert stats.by_kind == {"planes": 0, "scales": 0, "ids": 0, "codebooks": 0, "plain": 2 * last}
    assert stats.by_layer == (last, last) and stats.by_bits == {8: 2 * 4 * 5120, 16: 2 * 2 * 8192}
    assert (stats.frames, stats.tokens, stats.bf16_bytes) == (10, 6 * 256, 2 * 10 * 8192)
    assert stats.stored_ratio == pytest.approx(163840 / 73728) and stats.bits_per_element == pytest.approx(12)


@pytest.mark.parametrize("offload", [False, True])
def test_counting_changes_nothing(offload):
    """Whoever asks for statistics after every chunk finds the peak that comes out without."""
    settings, peaks = replace(QVGSettings().both(stages=1, centroids=2), iterations=1, offload=offload, window_frames=3), []
    for asked in (False, True):
        cache = KVCache(settings, layers=3, heads=2, head_dim=8, grid=(16, 16), rope=Rope, dtype=torch.float32, max_frames=9)
        for number in range(3):
            for layer in cache.layers:
                layer.append(*torch.randn(2, 1, 768, 2, 8, generator=torch.Generator().manual_seed(number)), 3)
                if asked:
                    cache.stats()
        peaks.append(cache.stats().peak_bytes)
    assert peaks[0] == peaks[1]


def test_a_forecast_with_a_start_video():
    """Four frames in one pass and then chunks: 0+2 and 2+2, then 4+3, then 7+3 without 2+2."""
    found = forecast(WALKED, PAIR, 10, 3, first_frames=4)
    assert (found.stored_bytes, found.held_frames) == (2 * (2 * 8192 + 6 * 5120), 8)
    stats = fill(WALKED, [4, 3, 3])
    assert (stats.stored_bytes, stats.peak_bytes, stats.held_frames) == (found.stored_bytes, found.peak_bytes, found.held_frames)


def test_a_start_video_is_seen_whole():
    """Behind a window of one frame a pass sees five frames that overhang it by four, and at most a chunk of five more."""
    settings = replace(EIGHT, window_frames=1)
    assert forecast(settings, PAIR, 30, 1).workspace_bytes == 2 * 8192
    assert forecast(settings, PAIR, 30, 1, first_frames=5).workspace_bytes == 10 * 8192
    assert forecast(settings, PAIR, 30, 1).peak_bytes == 2 * 5120 + 2 * 8192
    assert forecast(settings, PAIR, 30, 1, first_frames=5).peak_bytes == 2 * 5 * 5120 + 10 * 8192


def test_one_chunk_needs_no_workspace():
    found = forecast(EIGHT, PAIR, 3, 3)
    assert (found.workspace_bytes, found.peak_bytes, found.stored_bytes) == (0, 2 * 3 * 5120, 2 * 3 * 5120)


def test_a_forecast_of_offloaded_spans():
    """On the device: the workspace, two layers that visit, and the largest block on its way; on the host, what is held at most."""
    found = forecast(replace(WALKED, offload=True), PAIR, 10, 3)
    staged = 2 * 8192 + 7 * 5120
    assert found.peak_bytes == 10 * 8192 + 2 * staged + 2 * 8192
    assert found.host_bytes == 2 * (2 * 8192 + 6 * 5120)
    assert found.stored_bytes == 2 * (2 * 8192 + 4 * 5120)
    stats = fill(replace(WALKED, offload=True), [3, 3, 3, 1])
    assert (stats.peak_bytes, stats.stored_bytes, stats.host_bytes) == (found.peak_bytes, found.stored_bytes, 2 * (2 * 8192 + 4 * 5120))
    # one layer visits alone
    assert forecast(replace(WALKED, offload=True), EVEN, 10, 3).peak_bytes == 10 * 8192 + staged + 2 * 8192
