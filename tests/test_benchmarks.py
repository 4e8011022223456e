"""The benchmarks run from end to end on any machine, at small sizes, and write what they found."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from comfyui_qvg.benchmarks import baselines, context, generate, longcat, methods, worldplay
from comfyui_qvg.benchmarks.kernels import Case, tokens
from comfyui_qvg.qvg.attention import sdpa
from comfyui_qvg.qvg.cache.geometry import Geometry
from comfyui_qvg.qvg.commands import cli
from comfyui_qvg.qvg.demo import NETWORK_PATH
from comfyui_qvg.qvg.files import Taken
from comfyui_qvg.qvg.report import scatter
from comfyui_qvg.qvg.settings import PRESETS

ROOT = Path(__file__).resolve().parents[1]


def bench(name, out, *options, written=""):
    assert cli.main(["bench", name, "--small", "--out", str(out), "--device", "cpu", *options]) == 0
    result = json.loads((out / f"{written or name}.json").read_text())
    assert {"device", "torch", "command", "date"} <= set(result["environment"])
    assert (out / f"{written or name}.md").read_text().count("|") > 20
    return result


def test_kernels(tmp_path):
    rows = bench("kernels", tmp_path)["rows"]
    measured = {row["op"] for row in rows if row["us"]}
    assert {"decode", "encode", "assign", "update", "train", "k-means", "attend"} <= measured
    errors = [float(row["note"].partition("relative error ")[2].partition(",")[0]) for row in rows if "relative error" in row["note"]]
    assert len(errors) == 6 and max(errors) < 0.06
    assert all(row["us"] > 0 if row["us"] is not None else "not measured" in row["note"] for row in rows)


def test_generate(tmp_path):
    rows = bench("generate", tmp_path, "--contexts", "6", "--rounds", "1")["rows"]
    assert [row["method"] for row in rows] == [
        "bf16", *(f"qvg {name}{end}" for name in ("balanced", "smallest", "tiny") for end in ("", ", fast")), "qvg 2 planes",
        "qvg balanced, one stream", "qvg balanced, offloaded", "released method", "bf16"]
    assert re.search(r"sageattention not measured: .", (tmp_path / "generate.md").read_text())
    assert rows[0]["state_bytes"] > rows[1]["state_bytes"] > 0
    assert all(row["ms"] > 0 for row in rows)
    assert [row["host_bytes"] > 0 for row in rows] == [row["method"].endswith("offloaded") for row in rows]


def test_generate_one_method(tmp_path, capsys):
    rows = bench("generate", tmp_path, "--contexts", "6", "--rounds", "1", "--only", "offload")["rows"]
    assert [row["method"] for row in rows] == ["bf16", "qvg balanced, offloaded", "bf16"]
    with pytest.raises(SystemExit):
        cli.main(["bench", "generate", "--help"])
    assert "tiny-fast,planes,one-stream,offload,released,package,sage,balanced-sage" in capsys.readouterr().out


@pytest.mark.skipif(not NETWORK_PATH.is_file(), reason="the tiny model's weights are not in this checkout")
def test_quality_in_patterns(tmp_path):
    """A start image in front, one video: what broke once."""
    found = bench("quality", tmp_path, "--patterns", "1,3,3", "--only", "2 planes", "2 planes, codebooks kept", "1.25 bits, bare",
                  "1.25 bits, bare, basis of other videos", "balanced, attention in 8 bits", written="quality_patterns")
    rows = {row["method"]: row for row in found["rows"]}
    assert set(rows) == {"paper int2", "2 planes", "2 planes, codebooks kept", "1.25 bits, bare", "1.25 bits, bare, basis of other videos",
                         "balanced, attention in 8 bits"}
    attentions = {name: row["attention"].partition(" ")[0] for name, row in rows.items()}
    assert attentions.pop("balanced, attention in 8 bits") == "fast" and set(attentions.values()) == {"exact"}
    for name in ("2 planes", "1.25 bits, bare"):
        assert rows[name]["later"][0] > rows["paper int2"]["later"][0] + 4
    assert rows["2 planes"]["stored_bytes"] <= 1.05 * rows["paper int2"]["stored_bytes"]
    for name, bits in (("paper int2", 3.06), ("2 planes", 2.27), ("1.25 bits, bare", 1.35)):
        assert rows[name]["bits_at_180_frames"] == pytest.approx(bits, abs=0.05)
    assert "| 1,3,3 | 2 planes |" in (tmp_path / "quality_patterns.md").read_text()


@pytest.mark.skipif(not NETWORK_PATH.is_file(), reason="the tiny model's weights are not in this checkout")
def test_quality(tmp_path):
    rows = {row["method"]: row for row in bench("quality", tmp_path)["rows"]}
    assert rows["exact again"]["free"]["later"] == [120.0]
    assert rows["exact again"]["free"]["later"] > rows["1e-3 noise"]["free"]["later"] > rows["paper int2"]["free"]["later"]
    assert 2.25 <= rows["RTN asymmetric int2"]["bits"] < 2.26
    assert all((tmp_path / f"quality_{kind}.png").stat().st_size > 5000 for kind in ("free", "forced"))


@pytest.mark.skipif(not NETWORK_PATH.is_file(), reason="the tiny model's weights are not in this checkout")
def test_context(tmp_path):
    """The newest frames of a history that arrives whole are worth more than the oldest, for equal bytes."""
    labels = ["2 planes, newest 3 at 3", "2 planes, oldest 3 at 3"]
    context.main(["--videos", "2", "--out", str(tmp_path), "--only", *labels])
    newest, oldest = json.loads((tmp_path / "context.json").read_text())["rows"]
    assert [newest[0], oldest[0]] == labels and newest[1] == pytest.approx(oldest[1])
    assert newest[2] > oldest[2] + 1
    with pytest.raises(Taken, match=r"context\.json already exists. Choose another --out, or --overwrite"):
        context.main(["--out", str(tmp_path)])


@pytest.mark.parametrize(("layouts", "bits"), [(layouts, bits) for layouts in baselines.BASELINES.values() for bits in (2, 4)])
def test_baselines(layouts, bits):
    """Every level is used, errors stay within half a step of what E4M3 makes of the range, and a slice of rows is a slice of all."""
    x = torch.randn(288, 3, 128, generator=torch.Generator().manual_seed(0))
    for layout in layouts:
        span = baselines.Baseline(layout).encode(x, bits)
        assert baselines.unpack(span.data.codes, bits).unique().numel() == 2**bits
        whole = span.decode(slice(None), None)
        assert torch.allclose(span.decode(slice(1, 2), None), whole[:, 1:2], atol=1e-5)
        assert (whole - x).square().mean() < (0.3 if bits == 2 else 0.02)
        numbers = 8 * span.nbytes / x.numel()
        assert bits + 0.2 < numbers < bits + 0.4


def test_frontier():
    assert scatter.frontier([(3, 5), (1, 1), (2, 4), (2, 3), (4, 5)]) == [(1, 1), (2, 4), (3, 5)]


LONGCAT = ["bf16 cache", "qvg balanced", "qvg 2 planes", "qvg smallest", "qvg quality", "qvg balanced, fast", "qvg smallest, fast",
           "paper, all layers in bf16 first"]


def longcat_rows(tmp_path, code=0):
    options = ["--small", "--out", str(tmp_path), "--device", "cpu", "--given", "4", "--new", "2", "--rounds", "1"]
    assert cli.main(["bench", "generate", "--model", "longcat", *options]) == code


def test_generate_longcat(tmp_path, capsys):
    longcat_rows(tmp_path)
    rows = json.loads((tmp_path / "generate-longcat.json").read_text())["rows"]
    assert [row["method"] for row in rows] == LONGCAT
    sizes = longcat.SMALL
    assert rows[0]["held_bytes"] == 2 * sizes.layers * 4 * 24 * sizes.dim * 4
    assert all(rows[0]["held_bytes"] > row["held_bytes"] > 0 for row in rows[1:])
    for row in rows:
        assert row["pass_ms"] > 0 and len(row["step_ms_all"]) == len(row["bf16_step_ms_all"]) == 1
        assert row["overhead_percent"] == pytest.approx(100 * (row["step_ms"] / row["bf16_step_ms"] - 1))
    shown = capsys.readouterr().out
    assert shown.count("## qvg bench generate-longcat") == 1 and all(f"| {name} |" in shown for name in LONGCAT)


@pytest.mark.parametrize(("model", "name"), [("self-forcing", "generate-gpus"), ("longcat", "generate-gpus-longcat")])
def test_generate_by_two_processes(model, name, tmp_path):
    found = bench("generate", tmp_path, "--gpus", "2", "--model", model, "--rounds", "2", written=name)
    row = found["rows"][0]
    assert all(len(row[side]["ms_all"]) == 2 and row[side]["ms"] > 0 for side in ("alone", "together"))
    # scales and places of spans are of single heads
    assert row["together"]["stored_bytes"] == pytest.approx(row["alone"]["stored_bytes"] / 2, rel=0.01)


def test_processes_that_cannot_go_on_end_with_the_reason(tmp_path, capsys):
    options = ["bench", "generate", "--small", "--device", "cpu", "--out", str(tmp_path), "--gpus"]
    assert cli.main([*options, "3"]) == cli.FAILED
    assert re.search(r"Process \d of 3 ended: ValueError: 3 ranks do not divide the 2 heads", capsys.readouterr().err)
    assert cli.main([*options, "2", "--limit", "1"]) == cli.FAILED
    assert "have not measured self-forcing in 1 s, and were ended. Raise --limit." in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        generate.main(["--gpus", "2", "--model", "hy-worldplay-8b"])
    assert "--gpus is for the causal Wan and LongCat-Video; leave out --model hy-worldplay-8b" in capsys.readouterr().err


def test_a_benchmark_that_is_stopped_keeps_its_rows(tmp_path, monkeypatch):
    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(longcat.EncodedAfterwards, "finish", stop)
    longcat_rows(tmp_path, code=130)
    rows = json.loads((tmp_path / "generate-longcat.json").read_text())["rows"]
    assert [row["method"] for row in rows] == LONGCAT[:-1] and "| qvg smallest, fast |" in (tmp_path / "generate-longcat.md").read_text()


def test_longcat_caches_of_a_benchmark_agree(tmp_path):
    """What is timed computes the same: a step over the bf16 cache, one over an exact cache, and one over all frames at once."""
    scene = longcat.make(torch.device("cpu"), small=True, given=4, new=2, batch=2)
    for parameter in scene.network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    steps = []
    for method in (longcat.Bf16(scene), longcat.Encoded(scene, PRESETS["off"])):
        scene.encode(method.store)
        steps.append(scene.step(method.read))
    whole = torch.cat([scene.given.expand(2, -1, -1, -1, -1), scene.new], dim=2)
    with torch.no_grad():
        steps.append(scene.network(whole, torch.full((2,), 750.0), scene.context, given=4)[:, :, 4:])
    assert steps[0].std() > 0.01
    for other in steps[1:]:
        torch.testing.assert_close(other, steps[0], rtol=0, atol=1e-5)


WORLDPLAY = ["original's order, bf16", "both branches in bf16, in place", "rebuild, balanced", "append, balanced", "bank, smallest",
             "bank, balanced, offloaded"]


@pytest.mark.parametrize("model", worldplay.NETWORKS)
def test_generate_worldplay(tmp_path, model):
    rows = bench("generate", tmp_path, "--model", model, "--history", "24", "--rounds", "1", "--only", "in-place", "rebuild", "append",
                 "bank-smallest", "bank-offload", written=f"generate-{model}")["rows"]
    assert [row["method"] for row in rows] == WORLDPLAY
    for row in rows:
        assert row["context_ms"] > 0 and row["step_ms"] > 0 and len(row["rounds"]) == 1
        assert row["chunk_ms"] >= row["context_ms"] + row["finish_ms"] + 3 * row["step_ms"] / 2
        assert row["relative_percent"] == pytest.approx(100 * row["chunk_ms"] / rows[0]["chunk_ms"])
    setup = worldplay.make(model, torch.device("cpu"), True, 24)
    assert rows[0]["held_bytes"] == 2 * 2 * setup.geometry.bf16_bytes(setup.views.window)
    assert rows[1]["held_bytes"] > rows[0]["held_bytes"] > 5 * rows[2]["held_bytes"]


@pytest.mark.parametrize("model", worldplay.NETWORKS)
def test_worldplay_caches_of_a_benchmark_agree(model):
    """What is timed computes the same: a step in the original's order, one in place and one over an exact context that is rebuilt."""
    setup = worldplay.make(model, torch.device("cpu"), True, 24)
    for parameter in setup.scene.network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    steps = []
    for method in (worldplay.Original(setup), worldplay.InPlace(setup), worldplay.Memory(setup, "rebuild", PRESETS["off"])):
        for _ in range(2):
            method.context()
            step = method.step(0.5)
            method.rewind()
        steps.append(step)
    # a memory returns what is left without noise
    steps[2] = (setup.noise - steps[2]) / 0.5
    assert steps[0].std() > 0.05
    for other in steps[1:]:
        torch.testing.assert_close(other.float(), steps[0].float(), rtol=0, atol=1e-4)


def test_a_history_of_worldplay_that_is_no_whole_chunks(capsys):
    with pytest.raises(SystemExit):
        generate.main(["--model", "hy-worldplay-8b", "--small", "--history", "30"])
    assert "--history is 30, but chunks are of 4 latent frames; give a multiple of 4" in capsys.readouterr().err


def difference(first, second):
    """Of what two methods read, relative to the first."""
    geometry, case = Geometry(2, 2, 64, (3, 4)), Case("", 3, 3, 2, 64, (3, 4))
    device = torch.device("cpu")
    pair = tokens(case, 3, device, 0), tokens(case, 3, device, 1)
    q, k, v = (tokens(case, 3, device, seed) / 100 for seed in (2, 3, 4))
    outs = []
    for way in (first, second):
        method = way(geometry, pair, 3, 33)
        method.fill(27)
        outs.append(torch.stack([method.begin(clean)(1, q, k, v) for clean in (False, True)]))
        assert method.state_bytes() > 0
    return (outs[0] - outs[1]).square().mean() / outs[0].square().mean()


@pytest.mark.parametrize("kind", [methods.ours(PRESETS["off"]), methods.Released])
def test_methods_read_what_core_reads(kind):
    """The preset Off gives bf16's attention, and the released method's comes near it."""
    assert difference(methods.Core, kind) < (1e-10 if kind is not methods.Released else 0.3)


def test_a_preset_is_read_in_eight_bits():
    exact, fast = (methods.ours(PRESETS["balanced"], attention=attention) for attention in ("exact", "fast"))
    assert 0 < difference(exact, fast) < 0.01


def test_methods_with_sage_attention(monkeypatch):
    """Whose function gets tokens before heads; without it, the reason is an error."""
    def sageattn(q, k, v, tensor_layout, is_causal):
        assert (tensor_layout, is_causal) == ("NHD", False) and q.shape[2:] == k.shape[2:] == v.shape[2:] and k.shape[1] > q.shape[1] == 36
        return sdpa(q, k, v)

    exact = methods.ours(PRESETS["balanced"])
    monkeypatch.setitem(sys.modules, "sageattention", SimpleNamespace(sageattn=sageattn))
    assert difference(methods.Core, methods.SageCore) < 1e-10 > difference(exact, methods.SageOurs)
    monkeypatch.setitem(sys.modules, "sageattention", None)
    for kind in (methods.SageCore, methods.SageOurs):
        with pytest.raises(ValueError, match="sageattention"):
            difference(methods.Core, kind)
    assert "sageattention" in generate.absence("sage", torch.device("cpu")) and not generate.absence("tiny-fast", torch.device("cpu"))


def test_without_the_folder(tmp_path):
    """The registry's archive leaves the benchmarks out."""
    pack = tmp_path / "pack"
    pack.mkdir()
    (pack / "__init__.py").touch()
    for name in ("qvg", "kernels"):
        (pack / name).symlink_to(ROOT / name)
    code = "import sys; from pack.qvg.commands.cli import main; sys.exit(main(sys.argv[1:]))"
    # what measures a model of one's own is in it
    for arguments, sentence in ((["kernels", "--small"], "clone the repository"), (["quality"], "required: --checkpoint, --embeddings"),
                                (["statistics", "--checkpoint", "x.pt"], "belong together")):
        result = subprocess.run([sys.executable, "-c", code, "bench", *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 2 and sentence in result.stderr


def test_longest_videos_that_are_tried():
    """More frames fit with a smaller cache, and each guess is worth trying. Of such small frames, bases alone take more than bf16."""
    guesses = generate.guesses(generate.make(torch.device("cpu"), small=True), 1 / 64)
    frames = {name: count for name, _, count in guesses}
    assert list(frames) == ["bf16", "qvg balanced", "qvg smallest", "released method"]
    assert 2 * generate.CHUNK < frames["bf16"] < frames["released method"]
    assert 2 * generate.CHUNK < frames["qvg balanced"] < frames["qvg smallest"]
