"""Attention in pieces on a GPU: right at full size, and how fast, whole against pieces.

    python -m comfyui_qvg.benchmarks.pieces [--tiny]

Needs less than 90 s; what would begin after 75 s is left out and named. `--tiny` runs the same on a CPU, to check this script itself.
"""

from __future__ import annotations

import statistics
import sys
import time
import traceback
from dataclasses import replace

import torch

from ..qvg.attention import CachedAttention, NoRope, Rope
from ..qvg.attention.functions import eight_bits, sdpa
from ..qvg.attention.pieces import partial
from ..qvg.attention.prope import Prope
from ..qvg.attention.world import View, WorldAttention
from ..qvg.cache.geometry import on_device
from ..qvg.cache.kv_cache import KVCache
from ..qvg.cache.workspace import Workspace
from ..qvg.settings import PRESETS

BEGAN, LATEST = time.monotonic(), 75
TINY = "--tiny" in sys.argv
DEVICE = "cpu" if TINY else "cuda"
DTYPE = torch.float32 if TINY else torch.bfloat16
GRID, HEADS, DIM, CHUNK, LAYERS = ((3, 4), 12, 32, 3, 3) if TINY else ((30, 52), 12, 128, 3, 3)
SIZE = GRID[0] * GRID[1]
LENGTHS = (12, 30) if TINY else (60, 180)
# of the bytes of a frame, so that both sizes have pieces of some twenty and forty frames
MIB = 1 << 20
LIMITS = tuple(2 * 2 * SIZE * 3 * DIM * DTYPE.itemsize // 2 * n for n in (5, 9)) if TINY else (96 * MIB, 192 * MIB)
# one part's output is rounded to bf16, and so is the whole
ALLOWED = 1e-5 if TINY else 8e-3
failed = []


def say(*words) -> None:
    print(f"{time.monotonic() - BEGAN:5.1f} s ", *words, flush=True)


def late(what: str) -> bool:
    if time.monotonic() - BEGAN > LATEST:
        say(f"left out for want of time: {what}")
        return True
    return False


def section(function):
    def run(*arguments):
        if late(f"{function.__name__} {arguments}"):
            return None
        try:
            return function(*arguments)
        except Exception:
            failed.append(function.__name__)
            say(f"FAILED {function.__name__}")
            traceback.print_exc()
            sys.stderr.flush()
            return None
    return run


def drawn(frames: int, seed: int, heads: int = HEADS, peaky: float = 1.0) -> list[torch.Tensor]:
    """q, k and v of a chunk, correlated between tokens, as a basis expects."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    mix = torch.randn(DIM, DIM, generator=torch.Generator(DEVICE).manual_seed(7), device=DEVICE) / DIM**0.5
    return [((torch.randn(1, frames * SIZE, heads, DIM, generator=generator, device=DEVICE) @ mix) * peaky).to(DTYPE) for _ in range(3)]


def limit(cache: KVCache, most: int) -> None:
    """Read the same spans with another limit of the workspace; 0 for whole. The workspace holds NaN, which must not be read."""
    capacity = cache.workspace.capacity
    cache.workspace.free()
    cache.geometry = on_device(cache.geometry, DEVICE, most)
    cache.workspace = Workspace(cache.geometry, DTYPE, DEVICE, capacity and capacity // SIZE)
    cache.workspace.views(SIZE)
    cache.workspace._storage.fill_(torch.nan)
    if cache.host is not None:
        # its buffers are as large as this limit asks for
        sync()
        cache.host.shrink()


def sync() -> None:
    if not TINY:
        torch.cuda.synchronize()


def filled(name: str, **changes) -> KVCache:
    settings = replace(PRESETS[name], **changes)
    return KVCache(settings, layers=LAYERS, heads=HEADS, head_dim=DIM, grid=GRID, rope=Rope, device=DEVICE, dtype=DTYPE,
                   max_frames=LENGTHS[-1] + CHUNK, chunk_frames=CHUNK, workspace_limit=0)


def fill(cache: KVCache, frames: int) -> None:
    for first in range(cache.frames, frames, CHUNK):
        for number, layer in enumerate(cache.layers):
            _, k, v = drawn(CHUNK, 1000 * number + first)
            layer.append(k, v, CHUNK)


def flash_partial(q, k, v):
    """`partial` without cuDNN."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention(*(x.transpose(1, 2) for x in (q, k, v)))[:2]
    return out.transpose(1, 2), lse.transpose(1, 2)


def flash(q, k, v):
    return sdpa(q, k, v)


flash.partial = partial if TINY else flash_partial


def cudnn(q, k, v):
    return sdpa(q, k, v)


def cudnn_partial(q, k, v):
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(*heads_first, None, True)
    return out.transpose(1, 2), (lse[..., 0] if lse.ndim == 4 else lse).transpose(1, 2)


cudnn.partial = cudnn_partial


def layer_pass(cache: KVCache, tokens: list, attention=flash, limit_frames: int = 0) -> list[torch.Tensor]:
    attend = CachedAttention(cache, start_frame=cache.frames, frames=CHUNK, store=False, attention=attention, position_limit=limit_frames)
    return [attend(number, *part) for number, part in enumerate(tokens)]


def compare(label: str, whole: list, pieces: list[list]) -> None:
    """Nearness of the first to the whole, and whether the repeats are equal to it: a race would show in one of both."""
    worst = max(float((a.float() - b.float()).norm() / a.float().norm()) for a, b in zip(whole, pieces[0]))
    most = max(float((a.float() - b.float()).abs().max()) for a, b in zip(whole, pieces[0]))
    equal = all(torch.equal(a, b) for other in pieces[1:] for a, b in zip(pieces[0], other))
    right = worst <= ALLOWED and equal
    if not right:
        failed.append(label)
    say(f"{'ok   ' if right else 'WRONG'} {label}: relative error {worst:.1e}, largest {most:.1e}, repeats "
        f"{'equal' if equal else 'DIFFER'}")


@section
def check(label: str, cache: KVCache, position_limit: int = 0) -> None:
    tokens = [drawn(CHUNK, 5000 + number, peaky=2.0) for number in range(LAYERS)]
    limit(cache, 0)
    whole = layer_pass(cache, tokens, limit_frames=position_limit)
    for most in LIMITS:
        limit(cache, most)
        # one after the other without waiting, as a network calls them
        pieces = [layer_pass(cache, tokens, limit_frames=position_limit) for _ in range(4)]
        sync()
        heads, frames = cache.workspace.at_a_time(CHUNK)
        held = cache.layers[0].held_frames
        compare(f"{label}, {held} frames, {most / MIB:.0f} MiB ({heads} heads, {frames} frames a piece)", whole, pieces)
        if cache.workspace.nbytes > most:
            failed.append(label)
            say(f"WRONG workspace of {cache.workspace.nbytes} bytes")
    limit(cache, 0)


@section
def check_batch(cache: KVCache) -> None:
    """Conditions stacked by CFG."""
    tokens = [[torch.cat([one, two]) for one, two in zip(drawn(CHUNK, 6000 + n), drawn(CHUNK, 7000 + n))] for n in range(LAYERS)]
    limit(cache, 0)
    whole = layer_pass(cache, tokens)
    limit(cache, LIMITS[0])
    pieces = [layer_pass(cache, tokens) for _ in range(3)]
    sync()
    compare("two conditions", whole, pieces)
    limit(cache, 0)


@section
def check_world(offload: bool) -> None:
    """HY-WorldPlay 8B's layout with 20 frames read of a bank, and text."""
    heads, chunk, read, frames = (8, 4, 8, 16) if TINY else (16, 4, 20, 40)
    settings = replace(PRESETS["balanced"], offload=offload)
    cache = KVCache(settings, layers=LAYERS, heads=heads, head_dim=DIM, grid=GRID, rope=NoRope, branches=2, device=DEVICE, dtype=DTYPE,
                    max_frames=frames + chunk, chunk_frames=chunk, read_frames=read + chunk, workspace_limit=0)
    for first in range(0, frames, chunk):
        for number, layer in enumerate(cache.layers):
            _, k, v = drawn(chunk, 1000 * number + first, heads)
            layer.append(k, v, chunk)
    angle = torch.arange(frames + chunk, dtype=torch.float64) * 0.1
    cameras = torch.eye(4, dtype=torch.float64).repeat(frames + chunk, 1, 1)
    cameras[:, 0, 0] = cameras[:, 2, 2] = angle.cos()
    cameras[:, 0, 2], cameras[:, 2, 0] = angle.sin(), -angle.sin()
    seen = [*range(read - chunk), *range(frames - chunk, frames)]
    cache.choose(seen)
    view = View(Rope(DIM, GRID), Prope(DIM, GRID, cameras), seen, range(frames, frames + chunk))
    tokens = [drawn(chunk, 8000 + n, heads) for n in range(LAYERS)]
    text = tuple(x[:, :SIZE // 5] for x in drawn(1, 9000, heads)[:2])

    def walk(attention) -> list[torch.Tensor]:
        attend = WorldAttention(cache, view, attention=attention)
        return [out for number, part in enumerate(tokens) for out in attend(number, *part, text)]

    limit(cache, 0)
    whole = walk(flash)
    limit(cache, 2 * 2 * SIZE * 2 * DIM * DTYPE.itemsize * 9 if TINY else LIMITS[0])
    pieces = [walk(flash) for _ in range(3)]
    sync()
    compare(f"two branches{', offloaded' if offload else ''}, {len(seen)} of {frames} frames", whole, pieces)
    cache.free()


@section
def measure(label: str, cache: KVCache, attention, most: int, rounds: int) -> None:
    """Milliseconds a layer, and the allocator's peak above what is stored."""
    tokens = [drawn(CHUNK, 5000 + number) for number in range(LAYERS)]
    limit(cache, most)
    layer_pass(cache, tokens, attention)
    sync()
    times = []
    if not TINY:
        before = torch.cuda.memory_allocated() - cache.workspace.nbytes
        torch.cuda.reset_peak_memory_stats()
    for _ in range(rounds):
        begin = time.perf_counter()
        layer_pass(cache, tokens, attention)
        sync()
        times.append((time.perf_counter() - begin) * 1000 / LAYERS)
    peak = 0 if TINY else torch.cuda.max_memory_allocated() - before
    staged = cache.host.device_bytes / MIB if cache.host else 0
    say(f"{label}: {statistics.median(times):.3f} ms a layer (least {min(times):.3f}), workspace {cache.workspace.nbytes / MIB:.0f} MiB, "
        f"peak with activations {peak / MIB:.0f} MiB, offloaded spans on the device {staged:.1f} MiB")
    limit(cache, 0)


@section
def check_cudnn(cache: KVCache) -> None:
    """Whether cuDNN's log-sum-exp joins pieces as flash's does."""
    q, k, v = drawn(CHUNK, 1)
    (near, lse), (far, other) = flash_partial(q, k, v), cudnn_partial(q, k, v)
    say(f"cuDNN against flash: output {float((near - far).float().norm() / far.float().norm()):.1e}, "
        f"log-sum-exp {float((lse - other).abs().max()):.1e}, shape {tuple(other.shape)}")


@section
def check_fast(cache: KVCache) -> None:
    """Attention in eight bits, which reads on two streams with any limit: near to exact attention, and its repeats equal."""
    tokens = [drawn(CHUNK, 5000 + number) for number in range(LAYERS)]
    limit(cache, 0)
    exact = layer_pass(cache, tokens)
    for most in (0, LIMITS[0]):
        limit(cache, most)
        rough = [layer_pass(cache, tokens, eight_bits) for _ in range(4)]
        sync()
        errors = [float((a.float() - b.float()).norm() / a.float().norm()) for a, b in zip(exact, rough[0])]
        equal = all(torch.equal(a, b) for other in rough[1:] for a, b in zip(rough[0], other))
        if not equal or max(errors) > 0.06:
            failed.append("eight bits")
        say(f"{'ok   ' if equal and max(errors) <= 0.06 else 'WRONG'} eight bits, {most / MIB:.0f} MiB: relative error {max(errors):.1e}, "
            f"repeats {'equal' if equal else 'DIFFER'}")
    limit(cache, 0)


def main() -> None:
    if not TINY:
        say(torch.cuda.get_device_name(), "torch", torch.__version__)
    cache = filled("balanced")
    kinds = [("flash", flash)] if TINY else [("flash", flash), ("cudnn", cudnn)]
    for frames in LENGTHS:
        fill(cache, frames)
        sync()
        say(f"balanced filled to {frames} frames")
        check("balanced", cache)
        if frames == LENGTHS[0]:
            check_batch(cache)
            if not TINY:
                check_cudnn(cache)
        rounds = 7 if frames == LENGTHS[0] else 4
        measure(f"{frames} frames, whole", cache, flash, 0, rounds)
        for name, attention in kinds:
            for most in LIMITS:
                measure(f"{frames} frames, {most / MIB:.0f} MiB, {name}", cache, attention, most, rounds)
        measure(f"{frames} frames, whole again", cache, flash, 0, rounds)
    check("positions beyond a limit", cache, LENGTHS[0] // 2)
    long = cache
    for offload in (False, True):
        check_world(offload)
    for label, name, changes in (("offloaded", "balanced", {"offload": True}),
                                 ("window and sink", "smallest", {"window_frames": LENGTHS[0] - 12, "sink_frames": 3}),
                                 ("planes, offloaded window", "quality", {"offload": True, "window_frames": LENGTHS[0] - 9})):
        if late(label):
            continue
        other = filled(name, **changes)
        fill(other, LENGTHS[0] + 6)
        check(label, other)
        other.free()
    if not late("180 frames, offloaded"):
        other = filled("balanced", offload=True)
        fill(other, LENGTHS[-1])
        check("offloaded", other)
        measure(f"{LENGTHS[-1]} frames offloaded, whole", other, flash, 0, 3)
        measure(f"{LENGTHS[-1]} frames offloaded, {LIMITS[0] / MIB:.0f} MiB", other, flash, LIMITS[0], 3)
        other.free()
    check_fast(long)
    long.free()
    say("FAILED: " + ", ".join(failed) if failed else "all right")


with torch.no_grad():
    main()
sys.exit(bool(failed))
