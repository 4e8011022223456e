"""A forecast in time that grows with the length alone: the rule of ageing searched, against the same rule walked."""

import cProfile
import pstats
from dataclasses import replace
from itertools import product

import pytest

from comfyui_qvg.qvg.cache import ageing
from comfyui_qvg.qvg.cache.forecast import PlannedLayer, forecast
from comfyui_qvg.qvg.cache.geometry import Geometry
from comfyui_qvg.qvg.cache.limits import limits
from comfyui_qvg.qvg.report.plan import plan
from comfyui_qvg.qvg.settings import PRESETS, TensorSettings
from comfyui_qvg.qvg.units import GIB

GEOMETRY = Geometry(2, 4, 64, (5, 7))
CASES = PRESETS | {
    "unlike": replace(PRESETS["balanced"], key=TensorSettings(bits=3), value=TensorSettings(bits=1), recent_frames=8),
    "recent below value": replace(PRESETS["quality"], key=TensorSettings(bits=1), recent_bits=2, recent_frames=7),
    "value plain": replace(PRESETS["balanced"], value=TensorSettings(bits=8)),
    "recent plain": replace(PRESETS["balanced"], recent_bits=16, recent_frames=7),
    "long sink": replace(PRESETS["balanced"], sink_frames=10, codebook_frames=5),
}


def walked(spans, newest, settings, share, new, held, leave):
    """`ageing.enforce_limits` as its text says it, span by span."""
    def planes(span):
        return ageing._width(span, settings)

    window = min((frames for frames in (settings.window_frames, share.cap_frames) if frames), default=None)
    for span in [span for span in spans if window is not None and not span.sink and span.last <= newest - window]:
        leave(spans.index(span), spans.index(span) + 1)
    for span in spans:
        if not span.sink and span.last <= newest - settings.recent_frames:
            span.set_bits(min(span.key_bits, settings.key.bits), min(span.value_bits, settings.value.bits))
    while share.layer_bytes is not None and held() + new > share.layer_bytes:
        movable = [span for span in spans if not span.sink]
        old = [span for span in movable if span.last <= newest - settings.recent_frames]
        widest = [max(group, key=planes) for group in (old, movable) if group and max(map(planes, group)) > ageing.least_bits(settings)]
        if widest:
            ageing._narrow(widest[0], settings)
        elif movable:
            leave(spans.index(movable[0]), spans.index(movable[0]) + 1)
        else:
            return


@pytest.mark.parametrize("name", CASES)
def test_searching_ages_as_walking_does(name, monkeypatch):
    """After every chunk the same spans in the same bits, and the running count is the sum over them."""
    pressed = 0
    for window, offload, fraction, (chunk, first) in product((0, 7, 21), (False, True), (0, 0.1, 0.25, 0.5), ((1, 0), (3, 1), (4, 9))):
        settings = replace(CASES[name], window_frames=window, offload=offload, budget_gib=fraction * GEOMETRY.bf16_bytes(80) / GIB)
        try:
            share = limits(settings, GEOMETRY, chunk, 80)
        except ValueError:
            continue
        layers = [PlannedLayer(settings, GEOMETRY, share) for _ in range(2)]
        starts = [0, *range(first or chunk, 80, chunk)]
        for start, stop in zip(starts, [*starts[1:], 80]):
            for layer, rule in zip(layers, (ageing.enforce_limits, walked)):
                with monkeypatch.context() as patch:
                    patch.setattr(ageing, "enforce_limits", rule)
                    layer.append(start, stop - start)
            assert layers[0].spans == layers[1].spans
            counted = sum(map(layers[0]._span_bytes, layers[0].spans))
            books = sum(layers[0].books[book] for book in {*(span.book for span in layers[0].spans), len(layers[0].books) - 1}
                        - {None, -1})
            assert layers[0].held() == counted + (0 if offload else books)
            assert layers[0].device_bytes() == (0 if offload else counted) + books
        pressed += share.layer_bytes is not None
    assert pressed >= 8


def calls(task) -> int:
    """Calls of functions that a task takes: time that no other process changes."""
    profile = cProfile.Profile()
    profile.runcall(task)
    return pstats.Stats(profile).total_calls


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("change", [{}, {"window_frames": 300}, {"budget_gib": 10.0}, {"offload": True, "budget_gib": 5.0}], ids=str)
def test_twice_the_length_takes_twice_the_time(name, change):
    geometry, settings = Geometry(30, 12, 128, (30, 52), buffers=2), replace(PRESETS[name], **change)
    half, whole = (calls(lambda frames=frames: forecast(settings, geometry, frames)) for frames in (2000, 4000))
    assert whole < 2.3 * half


def test_two_hours_are_planned_in_seconds():
    """28,803 latent frames of Self-Forcing at every preset, the usual case and the worst; some 900,000 calls take a second."""
    assert calls(lambda: plan("self-forcing", seconds=7200, vram_gib=24)) < 1_800_000 * len(PRESETS)
