"""Synthetic keys and values have the statistics that they were made from."""

import json

import pytest
import torch

from comfyui_qvg.benchmarks import synthetic
from comfyui_qvg.qvg.attention import NoRope
from comfyui_qvg.qvg.cache.kv_cache import KVCache
from comfyui_qvg.qvg.commands import cli
from comfyui_qvg.qvg.measure.statistics import Recorder, load, save
from comfyui_qvg.qvg.settings import PRESETS

FRAMES, GRID = 12, (16, 24)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def record(pair, path):
    """The file of `qvg bench statistics` of K and V [T, R, D]."""
    recorder = Recorder({}, FRAMES)
    heads, dim = pair[0].shape[1:]
    cache = KVCache(PRESETS["off"], layers=1, heads=heads, head_dim=dim, grid=GRID, rope=NoRope, dtype=torch.float32)
    recorder.watch(cache)
    for k, v in zip(*(x.split(3 * GRID[0] * GRID[1]) for x in pair)):
        cache.layers[0].append(k[None], v[None], 3)
    save(path, recorder, {})
    return load(path)[0]


@pytest.mark.parametrize("name", json.loads(synthetic.RECORDED.read_text()))
def test_keys_of_released_models(name, tmp_path):
    stats = synthetic.recorded(name, 2, generator())
    pair = [synthetic.generate(stats, FRAMES, GRID[0] * GRID[1], generator(seed)) for seed in (0, 1)]
    found = record(pair, tmp_path / "statistics.safetensors")
    for side in range(2):
        assert torch.allclose(found["spectrum"][0, side].double(), stats.spectrum, rtol=0.02, atol=1e-5)
        assert torch.allclose(found["channel_deviation"][0, side].double(), stats.deviation, rtol=0.02)
        assert found["mean_share"][0, side].tolist() == pytest.approx([synthetic.MEAN_SHARE] * 2, rel=0.01)
        assert found["frame_correlation"][0, side].tolist() == pytest.approx([synthetic.CORRELATION] * 2, abs=0.1)


def test_statistics_of_a_file(tmp_path):
    """Tokens with heavy tails whose components repeat differently, recorded, generated and recorded again."""
    draw, dim = generator(3), 32
    repeats = torch.linspace(0.9, 0.1, dim)
    x = [torch.randn(384, 2, dim, generator=draw)]
    for _ in range(FRAMES - 1):
        x.append(repeats * x[-1] + (1 - repeats.square()).sqrt() * torch.randn(384, 2, dim, generator=draw))
    scale = torch.randn(384, 2, 1, generator=draw).mul(0.5).exp().repeat(FRAMES, 1, 1)
    mix = torch.randn(2, dim, dim, generator=draw) * torch.logspace(0, -1.5, dim)
    pair = [torch.einsum("trc,rdc->trd", torch.cat(x) * scale, mix) + side for side in (3, 0.1)]
    before = record(pair, tmp_path / "a.safetensors")
    made = [synthetic.generate(synthetic.of_file(before, 0, side), FRAMES, 384, generator(5)) for side in range(2)]
    after = record(made, tmp_path / "b.safetensors")
    assert torch.allclose(after["spectrum"], before["spectrum"], rtol=0.02, atol=1e-4)
    for name, tolerance in (("channel_deviation", 0.02), ("channel_mean", 0.02), ("mean_share", 0.02), ("norm_quantiles", 0.1)):
        torch.testing.assert_close(after[name].double(), before[name].double(), rtol=tolerance, atol=0.02)
    # the spread of the norms takes a little of what repeats
    assert (after["component_correlation"] - before["component_correlation"]).abs().mean() < 0.15
    assert torch.equal(made[0], synthetic.generate(synthetic.of_file(before, 0, 0), FRAMES, 384, generator(5)))
    assert not torch.equal(made[0], synthetic.generate(synthetic.of_file(before, 0, 0), FRAMES, 384, generator(6)))


def test_too_few_tokens():
    with pytest.raises(ValueError, match="512 tokens are enough"):
        synthetic.generate(synthetic.recorded("Self-Forcing", 1, generator()), 3, 96, generator())


def test_errors_are_those_of_plain_storage():
    stats = synthetic.recorded("LongCat-Video", 2, generator())
    pair = tuple(synthetic.generate(stats, FRAMES, 384, generator(seed)) for seed in (0, 1))
    exact = synthetic.measure(PRESETS["off"], pair, GRID, 3)
    assert exact.errors == (0, 0) and exact.logits == 0 and (exact.bits, exact.book_bits) == (32, 0)
    few, many = (synthetic.measure(PRESETS[name], pair, GRID, 3) for name in ("smallest", "quality"))
    assert 0 < many.errors[0] < few.errors[0] < 1 and 0 < many.logits < few.logits < 1 and many.bits > few.bits


def test_the_command(tmp_path):
    options = ["--small", "--out", str(tmp_path), "--device", "cpu", "--only", "balanced", "paper"]
    assert cli.main(["bench", "synthetic", *options]) == 0
    result = json.loads((tmp_path / "synthetic.json").read_text())
    assert len(result["rows"]) == 6 and "never evidence" in (tmp_path / "synthetic.md").read_text()
    assert all(0 < row["error"] < 1 and 0 < row["logits"] < 1 and row["bits"] > row["book_bits"] for row in result["rows"])
