"""A segment of the full-size LongCat-Video at 832 x 480: the pass over the given frames, then denoising steps that read its cache.

    qvg bench generate --model longcat [--small] [--out DIR] [--given 19] [--new 5] [--batch 2] [--rounds 5]

Weights are random (27 GB in bf16), which does not change timing and says nothing about quality. Measured are a bf16 cache whose keys are
stored after RoPE, which is faster to read than the original's; caches that are encoded layer by layer, attended to exactly or in eight bits
("fast"); and the released order, in which all layers are stored in bf16 and then encoded. Steps alternate with steps of the bf16 cache,
which therefore stays in memory. Bytes are the allocator's peak above what was held before the cache was made, minus what the same pass
needs without history. Each row is written as soon as it is measured. batch: conditions per pass. At full size at most about 63 GiB are
held: weights 25.3, bf16 cache 27.4.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..qvg.attention.cached import CachedAttention
from ..qvg.attention.functions import sdpa
from ..qvg.attention.rope import Rope, rotate
from ..qvg.cache.context import context_settings
from ..qvg.cache.geometry import Geometry
from ..qvg.cache.kv_cache import KVCache
from ..qvg.commands.arguments import whole
from ..qvg.models.longcat import LongCat, LongCatSizes
from ..qvg.settings import PRESETS, QVGSettings
from ..qvg.units import GIB
from .measure import add_places, claim, command_line, environment, progress, table, write
from .planes import PLANES

FULL = LongCatSizes(dim=4096, head_dim=128, ffn_dim=11008, layers=48, text_dim=4096)
SMALL = LongCatSizes(dim=64, head_dim=16, ffn_dim=64, layers=2, text_dim=16, time_dim=16, freq_dim=16)


@dataclass
class Scene:
    """A network, latents of the given frames [1, C, F, H, W] and of the new ones [B, C, f, H, W], and a prompt for each condition."""

    network: LongCat
    given: Tensor
    new: Tensor
    context: Tensor
    weights: int = 0
    step_bytes: int = 0
    pass_bytes: int = 0

    @property
    def geometry(self) -> Geometry:
        sizes = self.network.sizes
        return Geometry(sizes.layers, sizes.heads, sizes.head_dim, (self.new.shape[3] // 2, self.new.shape[4] // 2))

    @property
    def device(self) -> torch.device:
        return self.new.device

    @torch.no_grad()
    def step(self, attend) -> Tensor:
        return self.network(self.new, torch.full((self.new.shape[0],), 750.0, device=self.device), self.context, attend=attend)

    @torch.no_grad()
    def encode(self, attend) -> None:
        self.network.encode(self.given, attend)


class Bf16:
    """Keys (after RoPE) and values of every layer in the model's dtype, with space for the new frames after them."""

    name = "bf16 cache"

    def __init__(self, scene: Scene):
        geometry, given, new = scene.geometry, scene.given.shape[2], scene.new.shape[2]
        self.past = given * geometry.frame_tokens
        tokens = self.past + new * geometry.frame_tokens
        self.buffers = [torch.empty(2, 1, tokens, geometry.heads, geometry.head_dim, device=scene.device, dtype=scene.new.dtype)
                        for _ in range(geometry.layers)]
        rope = Rope(geometry.head_dim, geometry.grid)
        self.angles = [[part[:, None] for part in rope.tables(*span, scene.device)] for span in ((0, given), (given, new))]

    def store(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.buffers[layer]
        keys[:, :self.past], values[:, :self.past] = rotate(k, *self.angles[0]), v
        return sdpa(rotate(q, *self.angles[0]), keys[:, :self.past], v)

    def read(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.buffers[layer]
        q, k = rotate(q, *self.angles[1]), rotate(k, *self.angles[1])
        outs = []
        for part in range(q.shape[0]):
            own = slice(part, part + 1)
            keys[:, self.past:], values[:, self.past:] = k[own], v[own]
            outs.append(sdpa(q[own], keys, values))
        return torch.cat(outs)

    def finish(self) -> None:
        pass

    def bytes_held(self) -> int:
        return sum(buffer[:, :, :self.past].nbytes for buffer in self.buffers)


class Encoded:
    """A quantized cache, encoded while the pass over the given frames is at each layer."""

    def __init__(self, scene: Scene, settings: QVGSettings, name: str = ""):
        geometry, self.given, self.new = scene.geometry, scene.given.shape[2], scene.new.shape[2]
        self.name = name or f"qvg {settings.name}"
        self.cache = KVCache(
            context_settings(settings, geometry, self.given, self.new), layers=geometry.layers, heads=geometry.heads,
            head_dim=geometry.head_dim, grid=geometry.grid, rope=Rope, device=scene.device, dtype=scene.new.dtype,
            max_frames=self.given + self.new)
        self.store = CachedAttention(self.cache, start_frame=0, frames=self.given, store=True, newest=self.cache.settings.recent_frames)

    @property
    def read(self) -> CachedAttention:
        return CachedAttention(self.cache, start_frame=self.given, frames=self.new, store=False)

    def finish(self) -> None:
        pass

    def bytes_held(self) -> int:
        return self.cache.stats().stored_bytes


class EncodedAfterwards(Encoded):
    """The released order: keys and values of all layers in bf16, encoded after the pass."""

    name = "paper, all layers in bf16 first"

    def __init__(self, scene: Scene):
        super().__init__(scene, PRESETS["paper"], self.name)
        self.raw: list[tuple[Tensor, Tensor]] = []
        turn_only = self.store
        turn_only.store = False

        def store(layer, q, k, v):
            self.raw.append((k.clone(), v.clone()))
            return turn_only(layer, q, k, v)

        self.store = store

    def finish(self) -> None:
        for layer in self.cache.layers:
            layer.append(*self.raw.pop(0), self.given)


def make(device: torch.device, small: bool, given: int, new: int, batch: int) -> Scene:
    sizes, grid, words = (SMALL, (4, 6), 8) if small else (FULL, (30, 52), 512)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        network = LongCat(sizes, dtype=dtype).requires_grad_(False).eval()
        shape = 2 * grid[0], 2 * grid[1]
        scene = Scene(network, torch.randn(1, sizes.channels, given, *shape, dtype=dtype),
                      torch.randn(batch, sizes.channels, new, *shape, dtype=dtype), torch.randn(batch, words, sizes.text_dim, dtype=dtype))
    if device.type == "cuda":
        settle(scene)
        scene.weights = torch.cuda.memory_allocated()
        # memory of the passes alone: attention without history, and nothing stored
        alone = CachedAttention(KVCache(PRESETS["off"], layers=sizes.layers, heads=sizes.heads, head_dim=sizes.head_dim, grid=grid,
                                        rope=Rope, device=device), start_frame=0, frames=new, store=False)
        scene.step_bytes = peak(scene, lambda: scene.step(alone))
        whole = CachedAttention(alone.cache, start_frame=0, frames=given, store=False)
        scene.pass_bytes = peak(scene, lambda: scene.encode(whole))
    return scene


def settle(scene: Scene) -> None:
    gc.collect()
    if scene.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def peak(scene: Scene, function) -> int:
    return timed(scene, function)[1] - scene.weights


def timed(scene: Scene, function) -> tuple[float, int]:
    """Milliseconds, and the peak of allocated bytes."""
    cuda = scene.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    function()
    if cuda:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began), torch.cuda.max_memory_allocated() if cuda else 0


def stored(scene: Scene, make_method: Callable) -> tuple[object, dict]:
    """A cache filled by the pass over the given frames, and the row with its cost."""
    settle(scene)
    before = torch.cuda.memory_allocated() if scene.device.type == "cuda" else 0
    method = make_method(scene)

    def encode() -> None:
        scene.encode(method.store)
        method.finish()

    milliseconds, most = timed(scene, encode)
    return method, {"method": method.name, "pass_ms": milliseconds, "pass_peak_bytes": max(0, most - before - scene.pass_bytes),
                    "held_bytes": method.bytes_held(), "before_bytes": before}


def stepped(scene: Scene, method, row: dict, rounds: int, reference: Bf16) -> dict:
    """The row with denoising steps, each measured after one of the reference."""
    for kind in (reference, method):
        scene.step(kind.read)
    own, theirs = [], []
    for _ in range(rounds):
        theirs.append(timed(scene, lambda: scene.step(reference.read)))
        own.append(timed(scene, lambda: scene.step(method.read)))
    step, bf16 = (statistics.median(milliseconds for milliseconds, _ in found) for found in (own, theirs))
    return row | {
        "step_ms": step, "step_ms_all": [ms for ms, _ in own], "bf16_step_ms": bf16, "bf16_step_ms_all": [ms for ms, _ in theirs],
        "overhead_percent": 100 * (step / bf16 - 1),
        "step_peak_bytes": max(0, max(most for _, most in own) - row["before_bytes"] - scene.step_bytes)}


class Report:
    """The rows; each is written as soon as it is measured."""

    def __init__(self, options, scene: Scene, arguments: list[str]):
        self.options, self.scene, self.arguments = options, scene, arguments
        self.rows: list[dict] = []

    def add(self, row: dict) -> None:
        self.rows.append(row)
        self.write(show=False)
        said = row.get("error") or ", ".join([
            f"pass {row['pass_ms']:.0f} ms, peak {row['pass_peak_bytes'] / GIB:.2f} GiB, held {row['held_bytes'] / GIB:.2f} GiB",
            *([f"step {row['step_ms']:.1f} ms, alternating with {row['bf16_step_ms']:.1f} ms of bf16 ({row['overhead_percent']:+.1f} %), "
               f"peak {row['step_peak_bytes'] / GIB:.2f} GiB"] if "step_ms" in row else [])])
        progress(f"{row['method']}: {said}")

    def write(self, show: bool = True) -> None:
        options, scene = self.options, self.scene
        columns = ("method", "pass ms", "step ms", "bf16 step ms", "overhead %", "peak of the pass GiB", "peak of a step GiB", "held GiB")
        text = table(columns, [(
            row["method"], *(row.get(key) for key in ("pass_ms", "step_ms", "bf16_step_ms", "overhead_percent")),
            *(row[key] / GIB if key in row else row.get("error") for key in ("pass_peak_bytes", "step_peak_bytes", "held_bytes")))
            for row in self.rows])
        head = (f"{options.given} given and {options.new} new latent frames, {options.batch} conditions, weights {scene.weights / GIB:.1f} "
                f"GiB; without history the pass needs {scene.pass_bytes / GIB:.2f} GiB, a step {scene.step_bytes / GIB:.2f} GiB")
        write(options.out, "generate-longcat", {
            "environment": environment(scene.device, command_line("generate --model longcat", self.arguments)), "given": options.given,
            "new": options.new, "batch": options.batch, "weights_bytes": scene.weights, "step_bytes": scene.step_bytes,
            "pass_bytes": scene.pass_bytes, "rows": self.rows}, f"{head}\n\n{text}", show=show)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="qvg bench generate --model longcat", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny network, to see that it runs")
    parser.add_argument("--given", type=whole(1, 999), default=19, help="latent frames that the segment continues")
    parser.add_argument("--new", type=whole(1, 999), default=5, help="latent frames that it adds")
    parser.add_argument("--batch", type=whole(1, 64), default=2, help="conditions in a pass: 2 with guidance, 1 with the distillation LoRA")
    parser.add_argument("--rounds", type=whole(1, 10000), default=5)
    add_places(parser)
    options = parser.parse_args(arguments)
    claim(options, "generate-longcat")
    scene = make(torch.device(options.device), options.small, options.given, options.new, options.batch)
    report = Report(options, scene, arguments)

    def measure(make_method: Callable, name: str, reference: Bf16 | None) -> None:
        """One row; without a reference, one is made after the pass."""
        try:
            method, row = stored(scene, make_method)
            if reference is None:
                reference = stored(scene, Bf16)[0]
            report.add(stepped(scene, method, row, options.rounds, reference))
        except torch.OutOfMemoryError as error:
            report.add({"method": name, "error": str(error).splitlines()[0]})

    reference, row = stored(scene, Bf16)
    report.add(stepped(scene, reference, row, options.rounds, reference))
    exact = [replace(settings, attention="exact") for settings in (
        PRESETS["balanced"], PLANES["balanced"], PRESETS["smallest"], PRESETS["quality"])]
    for settings in (*exact, *(replace(PRESETS[name], attention="fast") for name in ("balanced", "smallest"))):
        name = f"qvg {settings.name}" + (", fast" if settings.attention == "fast" else "")
        measure(partial(Encoded, settings=settings, name=name), name, reference)
    # the released order needs the reference's memory for its own bf16 layers
    del reference
    measure(EncodedAfterwards, EncodedAfterwards.name, None)
    report.write()
