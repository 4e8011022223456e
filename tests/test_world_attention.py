"""Attention in two branches over a cache that holds keys and values once, against both branches computed from tensors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from comfyui_qvg.qvg.attention import NoRope, Rope, sdpa, widened
from comfyui_qvg.qvg.attention.functions import eight_bits
from comfyui_qvg.qvg.attention.prope import Prope
from comfyui_qvg.qvg.attention.world import View, WorldAttention
from comfyui_qvg.qvg.cache.kv_cache import KVCache
from comfyui_qvg.qvg.settings import PRESETS

HEADS, DIM, GRID, LAYERS, CHUNK = 8, 32, (3, 4), 2, 4
SIZE = GRID[0] * GRID[1]


# K and V of a group of two heads, in both branches, float32
FRAME_BYTES = 2 * 2 * SIZE * 2 * DIM * 4


def cameras(frames: int) -> torch.Tensor:
    """World-to-camera matrices of a camera that turns and walks."""
    angle = torch.arange(frames, dtype=torch.float64) * 0.3
    views = torch.eye(4, dtype=torch.float64).repeat(frames, 1, 1)
    views[:, 0, 0] = views[:, 2, 2] = angle.cos()
    views[:, 0, 2], views[:, 2, 0] = angle.sin(), -angle.sin()
    views[:, 2, 3] = 0.1 * torch.arange(frames)
    return views


def prope(frames: int) -> Prope:
    focal = torch.diag(torch.tensor([0.8, 1.4, 1.0])).expand(frames, 3, 3)
    return Prope(DIM, GRID, cameras(frames), focal)


def make_cache(settings=PRESETS["off"], **more) -> KVCache:
    return KVCache(settings, rope=NoRope, layers=LAYERS, heads=HEADS, head_dim=DIM, grid=GRID, branches=2, dtype=torch.float32,
                   chunk_frames=CHUNK, **more)


def tokens(frames: int, seed: int, heads: int = HEADS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, frames * SIZE, heads, DIM, generator=generator) for _ in range(3)]


def both_branches(q, k, v, frames: list[int], new: list[int], text=None):
    """Both branches from all raw keys and values [1, T, H, D] of `frames` and `new`, head by head, in float64."""
    rope, every = Rope(DIM, GRID), [*frames, *new]
    matrices, focal = cameras(max(every) + 1), torch.diag(torch.tensor([0.8, 1.4, 1.0, 1.0], dtype=torch.float64))
    projection = {frame: focal @ matrices[frame] for frame in every}

    def by_frame(x, order, matrix):
        parts = x.double().unflatten(1, (len(order), SIZE)).unflatten(-1, (-1, 4))
        return torch.stack([parts[:, n] @ matrix(projection[frame]).mT for n, frame in enumerate(order)], 1).flatten(-2).flatten(1, 2)

    def attend(q, k, v):
        if text is not None:
            k, v = (torch.cat([part.double(), x], 1) for part, x in zip(text, (k, v)))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / DIM**0.5
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)

    near = attend(rope.apply(q, len(frames), len(new)).double(), rope.apply(k, 0, len(every)).double(), v.double())
    inverse = torch.linalg.inv
    far = attend(by_frame(q, new, lambda p: p.mT), by_frame(k, every, inverse), by_frame(v, every, inverse))
    return near, by_frame(far, new, lambda p: p)


def store(cache: KVCache, chunks: list[list[torch.Tensor]]) -> None:
    for _, k, v in chunks:
        for layer in cache.layers:
            layer.append(k, v, CHUNK)


@pytest.mark.parametrize("chosen", [[0, 1, 2], [0, 2], [1]])
@pytest.mark.parametrize("with_text", [False, True])
@pytest.mark.parametrize("frames_at_a_time", [0, 9, 5, 2])
def test_branches_of_any_stored_chunks_are_exact(chosen, with_text, frames_at_a_time):
    """Whole and in pieces, of which one of two frames is less than a span and so one of fewer heads."""
    chunks = [tokens(CHUNK, seed) for seed in range(4)]
    cache = make_cache(max_frames=16, workspace_limit=frames_at_a_time * FRAME_BYTES)
    store(cache, chunks[:3])
    frames = [4 * number + n for number in chosen for n in range(4)]
    new = [12, 13, 14, 15]
    text = tuple(x[:, :7] for x in tokens(1, 9)[1:]) if with_text else None
    cache.choose(frames)
    q, k, v = chunks[3]
    outs = WorldAttention(cache, View(Rope(DIM, GRID), prope(16), frames, new))(1, q, k, v, text)
    keys, values = (torch.cat([*(chunks[number][part] for number in chosen), chunks[3][part]], 1) for part in (1, 2))
    for out, exact in zip(outs, both_branches(q, keys, values, frames, new, text)):
        torch.testing.assert_close(out.double(), exact, rtol=0, atol=2e-5)


@pytest.mark.parametrize("frames_at_a_time", [0, 6, 3, 1])
def test_a_pass_without_history_stores_what_a_later_one_reads(frames_at_a_time):
    first, second = tokens(CHUNK, 1), tokens(CHUNK, 2)
    cache = make_cache(max_frames=8, workspace_limit=frames_at_a_time * FRAME_BYTES)
    rope, views = Rope(DIM, GRID), prope(8)
    store_pass = WorldAttention(cache, View(rope, views, [], range(4)), store=True)
    for layer in range(LAYERS):
        outs = store_pass(layer, *first)
    for out, exact in zip(outs, both_branches(*first, [], [0, 1, 2, 3])):
        torch.testing.assert_close(out.double(), exact, rtol=0, atol=2e-5)
    outs = WorldAttention(cache, View(rope, views, range(4), range(4, 8)))(0, *second)
    keys, values = (torch.cat([first[part], second[part]], 1) for part in (1, 2))
    for out, exact in zip(outs, both_branches(second[0], keys, values, [0, 1, 2, 3], [4, 5, 6, 7])):
        torch.testing.assert_close(out.double(), exact, rtol=0, atol=2e-5)


def test_workspace_has_a_second_buffer_and_covers_what_is_read():
    cache = make_cache(PRESETS["balanced"], max_frames=400, read_frames=8)
    for seed in range(5):
        store(cache, [tokens(CHUNK, seed)])
    cache.choose(range(4, 8))
    q, k, v = tokens(CHUNK, 7)
    WorldAttention(cache, View(Rope(DIM, GRID), prope(24), range(4, 8), range(20, 24)))(0, q, k, v)
    group = HEADS // 4
    assert cache.workspace.nbytes == 4 * 8 * SIZE * group * DIM * 4
    assert cache.stats().held_frames == 20


@pytest.mark.parametrize("preset", ["quality", "balanced", "paper"])
def test_a_quantized_history_is_read_as_it_is_stored_and_offloading_changes_nothing(preset):
    chunks, frames, results = [tokens(CHUNK, seed) for seed in range(6)], [0, 1, 2, 3, 12, 13, 14, 15], []
    for offload in (False, True):
        cache = make_cache(replace(PRESETS[preset], offload=offload), max_frames=24, read_frames=12)
        store(cache, chunks[:5])
        cache.choose(frames)
        attend = WorldAttention(cache, View(Rope(DIM, GRID), prope(24), frames, range(20, 24)))
        results.append([attend(layer, *chunks[5]) for layer in (0, 1, 0)])
        held = torch.empty(2, 1, len(frames) * SIZE, HEADS, DIM)
        cache.layers[1].read(slice(0, HEADS), *held)
    q, k, v = chunks[5]
    exact = both_branches(q, torch.cat([held[0], k], 1), torch.cat([held[1], v], 1), frames, [20, 21, 22, 23])
    assert not torch.allclose(held[0], torch.cat([chunks[0][1], chunks[3][1]], 1), atol=0.05)
    for near, far in zip(*results):
        assert all(torch.equal(a, b) for a, b in zip(near, far))
    for out, wanted in zip(results[0][1], exact):
        torch.testing.assert_close(out.double(), wanted, rtol=0, atol=5e-5)


@pytest.mark.parametrize("preset", ["quality", "balanced", "paper"])
@pytest.mark.parametrize("offload", [False, True])
def test_pieces_of_a_quantized_history_are_the_whole(preset, offload):
    """Chunks chosen from a bank, at new positions; the codes that are stored are equal."""
    chunks, frames, results, stored = [tokens(CHUNK, seed) for seed in range(8)], [0, 1, 2, 3, *range(12, 24)], [], []
    settings = replace(PRESETS[preset], offload=offload, sink_frames=0)
    for limit in (0, 9 * FRAME_BYTES, 4 * FRAME_BYTES):
        cache = make_cache(settings, max_frames=32, read_frames=20, workspace_limit=limit)
        store(cache, chunks[:7])
        cache.choose(frames)
        attend = WorldAttention(cache, View(Rope(DIM, GRID), prope(32), frames, range(28, 32)), store=True)
        results.append([out for layer in range(LAYERS) for out in attend(layer, *chunks[7])])
        assert cache.workspace.nbytes == (limit or 20 * FRAME_BYTES)
        assert cache.frames == 32
        stored.append([tensor.clone() for layer in cache.layers for entry in layer.entries for span in entry.present()
                       for tensor in span.tensors().values()])
    for other in results[1:]:
        for near, far in zip(results[0], other):
            torch.testing.assert_close(near, far, rtol=0, atol=2e-5)
    assert all(torch.equal(*pair) for other in stored[1:] for pair in zip(stored[0], other))


def test_eight_bits_in_both_branches_are_for_what_is_held_in_few():
    """As `CachedAttention` has it: exact for many bits, and for few about as well as what they leave."""
    chunks, errors = [tokens(CHUNK, seed) for seed in range(8)], {}
    for name, settings in (("many", PRESETS["balanced"].both(bits=4)), ("few", PRESETS["balanced"])):
        cache = make_cache(settings, max_frames=32)
        store(cache, chunks[:7])
        view = View(Rope(DIM, GRID), prope(32), range(28), range(28, 32))
        exact, rough = (WorldAttention(cache, view, attention=attention)(0, *chunks[7]) for attention in (widened, eight_bits))
        errors[name] = [float((a - b).norm() / b.norm()) for a, b in zip(rough, exact)]
    assert max(errors["many"]) < 1e-5 < 1e-3 < min(errors["few"]) and max(errors["few"]) < 0.1


def test_an_attention_that_returns_no_sums_gets_the_whole():
    seen = []

    def own(q, k, v):
        seen.append(k.shape[1])
        return sdpa(q, k, v)

    cache = make_cache(max_frames=16, workspace_limit=5 * FRAME_BYTES)
    store(cache, [tokens(CHUNK, seed) for seed in range(3)])
    WorldAttention(cache, View(Rope(DIM, GRID), prope(16), range(12), range(12, 16)), attention=own)(0, *tokens(CHUNK, 3))
    assert set(seen) == {16 * SIZE} and cache.workspace.nbytes == 16 * FRAME_BYTES


def test_frames_that_cut_a_chunk_are_refused():
    cache = make_cache(max_frames=12)
    store(cache, [tokens(CHUNK, 0), tokens(CHUNK, 1)])
    cache.choose([2, 3])
    with pytest.raises(ValueError, match="choose whole chunks that it holds"):
        WorldAttention(cache, View(Rope(DIM, GRID), prope(12), [2, 3], range(8, 12)))(0, *tokens(CHUNK, 2))
    with pytest.raises(ValueError, match="frames must rise"):
        View(Rope(DIM, GRID), prope(12), [4, 5], [3])
