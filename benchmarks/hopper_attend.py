"""The attention kernel for Hopper and variants: which are right, and which is fastest. For an H100 or H200; takes at most 150 seconds.

    python -m comfyui_qvg.benchmarks.hopper_attend

Each variant runs in its own process, so one that hangs can be killed without stopping the others. All compile at once and run in turn.
Lines: variant, sizes, milliseconds (median of runs, and the fastest), times faster than torch's fastest, relative errors.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
import traceback
from functools import partial

START = time.monotonic()
LIMIT, EACH = 145, 25
# arguments of hopper_attend.Cut, and PARTS
VARIANTS = {
    "default": {},
    "4 stages": {"stages": 4},
    "64 keys": {"keys": 64, "stages": 6},
}
QUERIES, HEADS, DIM, PLACES, FRAMES = 4680, 12, 128, 1560, (60, 180)
SMALL = ((1, 1, 1, 1, 1, 128), (1, 1, 128, 128, 1, 128), (2, 1, 300, 1561, 3, 128), (1, 2, 4680, 700, 12, 128), (2, 2, 700, 3000, 5, 64))


def say(*parts):
    print(f"[{time.monotonic() - START:5.1f}]" if __name__ == "__main__" and len(sys.argv) == 1 else "", *parts, flush=True)


def drawn(conditions, batch, count, tokens, heads, dim, seed=0):
    import torch

    draw = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=draw, device="cuda", dtype=torch.bfloat16)

    q = normal(conditions * batch, count, heads, dim) * 2
    k = normal(batch, tokens, heads, dim) + 2 * normal(heads, dim)
    return q, k, normal(batch, tokens, heads, dim)


def error(ours, exact):
    ours, exact = ours.float(), exact.float()
    return float((ours - exact).norm() / exact.norm())


def exact(q, k, v):
    """Attention in float32 of few queries, and the log-sum-exp."""
    import torch

    k, v = (x.repeat(len(q) // len(x), 1, 1, 1) for x in (k, v))
    outs, sums = [], []
    for head in range(q.shape[2]):
        logits = q[:, :, head].float() @ k[:, :, head].float().mT * q.shape[-1] ** -0.5
        outs.append(logits.softmax(-1) @ v[:, :, head].float())
        sums.append(logits.logsumexp(-1))
    return torch.stack(outs, 2), torch.stack(sums, 2)


def timed(run, repeats):
    """(median, least) milliseconds of a run, of which two at a time follow one that hides the host."""
    import torch

    run()
    torch.cuda.synchronize()
    found = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        run()
        begin.record()
        run()
        run()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end) / 2)
    return sorted(found)[len(found) // 2], min(found)


def measure(name, attend, prepare, torchs):
    """Times and errors at full size. attend: of q and what `prepare` makes of k and v."""
    import torch

    for frames in FRAMES:
        q, k, v = drawn(1, 1, QUERIES, frames * PLACES, HEADS, DIM)
        packed = prepare(k, v)
        out, lse = attend(q, packed)
        few = slice(1000, 1064)
        true, true_lse = exact(q[:, few], k, v)
        rel, rel_lse = error(out[:, few], true), float((lse[:, few] - true_lse).abs().max()) if lse is not None else 0.0
        del true, true_lse
        median, least = timed(partial(attend, q, packed), 12 if frames == 60 else 6)
        pairs = QUERIES * HEADS * frames * PLACES * 4 * DIM
        base = torchs.get(str(frames))
        faster = f"x{base / median:.3f} of torch" if base else ""
        print(json.dumps({"frames": frames, "ms": median}), file=sys.stderr, flush=True)
        say(f"{name:26} {frames:4} frames  {median:8.3f} ms (least {least:8.3f})  {pairs / median / 1e9:6.0f} T/s  {faster}  "
            f"rel {rel:.4f}  lse {rel_lse:.4f}  finite {bool(out.isfinite().all())}")
        del q, k, v, packed, out, lse
        torch.cuda.empty_cache()


def baselines():
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        def attend(q, pair, backend=backend):
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, *pair))).transpose(1, 2), None

        try:
            measure(f"torch {backend.name.split('_')[0].lower()}", attend, lambda k, v: (k, v), {})
        except Exception as problem:
            say(f"torch {backend.name}: {problem!r}"[:300])


def general(torchs):
    from ..kernels import attend, attend_pack

    def with_tile(q, packed):
        return attend.attend_packed(q, packed, attend.Tiling.of("cuda", 9))

    measure("any GPU", with_tile, lambda k, v: attend_pack.pack(k, v, True), torchs)
    for frames in FRAMES:
        _, k, v = drawn(1, 1, 64, frames * PLACES, HEADS, DIM)
        median, least = timed(partial(attend_pack.pack, k, v, True), 8)
        say(f"{'pack':26} {frames:4} frames  {median:8.3f} ms (least {least:8.3f})")
        del k, v


class Warm:
    """A kernel that is compiled where it would be launched."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments, **constants: self.kernel.warmup(*arguments, grid=grid, **constants)


def hopper(name, options, torchs, wait):
    from types import SimpleNamespace

    import torch

    from ..kernels import attend_pack, hopper_attend
    from ..qvg.attention import fast

    cut = hopper_attend.Cut(**options)
    real = hopper_attend.attend_kernel, hopper_attend.join_kernel
    hopper_attend.attend_kernel, hopper_attend.join_kernel = map(Warm, real)
    q = torch.zeros(1, 64, 2, DIM, dtype=torch.bfloat16, device="cuda")
    some = torch.zeros(1, 2, 512, DIM, device="cuda")
    hopper_attend.attend_packed(q, SimpleNamespace(
        keys=some.to(torch.int8), values=some.mT.contiguous().to(torch.float8_e4m3fn), key_scales=some[:, :, :8, 0].contiguous(),
        key_mean=some[:, :, 0].contiguous(), value_scales=some[:, :, 0].contiguous(), tokens=512), cut)
    hopper_attend.attend_kernel, hopper_attend.join_kernel = real
    wait()
    # heads of 64 are another kernel, which takes time to compile
    for shape in SMALL if name == "default" else SMALL[:-1]:
        q, k, v = drawn(*shape, seed=sum(shape))
        history = attend_pack.pack(k, v, True)
        out, lse = hopper_attend.attend_packed(q, history, cut)
        torch.cuda.synchronize()
        few = slice(0, 300)
        defined, defined_lse = fast.fast(q[:, few], k, v)
        true, true_lse = exact(q[:, few], k, v)
        ours, kept = error(out[:, few], true), error(defined, true)
        lses = [float((x - true_lse).abs().max()) for x in (lse[:, few], defined_lse)]
        good = ours < 1.15 * kept + 0.003 and lses[0] < 1.3 * lses[1] + 0.01 and bool(out.isfinite().all())
        again = hopper_attend.attend_packed(q, history, cut)
        same = torch.equal(again[0], out) and torch.equal(again[1], lse)
        say(f"{name:26} {shape}  {'right' if good else 'WRONG'}  rel {ours:.4f} (definition {kept:.4f})  from definition "
            f"{error(out[:, few], defined):.4f}  lse {lses[0]:.4f} ({lses[1]:.4f})  repeats {same}")
        if not good:
            return
    measure(f"Hopper {name}", lambda q, packed: hopper_attend.attend_packed(q, packed, cut),
            lambda k, v: attend_pack.pack(k, v, True), torchs)
    if name == "default":
        hopper_attend.PARTS = 0
        hopper_attend.plan.cache_clear()
        measure(f"Hopper {name}, uncut", lambda q, packed: hopper_attend.attend_packed(q, packed, cut),
                lambda k, v: attend_pack.pack(k, v, True), torchs)


def child(name):
    """Says `ready` when it has compiled, reads torch's times and then runs."""
    def wait():
        print("ready", file=sys.stderr, flush=True)
        return json.loads(sys.stdin.readline())

    try:
        import torch

        if not torch.cuda.is_available():
            raise SystemExit("no GPU here")
        torchs = {}
        if name in ("torch", "any GPU"):
            torchs = wait()
            baselines() if name == "torch" else general(torchs)
        else:
            hopper(name, VARIANTS[name], torchs, lambda: torchs.update(wait()))
    except BaseException as problem:
        traceback.print_exc(limit=-3, file=sys.stdout)
        say(f"{name}: {problem!r}"[:500])
    print("done", file=sys.stderr, flush=True)


class Child:
    def __init__(self, name):
        self.name, self.ready, self.ended, self.found = name, threading.Event(), threading.Event(), {}
        self.process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name, "--child", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"})
        threading.Thread(target=self._lines, daemon=True).start()
        threading.Thread(target=self._events, daemon=True).start()

    def _lines(self):
        for line in self.process.stdout:
            say(line.rstrip())

    def _events(self):
        for line in self.process.stderr:
            if line.strip() == "ready":
                self.ready.set()
            elif line.startswith("{"):
                found = json.loads(line)
                key = str(found["frames"])
                self.found[key] = min(found["ms"], self.found.get(key, 1e9))
        self.ready.set()
        self.ended.set()

    def run(self, torchs, allowed):
        left = LIMIT - (time.monotonic() - START)
        if not self.ready.wait(max(1, min(90, left))):
            say(f"{self.name}: not compiled in time")
        elif left > 3:
            try:
                self.process.stdin.write(json.dumps(torchs) + "\n")
                self.process.stdin.flush()
            except OSError:
                pass
            if not self.ended.wait(min(allowed, left)):
                say(f"{self.name}: KILLED after {min(allowed, left):.0f} s; a kernel that hangs, or too slow")
        self.process.kill()
        self.process.wait()


def main():
    import importlib.metadata as versions

    say({name: versions.version(name) for name in ("torch", "triton")}, subprocess.run(
        ["nvidia-smi", "--query-gpu=name,clocks.sm,clocks.max.sm,power.limit,temperature.gpu", "--format=csv,noheader"],
        capture_output=True, text=True).stdout.strip() if any(os.access(f"{path}/nvidia-smi", os.X_OK)
                                                              for path in os.environ["PATH"].split(":")) else "no nvidia-smi")
    # the first two take the machine's cores for themselves as little as the others
    children = [Child(name) for name in ("torch", "any GPU", *VARIANTS)]
    torchs = {}
    try:
        for member in children:
            member.run(torchs, EACH)
            if member.name == "torch":
                torchs = member.found
                say("torch's fastest", torchs)
    finally:
        for member in children:
            member.process.kill()
    say("end")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", help="the variant that this process is to run")
    options = parser.parse_args()
    child(options.child) if options.child else main()
