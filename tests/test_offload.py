"""Offloaded spans against the cache that keeps them on the device: the same numbers, less memory there, and none left behind.

Everything runs on a CPU with plain host tensors; on a GPU the same tests run over pinned memory and streams.
"""

import gc
import math
from dataclasses import replace

import pytest
import torch

from comfyui_qvg.benchmarks.planes import PLANES
from comfyui_qvg.qvg import backends
from comfyui_qvg.qvg.attention.cached import CachedAttention
from comfyui_qvg.qvg.attention.functions import sdpa
from comfyui_qvg.qvg.attention.rope import Rope
from comfyui_qvg.qvg.cache import codebook_lifetime
from comfyui_qvg.qvg.cache.context import context_settings, forecast_context
from comfyui_qvg.qvg.cache.forecast import forecast
from comfyui_qvg.qvg.cache.geometry import Geometry, buffers_on
from comfyui_qvg.qvg.cache.host import HostStore
from comfyui_qvg.qvg.cache.kv_cache import KVCache
from comfyui_qvg.qvg.settings import PRESETS, QVGSettings, TensorSettings
from comfyui_qvg.qvg.units import GIB

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
GRID, HEADS, DIM = (5, 7), 4, 64

pytestmark = [pytest.mark.usefixtures("poison"), *([pytest.mark.gpu] if ON_GPU else [])]


# small codebooks, which take little time and are not what is tested
SMALL = {name: replace(settings.both(centroids=4), iterations=1) for name, settings in {
    **PRESETS, **{f"{name} planes": settings for name, settings in PLANES.items()}}.items()}
CASES = SMALL | {
    "sink inside a chunk": replace(SMALL["balanced"], sink_frames=1, sink_bits=16),
    "recent plain": replace(SMALL["balanced"], recent_bits=16),
    "window": replace(SMALL["balanced"], window_frames=4, codebook_frames=3),
    "value plain": replace(SMALL["balanced"], value=TensorSettings(bits=8)),
    "no stages": SMALL["balanced"].both(stages=0),
    "asymmetric paper": SMALL["paper"].both(symmetric=False),
}


def cache_of(settings, frames, chunk=3, layers=3, batch=1, dtype=DTYPE):
    return KVCache(settings, layers=layers, heads=HEADS, head_dim=DIM, grid=GRID, rope=Rope, batch=batch, device=DEVICE, dtype=dtype,
                   max_frames=frames, chunk_frames=chunk)


def chunk_of(start, count, layer, batch=1, dtype=DTYPE):
    draw = torch.Generator().manual_seed(1000 * start + layer)
    return (torch.randn(3, batch, count * 35, HEADS, DIM, generator=draw)).to(DEVICE, dtype)


def passes(cache, start, count, attention=sdpa):
    """A noisy pass over a chunk and the one that stores it: what every layer attended to."""
    outs = []
    for store in (False, True):
        attend = CachedAttention(cache, start_frame=start, frames=count, store=store, attention=attention)
        for layer in range(cache.geometry.layers):
            outs.append(attend(layer, *chunk_of(start, count, layer, cache.geometry.batch, cache.workspace.dtype)))
    return torch.stack(outs)


def run(cache, frames, chunk=3, attention=sdpa):
    return [passes(cache, start, min(chunk, frames - start), attention) for start in range(0, frames, chunk)]


def same(settings, frames=15, chunk=3, **options):
    """Whether a run with offloaded spans equals one without; the offloading cache."""
    found = []
    for offload in (False, True):
        cache = cache_of(replace(settings, offload=offload), frames, chunk, **options)
        found.append(run(cache, frames, chunk))
    assert all(torch.equal(a, b) for a, b in zip(*found))
    return cache


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("layers", "batch"), [(1, 1), (2, 2), (3, 1)])
def test_offloaded_spans_give_the_same_numbers(name, layers, batch):
    cache = same(CASES[name], layers=layers, batch=batch)
    for layer in cache.layers:
        for entry in layer.entries:
            assert all(tensor.device.type == "cpu" for span in entry.spans for tensor in span.tensors().values())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("frames", "chunk"), [(15, 3), (7, 1), (8, 3)])
def test_the_forecast_is_exact(name, frames, chunk, monkeypatch):
    monkeypatch.setattr(codebook_lifetime, "LARGEST_MISFIT", math.inf)
    settings = replace(CASES[name], offload=True)
    cache = cache_of(settings, frames, chunk)
    run(cache, frames, chunk)
    stats = cache.stats()
    planned = forecast(settings, cache.geometry, frames, chunk, itemsize=DTYPE.itemsize)
    resident = forecast(CASES[name], cache.geometry, frames, chunk, itemsize=DTYPE.itemsize)
    assert (stats.stored_bytes, stats.peak_bytes, stats.held_frames) == (planned.stored_bytes, planned.peak_bytes, planned.held_frames)
    assert stats.stored_bytes == resident.stored_bytes
    assert stats.host_bytes == sum(entry.block.data.nbytes for layer in cache.layers for entry in layer.entries) <= planned.host_bytes


def test_the_device_holds_two_layers():
    """At the shape of Self-Forcing, 180 latent frames: what it takes with and without, and the host's part."""
    geometry = Geometry(30, 12, 128, (30, 52), buffers=2)
    resident = forecast(PLANES["balanced"], geometry, 180)
    planned = forecast(replace(PLANES["balanced"], offload=True), geometry, 180)
    layer = resident.stored_bytes / 30
    assert planned.peak_bytes < resident.workspace_bytes + 3 * layer + 0.06 * resident.stored_bytes
    assert 0.93 * resident.stored_bytes < planned.host_bytes < 1.02 * resident.stored_bytes


@pytest.mark.parametrize("name", ["quality", "balanced", "smallest", "quality planes", "balanced planes", "smallest planes"])
def test_budgets_of_device_and_host_are_kept(name, monkeypatch):
    """Down to the smallest that are not refused. The cache obeys, and is what was forecast."""
    monkeypatch.setattr(codebook_lifetime, "LARGEST_MISFIT", math.inf)
    free = replace(SMALL[name], offload=True, sink_frames=2, sink_bits=4, codebook_frames=9)
    geometry = Geometry(3, HEADS, DIM, GRID, buffers=buffers_on(DEVICE.type, HEADS))
    whole, kept = forecast(free, geometry, 24, 3, itemsize=4), 0
    for device, host in ((0, 0.6), (0.5, 0), (0.8, 0), (0.9, 0.6)):
        device, host = int(device * whole.peak_bytes), int(host * whole.host_bytes)
        settings = replace(free, budget_gib=device / GIB, host_gib=host / GIB)
        try:
            planned = forecast(settings, geometry, 24, 3, itemsize=4)
        except ValueError:
            continue
        cache, most = cache_of(settings, 24, dtype=torch.float32), 0
        for start in range(0, 24, 3):
            attend = CachedAttention(cache, start_frame=start, frames=3, store=True)
            for layer in range(3):
                attend(layer, *chunk_of(start, 3, layer, dtype=torch.float32))
            most = max(most, cache.stats().host_bytes)
        assert cache.stats().peak_bytes == planned.peak_bytes and most == planned.host_bytes
        assert planned.peak_bytes <= (device or whole.peak_bytes) and most <= (host or whole.host_bytes)
        kept += 1
    assert kept >= 3


@pytest.mark.parametrize("limit", [{"budget_gib": 0.0001}, {"host_gib": 0.00001}])
def test_limits_that_hold_nothing_are_refused(limit):
    with pytest.raises(ValueError, match=r"GiB.* is too small: the first frames"):
        cache_of(replace(PLANES["balanced"], offload=True, **limit), 15)


def test_a_host_limit_needs_offload():
    with pytest.raises(ValueError, match="host_gib limits offloaded spans, but offload is off"):
        QVGSettings(host_gib=1.0)


@pytest.mark.parametrize("kind", ["rewind", "narrow", "forget", "shrink"])
def test_a_changed_history_is_fetched_anew(kind):
    """Between two passes spans leave or lose planes, so that what already lies in a staging buffer is of yesterday."""
    found = []
    for offload in (False, True):
        cache = cache_of(replace(SMALL["quality"], offload=offload, sink_frames=1), 30)
        run(cache, 12)
        if kind == "rewind":
            cache.rewind(6)
        for layer in cache.layers:
            if kind == "narrow":
                layer.drop_bits()
            if kind == "forget":
                layer.forget_before(5)
        while kind == "shrink" and cache.shrink() is not None:
            pass
        found.append(passes(cache, cache.frames, 3))
        found.append(passes(cache, cache.frames, 3))
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])


def test_a_buffer_grows_where_the_length_is_unknown():
    found = []
    for offload in (False, True):
        cache = KVCache(replace(SMALL["balanced"], offload=offload), layers=2, heads=HEADS, head_dim=DIM, grid=GRID, rope=Rope,
                        device=DEVICE, dtype=DTYPE)
        found.append(run(cache, 30))
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_a_context_is_offloaded_as_it_is_forecast():
    """A rebuilt context (LongCat-Video) is one span a layer, whose staging is no larger than that span."""
    geometry = Geometry(4, HEADS, DIM, GRID)
    settings = context_settings(replace(PLANES["balanced"], offload=True), geometry, 4, 8, DTYPE.itemsize)
    outs = []
    for chosen in (replace(settings, offload=False), settings):
        cache = KVCache(chosen, layers=4, heads=HEADS, head_dim=DIM, grid=GRID, rope=Rope, device=DEVICE, dtype=DTYPE, max_frames=12,
                        chunk_frames=4, stored_frames=4)
        for start, count, store in ((0, 4, True), (4, 8, False), (4, 8, False)):
            attend = CachedAttention(cache, start_frame=start, frames=count, store=store, newest=chosen.recent_frames)
            outs.append(torch.stack([attend(layer, *chunk_of(start, count, layer)) for layer in range(4)]))
    assert torch.equal(outs[1], outs[4]) and torch.equal(outs[2], outs[5])
    planned = forecast_context(settings, cache.geometry, 4, 8, DTYPE.itemsize)
    assert (cache.stats().peak_bytes, cache.stats().host_bytes) == (planned.peak_bytes, planned.host_bytes)
    narrow = context_settings(replace(PLANES["quality"], offload=True, host_gib=planned.host_bytes / GIB), geometry, 4, 8)
    assert (narrow.key.bits, narrow.value.bits) == (2, 2)
    with pytest.raises(ValueError, match=r"limit of .* GiB for offloaded spans is too small"):
        context_settings(replace(settings, host_gib=1000 / GIB), geometry, 4, 8)


def test_memory_goes_back():
    """Blocks of spans that left serve the next ones, one of a size is kept, and freeing leaves none."""
    cache = cache_of(replace(SMALL["balanced"], offload=True, window_frames=6), 30)
    spare = []
    for start in range(0, 30, 3):
        passes(cache, start, 3)
        spare.append(sum(data.nbytes for data in cache.host._spare.values()))
    gc.collect()
    assert max(spare) <= 3 * max(entry.block.nbytes for layer in cache.layers for entry in layer.entries)
    host = cache.host
    cache.free()
    assert cache.stats().host_bytes == cache.stats().stored_bytes == host.device_bytes - host._largest == 0
    assert not host._spare and not host._pinned
    # and so does dropping a cache that nobody freed
    run(cache, 9)
    spare, pinned = cache.host._spare, cache.host._pinned
    cache.layers[0].forget_before(9)
    assert spare
    del cache, host
    gc.collect()
    assert not spare and not pinned


def test_host_memory_that_ends_is_an_error_the_sampler_knows(monkeypatch):
    """Too little host memory ends in the error after which the sampler gives something up and goes on."""
    store = HostStore("cpu")
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: (_ for _ in ()).throw(RuntimeError("can't allocate memory")))
    with pytest.raises(torch.OutOfMemoryError, match="no host memory for an offloaded span"):
        store._pin(1000)


@pytest.mark.skipif(ON_GPU, reason="the interpreter stands for the GPU")
def test_the_kernel_reads_what_visits():
    pytest.importorskip("triton", reason="kernels are written in Triton")
    found = []
    for offload in (False, True):
        settings = replace(SMALL["balanced"], offload=offload, recent_frames=0, sink_frames=0)
        cache = KVCache(settings, layers=2, heads=2, head_dim=DIM, grid=(2, 4), rope=Rope, dtype=DTYPE, max_frames=9)
        draw = torch.Generator().manual_seed(0)
        for _ in range(2):
            for layer in cache.layers:
                layer.append(*torch.randn(2, 1, 8, 2, DIM, generator=draw), 1)
            with backends.force("triton"):
                for layer in cache.layers:
                    keys, values = torch.empty(2, 1, layer.tokens, 1, DIM)
                    layer.read(slice(1, 2), keys, values)
                    found.append((keys, values))
    assert len(found) == 8
    assert all(torch.equal(a, b) for one, other in zip(found[:4], found[4:]) for a, b in zip(one, other))


@pytest.mark.skipif(not ON_GPU, reason="streams need a GPU")
@pytest.mark.parametrize("slow", ["copies", "attention", ""])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_late_copies_change_nothing(slow, backend, monkeypatch):
    """Whichever of copies and computation is late, a layer is read when it has arrived, and overwritten when it has been read."""
    copying = HostStore._copying

    def late_copies(self, *others):
        if slow == "copies":
            with torch.cuda.stream(self.stream):
                torch.cuda._sleep(20_000_000)
        return copying(self, *others)

    def late_attention(*arguments):
        if slow == "attention":
            torch.cuda._sleep(5_000_000)
        return sdpa(*arguments)

    monkeypatch.setattr(HostStore, "_copying", late_copies)
    found = []
    with backends.force(backend):
        for offload in (False, True):
            settings = replace(PLANES["balanced"], offload=offload, window_frames=6, recent_bits=16)
            cache = KVCache(settings, layers=4, heads=12, head_dim=64, grid=GRID, rope=Rope, device=DEVICE, dtype=DTYPE, max_frames=24)
            outs = []
            for start in range(0, 24, 3):
                for store in (False, True):
                    attend = CachedAttention(cache, start_frame=start, frames=3, store=store, attention=late_attention)
                    for layer in range(4):
                        draw = torch.Generator().manual_seed(1000 * start + layer)
                        q, k, v = torch.randn(3, 1, 105, 12, 64, generator=draw).to(DEVICE, DTYPE)
                        outs.append(attend(layer, q, k, v))
            found.append(torch.stack(outs))
            planned = forecast(settings, cache.geometry, 24)
            assert (cache.stats().stored_bytes, cache.stats().peak_bytes) == (planned.stored_bytes, planned.peak_bytes)
    assert torch.equal(*found)
    host = cache.host
    assert {entry.block.data.data_ptr() for layer in cache.layers for entry in layer.entries} <= host._pinned
    cache.free()
    assert not host._pinned


@pytest.mark.skipif(not ON_GPU, reason="pinning needs a GPU")
def test_memory_that_cannot_be_pinned_serves_all_the_same(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda.cudart(), "cudaHostRegister", lambda *arguments: torch.cuda.cudart().cudaError(2))
    cache = same(CASES["balanced"])
    assert not cache.host._pinned and "not pinned" in caplog.text


@pytest.mark.skipif(not ON_GPU, reason="device memory is that of a GPU")
def test_device_memory_is_what_is_counted():
    """Bytes that torch holds on the GPU when a video is made, against the count; the host's bytes are not among them."""
    settings = replace(PLANES["balanced"], offload=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    cache = KVCache(settings, layers=8, heads=12, head_dim=128, grid=(15, 26), rope=Rope, device=DEVICE, dtype=DTYPE, max_frames=60)
    for start in range(0, 60, 3):
        for store in (False, True):
            attend = CachedAttention(cache, start_frame=start, frames=3, store=store)
            for layer in range(8):
                q, k, v = torch.randn(3, 1, 3 * 390, 12, 128, device=DEVICE, dtype=DTYPE)
                attend(layer, q, k, v)
    del q, k, v
    torch.cuda.synchronize()
    stats = cache.stats()
    held = torch.cuda.memory_allocated() - before
    assert held < 1.1 * stats.peak_bytes + (8 << 20) and stats.host_bytes > 0.9 * stats.stored_bytes
