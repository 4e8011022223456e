"""What a cache holds after frames were taken back, forgotten or narrowed: tables written by hand, in the notation of `policy_cases`."""

from dataclasses import replace

import pytest
import torch

from comfyui_qvg.qvg.attention.rope import Rope
from comfyui_qvg.qvg.cache.kv_cache import KVCache
from comfyui_qvg.qvg.settings import PRESETS, TensorSettings
from policy_cases import BASE, DIM, FEW, GRID, PAPER, cache_of, held, parse, tokens

# what is done to a cache between two chunks, and what is left; lists begin with what three chunks of three leave of Balanced
CHANGES = {
    "rewind to a chunk": ([("rewind", 6)], "0+3=4/4 3+3=2/2", 6),
    "rewind by two chunks": ([("rewind", 3)], "0+3=4/4", 3),
    "rewind to nothing": ([("rewind", 0)], "", 0),
    "rewind behind the end": ([("rewind", 12)], "0+3=4/4 3+3=2/2 6+3=4/4", 9),
    # a chunk of which one frame is forgotten goes whole
    "rewind into a chunk": ([("rewind", 7)], "0+3=4/4 3+3=2/2", 7),
    "rewind and store again": ([("rewind", 6), ("append", 3)], "0+3=4/4 3+3=2/2 6+3=4/4", 9),
    "rewind and store one frame": ([("rewind", 6), ("append", 1)], "0+3=4/4 3+3=2/2 6+1=4/4", 7),
    "forget before a chunk": ([("forget", 6)], "0+3=4/4 6+3=4/4", 9),
    "forget before a frame of a chunk": ([("forget", 5)], "0+3=4/4 6+3=4/4", 9),
    "forget nothing": ([("forget", 3)], "0+3=4/4 3+3=2/2 6+3=4/4", 9),
    "forget all": ([("forget", 9)], "0+3=4/4", 9),
    "narrow": ([("narrow", True)], "0+3=4/4 3+3=2/2 6+3=3/3", 9),
    "narrow to two": ([("narrow", True)] * 2, "0+3=4/4 3+3=2/2 6+3=2/2", 9),
    "narrow to one": ([("narrow", True)] * 3, "0+3=4/4 3+3=1/1 6+3=1/1", 9),
    "narrow where there is nothing": ([("narrow", True)] * 3 + [("narrow", False)], "0+3=4/4 3+3=1/1 6+3=1/1", 9),
    "narrow and go on": ([("narrow", True), ("append", 3)], "0+3=4/4 3+3=2/2 6+3=2/2 9+3=4/4", 12),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_taken_back(name):
    steps, left, following = CHANGES[name]
    cache = cache_of(BASE, layers=2)
    for number in range(3):
        for layer in cache.layers:
            layer.append(*tokens(3, number), 3)
    for step, value in steps:
        for layer in cache.layers:
            if step == "append":
                layer.append(*tokens(value, 9), value)
            elif step == "forget":
                layer.forget_before(value)
            elif step == "narrow":
                assert layer.drop_bits() is value
        if step == "rewind":
            cache.rewind(value)
    for layer in cache.layers:
        assert held(layer.entries) == parse(left)
        assert layer.held_frames == sum(frames for _, frames, _, _ in parse(left))
        assert layer.tokens == 256 * layer.held_frames
    assert cache.frames == following


def test_what_cannot_be_narrowed():
    for settings in (PRESETS["off"], PAPER, replace(BASE, sink_frames=3)):
        layer = cache_of(settings).layers[0]
        layer.append(*tokens(3), 3)
        before = held(layer.entries)
        assert layer.drop_bits() is False and held(layer.entries) == before


def test_narrowing_takes_only_planes():
    """Of K and V that are not held alike, the wider; what is held in 8 or 16 bits and was to be planes falls to those."""
    for changes, seen in (({"key": replace(FEW, bits=4), "value": replace(FEW, bits=3)}, ["4/3", "3/3", "2/2", "1/1"]),
                          ({"value": TensorSettings(bits=8)}, ["2/8", "1/8"]),
                          ({"recent_frames": 3, "recent_bits": 16}, ["16/16", "2/2", "1/1"]),
                          ({"recent_frames": 3, "recent_bits": 16, "value": TensorSettings(bits=8)}, ["16/16", "2/16", "1/16"])):
        layer = cache_of(replace(BASE, **{"sink_frames": 0, "recent_frames": 0} | changes)).layers[0]
        layer.append(*tokens(3), 3)
        found = [held(layer.entries)]
        while layer.drop_bits():
            found.append(held(layer.entries))
        assert found == [parse(f"0+3={bits}") for bits in seen]


def test_shrinking_gives_up_the_cheapest_first():
    """Heads at a time, then planes of the widest, then the older half of the chunks; sinks stay, and layers stay alike."""
    cache = KVCache(replace(BASE, recent_frames=0), layers=2, heads=8, head_dim=DIM, grid=GRID, rope=Rope, dtype=torch.float32)
    pair = torch.randn(2, 1, 3 * 256, 8, DIM, generator=torch.Generator().manual_seed(0))
    for _ in range(6):
        for layer in cache.layers:
            layer.append(*pair, 3)
    cache.workspace.views(10)
    assert cache.workspace.group == 2 and cache.workspace.nbytes > 0
    found = []
    while (said := cache.shrink()) is not None:
        assert cache.layers[0].held_frames == cache.layers[1].held_frames
        found.append((cache.workspace.group, [first for first, *_ in held(cache.layers[0].entries)],
                      {key for _, _, key, _ in held(cache.layers[1].entries)[1:]}, said))
    assert [step[:3] for step in found] == [
        (1, [0, 3, 6, 9, 12, 15], {2}), (1, [0, 3, 6, 9, 12, 15], {1}), (1, [0, 9, 12, 15], {1}), (1, [0, 12, 15], {1}), (1, [0, 15], {1})]
    assert "decoded 1 at a time" in found[0][3] and "now hold fewer bits" in found[1][3]
    assert all("older half" in said for *_, said in found[2:])
    assert cache.workspace.nbytes == 0


def test_a_layer_that_already_lost_spans_does_not_stop_shrinking():
    """A pass that failed may have let a span leave one layer and not yet the others: what stays is what all of them still have."""
    cache = cache_of(replace(BASE, sink_frames=0, recent_frames=0).both(bits=1), layers=2)
    for number in range(4):
        for layer in cache.layers:
            layer.append(*tokens(3, number), 3)
    cache.layers[1].forget_before(6)
    assert "older half" in cache.shrink()
    assert [held(layer.entries) for layer in cache.layers] == [parse("9+3=1/1")] * 2


def test_freed_and_used_again():
    cache = cache_of(BASE)
    cache.layers[0].append(*tokens(3), 3)
    cache.free()
    assert cache.frames == 0 and not cache.layers[0].entries
    cache.layers[0].append(*tokens(3), 3)
    assert held(cache.layers[0].entries) == parse("0+3=4/4")


def test_what_does_not_fit_is_refused():
    layer = cache_of(BASE).layers[0]
    with pytest.raises(ValueError, match=r"The value of 3 frames has shape \(1, 512, 1, 8\); this cache was made for \(1, 768, 1, 8\)"):
        layer.append(tokens(3)[0], tokens(2)[1], 3)
    assert layer.next_frame == 0 and not layer.entries
