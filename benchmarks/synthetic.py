"""Synthetic keys and values with recorded statistics: a filter before the closed loop, never evidence by itself.

    qvg bench synthetic                                    keys like those of three released models
    qvg bench synthetic --statistics statistics.safetensors     keys and values like those that `qvg bench statistics` recorded

Tokens are Gaussian with the recorded spectrum of a head, deviations of its channels, mean, correlation of each component from frame to
frame, and spread of the tokens' norms. They have no clusters, so centroids find less in them than in real tokens, and nothing else that a
codec could use. For each preset, without sinks and recent frames, the table has what it leaves of the energy around the mean, and the share
of the logits' variance that its error makes up, for queries drawn like the keys.

`recorded_keys.json` has the spectrum and the sorted channel variances (their mean is 1) of the keys of LongCat-Video, Self-Forcing and
HY-WorldPlay before RoPE: averages over the heads of a captured chunk, from the recorded statistics of a public replication
(JamesSand/Quant-VideoGen at e8883df, repro/0720). Not recorded are means and what repeats: `MEAN_SHARE` and `CORRELATION` are those of the
tiny model's keys.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..qvg.attention import NoRope
from ..qvg.cache.kv_cache import KVCache
from ..qvg.codec import tokens_of
from ..qvg.measure import statistics
from ..qvg.measure.rows import presets
from ..qvg.settings import QVGSettings
from .measure import add_places, claim, command_line, environment, progress, table, write

RECORDED = Path(__file__).parent / "recorded_keys.json"
MEAN_SHARE, CORRELATION = 0.8, 0.75
HEADS, GRID, CHUNK_FRAMES, CHUNKS = 2, (16, 24), 3, 6
NOTE = ("Synthetic Gaussian tokens: a filter for ideas before the closed loop (`qvg bench quality`), never evidence by itself. Error of "
        "tensors alone ranks methods wrongly.")
COLUMNS = ("tokens", "side", "method", "bits", "of these, bases or codebooks", "error, % of energy", "error of logits, %")
ROUNDS = 6


@dataclass(frozen=True)
class Statistics:
    """Of R heads with D channels, in units of the head's scale: the root mean square over tokens and channels of x minus its mean.

    spectrum: float64 [R, D], eigenvalues of the covariance as shares, falling. deviation, mean: of each channel [R, D].
    correlation: of each component from a frame to the next [R, D].
    norms: `statistics.QUANTILES` of a token's root mean square without the mean [R, 5]; None: those that Gaussian tokens have.
    """

    spectrum: Tensor
    deviation: Tensor
    mean: Tensor
    correlation: Tensor
    norms: Tensor | None = None


def recorded(name: str, heads: int, generator: torch.Generator) -> Statistics:
    """Of the keys of a released model; heads differ in the order of channels and in the mean's direction."""
    known = json.loads(RECORDED.read_text())[name]
    spectrum, variance = (torch.tensor(known[key], dtype=torch.float64) for key in ("spectrum", "channel_variance"))
    dim = len(spectrum)
    deviation = torch.stack([variance[torch.randperm(dim, generator=generator)] for _ in range(heads)]).sqrt()
    mean = torch.randn(heads, dim, generator=generator, dtype=torch.float64)
    mean *= (MEAN_SHARE / (1 - MEAN_SHARE) / mean.square().mean(1, keepdim=True)).sqrt()
    return Statistics((spectrum / spectrum.sum()).expand(heads, -1), deviation, mean, torch.full((heads, dim), CORRELATION).double())


def of_file(tensors: dict[str, Tensor], layer: int, side: int) -> Statistics:
    """Of a file of `qvg bench statistics`: K (side 0) or V (1) of a layer."""
    spectrum, deviation, mean, norms = (tensors[name][layer, side].double() for name in (
        "spectrum", "channel_deviation", "channel_mean", "norm_quantiles"))
    correlation = tensors["component_correlation"][layer, side].double().expand_as(spectrum).clamp(0, 0.999)
    return Statistics(spectrum, deviation, mean, correlation, norms)


def components(spectrum: Tensor, deviation: Tensor, generator: torch.Generator) -> Tensor:
    """Orthonormal columns float64 [R, D, D] of a random covariance that has this spectrum and these deviations of channels: by turns, the
    channels of a random one are scaled and its eigenvalues restored."""
    heads, dim = spectrum.shape
    vectors = torch.linalg.qr(torch.randn(heads, dim, dim, generator=generator, dtype=torch.float64))[0]
    for _ in range(100):
        covariance = dim * (vectors * spectrum[:, None]) @ vectors.mT
        factor = deviation.clamp(min=1e-6) / covariance.diagonal(dim1=1, dim2=2).sqrt()
        if (factor - 1).abs().max() < 0.005:
            break
        vectors = torch.linalg.eigh(covariance * factor[:, None] * factor[..., None])[1].flip(-1)
    return vectors


def generate(stats: Statistics, frames: int, places: int, generator: torch.Generator) -> Tensor:
    """Tokens float32 [frames * places, R, D], frame by frame, of scale 1. Raises ValueError for fewer than 4 D tokens."""
    heads, dim = stats.spectrum.shape
    if frames * places < 4 * dim:
        raise ValueError(f"{frames} frames of {places} tokens are too few for statistics of {dim} channels; {4 * dim} tokens are enough.")
    vectors = components(stats.spectrum, stats.deviation, generator)
    kept = stats.correlation[:, None]
    parts = [torch.randn(heads, places, dim, generator=generator, dtype=torch.float64)]
    for _ in range(frames - 1):
        fresh = torch.randn(heads, places, dim, generator=generator, dtype=torch.float64)
        parts.append(kept * parts[-1] + (1 - kept.square()).sqrt() * fresh)
    root = (dim * stats.spectrum).clamp(min=1e-12).sqrt()[:, None]
    y = _whitened(torch.cat(parts, dim=1)) * root
    for _ in range(ROUNDS if stats.norms is not None else 0):
        y = _whitened(_with_norms(y, stats.norms) / root) * root
    return (y @ vectors.mT + stats.mean[:, None]).transpose(0, 1).float().contiguous()


def _whitened(y: Tensor) -> Tensor:
    """y [R, T, D] with the least change that makes its mean 0 and its covariance 1."""
    y = y - y.mean(1, keepdim=True)
    values, vectors = torch.linalg.eigh(y.mT @ y / y.shape[1])
    return y @ (vectors / values.sqrt()[:, None]) @ vectors.mT


def _with_norms(y: Tensor, quantiles: Tensor) -> Tensor:
    """y [R, T, D] with its tokens scaled, in their order, to these quantiles of the root mean square."""
    count, at = y.shape[1], torch.tensor((0, *statistics.QUANTILES, 1), dtype=y.dtype)
    known = torch.cat([quantiles[:, :1], quantiles, quantiles[:, -1:]], dim=1)
    norm = y.square().mean(-1).sqrt()
    rank = (norm.argsort(1).argsort(1) + 0.5) / count
    upper = torch.searchsorted(at, rank).clamp(1, len(at) - 1)
    share = (rank - at[upper - 1]) / (at[upper] - at[upper - 1])
    wanted = torch.lerp(known.gather(1, upper - 1), known.gather(1, upper), share)
    return y * (wanted / norm.clamp(min=1e-12))[..., None]


@dataclass(frozen=True)
class Left:
    """Bits per element, those of codebooks apart; squared error of K and of V as shares of the energy around the mean; share of the logits'
    variance that K's error makes up."""

    bits: float
    book_bits: float
    errors: tuple[float, float]
    logits: float


def measure(settings: QVGSettings, pair: tuple[Tensor, Tensor], grid: tuple[int, int], chunk_frames: int) -> Left:
    """Store K and V [T, R, D] chunk by chunk and read back what was stored last; the first chunk does not count."""
    bare = replace(settings, sink_frames=0, recent_frames=0, window_frames=0, budget_gib=0.0, offload=False)
    heads, dim = pair[0].shape[1:]
    cache = KVCache(bare, layers=1, heads=heads, head_dim=dim, grid=grid, rope=NoRope, device=pair[0].device, dtype=torch.float32)
    layer, size = cache.layers[0], chunk_frames * grid[0] * grid[1]
    means = [x.mean(0) for x in pair]
    errors, energies, logits, span_bytes = torch.zeros(2), torch.zeros(2), torch.zeros(2), 0
    for number, chunk in enumerate(zip(*(x.split(size) for x in pair))):
        layer.append(*(x[None] for x in chunk), chunk_frames)
        span_bytes += sum(layer.entries[-1].counts[0].values())
        if not number:
            continue
        found = tokens_of(layer.entries[-1].present(), cache.tables, torch.float32)
        for side, (got, x, mean) in enumerate(zip(found, chunk, means)):
            errors[side] += (got - x).square().sum().cpu()
            energies[side] += (x - mean).square().sum().cpu()
        exact = (chunk[0] - means[0]).transpose(0, 1)
        queries, wrong = exact[:, ::7].mT, (found[0] - chunk[0]).transpose(0, 1)
        logits += torch.stack([(wrong @ queries).square().sum(), (exact @ queries).square().sum()]).cpu()
    elements = sum(x.numel() for x in pair)
    books = cache.stats().by_kind["codebooks"]
    return Left(8 * span_bytes / elements, 8 * books / elements, tuple((errors / energies).tolist()), float(logits[0] / logits[1]))


def sources(options: argparse.Namespace) -> Iterator[tuple[str, list[Statistics], tuple[str, ...]]]:
    """A name, statistics of K and of V, and the tensors that are reported."""
    if options.statistics is None:
        generator = torch.Generator().manual_seed(options.seed)
        for name in json.loads(RECORDED.read_text()):
            yield name, [recorded(name, HEADS, generator) for _ in range(2)], ("K",)
        return
    tensors, info = statistics.load(options.statistics)
    for layer in range(info["layers"]):
        yield f"layer {layer}", [of_file(tensors, layer, side) for side in range(2)], ("K", "V")


def main(arguments) -> None:
    """Raises ValueError for a file that `qvg bench statistics` did not write, before anything is computed."""
    parser = argparse.ArgumentParser(prog="qvg bench synthetic", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add_places(parser)
    parser.add_argument("--statistics", type=Path, help="a file of `qvg bench statistics`, in place of the recorded keys")
    parser.add_argument("--only", nargs="+", metavar="PRESET", default=(), help="presets to measure (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="few tokens, as a check that it works")
    options = parser.parse_args(arguments)
    claim(options, "synthetic")
    methods, rows = presets(options.only), []
    grid, chunks = ((8, 12), 4) if options.small else (GRID, CHUNKS)
    for name, both, shown in sources(options):
        generator = torch.Generator().manual_seed(options.seed)
        pair = tuple(generate(one, chunks * CHUNK_FRAMES, grid[0] * grid[1], generator).to(options.device) for one in both)
        for method, settings in methods.items():
            progress(f"{name}: {method}")
            left = measure(settings, pair, grid, CHUNK_FRAMES)
            rows += [{"tokens": name, "tensor": tensor, "method": method, "bits": left.bits + left.book_bits, "book_bits": left.book_bits,
                      "error": left.errors["KV".index(tensor)], "logits": left.logits if tensor == "K" else None} for tensor in shown]
    shown = table(COLUMNS, [(row["tokens"], row["tensor"], row["method"], row["bits"], row["book_bits"], 100 * row["error"],
                             None if row["logits"] is None else 100 * row["logits"]) for row in rows])
    result = {"environment": environment(options.device, command_line("synthetic", arguments)), "note": NOTE, "rows": rows}
    write(options.out, "synthetic", result, f"{NOTE}\n\n{shown}")
