"""`qvg generate --checkpoint`: tiny random checkpoints in released layouts, by one process and by two."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from several_gpus import DEVICES
from test_command import code_of, frames
from test_measure import LONGCAT, WAN, drawn

from comfyui_qvg.qvg.models.longcat import LongCat
from comfyui_qvg.qvg.models.wan import CausalWan
from comfyui_qvg.qvg.models.wan_vae import WanVAE
from comfyui_qvg.qvg.models.worldplay_wan import WorldWan, WorldWanSizes
from comfyui_qvg.qvg.video import segments

TOGETHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "comfyui_qvg"]
SHAPE = ("--width", "64", "--height", "48")
SIZE = (*SHAPE, "--device", "cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    torch.save({"generator_ema": drawn(CausalWan(WAN))}, folder / "wan.pt")
    torch.save({"generator_ema": drawn(CausalWan(WAN), seed=5)}, folder / "other.pt")
    save_file(drawn(LongCat(LONGCAT)), folder / "longcat.safetensors")
    save_file(drawn(WanVAE(8)), folder / "vae.safetensors")
    draw = torch.Generator().manual_seed(1)
    positive, negative = (torch.randn(count, 6, 32, generator=draw) for count in (2, 1))
    save_file({"positive": positive, "negative": negative}, folder / "both.safetensors")
    save_file({"positive": positive[0]}, folder / "one.safetensors")
    return folder


def options(files, checkpoint="wan.pt", embeddings="both.safetensors", vae="vae.safetensors"):
    return ["--checkpoint", str(files / checkpoint), "--vae", str(files / vae), "--embeddings", str(files / embeddings)]


WAYS = {"wan.pt": ["--seconds", "0.5", "--prompt", "0s: 1\n0.3s: 2", "--cfg", "2"],
        "longcat.safetensors": ["--seconds", "1.7", "--given", "2", "--chunk-frames", "2", "--sigmas", "1", "0.5", "0"]}


@pytest.mark.parametrize("checkpoint", WAYS)
def test_a_video_of_a_checkpoint_is_made_and_continued(files, checkpoint, tmp_path):
    """In two parts, and the same in one."""
    code, own = 0, options(files, checkpoint)
    for out, seconds in (("parts.png", WAYS[checkpoint][1]), ("whole.png", "2.5")):
        way = ["--seconds", seconds, *WAYS[checkpoint][2:]]
        code |= code_of("generate", *own, *SIZE, *way, "--save-every", "1", "--out", tmp_path / out)
    assert code_of("generate", *own, "--device", "cpu", "--resume", "--seconds", "2.5", "--out", tmp_path / "parts.png") == code == 0
    parts, whole = (sorted(tmp_path.glob(f"{name}_*.png")) for name in ("parts", "whole"))
    assert len(parts) == len(whole) >= 37
    assert all(one.read_bytes() == other.read_bytes() for one, other in zip(parts, whole))


def test_a_video_that_a_checkpoint_continues(files, tmp_path):
    """Its first frames are those given, through the VAE, and the rest continues them."""
    first, then = tmp_path / "first.mp4", tmp_path / "then.mp4"
    way = [*SIZE, "--given", "2", "--chunk-frames", "2", "--sigmas", "1", "0.5", "0", "--cfg", "1"]
    assert code_of("generate", *options(files, "longcat.safetensors"), *way, "--seconds", "1", "--out", first) == 0
    assert code_of("generate", *options(files, "longcat.safetensors"), *way, "--seconds", "2", "--out", then, "--start", first) == 0
    made = segments.load(f"{then}.session.safetensors")
    assert made.made.given_frames == 5 and made.extra["run"]["chunk_frames"] == 2 and made.made.new[1:] == [2]
    assert len(frames(first)) == 17 and len(frames(then)) == 33


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("checkpoint", WAYS)
def test_two_processes_make_and_continue_it(files, checkpoint, device, tmp_path):
    """The sizes of the videos and of their sessions; how near latents are is what test_ranks and test_ranks_segments compare."""
    own = [*options(files, checkpoint), "--device", device]

    def together(*more):
        made = subprocess.run([*TOGETHER, "generate", *own, *more, "--out", tmp_path / "two.mp4"], capture_output=True, text=True,
                              timeout=600)
        assert made.returncode == 0, made.stderr

    together(*SHAPE, *WAYS[checkpoint])
    begun = segments.load(tmp_path / "two.mp4.session.safetensors").frames_done
    assert code_of("generate", *own, "--resume", "--seconds", "2.2", "--out", tmp_path / "two.mp4") == 0
    then = segments.load(tmp_path / "two.mp4.session.safetensors").frames_done
    together("--resume", "--seconds", "2.7")
    done = segments.load(tmp_path / "two.mp4.session.safetensors").frames_done
    assert begun < then < done and len(frames(tmp_path / "two.mp4")) == 4 * done - 3


def test_heads_that_processes_do_not_divide_are_refused_once(files, tmp_path):
    three = [*TOGETHER[:5], "3", *TOGETHER[6:]]
    made = subprocess.run([*three, "generate", *options(files), *SIZE, "--out", tmp_path / "a.mp4"], capture_output=True,
                          text=True, timeout=600)
    assert made.returncode != 0 and made.stderr.count("qvg: 3 ranks do not divide the 2 heads of this model; use 1, 2.") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found in /proc")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("checkpoint", WAYS)
def test_a_process_that_is_killed_ends_the_video_with_a_sentence(files, checkpoint, device, tmp_path):
    own = [*options(files, checkpoint), "--device", device]
    out, place = tmp_path / "a.mp4", tmp_path / "a.mp4.session.safetensors"
    more = ["--cfg", "2"] if checkpoint == "wan.pt" else WAYS[checkpoint][2:]
    run = subprocess.Popen([*TOGETHER, "generate", *own, *SHAPE, *more, "--seconds", "3000", "--save-every", "1", "--out", out],
                           stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 600
    while not place.exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(second_of(run.pid), signal.SIGKILL)
    said = run.communicate(timeout=600)[1]
    assert run.returncode != 0 and "qvg: Another rank of this video ended (" in said, said
    assert "start all ranks again." in said
    done = segments.load(place).frames_done
    seconds = (4 * done + 4) / (16 if checkpoint == "wan.pt" else 15)
    assert code_of("generate", *own, "--resume", "--seconds", seconds, "--out", out) == 0
    assert len(frames(out)) > 4 * done - 3


def second_of(parent: int) -> int:
    """The second rank of a torchrun."""
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"PPid:\t{parent}\n" in (place / "status").read_text() and b"\0RANK=1\0" in (place / "environ").read_bytes():
                return int(place.name)
    raise AssertionError("there is no second rank")


def test_what_does_not_belong_together_is_refused(files, tmp_path, capsys):
    """Before anything is written."""
    def refused(*given, way=("--prompt", "1")) -> str:
        assert code_of("generate", *given, *way, "--device", "cpu", "--out", tmp_path / "a.mp4") == 2
        assert not list(tmp_path.iterdir())
        return capsys.readouterr().err

    own = options(files)
    assert "belong together, but there is no --embeddings. Give all three" in refused(*own[:4])
    assert "There is no file" in refused(*options(files, "gone.pt")) and "Give the --vae file" in refused(*options(files, vae="gone.pth"))
    assert "--given is for models that make segments" in refused(*own, "--given", "2")
    assert "--window is for models that keep a history; LongCat-Video" in refused(*options(files, "longcat.safetensors"), "--window", "3")
    assert "The prompt '3' is not the number of an embedding: both.safetensors holds 2" in refused(*own, way=("--prompt", "3"))
    assert "The prompt 'a cat' is not the number" in refused(*own, way=("--prompt", "a cat"))
    assert "--cfg 3 needs a negative prompt" in refused(*options(files, embeddings="one.safetensors"), "--cfg", "3")
    assert "--negative is text, but" in refused(*own, "--negative", "blur")
    assert "do not divide into tokens of 16 x 16" in refused(*own, "--width", "60")
    assert "vae.safetensors" in refused(*options(files, "vae.safetensors"))
    assert "wan.pt" in refused(*options(files, vae="wan.pt"), *SIZE)
    save_file(drawn(WorldWan(WorldWanSizes(dim=128, ffn_dim=64, layers=1, text_dim=32, channels=16))), files / "world.safetensors")
    assert "both.safetensors has no tensor 'start', with which a walk begins" in refused(*options(files, "world.safetensors"))
    assert "--width is for a --checkpoint" in refused("--width", "64")
    assert "--checkpoint 2 and --save-every 3 say the same twice" in refused("--checkpoint", "2", "--save-every", "3")


def test_a_session_of_other_weights_is_refused(files, tmp_path, capsys):
    out = tmp_path / "a.mp4"
    assert code_of("generate", *options(files), *SIZE, *WAYS["wan.pt"], "--out", out) == 0
    for other in ("other.pt", "longcat.safetensors"):
        assert code_of("generate", *options(files, other), "--device", "cpu", "--resume", "--seconds", "1", "--out", out) == 2
        assert f"was made with other weights than those of {other}. Give the --checkpoint that made it" in capsys.readouterr().err
    assert code_of("generate", *options(files), "--device", "cpu", "--resume", "--chunk-frames", "2", "--out", out) == 2
    assert "was made with --chunk-frames 3, which cannot become 2 now" in capsys.readouterr().err
