"""`qvg generate --checkpoint` with HY-WorldPlay: walks of tiny random networks in both layouts, by one process and by two."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from several_gpus import DEVICES
from test_command import code_of, frames
from test_generate_checkpoint import second_of
from test_measure import LONGCAT, WAN, drawn

from comfyui_qvg.qvg.measure.inputs import open_network
from comfyui_qvg.qvg.models.hunyuan_layers import HunyuanSizes
from comfyui_qvg.qvg.models.latent_scale import to_network, to_vae
from comfyui_qvg.qvg.models.longcat import LongCat
from comfyui_qvg.qvg.models.wan import CausalWan
from comfyui_qvg.qvg.models.wan_vae import WanVAE
from comfyui_qvg.qvg.models.worldplay_hunyuan import WorldPlayHunyuan
from comfyui_qvg.qvg.models.worldplay_wan import WorldWan, WorldWanSizes
from comfyui_qvg.qvg.settings import PRESETS
from comfyui_qvg.qvg.video import ChunkDone, Run, Sampler, walk_session
from comfyui_qvg.qvg.video import session as storage
from comfyui_qvg.qvg.video.camera_file import write_poses
from comfyui_qvg.qvg.video.camera_moves import walk
from comfyui_qvg.qvg.video.walk_job import KINDS, WalkInputs, WalkJob, WalkText
from comfyui_qvg.qvg.video.walk_model import walk_of

TOGETHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "comfyui_qvg"]
ALONE = [sys.executable, "-m", "comfyui_qvg"]
# where rounding decides a bit of a quantized key, and how that grows in four chunks
FLIPS, APART = 2e-2, 1e-3
SIZES_5B = WorldWanSizes(dim=256, ffn_dim=64, layers=2, text_dim=32)
SIZES_8B = HunyuanSizes(dim=256, head_dim=128, ffn_dim=64, layers=2, text_dim=32, glyph_dim=16, glyph_hidden=16, image_dim=24)
SHAPE = {"5b": (48, 8, 12), "8b": (32, 4, 6), "16": (16, 8, 12)}
MOVES = "w-4, right-5"


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("walks")
    save_file(drawn(WorldWan(SIZES_5B)), folder / "5b.safetensors")
    save_file(drawn(WorldPlayHunyuan(SIZES_8B)), folder / "8b.safetensors")
    save_file(drawn(WorldWan(replace(SIZES_5B, channels=16))), folder / "16.safetensors")
    save_file(drawn(WanVAE(8)), folder / "vae.safetensors")
    torch.save({"generator_ema": drawn(CausalWan(WAN))}, folder / "wan.pt")
    save_file(drawn(LongCat(LONGCAT)), folder / "longcat.safetensors")
    for name in SHAPE:
        save_file(inputs_of(name), folder / f"{name}.embeddings")
    return folder


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    channels, *size = SHAPE[name]
    found = {"positive": randn(2, 6, 32, seed=1), "negative": randn(1, 6, 32, seed=2), "start": randn(1, channels, 1, *size, seed=3)}
    if name == "8b":
        found |= {"positive_byt5": randn(2, 3, 16, seed=4), "positive_byt5_mask": torch.tensor([[1, 1, 0], [0, 0, 0]]),
                  "positive_mask": torch.tensor([[1] * 6, [1] * 5 + [0]]), "vision": randn(1, 4, 24, seed=5)}
    return found


def options(files, name, embeddings=None, device="cpu"):
    return ["--checkpoint", str(files / f"{name}.safetensors"), "--embeddings", str(embeddings or files / f"{name}.embeddings"),
            "--device", device]


def latents(path) -> torch.Tensor:
    """As Load Latent reads them."""
    held = load_file(path)
    assert held.keys() == {"latent_tensor", "latent_format_version_0"} and held["latent_format_version_0"].numel() == 0
    return held["latent_tensor"]


def expected(network, name, memory, settings, prompt, cfg, sigmas) -> torch.Tensor:
    """The same walk by the library."""
    held = inputs_of(name)
    row = slice(prompt - 1, prompt)
    text = WalkText(held["positive"][row])
    if name == "8b":
        glyphs = (held["positive_byt5"][row], held["positive_byt5_mask"][row]) if prompt == 1 else (None, None)
        text = WalkText(held["positive"][row], held["positive_mask"][row], *glyphs)
    path = walk(MOVES).resized(12)
    family = f"hy-worldplay-{name}"
    job = WalkJob(Path("a"), Path("b"), family, path, Run(frames=len(path), chunk_frames=4, sigmas=sigmas, solver="euler"), settings,
                  SHAPE[name][1:], memory, 16, cfg=cfg)
    made = walk_of(network, WalkInputs(held["start"], (text,), WalkText(held["negative"]), held.get("vision")), job)
    events = Sampler(made, job.run, (1, *SHAPE[name]))
    return to_vae(torch.cat([event.latents for event in events if isinstance(event, ChunkDone)], 2))


@pytest.mark.parametrize(("name", "memory", "more"), [
    ("5b", "rebuild", ("--prompt", "2")), ("5b", "append", ("--window", "4", "--preset", "off")),
    ("5b", "bank", ("--cfg", "2", "--steps", "3")), ("8b", "rebuild", ("--prompt", "2", "--seed", "0", "--offload")),
    ("8b", "append", ("--cfg", "3", "--sigmas", "1", "0.5", "0")), ("8b", "bank", ("--budget", "0.5"))])
def test_a_walk_is_that_of_the_library(files, name, memory, more, tmp_path):
    out, given = tmp_path / "walk.latent", dict(zip(more[::2], more[1::2]))
    assert code_of("generate", *options(files, name), "--camera", MOVES, "--memory", memory, *more, "--out", out) == 0
    cfg, sampling = float(given.get("--cfg", 1)), KINDS[f"hy-worldplay-{name}"].sampling
    sigmas = (1.0, 0.5, 0.0) if "--sigmas" in more else sampling.levels(int(given.get("--steps", 4)), distilled=cfg == 1)
    settings = replace(PRESETS[given.get("--preset", "balanced")], window_frames=int(given.get("--window", 0)),
                       budget_gib=float(given.get("--budget", 0)))
    made = latents(out)
    assert made.shape == (1, SHAPE[name][0], 12, *SHAPE[name][1:])
    # of the same file, because weights at another place in memory round otherwise
    network, _, _ = open_network(files / f"{name}.safetensors", "cpu", walks=True)
    assert torch.equal(made, expected(network, name, memory, settings, int(given.get("--prompt", 1)), cfg, sigmas))
    if name == "5b":
        assert torch.allclose(made[:, :, :1], inputs_of(name)["start"], atol=1e-5)


def test_latents_are_scaled_and_back():
    for channels in (16, 32, 48):
        x = randn(1, channels, 2, 3, 4)
        assert torch.allclose(to_network(to_vae(x)), x, atol=1e-5)
    with pytest.raises(ValueError, match="7 channels are those of no known VAE"):
        to_vae(randn(1, 7, 1, 1, 1))


@pytest.mark.parametrize(("name", "memory"), [("5b", "bank"), ("8b", "rebuild")])
def test_a_walk_is_made_in_parts_and_in_one(files, name, memory, tmp_path):
    own, moves = options(files, name), "right-7, left-4"
    assert code_of("generate", *own, "--memory", memory, "--camera", f"{moves}, still-4", "--out", tmp_path / "whole.latent") == 0
    assert code_of("generate", *own, "--memory", memory, "--camera", moves, "--save-every", "1", "--out", tmp_path / "parts.latent") == 0
    assert latents(tmp_path / "parts.latent").shape[2] == 12
    # what was planned is done, so that nothing changes
    assert code_of("generate", *own, "--resume", "--out", tmp_path / "parts.latent") == 0
    assert latents(tmp_path / "parts.latent").shape[2] == 12
    assert code_of("generate", *own, "--resume", "--camera", f"{moves}, still-4", "--out", tmp_path / "parts.latent") == 0
    assert torch.equal(latents(tmp_path / "parts.latent"), latents(tmp_path / "whole.latent"))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{name}.latent{end}" for name in ("parts", "whole") for end in ("", ".session.safetensors"))


def test_a_walk_of_16_channels_is_a_video_through_the_vae(files, tmp_path):
    out, poses = tmp_path / "walk.mp4", tmp_path / "poses.json"
    write_poses(walk("w-3"), poses)
    own = [*options(files, "16"), "--vae", str(files / "vae.safetensors")]
    assert code_of("generate", *own, "--camera", poses, "--out", out) == 0
    assert frames(out).shape[:3] == (13, 64, 96)
    write_poses(walk("w-7"), poses)
    assert code_of("generate", *own, "--resume", "--camera", poses, "--out", out) == 0
    assert len(frames(out)) == 29
    # a session of pictures is none of latents
    code = code_of("generate", *own, "--resume", "--session", f"{out}.session.safetensors", "--out", tmp_path / "walk.latent")
    assert code == 2 and not (tmp_path / "walk.latent").exists()


@pytest.mark.parametrize(("checkpoint", "way", "done", "then"), [
    ("wan.pt", (), 3, 5), ("longcat.safetensors", ("--given", "2", "--chunk-frames", "2", "--sigmas", "1", "0.5", "0"), 4, 6)])
def test_latents_of_other_models(files, checkpoint, way, done, then, tmp_path, capsys):
    """In two parts, without a VAE."""
    own = ["--checkpoint", str(files / checkpoint), "--embeddings", str(files / "16.embeddings"), "--device", "cpu"]
    size = ("--width", "64", "--height", "48", "--seconds", (4 * done - 3) / 16, "--cfg", "1")
    assert code_of("generate", *own, *size, *way, "--save-every", "1", "--out", tmp_path / "a.latent") == 0
    before = latents(tmp_path / "a.latent")
    assert code_of("generate", *own, "--resume", "--seconds", (4 * then - 3) / 16, "--out", tmp_path / "a.latent") == 0
    after = latents(tmp_path / "a.latent")
    assert before.shape[2] == done and after.shape == (1, 16, then, 6, 8) and torch.equal(after[:, :, :done], before)
    capsys.readouterr()
    assert code_of("generate", *own, *size, *way, "--start", files / "vae.safetensors", "--out", tmp_path / "b.latent") == 2
    assert "--start is read through the model's VAE, but there is no --vae. Give it, or leave out --start." in capsys.readouterr().err
    with open(tmp_path / "a.latent", "rb+") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")
    assert code_of("generate", *own, "--resume", "--seconds", "1.5", "--out", tmp_path / "a.latent") == 2


def ran(start, *arguments) -> str:
    # torchrun gives every process one thread, and another number of threads sums in another order
    made = subprocess.run([*start, "generate", *map(str, arguments)], capture_output=True, text=True, timeout=600,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert made.returncode == 0, made.stderr
    return made.stderr


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "memory", "more"), [("5b", "bank", ()), ("8b", "rebuild", ("--cfg", "2", "--steps", "2"))])
def test_two_processes_make_the_walk_of_one_and_continue_it(files, name, memory, more, device, tmp_path):
    own, way = options(files, name, device=device), ("--memory", memory, "--camera", "w-3, right-4", *more)
    for start, out in ((ALONE, "one.latent"), (TOGETHER, "two.latent")):
        said = ran(start, *own, *way, "--out", tmp_path / out)
        assert said.count("which excludes the European Union") == 1
    near(*(latents(tmp_path / f"{out}.latent") for out in ("one", "two")))
    loaded = walk_session.load(tmp_path / "two.latent.session.safetensors")
    assert (loaded.frames_done, loaded.geometry[0].heads, loaded.memory) == (8, 2, memory)
    for start, out in ((TOGETHER, "one.latent"), (ALONE, "two.latent")):
        ran(start, *own, "--resume", "--camera", "w-3, right-4, w-4", "--out", tmp_path / out)
    one, two = (latents(tmp_path / f"{out}.latent") for out in ("one", "two"))
    assert one.shape[2] == 12
    near(one, two)


def near(one: torch.Tensor, two: torch.Tensor) -> None:
    assert one.shape == two.shape
    assert (one - two)[:, :, :4].abs().max() < FLIPS
    assert (one - two).square().mean() < APART * one.var()


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found in /proc")
@pytest.mark.parametrize("device", DEVICES)
def test_a_killed_process_and_ctrl_c_leave_a_whole_session(files, device, tmp_path):
    own, moves = options(files, "8b", device=device), "right-20, left-20, " * 20 + "still-3"
    out, place = tmp_path / "a.latent", tmp_path / "a.latent.session.safetensors"

    def started(*more):
        before = place.stat().st_mtime_ns if place.exists() else 0
        way = ("--memory", "bank", "--camera", moves, "--save-every", "1", "--out", out)
        run = subprocess.Popen([*TOGETHER, "generate", *own, *way, *more],
                               stderr=subprocess.PIPE, text=True, start_new_session=True)
        deadline = time.monotonic() + 600
        while (not place.exists() or place.stat().st_mtime_ns == before) and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        return run

    run = started()
    os.kill(second_of(run.pid), signal.SIGKILL)
    said = run.communicate(timeout=600)[1]
    assert run.returncode != 0 and "qvg: Another rank of this video ended (" in said, said
    first = walk_session.load(place)
    assert 0 < first.frames_done < first.run.frames == len(first.cameras) and latents(out).shape[2] >= first.frames_done
    run = started("--resume")
    os.killpg(run.pid, signal.SIGINT)
    run.communicate(timeout=600)
    then = walk_session.load(place)
    assert first.frames_done < then.frames_done < then.run.frames
    # as long as what is there and one chunk more
    shorter = tmp_path / "poses.json"
    write_poses(then.cameras[:then.frames_done + 4], shorter)
    assert code_of("generate", *own, "--resume", "--camera", shorter, "--out", out) == 0
    made = latents(out)
    assert made.shape[2] == then.frames_done + 4 and torch.equal(made[:, :, :then.frames_done], to_vae(then.latents))


def test_what_does_not_fit_a_walk_is_refused(files, tmp_path, capsys):
    """With one sentence, and before anything is written."""
    def refused(*more, name="5b", out="a.latent", camera=("--camera", "w-3"), embeddings=None) -> str:
        before = sorted(path.name for path in tmp_path.iterdir())
        assert code_of("generate", *options(files, name, embeddings), *camera, *more, "--out", tmp_path / out) == 2
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        return capsys.readouterr().err

    assert "HY-WorldPlay 5B walks along a camera path. Give --camera, such as" in refused(camera=())
    assert "'w' is no move" in refused(camera=("--camera", "w"))
    assert "has the key 'x'" in refused(camera=("--camera", "x-4"))
    assert "There is no file of poses gone.json" in refused(camera=("--camera", "gone.json"))
    (tmp_path / "bad.json").write_text(json.dumps({"0": 1}))
    assert "bad.json is no file of cameras" in refused(camera=("--camera", tmp_path / "bad.json"))
    for option, value, words in (
            ("--seconds", 3, "the camera path sets its length"), ("--width", 64, "sets its size"), ("--height", 64, "sets its size"),
            ("--start", tmp_path / "bad.json", "it begins with 'start'"), ("--chunk-frames", 4, "its chunks have 4 latent frames"),
            ("--given", 2, "not made in segments"), ("--position-limit", 9, "the memory sets"), ("--recache", 3, "it has one prompt")):
        said = refused(option, value)
        assert f"{option} is not for a walk: " in said and words in said
    assert "--window is for --memory append; rebuild chooses" in refused("--window", "4")
    assert "Leave one out" in refused("--steps", "4", "--sigmas", "1", "0")
    assert "--sigmas end at 0.5" in refused("--sigmas", "1", "0.5")
    assert "The prompt '3' is not the number of an embedding: 5b.embeddings holds 2" in refused("--prompt", "3")
    assert "a walk has one prompt" in refused("--prompt", "0s: 1\n2s: 2")
    assert "there is no --vae. Give all three, or none for the tiny model, or give --out a .latent file" in refused(out="a.mp4")
    vae = ("--vae", files / "vae.safetensors")
    assert "latents of 48 channels, for the VAE of Wan 2.2, which is not part of this pack" in refused(*vae, out="a.mp4")
    assert "latents of 32 channels, for the VAE of HunyuanVideo 1.5" in refused(*vae, out="a.mp4", name="8b")
    (tmp_path / "a.latent").write_bytes(b"mine")
    assert "a.latent already exists. Choose another --out" in refused()
    assert (tmp_path / "a.latent").read_bytes() == b"mine"
    wan = ["--checkpoint", files / "wan.pt", "--embeddings", files / "16.embeddings", "--device", "cpu", "--out", tmp_path / "b.latent"]
    assert code_of("generate", *wan, "--camera", "w-3") == 2
    assert "--camera is for HY-WorldPlay, which walks along a camera path; " in capsys.readouterr().err


@pytest.mark.parametrize(("name", "change", "words"), [
    ("5b", {"start": None}, "has no tensor 'start', with which a walk begins. Save the latents of the start image under that name, as "
                            "[1, 48, 1, height, width]."),
    ("5b", {"start": randn(1, 16, 1, 8, 12)}, "'start' as float32 of shape [1, 16, 1, 8, 12], but HY-WorldPlay 5B takes it as [1, 48, 1, "),
    ("5b", {"start": randn(1, 48, 1, 7, 12)}, "do not divide into tokens; make both multiples of 2"),
    ("5b", {"start": randn(1, 48, 1, 8, 12) / 0}, "values in 'start' that are not finite"),
    ("5b", {"positive": None}, "has no tensor 'positive'"),
    ("5b", {"positive": randn(1, 6, 31)}, "takes text embeddings [prompts, tokens, 32]"),
    ("5b", {"vision": randn(1, 4, 24)}, "holds 'vision', but HY-WorldPlay 5B takes positive, negative, start."),
    ("5b", {"negative": None}, "--cfg 2 needs a negative prompt"),
    ("8b", {"vision": randn(1, 4, 25)}, "'vision' as float32 of shape [1, 4, 25], but HY-WorldPlay 8B takes it as [1, tokens, 24]."),
    ("8b", {"positive_byt5": randn(1, 3, 16)}, "but HY-WorldPlay 8B takes it as [2, tokens, 16]."),
    ("8b", {"positive_byt5": None}, "a mask of tokens in 'positive_byt5', but has none."),
    ("8b", {"positive_mask": torch.ones(2, 5)}, "a mask of tokens in 'positive', but holds [2, 6] of them."),
    ("8b", {"positive_mask": torch.tensor([[1] * 6, [0] * 6])}, "a prompt in 'positive_mask' whose tokens are all padding")])
def test_wrong_inputs_of_a_walk_are_refused(files, name, change, words, tmp_path, capsys):
    held = {key: tensor for key, tensor in (inputs_of(name) | change).items() if tensor is not None}
    place = tmp_path / "wrong.embeddings"
    save_file(held, place)
    own = [*options(files, name, place), "--camera", "w-3", "--cfg", "2"]
    assert code_of("generate", *own, "--out", tmp_path / "a.latent") == 2
    said = capsys.readouterr().err
    assert words in said and said.count("qvg: ") == 1
    assert list(tmp_path.iterdir()) == [place]


def test_what_a_session_of_a_walk_fixes(files, tmp_path, capsys):
    own, out = options(files, "5b"), tmp_path / "a.latent"
    assert code_of("generate", *own, "--camera", "w-3, right-4", "--out", out) == 0
    save_file(inputs_of("5b") | {"start": randn(1, 48, 1, 8, 12, seed=9)}, tmp_path / "other.embeddings")
    other = options(files, "5b", tmp_path / "other.embeddings")
    before = out.read_bytes()
    for given, words in (
            ((*own, "--memory", "bank"), "was made with --memory rebuild, which cannot become bank now"),
            ((*own, "--steps", "5"), "was made with --steps 4"),
            ((*own, "--prompt", "2"), "was made with --prompt 1, and a walk has one prompt"),
            ((*own, "--camera", "w-2, right-9"), "The camera path does not begin with the 8 latent frames"),
            ((*own, "--camera", "w-3"), "holds 8 latent frames already, but the run is 4 long"),
            (other, "does not begin with 'start' in other.embeddings"),
            (options(files, "16"), "was made with other weights than those of 16.safetensors")):
        assert code_of("generate", *given, "--resume", "--out", out) == 2
        assert words in capsys.readouterr().err
        assert out.read_bytes() == before


def test_a_session_that_says_another_model_or_nothing_is_refused(files, tmp_path, capsys):
    """With the right checksum, and the right weights."""
    own, out, place = options(files, "5b"), tmp_path / "a.latent", tmp_path / "a.latent.session.safetensors"
    assert code_of("generate", *own, "--camera", "w-3", "--out", out) == 0
    with safe_open(place, "pt") as file:
        said, tensors = file.metadata()[storage.HEADER], {name: file.get_tensor(name) for name in file.keys()}
    for found, other, words in (("hy-worldplay-5b", "hy-worldplay-8b", "is not the session of a walk by HY-WorldPlay 5B"),
                                ('"video_frames"', '"others"', "was not saved by `qvg generate`")):
        assert found in said
        changed = said.replace(found, other)
        save_file(tensors, place, {storage.HEADER: changed, storage.DIGEST: hashlib.sha256(changed.encode()).hexdigest()})
        assert code_of("generate", *own, "--resume", "--out", out) == 2
        assert words in capsys.readouterr().err
