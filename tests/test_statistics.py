"""Statistics of keys and values: each figure against its definition, on tokens that are kept whole here, and the command on tiny models."""

import pytest
import torch
from safetensors.torch import save_file

from comfyui_qvg.qvg.attention import NoRope
from comfyui_qvg.qvg.cache.kv_cache import KVCache
from comfyui_qvg.qvg.commands.cli import main
from comfyui_qvg.qvg.demo import NETWORK_PATH
from comfyui_qvg.qvg.measure.rows import presets
from comfyui_qvg.qvg.measure.statistics import QUANTILES, Recorder, load, save
from comfyui_qvg.qvg.models.longcat import LongCat, LongCatSizes
from comfyui_qvg.qvg.models.wan import CausalWan, WanSizes
from comfyui_qvg.qvg.settings import PRESETS

LAYERS, HEADS, DIM, GRID, CHUNKS = 2, 3, 32, (3, 4), (1, 3, 2)


def video(seed):
    """K and V of each layer and chunk [1, T, H, D]: a mean, a falling spectrum, places that repeat, chunks that differ."""
    draw = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(shape, generator=draw)

    chunks = []
    for _ in range(LAYERS):
        mix, mean, place = noise(2, HEADS, DIM, DIM) * torch.logspace(0, -2, DIM)[:, None], noise(2, HEADS, DIM), noise(2, 12, HEADS, DIM)
        parts = []
        for frames in CHUNKS:
            tokens = noise(2, frames, 12, HEADS, DIM) + place[:, None] + noise(2, 1, 1, HEADS, DIM)
            parts.append((torch.einsum("sfnhd,shde->sfnhe", tokens, mix) + mean[:, None, None]).flatten(1, 2)[:, None])
        chunks.append(parts)
    return chunks


def store(recorder, chunks):
    cache = KVCache(PRESETS["off"], layers=LAYERS, heads=HEADS, head_dim=DIM, grid=GRID, rope=NoRope, dtype=torch.float32)
    recorder.watch(cache)
    for number, frames in enumerate(CHUNKS):
        for layer in range(LAYERS):
            cache.layers[layer].append(*chunks[layer][number], frames)
    return cache


@pytest.fixture(scope="module")
def found():
    """The tensors of two videos, and all tokens [2, L, 2, F, N, H, D] of both."""
    recorder, videos = Recorder({name: PRESETS[name] for name in ("balanced", "smallest")}, 3), [video(seed) for seed in (0, 1)]
    caches = [store(recorder, chunks) for chunks in videos]
    whole = torch.stack([torch.stack([torch.cat(parts, dim=2)[:, 0].unflatten(1, (-1, 12)) for parts in chunks]) for chunks in videos])
    assert caches[0].frames == 6 and torch.equal(caches[0].layers[0].entries[0].spans[0].data, videos[0][0][0][0][0])
    return recorder.tensors(), whole.double()


def test_means_and_spectra(found):
    tensors, whole = found
    x = whole.permute(1, 2, 5, 0, 3, 4, 6).flatten(3, 5)  # [L, 2, H, T, D]
    mean = x.mean(3)
    centred = x - mean[:, :, :, None]
    scale = centred.square().mean((3, 4)).sqrt()[..., None]
    assert torch.allclose(tensors["energy"].double(), x.square().mean((3, 4)), rtol=1e-4)
    assert torch.allclose(tensors["mean_share"].double(), mean.square().mean(-1) / x.square().mean((3, 4)), rtol=1e-4)
    for name, wanted in (("channel_mean", mean / scale), ("channel_deviation", centred.square().mean(3).sqrt() / scale)):
        assert torch.allclose(tensors[name].double(), wanted, rtol=2e-3, atol=1e-4), name
    values = torch.linalg.eigvalsh(centred.mT @ centred).flip(-1)
    assert torch.allclose(tensors["spectrum"].double(), values / values.sum(-1, keepdim=True), rtol=2e-3, atol=1e-6)
    between = sum(part.shape[2] * (part.mean((2, 3)) - mean).square().sum(-1) for one in whole for part in one.split(CHUNKS, dim=2)) / 12
    assert torch.allclose(tensors["chunk_share"].double(), between / centred.square().mean(3).sum(-1), rtol=1e-3)


def test_what_repeats_from_frame_to_frame(found):
    """Across chunks, too, and never from one video to the next."""
    tensors, whole = found
    first, second = (part.permute(1, 2, 5, 0, 3, 4, 6).flatten(3, 5) for part in (whole[:, :, :, :-1], whole[:, :, :, 1:]))
    middle = (first + second).mean(3, keepdim=True) / 2
    first, second = first - middle, second - middle
    wanted = (first * second).sum((3, 4)) / (first.square() + second.square()).sum((3, 4)) * 2
    assert torch.allclose(tensors["frame_correlation"].double(), wanted, rtol=1e-3)
    assert 0.2 < float(tensors["frame_correlation"].mean()) < 0.95
    parts = tensors["component_correlation"].float()
    assert parts.shape == (LAYERS, 2, DIM) and parts.abs().max() <= 1


def test_norms_have_the_scale_of_their_head(found):
    tensors, _ = found
    norms = tensors["norm_quantiles"]
    assert norms.shape == (LAYERS, 2, HEADS, len(QUANTILES)) and bool((norms.diff(dim=-1) >= 0).all())
    assert bool(((norms[..., 2] > 0.5) & (norms[..., 2] < 1.2)).all())


def test_errors_are_those_of_the_settled_bits(found):
    """More bits leave less, K and V apart; every bit is counted, codebooks included."""
    tensors, _ = found
    error, bits = tensors["error"], tensors["bits"]
    assert error.shape == (2, LAYERS, 2) and bool((error[0] < error[1]).all())
    assert bool((error > 1e-3).all()) and bool((error < 0.5).all())
    assert float(bits[0]) == pytest.approx(float(bits[1]) + 0.5, abs=1e-6) and 1.3 < float(bits[0]) < 2
    # codebooks as long as one chunk's tokens weigh far more here
    assert bool((tensors["codebook_bits"] > 0.5).all())


def test_the_file(found, tmp_path):
    recorder = Recorder({}, 3)
    store(recorder, video(0))
    save(tmp_path / "s.safetensors", recorder, {"model": "none"})
    tensors, info = load(tmp_path / "s.safetensors")
    assert info == {"version": 1, "presets": [], "quantiles": list(QUANTILES), "layers": LAYERS, "heads": HEADS, "head_dim": DIM,
                    "tokens": 72, "model": "none"}
    assert tensors.keys() == found[0].keys() and tensors["error"].shape == (0, LAYERS, 2)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no statistics"):
        load(tmp_path / "other.safetensors")


def test_a_file_of_thirty_layers_is_small(tmp_path):
    """Self-Forcing's size: 30 layers, 12 heads of 128."""
    recorder = Recorder({}, 1)
    cache = KVCache(PRESETS["off"], layers=30, heads=12, head_dim=128, grid=(1, 2), rope=NoRope)
    recorder.watch(cache)
    for layer in cache.layers:
        layer.append(*torch.randn(2, 1, 4, 12, 128), 2)
    save(tmp_path / "s.safetensors", recorder, {})
    assert (tmp_path / "s.safetensors").stat().st_size < 1_000_000


@pytest.mark.parametrize(("broken", "sentence"), [(None, "No keys or values were stored"), (torch.nan, "are not finite")])
def test_runs_without_statistics(broken, sentence):
    recorder = Recorder({}, 3)
    if broken is not None:
        chunks = video(0)
        chunks[1][1][0, 0, 5] = broken
        store(recorder, chunks)
    with pytest.raises(ValueError, match=sentence):
        recorder.tensors()


@pytest.mark.skipif(not NETWORK_PATH.is_file(), reason="the tiny model's weights are not in this checkout")
def test_the_tiny_model(tmp_path, capsys):
    out = ["--out", str(tmp_path), "--device", "cpu", "--frames", "9"]
    assert main(["bench", "statistics", *out]) == 0
    tensors, info = load(tmp_path / "statistics.safetensors")
    assert info["chunks"] == [3, 3, 3] and info["presets"] == list(presets()) and info["tokens"] == 9 * 96
    assert {"device", "torch", "command", "date"} <= set(info["environment"])
    assert bool((tensors["spectrum"].float().sum(-1) - 1).abs().max() < 0.01)
    order = [tensors["error"][info["presets"].index(name)].mean() for name in ("quality", "balanced", "smallest")]
    assert order == sorted(order) and "| K 5 |" in capsys.readouterr().out
    assert "| V 0 |" in (tmp_path / "statistics.md").read_text()
    assert main(["bench", "statistics", *out]) == 2 and "already exists" in capsys.readouterr().err


@pytest.mark.parametrize("sizes", [WanSizes(dim=128, ffn_dim=32, layers=2, text_dim=16),
                                   LongCatSizes(dim=64, head_dim=32, ffn_dim=32, layers=2, text_dim=16, time_dim=16, freq_dim=16)])
def test_a_checkpoint(tmp_path, sizes):
    network = (CausalWan if isinstance(sizes, WanSizes) else LongCat)(sizes)
    torch.manual_seed(0)
    save_file({name: torch.randn(tensor.shape) * 0.2 for name, tensor in network.state_dict().items()}, tmp_path / "own.safetensors")
    save_file({"positive": torch.randn(2, 4, 16)}, tmp_path / "prompts.safetensors")
    options = [] if isinstance(sizes, WanSizes) else ["--given", "2", "--sigmas", "1", "0.5", "0"]
    places = ["--checkpoint", str(tmp_path / "own.safetensors"), "--embeddings", str(tmp_path / "prompts.safetensors"), "--out",
              str(tmp_path / "out")]
    assert main(["bench", "statistics", *places, "--width", "64", "--height", "48", "--chunk-frames", "2", "--frames", "8", "--device",
                 "cpu", "--only", "smallest", *options]) == 0
    tensors, info = load(tmp_path / "out" / "statistics.safetensors")
    assert (info["layers"], info["heads"], info["head_dim"], info["presets"]) == (2, sizes.heads, sizes.head_dim, ["smallest"])
    # of LongCat-Video, what its two segments with a history continue
    assert info["tokens"] == 2 * 12 * (8 if isinstance(sizes, WanSizes) else 4) and info["videos"] == 2
    assert tensors["energy"].shape == (2, 2, sizes.heads) and bool((tensors["error"] > 0).all())


def test_files_belong_together(tmp_path, capsys):
    assert main(["bench", "statistics", "--checkpoint", "x.pt", "--out", str(tmp_path)]) == 2
    assert "--checkpoint and --embeddings belong together" in capsys.readouterr().err
