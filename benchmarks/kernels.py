"""Each op of the codec at the shapes of real models, compared with the memory bandwidth.

    qvg bench kernels [--small] [--out DIR] [--only decode encode attend released tune tune-attend]

For every op: microseconds (median, with a cold L2 cache), the bytes that it must move, and what share of the measured copy bandwidth it
achieves. For comparison, on the same tensors: `quant-videogen` 0.1.0, `flash-kmeans` and torch.compile of the reference. What cannot run is
listed with the reason. Data: clusters of tokens with channels of unequal size. Other data would change only the time of k-means with a
convergence test, which is disabled. Attention is to random tokens, with queries so large that each looks at few of them; its error is that
of the first queries, relative to attention in float32.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch import Tensor

from ..qvg import backends
from ..qvg.attention.fast import attend as attend_in_eight_bits
from ..qvg.attention.functions import sdpa
from ..qvg.attention.pieces import partial
from ..qvg.attention.rope import Rope, rotate
from ..qvg.cache.kv_cache import KVCache
from ..qvg.codec import kmeans
from ..qvg.codec import pair as codec
from ..qvg.models.catalogue import MODELS
from ..qvg.settings import PRESETS, QVGSettings
from . import peers
from .measure import add_places, claim, command_line, copy_bandwidth, environment, kernel_microseconds, microseconds, progress, table, write
from .planes import PLANES

COLUMNS = ("op", "backend", "shape", "us", "MB", "% of copy", "note")
BARE, TRANSFORM = (replace(settings, sink_frames=0, recent_frames=0) for settings in (PLANES["balanced"], PRESETS["balanced"]))
# the released package encodes 24 latent frames together
RELEASED_FRAMES = 24
# queries whose attention is compared with the exact one
COMPARED = 256


@dataclass(frozen=True)
class Case:
    """A context of a model: `frames` latent frames in chunks."""

    model: str
    frames: int
    chunk: int
    heads: int
    head_dim: int
    grid: tuple[int, int]

    @property
    def label(self) -> str:
        return f"{self.model}, {self.frames} frames, {self.heads} x {self.head_dim}"

    @property
    def frame_tokens(self) -> int:
        return self.grid[0] * self.grid[1]


def cases(small: bool) -> list[Case]:
    if small:
        return [Case("small", 4, 2, 4, 64, (3, 5))]
    found = []
    contexts = {"self-forcing": (21, 60, 120, 240), "longcat": (19,), "hy-worldplay-5b": (48,), "hy-worldplay-8b": (20,)}
    for model, lengths in contexts.items():
        shape = MODELS[model]
        geometry = shape.geometry()
        found += [Case(model, frames, shape.chunk_frames, geometry.heads, geometry.head_dim, geometry.grid) for frames in lengths]
    return found


def tokens(case: Case, frames: int, device: torch.device, seed: int) -> Tensor:
    """Tokens [1, T, H, D], bf16 on a GPU, else float32."""
    draw = torch.Generator(device).manual_seed(seed)
    shape = 1, frames * case.frame_tokens, case.heads, case.head_dim
    centres = 3 * torch.randn(32, case.head_dim, generator=draw, device=device)
    x = torch.randn(shape, generator=draw, device=device) + centres[torch.randint(32, shape[:-1], generator=draw, device=device)]
    return (x * torch.logspace(-1, 1, case.head_dim, device=device)).to(torch.bfloat16 if device.type == "cuda" else torch.float32)


def filled(case: Case, settings: QVGSettings, device: torch.device) -> KVCache:
    """A cache of one layer that holds the encoded context."""
    pair = tokens(case, case.chunk, device, 0), tokens(case, case.chunk, device, 1)
    cache = KVCache(settings, layers=1, heads=case.heads, head_dim=case.head_dim, grid=case.grid, rope=Rope, device=device,
                    dtype=pair[0].dtype, max_frames=case.frames + case.chunk, chunk_frames=case.chunk)
    for start in range(0, case.frames, case.chunk):
        frames = min(case.chunk, case.frames - start)
        cache.layers[0].append(*(x[:, :frames * case.frame_tokens] for x in pair), frames)
    return cache


class Bench:
    """Rows of the table, and the copy bandwidth with which they are compared."""

    def __init__(self, device: torch.device, small: bool):
        self.device, self.small = device, small
        self.bandwidth = copy_bandwidth(device, (1 << 20) if small else (1 << 30))
        self.rows: list[tuple] = []
        self.backend = next(backend for op, backend, _ in backends.report(device) if op == "decode")

    def add(self, op: str, backend: str, shape: str, function: Callable, size: float | None = None, note: str = "", **timing) -> float:
        time = microseconds(function, self.device, **timing)
        share = None if size is None else 100 * size / (1e-6 * time) / self.bandwidth
        self.rows.append((op, backend, shape, time, None if size is None else size / 1e6, share, note))
        progress(f"{op}, {backend}, {shape}: {time:.0f} us")
        return time

    def absent(self, op: str, backend: str, reason: str) -> None:
        self.rows.append((op, backend, "", None, None, None, f"not measured: {reason}"))


def reading(cache: KVCache, together: bool = False) -> tuple[Callable, int]:
    """A read of all heads of the layer, in the groups that attention reads or together, and the bytes that it must move."""
    layer, geometry = cache.layers[0], cache.geometry
    slices = [slice(0, geometry.heads)] if together else cache.head_slices()
    shape = 1, layer.tokens, slices[0].stop - slices[0].start, geometry.head_dim
    views = [torch.empty(shape, dtype=cache.workspace.dtype, device=cache.workspace.device) for _ in range(2)]

    def read() -> None:
        for heads in slices:
            layer.read(heads, *views)

    return read, layer.nbytes + len(slices) * sum(view.nbytes for view in views)


def decode(bench: Bench, found: list[Case]) -> None:
    for case in found:
        cache = filled(case, PRESETS["balanced"], bench.device)
        bench.add("decode", bench.backend, case.label, *reading(cache), note="balanced")
    case = found[min(1, len(found) - 1)]
    kinds = {"2 planes, 2 stages of 128": BARE, "1 plane": BARE.both(bits=1), "3 planes": BARE.both(bits=3), "4 planes": BARE.both(bits=4),
             "no stage": BARE.both(stages=0), "1 stage of 256": BARE.both(stages=1, centroids=256)}
    kinds |= {f"transform, {bits:g} bits": TRANSFORM.both(bits=bits) for bits in (0.5, 1, 1.25, 2, 4)}
    for name, settings in (kinds | {name: settings for name, settings in PRESETS.items() if name != "balanced"}).items():
        bench.add("decode", bench.backend, case.label, *reading(filled(case, settings, bench.device)), note=name)
    bench.add("decode", bench.backend, case.label, *reading(filled(case, BARE, bench.device), together=True),
              note="2 planes, 2 stages of 128, every head in one launch")
    if bench.backend == "triton":
        compiled_reference(bench, case)


def compiled_reference(bench: Bench, case: Case) -> None:
    """torch.compile of the reference on one span, for all heads together, scaled to the context."""
    cache = filled(replace(case, frames=case.chunk), BARE, bench.device)
    entry = cache.layers[0].entries[0]
    cos, sin = cache.rope.tables(0, entry.frames, bench.device)

    def reference():
        key, value = (span.decode(slice(None), cache.tables) for span in entry.spans)
        return rotate(key.bfloat16(), cos[:, None], sin[:, None]), value.bfloat16()

    spans, note = case.frames // case.chunk, f"one span of {case.chunk} frames, times {case.frames // case.chunk}"
    bench.rows.append(("decode", "torch", case.label, spans * microseconds(reference, bench.device), None, None, note))
    try:
        compiled = torch.compile(reference)
        bench.rows.append(("decode", "torch.compile", case.label, spans * microseconds(compiled, bench.device), None, None, note))
    except Exception as error:
        bench.absent("decode", "torch.compile", f"{type(error).__name__}: {str(error).splitlines()[0]}")


def encode(bench: Bench, found: list[Case]) -> None:
    """Encoding K and V of one chunk with existing codebooks, and training new ones."""
    seen = set()
    for case in found:
        if (case.model, case.chunk) in seen:
            continue
        seen.add((case.model, case.chunk))
        pair = [tokens(case, case.chunk, bench.device, seed)[0] for seed in (0, 1)]
        layer = filled(replace(case, frames=case.chunk), BARE, bench.device).layers[0]
        codecs, books = [side.codec for side in layer.sides], [side.book for side in layer.sides]
        label = f"{case.model}, {case.chunk} frames, {case.heads} x {case.head_dim}"
        _encode(bench, label, pair, codecs, books, 2, "2 planes, 2 stages of 128")
        _transform(bench, case, label, pair)
        rows = torch.cat([x.transpose(0, 1) for x in pair]).contiguous()
        start = rows[:, :codecs[0].codec.book_size(codecs[0].settings, rows.shape[1])].float().contiguous()
        ids = kmeans.assign(rows, start) if bench.backend == "triton" else kmeans.assign(rows.float(), start)
        count = start.shape[1]
        exact = rows.float()
        bench.add("assign", bench.backend, label, lambda: kmeans.assign(exact, start), exact.nbytes + ids.nbytes,  # noqa: B023
                  note=f"K and V, {count} centroids, float32 tokens")
        bench.add("update", bench.backend, label, lambda: kmeans.update(exact, ids, start), exact.nbytes + ids.nbytes,  # noqa: B023
                  note=f"K and V, {count} centroids, float32 tokens")

        for name, earlier in (("the first of a video, 8 iterations", [None, None]), ("a later codebook, 2 iterations", books)):
            _train(bench, label, pair, codecs, earlier, f"2 stages, {name}")
        bench.add("k-means", bench.backend, label, lambda: kmeans.kmeans(exact, start, 8),  # noqa: B023
                  note=f"K and V, {count} centroids, 8 iterations, float32 tokens, with the host's time", ahead=False)
        if case.model not in ("longcat", "hy-worldplay-8b"):
            _flash_kmeans(bench, label, exact, rows, start)


def _encode(bench: Bench, label: str, pair: list[Tensor], codecs: list, books: list, bits: float, note: str) -> None:
    spans = codec.encode(codecs, pair, (bits, bits), books)
    size = sum(x.nbytes for x in pair) + sum(span.nbytes for span in spans)
    bench.add("encode", bench.backend, label, lambda: codec.encode(codecs, pair, (bits, bits), books), size, note=f"K and V, {note}")


def _train(bench: Bench, label: str, pair: list[Tensor], codecs: list, earlier: list, note: str) -> None:
    def train():
        return codec.train(codecs, pair, [True, True], torch.Generator().manual_seed(0), earlier)

    bench.add("train", bench.backend, label, train, note=f"K and V, {note}, with the host's time", ahead=False)
    if bench.device.type == "cuda":
        bench.rows.append(("train", bench.backend, label, kernel_microseconds(train), None, None, f"K and V, {note}, the kernels alone"))


def _transform(bench: Bench, case: Case, label: str, pair: list[Tensor]) -> None:
    layer = filled(replace(case, frames=case.chunk), TRANSFORM, bench.device).layers[0]
    codecs, books = [side.codec for side in layer.sides], [side.book for side in layer.sides]
    for bits in (1.25, 4):
        _encode(bench, label, pair, codecs, books, bits, f"transform, {bits:g} bits")
    _train(bench, label, pair, codecs, books, "transform, a later basis")


def _flash_kmeans(bench: Bench, label: str, exact: Tensor, rows: Tensor, start: Tensor) -> None:
    package = peers.flash_kmeans()
    if isinstance(package, str) or bench.device.type != "cuda":
        bench.absent("k-means", "flash-kmeans", package if isinstance(package, str) else "it needs a GPU")
        return
    for name, x in (("float32", exact), ("bfloat16", rows)):
        try:
            bench.add("k-means", "flash-kmeans", label, lambda: package(x, start.shape[1], 8, start.to(x.dtype)),  # noqa: B023
                      note=f"K and V, {start.shape[1]} centroids, 8 iterations, {name} tokens, with the host's time", ahead=False)
        except Exception as error:
            bench.absent("k-means", "flash-kmeans", f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")


@dataclass(frozen=True)
class Looking:
    """Queries of a chunk of Self-Forcing, q [1, T, H, D], and a history, k and v [1, N, H, D]."""

    label: str
    q: Tensor
    k: Tensor
    v: Tensor
    exact: Tensor

    @staticmethod
    def at(frames: int, bench: Bench) -> Looking:
        queries, frame_tokens, heads, dim = (20, 15, 2, 64) if bench.small else (4680, 1560, 12, 128)
        draw = torch.Generator(bench.device).manual_seed(0)
        dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float32
        q, k, v = (torch.randn(1, count, heads, dim, generator=draw, device=bench.device).to(dtype)
                   for count in (queries, frames * frame_tokens, frames * frame_tokens))
        q *= 4
        exact, _ = partial(q[:, :COMPARED].float(), k.float(), v.float())
        return Looking(f"{frames} frames, {heads} x {dim}, {queries} queries", q, k, v, exact)

    def add(self, bench: Bench, backend: str, note: str, function: Callable, **timing) -> None:
        """function: returns the output."""
        found = function()[:, :COMPARED]
        error = float((found.float() - self.exact).norm() / self.exact.norm())
        time = bench.add("attend", backend, self.label, function, note=note, **timing)
        rate = 4 * self.q.numel() * self.k.shape[1] / time / 1e6
        bench.rows[-1] = (*bench.rows[-1][:-1], f"{note}, relative error {error:.4f}, {rate:.0f} TFLOP/s")


def attend(bench: Bench, found: list[Case]) -> None:
    """Attention in eight bits to a long history, torch's to the same, and the parts of the first."""
    backend, refusal = next(row[1:] for row in backends.report(bench.device) if row[0] == "attend")
    for frames in (4, 9) if bench.small else (60, 180):
        at = Looking.at(frames, bench)
        at.add(bench, "torch", "torch's own choice", lambda: sdpa(at.q, at.k, at.v))  # noqa: B023
        at.add(bench, "torch", "with the log-sum-exp", lambda: partial(at.q, at.k, at.v)[0])  # noqa: B023
        if backend != "triton":
            at.add(bench, backend, "eight bits, the reference", lambda: attend_in_eight_bits(at.q, at.k, at.v)[0])  # noqa: B023
            bench.absent("attend", "triton", refusal)
            continue
        at.add(bench, backend, "eight bits, with packing", lambda: attend_in_eight_bits(at.q, at.k, at.v)[0])  # noqa: B023
        _packed(bench, at)


def _packed(bench: Bench, at: Looking) -> None:
    """Packing, and each kernel with what was packed."""
    from ..kernels.attend import Tiling, attend_packed
    from ..kernels.attend_pack import pack
    from ..kernels.tiles import converts_e4m3, major, platform

    tile = Tiling.of(platform(bench.device), major(bench.device))
    for e4m3 in (True, False) if converts_e4m3(bench.device) else (False,):
        packed, kind = pack(at.k, at.v, e4m3), "values in E4M3" if e4m3 else "values in 16 bits"
        held = [x for x in vars(packed).values() if isinstance(x, Tensor) and x is not at.v]
        size = 2 * (at.k.nbytes + at.v.nbytes * e4m3) + sum(x.nbytes for x in held)
        bench.add("attend", "triton", at.label, lambda: pack(at.k, at.v, e4m3), size, note=f"packing alone, {kind}")  # noqa: B023
        at.add(bench, "triton", f"packed, the kernel for any GPU, {kind}", lambda: attend_packed(at.q, packed, tile)[0])  # noqa: B023
        if e4m3 and major(bench.device) == 9:
            try:
                from ..kernels import hopper_attend

                at.add(bench, "triton", f"packed, the kernel for Hopper, {kind}",
                       lambda: hopper_attend.attend_packed(at.q, packed)[0])  # noqa: B023
            except Exception as error:
                bench.absent("attend", "triton", f"the kernel for Hopper: {type(error).__name__}: {str(error).splitlines()[0]}")


def tune_attend(bench: Bench, found: list[Case]) -> None:
    """Attention in eight bits with other tilings, from which `Tiling.of` is to be chosen."""
    if reason := backends.refusal("attend", bench.device):
        bench.absent("attend", "triton", reason)
        return
    from ..kernels.attend import Tiling, attend_packed
    from ..kernels.attend_pack import pack
    from ..kernels.tiles import converts_e4m3

    at = Looking.at(4 if bench.small else 60, bench)
    packed = pack(at.k, at.v, converts_e4m3(bench.device))
    for rows, keys, warps, stages in itertools.product((64, 128), (64, 128), (4, 8), (1, 2, 3)):
        tile = Tiling(rows, keys, warps, stages)
        try:
            at.add(bench, "triton", str(tile), lambda: attend_packed(at.q, packed, tile)[0], repeats=5)  # noqa: B023
        except Exception as error:
            bench.absent("attend", "triton", f"{tile}: {type(error).__name__}: {str(error).splitlines()[0]}")


def released(bench: Bench, found: list[Case]) -> None:
    """The released quant-videogen: encoding and decoding K and V of 24 frames of Self-Forcing, or of a whole context of LongCat."""
    package = peers.quant_videogen()
    if isinstance(package, str) or bench.device.type != "cuda":
        bench.absent("encode, decode", "quant-videogen", package if isinstance(package, str) else "it needs a GPU")
        return
    for case in found:
        if case.model not in ("self-forcing", "longcat") or case.frames > 60:
            continue
        sizes = [RELEASED_FRAMES, case.chunk] if case.frames == 60 else [case.frames] if case.model == "longcat" else []
        for frames in sizes:
            pair = [tokens(case, frames, bench.device, seed).transpose(1, 2).contiguous() for seed in (0, 1)]
            label = f"{case.model}, {frames} frames, {case.heads} x {case.head_dim}"
            try:
                packed = [package.encode(x) for x in pair]
                bench.add("encode", "quant-videogen", label, lambda: [package.encode(x) for x in pair],  # noqa: B023
                          note="K and V, k-means of 256 included, 2 iterations, with the host's time", ahead=False, repeats=10)
                size = sum(x.nbytes for x in pair) + sum(peers.packed_bytes(part) for part in packed)
                bench.add("decode", "quant-videogen", label, lambda: [package.decode(part) for part in packed], size,  # noqa: B023
                          note="K and V, without RoPE")
            except Exception as error:
                bench.absent("encode, decode", "quant-videogen", f"{type(error).__name__}: {str(error).splitlines()[0]}")


def tune(bench: Bench, found: list[Case]) -> None:
    """The decode kernel with other tilings, from which `Tiling.of` and `PROGRAM` were chosen."""
    case = found[min(1, len(found) - 1)]
    if bench.backend != "triton":
        bench.absent("decode", "triton", backends.refusal("decode", bench.device))
        return
    from ..kernels import decode
    from ..kernels.tiles import platform

    chosen = decode.Tiling.of(case.head_dim, platform(bench.device), halves=True)
    for size, registers, program in itertools.product((1, 2), (None, 96, 80, 72, 64), (48, 96, 144, 192, 336)):
        tiling = replace(chosen, tokens=chosen.tokens * size, warps=chosen.warps * size, registers=registers)
        with mock.patch.object(decode.Tiling, "of", staticmethod(lambda *_: tiling)), mock.patch.object(decode, "PROGRAM", program):  # noqa: B023
            cache = filled(case, BARE, bench.device)
            bench.add("decode", "triton", case.label, *reading(cache), note=f"{tiling}, {program} tokens a program", repeats=10)


PARTS = {"decode": decode, "encode": encode, "attend": attend, "released": released, "tune": tune, "tune-attend": tune_attend}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="qvg bench kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny shapes, to see that it runs")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=[name for name in PARTS if not name.startswith("tune")])
    add_places(parser)
    options = parser.parse_args(arguments)
    claim(options, "kernels")
    device = torch.device(options.device)
    bench = Bench(device, options.small)
    for number, part in enumerate(options.only, 1):
        PARTS[part](bench, cases(options.small))
        # written after every part, so that a time limit loses only the current one
        result = {"environment": environment(device, command_line("kernels", arguments)), "copy_bytes_per_second": bench.bandwidth,
                  "rows": [dict(zip(COLUMNS, row)) for row in bench.rows],
                  "refusals": [row for row in backends.report(device) if row[2]]}
        write(options.out, "kernels", result, f"copy bandwidth {bench.bandwidth / 1e9:.0f} GB/s\n\n" + table(COLUMNS, bench.rows),
              show=number == len(options.only))
