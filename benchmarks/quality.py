"""The closed loop on the tiny model: how far a video drifts from the one with an exact cache, against real bits per element.

    qvg bench quality [--small] [--frames N] [--videos N] [--only METHOD ...] [--out DIR]
    qvg bench quality --patterns [NAME ...] [--videos N] [--only METHOD ...]
    qvg bench quality --checkpoint FILE ...     a model of one's own instead, see `qvg bench quality --checkpoint x --help`

Every method makes the same videos from the same noise: once free-running (its own frames are its history) and once teacher-forced (the
history is the exact video's, encoded once, so a chunk has the error that a method adds, without the error that it propagates). Figures are
PSNR and SSIM of decoded frames against the exact cache: of the first chunk that reads a quantized history, and the mean from the third
chunk on; the spread is the standard error over videos. A second exact run and a cache with 1e-3 noise are the controls. With --patterns the
presets, the released method, the QVG codec and, without sinks and recent frames, each codec at several sizes make videos in every pattern
of `patterns`: chunks of other lengths, a start image, frames of twice the size, a prompt switch, a cut, 20 chunks. Figures are dB of
latents against the exact cache, from the third chunk on, and over the last quarter of the video.

Bits include codes, scales, ids, codebooks and bases of the tensors that are held when the video ends. Those "at 180 frames" are of a video
of 180 frames at Self-Forcing's size, with as many codebooks and bases as this one needed. The model is tiny and made for tests: the
order of methods is an indication, the decibels are its own.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..qvg.cache import codebook_lifetime
from ..qvg.cache.kv_cache import KVCache
from ..qvg.commands.arguments import whole
from ..qvg.demo import LATENT, PROMPTS, embed_prompt, load_tiny
from ..qvg.measure.loop import CausalLoop
from ..qvg.measure.noise import NOISY
from ..qvg.measure.rows import error_of_mean
from ..qvg.models.wan_vae import denormalize
from ..qvg.registry import CODECS
from ..qvg.report import scatter
from ..qvg.report.metrics import similarity
from ..qvg.settings import PLAIN_BITS, PRESETS, QVGSettings
from ..qvg.video import Run, Sampler
from . import baselines
from .measure import add_places, claim, command_line, environment, largest_misfit, progress, table, write
from .patterns import PATTERNS, PatternLoop, bits_at_size
from .planes import PLANES

BARE = replace(PLANES["balanced"], sink_frames=0, recent_frames=0)
TRANSFORM = replace(PRESETS["balanced"], sink_frames=0, recent_frames=0)
COLUMNS = ("method", "bits per element", "first chunk dB", "free dB", "+-", "forced dB", "+-", "free SSIM")


@dataclass(frozen=True)
class Way:
    """A row of the table. codecs: layouts of `baselines.Baseline` for K and V."""

    family: str
    label: str
    settings: QVGSettings
    codecs: tuple[str, str] | None = None


def ways(small: bool) -> list[Way]:
    off = PRESETS["off"]
    found = [Way("control", "exact again", off), Way("control", "1e-3 noise", NOISY)]
    if small:
        return [*found, Way("paper", "paper int2", PRESETS["paper"]),
                Way("baseline", "RTN asymmetric int2", BARE.both(stages=0), baselines.BASELINES["RTN asymmetric"])]
    found += [Way("preset", name, PRESETS[name]) for name in ("quality", "balanced", "smallest", "tiny")]
    found += [Way("planes", settings.name, settings) for settings in PLANES.values()]
    found += [Way("transform", f"{bits:g}t", TRANSFORM.both(bits=bits)) for bits in CODECS["transform"].widths if bits not in PLAIN_BITS]
    for gain in ("unbiased", "mse"):
        found.append(Way("transform", f"1.25t {gain}", TRANSFORM.both(gain=gain)))
    found += [Way("transform", f"K {k:g}t V {v:g}t", replace(TRANSFORM, key=replace(TRANSFORM.key, bits=k),
                                                           value=replace(TRANSFORM.value, bits=v)))
              for k, v in ((1.5, 1), (1, 1.5), (1.75, 0.75), (0.75, 1.75))]
    for stages in range(5):
        found += [Way("qvg", f"{bits}p s{stages}", BARE.both(bits=bits, stages=stages)) for bits in (1, 2, 3, 4)]
    for gain in ("unbiased", "mse"):
        found.append(Way("qvg", f"2p s2 {gain}", BARE.both(gain=gain)))
    found.append(Way("qvg", "2p s2, V unbiased", replace(BARE, value=replace(BARE.value, gain="unbiased"))))
    found += [Way("qvg", f"K {k}p V {v}p s2", replace(BARE, key=replace(BARE.key, bits=k), value=replace(BARE.value, bits=v)))
              for k, v in ((1, 2), (2, 1), (2, 3), (3, 2))]
    for bits in (2, 4):
        paper = PRESETS["paper"].both(bits=bits)
        found += [Way("paper", f"paper int{bits}", paper), Way("paper", f"paper int{bits} s4 b16", paper.both(stages=4, group=16)),
                  Way("paper", f"paper int{bits} asymmetric", paper.both(symmetric=False))]
        found += [Way("baseline", f"{name} int{bits}", BARE.both(stages=0, bits=bits), layouts)
                  for name, layouts in baselines.BASELINES.items()]
    return found


class Forced(Sampler):
    """Each chunk is stored from the given video instead of the generated one."""

    def __init__(self, *arguments, truth: Tensor, **options):
        super().__init__(*arguments, **options)
        self.truth = truth

    def _store(self, clean: Tensor, first: int, at: int | None = None) -> Iterator:
        yield from super()._store(self.truth[:, :, first:first + clean.shape[2]].to(clean), first, at)


class Loop(CausalLoop):
    """The tiny model, its prompts and one seed per video."""

    def __init__(self, device: torch.device, frames: int, videos: int):
        network, self.vae = (module.to(device) for module in load_tiny())
        prompts = torch.cat([embed_prompt(PROMPTS[number % len(PROMPTS)]) for number in range(videos)]).to(device)
        with torch.no_grad():
            context = network.project_context(prompts)
        super().__init__(network, context, Run(frames=frames), (videos, 16, *LATENT), device=device)
        self.truth = self.make(PRESETS["off"]).latents
        self.pictures = self.decode(self.truth)

    def video(self, way: Way, truth: Tensor | None = None) -> tuple[Tensor, float]:
        """Latents [B, 16, F, h, w] and bits per element at the end. truth: of a teacher-forced run."""
        def change(cache: KVCache) -> None:
            for layer in cache.layers if way.codecs else ():
                for side, layout in zip(layer.sides, way.codecs):
                    side.codec = baselines.Baseline(layout)

        made = self.make(way.settings, change=change, sampler=Sampler if truth is None else partial(Forced, truth=truth))
        return made.latents, made.stats.bits_per_element

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """[B, 3, f, H, W] in -1..1"""
        parts = [list(self.vae.decode_frames(denormalize(one[None].to(self.device)))) for one in latents]
        return torch.cat([torch.cat(part, dim=2) for part in parts]).clamp(-1, 1)

    def compare(self, latents: Tensor) -> dict[str, list[float]]:
        """PSNR and SSIM of every video against the exact one."""
        pictures = self.decode(latents)
        # a chunk of three latent frames is twelve video frames, but the first latent frame is one
        first = slice(4 * self.run.chunk_frames - 3, 8 * self.run.chunk_frames - 3)
        later = slice(first.stop, None)
        pairs = {name: (pictures[:, :, part], self.pictures[:, :, part]) for name, part in (("first", first), ("later", later))}
        return {**{name: psnr(*pair) for name, pair in pairs.items()}, "ssim": ssim(*pairs["later"])}


PATTERN_COLUMNS = ("pattern", "method", "bits", "at 180 frames", "later dB", "+-", "last quarter dB", "+-", "closer than paper int2")
EIGHT_BITS = ", attention in 8 bits"
PATTERN_METHODS = {
    "1e-3 noise": NOISY, "paper int2": PRESETS["paper"], "paper int2, released schedule": PRESETS["paper"],
    **{name: PRESETS[name] for name in ("quality", "balanced", "smallest", "tiny")},
    **{settings.name: settings for settings in PLANES.values()}, "2 planes, codebooks kept": PLANES["balanced"],
    "2 planes, bare": BARE, "1 plane, bare": BARE.both(bits=1),
    **{f"{bits:g} bits, bare": TRANSFORM.both(bits=bits) for bits in (2, 1.25, 0.75)},
    "1.25 bits, bare, basis of other videos": TRANSFORM,
    **{f"{name}{EIGHT_BITS}": PRESETS[name] for name in ("quality", "balanced", "smallest", "tiny")}}


def in_patterns(device: torch.device, options: argparse.Namespace) -> Iterator[dict]:
    """One row per pattern and method, with the dB of every video."""
    network, only = load_tiny()[0].to(device), options.only
    videos = options.videos or (1 if options.small else 4)
    for pattern in PATTERNS:
        if options.patterns and pattern.name not in options.patterns:
            continue
        if options.frames:
            pattern = replace(pattern, frames=options.frames + pattern.first_alone)
        loop = PatternLoop(network, pattern, videos, device)
        for name, settings in PATTERN_METHODS.items():
            # the released method is the reference for the others
            if only and name not in only and name != "paper int2":
                continue
            books = loop.other_books(settings) if name.endswith("other videos") else None
            settings = replace(settings, attention="fast" if name.endswith(EIGHT_BITS) else "exact")
            with largest_misfit(math.inf if name.endswith("kept") else codebook_lifetime.LARGEST_MISFIT):
                latents, cache = loop.make(settings, released=name.endswith("schedule"), books=books)
            found, stats = loop.closeness(latents), cache.stats()
            row = {
                "pattern": pattern.name, "method": name, "bits": stats.bits_per_element, "bits_at_180_frames": bits_at_size(cache, pattern),
                "stored_bytes": stats.stored_bytes, "attention": stats.attention,
                "peak_bytes": stats.peak_bytes, "later": found[:, pattern.later:].mean(1).tolist(),
                "last_quarter": found[:, -(pattern.frames // 4):].mean(1).tolist(), "frames": found.mean(0).tolist()}
            progress(f"{pattern.name}, {name}: {stats.bits_per_element:.2f} bits, {statistics.mean(row['later']):.1f} dB")
            yield row


def pattern_table(rows: list[dict]) -> list[tuple]:
    paper = {row["pattern"]: row for row in rows if row["method"] == "paper int2"}
    return [(row["pattern"], row["method"], row["bits"], row["bits_at_180_frames"], statistics.mean(row["later"]),
             error_of_mean(row["later"]), statistics.mean(row["last_quarter"]), error_of_mean(row["last_quarter"]),
             statistics.mean(row["later"]) - statistics.mean(paper[row["pattern"]]["later"])) for row in rows]


def psnr(a: Tensor, b: Tensor) -> list[float]:
    """dB of each video [B, 3, F, H, W] in -1..1, mean over its frames; at most 120."""
    error = ((a - b) / 2).square().mean((1, 3, 4)).clamp(min=1e-12)
    return (-10 * error.log10()).mean(1).tolist()


def ssim(a: Tensor, b: Tensor, every: int = 4) -> list[float]:
    """Structural similarity of each video, mean over every fourth frame: Wang et al. 2004 on grey pictures, Gaussian window of 11."""
    grey = [(x[:, :, ::every].mean(1) + 1) / 2 for x in (a, b)]
    return [float(similarity(x, y).mean()) for x, y in zip(*grey)]


def patterns(parser: argparse.ArgumentParser, options: argparse.Namespace, command: str) -> None:
    """The tables of `--patterns`; written after every row, so that a time limit loses only the current one."""
    for given, known in ((options.patterns, [pattern.name for pattern in PATTERNS]), (options.only or (), list(PATTERN_METHODS))):
        if unknown := set(given) - set(known):
            parser.error(f"there is no {', '.join(sorted(unknown))}; choose from {', '.join(known)}")
    claim(options, "quality_patterns")
    device = torch.device(options.device)
    rows: list[dict] = []

    def note(show: bool) -> None:
        result = {"environment": environment(device, command), "videos": len(rows[0]["later"]), "rows": rows}
        write(options.out, "quality_patterns", result, table(PATTERN_COLUMNS, pattern_table(rows)), show=show)

    for row in in_patterns(device, options):
        rows.append(row)
        note(show=False)
    note(show=True)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="qvg bench quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a few chunks of two videos and few methods, to see that it runs")
    parser.add_argument("--frames", type=whole(1, 9999), help="latent frames of a video")
    parser.add_argument("--videos", type=whole(1, 999))
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="rows by name, such as balanced 'paper int2'")
    parser.add_argument("--patterns", nargs="*", metavar="NAME", help="presets in these patterns, or in all: "
                        + "; ".join(pattern.name for pattern in PATTERNS))
    add_places(parser)
    options = parser.parse_args(arguments)
    if options.patterns is not None:
        patterns(parser, options, command_line("quality", arguments))
        return
    found = ways(options.small)
    unknown = set(options.only or ()) - {way.label for way in found}
    if unknown:
        parser.error(f"there is no method {', '.join(sorted(unknown))}; choose from {', '.join(way.label for way in found)}")
    claim(options, "quality")
    loop = Loop(torch.device(options.device), options.frames or (9 if options.small else 30), options.videos or (1 if options.small else 8))
    rows = []
    for way in found:
        if options.only and way.label not in options.only:
            continue
        latents, bits = loop.video(way)
        free, forced = loop.compare(latents), loop.compare(loop.video(way, loop.truth)[0])
        row = {"family": way.family, "method": way.label, "bits": bits, "free": free, "forced": forced}
        rows.append(row)
        means = [statistics.mean(part["later"]) for part in (free, forced)]
        progress(f"{way.label}: {bits:.2f} bits, free {means[0]:.2f} dB, forced {means[1]:.2f} dB")
    shown = [(row["method"], row["bits"], statistics.mean(row["free"]["first"]), statistics.mean(row["free"]["later"]),
              error_of_mean(row["free"]["later"]), statistics.mean(row["forced"]["later"]), error_of_mean(row["forced"]["later"]),
              statistics.mean(row["free"]["ssim"])) for row in rows]
    result = {"environment": environment(loop.device, command_line("quality", arguments)), "frames": loop.run.frames,
              "videos": loop.shape[0], "rows": rows}
    write(options.out, "quality", result, table(COLUMNS, shown))
    for kind in ("free", "forced"):
        points = [(row["family"], row["method"], row["bits"], statistics.mean(row[kind]["later"]))
                  for row in rows if row["family"] != "control"]
        title = f"Tiny model, {kind}: PSNR against the exact cache, third chunk on"
        scatter.draw(title, ("bits per element", "dB"), points).save(options.out / f"quality_{kind}.png")
