"""The codec against the theory of its quantizer, and the cache against the forecast."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from comfyui_qvg.benchmarks.planes import PLANES
from comfyui_qvg.qvg import backends
from comfyui_qvg.qvg.attention.cached import CachedAttention
from comfyui_qvg.qvg.attention.functions import sdpa
from comfyui_qvg.qvg.attention.rope import Rope
from comfyui_qvg.qvg.cache import codebook_lifetime
from comfyui_qvg.qvg.cache.forecast import forecast
from comfyui_qvg.qvg.cache.geometry import Geometry
from comfyui_qvg.qvg.cache.kv_cache import KVCache
from comfyui_qvg.qvg.codec import planes, smoothing
from comfyui_qvg.qvg.codec.base import Tables
from comfyui_qvg.qvg.codec.pair import TensorCodec, train
from comfyui_qvg.qvg.registry import CODECS
from comfyui_qvg.qvg.settings import PRESETS, QVGSettings, TensorSettings
from comfyui_qvg.qvg.units import GIB


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def levels_of(codes, gain):
    """Planes [T, D / 8] each, read back."""
    return planes.LevelTable(gain, "cpu")(torch.stack(codes)[:, None], [(len(codes), len(codes[0]))])[0]


@pytest.mark.parametrize(("bits", "mse"), [(1, 0.364), (2, 0.1175), (3, 0.0349), (4, 0.0097)])
def test_gaussian_error(bits, mse):
    """Every prefix of four planes is within 3 % of the design's error on a unit Gaussian."""
    z = torch.randn(2000, 512, generator=generator())
    read = levels_of(planes.encode(z, 4)[:bits], "mse")
    assert (read - z).square().mean().item() == pytest.approx(mse, rel=0.03)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_gains(bits):
    """The energy gain keeps the second moment, the unbiased gain the correlation with the input."""
    z = torch.randn(2000, 512, generator=generator())
    codes = planes.encode(z, bits)
    assert levels_of(codes, "energy").square().mean().item() == pytest.approx(1, abs=0.01)
    assert (levels_of(codes, "unbiased") * z).mean().item() == pytest.approx(1, abs=0.01)


@examples(max_examples=25, deadline=None)
@given(st.integers(1, 200), st.integers(1, 3), st.sampled_from([64, 128, 256]), st.integers(0, 4), st.integers(1, 4), st.integers(0, 999))
def test_encode_any_shape(tokens, rows, dim, stages, bits, seed):
    """Any token count and head dim: decoded rows equal the same slice of a whole decode, and dropping planes equals encoding fewer."""
    x = 5 * torch.randn(tokens, rows, dim, generator=generator(seed))
    codec = TensorCodec("qvg", TensorSettings(bits=bits, stages=stages, centroids=16), dim, 2)
    book = codec.train(x, generator())
    tables = Tables("cpu")
    span = codec.encode(x, 4, book)
    whole = span.decode(slice(None), tables)
    assert whole.isfinite().all()
    assert torch.equal(span.decode(slice(0, 1), tables), whole[:, :1])
    span.drop(bits)
    assert torch.equal(span.decode(slice(None), tables), codec.encode(x, bits, book).decode(slice(None), tables))


def test_large_values_do_not_saturate():
    x = torch.randn(300, 2, 128, generator=generator())
    x[7, 1, 5], x[:, 0] = 1500.0, 400 * x[:, 0]
    codec = TensorCodec("qvg", TensorSettings(stages=1, centroids=8), 128, 4)
    span = codec.encode(x, 4, codec.train(x, generator()))
    error = (span.decode(slice(None), Tables("cpu")) - x).square().mean((0, 2)) / x.square().mean((0, 2))
    assert error.max() < 0.03


def test_silent_input():
    x = torch.zeros(40, 1, 64)
    codec = TensorCodec("qvg", TensorSettings(), 64, 2)
    assert not codec.encode(x, 2, codec.train(x, generator())).decode(slice(None), Tables("cpu")).any()


def test_training_is_repeatable_and_leaves_the_global_generator_alone():
    x = torch.randn(300, 2, 64, generator=generator())
    codec = TensorCodec("qvg", TensorSettings(stages=2), 64, 4)
    before = torch.get_rng_state()
    first, second = codec.train(x, generator(3)), codec.train(x, generator(3))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.centroids, second.centroids)
    assert torch.equal(first.channel_scale, second.channel_scale)


ALIKE = ["alike", "first", "slices", "no stage"]


@pytest.mark.parametrize(("case", "backend"), [*product([*ALIKE, "one is plain", "unlike", "one is warm", "paper"], ["torch"]),
                                               *product(ALIKE, ["triton"])])
def test_codebooks_of_both_are_those_of_each(case, backend, monkeypatch):
    """K and V trained in one call: the bytes of one after the other, and as many random numbers drawn."""
    if backend == "triton":
        pytest.importorskip("triton")
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    pair = [(scale * torch.randn(110, 3, 64, generator=generator(seed)) + seed).to(device) for seed, scale in ((1, 3.0), (2, 0.1))]
    if case == "slices":
        # two slices or three
        monkeypatch.setattr(smoothing, "SCRATCH_BYTES", 1 << 18)
        monkeypatch.setattr(smoothing, "KERNEL_SCRATCH_BYTES", 1 << 18)
    key = TensorSettings(stages=0 if case == "no stage" else 2, centroids=8)
    value = replace(key, stages=1) if case == "unlike" else key
    codecs = [TensorCodec("paper" if case == "paper" else "qvg", settings, 64, 2) for settings in (key, value)]
    needs = [True, case != "one is plain"]
    with backends.force(backend):
        books = [None if case == "first" or (case == "one is warm" and side) else one.train(x.flip(0), generator())
                 for side, (one, x) in enumerate(zip(codecs, pair))]
        draws = [generator(5) for _ in range(3)]
        apart = [one.train(x, draws[0], book) if needed else None for one, x, book, needed in zip(codecs, pair, books, needs)]
        ways = [train(codecs, pair, needs, draws[1], books)]
        if case in ALIKE:
            ways.append(smoothing.train(pair, key.stages, CODECS["qvg"].book_size(key, 110), 2, draws[2], books))
    assert torch.equal(draws[0].get_state(), draws[1].get_state())
    for mine, theirs in ((mine, theirs) for way in ways for mine, theirs in zip(way, apart)):
        assert (mine is None) == (theirs is None)
        for name, expected in vars(theirs).items() if theirs else ():
            # a GPU adds the squares of more rows up in another order
            torch.testing.assert_close(getattr(mine, name).float(), expected.float(), rtol=0 if device == "cpu" else 2**-7, atol=0)


def run(settings, frames=15, chunk=3, store=True, seed=0, **kwargs):
    cache = KVCache(settings, layers=2, heads=4, head_dim=64, grid=(5, 7), rope=Rope, dtype=torch.float32, max_frames=frames,
                    chunk_frames=chunk, **kwargs)
    draw, outs = generator(seed), []
    for start in range(0, frames, chunk):
        count = min(chunk, frames - start)
        q, k, v = torch.randn(3, 1, count * 35, 4, 64, generator=draw)
        for clean in (False, True):
            attend = CachedAttention(cache, start_frame=start, frames=count, store=clean and store)
            out = [attend(layer, q, k, v) for layer in range(2)]
        outs.append(out[0])
    return cache, torch.cat(outs, dim=1)


CASES = PRESETS | {f"{name} planes": settings for name, settings in PLANES.items()} | {
    "sink inside a chunk": replace(PLANES["balanced"], sink_frames=1, sink_bits=16),
    "recent plain": replace(PLANES["balanced"], recent_bits=16),
    "window": replace(PLANES["balanced"], window_frames=4),
    "short epochs": replace(PLANES["smallest"], codebook_frames=3),
    "budget": replace(PLANES["quality"], budget_gib=1_300_000 / GIB, sink_frames=0),
    "value plain": replace(PLANES["balanced"], value=TensorSettings(bits=8)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("frames", "chunk"), [(15, 3), (7, 1), (8, 3)])
@pytest.mark.parametrize("misfit", [False, True], ids=["codebooks fit", "none fits"])
def test_forecast_is_exact(name, frames, chunk, misfit, monkeypatch):
    monkeypatch.setattr(codebook_lifetime, "LARGEST_MISFIT", 0.0 if misfit else math.inf)
    cache, _ = run(CASES[name], frames, chunk)
    stats = cache.stats()
    planned = forecast(CASES[name], Geometry(2, 4, 64, (5, 7)), frames, chunk, itemsize=4, misfit=misfit)
    assert (stats.stored_bytes, stats.peak_bytes, stats.held_frames) == (planned.stored_bytes, planned.peak_bytes, planned.held_frames)
    if CASES[name].budget_gib:
        assert stats.peak_bytes <= CASES[name].budget_gib * GIB


@pytest.mark.parametrize("name", ["quality", "balanced", "smallest", "quality planes", "balanced planes", "smallest planes"])
def test_a_budget_that_is_accepted_is_kept(name):
    """Down to the smallest budget that is not refused, whatever is kept wider for a while."""
    kept = 0
    for chunk, sink, recent in product((1, 3), (0, 3), (0, 3)):
        for mebi, misfit in product((1.5, 2, 2.5, 3, 4, 6, 8, 12), (False, True)):
            settings = replace(CASES[name], sink_frames=sink, recent_frames=recent, budget_gib=mebi / 1024)
            try:
                planned = forecast(settings, Geometry(6, 2, 128, (8, 12)), 60, chunk, itemsize=4, misfit=misfit)
            except ValueError:
                continue
            assert planned.peak_bytes <= settings.budget_gib * GIB
            kept += 1
    assert kept >= 40


def test_accounting_at_self_forcing_geometry():
    """The ratios that the presets are made for: 30 layers, 12 heads of 128, 1560 tokens a frame, 180 latent frames."""
    geometry = Geometry(30, 12, 128, (30, 52), buffers=2)
    bare = replace(PLANES["balanced"], sink_frames=0, recent_frames=0)
    assert forecast(bare, geometry, 180).stored_ratio >= 7.0
    assert forecast(PLANES["balanced"], geometry, 180).peak_ratio >= 6.0
    assert forecast(PLANES["smallest"], geometry, 180).stored_ratio >= 10
    for name, ratio in (("quality", 5.6), ("balanced", 11), ("smallest", 17), ("tiny", 24)):
        assert forecast(PRESETS[name], geometry, 180).stored_ratio >= ratio


def test_off_is_exact_attention():
    """Unquantized, chunk after chunk equals one attention over everything before it."""
    cache, out = run(PRESETS["off"], 9)
    draw = generator(0)
    parts = [torch.randn(3, 1, 105, 4, 64, generator=draw) for _ in range(3)]
    q, k, v = (torch.cat([part[i] for part in parts], dim=1) for i in range(3))
    q, k = (cache.rope.apply(x, 0, 9) for x in (q, k))
    expected = torch.cat([sdpa(q[:, i : i + 105], k[:, : i + 105], v[:, : i + 105]) for i in (0, 105, 210)], dim=1)
    assert (out - expected).abs().max() < 1e-5


def test_more_planes_come_closer():
    exact = run(PRESETS["off"])[1]
    errors = []
    for bits in (1, 2, 3, 4):
        settings = replace(PLANES["balanced"].both(bits=bits), sink_frames=0, recent_frames=0)
        errors.append((run(settings)[1] - exact).square().mean().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1 * errors[0]


def test_noisy_passes_store_nothing():
    cache, _ = run(PRESETS["balanced"], store=False)
    assert cache.frames == 0 and cache.stats().stored_bytes == 0


def test_free_gives_everything_back():
    cache, _ = run(PRESETS["balanced"])
    cache.free()
    assert cache.stats().stored_bytes == cache.stats().workspace_bytes == 0


@pytest.mark.parametrize(("change", "words"), [
    ({"sink_bits": 5}, "from 0.25 to 4 in steps of 0.125, or 8 or 16"), ({"sink_bits": 5.5}, r"sink_bits is 5\.5"),
    ({"recent_bits": 2.5}, "the qvg codec holds"), ({"codebook_frames": 0}, "whole number from 1"), ({"budget_gib": -1}, "GiB"),
    ({"codec": "zip"}, "choose one of")])
def test_impossible_settings_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        replace(PLANES["balanced"], **change)


def test_small_budget_is_refused():
    with pytest.raises(ValueError, match=r"budget of 0\.0001 GiB is too small"):
        run(replace(PRESETS["balanced"], budget_gib=0.0001))


@pytest.mark.parametrize("name", PRESETS)
def test_settings_json_round_trip(name):
    assert QVGSettings.from_json(PRESETS[name].to_json()) == PRESETS[name]


def test_a_part_of_many_tokens_finds_the_same_codebook(monkeypatch):
    """A context that arrives whole is looked at in part; its codebook leaves hardly more of all tokens than one of all of them. Without
    clusters, where two searches end in different places anyhow."""
    x = torch.randn(6000, 2, 64, generator=generator()) * torch.logspace(0.7, -0.7, 64)
    left, seen = [], []
    real = smoothing.kmeans
    monkeypatch.setattr(smoothing, "kmeans", lambda x, *more: seen.append(x.shape[1]) or real(x, *more))
    for most in (smoothing.SEEN, 10**6):
        monkeypatch.setattr(smoothing, "SEEN", most)
        book = smoothing.train([x], 2, 16, 8, generator(1), [None])[0]
        left.append(smoothing.subtract(x, book, slice(0, 2))[0].square().mean())
    assert seen == [1200, 1200, 6000, 6000]
    assert left[0] <= 1.05 * left[1]
