"""The benchmarks run from end to end on any machine, at small sizes, and write what they found."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from comfyui_qvg.benchmarks import methods
from comfyui_qvg.benchmarks.kernels import Case, tokens
from comfyui_qvg.qvg import cli
from comfyui_qvg.qvg.budget import Geometry
from comfyui_qvg.qvg.settings import PRESETS

ROOT = Path(__file__).resolve().parents[1]


def bench(name, out, *options):
    assert cli.main(["bench", name, "--small", "--out", str(out), "--device", "cpu", *options]) == 0
    result = json.loads((out / f"{name}.json").read_text())
    assert {"device", "torch", "command", "date"} <= set(result["environment"])
    assert (out / f"{name}.md").read_text().count("|") > 20
    return result


def test_kernels(tmp_path):
    rows = bench("kernels", tmp_path)["rows"]
    measured = {row["op"] for row in rows if row["us"]}
    assert {"decode", "encode", "assign", "update", "train", "k-means"} <= measured
    assert all(row["us"] > 0 if row["us"] is not None else "not measured" in row["note"] for row in rows)


def test_generate(tmp_path):
    rows = bench("generate", tmp_path, "--contexts", "6", "--rounds", "1")["rows"]
    assert [row["method"] for row in rows] == ["bf16", "qvg balanced", "qvg balanced, one stream", "released method", "bf16"]
    assert rows[0]["state_bytes"] > rows[1]["state_bytes"] > 0
    assert all(row["ms"] > 0 for row in rows)


@pytest.mark.parametrize("kind", [methods.ours(PRESETS["off"]), methods.Released])
def test_methods_read_what_core_reads(kind):
    """The preset Off gives bf16's attention, and the released method's comes near it."""
    geometry, case = Geometry(2, 2, 64, (3, 4)), Case("", 3, 3, 2, 64, (3, 4))
    device = torch.device("cpu")
    pair = tokens(case, 3, device, 0), tokens(case, 3, device, 1)
    q, k, v = (tokens(case, 3, device, seed) / 100 for seed in (2, 3, 4))
    outs = []
    for way in (methods.Core, kind):
        method = way(geometry, pair, 3, 33)
        method.fill(27)
        outs.append(torch.stack([method.begin(clean)(1, q, k, v) for clean in (False, True)]))
        assert method.state_bytes() > 0
    difference = (outs[0] - outs[1]).square().mean() / outs[0].square().mean()
    assert difference < (1e-10 if kind is not methods.Released else 0.3)


def test_without_the_folder(tmp_path):
    """The registry's archive leaves the benchmarks out."""
    pack = tmp_path / "pack"
    pack.mkdir()
    (pack / "__init__.py").touch()
    for name in ("qvg", "kernels"):
        (pack / name).symlink_to(ROOT / name)
    code = "import sys; from pack.qvg.cli import main; sys.exit(main(['bench', 'kernels', '--small']))"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and "clone the repository" in result.stderr
