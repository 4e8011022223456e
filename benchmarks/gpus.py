"""The full-size causal Wan 1.3B, or LongCat-Video, by several GPUs together, against one of them.

    qvg bench generate --gpus 2 [--small] [--contexts 180] [--rounds 3] [--preset balanced]
    qvg bench generate --gpus 2 --model longcat [--small] [--given 19] [--new 5] [--batch 2] [--rounds 3]

Every GPU is a process, which computes a share of each frame's tokens and keeps the history of a share of the heads (`attention.ranks`).
Measured are a chunk of the causal Wan, which is four noisy passes and the one that stores, and a denoising step of LongCat-Video, as in
`benchmarks.generate` and `benchmarks.longcat`; weights are random, which does not change timing. The first process makes it alone and then
with the others, in turns, so that a clock that changes changes both. Its own clock counts, from when all are ready to when all are done.
On a CPU (`--device cpu`) the same runs over Gloo, to see that it works.

A process that ends early ends the measurement with its reason, and so does `--limit`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from ..qvg.attention.cached import CachedAttention
from ..qvg.attention.ranks import Cut, Ranks, ShardedAttention
from ..qvg.attention.rope import Rope
from ..qvg.cache.context import context_settings
from ..qvg.cache.geometry import Geometry
from ..qvg.cache.kv_cache import KVCache
from ..qvg.commands.arguments import whole
from ..qvg.settings import PRESETS
from ..qvg.units import GIB
from ..qvg.video import SELF_FORCING_SIGMAS
from . import longcat
from .measure import add_places, claim, command_line, environment, progress, table, write

CHUNK = 3
# seconds after which a process gives up waiting for another
PATIENCE = 600


@dataclass(frozen=True)
class Wanted:
    """What is measured. contexts: latent frames before a chunk of the causal Wan. given, new, batch: see `benchmarks.longcat`."""

    model: str
    device: str
    small: bool
    preset: str
    rounds: int
    contexts: tuple[int, ...]
    given: int
    new: int
    batch: int


class Side:
    """One process alone, or as one of several (ranks), with a cache of its heads."""

    def __init__(self, geometry: Geometry, ranks: Ranks | None):
        self.ranks, self.geometry = ranks, geometry
        self.cut = None if ranks is None else Cut(ranks, geometry.grid)
        self.cache: KVCache | None = None

    def make_cache(self, settings, scene, most: int, **more) -> None:
        geometry, ranks, dtype = self.geometry, self.ranks, next(scene.network.parameters()).dtype
        heads, agree = (geometry.heads, None) if ranks is None else (ranks.heads(geometry.heads), ranks.mean)
        self.cache = KVCache(settings, layers=geometry.layers, heads=heads, head_dim=geometry.head_dim, grid=geometry.grid, rope=Rope,
                             device=scene.device, dtype=dtype, max_frames=most, agree=agree, **more)

    def attend(self, **options):
        attend = CachedAttention(self.cache, **options)
        return attend if self.cut is None else ShardedAttention(attend, self.ranks, self.cut)

    def share(self, x):
        return x if self.cut is None else self.cut.share(x)

    def whole(self, x):
        return x if self.cut is None else self.cut.gather(x)


class WanChunk(Side):
    """A chunk behind `context` latent frames."""

    def __init__(self, scene, ranks: Ranks | None, wanted: Wanted, context: int):
        super().__init__(scene.geometry, ranks)
        self.scene, self.context = scene, context
        self.make_cache(PRESETS[wanted.preset], scene, context + (wanted.rounds + 1) * CHUNK, chunk_frames=CHUNK)

    @torch.no_grad()
    def fill(self) -> None:
        pair = self.scene.pair if self.ranks is None else [self.ranks.own(x, 2) for x in self.scene.pair]
        for _ in range(0, self.context, CHUNK):
            for layer in self.cache.layers:
                layer.append(*pair, CHUNK)

    @torch.no_grad()
    def turn(self) -> None:
        x = self.share(self.scene.noise)
        for sigma in SELF_FORCING_SIGMAS:
            # the last one is 0: the pass that stores
            attend = self.attend(start_frame=self.cache.frames, frames=CHUNK, store=sigma == 0)
            self.whole(self.scene.network(x, torch.full((1, CHUNK), 1000 * sigma, device=x.device), self.scene.prompt, attend))


class LongCatStep(Side):
    """A denoising step of new frames that reads the given ones."""

    def __init__(self, scene, ranks: Ranks | None, wanted: Wanted, context: int):
        super().__init__(scene.geometry, ranks)
        self.scene, self.given, self.frames = scene, context, wanted.new
        settings = context_settings(PRESETS[wanted.preset], scene.geometry, context, wanted.new)
        self.make_cache(settings, scene, context + wanted.new, chunk_frames=context, stored_frames=context)

    @torch.no_grad()
    def fill(self) -> None:
        self.scene.network.encode(self.share(self.scene.given), self.attend(
            start_frame=0, frames=self.given, store=True, newest=self.cache.settings.recent_frames))

    @torch.no_grad()
    def turn(self) -> None:
        scene, x = self.scene, self.share(self.scene.new)
        attend = self.attend(start_frame=self.given, frames=self.frames, store=False)
        self.whole(scene.network(x, torch.full((len(x),), 750.0, device=x.device), scene.context, attend=attend))


def scene_of(wanted: Wanted, device: torch.device):
    """Network and inputs, the same in every process."""
    from . import generate

    if wanted.model == "longcat":
        return longcat.make(device, wanted.small, wanted.given, wanted.new, wanted.batch)
    return generate.make(device, wanted.small)


def compare(scene, ranks: Ranks, wanted: Wanted, context: int) -> dict:
    """Milliseconds alone and together, and the bytes of each process."""
    cuda, kind = scene.device.type == "cuda", LongCatStep if wanted.model == "longcat" else WanChunk

    def settled() -> None:
        if cuda:
            torch.cuda.synchronize(scene.device)
        # the processes wait on the host, so that no device works meanwhile
        dist.barrier(group=ranks.control)

    def say(text: str) -> None:
        if ranks.leads:
            progress(text)

    def timed(turn) -> float:
        settled()
        began = time.perf_counter()
        turn()
        settled()
        return 1e3 * (time.perf_counter() - began)

    def idle() -> None:
        """What the others do while the first process works alone."""

    began = time.perf_counter()
    sides = {"alone": kind(scene, None, wanted, context) if ranks.leads else None, "together": kind(scene, ranks, wanted, context)}
    turns = {name: idle if side is None else side.turn for name, side in sides.items()}
    for name, side in sides.items():
        timed(idle if side is None else side.fill)
        # kernels are compiled here
        timed(turns[name])
        say(f"{context} frames are stored, {name}: {time.perf_counter() - began:.1f} s")
    found = {name: [] for name in sides}
    for number in range(wanted.rounds):
        for name in sides if number % 2 else reversed(sides):
            found[name].append(timed(turns[name]))
        say(f"{context} frames, round {number + 1}: " + ", ".join(f"{name} {times[-1]:.1f} ms" for name, times in found.items()))
    row = {"context": context}
    for name, side in sides.items():
        stats = None if side is None else side.cache.stats()
        row[name] = {"ms": statistics.median(found[name]), "ms_all": found[name]} | ({} if stats is None else {
            "stored_bytes": stats.stored_bytes, "peak_bytes": stats.peak_bytes, "bf16_bytes": stats.bf16_bytes})
        if side is not None:
            side.cache.free()
    return row


def process(rank: int, size: int, wanted: Wanted, folder: str) -> None:
    """One of `size`; the first writes what it measured into the folder, after each context."""
    device = torch.device(f"cuda:{rank}" if wanted.device.startswith("cuda") else wanted.device)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=size,
                            timeout=timedelta(seconds=PATIENCE), device_id=device if cuda else None)
    ranks, rows, began = Ranks.of_group(), [], time.perf_counter()
    scene = scene_of(wanted, device)
    if ranks.leads:
        progress(f"{wanted.model} is on {device}: {time.perf_counter() - began:.1f} s")
    for context in wanted.contexts:
        rows.append(compare(scene, ranks, wanted, context))
        if ranks.leads:
            (Path(folder) / "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def run(size: int, wanted: Wanted, limit: float) -> list[dict]:
    """What `size` processes measure. Raises ChildProcessError where one of them ends early, and TimeoutError after `limit` seconds."""
    with tempfile.TemporaryDirectory() as folder:
        # a process that waits for one that is gone is ended, too
        started = torch.multiprocessing.spawn(process, (size, wanted, folder), nprocs=size, join=False)
        ends = time.monotonic() + limit
        try:
            while not started.join(timeout=1):
                if time.monotonic() > ends:
                    raise TimeoutError(f"The {size} processes have not measured {wanted.model} in {limit:g} s, and were ended. "
                                       "Raise --limit.")
        except (ProcessRaisedException, ProcessExitedException) as error:
            progress(str(error))
            raise ChildProcessError(f"Process {error.error_index} of {size} ended: {str(error).strip().splitlines()[-1]}") from None
        finally:
            for child in started.processes:
                if child.is_alive():
                    child.kill()
                child.join()
        return json.loads((Path(folder) / "rows.json").read_text())


def parse(arguments: list[str], gpus: int, model: str) -> tuple[Wanted, argparse.Namespace]:
    parser = argparse.ArgumentParser(prog=f"qvg bench generate --gpus {gpus} --model {model}", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny network, to see that it runs")
    parser.add_argument("--preset", choices=PRESETS, default="balanced")
    parser.add_argument("--rounds", type=whole(1, 10_000), default=3, help="turns of each")
    parser.add_argument("--limit", type=whole(1, 86_400), default=600, metavar="SECONDS", help="after which all processes are ended")
    if model == "longcat":
        parser.add_argument("--given", type=whole(1, 999), default=19, help="latent frames that the segment continues")
        parser.add_argument("--new", type=whole(1, 999), default=5, help="latent frames that it adds")
        parser.add_argument("--batch", type=whole(1, 64), default=2, help="conditions in a pass: 2 with guidance")
    else:
        parser.add_argument("--contexts", type=whole(3, 9999), nargs="+", help="latent frames before the chunk, multiples of 3")
    add_places(parser)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and torch.cuda.device_count() < gpus:
        parser.error(f"--gpus is {gpus}, but this machine has {torch.cuda.device_count()}")
    of = partial(Wanted, model, str(device), options.small, options.preset, options.rounds)
    if model == "longcat":
        return of((options.given,), options.given, options.new, options.batch), options
    contexts = tuple(options.contexts or ([6] if options.small else [180]))
    if any(context % CHUNK for context in contexts):
        parser.error(f"--contexts are {', '.join(map(str, contexts))}, but chunks are of {CHUNK} frames; give multiples of {CHUNK}")
    return of(contexts, 0, 0, 1), options


def main(arguments: list[str], gpus: int, model: str) -> None:
    wanted, options = parse(arguments, gpus, model)
    name = "generate-gpus" if model == "self-forcing" else f"generate-gpus-{model}"
    claim(options, name)
    rows = run(gpus, wanted, options.limit)
    lines = [(gpus if side == "together" else 1, row["context"], row[side]["ms"], row[side]["ms"] / row["alone"]["ms"],
              row[side]["stored_bytes"] / GIB, row[side]["peak_bytes"] / GIB) for row in rows for side in ("alone", "together")]
    what = "ms per step" if model == "longcat" else "ms per chunk"
    text = table(("GPUs", "context", what, "of one GPU's time", "stored GiB a GPU", "peak GiB a GPU"), lines)
    write(options.out, name, {
        "environment": environment(torch.device(options.device), command_line(f"generate --gpus {gpus} --model {model}", arguments)),
        "gpus": gpus, "model": model, "preset": wanted.preset, "rows": rows}, text)
