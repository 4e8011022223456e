"""The trained tiny model does what its words say, and the demo measures caches with it."""

import json
import sys

import av
import pytest
import torch
from PIL import Image

from comfyui_qvg.qvg.backends import before_launch, launches
from comfyui_qvg.qvg.cache.stats import CacheStats
from comfyui_qvg.qvg.commands.cli import main
from comfyui_qvg.qvg.commands.demo import RESULTS
from comfyui_qvg.qvg.commands.progress import bar
from comfyui_qvg.qvg.commands.results import prepare_folder
from comfyui_qvg.qvg.demo import NETWORK_PATH, VAE_PATH, load_tiny, run
from comfyui_qvg.qvg.demo.prompts import COLOURS, parse_prompt
from comfyui_qvg.qvg.demo.scenes import place, random_scene, render
from comfyui_qvg.qvg.video import Run

RUNS = {"bf16", "bf16-repeat", "bf16-noise", "balanced", "paper-int2", "quality", "smallest", "tiny"}


@pytest.fixture(scope="module")
def tiny():
    return load_tiny()


def psnr(a, b):
    return float(-10 * ((a.clamp(-1, 1) - b) / 2).square().mean().log10())


def test_weights_are_small():
    assert NETWORK_PATH.stat().st_size + VAE_PATH.stat().st_size <= 16_000_000


@torch.no_grad()
def test_autoencoder_keeps_unseen_clips(tiny):
    generator = torch.Generator().manual_seed(99)
    video = render(place([random_scene(generator)], generator), 41)
    latents = tiny[1].encode(video)
    assert psnr(torch.cat(list(tiny[1].decode_frames(latents)), dim=2), video) > 24


def centre(video, colour):
    """Mean row and column, in pixels, of what is within reach of a colour, and how many pixels that is; video uint8 [F, H, W, 3]."""
    near = (video.float() / 255 - torch.tensor(COLOURS[colour])).abs().amax(-1) < 0.3
    rows, columns = (torch.arange(size).float() for size in near.shape[1:])
    count = near.sum((1, 2)).clamp(min=1)
    return (near.sum(2) * rows).sum(1) / count, (near.sum(1) * columns).sum(1) / count, near.sum((1, 2))


@pytest.mark.parametrize("prompt, colour, axis, sign", [
    ("white plain circle moving down, over orange stripes panning right", "white", 0, 1),
    ("red plain circle moving right, over blue dots still", "red", 1, 1),
    ("green plain square moving left, over purple checks still", "green", 1, -1),
])
def test_things_have_their_colour_and_move_where_they_are_said_to(prompt, colour, axis, sign):
    parse_prompt(prompt)
    demo = run.Demo(prompt)
    video = demo.pictures(demo.make("off", Run(frames=6, seed=3)).latents)
    *place_of, count = centre(video, colour)
    assert count.min() > 300, "the thing is there in every frame"
    moved = float(place_of[axis][-1] - place_of[axis][0])
    assert sign * moved > 8, f"1.25 pixels a frame are 25 in 20 frames, and it moved {moved:.1f}"
    assert abs(float(place_of[1 - axis][-1] - place_of[1 - axis][0])) < 8


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    assert main(["demo", "--out", str(out), "--latent-frames", "9", "--seed", "5", "--compare", "--device", "cpu"]) == 0
    return out, json.loads((out / "report.json").read_text())


def test_demo_report(report):
    _, said = report
    runs = said["runs"]
    assert set(runs) == RUNS and said["frames"] == 33 and said["hardware"]
    assert runs["bf16-repeat"]["psnr"] == 100 and runs["bf16"]["ssim"] == pytest.approx(1)
    assert runs["bf16"]["bits_per_element"] == 16 and runs["bf16"]["stored_bytes"] == 4 * 6 * 9 * 96 * 256
    for name in ("balanced", "quality", "smallest", "tiny", "paper-int2"):
        assert runs[name]["stored_bytes"] < runs["bf16"]["stored_bytes"] < runs[name]["stored_bytes"] * runs[name]["stored_ratio"] * 1.001
        assert runs[name]["peak_bytes"] > runs[name]["stored_bytes"]
    assert runs["smallest"]["stored_bytes"] < runs["balanced"]["stored_bytes"] < runs["quality"]["stored_bytes"]
    # three chunks are too few to read a settled one
    assert all(figures["psnr_settled"] == figures["psnr"] for figures in runs.values())
    first = {name: figures["psnr_first_chunk"] for name, figures in runs.items()}
    assert first["quality"] > first["balanced"] > first["paper-int2"] + 6 and first["bf16-noise"] > first["paper-int2"]


def test_settled_windows_are_those_behind_sinks_and_recent_frames(monkeypatch):
    """Of five chunks the second reads sinks, the third reads recent frames, too, and the fourth and fifth read settled ones."""
    db = torch.cat([torch.full((9,), 90.0), *(torch.full((12,), value) for value in (80.0, 70.0, 60.0, 50.0))])
    monkeypatch.setattr(run.metrics, "psnr", lambda *_: db)
    monkeypatch.setattr(run.metrics, "ssim", lambda *_: db / 100)
    stats = CacheStats(15, 15, 1, 1, 1, 0, 1, 2, {}, (), {})
    found = run.figures("balanced", run.Made(torch.zeros(1), stats, [0.0]), torch.zeros(1), torch.zeros(1), 3)
    assert (found["psnr_first_chunk"], found["psnr_settled"], found["ssim_settled"]) == (80, 55, pytest.approx(0.55))


def test_demo_files(report):
    out, said = report
    for name in ("bf16.mp4", "qvg.mp4"):
        with av.open(str(out / name)) as file:
            frames = list(file.decode(video=0))
        assert len(frames) == said["frames"] and (frames[0].width, frames[0].height) == tuple(said["size"])
    with Image.open(out / "side_by_side.png") as picture:
        assert picture.width == run.MOMENTS * said["size"][0]
    assert {path.name for path in out.iterdir()} == {"bf16.mp4", "qvg.mp4", "side_by_side.png", "report.json"}


def test_demo_prints_its_tables(report, capsys):
    print(run.render(report[1]))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[4:4 + len(RUNS)]] == list(report[1]["runs"])


def test_the_progress_bar_tells_of_kernels_that_are_compiled(capsys, monkeypatch):
    """On a terminal in the bar, in a file on a line of its own; both end with the time."""
    for live in (True, False):
        monkeypatch.setattr(launches, "_launched", set())
        monkeypatch.setattr(sys.stderr, "isatty", lambda live=live: live)
        with bar("warm-up") as progress:
            before_launch("encode")
            progress.show(1, 2)
        before_launch("decode")
        said = capsys.readouterr().err
        assert "Compiling GPU kernels (first run): encode" in said and "decode" not in said
        assert ("1/2" in said) == live and said.splitlines()[-1].strip().startswith("warm-up") and said.endswith(" s\n")


def test_a_second_demo_replaces_the_first_only_when_asked_to(report, capsys, tmp_path):
    out, _ = report
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert main(["demo", "--out", str(out)]) == 2
    assert "bf16.mp4 already exists. Choose another --out, or --overwrite" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    prepare_folder(out, RESULTS, overwrite=True)
    prepare_folder(tmp_path / "new" / "one", RESULTS, overwrite=False)


@pytest.mark.parametrize("arguments, sentence", [
    (["--prompt", "a dragon over green dots"], "does not know 'dragon'"),
])
def test_demo_refuses(arguments, sentence, tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "new"), *arguments]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
