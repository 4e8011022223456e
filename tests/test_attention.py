"""What attention gets to see: keys at their positions, values, the chunk's own tokens of every condition, and what a cache reads back."""

from dataclasses import dataclass, replace

import pytest
import torch

from comfyui_qvg.qvg.attention.cached import CachedAttention
from comfyui_qvg.qvg.attention.functions import sdpa, widened
from comfyui_qvg.qvg.attention.rope import Rope
from comfyui_qvg.qvg.cache import read as read_op
from comfyui_qvg.qvg.cache.kv_cache import KVCache
from comfyui_qvg.qvg.cache.read import Held, _runs
from comfyui_qvg.qvg.settings import PRESETS, QVGSettings, TensorSettings

ALL = slice(None)
# 24 tokens a frame
GRID, HEADS, DIM = (4, 6), 8, 16
FEW = TensorSettings(stages=1, centroids=2)
TWO_BITS = QVGSettings(key=FEW, value=FEW, iterations=2)
SETTINGS = {
    "off": PRESETS["off"],
    "two bits": TWO_BITS,
    "K and V differ": replace(TWO_BITS, key=replace(FEW, bits=3), value=TensorSettings(bits=8)),
    "V in fewer": replace(TWO_BITS, key=replace(FEW, bits=4), value=replace(FEW, bits=1)),
    "sinks in 16": replace(TWO_BITS, sink_frames=2, sink_bits=16),
    "paper": replace(PRESETS["paper"].both(centroids=2), iterations=1),
}


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cache_of(settings, heads=HEADS, batch=1, layers=1):
    return KVCache(settings, layers=layers, heads=heads, head_dim=DIM, grid=GRID, rope=Rope, batch=batch, dtype=torch.float32)


def filled(settings, chunks, batch=1, scale=(1.0, 1.0)):
    """A cache after chunks of random tokens, and those tokens [2, B, T, H, D]."""
    cache, parts = cache_of(settings, batch=batch), []
    for number, frames in enumerate(chunks):
        pair = noise(2, batch, 24 * frames, HEADS, DIM, seed=number) * torch.tensor(scale).view(2, 1, 1, 1, 1)
        cache.layers[0].append(*pair, frames)
        parts.append(pair)
    return cache, torch.cat(parts, 2) if parts else None


def read(cache, shift=0, part=slice(0, HEADS)):
    """K and V [2, B, T, h, D] of some heads; what is not written is no number."""
    out = torch.full((2, cache.geometry.batch, cache.layers[0].tokens, part.stop - part.start, DIM), float("nan"))
    cache.layers[0].read(part, out[0], out[1], shift)
    return out


def raw(cache):
    """The keys [B, T, H, D] of a cache of batch 1 as its spans decode them, without positions."""
    return torch.cat([entry.spans[0].decode(ALL, cache.tables) for entry in cache.layers[0].entries])[None]


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("batch", [1, 2])
def test_what_a_cache_reads_is_what_was_stored(name, batch):
    """K turned to its frames, V as it is, of every head, in the order of time; K a thousand times as large as V, so that what is taken for
    the other is far off. The error of each frame is that of the bits in which it is held."""
    cache, pair = filled(SETTINGS[name], [3, 3, 1, 2], batch, (100.0, 0.1))
    out, key = read(cache), cache.rope.apply(pair[0], 0, 9)
    start = 0
    for entry in cache.layers[0].entries:
        part = slice(24 * start, 24 * (start + entry.frames))
        for found, right, bits in ((out[0], key, entry.key_bits), (out[1], pair[1], entry.value_bits)):
            share = (found[:, part] - right[:, part]).square().sum((1, 3)) / right[:, part].square().sum((1, 3))
            # two bits of the released method are three levels
            two = 0.7 if name == "paper" else 0.35
            assert share.max() <= {1: 0.7, 2: two, 3: 0.08, 4: 0.02, 8: 1e-4, 16: 1e-9}[bits]
        start += entry.frames
    for heads in (slice(0, 1), slice(1, 3), slice(6, 8)):
        torch.testing.assert_close(read(cache, part=heads), out[:, :, :, heads], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("window", [0, 4])
def test_a_shift_moves_all_but_sinks(name, window):
    """Behind a window, too, where frames between the sinks and the rest are gone."""
    cache, _ = filled(replace(SETTINGS[name], sink_frames=2, sink_bits=16, window_frames=window), [3, 3, 3])
    plain, shifted = read(cache), read(cache, shift=4)
    assert torch.equal(plain[1], shifted[1]) and torch.equal(plain[0][:, :48], shifted[0][:, :48])
    keys, first = raw(cache), 3 if window else 2
    expected = torch.cat([cache.rope.apply(keys[:, :48], 0, 2), cache.rope.apply(keys[:, 48:], first - 4, 9 - first)], dim=1)
    torch.testing.assert_close(shifted[0], expected, rtol=1e-4, atol=1e-4)
    expected = torch.cat([cache.rope.apply(keys[:, :48], 0, 2), cache.rope.apply(keys[:, 48:], first, 9 - first)], dim=1)
    torch.testing.assert_close(plain[0], expected, rtol=1e-4, atol=1e-4)


@dataclass
class Stretch:
    first: int
    frames: int
    sink: bool = False


@pytest.mark.parametrize(("entries", "shift", "runs"), [
    ([(0, 3), (3, 3), (6, 1)], 0, [(0, 0, 7)]),
    ([(0, 3), (3, 3)], 2, [(0, -2, 6)]),
    # sinks keep their place; what follows them is as far off as the shift says
    ([(0, 3, True), (3, 3)], 0, [(0, 0, 6)]),
    ([(0, 3, True), (3, 3)], 1, [(0, 0, 3), (3, 2, 3)]),
    ([(0, 1, True), (1, 2, True), (3, 2), (5, 1)], 2, [(0, 0, 3), (3, 1, 3)]),
    # frames 3 to 5 are gone
    ([(0, 3, True), (6, 3), (9, 3)], 0, [(0, 0, 3), (3, 6, 6)]),
    ([(0, 3, True), (6, 3), (9, 3)], 3, [(0, 0, 9)]),
    ([(0, 1, True), (2, 1), (5, 2), (7, 3)], 0, [(0, 0, 1), (1, 2, 1), (2, 5, 5)])])
def test_stretches_of_a_history(entries, shift, runs):
    """(frames held before it, position, frames) of what follows without a gap; where the frames between are not in the same group, too."""
    held = [Stretch(*entry) for entry in entries]
    placed = [Held(None, None, entry.frames, entry.first - (0 if entry.sink else shift)) for entry in held]
    before = [sum(entry.frames for entry in held[:number]) for number in range(len(held))]
    assert _runs(list(zip(before, placed))) == runs
    if len(held) > 2:
        # the second is decoded with another group
        first, third = held[0], held[2]
        alone = _runs([(0, placed[0]), (before[2], placed[2])])
        assert alone == [(0, first.first - (0 if first.sink else shift), first.frames), (before[2], third.first - shift, third.frames)]


def test_a_window_behind_three_sinks():
    """Frames 3 to 5 are gone, and those behind stay where they are."""
    cache, pair = filled(replace(PRESETS["off"], sink_frames=3, window_frames=3), [3, 3, 3])
    rope, key = cache.rope, pair[0]
    expected = torch.cat([rope.apply(key[:, :72], 0, 3), rope.apply(key[:, 144:], 6, 3)], dim=1)
    torch.testing.assert_close(read(cache)[0], expected, rtol=1e-5, atol=1e-5)


def test_a_long_history_is_decoded_in_parts(monkeypatch):
    whole = read(filled(TWO_BITS, [1] * 12)[0])
    monkeypatch.setattr("comfyui_qvg.qvg.cache.read.READ_TOKENS", 3 * 24)
    cache = filled(TWO_BITS, [1] * 12)[0]
    groups, real = [], read_op._groups
    monkeypatch.setattr(read_op, "_groups", lambda history: groups.extend(real(history)) or real(history))
    read(cache)
    assert max(sum(held.frames for _, held in group) for group in groups) == 3 and len(groups) > 3
    torch.testing.assert_close(read(cache), whole, rtol=1e-5, atol=1e-5)


class Seen:
    """Attention that keeps what it is given."""

    def __init__(self):
        self.calls = []

    def __call__(self, q, k, v):
        self.calls.append((q.clone(), k.clone(), v.clone()))
        return sdpa(q, k, v)

    def all_heads(self, number):
        """q, k or v [B, T, H, D] of all groups of heads, which attend one after the other."""
        return torch.cat([call[number] for call in self.calls], dim=2)


@pytest.mark.parametrize(("limit", "shift"), [(0, 0), (20, 0), (9, 0), (8, 1), (7, 2)])
def test_positions_of_a_pass(limit, shift):
    """Up to the limit positions are frames. Beyond it the pass ends at the limit and the history keeps its distance, sinks excepted."""
    settings = replace(PRESETS["off"], sink_frames=1, window_frames=4)
    cache, pair = filled(settings, [3, 3])
    q, k, v = noise(3, 1, 72, HEADS, DIM, seed=9)
    seen = Seen()
    out = CachedAttention(cache, start_frame=6, frames=3, store=False, attention=seen, position_limit=limit)(0, q, k, v)
    # the window keeps frames 2 to 5, and the chunk that frame 2 is of
    history = torch.cat([pair[:, :, :24], pair[:, :, 24:]], 2)
    rope = cache.rope
    keys = torch.cat([rope.apply(history[0][:, :24], 0, 1), rope.apply(history[0][:, 24:], 1 - shift, 5), rope.apply(k, 6 - shift, 3)], 1)
    torch.testing.assert_close(seen.all_heads(0), rope.apply(q, 6 - shift, 3), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen.all_heads(1), keys, rtol=1e-5, atol=1e-5)
    assert torch.equal(seen.all_heads(2), torch.cat([history[1], v], 1))
    torch.testing.assert_close(out, sdpa(rope.apply(q, 6 - shift, 3), keys, torch.cat([history[1], v], 1)), rtol=1e-4, atol=1e-5)
    assert len(seen.calls) == 4 and seen.calls[0][0].shape[2] == 2


@pytest.mark.parametrize("past", [0, 3])
@pytest.mark.parametrize("batch", [1, 2])
def test_stacked_conditions_have_tokens_of_their_own(past, batch):
    """Conditions stacked by CFG, three on one history: each is what it is alone."""
    def cache():
        return filled(TWO_BITS, [past] if past else [], batch)[0]

    q, k, v = noise(3, 3 * batch, 72, HEADS, DIM, seed=9)
    stacked = CachedAttention(cache(), start_frame=past, frames=3, store=False)(0, q, k, v)
    for number in range(3):
        own = slice(number * batch, (number + 1) * batch)
        alone = CachedAttention(cache(), start_frame=past, frames=3, store=False)(0, q[own], k[own], v[own])
        torch.testing.assert_close(stacked[own], alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(stacked[:batch], stacked[batch:2 * batch], atol=0.1)


def test_only_a_storing_pass_stores():
    """What it stores are the keys without positions, behind what was there; it attends to its own tokens as they are."""
    cache = cache_of(PRESETS["off"], layers=2)
    for start, store, frames in ((0, False, 0), (0, True, 3), (3, False, 3), (3, True, 6)):
        q, k, v = noise(3, 1, 72, HEADS, DIM, seed=start)
        attend = CachedAttention(cache, start_frame=start, frames=3, store=store)
        for layer in range(2):
            attend(layer, q, k, v)
        assert cache.frames == frames
    assert torch.equal(raw(cache), torch.cat([noise(3, 1, 72, HEADS, DIM, seed=start)[1] for start in (0, 3)], 1))


def test_a_history_that_arrives_whole():
    """`newest` frames of it hold more; without it, all hold what recent frames do."""
    settings = replace(TWO_BITS, sink_frames=0, recent_frames=3, recent_bits=3)
    for newest, expected in ((3, [(0, 5, 2), (5, 3, 3)]), (0, [(0, 8, 3)])):
        cache = cache_of(settings)
        CachedAttention(cache, start_frame=0, frames=8, store=True, newest=newest)(0, *noise(3, 1, 192, HEADS, DIM))
        assert [(entry.first, entry.frames, entry.key_bits) for entry in cache.layers[0].entries] == expected


def test_a_chunk_that_does_not_follow_is_refused():
    cache = filled(TWO_BITS, [3])[0]
    with pytest.raises(ValueError, match="to store starts at latent frame 4, but the cache ends at frame 3"):
        CachedAttention(cache, start_frame=4, frames=3, store=True)
    # a pass that stores nothing may look from anywhere
    CachedAttention(cache, start_frame=4, frames=3, store=False)


def test_heads_of_an_odd_number():
    cache = cache_of(PRESETS["off"], heads=7)
    q, k, v = noise(3, 1, 72, 7, DIM)
    first = CachedAttention(cache, start_frame=0, frames=3, store=True)(0, q, k, v)
    seen = Seen()
    second = CachedAttention(cache, start_frame=3, frames=3, store=False, attention=seen)(0, q, k, v)
    assert len(seen.calls) == 7 and first.shape == second.shape == q.shape
    rope = cache.rope
    keys = torch.cat([rope.apply(k, 0, 3), rope.apply(k, 3, 3)], 1)
    torch.testing.assert_close(second, sdpa(rope.apply(q, 3, 3), keys, torch.cat([v, v], 1)), rtol=1e-4, atol=1e-5)


def test_a_network_in_a_wider_type_than_its_cache():
    q, (k, v) = noise(1, 5, 2, DIM), noise(2, 1, 9, 2, DIM, seed=1).bfloat16()
    found = widened(q, k, v)
    assert found.dtype == torch.float32 and torch.equal(found, sdpa(q, k.float(), v.float()))
    assert sdpa(q, k.float(), v.float()).shape == q.shape
