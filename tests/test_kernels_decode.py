"""Kernels that rotate and decode, compared with their references in torch: on a GPU if there is one, else in Triton's interpreter.

torch fills new tensors with NaN (integers: their maximum), so memory that a kernel fails to write shows.
"""

import math
import weakref
from dataclasses import replace

import pytest
import torch

from comfyui_qvg.benchmarks.planes import PLANES
from comfyui_qvg.qvg import backends
from comfyui_qvg.qvg.attention.cached import CachedAttention
from comfyui_qvg.qvg.attention.functions import sdpa
from comfyui_qvg.qvg.attention.rope import Rope, rotate, rotate_chunk
from comfyui_qvg.qvg.cache import codebook_lifetime
from comfyui_qvg.qvg.cache.forecast import forecast
from comfyui_qvg.qvg.cache.kv_cache import KVCache
from comfyui_qvg.qvg.cache.layer import LayerCache
from comfyui_qvg.qvg.codec import pair as codec
from comfyui_qvg.qvg.codec.base import Tables
from comfyui_qvg.qvg.codec.qvg import PlaneSpan
from comfyui_qvg.qvg.settings import PRESETS, QVGSettings, TensorSettings
from kernel_cases import DEVICE, DTYPES, ON_GPU, both, tokens

pytest.importorskip("triton", reason="kernels are written in Triton")

pytestmark = [pytest.mark.usefixtures("poison"), *([pytest.mark.gpu] if ON_GPU else [])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 5, 3, 64), (2, 33, 2, 128), (19, 4, 256), (1, 1, 1, 64)])
def test_rotate(shape, dtype):
    x = tokens(*shape, dtype=dtype)
    angles = torch.randn(shape[-3], 1, shape[-1] // 2, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    ours, reference = both(rotate, x, angles.cos(), angles.sin())
    assert ours.shape == x.shape and ours.is_contiguous()
    assert_close([[ours], [reference]], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "workspace_batches", "count", "heads", "placed", "dim"), [
    (1, 1, 5, 3, 3, 64), (2, 1, 33, 4, 1, 128), (2, 2, 9, 3, 2, 256)])
def test_rotate_chunk(batch, workspace_batches, count, heads, placed, dim, dtype):
    """Both are rotated, and the first heads of the first conditions are written to the workspace, and nothing else of it."""
    q, k, v = (tokens(batch, count, heads, dim, seed=seed, dtype=dtype) for seed in range(3))
    angles = torch.randn(count, 1, dim // 2, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    found = []
    for backend in ("triton", "torch"):
        workspace = torch.full((2, workspace_batches, count + 7, placed, dim), 7.0, device=DEVICE, dtype=dtype)
        with backends.force(backend):
            rotated = rotate_chunk(q, k, v, angles.cos(), angles.sin(), (workspace[0, :, 5:-2], workspace[1, :, 5:-2]))
        assert (workspace[:, :, :5] == 7).all() and (workspace[:, :, -2:] == 7).all()
        keys, values = (x[:workspace_batches, :, :placed] for x in (rotated[1], v))
        assert torch.equal(workspace[0, :, 5:-2], keys) and torch.equal(workspace[1, :, 5:-2], values)
        found.append(rotated)
    assert_close(found, dtype)
    with backends.force("triton"):
        assert all(map(torch.equal, rotate_chunk(q, k, v, angles.cos(), angles.sin()), found[0]))


def test_rotate_some_heads():
    x = tokens(2, 40, 6, 64)[:, :, 1:3]
    angles = torch.randn(40, 1, 32).to(DEVICE)
    assert_close([[found] for found in both(rotate, x, angles.cos(), angles.sin())], torch.float32)


QVG = PLANES["balanced"]
BARE = replace(QVG, sink_frames=0, recent_frames=0)
PAPER = PRESETS["paper"]
TRANSFORM = replace(QVG, codec="transform").both(bits=1.25, stages=0)
CASES = {name: PRESETS[name] for name in PRESETS} | {
    **{f"{bits} planes, {stages} stages": BARE.both(bits=bits, stages=stages) for bits, stages in ((1, 0), (2, 1), (3, 4), (4, 2))},
    "two groups": BARE.both(group=32), "gains": BARE.both(gain="unbiased"),
    "paper int4": PAPER.both(bits=4, stages=2), "paper asymmetric": PAPER.both(symmetric=False, bits=2, stages=4),
    "paper sink": replace(PAPER, sink_frames=1, sink_bits=16),
    "value plain": replace(QVG, value=TensorSettings(bits=8)), "sink inside a chunk": replace(QVG, sink_frames=1, sink_bits=16),
    "recent plain": replace(QVG, recent_bits=16), "window": replace(QVG, window_frames=3),
    "new codebooks": replace(BARE, codebook_frames=2),
    "transform": TRANSFORM, "transform, int8 sinks, plain recent": replace(TRANSFORM, sink_frames=1, sink_bits=8, recent_bits=16),
}


def filled(settings: QVGSettings, dim=64, grid=(5, 7), batch=1, heads=4, dtype=DTYPES[0], chunks=(2, 2, 1)) -> KVCache:
    with backends.force("torch"):
        cache = KVCache(settings, layers=1, heads=heads, head_dim=dim, grid=grid, rope=Rope, batch=batch, device=DEVICE, dtype=dtype)
        for number, frames in enumerate(chunks):
            key, value = (tokens(batch, frames * grid[0] * grid[1], heads, dim, seed=10 * number + part, dtype=dtype) for part in (0, 1))
            cache.layers[0].append(key, value, frames)
    return cache


def read(cache: KVCache, heads: slice, *more):
    layer = cache.layers[0]
    found = []
    for backend in ("triton", "torch"):
        shape = cache.geometry.batch, layer.tokens, heads.stop - heads.start, cache.geometry.head_dim
        keys, values = (torch.full(shape, float("nan"), dtype=cache.workspace.dtype, device=DEVICE) for _ in range(2))
        with backends.force(backend):
            layer.read(heads, keys, values, *more)
        found.append((keys, values))
    return found


def assert_close(found, dtype, in_halves=False):
    """Elementwise equality up to rounding. in_halves: planes were decoded in float16."""
    for ours, reference in zip(*found):
        assert reference.isfinite().all() and ours.isfinite().all()
        # one step of the dtype at the size of the value, since both round once; a rotated pair rounds at the size of the pair
        step = {torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-7}[dtype]
        pairs = reference.float().unflatten(-1, (-1, 2)).norm(dim=-1, keepdim=True)
        allowed = step * pairs + 1e-5
        if in_halves:
            # float16 rounds a few times at the size of the summands, by 2^-12 of it each, and so do matrix units, by less
            allowed = allowed + 2**-9 * pairs.flatten(0, -3).amax(0)
        assert ((ours.float() - reference.float()).abs() <= allowed.expand(*reference.shape[:-1], -1, 2).flatten(-2)).all()


def rounds(settings: QVGSettings, dtype) -> bool:
    """Whether sums are rounded before they are stored: of planes in float16 for bf16, and by a GPU's matrix units."""
    return (settings.codec == "qvg" and dtype == torch.bfloat16) or (settings.codec == "transform" and ON_GPU)


# planes are decoded in float16 for bf16, in float32 for the others
WORKSPACES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", WORKSPACES[::2])
@pytest.mark.parametrize("name", CASES)
def test_decode(name, dtype):
    cache = filled(CASES[name], dtype=dtype)
    assert_close(read(cache, slice(1, 3)), dtype, rounds(CASES[name], dtype))


@pytest.mark.parametrize("dtype", WORKSPACES[::2])
@pytest.mark.parametrize("name", CASES)
def test_recover(name, dtype):
    """Codebooks are trained again on decoded tokens: keys before RoPE, of every row and any batch."""
    cache = filled(CASES[name], dtype=dtype, batch=2, heads=1, chunks=(2, 1))
    for entry in cache.layers[0].spans:
        found = both(lambda spans: codec.tokens_of(spans, cache.tables, dtype), entry.spans)
        assert [tuple(x.shape) for x in found[0]] == [(35 * entry.frames, 2, 64)] * 2
        assert_close(found, dtype, rounds(CASES[name], dtype))


@pytest.mark.parametrize("power", [-40, -14, 14, 40])
def test_decode_of_any_size(power):
    """Values out of float16's range beside others, which bf16 can hold."""
    with backends.force("torch"):
        pair = [tokens(1, 70, 4, 64, seed=part) * torch.tensor([1.0, 2.0 ** power] * 2, device=DEVICE)[:, None] for part in (0, 1)]
        cache = KVCache(BARE.both(bits=4), layers=1, heads=4, head_dim=64, grid=(5, 7), rope=Rope, device=DEVICE, dtype=torch.bfloat16)
        cache.layers[0].append(*(x.bfloat16() for x in pair), 2)
    ours, reference = read(cache, slice(0, 4))
    for head in range(4):
        size = 2.0 ** (power * (head % 2))
        assert_close([[x[:, :, head:head + 1] / size for x in found] for found in (ours, reference)], torch.bfloat16, True)


@pytest.mark.parametrize("dtype", WORKSPACES)
@pytest.mark.parametrize(("dim", "grid", "batch", "heads"), [
    (64, (1, 1), 1, slice(0, 4)), (128, (3, 11), 2, slice(2, 4)), (256, (4, 5), 1, slice(3, 4)), (128, (13, 9), 1, slice(0, 1))])
def test_decode_shapes(dim, grid, batch, heads, dtype):
    """Odd grids, batches, one head and all, and spans longer than a program's share."""
    settings = replace(QVG, sink_frames=1, sink_bits=16, recent_bits=4)
    assert_close(read(filled(settings, dim, grid, batch, dtype=dtype), heads), dtype, dtype == torch.bfloat16)


@pytest.mark.parametrize("share", [1, 2, 7])
def test_decode_in_programs_of_any_length(share, monkeypatch):
    """The number of tiles in a program does not change the result, even if there are fewer."""
    from comfyui_qvg.kernels.decode import Tiling

    cache = filled(BARE, 64, (13, 9), chunks=(2,))
    expected = read(cache, slice(0, 2))
    monkeypatch.setattr(Tiling, "share", lambda self, frames: share)
    assert all(map(torch.equal, read(cache, slice(0, 2))[0], expected[0]))


def test_length_of_a_program():
    """About as many tokens for any number of frames, and at least one tile."""
    from comfyui_qvg.kernels.decode import Tiling

    tile = Tiling(tokens=16, warps=4)
    assert [tile.share(frames) for frames in (1, 3, 19, 60)] == [9, 3, 1, 1]


def test_decode_follows_what_the_cache_does():
    """The reader keeps addresses between reads; dropped planes, evicted spans and new chunks change them."""
    cache = filled(BARE.both(bits=4), chunks=(2, 2, 1))
    layer = cache.layers[0]
    assert_close(read(cache, slice(0, 2)), DTYPES[0])
    layer.entries[0].set_bits(1, 3)
    assert_close(read(cache, slice(0, 2)), DTYPES[0])
    del layer.entries[0]
    assert_close(read(cache, slice(0, 2)), DTYPES[0])
    with backends.force("torch"):
        layer.append(*(tokens(1, 35, 4, 64, seed=90 + part) for part in (0, 1)), 1)
    assert_close(read(cache, slice(2, 4)), DTYPES[0])


def test_decode_keeps_no_span_alive():
    cache = filled(BARE)
    read(cache, slice(0, 1))
    span = weakref.ref(cache.layers[0].entries[0].spans[0])
    del cache.layers[0].entries[0]
    assert span() is None


def test_angles_that_are_replaced_stay():
    """Positions of a later piece may extend the tables while the second stream still reads an earlier piece with the ones before."""
    from comfyui_qvg.kernels.reader import Angles

    angles = Angles(Rope(64, (2, 3)))
    angles.reach(0, 40, DEVICE)
    before = [weakref.ref(part) for part in (angles.table, angles.pairs)]
    angles.reach(-4, 40, DEVICE)
    assert angles.origin == 8 and all(part() is not None and part() is not now for part, now in zip(before, (angles.table, angles.pairs)))


def test_decode_writes_its_heads_alone():
    """A strided workspace: memory between and after the tokens is unchanged."""
    cache = filled(BARE)
    layer = cache.layers[0]
    workspace = torch.full((2, 1, layer.tokens + 3, 2, 64), 7.0, device=DEVICE)
    with backends.force("triton"):
        layer.read(slice(0, 1), workspace[0, :, :-3, :1], workspace[1, :, :-3, :1])
    assert (workspace[:, :, -3:] == 7).all() and (workspace[:, :, :, 1] == 7).all()
    assert (workspace[:, :, :-3, 0] != 7).any(-1).all()


def test_decode_unforced():
    """Without a forced backend the result is the same, whichever backend runs."""
    cache = filled(QVG)
    layer = cache.layers[0]
    keys, values = torch.empty(2, 1, layer.tokens, 4, 64, device=DEVICE)
    layer.read(slice(0, 4), keys, values)
    other = torch.empty_like(keys), torch.empty_like(values)
    with backends.force("torch"):
        layer.read(slice(0, 4), *other)
    assert_close([(keys, values), other], DTYPES[0])


@pytest.mark.skipif(not ON_GPU, reason="streams need a GPU")
@pytest.mark.parametrize("slow", ["decode", "attention", ""])
def test_overlap_changes_nothing(slow, monkeypatch):
    """Overlapping decoding and attention gives the same bits as one after the other, whichever of the two is late."""
    # random tokens fit each other's codebooks neither well nor badly, so that no forecast would be exact
    monkeypatch.setattr(codebook_lifetime, "LARGEST_MISFIT", math.inf)
    def late(function, name):
        def call(*arguments):
            if name == slow:
                torch.cuda._sleep(20_000_000)
            return function(*arguments)
        return call

    monkeypatch.setattr(LayerCache, "read", late(LayerCache.read, "decode"))
    outs = []
    for overlapped in (True, False):
        cache = KVCache(QVG, layers=2, heads=12, head_dim=64, grid=(8, 9), rope=Rope, device=DEVICE, dtype=torch.bfloat16, max_frames=12)
        assert cache.workspace.side is not None
        if not overlapped:
            cache.workspace.side = None
        found = []
        for start in range(0, 12, 3):
            q, k, v = (tokens(1, 216, 12, 64, seed=start + part, dtype=torch.bfloat16) for part in range(3))
            for clean in (False, True):
                attend = CachedAttention(cache, start_frame=start, frames=3, store=clean, attention=late(sdpa, "attention"))
                found += [attend(layer, q, k, v) for layer in range(2)]
        outs.append(torch.stack(found))
        stats, planned = cache.stats(), forecast(QVG, cache.geometry, 12)
        assert (stats.stored_bytes, stats.peak_bytes) == (planned.stored_bytes, planned.peak_bytes)
    assert torch.equal(*outs)


MEMORY = torch.cuda.get_device_properties(0).total_memory if ON_GPU else 0


@pytest.mark.skipif(MEMORY < 36 << 30, reason="more than 2 ** 31 elements need a GPU of 40 GB")
def test_addresses_beyond_32_bits():
    """A span, and a tensor to rotate, of more than 2 ** 31 elements: the end of each is right."""
    grid, heads, dim = (1024, 1024), 9, 256
    count = grid[0] * grid[1]
    x = torch.randn(1, count, heads, dim, device=DEVICE, dtype=torch.bfloat16)
    assert x.numel() > 2**31
    torch.utils.deterministic.fill_uninitialized_memory = False
    cache = KVCache(PRESETS["off"], layers=1, heads=heads, head_dim=dim, grid=grid, rope=Rope, device=DEVICE, dtype=x.dtype)
    with backends.force("triton"):
        cache.layers[0].append(x, x, 1)
        keys, values = torch.full((2, 1, count, 1, dim), float("nan"), device=DEVICE, dtype=x.dtype)
        cache.layers[0].read(slice(8, 9), keys, values)
        cos, sin = (part[:, None] for part in cache.rope.tables(0, 1, DEVICE))
        rotated = rotate(x, cos, sin)
        assert torch.equal(values, x[:, :, 8:])
        assert_close([[rotated[:, -99:, 8:]], [keys[:, -99:]]], x.dtype)
        del rotated, keys, values, cache
        coder = codec.TensorCodec("qvg", TensorSettings(bits=4, stages=1, centroids=4), dim, 1)
        book = coder.train(x[0, -2000:], torch.Generator().manual_seed(0))
        span = coder.encode(x[0], 4, book)
    last = PlaneSpan([plane[-99:] for plane in span.planes], span.scales[-99:], span.exponents, span.ids[:, -99:], book, "mse")
    error = last.decode(slice(8, 9), Tables(DEVICE)) - x[0, -99:, 8:].float()
    assert error.square().mean() < 0.03
