"""Kernels compiled for GPUs that are not here: nothing spills and shared memory suffices.

These are the presets' variants; `python -m comfyui_qvg.benchmarks.aot` compiles all.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="kernels are written in Triton")

TARGETS = ["cuda:80", "cuda:89", "cuda:90", "cuda:100", "cuda:120", "hip:gfx942", "hip:gfx1100"]


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_spills(target):
    # in a process of its own, because here Triton interprets
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "comfyui_qvg.benchmarks.aot", "--few", "--targets", target]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    reports = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.returncode == 0, [report for report in reports if report["spilled"] or report["stuck"]] or result.stderr[-3000:]
    names = " ".join(report["name"] for report in reports)
    assert all(kernel in names for kernel in (
        "decode", "assign", "sums", "means", "store", "residual", "encode-d", "encode-scales", "decode-transform", "bit-vectors",
        "encode-transform", "pack"))
    assert ("encode-hopper" in names) == ("decode-hopper" in names) == (target == "cuda:90")
    for report in reports:
        assert report["registers"] > 0 and report["spilled"] == 0 and report["stuck"] == 0
        assert report["shared"] <= report["shared_limit"]


def test_barriers_in_turns():
    """A barrier of the whole program is found where a group has the turn, and nowhere else."""
    from comfyui_qvg.benchmarks.aot import barriers_in_turns

    whole, take, give = "\tbar.sync \t0;", "{ .reg .u32 t; mov.u32 t, %tid.x; bar.sync t, 256; mov.u32 %r1, 0; }", "bar.arrive t, 256;"
    assert barriers_in_turns("\n".join([whole, take, "wgmma", give, whole, take, give, whole])) == 0
    assert barriers_in_turns("\n".join([whole, take, whole, give, take, whole, whole, give])) == 3
    assert barriers_in_turns("") == 0
