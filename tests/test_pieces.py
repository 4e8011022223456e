"""Attention to a history a piece at a time, against attention to all of it."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from comfyui_qvg.benchmarks.planes import PLANES
from comfyui_qvg.qvg.attention import CachedAttention, Rope, sdpa, widened
from comfyui_qvg.qvg.attention import pieces as attention_pieces
from comfyui_qvg.qvg.attention.functions import eight_bits
from comfyui_qvg.qvg.attention.pieces import Running, _plain, by_cudnn, partial
from comfyui_qvg.qvg.cache import codebook_lifetime
from comfyui_qvg.qvg.cache.forecast import forecast
from comfyui_qvg.qvg.cache.geometry import Division, Geometry, division, on_device, usual_limit, workspace_bytes
from comfyui_qvg.qvg.cache.kv_cache import KVCache
from comfyui_qvg.qvg.cache.workspace import Workspace
from comfyui_qvg.qvg.settings import PRESETS
from comfyui_qvg.qvg.units import GIB

DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])]
HEADS, DIM, GRID, CHUNK = 8, 32, (3, 4), 3
SIZE = GRID[0] * GRID[1]


def drawn(*shape, seed=0, device="cpu", dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
def test_parts_join_to_the_whole(dtype, error, device):
    q, k, v = (drawn(2, count, 3, 32, seed=count, device=device, dtype=dtype) for count in (50, 333, 334))
    q, v, joined = 4 * q, v[:, :333], Running()
    for start, stop in ((0, 100), (100, 101), (101, 333)):
        joined.add(*partial(q, k[:, start:stop], v[:, start:stop]))
    exact = sdpa(*(x.double() for x in (q, k, v)))
    assert (joined.result(dtype).double() - exact).abs().max() < error


def test_the_plain_form_is_that_of_the_kernels():
    q, k, v = (drawn(2, 40, 3, 16, seed=seed) for seed in range(3))
    out, lse = partial(q, k, v)
    plain, sums = _plain(*(x.transpose(1, 2) for x in (q, k, v)))
    torch.testing.assert_close(plain.transpose(1, 2), out)
    torch.testing.assert_close(sums.transpose(1, 2), lse)
    logits = torch.einsum("bqhd,bkhd->bqhk", q, k).double() / 4
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), rtol=0, atol=1e-5)


def filled(settings, limit=0, chunks=7, batch=1, device="cpu", dtype=torch.float32, **more):
    cache = KVCache(settings, layers=2, heads=HEADS, head_dim=DIM, grid=GRID, rope=Rope, batch=batch, dtype=dtype, device=device,
                    max_frames=CHUNK * (chunks + 1), chunk_frames=CHUNK, workspace_limit=limit, **more)
    for number in range(chunks):
        pair = [drawn(batch, CHUNK * SIZE, HEADS, DIM, seed=10 * number + part, device=device, dtype=dtype) for part in (0, 1)]
        for layer in cache.layers:
            layer.append(*pair, CHUNK)
    return cache


# two heads of 32 channels and 12 tokens a frame, K and V in float32
FRAME_BYTES = 2 * 2 * 32 * 12 * 4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("frames", [3, 4, 9])
@pytest.mark.parametrize("settings", [
    PRESETS["off"], PRESETS["balanced"], replace(PRESETS["quality"], window_frames=9), PRESETS["paper"],
    replace(PRESETS["smallest"], offload=True)], ids=["off", "balanced", "window", "paper", "offload"])
def test_a_pass_in_pieces_is_a_pass_over_the_whole(settings, frames, device):
    """At every position: sinks, windows, positions beyond a limit, several conditions."""
    # every stream has a buffer of its own
    limit = frames * FRAME_BYTES * (2 if device == "cuda" else 1)
    whole, pieces = (filled(settings, size, device=device) for size in (0, limit))
    assert pieces.workspace.piece == frames
    q, k, v = (drawn(3, CHUNK * SIZE, HEADS, DIM, seed=90 + part, device=device) for part in range(3))
    outs = []
    for cache in (whole, pieces):
        attend = CachedAttention(cache, start_frame=21, frames=CHUNK, store=True, position_limit=20)
        outs.append([attend(layer, *(x[:1] for x in (q, k, v))) for layer in range(2)])
        attend = CachedAttention(cache, start_frame=24, frames=CHUNK, store=False)
        outs[-1] += [attend(layer, q, k, v) for layer in range(2)]
    for near, far in zip(*outs):
        torch.testing.assert_close(near, far, rtol=0, atol=5e-6)
    assert pieces.workspace.nbytes == limit
    assert pieces.stats().peak_bytes < whole.stats().peak_bytes


def test_a_network_in_float32_reads_a_cache_in_bf16():
    whole, pieces = (filled(PRESETS["balanced"], size, dtype=torch.bfloat16) for size in (0, 3 * FRAME_BYTES // 2))
    q, k, v = (drawn(1, CHUNK * SIZE, HEADS, DIM, seed=90 + part) for part in range(3))
    near, far = (CachedAttention(cache, start_frame=21, frames=CHUNK, store=False, attention=widened)(0, q, k, v)
                 for cache in (whole, pieces))
    # the whole history has the chunk's own keys in bf16, too
    torch.testing.assert_close(near, far, rtol=0, atol=0.02)


def test_an_attention_of_a_persons_own_gets_the_whole_history():
    seen = []

    def own(q, k, v):
        seen.append(k.shape[1])
        return sdpa(q, k, v)

    cache = filled(PRESETS["balanced"], 3 * FRAME_BYTES)
    q, k, v = (drawn(1, CHUNK * SIZE, HEADS, DIM, seed=90 + part) for part in range(3))
    CachedAttention(cache, start_frame=21, frames=CHUNK, store=False, attention=own)(0, q, k, v)
    assert set(seen) == {24 * SIZE}


def test_a_short_history_is_one_piece_and_is_decoded_ahead_as_before():
    whole, pieces = (filled(PRESETS["balanced"], size, chunks=2) for size in (0, 9 * FRAME_BYTES))
    q, k, v = (drawn(1, CHUNK * SIZE, HEADS, DIM, seed=90 + part) for part in range(3))
    near, far = (CachedAttention(cache, start_frame=6, frames=CHUNK, store=False)(0, q, k, v) for cache in (whole, pieces))
    assert torch.equal(near, far)


def test_a_history_whose_length_is_unknown_outgrows_the_limit():
    """Where the attention cannot join pieces, the workspace grows as if there were no limit."""
    cache = KVCache(PRESETS["balanced"], layers=1, heads=HEADS, head_dim=DIM, grid=GRID, rope=Rope, dtype=torch.float32,
                    workspace_limit=4 * FRAME_BYTES)
    q, k, v = (drawn(1, CHUNK * SIZE, HEADS, DIM, seed=part) for part in range(3))
    sizes = []
    for start in range(0, 15, CHUNK):
        CachedAttention(cache, start_frame=start, frames=CHUNK, store=True, attention=lambda q, k, v: sdpa(q, k, v))(0, q, k, v)
        sizes.append(cache.workspace.nbytes / FRAME_BYTES)
    # a quarter more than six, and than nine, frames, and so on, as without a limit
    assert sizes == [0, 7.5, 11.25, 15, 15]


@pytest.mark.parametrize("frames", [5, 3, 2, 1])
def test_a_long_span_is_decoded_a_few_heads_at_a_time(frames):
    """A context of one call is one span of nine frames, and of two heads there is not enough space for it."""
    outs, calls = [], []
    q, k, v = (drawn(1, 9 * SIZE, HEADS, DIM, seed=part) for part in range(3))
    new = [x[:, :CHUNK * SIZE].flip(1) for x in (q, k, v)]
    settings = replace(PRESETS["balanced"], sink_frames=0)

    def own(q, k, v):
        return sdpa(q, k, v)

    def partly(q, k, v):
        calls.append((k.shape[1] // SIZE, k.shape[2]))
        return partial(q, k, v)

    own.partial = partly
    for limit in (0, frames * FRAME_BYTES):
        cache = KVCache(settings, layers=1, heads=HEADS, head_dim=DIM, grid=GRID, rope=Rope, dtype=torch.float32, max_frames=12,
                        chunk_frames=9, workspace_limit=limit)
        CachedAttention(cache, start_frame=0, frames=9, store=True, attention=own)(0, q, k, v)
        outs.append(CachedAttention(cache, start_frame=9, frames=CHUNK, store=False, attention=own)(0, *new))
    torch.testing.assert_close(*outs, rtol=0, atol=5e-6)
    heads = 2 if frames >= 9 else 1
    assert set(calls) == {(9, heads), (CHUNK, heads)}
    assert cache.workspace.nbytes == max(2 * frames, 9) * FRAME_BYTES // 2


def test_what_a_limit_allows():
    geometry = on_device(Geometry(30, 12, 128, (30, 52)), "cuda", 96 << 20)
    # K and V of three heads in two buffers, bf16: 4.57 MiB a frame
    assert division(geometry) == (3, 21)
    assert workspace_bytes(geometry, 180) == workspace_bytes(replace(geometry, limit=0), 21) <= 96 << 20
    assert workspace_bytes(geometry, 9) == workspace_bytes(replace(geometry, limit=0), 9)
    # one buffer, two branches, float32
    assert division(on_device(Geometry(30, 12, 128, (30, 52)), "cpu", 96 << 20)) == (3, 42)
    assert division(on_device(Geometry(30, 12, 128, (30, 52), branches=2), "cpu", 96 << 20), 4) == (3, 10)


@pytest.mark.parametrize(("limit", "found"), [
    # 12 heads of 32 channels and 12 tokens a frame in bf16: 1,536 bytes a head and frame
    (9 * 1536, (3, 3)), (3 * 1536, (3, 1)), (3 * 1536 - 1, (2, 1)), (1536, (1, 1)), (1535, (1, 1)), (1, (1, 1)), (0, (3, None))])
def test_fewer_heads_where_a_frame_is_too_large(limit, found):
    geometry = Geometry(2, 12, 32, (3, 4), limit=limit)
    assert division(geometry) == Division(*found)
    heads, frames = found
    assert workspace_bytes(geometry, 100) == heads * (frames or 100) * 1536


def test_the_usual_limit():
    """96 MiB, also where there are two streams, but for large GPUs."""
    shape = Geometry(30, 12, 128, (30, 52))
    assert {on_device(shape, kind).limit for kind in ("cpu", "mps", "cuda")} == {96 << 20}
    assert KVCache(PRESETS["balanced"], layers=1, heads=12, head_dim=128, grid=(30, 52), rope=Rope).geometry.limit == 96 << 20
    # offloaded spans come a piece at a time
    assert on_device(shape, "cpu").by_piece and on_device(shape, "cuda").by_piece and not on_device(shape, "cpu", 0).by_piece


@pytest.mark.parametrize(("capability", "hip", "size", "limit"), [
    ((9, 0), None, 139.7, 320 << 20), ((8, 0), None, 39.4, 320 << 20), ((12, 0), None, 31.4, 96 << 20), ((8, 0), None, 23.6, 96 << 20),
    ((7, 5), None, 47.5, 0), ((9, 4), "7.0", 191.5, 0)])
def test_the_history_is_whole_where_no_fast_attention_joins_pieces(monkeypatch, capability, hip, size, limit):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=size * GIB))
    monkeypatch.setattr(torch.version, "hip", hip)
    found = on_device(Geometry(30, 12, 128, (30, 52)), "cuda")
    assert found.limit == limit and found.by_piece == (limit > 0)
    assert on_device(found, "cpu").limit == 96 << 20
    assert usual_limit("cuda", 12 * GIB) == min(limit, 96 << 20) and usual_limit("cuda", 80 * GIB) == (320 << 20 if limit else 0)


def test_pieces_are_whole_spans_of_many_bits_or_of_few():
    layer = filled(replace(PRESETS["balanced"], sink_frames=1), 4 * FRAME_BYTES).layers[0]
    # a sink in 16 bits, settled spans in 1.25, the newest in 4
    assert [(part.start, part.stop, frames, coarse) for part, frames, coarse in layer.pieces(4)] == [
        (0, 1, 1, False), (1, 2, 2, True), *((n, n + 1, 3, True) for n in range(2, 7)), (7, 8, 3, False)]
    assert [(part.start, part.stop, frames) for part, frames, _ in layer.pieces(9)] == [(0, 1, 1), (1, 4, 8), (4, 7, 9), (7, 8, 3)]
    layer.owner.choose([0, 9, 10])
    assert [(frames, coarse) for _, frames, coarse in layer.pieces(9)] == [(1, False), (3, True)]


def test_eight_bits_are_for_what_is_held_in_few():
    """A history in many bits is attended to exactly, and one in few about as well as what its bits leave."""
    q, k, v = (drawn(1, CHUNK * SIZE, HEADS, DIM, seed=90 + part) for part in range(3))
    errors = {}
    for name, settings in (("many", PRESETS["balanced"].both(bits=4)), ("few", PRESETS["balanced"])):
        cache = filled(settings)
        exact, rough = (CachedAttention(cache, start_frame=21, frames=CHUNK, store=False, attention=attention)(0, q, k, v)
                        for attention in (widened, eight_bits))
        errors[name] = float((rough - exact).norm() / exact.norm())
    assert errors["many"] < 1e-6 < 1e-3 < errors["few"] < 0.05


@pytest.mark.parametrize("first_frames", [0, 5, 13])
@pytest.mark.parametrize("frames", [9, 4, 1])
@pytest.mark.parametrize("changes", [
    {}, {"offload": True}, {"window_frames": 9}, {"budget_gib": 2_700_000 / GIB}, {"budget_gib": 2_900_000 / GIB, "offload": True}],
    ids=["all", "offload", "window", "budget", "offload and budget"])
def test_a_forecast_is_what_a_run_in_pieces_takes(monkeypatch, changes, frames, first_frames):
    """Of a start video longer than a piece, too, of which one head is decoded whole."""
    monkeypatch.setattr(codebook_lifetime, "LARGEST_MISFIT", math.inf)
    settings, limit, total = replace(PRESETS["balanced"], **changes), frames * FRAME_BYTES, first_frames + 21
    shape = on_device(Geometry(2, HEADS, DIM, GRID), "cpu", limit)
    planned = forecast(settings, shape, total, CHUNK, first_frames, itemsize=4)
    cache = KVCache(settings, layers=2, heads=HEADS, head_dim=DIM, grid=GRID, rope=Rope, dtype=torch.float32, max_frames=total,
                    chunk_frames=CHUNK, workspace_limit=limit)
    starts = ([0] if first_frames else []) + list(range(first_frames, total, CHUNK))
    for start, stop in zip(starts, [*starts[1:], total]):
        attend = CachedAttention(cache, start_frame=start, frames=stop - start, store=True)
        for layer in range(2):
            attend(layer, *(drawn(1, (stop - start) * SIZE, HEADS, DIM, seed=10 * start + part) for part in range(3)))
    stats = cache.stats()
    for part in ("stored_bytes", "workspace_bytes", "host_bytes", "held_frames"):
        assert getattr(stats, part) == getattr(planned, part), part
    if not (first_frames and settings.offload):
        assert stats.peak_bytes == planned.peak_bytes
    # the sink is a span of its own
    longest = max(CHUNK, first_frames - settings.sink_frames)
    assert stats.workspace_bytes == max(2 * frames, longest) * FRAME_BYTES // 2
    if settings.budget_gib and not first_frames:
        assert stats.peak_bytes <= settings.budget_gib * GIB


ON_A_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="two streams need a GPU")]


def limited(cache, limit):
    """The same cache, read within another limit. What its workspace holds is no number, so that nothing is read which was not written."""
    place = cache.workspace
    cache.geometry = on_device(cache.geometry, "cuda", limit)
    cache.workspace = Workspace(cache.geometry, place.dtype, place.device, place.capacity // cache.geometry.frame_tokens)
    place.free()
    cache.workspace.views(cache.geometry.frame_tokens)
    cache.workspace._storage.fill_(torch.nan)
    return cache


def through(cache, tokens, **more):
    """A pass over all layers, none of which waits for the device."""
    attend = CachedAttention(cache, start_frame=cache.frames, frames=CHUNK, store=False, **more)
    return [attend(number, *part) for number, part in enumerate(tokens)]


class TestFullSize:
    """On two streams, with the sizes of a released model: 1,560 tokens a frame, 12 heads of 128. Repeats are equal bit for bit, unless a
    stream reads what another has not written yet, or no longer has."""

    pytestmark = ON_A_GPU

    @pytest.mark.parametrize("changes", [
        {}, {"offload": True}, {"window_frames": 40, "sink_frames": 3}, {"window_frames": 40, "sink_frames": 3, "offload": True},
        {"codec": "qvg"}], ids=["all", "offload", "window", "offloaded window", "planes"])
    @pytest.mark.parametrize("frames", [60, 180])
    def test_pieces_are_the_whole(self, frames, changes):
        changes = dict(changes)
        settings = PLANES["balanced"] if changes.pop("codec", "") else PRESETS["balanced"]
        cache = KVCache(replace(settings, **changes), layers=4, heads=12, head_dim=128, grid=(30, 52), rope=Rope, device="cuda",
                        dtype=torch.bfloat16, max_frames=frames + CHUNK, chunk_frames=CHUNK, workspace_limit=0)
        draw = torch.Generator("cuda").manual_seed(0)

        def chunk():
            return torch.randn(3, 1, CHUNK * 1560, 12, 128, generator=draw, device="cuda", dtype=torch.bfloat16).unbind(0)

        for _ in range(0, frames, CHUNK):
            for layer in cache.layers:
                layer.append(*chunk()[:2], CHUNK)
        tokens = [(2 * q, k, v) for q, k, v in (chunk() for _ in cache.layers)]
        for more in ({}, {"position_limit": 21}):
            whole = through(limited(cache, 0), tokens, **more)
            limited(cache, 96 << 20)
            repeats = [through(cache, tokens, **more) for _ in range(4)]
            for near, far in zip(repeats[0], whole):
                assert (near.float() - far.float()).norm() < 8e-3 * far.float().norm()
            assert all(torch.equal(*pair) for other in repeats[1:] for pair in zip(repeats[0], other))
            assert cache.workspace.nbytes <= 96 << 20
        cache.free()

    def test_conditions_and_a_layer_in_between_that_allocates(self):
        """Memory that a pass frees is used at once by the network, which must not reach it before the second stream is done."""
        cache = filled(PRESETS["balanced"], 4 * FRAME_BYTES * 2, device="cuda")
        q, k, v = (drawn(2, CHUNK * SIZE, HEADS, DIM, seed=90 + part, device="cuda") for part in range(3))
        results = []
        for _ in range(8):
            outs = []
            attend = CachedAttention(cache, start_frame=21, frames=CHUNK, store=False)
            for layer in range(2):
                outs.append(attend(layer, q.clone(), k.clone(), v.clone()))
                torch.full_like(q, torch.nan), torch.full((1 << 20,), torch.nan, device="cuda")
            results.append(outs)
        assert all(torch.equal(*pair) for other in results[1:] for pair in zip(results[0], other))
        exact = CachedAttention(limited(cache, 0), start_frame=21, frames=CHUNK, store=False)
        for layer, near in enumerate(results[0]):
            torch.testing.assert_close(near, exact(layer, q, k, v), rtol=0, atol=5e-6)


def test_what_cudnn_refuses_is_not_tried_again(caplog, monkeypatch):
    monkeypatch.setattr(attention_pieces, "_refused", set())
    q, k, v = (drawn(1, 2, 6, 32, seed=seed, dtype=torch.bfloat16) for seed in range(3))
    with caplog.at_level("INFO"):
        # there is no cuDNN on a CPU
        assert [by_cudnn(*(x[..., :dim] for x in (q, k, v))) for dim in (32, 32, 16, 32)] == [None] * 4
        assert by_cudnn(q, k[:, :, :0], v[:, :, :0]) is None
    assert [record.args[0] for record in caplog.records] == [32, 16]
    assert attention_pieces._refused == {(q.device, 32, q.dtype), (q.device, 16, q.dtype)}


def test_cudnn_without_memory_is_not_refused(monkeypatch):
    monkeypatch.setattr(attention_pieces, "_refused", set())

    class Full(TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), options=None):
            if "cudnn_attention" in str(function):
                raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
            return function(*arguments, **(options or {}))

    q, k, v = (drawn(1, 2, 6, 32, seed=seed, dtype=torch.bfloat16) for seed in range(3))
    with Full(), pytest.raises(RuntimeError, match="ALLOC_FAILED"):
        by_cudnn(q, k, v)
    assert not attention_pieces._refused


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or torch.version.hip is not None or torch.cuda.get_device_capability() < (9, 0),
                    reason="pieces are attended to by cuDNN from compute capability 9.0 on")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("keys", [1, 77, 1560, 4 * 1560])
def test_cudnn_is_flash_attention(keys, dim, dtype):
    """Of some heads of a wider tensor, as pieces come."""
    q, k, v = (drawn(2, count, 12, dim, seed=seed, device="cuda", dtype=dtype)[:, :, 3:6] for seed, count in enumerate((333, keys, keys)))
    found = by_cudnn(*(x.transpose(1, 2) for x in (q, k, v)))
    assert found is not None
    out, lse = partial(q, k, v)
    assert torch.equal(out, found[0].transpose(1, 2)) and torch.equal(lse, found[1].transpose(1, 2))
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        near, sums = partial(q, k, v)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
    assert (out.float() - near.float()).norm() < {torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype] * near.float().norm()
    torch.testing.assert_close(lse, sums, rtol=0, atol=2e-5)
