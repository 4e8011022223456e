"""A segment of the full-size LongCat-Video at 832 x 480: the pass over the given frames, then denoising steps that read its cache.

    qvg bench generate --model longcat [--small] [--out DIR] [--given 19] [--new 5] [--batch 2] [--rounds 5]

Weights are random (27 GB in bf16), which changes no timing and says nothing of quality. Measured are a bf16 cache whose keys are turned
before they are stored, which is quicker to read than the original's; the released order, in which all layers are stored in bf16 and then
encoded; and caches that are encoded layer by layer. bf16 is measured first and last, and overhead is against the mean of the two. Bytes
are the allocator's peak in each part, less weights and less what the same pass needs without any history. batch: conditions in a pass.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..qvg.attention import CachedAttention, sdpa
from ..qvg.budget import GIB, Geometry
from ..qvg.cache import KVCache
from ..qvg.context import context_settings
from ..qvg.models.longcat import LongCat, LongCatSizes
from ..qvg.rope import Rope, rotate
from ..qvg.settings import PRESETS, QVGSettings
from .measure import command_line, environment, progress, table, write

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
    def step(self, attend) -> None:
        self.network(self.new, torch.full((self.new.shape[0],), 750.0, device=self.device), self.context, attend=attend)

    @torch.no_grad()
    def encode(self, attend) -> None:
        self.network.encode(self.given, attend)


class Bf16:
    """Keys, turned, and values of every layer as they are, with room for the new frames behind them."""

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
        return sum(buffer.nbytes for buffer in self.buffers)


class Encoded:
    """A quantized cache, encoded while the pass over the given frames is at each layer."""

    def __init__(self, scene: Scene, settings: QVGSettings):
        geometry, self.given, self.new = scene.geometry, scene.given.shape[2], scene.new.shape[2]
        self.name = f"qvg {settings.name}"
        self.cache = KVCache(
            context_settings(settings, geometry, self.given, self.new), layers=geometry.layers, heads=geometry.heads,
            head_dim=geometry.head_dim, grid=geometry.grid, device=scene.device, dtype=scene.new.dtype, max_frames=self.given + self.new)
        self.store = CachedAttention(self.cache, start_frame=0, frames=self.given, store=True)

    @property
    def read(self) -> CachedAttention:
        return CachedAttention(self.cache, start_frame=self.given, frames=self.new, store=False)

    def finish(self) -> None:
        pass

    def bytes_held(self) -> int:
        return self.cache.stats().stored_bytes


class EncodedAfterwards(Encoded):
    """The released order: every layer's keys and values in bf16, and when the pass is done, encoded."""

    def __init__(self, scene: Scene):
        super().__init__(scene, PRESETS["paper"])
        self.name = "paper, all layers in bf16 first"
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
        settle()
        scene.weights = torch.cuda.memory_allocated()
        # what the passes need by themselves: attention without history, and nothing stored
        alone = CachedAttention(KVCache(PRESETS["off"], layers=sizes.layers, heads=sizes.heads, head_dim=sizes.head_dim, grid=grid,
                                        device=device), start_frame=0, frames=new, store=False)
        scene.step_bytes = peak(scene, lambda: scene.step(alone))
        whole = CachedAttention(alone.cache, start_frame=0, frames=given, store=False)
        scene.pass_bytes = peak(scene, lambda: scene.encode(whole))
    return scene


def settle() -> None:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def peak(scene: Scene, function) -> int:
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - scene.weights


def timed(scene: Scene, function) -> tuple[float, int]:
    """Milliseconds and peak bytes above the weights."""
    cuda = scene.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    function()
    if cuda:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began), torch.cuda.max_memory_allocated() - scene.weights if cuda else 0


def measure(scene: Scene, method, rounds: int) -> dict:
    def first() -> None:
        scene.encode(method.store)
        method.finish()

    pass_ms, pass_peak = timed(scene, first)
    scene.step(method.read)
    steps = [timed(scene, lambda: scene.step(method.read)) for _ in range(rounds)]
    found = {
        "method": method.name, "pass_ms": pass_ms, "step_ms": statistics.median(ms for ms, _ in steps),
        "step_ms_all": [ms for ms, _ in steps], "pass_peak_bytes": max(0, pass_peak - scene.pass_bytes),
        "step_peak_bytes": max(0, max(count for _, count in steps) - scene.step_bytes), "held_bytes": method.bytes_held()}
    progress(f"{method.name}: pass {pass_ms:.0f} ms, step {found['step_ms']:.1f} ms, held {found['held_bytes'] / GIB:.2f} GiB, peak "
             f"{found['pass_peak_bytes'] / GIB:.2f} and {found['step_peak_bytes'] / GIB:.2f} GiB")
    return found


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="qvg bench generate --model longcat", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny network, to see that it runs")
    parser.add_argument("--given", type=int, default=19, help="latent frames that the segment continues")
    parser.add_argument("--new", type=int, default=5, help="latent frames that it adds")
    parser.add_argument("--batch", type=int, default=2, help="conditions in a pass: 2 with guidance, 1 with the distillation LoRA")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("qvg-bench"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    scene = make(device, options.small, options.given, options.new, options.batch)
    methods = [Bf16, *(lambda scene, name=name: Encoded(scene, PRESETS[name]) for name in ("balanced", "smallest", "quality")),
               EncodedAfterwards, Bf16]
    rows = []
    for make_method in methods:
        try:
            rows.append(measure(scene, make_method(scene), options.rounds))
        except torch.OutOfMemoryError as error:
            rows.append({"method": getattr(make_method, "name", "?"), "error": str(error).splitlines()[0]})
        if device.type == "cuda":
            settle()
    base = statistics.mean(row["step_ms"] for row in rows if row["method"] == Bf16.name and "step_ms" in row)
    for row in rows:
        if "step_ms" in row:
            row["overhead_percent"] = 100 * (row["step_ms"] / base - 1)
    columns = ("method", "pass ms", "step ms", "overhead %", "peak of the pass GiB", "peak of a step GiB", "held GiB")
    text = table(columns, [(
        row["method"], *(row.get(key) for key in ("pass_ms", "step_ms", "overhead_percent")),
        *(row[key] / GIB if key in row else row.get("error") for key in ("pass_peak_bytes", "step_peak_bytes", "held_bytes")))
        for row in rows])
    head = f"{options.given} given and {options.new} new latent frames, {options.batch} conditions"
    write(options.out, "generate-longcat", {
        "environment": environment(device, command_line("generate --model longcat", arguments)), "given": options.given, "new": options.new,
        "batch": options.batch, "weights_bytes": scene.weights, "step_bytes": scene.step_bytes, "pass_bytes": scene.pass_bytes,
        "rows": rows}, f"{head}\n\n{text}")
