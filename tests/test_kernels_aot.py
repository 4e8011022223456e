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
    """But for those of `SPILLS`."""
    # in a process of its own, because here Triton interprets
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "comfyui_qvg.benchmarks.aot", "--few", "--targets", target]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    reports = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.returncode == 0, [
        report for report in reports if report["spilled"] or report["stuck"] or report["running"]] or result.stderr[-3000:]
    names = " ".join(report["name"] for report in reports)
    assert all(kernel in names for kernel in (
        "decode", "assign", "sums", "means", "store", "residual", "encode-d", "encode-scales", "decode-transform", "bit-vectors",
        "encode-transform", "pack", "rotate", "project", "join-first", "join-next", "join-last", "attend-d",
        "attend-sums", "attend-pack"))
    for kernel in ("encode-hopper", "decode-hopper", "attend-hopper", "attend-join"):
        assert (kernel in names) == (target == "cuda:90")
    for report in reports:
        assert report["registers"] > 0 and report["spilled"] <= report["spilled_limit"] and report["stuck"] == report["running"] == 0
        assert report["shared"] <= report["shared_limit"]


LOOPS = """
import json
from comfyui_qvg.benchmarks import aot
from comfyui_qvg.kernels.hopper_attend import Cut
compiled = aot.compiled_for(aot.attend_on_hopper({dim}, Cut({cut})), next(target for target in aot.TARGETS if target.arch == 90))
print(json.dumps(aot.loops_of(compiled)))
"""


@pytest.mark.parametrize(("dim", "cut"), [(128, ""), (64, ""), (128, "keys=64, stages=6")])
def test_attention_on_hopper_stays_in_registers(dim, cut):
    """The loop over tiles of keys has its products and no more waits than it must, spills nothing, and exchanges only the largest logits of
    two rows between four threads; so weights are operands as they are."""
    pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper", reason="this Triton has no Gluon for Hopper")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", LOOPS.format(dim=dim, cut=cut)], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    loops = [loop for loop in map(json.loads, result.stdout.splitlines()) for loop in loop if "IGMMA" in loop and "STG" not in loop]
    assert len(loops) == 3
    keys = 64 if "keys" in cut else 128
    for loop in loops:
        # an instruction multiplies 32 bytes of a row
        assert (loop["IGMMA"], loop["QGMMA"]) == (dim // 32, keys // 32)
        # both products begin and are waited for once
        assert loop["WARPGROUP"] == 4
        assert not loop.keys() & {"LDL", "STL", "LDS", "STS", "LDSM", "STSM"}
        assert loop["SHFL"] == 4 and loop.get("PRMT", 0) == 0
        # six for each logit, of which a thread has half as many as there are keys, and for each channel of the product
        assert sum(loop.values()) < 150 + 3.2 * keys


def test_spills_that_are_accepted():
    """They are for targets that are compiled for, and a byte more fails."""
    from comfyui_qvg.benchmarks.aot import SPILLS, Report

    assert SPILLS.keys() <= set(TARGETS)
    for target, allowed in SPILLS.items():
        for name, most in allowed.items():
            fits = [Report(name, target, 128, spilled, most, 0, 1, 0).fits for spilled in (0, most, most + 1)]
            assert fits == [True, True, False]


def test_barriers_in_turns():
    """A barrier of the whole program is found where a group has the turn, and nowhere else."""
    from comfyui_qvg.benchmarks.aot import barriers_in_turns

    whole, take, give = "\tbar.sync \t0;", "{ .reg .u32 t; mov.u32 t, %tid.x; bar.sync t, 256; mov.u32 %r1, 0; }", "bar.arrive t, 256;"
    assert barriers_in_turns("\n".join([whole, take, "wgmma", give, whole, take, give, whole])) == 0
    assert barriers_in_turns("\n".join([whole, take, whole, give, take, whole, whole, give])) == 3
    assert barriers_in_turns("") == 0


def test_running_products():
    """A product in E4M3 that starts from something else than zeros is found, whatever other products do."""
    from comfyui_qvg.benchmarks.aot import running_products

    zeros = "%cst_0 = arith.constant dense<0.000000e+00> : tensor<64x128xf32>"
    fresh = "%1 = tt.dot %a, %b, %cst_0, inputPrecision = tf32 : tensor<64x128xf8E4M3FN> * tensor<128x128xf8E4M3FN> -> tensor<64x128xf32>"
    joined, other = fresh.replace("%cst_0", "%total_7"), fresh.replace("%cst_0", "%total_7").replace("f8E4M3FN", "bf16")
    assert running_products("\n".join([zeros, fresh, other])) == 0
    assert running_products("\n".join([zeros, fresh, joined, other, joined])) == 2
