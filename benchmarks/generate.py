"""One chunk of the full-size causal Wan 1.3B at 832 x 480, with each method of storing its history.

    qvg bench generate [--small] [--out DIR] [--contexts 21 60 120 180] [--only balanced offload] [--limits 12 24]

A chunk is four noisy passes and the clean one, which stores. Weights are random, which does not change timing and says nothing about
quality; the history is clusters of tokens. Each method is alone on the device while its milliseconds and bytes are measured, bf16 first and
last. A card's clock depends on its power and heat, so overhead is measured separately: chunks alternate with bf16, the order swapped every
second time, and the median counts. Bytes are the allocator's peak during a chunk, minus the weights and what the same pass needs without
history; what an offloaded cache holds in host memory has a column of its own. A preset is attended to exactly, or in eight bits (its row
with "fast", see `qvg.attention.choice`).

`--limits` caps the allocator at that many GiB, weights included, fills the longest video that the forecast allows, and runs its last pass.

    qvg bench generate --model longcat ...      a segment of LongCat-Video instead, see `benchmarks.longcat`
    qvg bench generate --gpus 2 ...     either of them by several GPUs together, see `benchmarks.gpus`
    qvg bench generate --model hy-worldplay-8b ...      a chunk of a world model, or hy-worldplay-5b, see `benchmarks.worldplay`
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from dataclasses import dataclass, replace

import torch

from ..qvg.cache import codebook_lifetime
from ..qvg.cache.geometry import Geometry
from ..qvg.commands.arguments import MOST_GIB, whole
from ..qvg.commands.arguments import number as real
from ..qvg.models.catalogue import MODELS
from ..qvg.models.wan import CausalWan, WanSizes, bidirectional
from ..qvg.report.plan import longest
from ..qvg.settings import PRESETS
from ..qvg.units import GIB
from ..qvg.video import SELF_FORCING_SIGMAS
from . import gpus, longcat, methods, peers, worldplay
from .kernels import Case, tokens
from .measure import add_places, claim, command_line, environment, largest_misfit, progress, table, write
from .planes import PLANES

FULL = WanSizes(dim=1536, ffn_dim=8960, layers=30, text_dim=4096)
SMALL = WanSizes(dim=256, ffn_dim=128, layers=2, text_dim=16)
CHUNK = 3
# besides bf16; the names are values of `--only`
KINDS = {
    **{f"{name}{end}": methods.ours(PRESETS[name], attention=attention) for name in ("balanced", "smallest", "tiny")
       for end, attention in (("", "exact"), ("-fast", "fast"))},
    "planes": methods.ours(PLANES["balanced"]),
    "one-stream": methods.ours(PRESETS["balanced"], overlap=False),
    "offload": methods.ours(replace(PRESETS["balanced"], offload=True)),
    "released": methods.Released,
    "package": methods.Package,
    "sage": methods.SageCore,
    "balanced-sage": methods.SageOurs,
}
# those that need another project's package, and what imports it
FOREIGN = {"package": peers.quant_videogen, "sage": peers.sage_attention, "balanced-sage": peers.sage_attention}
TITLES = {"package": "quant-videogen", "sage": "sageattention"}


@dataclass
class Scene:
    """The network and the inputs of a pass over a chunk."""

    network: CausalWan
    prompt: list
    noise: torch.Tensor
    pair: tuple[torch.Tensor, torch.Tensor]
    geometry: Geometry
    weights: int = 0
    activations: int = 0

    @property
    def device(self) -> torch.device:
        return self.noise.device

    @torch.no_grad()
    def one_pass(self, sigma: float, attend) -> None:
        self.network(self.noise, torch.full((1, CHUNK), 1000 * sigma, device=self.device), self.prompt, attend)

    def chunk(self, method: methods.Method) -> None:
        for sigma in SELF_FORCING_SIGMAS:
            # the last one is 0: the clean pass
            self.one_pass(sigma, method.begin(clean=sigma == 0))
        method.end()


def make(device: torch.device, small: bool) -> Scene:
    sizes, grid, words = (SMALL, (4, 6), 4) if small else (FULL, (30, 52), 512)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        network = CausalWan(sizes).to(dtype).requires_grad_(False).eval()
        noise = torch.randn(1, 16, CHUNK, 2 * grid[0], 2 * grid[1], dtype=dtype)
        prompt = network.project_context(torch.randn(1, words, sizes.text_dim, dtype=dtype))
    case = Case("wan", CHUNK, CHUNK, sizes.heads, 128, grid)
    pair = tokens(case, CHUNK, device, 0), tokens(case, CHUNK, device, 1)
    scene = Scene(network, prompt, noise, pair, Geometry(sizes.layers, sizes.heads, 128, grid))
    if device.type == "cuda":
        _settle(device)
        scene.weights = torch.cuda.memory_allocated(device)
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats(device)
            scene.one_pass(1.0, bidirectional(grid, CHUNK))
        scene.activations = torch.cuda.max_memory_allocated(device) - scene.weights
    return scene


def _settle(device: torch.device) -> None:
    """Return unused memory to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def timed(scene: Scene, method: methods.Method) -> float:
    """Milliseconds of the next chunk."""
    cuda = scene.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    scene.chunk(method)
    if cuda:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began)


def measure(scene: Scene, kind: type[methods.Method], context: int, rounds: int) -> dict:
    """Milliseconds and bytes of a chunk after `context` frames."""
    cuda = scene.device.type == "cuda"
    method = kind(scene.geometry, scene.pair, CHUNK, context + (rounds + 1) * CHUNK)
    began = time.perf_counter()
    method.fill(context)
    if cuda:
        torch.cuda.synchronize()
    filled = time.perf_counter() - began
    scene.one_pass(1.0, method.begin(clean=False))
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    times = [timed(scene, method) for _ in range(rounds)]
    found = {"method": method.name, "context": context, "ms": statistics.median(times), "ms_all": times, "fill_s": filled,
             "state_bytes": method.state_bytes(), "host_bytes": method.host_bytes()}
    if cuda:
        found["peak_bytes"] = torch.cuda.max_memory_allocated() - scene.weights - scene.activations
    del method
    _settle(scene.device)
    progress(f"{found['method']} at {context} frames: {found['ms']:.1f} ms, state {found['state_bytes'] / GIB:.2f} GiB, "
             f"peak {found.get('peak_bytes', 0) / GIB:.2f} GiB, filled in {filled:.1f} s")
    return found


def in_turn(scene: Scene, kind: type[methods.Method], context: int, rounds: int) -> list[float]:
    """Overhead of a chunk over bf16 in percent, by round."""
    pair = [method(scene.geometry, scene.pair, CHUNK, context + (rounds + 1) * CHUNK) for method in (methods.Core, kind)]
    for method in pair:
        method.fill(context)
        scene.chunk(method)
    found = []
    for number in range(rounds):
        times = {which: timed(scene, pair[which]) for which in ((0, 1) if number % 2 else (1, 0))}
        found.append(100 * (times[1] / times[0] - 1))
    return found


def compare(scene: Scene, context: int, kinds: list, rounds: int, turns: int) -> list[dict]:
    rows = []
    for kind in [methods.Core, *kinds, methods.Core]:
        try:
            rows.append(measure(scene, kind, context, rounds))
        except torch.OutOfMemoryError as error:
            rows.append({"method": getattr(kind, "name", str(kind)), "context": context, "error": str(error).splitlines()[0]})
            _settle(scene.device)
            continue
        if kind is not methods.Core:
            try:
                overheads = in_turn(scene, kind, context, turns)
            except torch.OutOfMemoryError:
                # measured alone, because bf16 does not fit beside it
                continue
            finally:
                _settle(scene.device)
            rows[-1] |= {"overheads": overheads, "overhead_percent": statistics.median(overheads)}
            progress(f"alternating with bf16: {', '.join(f'{overhead:+.1f}' for overhead in overheads)} %")
    base = next((row for row in rows if row["method"] == methods.Core.name and "ms" in row), None)
    for row in rows:
        if base and "ms" in row:
            row["ratio"] = base.get("peak_bytes", base["state_bytes"]) / row.get("peak_bytes", row["state_bytes"])
    return rows


def fits(scene: Scene, kind: type[methods.Method], frames: int) -> bool:
    """Whether the last chunk of a video of `frames` latent frames fits."""
    method = None
    try:
        method = kind(scene.geometry, scene.pair, CHUNK, frames)
        method.fill(frames - CHUNK)
        scene.one_pass(1.0, method.begin(clean=False))
        torch.cuda.synchronize()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        del method
        _settle(scene.device)


def capped(scene: Scene, limit_gib: float, kinds: list[tuple[str, type, int]]) -> list[dict]:
    """The longest video under a capped allocator: the guess, reduced by 5 % as often as needed."""
    rows = []
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit_gib * GIB / torch.cuda.get_device_properties(scene.device).total_memory))
    try:
        for name, kind, guess in kinds:
            frames, tried = guess // CHUNK * CHUNK, []
            while frames > 2 * CHUNK and not fits(scene, kind, frames):
                tried.append(frames)
                frames = int(0.95 * frames) // CHUNK * CHUNK
            rows.append({"limit_gib": limit_gib, "method": name, "frames": frames, "seconds": (4 * frames - 3) / 16, "did_not_fit": tried})
            progress(f"{name} in {limit_gib:g} GiB: {frames} latent frames, {rows[-1]['seconds']:.0f} s; did not fit: {tried}")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return rows


def guesses(scene: Scene, limit_gib: float) -> list[tuple[str, type, int]]:
    room = int(limit_gib * GIB) - scene.weights - scene.activations
    per_frame = scene.geometry.bf16_bytes(1)
    found = [(methods.Core.name, methods.Core, room // per_frame)]
    for name in ("balanced", "smallest"):
        geometry = Geometry(scene.geometry.layers, scene.geometry.heads, 128, scene.geometry.grid, buffers=2)
        found.append((f"qvg {name}", methods.ours(PRESETS[name]), longest(MODELS["self-forcing"], PRESETS[name], geometry, room)))
    # 24 frames in bf16, packed frames at a seventh, and of one layer the whole history twice in keys and once in values
    released = (room - methods.RELEASED_FRAMES * per_frame) / (per_frame / 6.97 + 1.5 * per_frame / scene.geometry.layers)
    return [*found, (methods.Released.name, methods.Released, int(released))]


def main(arguments: list[str]) -> None:
    chooser = argparse.ArgumentParser(prog="qvg bench generate", add_help=False)
    chooser.add_argument("--model", choices=("self-forcing", "longcat", *worldplay.NETWORKS), default="self-forcing")
    chooser.add_argument("--gpus", type=whole(1, 64), default=1)
    chosen, arguments = chooser.parse_known_args(arguments)
    if chosen.gpus > 1:
        if chosen.model in worldplay.NETWORKS:
            chooser.error(f"--gpus is for the causal Wan and LongCat-Video; leave out --model {chosen.model}")
        gpus.main(arguments, chosen.gpus, chosen.model)
        return
    if chosen.model == "longcat":
        longcat.main(arguments)
        return
    if chosen.model in worldplay.NETWORKS:
        worldplay.main(arguments, chosen.model)
        return
    parser = argparse.ArgumentParser(prog="qvg bench generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny network, to see that it runs")
    parser.add_argument("--contexts", type=whole(3, 9999), nargs="+", help="latent frames before the chunk, multiples of 3")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="methods beside bf16")
    parser.add_argument("--limits", type=real(above=0, most=MOST_GIB), nargs="*", default=[], metavar="GIB")
    parser.add_argument("--rounds", type=whole(1, 10_000), default=3, help="chunks of each method alone")
    parser.add_argument("--turns", type=whole(1, 10_000), default=5, help="chunks of each method alternating with bf16")
    parser.add_argument("--misfit", action="store_true", help="no codebook or basis fits, so that one is trained as often as can be")
    add_places(parser)
    options = parser.parse_args(arguments)
    if any(context % 3 for context in options.contexts or ()):
        parser.error(f"--contexts are {', '.join(map(str, options.contexts))}, but chunks are of 3 frames; give multiples of 3")
    claim(options, "generate")
    with largest_misfit(0.0 if options.misfit else codebook_lifetime.LARGEST_MISFIT):
        everything(options, arguments)


def absence(name: str, device: torch.device) -> str:
    """Why a method of `KINDS` cannot be measured on this device; empty for the others."""
    if name not in FOREIGN:
        return ""
    found = FOREIGN[name]()
    return found if isinstance(found, str) else "" if device.type == "cuda" else "it needs a GPU"


def everything(options: argparse.Namespace, arguments: list[str]) -> None:
    """All contexts and limits; each result is written as soon as it is done."""
    device = torch.device(options.device)
    scene = make(device, options.small)
    missing = {name: why for name in options.only if (why := absence(name, device))}
    kinds = [kind for name, kind in KINDS.items() if name in options.only and name not in missing]
    rows, limits = [], []

    def note(show: bool) -> None:
        columns = ("method", "context", "ms per chunk", "alternating %", "peak GiB", "state GiB", "host GiB", "ratio to bf16")
        text = table(columns, [(
            row["method"], row["context"], row.get("ms"), row.get("overhead_percent", row.get("error")),
            *(row[name] / GIB if name in row else None for name in ("peak_bytes", "state_bytes", "host_bytes")),
            row.get("ratio")) for row in rows])
        if limits:
            columns = ("GiB", "method", "latent frames", "seconds of video", "did not fit")
            text += "\n\n" + table(columns, [tuple(row.values()) for row in limits])
        for name, why in missing.items():
            text += f"\n\n{TITLES[name]} not measured: {why}" if name in TITLES else ""
        write(options.out, "generate", {
            "environment": environment(device, command_line("generate", arguments)), "weights_bytes": scene.weights,
            "activations_bytes": scene.activations, "rows": rows, "limits": limits}, text, show=show)

    # written after every context, so that a time limit loses only the current one
    for context in options.contexts or ([6, 27] if options.small else [21, 60, 120, 180]):
        rows += compare(scene, context, kinds, options.rounds, options.turns)
        note(show=False)
    for limit in options.limits if device.type == "cuda" else ():
        limits += capped(scene, limit, guesses(scene, limit))
        note(show=False)
    note(show=True)
