"""The `qvg` command: what is typed wrong is refused with a sentence and a code, and nothing that exists is lost."""

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from PIL import Image

from comfyui_qvg.qvg.backends import Backend, launches, register, remove
from comfyui_qvg.qvg.commands import generate as generate_command
from comfyui_qvg.qvg.commands.cli import main
from comfyui_qvg.qvg.demo import NETWORK_PATH, PROMPTS, VAE_PATH, embed_prompt, load_tiny
from comfyui_qvg.qvg.settings import PRESETS
from comfyui_qvg.qvg.video import session as storage
from comfyui_qvg.qvg.video.generate import generate
from comfyui_qvg.qvg.video.job import resumed

trained = pytest.mark.skipif(not (NETWORK_PATH.is_file() and VAE_PATH.is_file()), reason="the tiny model's weights are not here")
GENERATE = ("generate", "--prompt", PROMPTS[0], "--seconds", "0.5", "--device", "cpu", "--out")


def frames(path):
    with av.open(str(path)) as video:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])


def code_of(*arguments):
    """What the process would end with."""
    try:
        return main([*map(str, arguments)])
    except SystemExit as ended:
        return ended.code


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def there(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@trained
def test_a_video_is_made_and_resumed(tmp_path, capsys):
    out = tmp_path / "ball.mp4"
    assert code_of(*GENERATE, out) == 0
    assert len(frames(out)) == 9 and sorted(there(tmp_path)) == ["ball.mp4", "ball.mp4.session.safetensors"]
    before = there(tmp_path)
    capsys.readouterr()
    assert code_of(*GENERATE, out) == 2
    assert "ball.mp4 already exists. Choose another --out, --resume to continue it, or --overwrite" in capsys.readouterr().err
    assert there(tmp_path) == before
    # the same command, longer
    assert code_of("generate", "--prompt", PROMPTS[0], "--seed", "0", "--preset", "balanced", "--resume", "--seconds", "1", "--out", out,
                   "--device", "cpu") == 0
    assert len(frames(out)) == 17
    assert "latent frames, session in" in capsys.readouterr().err
    # what the session has decided cannot be something else
    for option, value in (("--seed", "3"), ("--preset", "off"), ("--window", "9"), ("--sink", "1"), ("--cfg", "2"), ("--budget", "1"),
                          ("--position-limit", "30"), ("--negative", "x")):
        assert code_of("generate", "--resume", "--out", out, option, value) == 2
        assert f"which cannot become {value} now. Leave out {option}" in capsys.readouterr().err.replace(".0 now", " now")
    # a shorter one is no resumption
    assert code_of("generate", "--resume", "--out", out, "--seconds", "0.3", "--device", "cpu") == 2
    assert "Ask for a longer video" in capsys.readouterr().err and len(frames(out)) == 17
    assert code_of(*GENERATE, out, "--overwrite") == 0
    assert len(frames(out)) == 9 and storage.load(tmp_path / "ball.mp4.session.safetensors").frames_done == 3


@trained
def test_attention_of_a_command(tmp_path, capsys):
    """Fast, by the option, is what the library makes, and the command says which and why; a resumed video may have another."""
    out = tmp_path / "fast.mp4"
    longer = [*GENERATE[:-1], "--seconds", "1.2", "--attention", "fast", "--out"]
    assert code_of(*longer, out) == 0
    assert "attention to the cache: fast (as set; in plain torch, which is slow: " in capsys.readouterr().err
    session = storage.load(tmp_path / "fast.mp4.session.safetensors")
    assert session.settings[0] == replace(PRESETS["balanced"], attention="fast")
    todo = replace(resumed(session, tmp_path / "again.mp4"), session=tmp_path / "again.safetensors")
    network, vae = load_tiny()
    assert sum(event.chunk is not None for event, _ in generate(network, vae, embed_prompt, todo)) > 5
    again = storage.load(todo.session)
    assert again.stored.keys() == session.stored.keys()
    assert all(torch.equal(again.stored[name], tensor) for name, tensor in session.stored.items())
    assert code_of("generate", "--resume", "--out", out, "--seconds", "1.7", "--attention", "exact", "--device", "cpu") == 0
    assert "attention to the cache: exact (as set)" in capsys.readouterr().err
    assert storage.load(session.path).settings[0].attention == "exact"
    assert code_of(*longer, tmp_path / "off.mp4", "--preset", "off") == 2
    assert "hold old frames in 16. Set attention to auto" in capsys.readouterr().err and not (tmp_path / "off.mp4").exists()


@trained
def test_going_on_from_a_photo(tmp_path):
    """Taken with the camera on its side, and wider than the video: the middle of it, turned."""
    picture = Image.new("RGB", (200, 100), (0, 0, 255))
    picture.paste((255, 0, 0), (50, 0, 150, 100))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "red.jpg", exif=exif, quality=95)
    assert code_of("generate", "--prompt", PROMPTS[1], "--seconds", "0.5", "--start", tmp_path / "red.jpg", "--device", "cpu", "--out",
                   tmp_path / "a.webm", "--budget", "auto", "--offload") == 0
    shown = frames(tmp_path / "a.webm")
    assert shown[0, ..., 0].mean() > 150 and shown[0, ..., 2].mean() < 100


@trained
def test_kernels_that_are_compiled_are_told_of(tmp_path, capsys, monkeypatch):
    """Of one kernel, in Triton's interpreter where there is no GPU: there, all of them take minutes."""
    ops = pytest.importorskip("comfyui_qvg.kernels.ops", reason="kernels are written in Triton")
    monkeypatch.setattr(launches, "_launched", set())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    register(Backend("one kernel", devices=(device,), ops={"rotate": ops.OPS["rotate"]}))
    try:
        assert code_of("generate", "--prompt", PROMPTS[0], "--seconds", "0.5", "--out", tmp_path / "ball.mp4", "--device", device) == 0
    finally:
        remove("one kernel")
    assert "Compiling GPU kernels (first run): rotate\n" in capsys.readouterr().err


@trained
def test_a_bar_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert code_of(*GENERATE, tmp_path / "ball.mp4") == 0
    shown = capsys.readouterr().err
    assert "ball.mp4:" in shown and "5/5" in shown and "chunk 1/1, cache" in shown and shown.endswith("session.safetensors\n")


WRONG = {
    "--seconds": ["0", "-1", "nan", "inf", "1e400", "1e9", "x", "", "86401", "0x10"],
    "--seed": ["-1", str(2**64), "1.5", "nan", "x", "1_000", "9" * 5000], "--cfg": ["nan", "inf", "-1", "x", "1e9"],
    "--window": ["-1", "x", str(10**9)], "--sink": ["-1", "1.5"], "--budget": ["nan", "-1", "x", "inf", "AUTO", "1e30"],
    "--position-limit": ["-1", "x"], "--recache": ["-1", "x"], "--checkpoint": ["0", "-1"], "--save-every": ["0", "-1", "x"],
    "--preset": ["", "Balanced", "x"],
    "--device": ["", "x", "cuda:99", "meta", "cpu:x", "cuda:-5", "\udcff"],
}


@pytest.mark.parametrize(("option", "value"), [(option, value) for option, values in WRONG.items() for value in values])
def test_a_wrong_value_is_refused(tmp_path, capsys, monkeypatch, option, value):
    monkeypatch.chdir(tmp_path)
    assert code_of("generate", "--prompt", PROMPTS[0], "--out", "a.mp4", option, value) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"qvg generate: error: argument {option}: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("arguments", "words"), [
    ((), "There is no prompt"), (("--prompt", " "), "There is no prompt"), (("--prompt", "5s: late"), "begins at 5s"),
    (("--prompt", "9" * 400 + "s: x"), "must begin at 0s"), (("--prompt", "0s: a\n" + "9" * 400 + "s: x"), "a video has at most"),
    (("--prompt", "0s: a\n" + "9" * 400 + ":00: x"), "a video has at most"),
    (("--prompt", "a", "--prompt-file", "text"), "not allowed with"), (("--prompt-file", "nowhere"), "cannot be read as a prompt"),
    (("--prompt-file", "."), "cannot be read as a prompt"), (("--prompt-file", "bytes"), "not text in UTF-8"),
    (("--prompt", "a", "--resume", "--overwrite"), "not allowed with"), (("--resume",), "There is no session new.mp4.session.safetensors"),
    (("--resume", "--session", "mistyped", "--prompt", "a"), "There is no session mistyped to resume"),
    (("--resume", "--session", "text"), "damaged or no session"), (("--prompt", "a", "--negative", "b"), "not used with cfg 1"),
    (("--prompt", "a", "--out", ""), "is a folder"), (("--prompt", "a", "--out", ".."), "has no name"),
    (("--prompt", "a", "--out", "video.mp4"), "video.mp4 already exists"), (("--prompt", "a", "--out", "a.gif"), r"use .mp4, .webm"),
    (("--prompt", "a", "--out", "pictures.png"), "pictures_000000.png already exists"),
    (("--prompt", "a", "--session", "text"), "text already exists"), (("--prompt", "a", "--session", "new.mp4"), "video and the session"),
    (("--prompt", "a", "--session", "./NEW.mp4"), "video and the session"),
    (("--prompt", "a", "--start", "video.mp4", "--out", "video.mp4", "--overwrite"), "video.mp4 is read, but"),
    (("--prompt", "a", "--start", "link.mp4", "--out", "video.mp4", "--overwrite"), "link.mp4 is read, but"),
    (("--prompt", "a", "--start", "pictures_000000.png", "--out", "pictures.png", "--overwrite"), "is read, but"),
    (("--prompt", "a", "--start", "video.mp4", "--session", "video.mp4", "--overwrite"), "video.mp4 is read, but"),
    (("--prompt-file", "text", "--session", "text", "--overwrite"), "text is read, but"),
    (("--prompt", PROMPTS[0], "--start", "nowhere.png"), "There is no file nowhere.png"),
    (("--prompt", PROMPTS[0], "--start", "text"), "cannot be read as an image"), (("--prompt", "a dragon"), "dragon"),
    (("--prompt", PROMPTS[0], "--out", "no/where.mp4"), "no folder no"), (("--prompt", PROMPTS[0], "--out", "a:b.mp4"), "has a ':'"),
    (("--prompt", PROMPTS[0], "--session", "no/where"), "no folder no"),
    (("--prompt", PROMPTS[0], "--out", "x" * 250 + ".mp4"), "too long"),
    (("--prompt", PROMPTS[0], "--out", "con.mp4"), "for a device"), (("--prompt", PROMPTS[0], "--out", "folder.mp4"), "is a folder"),
    (("--prompt", PROMPTS[0], "--out", "folder.mp4", "--overwrite"), "is a folder"), (("--prompt", "a", "--see", "3"), "unrecognized"),
    (("--prompt", PROMPTS[0], "--budget", "1e-9"), "budget"),
    (("--prompt", PROMPTS[0], "--seconds", "9", "--position-limit", "5"), "positions are limited"),
])
def test_what_cannot_be_is_refused_and_nothing_is_touched(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("a")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "video.mp4").write_text("a video")
    (tmp_path / "link.mp4").symlink_to("video.mp4")
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures_000000.png")
    before = there(tmp_path)
    (tmp_path / "folder.mp4").mkdir()
    out = () if "--out" in arguments else ("--out", "new.mp4")
    assert code_of("generate", *arguments, *out) == 2
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said and len(said.strip().splitlines()[-1]) < 600
    (tmp_path / "folder.mp4").rmdir()
    assert there(tmp_path) == before


@pytest.mark.parametrize("arguments", [
    (), ("x",), ("plan",), ("plan", "--model", "x", "--cards"), ("bench",), ("bench", "x"), ("generate",), ("info", "x"), ("demo", "x"),
    *(("plan", "--model", "self-forcing", *rest) for rest in [
        ("--seconds", "0"), ("--seconds", "nan"), ("--seconds", "5", "--latent-frames", "3"), ("--latent-frames", "0"),
        ("--latent-frames", "1.5"), ("--seconds", "5", "--vram", "-1"), ("--seconds", "5", "--vram", "nan"),
        ("--seconds", "5", "--width", "8"),
        ("--seconds", "5", "--height", "x"), ("--seconds", "5", "--width", "1e9"), ("--seconds", "5", "--card", "0"),
        ("--seconds", "5", "--card", "0.1"), ("--seconds", "5", "--vram", "1", "--card", "1"), ("--seconds", "1e12"),
        ("--seconds", "5", "--weights", "q4_k_m"), ("--seconds", "5", "--card", "24", "--weights", "x")]),
    *(("demo", *rest) for rest in [
        ("--latent-frames", "0"), ("--latent-frames", "-3"), ("--latent-frames", "99999999"), ("--seed", "-1"), ("--seed", str(2**64)),
        ("--device", "x"), ("--out", "file"), ("--out", "file/x"), ("--prompt", ""), ("--prompt", "a dragon over green dots")])])
def test_other_commands_refuse(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert code_of(*arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("qvg") and len(said[-1]) > 20
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("arguments", [
    *(("kernels", *rest) for rest in [("--device", "x"), ("--only", "x"), ("--out", "file"), ("--out", "taken")]),
    *(("generate", *rest) for rest in [
        ("--contexts", "5"), ("--contexts", "0"), ("--contexts", "x"), ("--rounds", "0"), ("--turns", "-1"), ("--limits", "nan"),
        ("--model", "x"), ("--model", "longcat", "--given", "0"), ("--model", "longcat", "--batch", "-1"), ("--out", "file/x")])])
def test_benchmarks_refuse(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "kernels.json").write_text("an hour's work")
    assert code_of("bench", *arguments, "--small") == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("qvg")
    assert names(tmp_path) == ["file", "taken"] and (tmp_path / "taken" / "kernels.json").read_text() == "an hour's work"


def test_drawn_command_lines(tmp_path, monkeypatch, capsys):
    """Five hundred of them, each with something wrong in it: always a sentence and 2, never anything else."""
    monkeypatch.chdir(tmp_path)
    draw, options = random.Random(16), list(WRONG)
    words = ["", "-", "--", "0", "-0", "1e999", "nan", "☃", "a b", "%s", "\\", "{}", "'", "\x1b[31m", "--out", "=", "null", "../.."]
    for _ in range(500):
        line = ["generate", "--out", draw.choice(["a.mp4", "b.png", "c", "d.webm"]), "--prompt", draw.choice(words)]
        for option in draw.sample(options, draw.randint(1, 4)):
            line += [option, draw.choice(WRONG[option] + words)]
        wrong = draw.choice(options)
        assert code_of(*line, wrong, draw.choice(WRONG[wrong])) == 2, line
        assert "Traceback" not in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def start(folder, *options):
    command = [sys.executable, "-m", "comfyui_qvg.qvg.commands.cli", "generate", "--prompt", PROMPTS[0], "--out", "a.mp4",
               "--device", "cpu", "--save-every", "1", *options]
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_for(found, process):
    for _ in range(12000):
        if found():
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    raise AssertionError("it took too long")


@trained
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_process_that_is_stopped_is_resumed_and_leaves_nothing_else(tmp_path, how):
    """While it runs, a second process cannot write there; after it, the same command with --resume can."""
    session = tmp_path / "a.mp4.session.safetensors"
    with start(tmp_path, "--seconds", "300") as process:
        wait_for(session.is_file, process)
        for options in ((), ("--overwrite",), ("--resume",), ("--overwrite", "--session", "another")):
            with start(tmp_path, *options) as other:
                said = other.stderr.read()
                assert other.wait() == 2 and len(said.splitlines()) == 1, said
                assert ("is being written by another run" if options else "already exists") in said
        process.send_signal(how)
        process.wait()
        assert process.returncode == (generate_command.INTERRUPTED if how == signal.SIGINT else -how)
        if how == signal.SIGINT:
            assert "the same command with --resume continues" in process.stderr.read()
    made = storage.load(session)
    assert len(frames(tmp_path / "a.mp4")) >= made.extra["video_frames"] == 4 * made.frames_done - 3
    # what a kill in the middle of a write leaves
    for name in ("a.mp4", session.name):
        (tmp_path / f"{name}.0123abcd.part").write_text("half")
    seconds = (4 * made.frames_done + 9) / 16
    assert code_of("generate", "--resume", "--prompt", PROMPTS[0], "--seconds", seconds, "--out", tmp_path / "a.mp4", "--device",
                   "cpu") == 0
    assert sorted(there(tmp_path)) == ["a.mp4", session.name]


@trained
def test_pipes_that_are_closed(tmp_path):
    """`qvg plan ... | head -1` says nothing about it."""
    with subprocess.Popen([sys.executable, "-m", "comfyui_qvg", "plan", "--model", "self-forcing", "--cards"],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.wait(timeout=600) == 1 and process.stderr.read() == ""
