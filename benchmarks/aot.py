"""Compile every kernel ahead of time and report its registers, spills and shared memory. This needs no GPU.

    python -m comfyui_qvg.benchmarks.aot            # one JSON line per kernel variant and target; fails if one spills more than SPILLS
    python -m comfyui_qvg.benchmarks.aot --few --targets cuda:90 hip:gfx942

The report decides whether a kernel can run on a GPU that is not available for tests, so a test reads these lines.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

from ..kernels import (
    assign,
    attend,
    attend_pack,
    bit_vectors,
    decode,
    decode_transform,
    eigh,
    encode,
    encode_transform,
    hopper,
    hopper_attend,
    hopper_attend_join,
    hopper_decode,
    jobs,
    join,
    project,
    rotate,
    store,
    update,
)
from ..kernels.tiles import Product
from ..qvg.attention import fast
from ..qvg.backends import Unsupported
from ..qvg.codec import e4m3
from ..qvg.codec.transform import words_of

# bytes of shared memory that one program may use
TARGETS = {
    GPUTarget("cuda", 80, 32): 166_912,
    GPUTarget("cuda", 89, 32): 101_376,
    GPUTarget("cuda", 90, 32): 232_448,
    GPUTarget("cuda", 100, 32): 232_448,
    GPUTarget("cuda", 120, 32): 101_376,
    GPUTarget("hip", "gfx942", 64): 65_536,
    GPUTarget("hip", "gfx1100", 32): 65_536,
}
# bytes on the stack of a thread that are accepted, by target and variant, as Triton 3.9 compiles them; every other variant spills nothing.
# Eight bytes are two registers of a thread that loads and stores kilobytes. Presets read two of these: 2 bits (sinks and recent frames of
# Tiny) and, in heads of 256 channels, 4 bits (those of Balanced, recent ones of Quality). Attention on Hopper spills around its loop over
# tiles of keys and not in it, which a test checks
SPILLS = {
    "cuda:80": {"decode-d128-kind0-b3-s1-g2": 8, "decode-d128-kind0-b4-s2-g2": 8},
    "cuda:90": {"decode-d128-kind0-b4-s2-g2": 8, "attend-hopper-d128": 56},
    "cuda:100": {"decode-transform-d128-w16": 8},
    "cuda:120": {"decode-transform-d256-w64": 8},
}
# ends of the names of strides that are multiples of 16 in a run
ALIGNED = ("_stride", "_stage", "_token", "_row", "_batch", "_head")
# channel pairs that rotate with time, by head dim
TIME_PAIRS = {64: 12, 128: 22, 256: 44}


def _pairs(**types: str) -> dict[str, str]:
    """Types of the pointers of K and of V by name."""
    return {prefix + name: kind for name, kind in types.items() for prefix in ("", "other_")}


PREPARED = {"table": "*bf16", "norms": "*fp32"}
STORED = {"codes": "*u8", "units": "*bf16", **PREPARED}
SUMS = {"x": "*bf16", "ids": "*i64", "sums": "*fp32", "sizes": "*fp32"}
MEANS = {**SUMS, "centroids": "*fp32", "means": "*fp32", **PREPARED}
CODEBOOKS = {**_pairs(codes="*u8", units="*bf16", channel_scale="*bf16"), **PREPARED, "factors": "*fp32"}
ENCODED = {**_pairs(x="*bf16", codes="*u8", ids="*u8", plane0="*u8", plane1="*u8", plane2="*u8", plane3="*u8"),
           **PREPARED, "factors": "*fp32", "roots": "*fp32", **{f"b{number}": "fp32" for number in range(encode.MAX_BORDERS)}}
READ = {"jobs": "*i64", "levels": "*fp32", "vectors": "*bf16", "angles": "*i64", "keys": "*bf16", "values": "*bf16"}
COMPONENTS = {**_pairs(x="*bf16", mean="*bf16", vectors="*bf16", deviation="*bf16", weight="*bf16", reach="*u8"),
              "roots": "*fp32", "parts": "*fp32", "codes": "*u8"}
PACKED = {"codes": "*u8", "roots": "*fp32", "parts": "*fp32",
          **_pairs(order="*u8", out="*i16", scales="*u8", exponents="*i8", fit="*fp32")}
ROTATED = {**_pairs(x="*bf16", out="*bf16"), "cos": "*fp32", "sin": "*fp32", "value": "*bf16", "keys": "*bf16", "values": "*bf16"}
PROJECTED = dict.fromkeys(("x", "other", "out", "other_out", "rotated"), "*bf16") | dict.fromkeys(("matrices", "cos", "sin"), "*fp32")
ATTENDED = {"q": "*bf16", "keys": "*i8", "key_scales": "*fp32", "key_mean": "*fp32", "value_scales": "*fp32", "out": "*bf16",
            "lse": "*fp32"}
PAIR_PACKED = {"k": "*bf16", "v": "*bf16", "keys": "*i8", **dict.fromkeys(("sums", "most", "mean", "key_scales", "value_scales"), "*fp32")}
SCALES = {"roots": "*fp32", **_pairs(scales="*u8", exponents="*i8")}
WHOLE = {**ENCODED, **_pairs(units="*bf16", channel_scale="*bf16", scales="*u8", exponents="*i8"), "arrived": "*i32", "words": "*i32"}
JOINED = {"parts": "*fp32", "part_lse": "*fp32", "out": "*bf16", "lse": "*fp32"}
PARTS = {"first": "*bf16", "second": "*bf16", "out": "*fp32", **dict.fromkeys(("first_lse", "second_lse", "lse"), "*fp32")}
# the first two parts, another, and the last to its place
PART_TYPES = {"first": PARTS, "next": PARTS | {"first": "*fp32"}, "last": PARTS | {"first": "*fp32", "out": "*bf16"}}
ATTENDED_ON_HOPPER = {**JOINED, **ATTENDED, "scale": "fp32"}


@dataclass(frozen=True)
class Variant:
    """A kernel and the constants that it is compiled for. pointers: types of the arguments that are not int32."""

    name: str
    kernel: object
    pointers: dict[str, str]
    constants: dict
    warps: int
    registers: int | None = None
    stages: int = 2


@dataclass(frozen=True)
class Report:
    """The compiler's report. registers: of a thread. spilled, shared and their limits: in bytes. stuck, running:
    see `barriers_in_turns` and `running_products`."""

    name: str
    target: str
    registers: int
    spilled: int
    spilled_limit: int
    shared: int
    shared_limit: int
    stuck: int
    running: int = 0

    @property
    def fits(self) -> bool:
        return self.spilled <= self.spilled_limit and self.shared <= self.shared_limit and not self.stuck and not self.running


def barriers_in_turns(ptx: str) -> int:
    """Number of barriers of a whole program where one warp group has its turn at the matrix units (`kernels/hopper_assign.py`), which would
    be a deadlock: the group waits for the others, and they for their turn. The compiler inserts barriers where it likes; those of 128
    threads are of one group."""
    found, turn = 0, False
    for line in ptx.splitlines():
        if re.search(r"\bbar\.(sync|arrive) \w+, 256;", line):
            turn = "bar.sync" in line
        elif turn and re.search(r"\b(bar\.sync|barrier\.sync\S*)\s+0\b(?!, 128)", line):
            found += 1
    return found


def running_products(ttir: str) -> int:
    """Number of E4M3 products that are added to something by the matrix units, whose sums have few bits (`kernels/attend.py`). The compiler
    may join an addition to the product before it."""
    zeros = set(re.findall(r"(%\S+) = arith\.constant dense<0\.0+e\+00> : tensor<\S+xf32>", ttir))
    sums = re.findall(r"= tt\.dot %\S+, %\S+, (%[^\s,]+)[^\n]*f8E4M3FN", ttir)
    return sum(found not in zeros for found in sums)


def variants(target: GPUTarget, few: bool = False) -> Iterator[Variant]:
    """Every kind of span, number of planes and head dim that presets and models use. few: only those of the presets for a head dim of
    128."""
    nvidia = target.backend == "cuda"
    native_e4m3 = nvidia and target.arch >= 89
    name = "cuda" if nvidia else "cdna" if target.arch.startswith("gfx9") else "rdna"
    kinds = [jobs.Kind(jobs.PLANES.value, 2, 2, 1), jobs.Kind(jobs.INT8.value, groups=1)]
    if not few:
        kinds += [jobs.Kind(jobs.PLANES.value, bits, stages, groups)
                  for bits, stages, groups in ((1, 2, 1), (3, 1, 2), (4, 2, 2), (2, 0, 1))]
        kinds += [jobs.Kind(jobs.PAPER.value, 2, 1, 2), jobs.Kind(jobs.PAPER.value, 4, 4, 2, zeros=True)]
        kinds += [jobs.Kind(jobs.PLAIN.value)]
    yield from _ones(nvidia)
    for dim in (128,) if few else TIME_PAIRS:
        for kind in kinds if dim == 128 else kinds[:1]:
            yield _decode(kind, dim, name, native_e4m3, target.arch // 10 if nvidia else 0)
        on_hopper = nvidia and target.arch == 90 and dim <= 128
        for bits in (1.25, 4) if few else (0.5, 0.75, 1.25, 2, 3, 4):
            yield from _transform(words_of(bits, dim), dim, name, native_e4m3, on_hopper)
        for turned in (False, True) if on_hopper else (False,):
            yield Variant(f"bit-vectors-d{dim}{'-turned' * turned}", bit_vectors.bit_vectors_kernel, {"tables": "*i64", "out": "*bf16"},
                          {"D": dim, "BITS": 4 * dim, "DEPTHS": 8, "TURNED": turned}, 4)
        if nvidia:
            yield Variant(f"eigh-d{dim}", eigh.eigh_kernel, dict.fromkeys(("matrices", "turned", "vectors", "values"), "*fp32"),
                          {"D": dim, "PAIRS": min(dim // 2, eigh.HELD // dim), "SWEEPS": eigh.SWEEPS}, 32, stages=1)
        for places in (False, True):
            yield Variant(f"rotate-d{dim}{'-places' * places}", rotate.rotate_kernel, ROTATED,
                          {"D": dim, "LINES": 2048 // dim, "PLACES": places}, 4)
        for turns in (False, True):
            yield Variant(f"project-d{dim}{'-turns' * turns}", project.project_kernel, PROJECTED,
                          {"D": dim, "LINES": 2048 // dim, "TURNS": turns}, 4)
        for part, types in PART_TYPES.items():
            yield Variant(f"join-{part}-d{dim}", join.join_kernel, types, {"D": dim, "LINES": join.ELEMENTS // dim, "UNIT": join.UNIT}, 4)
        if dim in fast.HEAD_DIMS:
            yield from _attend(dim, name, native_e4m3, target.arch // 10 if nvidia else 0)
        try:
            cut = Product.on(name, dim)
        except Unsupported:
            continue
        product = {"TOKENS": cut.tokens, "BLOCK": cut.block}
        for dtype in ("*bf16", "*fp32"):
            yield Variant(f"assign-d{dim}-{dtype[1:]}", assign.assign_kernel, {
                "x": dtype, "table": "*bf16", "norms": "*fp32", "ids": "*i64"},
                {"D": dim, **product}, cut.warps, stages=cut.stages)
            yield Variant(f"residual-d{dim}-{dtype[1:]}", store.residual_kernel, {"x": dtype, **STORED, "residual": "*fp32"},
                          {"D": dim, **product, "NATIVE_E4M3": native_e4m3}, cut.warps, stages=cut.stages)
            if few:
                break
        yield Variant(f"store-d{dim}", store.store_kernel, {"found": "*fp32", **STORED},
                      {"MOST": e4m3.MAX, "D": dim, "BLOCK": cut.block, "NATIVE_E4M3": native_e4m3}, 8)
        yield Variant(f"sums-d{dim}", update.sums_kernel, SUMS,
                      {"D": dim, **product, "TOKENS": 32, "PRECISION": cut.precision}, cut.warps, stages=cut.stages)
        for prepares in (False, True):
            yield Variant(f"means-d{dim}{'-prepares' * prepares}", update.means_kernel, MEANS,
                          {"D": dim, "SEARCH": update.SEARCH // dim, "PREPARES": prepares}, 4)
        yield Variant(f"prepare-d{dim}", assign.prepare_kernel, {"centroids": "*fp32", **PREPARED}, {"D": dim, "BLOCK": assign.PREPARED}, 4)
        yield Variant(f"encode-transform-d{dim}", encode_transform.components_kernel, COMPONENTS, {
            "D": dim, "TOKENS": cut.tokens, "BLOCK": encode_transform.block_of(name, cut, dim), "EXACT": False}, cut.warps,
            stages=cut.stages)
        yield Variant(f"pack-d{dim}", encode_transform.pack_kernel, PACKED, {"BITS": 4 * dim, "TOKENS": encode_transform.PACKED}, 4)
        yield Variant(f"encode-prepare-d{dim}", encode.prepare_kernel, CODEBOOKS,
                      {"D": dim, "STAGES": 2, "BLOCK": assign.PREPARED, "NATIVE_E4M3": native_e4m3}, 4)
        for bits, stages, groups in ((2, 2, 1), (4, 2, 2)):
            yield Variant(f"encode-d{dim}-b{bits}", encode.encode_kernel, ENCODED, {
                "STAGES": stages, "GROUPS": groups, "BITS": bits, "D": dim, "NATIVE_E4M3": native_e4m3,
                **product}, encode.encode_warps(cut, dim, target.arch // 10 if nvidia else 0), stages=cut.stages)
    if nvidia and target.arch == 90:
        yield from _hopper(few)
    yield Variant("encode-scales", encode.scales_kernel, SCALES, {"BLOCK": encode.SCALES}, 8)


def _hopper(few: bool) -> Iterator[Variant]:
    """Variants of the kernel for Hopper; the first two are those of presets."""
    # bits, stages, groups, centroids, head dim
    shapes = [(2, 2, 1, 128, 128), (4, 2, 2, 256, 128), (1, 2, 1, 256, 128), (3, 1, 2, 40, 128), (1, 1, 1, 128, 128), (4, 4, 2, 128, 128),
              (2, 2, 1, 128, 64), (4, 4, 1, 5, 64), (2, 2, 4, 100, 256)]
    for bits, stages, groups, count, dim in shapes[:2] if few else shapes:
        cut = hopper.Cut.of(bits, stages, count, dim)
        yield Variant(f"encode-hopper-d{dim}-b{bits}-s{stages}-c{count}", hopper.encode_kernel, WHOLE, {
            "STAGES": stages, "GROUPS": groups, "BITS": bits, "D": dim, "C": cut.block, "N": cut.width, "T": cut.tokens,
            "AT_ONCE": hopper.SCALES, "CLAMPS": count < cut.block}, cut.warps, cut.registers)
    for dim in (128,) if few else (128, 64):
        yield attend_on_hopper(dim, hopper_attend.Cut.of(dim))
        yield Variant(f"attend-join-d{dim}", hopper_attend_join.join_kernel, JOINED, {
            "D": dim, "ROWS": hopper_attend.JOINED, "BLOCK": hopper_attend.Cut.of(dim).queries}, 4)


def attend_on_hopper(dim: int, cut: hopper_attend.Cut) -> Variant:
    """Attention to a packed history on Hopper."""
    keys, values = hopper_attend.boxes(cut.keys, dim)
    of_keys, of_values = hopper_attend.layouts(cut.keys, dim)
    types = {"keys": f"tensordesc<i8{list(keys)},{of_keys!r}>", "values": f"tensordesc<fp8e4nv{list(values)},{of_values!r}>"}
    return Variant(f"attend-hopper-d{dim}", hopper_attend.attend_kernel, ATTENDED_ON_HOPPER | types, cut.constants(dim), 4)


def _ones(nvidia: bool) -> Iterator[Variant]:
    """Every kernel with all integers 1, which a launch turns into constants."""
    cut = Product.on("cuda" if nvidia else "rdna", 64)
    product = {"TOKENS": cut.tokens, "BLOCK": cut.block}
    shape = {"STAGES": 1, "GROUPS": 1, "D": 64, "NATIVE_E4M3": False}
    decoded = _decode(jobs.Kind(jobs.PLANES.value, 2, 1, 1), 64, "rdna", False)
    found = [
        ("assign", assign.assign_kernel, {"x": "*bf16", **PREPARED, "ids": "*i64"}, {"D": 64, **product}),
        ("prepare", assign.prepare_kernel, {"centroids": "*fp32", **PREPARED}, {"D": 64, "BLOCK": assign.PREPARED}),
        ("encode-prepare", encode.prepare_kernel, CODEBOOKS,
         {"D": 64, "STAGES": 1, "BLOCK": assign.PREPARED, "NATIVE_E4M3": False}),
        ("sums", update.sums_kernel, SUMS, {"D": 64, **product, "PRECISION": cut.precision}),
        ("means", update.means_kernel, MEANS, {"D": 64, "SEARCH": 32, "PREPARES": True}),
        ("store", store.store_kernel, {"found": "*fp32", **STORED}, {"MOST": e4m3.MAX, "D": 64, "BLOCK": cut.block, "NATIVE_E4M3": False}),
        ("residual", store.residual_kernel, {"x": "*bf16", **STORED, "residual": "*fp32"}, {"D": 64, **product, "NATIVE_E4M3": False}),
        ("rotate", rotate.rotate_kernel, ROTATED, {"D": 64, "LINES": 32, "PLACES": True}),
        ("project", project.project_kernel, PROJECTED, {"D": 64, "LINES": 32, "TURNS": True}),
        ("join", join.join_kernel, PARTS, {"D": 64, "LINES": 32, "UNIT": join.UNIT}),
        ("encode", encode.encode_kernel, ENCODED, {**shape, "BITS": 1, **product}),
        ("encode-scales", encode.scales_kernel, SCALES, {"BLOCK": 64}),
        ("attend", attend.attend_kernel, {**ATTENDED, "values": "*bf16"},
         {"D": 64, "TILE": 64, "E4M3": False, "NATIVE_E4M3": False, "ROWS": 64, "KEYS": 64}),
        ("attend-sums", attend_pack.sums_kernel, PAIR_PACKED, {"D": 64, "TOKENS": 64, "E4M3": False}),
        ("attend-pack", attend_pack.pack_kernel, {**PAIR_PACKED, "values": "*bf16"},
         {"D": 64, "TILE": 64, "E4M3": False, "NATIVE_E4M3": False}),
        ("decode", decoded.kernel, decoded.pointers, decoded.constants),
    ]
    for name, kernel, arguments, constants in found:
        numbers = {parameter.name: 1 for parameter in kernel.params
                   if parameter.name not in {**arguments, **constants} and not parameter.do_not_specialize}
        yield Variant(f"{name}-ones", kernel, arguments, {**numbers, **constants}, 4, stages=cut.stages)


def _decode(kind: jobs.Kind, dim: int, name: str, native_e4m3: bool, major: int = 0) -> Variant:
    halves = decode.computes_in_halves(name, major, torch.bfloat16) and kind.code == jobs.PLANES.value
    tile = decode.Tiling.of(dim, name, kind.bits, major, halves)
    label = f"decode-d{dim}-kind{kind.code}-b{kind.bits}-s{kind.stages}-g{kind.groups}{'-z' if kind.zeros else ''}"
    return Variant(label, decode.decode_kernel, READ, {
        "KIND": kind.code, "BITS": kind.bits, "STAGES": kind.stages, "GROUPS": kind.groups, "HAS_ZEROS": kind.zeros,
        "D": dim, "TIME": TIME_PAIRS[dim], "TOKENS": tile.tokens, "HALVES": tile.halves, "NVIDIA": name == "cuda",
        "NATIVE_E4M3": native_e4m3, "PREFETCH": native_e4m3 and kind.code == jobs.PLANES.value}, tile.warps, tile.registers)


def _transform(words: int, dim: int, name: str, native_e4m3: bool, on_hopper: bool) -> Iterator[Variant]:
    """Decoding spans of some words."""
    shared = {"WORDS": words, "D": dim, "TIME": TIME_PAIRS[dim]}
    tile = decode_transform.tiling(words, dim, name, False)
    yield Variant(f"decode-transform-d{dim}-w{words}", decode_transform.decode_transform_kernel, READ, {
        **shared, "TOKENS": tile.tokens, "NVIDIA": name == "cuda", "NATIVE_E4M3": native_e4m3}, tile.warps,
        stages=decode_transform.stages(words, dim, name))
    if on_hopper:
        cut, tile = hopper_decode.Cut.of(words), decode_transform.tiling(words, dim, name, True)
        yield Variant(f"decode-hopper-d{dim}-w{words}", hopper_decode.decode_kernel, READ, {
            **shared, **cut.constants}, tile.warps, cut.registers)


def _attend(dim: int, name: str, native_e4m3: bool, major: int) -> Iterator[Variant]:
    """Attention in eight bits, and packing for it."""
    tile, values = attend.Tiling.of(name, major), "*fp8e4nv" if native_e4m3 else "*bf16"
    shared = {"D": dim, "TILE": attend.fast.TILE, "E4M3": native_e4m3, "NATIVE_E4M3": native_e4m3}
    yield Variant(f"attend-d{dim}", attend.attend_kernel, {**ATTENDED, "values": values}, {**shared, "ROWS": tile.rows, "KEYS": tile.keys},
                  tile.warps, stages=tile.stages)
    yield Variant(f"attend-sums-d{dim}", attend_pack.sums_kernel, PAIR_PACKED, {"D": dim, "TOKENS": 4096 // dim, "E4M3": native_e4m3}, 4)
    yield Variant(f"attend-pack-d{dim}", attend_pack.pack_kernel, {**PAIR_PACKED, "values": values}, shared, attend_pack.WARPS)


def compile_variant(variant: Variant, target: GPUTarget) -> Report:
    compiled = compiled_for(variant, target)
    registers, spilled = (_amd if target.backend == "hip" else _nvidia)(compiled)
    name = f"{target.backend}:{target.arch}"
    return Report(variant.name, name, registers, spilled, SPILLS.get(name, {}).get(variant.name, 0), compiled.metadata.shared,
                  TARGETS[target], barriers_in_turns(compiled.asm.get("ptx", "")), running_products(compiled.asm.get("ttir", "")))


def compiled_for(variant: Variant, target: GPUTarget):
    """What Triton makes of a kernel. Strides and addresses are assumed to be multiples of 16, as they are in a run."""
    names = variant.kernel.arg_names
    signature = {name: "constexpr" if name in variant.constants else variant.pointers.get(name, "i32") for name in names}
    aligned = {(number,): [["tt.divisibility", 16]] for number, (name, parameter) in enumerate(zip(names, variant.kernel.params))
               if name not in variant.constants and not parameter.do_not_specialize
               and (variant.pointers.get(name, "").startswith("*") or name.endswith(ALIGNED))}
    language = GluonASTSource if isinstance(variant.kernel, GluonJITFunction) else ASTSource
    source = language(variant.kernel, signature, constexprs=variant.constants, attrs=aligned)
    options = {"num_warps": variant.warps, "num_stages": variant.stages}
    if variant.registers is not None:
        options["maxnreg"] = variant.registers
    return triton.compile(source, target=target, options=options)


def _nvidia(compiled) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        told = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", told).groups())
    return registers, stack + local


def loops_of(compiled) -> list[Counter]:
    """How often every instruction stands in each loop of what was compiled for NVIDIA, with the loops inside it."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        told = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    labels, code, loops = {}, [], []
    for line in told.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s+/\*\w{4,}\*/\s+(?:@!?U?P\w+ )?([\w.]+)(.*);", line):
            code.append(instruction[1])
            target = re.search(r"`\((\.L_\w+)\)", instruction[2])
            if instruction[1].startswith("BRA") and target and (start := labels.get(target[1])) is not None:
                loops.append(Counter(name.partition(".")[0] for name in code[start:]))
    return loops


def _amd(compiled) -> tuple[int, int]:
    found = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", compiled.asm["amdgcn"]))
    return int(found["vgpr_count"]), 4 * (int(found["vgpr_spill_count"]) + int(found["sgpr_spill_count"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = {f"{target.backend}:{target.arch}": target for target in TARGETS}
    parser.add_argument("--targets", nargs="*", choices=names, default=list(names))
    parser.add_argument("--few", action="store_true", help="the presets' variants for heads of 128")
    options = parser.parse_args()
    failed = 0
    for name in options.targets:
        for variant in variants(names[name], options.few):
            report = compile_variant(variant, names[name])
            failed += not report.fits
            print(json.dumps(asdict(report)), flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    raise SystemExit(main())
