"""A chunk of the full-size HY-WorldPlay: the pass over its context and four denoising steps, in the original's order and with each memory.

    qvg bench generate --model hy-worldplay-8b [--small] [--out DIR] [--history 48] [--rounds 2] [--only rebuild bank]

Weights are random (16 GiB of the 8B in bf16, 10 of the 5B), which does not change timing and says nothing about quality; what a memory has
stored before the chunk is clusters of tokens. In the original's order, a context pass stores the keys and values of both branches in bf16,
and each step copies them in front of the chunk's own. A second row writes everything in place instead, which the original does not. All
use the same functions for RoPE, PRoPE and attention (torch's). *rebuild*, *append* and *bank* are those of `video.world`: the context pass
or the pass that stores the finished chunk, and choosing the next frames meanwhile. *append* has stored as many frames as the others read.

Every method first makes the chunk alone, to count bytes: the allocator's peak above what was held before the method was made, less what
the same passes need without history. Then all make it in turn; times are medians, and the relation to the original's order is the median
of rounds. At full size at most about 85 GiB are held.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..qvg.attention.functions import sdpa
from ..qvg.attention.prope import Prope, Turn
from ..qvg.attention.rope import NoRope, Rope
from ..qvg.attention.world import View, WorldAttention
from ..qvg.cache.geometry import Geometry
from ..qvg.cache.kv_cache import KVCache
from ..qvg.commands.arguments import whole
from ..qvg.models.hunyuan_layers import HunyuanSizes
from ..qvg.models.worldplay_hunyuan import HunyuanRope, WorldPlayHunyuan
from ..qvg.models.worldplay_wan import WorldWan, WorldWanSizes
from ..qvg.settings import PRESETS, QVGSettings
from ..qvg.units import GIB
from ..qvg.video.camera_moves import walk
from ..qvg.video.cameras import CameraPath
from ..qvg.video.view_memory import WORLDPLAY_5B, WORLDPLAY_8B, ViewMemory
from ..qvg.video.world import (
    CHUNK,
    CONTEXT_TIMESTEP,
    DISTILLED,
    DISTILLED_8B,
    HunyuanScene,
    Scene,
    WanScene,
    WorldCondition,
    WorldModel,
    walk_cache,
)
from .kernels import Case, tokens
from .longcat import settle, timed
from .measure import add_places, claim, command_line, environment, progress, table, write

TIMESTEPS = 1000
SMALL_GRID = (4, 6)


@dataclass
class Setup:
    """A network with its inputs, and the chunk that every method makes. history: latents [1, C, F, h, w] of the frames before it, on the
    CPU; noise: [1, C, 4, h, w]. weights: bytes. pass_bytes, step_bytes: what the context pass and a step need without history."""

    scene: Scene
    geometry: Geometry
    views: ViewMemory
    rope: Callable[[int, tuple[int, int]], Rope]
    sigmas: Sequence[float]
    path: CameraPath
    history: Tensor
    noise: Tensor
    weights: int = 0
    pass_bytes: int = 0
    step_bytes: int = 0

    @property
    def device(self) -> torch.device:
        return self.noise.device

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def first(self) -> int:
        """The first latent frame of the chunk."""
        return self.history.shape[2]

    @property
    def new(self) -> range:
        return range(self.first, self.first + CHUNK)

    @torch.no_grad()
    def encode(self, frames: Sequence[int], attend) -> None:
        x = self.history[:, :, list(frames)].to(self.device, self.dtype)
        self.scene.encode(x, torch.full((1, len(frames)), CONTEXT_TIMESTEP, device=self.device), frames, attend)

    @torch.no_grad()
    def step(self, sigma: float, attend) -> Tensor:
        return self.scene.flow(self.noise.to(self.dtype), torch.full((1, CHUNK), TIMESTEPS * sigma, device=self.device), self.new, attend)


class Original:
    """Keys and values of both branches in the model's dtype, stacked on the batch axis. Each step copies the text, those of the context and
    the chunk's own together."""

    name = "original's order, bf16"

    def __init__(self, setup: Setup):
        self.setup, geometry = setup, setup.geometry
        self.rope = setup.rope(geometry.head_dim, geometry.grid)
        self.prope = Prope(geometry.head_dim, geometry.grid, setup.path.cameras, setup.path.intrinsics)
        self.kept: list[tuple[Tensor, Tensor]] = []
        self.frames = setup.views.select(setup.path, setup.first)

    def context(self) -> None:
        self.forget()
        self.angles = self.tables(0, len(self.frames))
        self.setup.encode(self.frames, self.store)
        self.angles = self.tables(len(self.frames), CHUNK)

    def forget(self) -> None:
        self.kept.clear()

    def tables(self, first: int, frames: int) -> list[Tensor]:
        return [part[:, None] for part in self.rope.tables(first, frames, self.setup.device)]

    def step(self, sigma: float) -> Tensor:
        return self.setup.step(sigma, self.read)

    def finish(self) -> None:
        pass

    def rewind(self) -> None:
        pass

    def branches(self, q: Tensor, k: Tensor, v: Tensor, frames: Sequence[int]) -> list[Tensor]:
        """q, k and v [1, T, H, D] after RoPE and after PRoPE, [2, T, H, D] each."""
        turned, turned_keys, far_keys, far_values = (torch.empty_like(x) for x in (q, k, k, v))
        far = self.prope.queries(q, frames, turn=Turn(*self.angles, turned))
        self.prope.keys_values(k, v, frames, (far_keys, far_values), Turn(*self.angles, turned_keys))
        return [torch.cat(pair) for pair in ((turned, far), (turned_keys, far_keys), (v, far_values))]

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, text, frames: Sequence[int]) -> tuple[Tensor, Tensor]:
        if text is not None:
            keys, values = (torch.cat([part.expand(2, -1, -1, -1), x], 1) for part, x in zip(text, (keys, values)))
        near, far = sdpa(q, keys, values).chunk(2)
        return near, self.prope.outputs(far, frames)

    def store(self, layer: int, q: Tensor, k: Tensor, v: Tensor, text=None) -> tuple[Tensor, Tensor]:
        q, *pair = self.branches(q, k, v, self.frames)
        self.kept.append(tuple(pair))
        return self.attend(q, *pair, text, self.frames)

    def read(self, layer: int, q: Tensor, k: Tensor, v: Tensor, text=None) -> tuple[Tensor, Tensor]:
        q, *own = self.branches(q, k, v, self.setup.new)
        keys, values = (torch.cat(pair, 1) for pair in zip(self.kept[layer], own))
        return self.attend(q, keys, values, text, self.setup.new)

    def bytes_held(self) -> int:
        return sum(x.nbytes for pair in self.kept for x in pair)


class InPlace(Original):
    """The same with space for text and chunk around the context of every layer, so that nothing is copied twice."""

    name = "both branches in bf16, in place"

    def forget(self) -> None:
        """The buffers stay."""

    def attend_in_place(self, layer: int, q: Tensor, k: Tensor, v: Tensor, text, frames: Sequence[int], past: int) -> tuple:
        lead, end = 0 if text is None else text[0].shape[1], past + k.shape[1]
        if len(self.kept) <= layer:
            self.kept.append(tuple(k.new_empty(2, lead + end + CHUNK * self.setup.geometry.frame_tokens, *k.shape[2:]) for _ in range(2)))
        buffers = [buffer[:, :lead + end] for buffer in self.kept[layer]]
        (keys, far_keys), (values, far_values) = (buffer[:, lead + past:].split(1) for buffer in buffers)
        turned = torch.empty_like(q)
        far = self.prope.queries(q, frames, turn=Turn(*self.angles, turned))
        self.prope.keys_values(k, v, frames, (far_keys, far_values), Turn(*self.angles, keys))
        values[:] = v
        if lead and not past:
            for buffer, part in zip(buffers, text):
                buffer[:, :lead] = part
        near, far = (sdpa(q, *(buffer[number:number + 1] for buffer in buffers)) for number, q in enumerate((turned, far)))
        return near, self.prope.outputs(far, frames)

    def store(self, layer: int, q: Tensor, k: Tensor, v: Tensor, text=None) -> tuple[Tensor, Tensor]:
        return self.attend_in_place(layer, q, k, v, text, self.frames, 0)

    def read(self, layer: int, q: Tensor, k: Tensor, v: Tensor, text=None) -> tuple[Tensor, Tensor]:
        return self.attend_in_place(layer, q, k, v, text, self.setup.new, len(self.frames) * self.setup.geometry.frame_tokens)


class Memory:
    """One of the memories of `video.world`."""

    def __init__(self, setup: Setup, memory: str, settings: QVGSettings, overlap: bool = True):
        self.name = f"{memory}, {settings.name}" + ("" if overlap else ", one stream") + (", offloaded" if settings.offload else "")
        if memory == "append":
            # what it reads is all that it holds
            setup = replace(setup, history=setup.history[:, :, :setup.views.window])
        self.setup, geometry = setup, setup.geometry
        cache = walk_cache(settings, geometry, memory=memory, views=setup.views, frames=setup.new.stop, device=setup.device,
                           dtype=setup.dtype)
        if not overlap:
            cache.workspace.side = None
        self.model = WorldModel([WorldCondition(setup.scene, cache)], setup.path, memory=memory, views=setup.views, rope=setup.rope)
        self.model.latents = [setup.history]
        if memory != "rebuild":
            case = Case("", CHUNK, CHUNK, geometry.heads, geometry.head_dim, geometry.grid)
            pair = [tokens(case, CHUNK, setup.device, seed).to(setup.dtype) for seed in (0, 1)]
            for _ in range(0, setup.first, CHUNK):
                for layer in cache.layers:
                    layer.append(*pair, CHUNK)

    def context(self) -> None:
        with torch.no_grad():
            self.model._prepare(self.setup.new)

    def step(self, sigma: float) -> Tensor:
        return self.model.denoise(self.setup.noise, sigma, self.setup.first, prompt_frame=0, store=False)

    def finish(self) -> None:
        self.model.denoise(self.setup.noise, 0.0, self.setup.first, prompt_frame=0, store=True)

    def rewind(self) -> None:
        self.held = self.model.stats().stored_bytes
        self.model.rewind(self.setup.first)
        if self.model.memory != "append":
            # as the chunk before does while the device computes; this chunk does it for the next one
            self.model._select(self.setup.new)

    def bytes_held(self) -> int:
        """After the chunk that was made last."""
        return self.held


def hunyuan(small: bool, device: torch.device, dtype: torch.dtype, path: CameraPath) -> tuple[Scene, dict]:
    sizes = HunyuanSizes(dim=64, head_dim=16, ffn_dim=64, layers=2, text_dim=16, glyph_dim=16, glyph_hidden=16, image_dim=16, freq_dim=16) \
        if small else HunyuanSizes(dim=2048, head_dim=128, ffn_dim=8192, layers=54)
    words, places, grid = (3, 4, SMALL_GRID) if small else (271, 729, (30, 52))
    network = WorldPlayHunyuan(sizes, dtype=dtype).requires_grad_(False).eval()
    with torch.no_grad():
        text = network.text(torch.randn(1, words, sizes.text_dim, dtype=dtype), image=torch.randn(1, places, sizes.image_dim, dtype=dtype))
    image = torch.randn(1, sizes.channels, 1, *grid, dtype=dtype)
    return HunyuanScene(network, text, path.actions, image), {
        "geometry": Geometry(sizes.layers, sizes.heads, sizes.head_dim, grid), "views": WORLDPLAY_8B, "rope": HunyuanRope,
        "sigmas": DISTILLED_8B, "channels": sizes.channels, "size": grid}


def wan(small: bool, device: torch.device, dtype: torch.dtype, path: CameraPath) -> tuple[Scene, dict]:
    sizes = WorldWanSizes(dim=256, ffn_dim=64, layers=2, text_dim=16) if small else WorldWanSizes(dim=3072, ffn_dim=14336, layers=30,
                                                                                                 text_dim=4096)
    words, grid = (3, SMALL_GRID) if small else (512, (22, 40))
    network = WorldWan(sizes, dtype=dtype).requires_grad_(False).eval()
    with torch.no_grad():
        prompt = network.project_context(torch.randn(1, words, sizes.text_dim, dtype=dtype))
    size = tuple(2 * side for side in grid)
    image = torch.randn(1, sizes.channels, 1, *size, dtype=dtype)
    return WanScene(network, prompt, path.actions, image), {
        "geometry": Geometry(sizes.layers, sizes.dim // sizes.head_dim, sizes.head_dim, grid), "views": WORLDPLAY_5B, "rope": Rope,
        "sigmas": DISTILLED, "channels": sizes.channels, "size": size}


NETWORKS = {"hy-worldplay-8b": hunyuan, "hy-worldplay-5b": wan}


def make(model: str, device: torch.device, small: bool, history: int) -> Setup:
    """history: latent frames before the chunk."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    path = walk(f"right-{history // 2}, left-{history}").resized(history + 2 * CHUNK)
    with torch.device(device):
        scene, found = NETWORKS[model](small, device, dtype, path)
        channels, size = found.pop("channels"), found.pop("size")
        noise = torch.randn(1, channels, CHUNK, *size)
    setup = Setup(scene, path=path, history=torch.randn(1, channels, history, *size), noise=noise, **found)
    if device.type == "cuda":
        settle(setup)
        setup.weights = torch.cuda.memory_allocated()
        frames = setup.views.select(path, history)
        setup.pass_bytes = alone(setup, frames, lambda attend: setup.encode(frames, attend))
        setup.step_bytes = alone(setup, setup.new, lambda attend: setup.step(1.0, attend))
        settle(setup)
    return setup


def alone(setup: Setup, frames: Sequence[int], function: Callable) -> int:
    """Bytes that a pass needs without history, and without the workspace in which its own keys and values attend."""
    geometry = setup.geometry
    cache = KVCache(PRESETS["off"], layers=geometry.layers, heads=geometry.heads, head_dim=geometry.head_dim, grid=geometry.grid,
                    rope=NoRope, branches=2, device=setup.device, dtype=setup.dtype, max_frames=len(frames))
    prope = Prope(geometry.head_dim, geometry.grid, setup.path.cameras, setup.path.intrinsics)
    attend = WorldAttention(cache, View(setup.rope(geometry.head_dim, geometry.grid), prope, [], frames))
    _, most = timed(setup, lambda: function(attend))
    return most - setup.weights - cache.workspace.nbytes


def peaks(setup: Setup, method) -> int:
    """The largest peak of one chunk, which is then forgotten, less what its passes need without history."""
    _, most = timed(setup, method.context)
    steps = [timed(setup, lambda: method.step(sigma))[1] for sigma in setup.sigmas[:-1]]  # noqa: B023
    _, last = timed(setup, method.finish)
    method.rewind()
    return max(most - setup.pass_bytes, *(step - setup.step_bytes for step in steps), last - setup.step_bytes)


def chunk(setup: Setup, method) -> dict:
    """Milliseconds of one chunk, which is then forgotten: the whole, and its parts where the device has reached them."""
    marks = [mark(setup)]
    began = time.perf_counter()
    for part in (method.context, *(partial(method.step, sigma) for sigma in setup.sigmas[:-1]), method.finish):
        part()
        marks.append(mark(setup))
    if setup.device.type == "cuda":
        torch.cuda.synchronize()
    chunk_ms = 1e3 * (time.perf_counter() - began)
    method.rewind()
    context, *steps, finish = [between(*pair) for pair in zip(marks, marks[1:])]
    return {"context_ms": context, "step_ms": steps, "finish_ms": finish, "chunk_ms": chunk_ms}


def mark(setup: Setup):
    if setup.device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(first, second) -> float:
    return 1e3 * (second - first) if isinstance(first, float) else first.elapsed_time(second)


KINDS = {
    "original": Original, "in-place": InPlace,
    **{memory: lambda setup, memory=memory: Memory(setup, memory, PRESETS["balanced"]) for memory in ("rebuild", "append", "bank")},
    **{f"{memory}-one-stream": lambda setup, memory=memory: Memory(setup, memory, PRESETS["balanced"], overlap=False)
       for memory in ("rebuild", "bank")},
    "bank-smallest": lambda setup: Memory(setup, "bank", PRESETS["smallest"]),
    "bank-offload": lambda setup: Memory(setup, "bank", replace(PRESETS["balanced"], offload=True)),
}
DEFAULT = ("original", "in-place", "rebuild", "append", "bank", "rebuild-one-stream", "bank-one-stream")


def compare(setup: Setup, kinds: Sequence[str], rounds: int, note: Callable[[list[dict]], None]) -> list[dict]:
    """A row for each kind, the original's order first. note: called with the rows whenever they have changed."""
    methods, rows = [], []
    for kind in ("original", *(kind for kind in kinds if kind != "original")):
        settle(setup)
        before = torch.cuda.memory_allocated() if setup.device.type == "cuda" else 0
        try:
            method = KINDS[kind](setup)
            most = peaks(setup, method)
        except torch.OutOfMemoryError as error:
            progress(f"{kind} does not fit: {str(error).splitlines()[0]}")
            continue
        rows.append({"method": method.name, "held_bytes": method.bytes_held(), "peak_bytes": max(0, most - before), "rounds": []})
        methods.append(method)
        progress(f"{method.name}: peak {rows[-1]['peak_bytes'] / GIB:.2f} GiB, held {rows[-1]['held_bytes'] / GIB:.2f} GiB")
    for number in range(rounds):
        # the order is reversed every second time, because a device's clock falls as it warms up
        for place in range(len(methods))[::-1 if number % 2 else 1]:
            rows[place]["rounds"].append(chunk(setup, methods[place]))
        for row in rows:
            summarize(row, rows[0])
        note(rows)
    return rows


def summarize(row: dict, original: dict) -> None:
    row |= {f"{part}_ms": statistics.median(found[f"{part}_ms"] for found in row["rounds"]) for part in ("context", "finish", "chunk")}
    row["step_ms"] = statistics.median(ms for found in row["rounds"] for ms in found["step_ms"])
    row["relative_percent"] = 100 * statistics.median(
        own["chunk_ms"] / theirs["chunk_ms"] for own, theirs in zip(row["rounds"], original["rounds"]))
    row["ratio"] = original["peak_bytes"] / row["peak_bytes"] if row["peak_bytes"] else None


def main(arguments: list[str], model: str) -> None:
    parser = argparse.ArgumentParser(prog=f"qvg bench generate --model {model}", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny network, to see that it runs")
    parser.add_argument("--history", type=whole(24, 9999), default=48, help="latent frames before the chunk, a multiple of 4")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(DEFAULT), help="methods beside the original's order")
    parser.add_argument("--rounds", type=whole(1, 10_000), default=2, help="chunks of each method, in turn")
    add_places(parser)
    options = parser.parse_args(arguments)
    if options.history % CHUNK:
        parser.error(f"--history is {options.history}, but chunks are of {CHUNK} latent frames; give a multiple of {CHUNK}")
    name = f"generate-{model}"
    claim(options, name)
    setup = make(model, torch.device(options.device), options.small, options.history)
    progress(f"weights {setup.weights / GIB:.1f} GiB; without history the context pass needs {setup.pass_bytes / GIB:.2f} GiB, a step "
             f"{setup.step_bytes / GIB:.2f} GiB")

    def note(rows: list[dict], show: bool = False) -> None:
        columns = ("method", "context ms", "step ms", "storing ms", "chunk ms", "% of the original's", "peak GiB", "held GiB",
                   "peak, times less")
        text = table(columns, [(row["method"], *(row[key] for key in (
            "context_ms", "step_ms", "finish_ms", "chunk_ms", "relative_percent")),
            row["peak_bytes"] / GIB, row["held_bytes"] / GIB, row["ratio"]) for row in rows])
        head = (f"{options.history} latent frames before the chunk, of which {setup.views.window} are read; weights "
                f"{setup.weights / GIB:.1f} GiB; without history the context pass needs {setup.pass_bytes / GIB:.2f} GiB, a step "
                f"{setup.step_bytes / GIB:.2f} GiB")
        write(options.out, name, {
            "environment": environment(setup.device, command_line(f"generate --model {model}", arguments)), "history": options.history,
            "weights_bytes": setup.weights, "pass_bytes": setup.pass_bytes, "step_bytes": setup.step_bytes, "rows": rows},
            f"{head}\n\n{text}", show=show)

    note(compare(setup, options.only, options.rounds, note), show=True)
