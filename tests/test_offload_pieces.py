"""Offloaded spans that come to the device a piece at a time: the numbers of a history that never left it, and two pieces there at most."""

import math
from dataclasses import replace

import pytest
import torch

from comfyui_qvg.benchmarks.planes import PLANES
from comfyui_qvg.qvg.attention import CachedAttention, NoRope, Rope, sdpa
from comfyui_qvg.qvg.attention.functions import eight_bits, widened
from comfyui_qvg.qvg.attention.pieces import partial
from comfyui_qvg.qvg.attention.prope import Prope
from comfyui_qvg.qvg.attention.world import View, WorldAttention
from comfyui_qvg.qvg.cache import codebook_lifetime
from comfyui_qvg.qvg.cache.context import context_settings, forecast_context
from comfyui_qvg.qvg.cache.forecast import forecast
from comfyui_qvg.qvg.cache.geometry import Geometry, on_device
from comfyui_qvg.qvg.cache.host import HostStore
from comfyui_qvg.qvg.cache.kv_cache import KVCache
from comfyui_qvg.qvg.cache.layer import LayerCache
from comfyui_qvg.qvg.settings import PRESETS
from comfyui_qvg.qvg.units import GIB

HEADS, DIM, GRID, CHUNK = 8, 32, (3, 4), 3
SIZE = GRID[0] * GRID[1]
# K and V of a frame of two heads in float32
FRAME_BYTES = 2 * 2 * DIM * SIZE * 4

pytestmark = pytest.mark.usefixtures("poison")

BALANCED = PRESETS["balanced"]
# small codebooks, which take little time and are not what is tested
CASES = {
    "balanced": BALANCED, "off": PRESETS["off"], "paper": replace(PRESETS["paper"].both(centroids=4), iterations=1),
    "planes": replace(PLANES["balanced"].both(centroids=4), iterations=1),
    "window and sink": replace(PRESETS["smallest"], window_frames=11, sink_frames=2), "nothing recent": replace(BALANCED, recent_frames=0),
}


def made(settings, frames, pieces=4, layers=3, batch=1, by_piece=True, **more):
    """A cache whose workspace holds `pieces` frames of two heads."""
    cache = KVCache(settings, layers=layers, heads=HEADS, head_dim=DIM, grid=GRID, rope=Rope, batch=batch, dtype=torch.float32,
                    **{"max_frames": frames, "chunk_frames": CHUNK, "workspace_limit": pieces * batch * FRAME_BYTES} | more)
    cache.geometry = replace(cache.geometry, by_piece=by_piece)
    return cache


def drawn(frames, seed, batch=1, parts=3):
    return torch.randn(parts, batch, frames * SIZE, HEADS, DIM, generator=torch.Generator().manual_seed(seed)).unbind()


def run(cache, frames, attention=widened, conditions=1, between=lambda start: None, **more):
    """A noisy pass and a storing pass over each chunk: all that every layer attended to."""
    outs, batch = [], cache.geometry.batch
    for start in range(0, frames, CHUNK):
        for store in (False, True):
            attend = CachedAttention(cache, start_frame=start, frames=CHUNK, store=store, attention=attention, **more)
            for layer in range(cache.geometry.layers):
                count = batch * (1 if store else conditions)
                outs.append(attend(layer, *drawn(CHUNK, 1000 * start + 10 * layer + store, count)))
        between(start)
    return outs


def equal(first, second):
    return len(first) == len(second) and all(torch.equal(*pair) for pair in zip(first, second))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("layers", "batch", "conditions", "pieces"), [(1, 1, 1, 4), (2, 2, 2, 7), (3, 1, 3, 3)])
def test_the_numbers_are_those_of_a_history_on_the_device(name, layers, batch, conditions, pieces):
    """And those of layers that come whole: sinks, windows, positions beyond a limit, conditions, odd and even numbers of layers."""
    found = []
    for offload, by_piece in ((False, False), (True, False), (True, True)):
        cache = made(replace(CASES[name], offload=offload), 24, pieces, layers, batch, by_piece)
        found.append(run(cache, 24, conditions=conditions, position_limit=15))
    assert equal(found[0], found[1]) and equal(found[0], found[2])


def test_eight_bits():
    found = [run(made(replace(BALANCED, offload=offload), 24), 24, eight_bits) for offload in (False, True)]
    assert equal(*found)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("frames", "pieces", "layers"), [(30, 4, 2), (30, 9, 3), (15, 30, 2), (24, 1, 2), (24, 6, 1)])
def test_the_device_holds_two_pieces(monkeypatch, name, frames, pieces, layers):
    """As forecast; and no more than two pieces, or two spans."""
    monkeypatch.setattr(codebook_lifetime, "LARGEST_MISFIT", math.inf)
    settings = replace(CASES[name], offload=True)
    cache = made(settings, frames, pieces, layers)
    run(cache, frames)
    stats, host = cache.stats(), cache.host
    planned = forecast(settings, on_device(Geometry(layers, HEADS, DIM, GRID), "cpu", pieces * FRAME_BYTES), frames, itemsize=4)
    for part in ("stored_bytes", "workspace_bytes", "peak_bytes"):
        assert getattr(stats, part) == getattr(planned, part), part
    staged = sum(stage.buffer.nbytes for stage in host._stages)
    whole = made(settings, frames, pieces, layers, by_piece=False, workspace_limit=0)
    run(whole, frames)
    layered = max(stage.buffer.nbytes for stage in whole.host._stages if stage.buffer is not None)
    _, most = cache.workspace.at_a_time(CHUNK)
    if most < frames // 3:
        assert staged < 2 * layered
    entries = cache.layers[0].entries
    # the last chunk is not read
    held = [sum(entry.block.nbytes for entry in entries[piece.part] if entry.last < frames - CHUNK)
            for piece in cache.layers[0].pieces(most)]
    assert 2 * max(held) <= staged <= 2 * layered


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("first_frames", "pieces"), [(13, 4), (13, 9), (5, 9)])
def test_a_long_start(monkeypatch, name, first_frames, pieces):
    """Of a start video that is one span, which is longer than a piece: the buffers grow, to no more than was forecast."""
    monkeypatch.setattr(codebook_lifetime, "LARGEST_MISFIT", math.inf)
    found, total = [], first_frames + 24
    for offload in (False, True):
        settings = replace(CASES[name], offload=offload)
        cache, outs = made(settings, total, pieces), []
        for start in (0, *range(first_frames, total, CHUNK)):
            frames = CHUNK if start else first_frames
            for store in (False, True):
                attend = CachedAttention(cache, start_frame=start, frames=frames, store=store, attention=widened)
                outs += [attend(layer, *drawn(frames, 100 * start + layer)) for layer in range(3)]
        found.append(outs)
    assert equal(*found)
    planned = forecast(settings, cache.geometry, total, CHUNK, first_frames, itemsize=4)
    assert planned.workspace_bytes < cache.stats().peak_bytes <= planned.peak_bytes


def test_each_span_comes_once_a_pass(monkeypatch):
    """For all groups of heads together, and none of it twice."""
    copies, filling = [], HostStore._fill

    def counted(self, stage, layer, part=slice(None), readers=()):
        before = stage.here
        entries = filling(self, stage, layer, part, readers)
        if stage.here is not before:
            copies.extend(stage.here.blocks)
        return entries

    cache = made(replace(BALANCED, offload=True), 30)
    run(cache, 24)
    for _ in range(2):
        monkeypatch.setattr(HostStore, "_fill", counted)
        attend = CachedAttention(cache, start_frame=24, frames=CHUNK, store=False, attention=widened)
        for layer in range(3):
            attend(layer, *drawn(CHUNK, layer))
        blocks = [entry.block.number for layer in cache.layers for entry in layer.entries]
        assert len(cache.layers[0].pieces(4)) > 3
        # what comes first was copied at the end of the pass before, and is copied again at the end of this one
        assert sorted(copies) == sorted(blocks)
        copies.clear()


@pytest.mark.parametrize("kind", ["rewind", "narrow", "forget", "shrink"])
def test_a_changed_history_comes_anew(kind):
    found = []
    for offload in (False, True):
        cache = made(replace(BALANCED, offload=offload, sink_frames=1), 60)

        def change(start, cache=cache):
            if start == 15:
                for layer in cache.layers:
                    if kind == "narrow":
                        layer.drop_bits()
                    if kind == "forget":
                        layer.forget_before(5)
                if kind == "shrink":
                    cache.shrink()
                if kind == "rewind":
                    cache.rewind(9)

        outs = run(cache, 18, between=change)
        start = cache.frames
        for store in (False, True):
            attend = CachedAttention(cache, start_frame=start, frames=CHUNK, store=store, attention=widened)
            outs += [attend(layer, *drawn(CHUNK, 7 * layer)) for layer in range(3)]
        found.append(outs)
    assert equal(*found)


def test_codebooks_that_nothing_uses_are_freed():
    """What a buffer held of spans that are gone keeps none alive."""
    cache = made(replace(BALANCED, offload=True, codebook_frames=3, window_frames=6), 60)
    run(cache, 45)
    alive = {id(book) for layer in cache.layers for entry in layer.entries for book in entry.books}
    alive |= {id(side.book) for layer in cache.layers for side in layer.sides}
    staged = {id(span.codebook): span.codebook for stage in cache.host._stages for plan in (*stage.plans.values(), stage.here)
              for entry in plan.entries for span in entry.spans}
    gone = [book for number, book in staged.items() if book is not None and number not in alive]
    # at most those of the pieces that the two buffers hold since the pass before
    assert len(gone) <= 2 * 2 * 4


def test_a_history_of_unknown_length():
    found = []
    for offload in (False, True):
        cache = made(replace(BALANCED, offload=offload), None, chunk_frames=CHUNK)
        found.append(run(cache, 30))
    assert equal(*found)
    # a quarter more than a piece took
    _, most = cache.workspace.at_a_time(CHUNK)
    blocks = [entry.block.nbytes / entry.frames for layer in cache.layers for entry in layer.entries]
    assert all(stage.buffer.nbytes <= 1.3 * most * max(blocks) for stage in cache.host._stages)


def test_an_attention_that_cannot_join_pieces_gets_whole_layers():
    found = []
    for offload in (False, True):
        cache = made(replace(BALANCED, offload=offload), 24)

        def own(q, k, v):
            return widened(q, k, v)

        found.append(run(cache, 24, own))
    assert equal(*found)


@pytest.mark.parametrize("budget", [0.7, 0.8, 0.9, 1.2, 1.4])
def test_a_budget_of_the_device(monkeypatch, budget):
    """It limits what a layer holds only where a piece would not fit."""
    monkeypatch.setattr(codebook_lifetime, "LARGEST_MISFIT", math.inf)
    geometry = on_device(Geometry(3, HEADS, DIM, GRID), "cpu", 8 * FRAME_BYTES)
    whole = forecast(replace(BALANCED, offload=True), geometry, 45, itemsize=4)
    settings = replace(BALANCED, offload=True, budget_gib=budget * whole.peak_bytes / GIB)
    if budget == 0.7:
        with pytest.raises(ValueError, match="is too small"):
            made(settings, 45, 8)
        return
    planned, layered = (forecast(settings, replace(geometry, by_piece=by_piece), 45, itemsize=4) for by_piece in (True, False))
    cache = made(settings, 45, 8)
    assert (cache.limits.layer_bytes is None) == (budget > 0.8)
    assert planned.held_frames >= layered.held_frames and (planned.held_frames > layered.held_frames) == (budget >= 1.2)
    run(cache, 45)
    assert cache.stats().peak_bytes == planned.peak_bytes <= budget * whole.peak_bytes


@pytest.mark.parametrize("pieces", [3, 5, 9])
def test_a_context_that_is_stored_in_one_call(pieces):
    """As LongCat-Video's: of a span of nine frames fewer heads are decoded at a time."""
    geometry = on_device(Geometry(3, HEADS, DIM, GRID), "cpu", pieces * FRAME_BYTES)
    settings = context_settings(replace(BALANCED, offload=True), geometry, 9, CHUNK, 4)
    outs = []
    for offload in (False, True):
        cache = made(replace(settings, offload=offload), 12, pieces, chunk_frames=9, stored_frames=9)
        storing = CachedAttention(cache, start_frame=0, frames=9, store=True, attention=widened, newest=settings.recent_frames)
        outs.append([storing(layer, *drawn(9, layer)) for layer in range(3)])
        for seed in range(2):
            attend = CachedAttention(cache, start_frame=9, frames=CHUNK, store=False, attention=widened)
            outs[-1] += [attend(layer, *drawn(CHUNK, 20 * seed + layer)) for layer in range(3)]
    assert equal(*outs)
    planned = forecast_context(settings, geometry, 9, CHUNK, 4)
    assert cache.stats().peak_bytes == planned.peak_bytes


@pytest.mark.parametrize("with_text", [False, True])
@pytest.mark.parametrize("attention", [widened, eight_bits])
def test_two_branches(attention, with_text):
    """HY-WorldPlay's, over frames that a camera sees."""
    cameras = torch.eye(4, dtype=torch.float64).repeat(28, 1, 1)
    cameras[:, 0, 3] = torch.arange(28, dtype=torch.float64) / 10
    frames, found = [0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 20, 21, 22, 23], []
    text = drawn(1, 99, parts=2) if with_text else None
    for offload in (False, True):
        cache = KVCache(replace(BALANCED, offload=offload), layers=3, heads=HEADS, head_dim=DIM, grid=GRID, rope=NoRope, branches=2,
                        dtype=torch.float32, max_frames=28, chunk_frames=4, read_frames=20, workspace_limit=2 * 5 * FRAME_BYTES)
        for seed in range(6):
            for layer in cache.layers:
                layer.append(*drawn(4, 10 * seed + layer.number, parts=2), 4)
        cache.choose(frames)
        outs = []
        for _ in range(2):
            attend = WorldAttention(cache, View(Rope(DIM, GRID), Prope(DIM, GRID, cameras), frames, range(24, 28)), attention=attention)
            outs += [out for layer in range(3) for out in attend(layer, *drawn(4, 500 + layer), text)]
        found.append(outs)
    assert equal(*found) and cache.geometry.by_piece and len(cache.layers[0].pieces(5)) >= 3


class TestOffloadedPieces:
    """Pieces that are copied to the device while the ones before are read on two streams, whichever of these is late. Repeats are equal bit
    for bit, unless a piece is read before it has arrived, or overwritten before it has been read."""

    pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="streams need a GPU")]
    SHAPE = {"layers": 3, "heads": 12, "head_dim": 64, "grid": (6, 8), "device": "cuda", "dtype": torch.bfloat16}
    # of three heads, in both buffers
    FRAME = 2 * 2 * 3 * 64 * 48 * 2

    def drawn(self, frames, seed):
        draw = torch.Generator().manual_seed(seed)
        return [torch.randn(1, frames * 48, 12, 64, generator=draw).to(self.SHAPE["device"], torch.bfloat16) for _ in range(3)]

    @pytest.fixture(params=["", "copies", "reads", "reads on the second stream", "reads on the first stream", "attention"])
    def attention(self, request, monkeypatch):
        """An attention; beside it, what is late."""
        copying, reading, late = HostStore._copying, LayerCache.read, request.param

        def late_copies(self, *others):
            if late == "copies":
                with torch.cuda.stream(self.stream):
                    torch.cuda._sleep(5_000_000)
            return copying(self, *others)

        def late_reads(self, *arguments):
            second = torch.cuda.current_stream() == self.owner.workspace.side
            if late == "reads" or late == f"reads on the {'second' if second else 'first'} stream":
                torch.cuda._sleep(5_000_000)
            return reading(self, *arguments)

        def attention(q, k, v):
            return sdpa(q, k, v)

        def late_partial(q, k, v):
            if late == "attention":
                torch.cuda._sleep(2_000_000)
            return partial(q, k, v)

        attention.partial = late_partial
        monkeypatch.setattr(HostStore, "_copying", late_copies)
        monkeypatch.setattr(LayerCache, "read", late_reads)
        return attention

    @pytest.mark.parametrize(("changes", "first_frames", "pieces"), [
        ({}, 0, 4), ({"window_frames": 14, "sink_frames": 2}, 0, 4), ({}, 20, 7), ({"recent_frames": 0}, 0, 3)],
        ids=["all", "window and sink", "long start", "short pieces"])
    def test_late(self, attention, changes, first_frames, pieces):
        found, total = [], first_frames + 30
        for offload in (False, True):
            settings = replace(PRESETS["balanced"], offload=offload, **changes)
            cache = KVCache(settings, **self.SHAPE, rope=Rope, max_frames=total, chunk_frames=CHUNK, workspace_limit=pieces * self.FRAME)
            assert cache.geometry.by_piece and cache.workspace.side is not None and cache.workspace.piece == pieces
            outs = []
            for start in ([0] if first_frames else []) + list(range(first_frames, total, CHUNK)):
                frames = first_frames if start < first_frames else CHUNK
                for store in (False, False, True):
                    attend = CachedAttention(cache, start_frame=start, frames=frames, store=store, attention=attention, position_limit=25)
                    for layer in range(3):
                        outs.append(attend(layer, *self.drawn(frames, 100 * start + layer)))
                        # what the network allocates next must not reach what a stream still uses
                        torch.full((1 << 20,), torch.nan, device="cuda")
            found.append(outs)
        assert all(torch.equal(*pair) for pair in zip(*found))
        torch.cuda.synchronize()
        planned = forecast(settings, cache.geometry, total, CHUNK, first_frames)
        if first_frames:
            assert cache.stats().peak_bytes <= planned.peak_bytes
        else:
            assert cache.stats().peak_bytes == planned.peak_bytes
        if not changes and not first_frames:
            staged = [stage.buffer.nbytes for stage in cache.host._stages]
            assert sum(staged) < sum(entry.block.nbytes for entry in cache.layers[0].entries)
        cache.free()

    def test_two_branches(self, attention):
        cameras, found = torch.eye(4, dtype=torch.float64).repeat(24, 1, 1), []
        cameras[:, 0, 3] = torch.arange(24, dtype=torch.float64) / 10
        for offload in (False, True):
            cache = KVCache(replace(PRESETS["balanced"], offload=offload), **self.SHAPE, rope=NoRope, branches=2, max_frames=24,
                            chunk_frames=4, read_frames=20, workspace_limit=2 * 5 * self.FRAME)
            for start in range(0, 20, 4):
                for layer in cache.layers:
                    layer.append(*self.drawn(4, 10 * start + layer.number)[1:], 4)
            frames = [0, 1, 2, 3, *range(8, 20)]
            cache.choose(frames)
            view, outs = View(Rope(64, (6, 8)), Prope(64, (6, 8), cameras), frames, range(20, 24)), []
            for _ in range(4):
                attend = WorldAttention(cache, view, attention=attention)
                for layer in range(3):
                    outs += attend(layer, *self.drawn(4, layer))
            found.append(outs)
            cache.free()
        assert all(torch.equal(*pair) for pair in zip(*found))
