"""Measurements of one's own checkpoint: tiny random models through the command, which prove mechanics and say nothing of quality."""

import hashlib
import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from comfyui_qvg.qvg.commands.cli import main
from comfyui_qvg.qvg.measure.inputs import files_of
from comfyui_qvg.qvg.measure.loop import CausalLoop, Windows
from comfyui_qvg.qvg.measure.noise import NOISY
from comfyui_qvg.qvg.measure.rows import measure
from comfyui_qvg.qvg.models.longcat import LongCat, LongCatSizes
from comfyui_qvg.qvg.models.wan import CausalWan, WanSizes
from comfyui_qvg.qvg.models.wan_vae import WanVAE
from comfyui_qvg.qvg.models.worldplay_wan import WorldWan, WorldWanSizes
from comfyui_qvg.qvg.settings import PRESETS, QVGSettings
from comfyui_qvg.qvg.video import Run

WAN = WanSizes(dim=256, ffn_dim=64, layers=2, text_dim=32)
LONGCAT = LongCatSizes(dim=64, head_dim=32, ffn_dim=64, layers=2, text_dim=32, time_dim=16, freq_dim=16)
SMALL = ["--width", "64", "--height", "48", "--device", "cpu"]


def drawn(module, seed=0):
    """Its state dict with random weights, of a size at which layers keep the size of their input."""
    draw, state = torch.Generator().manual_seed(seed), {}
    for name, tensor in module.state_dict().items():
        noise = torch.randn(tensor.shape, generator=draw)
        state[name] = noise / tensor[0].numel() ** 0.5 if tensor.ndim > 1 else 0.1 * noise + ("norm" in name and "weight" in name)
    return state


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with checkpoints of two families, a VAE, and text embeddings."""
    folder = tmp_path_factory.mktemp("own")
    torch.save({"generator_ema": drawn(CausalWan(WAN))}, folder / "wan.pt")
    save_file(drawn(LongCat(LONGCAT)), folder / "longcat.safetensors")
    save_file(drawn(WanVAE(8)), folder / "vae.safetensors")
    draw = torch.Generator().manual_seed(1)
    positive, negative = (torch.randn(count, 6, 32, generator=draw) for count in (2, 1))
    save_file({"positive": positive, "negative": negative}, folder / "both.safetensors")
    save_file({"positive": positive[0].bfloat16()}, folder / "one.safetensors")
    return folder


def run(files, out, *options, checkpoint="wan.pt", embeddings="one.safetensors"):
    return main(["bench", "quality", "--checkpoint", str(files / checkpoint), "--embeddings", str(files / embeddings), *SMALL, "--out",
                 str(out), *options])


def report(out):
    assert (out / "quality-checkpoint.md").read_text().count("|") > 40
    assert Image.open(out / "quality-checkpoint.png").size == (1100, 720)
    return json.loads((out / "quality-checkpoint.json").read_text())


def test_a_causal_checkpoint(files, tmp_path):
    """Two prompts, guidance, decoded frames, two presets."""
    assert run(files, tmp_path, "--frames", "11", "--cfg", "2", "--vae", str(files / "vae.safetensors"), "--only", "Balanced", "paper",
               embeddings="both.safetensors") == 0
    found = report(tmp_path)
    digest = hashlib.sha256((files / "wan.pt").read_bytes()).hexdigest()
    assert found["checkpoint"] == {"files": [{"file": "wan.pt", "sha256": digest}], "family": "wan", "layers": 2, "heads": 2,
                                   "head_dim": 128, "parameters": found["checkpoint"]["parameters"], "dtype": "float32"}
    assert {"device", "torch", "triton", "python", "command", "date"} == set(found["environment"])
    assert (found["videos"], found["frames"], found["chunks"], found["cfg"]) == (2, 11, [3, 3, 3, 2], 2)
    assert found["vae"][0]["file"] == "vae.safetensors" and found["embeddings"][0]["file"] == "both.safetensors"
    rows = {row["method"]: row for row in found["rows"]}
    assert list(rows) == ["exact again", "1e-3 noise", "balanced", "paper"]
    for row in rows.values():
        for kind in ("latent_db", "psnr", "ssim"):
            assert [len(row[kind][part]) for part in ("first", "later", "last_quarter", "frames")] == [2] * 4
            assert {len(frames) for frames in row[kind]["frames"]} == {11}
            assert row[kind]["later"][0] == pytest.approx(sum(row[kind]["frames"][0][6:]) / 5)
        assert row["seconds_a_chunk"] > 0 and row["peak_bytes"] > row["stored_bytes"] > 0 and row["attention"].startswith("exact (")
    # of two caches, one for each prompt of the guidance
    assert rows["exact again"]["stored_bytes"] == 2 * 2 * 2 * 11 * 12 * 256 * 4
    assert min(rows["exact again"]["latent_db"]["later"]) > 110 and rows["exact again"]["ssim"]["later"] == pytest.approx([1, 1])
    order = [rows[name]["latent_db"]["first"][0] for name in ("exact again", "1e-3 noise", "balanced", "paper")]
    assert order == sorted(order, reverse=True)
    assert QVGSettings.from_json(json.dumps(rows["balanced"]["settings"])) == PRESETS["balanced"]


def test_a_model_that_walks_is_refused(files, tmp_path, capsys):
    sizes = WorldWanSizes(dim=128, ffn_dim=32, layers=1, text_dim=32)
    save_file(drawn(WorldWan(sizes)), tmp_path / "world.safetensors")
    assert run(files, tmp_path / "out", checkpoint=tmp_path / "world.safetensors") == 2
    assert "world.safetensors is HY-WorldPlay 5B, which walks along a camera path" in capsys.readouterr().err



@pytest.mark.parametrize("guided", [False, True])
def test_a_checkpoint_that_makes_segments(files, tmp_path, guided):
    options = ["--chunk-frames", "3", "--given", "2", "--frames", "11", "--sigmas", "1", "0.8", "0.5", "0", "--only", "smallest"]
    embeddings = "both.safetensors" if guided else "one.safetensors"
    assert run(files, tmp_path, *options, checkpoint="longcat.safetensors", embeddings=embeddings) == 0
    found = report(tmp_path)
    assert (found["chunks"], found["given"], found["cfg"]) == ([5, 3, 3], 2, 4 if guided else 1)
    rows = {row["method"]: row for row in found["rows"]}
    assert rows["exact again"]["stored_bytes"] == 2 * 2 * 2 * 12 * 64 * 4
    for row in rows.values():
        assert row["latent_db"]["frames"][0][:5] == rows["exact again"]["latent_db"]["frames"][0][:5], "the first has no history"
    order = [row["latent_db"]["first"][0] for row in rows.values()]
    assert order == sorted(order, reverse=True) and order[-1] < 80


def test_all_presets_are_measured(files, tmp_path):
    """So a preset of a later release appears by itself."""
    assert run(files, tmp_path, "--frames", "3", "--chunk-frames", "1") == 0
    assert [row["method"] for row in report(tmp_path)["rows"]][2:] == [name for name in PRESETS if name != "off"]


def test_nothing_is_replaced(files, tmp_path, capsys):
    (tmp_path / "quality-checkpoint.png").write_bytes(b"mine")
    assert run(files, tmp_path) == 2
    assert "quality-checkpoint.png already exists. Choose another --out, or --overwrite" in capsys.readouterr().err
    assert (tmp_path / "quality-checkpoint.png").read_bytes() == b"mine" and len(list(tmp_path.iterdir())) == 1


EMBEDDINGS = {
    "missing": ({"prompt": torch.zeros(4, 32)}, "has no tensor 'positive'; it holds ['prompt']"),
    "width": ({"positive": torch.zeros(4, 33)}, "of shape [4, 33], but this model takes text embeddings [prompts, tokens, 32]"),
    "axes": ({"positive": torch.zeros(32)}, "of shape [32], but this model"),
    "whole": ({"positive": torch.zeros(4, 32, dtype=torch.int64)}, "as int64"),
    "empty": ({"positive": torch.zeros(0, 4, 32)}, "of shape [0, 4, 32]"),
    "nan": ({"positive": torch.full((4, 32), torch.nan)}, "not finite"),
    "negatives": ({"positive": torch.zeros(4, 32), "negative": torch.zeros(2, 4, 32)}, "2 embeddings in 'negative'"),
}


@pytest.mark.parametrize("case", EMBEDDINGS)
def test_embeddings_that_do_not_fit(files, tmp_path, capsys, case):
    content, sentence = EMBEDDINGS[case]
    save_file(content, tmp_path / "bad.safetensors")
    assert run(files, tmp_path / "out", embeddings=tmp_path / "bad.safetensors") == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(("options", "sentence"), [
    (["--frames", "5"], "are chunks of 3, 2: too few, as the first reads no history"),
    (["--only", "tinyest"], "There is no preset 'tinyest'; choose one of off, "),
    (["--given", "2"], "goes on chunk by chunk. Leave it out"),
    (["--cfg", "3"], "needs a negative prompt: save one as 'negative' in one.safetensors"),
    (["--sigmas", "1", "0.5"], "end at 0.5; a chunk is finished at 0"),
    (["--sigmas", "0.5", "1", "0"], "that fall from at most"),
    (["--width", "72"], "72 x 48 pixels do not divide into tokens of 16 x 16"),
    (["--vae", "wan.pt"], "This is not a Wan 2.1 VAE state dict"),
    (["--vae", "nothing.pth"], "nothing.pth"),
])
def test_what_cannot_be_measured(files, tmp_path, capsys, monkeypatch, options, sentence):
    monkeypatch.chdir(files)
    assert run(files, tmp_path / "out", *options) == 2
    said = capsys.readouterr().err
    assert sentence in said and "Traceback" not in said
    assert not list(tmp_path.glob("out/*"))


def test_packed_weights_are_sent_to_comfyui(files, tmp_path, capsys):
    state = drawn(CausalWan(WAN))
    save_file(state | {"blocks.0.self_attn.q.scale_weight": torch.ones(1)}, tmp_path / "scaled.safetensors")
    assert run(files, tmp_path / "out", checkpoint=tmp_path / "scaled.safetensors") == 2
    assert "scaled" in capsys.readouterr().err


def test_all_parts_of_a_checkpoint_are_hashed(tmp_path):
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name in names:
        (tmp_path / name).write_text(name)
    assert files_of(tmp_path / names[1]) == [{"file": name, "sha256": hashlib.sha256(name.encode()).hexdigest()} for name in names]


def test_a_model_that_makes_no_video(files, tmp_path, capsys):
    state = drawn(CausalWan(WAN))
    state["head.head.bias"][0] = torch.nan
    save_file(state, tmp_path / "nan.safetensors")
    assert run(files, tmp_path / "out", "--frames", "3", "--chunk-frames", "1", checkpoint=tmp_path / "nan.safetensors") == 2
    assert "exact cache is not finite" in capsys.readouterr().err


def test_windows_of_a_video():
    windows = Windows.of([1, 3, 3, 3])
    assert windows == Windows(slice(1, 4), slice(4, 10), slice(8, 10))
    assert Windows.of([1, 1, 1]).last_quarter == slice(2, 3)


@pytest.fixture(scope="module")
def loop():
    network = CausalWan.from_state_dict(drawn(CausalWan(WAN)))
    with torch.no_grad():
        context = network.project_context(torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(1)))
    return CausalLoop(network, context, Run(frames=6, chunk_frames=2, sigmas=(1, 0.5, 0)), (1, 16, 6, 8))


def test_noise_is_small_and_repeats(loop):
    videos = [loop.make(settings).latents for settings in (PRESETS["off"], NOISY, NOISY)]
    assert torch.equal(videos[1], videos[2])
    error = (videos[0] - videos[1])[:, :, 2:].std() / videos[0].std()
    assert 1e-6 < error < 1e-2 and torch.equal(videos[0][:, :, :2], videos[1][:, :, :2])


def test_it_can_be_stopped_and_caches_are_freed(loop):
    """Progress counts every pass; what it raises ends the run. Nothing is held but the exact latents."""
    seen, caches = [], []
    list(measure([loop], {"balanced": PRESETS["balanced"]}, progress=lambda *now: seen.append(now)))
    assert [now[0] for now in seen] == [name for name in ("exact", "exact again", "1e-3 noise", "balanced") for _ in range(9)]
    assert [now[1:] for now in seen[:9]] == [(done, 9) for done in range(1, 10)]

    def stop(done, of_all):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.make(PRESETS["balanced"], stop, caches.append)
    assert [layer.entries for layer in caches[0].layers] == [[], []]


def test_a_method_without_memory_leaves_the_others(loop, monkeypatch):
    make = CausalLoop.make

    def refuse(self, settings, *more):
        if settings.name == "balanced":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nmore")
        return make(self, settings, *more)

    monkeypatch.setattr(CausalLoop, "make", refuse)
    rows = list(measure([loop], {name: PRESETS[name] for name in ("balanced", "smallest")}))
    assert rows[2]["error"] == "not enough memory (CUDA out of memory. Tried to allocate 9 GiB)" and "latent_db" in rows[3]


def test_rows_are_kept_when_it_is_stopped(files, tmp_path, monkeypatch):
    make = CausalLoop.make

    def stop(self, settings, *more):
        if settings.name == "smallest":
            raise KeyboardInterrupt
        return make(self, settings, *more)

    monkeypatch.setattr(CausalLoop, "make", stop)
    assert run(files, tmp_path, "--frames", "3", "--chunk-frames", "1") == 130
    assert [row["method"] for row in report(tmp_path)["rows"]] == ["exact again", "1e-3 noise", "quality", "balanced"]
