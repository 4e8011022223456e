"""The schema of session files as data: the fields of the header, and from them the dtype, shape and range of every tensor.

    header = CAUSAL(header, "header")           # or SEGMENTS, or STREAM; raises fields.FieldError
    for name, part in causal_parts(header).items():
        part.check_listed(name, dtype, shape)   # before the tensor is read
        part.check_values(name, tensor)

Anyone can write a file with correct checksums, so they prove nothing about its values. No number from a file sizes an allocation, a loop
or a decode before it has been checked here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cache.geometry import Geometry
from ..cache.walks import MEMORIES
from ..codec import SpanShape, base, e4m3
from ..codec.base import LARGEST
from ..files.fields import (
    FieldError,
    anything,
    boolean,
    integer,
    list_of,
    mapping,
    one_of,
    optional,
    real_number,
    record,
    require,
    text,
    tuple_of,
)
from ..models.wan_vae import CHANNELS
from ..models.worldplay_wan import ACTIONS
from ..registry import CODECS
from ..settings import PLAIN_BITS, QVGSettings, TensorSettings
from .run import MAX_CHUNK, MAX_FRAMES, MAX_SIGMA, MAX_SIGMAS, NOISES, SOLVERS
from .schedule import latent_frames

MAX_BYTES = 2 ** 50
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
STATE_BYTES = torch.Generator().get_state().numel()
SIDES = ("key", "value")
WALK_KIND = "walk"
CARRIES = ("pixels", "latents")

Axis = int | range


def settings(value, where: str) -> QVGSettings:
    """Settings from a field's JSON text."""
    try:
        return QVGSettings.from_json(text()(value, where))
    except FieldError:
        raise
    except (ValueError, RecursionError) as error:
        raise FieldError(f"{where} cannot be read: {str(error) or type(error).__name__}".rstrip(". ")) from None


def bits_per_element(value, where: str) -> float:
    """A number that is an int where it is whole. Which ones a codec holds is checked with its settings."""
    value = real_number(0, max(PLAIN_BITS))(value, where)
    return int(value) if value == int(value) else value


FRAMES, BYTES, SIZE = integer(0, MAX_FRAMES), integer(0, MAX_BYTES), integer(1, 65_536)
NAME = text(200)
TENSORS = mapping(tuple_of(text(40), list_of(integer(0, MAX_BYTES), 0, 8), text(64)))
BOOK = optional(integer(0, 2 * MAX_FRAMES))
BITS = bits_per_element

# older sessions lack the solver and the length of a first chunk
RUN = record(
    {"solver": "renoise", "first_frames": 0}, frames=integer(1, MAX_FRAMES), chunk_frames=integer(1, MAX_CHUNK),
    sigmas=list_of(real_number(0, MAX_SIGMA), 2, MAX_SIGMAS), seed=integer(0, 2 ** 64 - 1), first_alone=boolean,
    context_noise=real_number(0, 1), recache_frames=FRAMES, noise=one_of(*NOISES), solver=one_of(*SOLVERS),
    first_frames=integer(0, MAX_CHUNK))
GEOMETRY = record(
    layers=integer(1, 256), heads=integer(1, 1024), head_dim=integer(8, 1024), grid=tuple_of(SIZE, SIZE), batch=integer(1, 1024))
# entries: first latent frame, frames, bits of K and V, numbers of their codebooks. Older sessions lack trained_on: the latent frames that
# the current codebooks were trained on, the first and one past the last
LAYER = record(
    {"trained_on": [0, 0]}, entries=list_of(tuple_of(FRAMES, integer(1, MAX_FRAMES), BITS, BITS, BOOK, BOOK)), books=tuple_of(BOOK, BOOK),
    next_frame=FRAMES, epoch_frames=FRAMES, trained=boolean, trained_on=tuple_of(FRAMES, FRAMES))
CAUSAL = record(
    version=integer(1, 2), fingerprint=NAME, run=RUN, shape=tuple_of(SIZE, SIZE, SIZE, SIZE), settings=list_of(settings, 1, 64),
    geometry=list_of(GEOMETRY, 1, 64), dtype=one_of(*map(str, FLOATS)), layers=list_of(list_of(LAYER, 1, 256), 1, 64),
    peaks=list_of(BYTES, 1, 64), frames_done=FRAMES, chunk=FRAMES, last_prompt=optional(text(1_000_000)), recent=FRAMES,
    extra=mapping(anything), tensors=TENSORS)
# layers: of a memory that rebuilds its context, none. views: see `view_memory.ViewMemory`
WALK = record(
    version=integer(1, 2), kind=one_of(WALK_KIND), fingerprint=NAME, run=RUN, shape=tuple_of(SIZE, SIZE, SIZE, SIZE),
    settings=list_of(settings, 1, 64), geometry=list_of(GEOMETRY, 1, 64), dtype=one_of(*map(str, FLOATS)),
    layers=list_of(list_of(LAYER, 1, 256), 0, 64), peaks=list_of(BYTES, 1, 64), frames_done=FRAMES, chunk=FRAMES,
    memory=one_of(*MEMORIES), views=record(recent=FRAMES, first=FRAMES, retrieved=FRAMES), extra=mapping(anything), tensors=TENSORS)
# older sessions lack extra
SEGMENTS = record(
    {"extra": {}}, version=integer(1, 2), kind=one_of("segments"), fingerprint=NAME, carry=one_of(*CARRIES),
    given_frames=integer(1, MAX_FRAMES), start=NAME, new=list_of(integer(1, MAX_FRAMES), 1, 100_000), extra=mapping(anything),
    tensors=TENSORS)
STREAM = record(
    {"digest": ""}, version=integer(1, 2), kind=one_of("stream"), key=NAME, done=FRAMES, frames=integer(0, 4 * MAX_FRAMES), digest=NAME,
    tensors=TENSORS)


@dataclass(frozen=True)
class Part:
    """A tensor of a file. dtypes: those allowed. shape: the length of every axis, or a range of lengths. within: least and greatest value.
    e4m3: whether it holds E4M3 codes, none of which may be NaN."""

    dtypes: tuple[torch.dtype, ...]
    shape: tuple[Axis, ...]
    within: tuple[float, float] | None = None
    e4m3: bool = False

    def check_listed(self, name: str, dtype: str, shape: list[int]) -> None:
        allowed = [str(dtype) for dtype in self.dtypes]
        require(dtype in allowed, f"the type of {name}", dtype, " or ".join(allowed))
        fits = len(shape) == len(self.shape) and all(
            length in axis if isinstance(axis, range) else length == axis for length, axis in zip(shape, self.shape))
        rule = ", ".join(f"{axis.start} to {axis.stop - 1}" if isinstance(axis, range) else str(axis) for axis in self.shape)
        require(fits, f"the shape of {name}", shape, f"[{rule}]")

    def check_values(self, name: str, tensor: Tensor) -> None:
        if not tensor.numel():
            return
        if self.e4m3 and int((tensor & e4m3.NAN).max()) == e4m3.NAN:
            raise FieldError(f"{name} holds codes that are no number")
        low, high = self.within or ((-LARGEST, LARGEST) if tensor.is_floating_point() else (0, 255))
        least, greatest = (bound.item() for bound in torch.aminmax(tensor)) if self.within or tensor.is_floating_point() else (low, high)
        # NaN is in no range
        if not (low <= least and greatest <= high):
            found = greatest if low <= least else least
            raise FieldError(f"{name} holds {found:g}; its numbers must be from {low:g} to {high:g}")


def geometry_of(fields: Mapping) -> Geometry:
    return Geometry(**{**fields, "grid": tuple(fields["grid"])})


def causal_parts(header: Mapping) -> dict[str, Part]:
    """Every tensor of a causal model's session whose fields have been checked. Raises FieldError when fields contradict each other."""
    batch, channels, height, width = header["shape"]
    frames, listed = header["frames_done"], header["tensors"]
    latents = (batch, channels, range(1, frames + 1), height, width)
    parts = {f"recent{number}": Part(FLOATS, latents) for number in range(min(header["recent"], len(listed)))}
    if "latents" in listed:
        parts["latents"] = Part(FLOATS, (*latents[:2], frames, *latents[3:]))
    return parts | _extra_parts(listed) | cache_parts(header, [[-(-length // 2) for length in (height, width)]])


def walk_parts(header: Mapping) -> dict[str, Part]:
    """Every tensor of a walk's session whose fields have been checked. Raises FieldError when fields contradict each other."""
    batch, channels, height, width = header["shape"]
    frames, listed, exact = header["frames_done"], header["tensors"], (torch.float64,)
    cameras = listed.get("cameras", ["", [0], ""])[1]
    count = cameras[0] if cameras else 0
    require(max(frames, 1) <= count <= MAX_FRAMES, "the number of cameras", count, f"{max(frames, 1)} to {MAX_FRAMES}")
    require(frames <= header["run"]["frames"] <= count, "header.run.frames", header["run"]["frames"],
            f"{frames} to {count}, at most as many as there are cameras")
    parts = {"cameras": Part(exact, (count, 4, 4)), "intrinsics": Part(exact, (count, 3, 3)),
             "actions": Part((torch.uint8,), (count,), within=(0, ACTIONS - 1))}
    if frames:
        parts["latents"] = Part(FLOATS, (batch, channels, frames, height, width))
    # a patch is one latent pixel or 2 x 2
    return parts | _extra_parts(listed) | cache_parts(header, [[height, width], [height // 2, width // 2]])


def _extra_parts(listed: Mapping) -> dict[str, Part]:
    """Tensors of the caller's, who checks them."""
    return {name: Part(FLOATS, (range(MAX_BYTES),) * len(shape)) for name, (_, shape, _) in listed.items() if name.startswith("extra.")}


def cache_parts(header: Mapping, grids: list[list[int]]) -> dict[str, Part]:
    """Tensors of the caches whose layers are listed. grids: the tokens that a latent frame may be cut into."""
    parts, batch, frames = {}, header["shape"][0], header["frames_done"]
    _check_counts(header)
    for number, place in enumerate(header["geometry"]):
        where, geometry = f"geometry[{number}]", geometry_of(place)
        require(geometry.batch == batch, f"header.{where}.batch", geometry.batch, f"{batch}, as in header.shape")
        require(place["grid"] in grids, f"header.{where}.grid", place["grid"],
                f"{' or '.join(map(str, grids))}, as the latents in header.shape are cut into")
    for number, (chosen, place, layers) in enumerate(zip(header["settings"], header["geometry"], header["layers"])):
        geometry, where = geometry_of(place), f"geometry[{number}]"
        require(geometry.head_dim % 8 == 0, f"header.{where}.head_dim", geometry.head_dim, "a multiple of 8")
        require(len(layers) == geometry.layers, f"header.layers[{number}]", layers, f"a list of {geometry.layers} layers")
        for depth, layer in enumerate(layers):
            parts |= _layer_parts(f"cache{number}.{depth}", layer, chosen, geometry, getattr(torch, header["dtype"][6:]), frames)
    return parts


def _check_counts(header: Mapping) -> None:
    """Fields of a causal model's session that must agree."""
    frames, caches = header["frames_done"], len(header["settings"])
    for name in ("geometry", "layers", "peaks"):
        # between two chunks, a memory that rebuilds its context holds nothing
        if name == "layers" and header.get("memory") == "rebuild":
            require(not header[name], f"header.{name}", header[name], "an empty list, since the memory is rebuild")
        else:
            require(len(header[name]) == caches, f"header.{name}", header[name],
                    f"a list of {caches} values, one for each of header.settings")
    require(frames <= header["run"]["frames"], "header.frames_done", frames, f"at most header.run.frames, {header['run']['frames']}")
    require(header["chunk"] <= frames, "header.chunk", header["chunk"], f"at most header.frames_done, {frames}")


def _layer_parts(name: str, layer: Mapping, chosen: QVGSettings, geometry: Geometry, dtype: torch.dtype, frames: int) -> dict[str, Part]:
    """Tensors of a layer, whose names begin with `name`. Raises FieldError when no cache could hold these spans."""
    codec = CODECS[chosen.codec]
    parts, tensors = {f"{name}.random": Part((torch.uint8,), (STATE_BYTES,))}, (chosen.key, chosen.value)
    end = 0
    for index, (first, count, *bits_and_books) in enumerate(layer["entries"]):
        where = f"{name}.entries[{index}]"
        require(first >= end, f"the first frame of {where}", first, f"at least {end}, where the span before it ends")
        end, sink = first + count, first < chosen.sink_frames
        require(not sink or end <= chosen.sink_frames, f"the last frame of {where}", end - 1, f"below sink_frames, {chosen.sink_frames}")
        for side, tensor, bits, book in zip(SIDES, tensors, bits_and_books[:2], bits_and_books[2:]):
            _check_bits(f"the {side} bits of {where}", bits, chosen, tensor)
            require(book is not None or not codec.needs_codebook(bits), f"the {side} codebook of {where}", book, "a number")
            parts |= {f"{name}.{index}.{side}.{part}": stated for part, stated in _span_parts(
                chosen.codec, tensor, bits, count * geometry.frame_tokens, geometry, dtype).items()}
            if book is not None:
                parts |= _book_parts(f"{name}.book{book}", chosen.codec, tensor, geometry, parts)
    for side, tensor, book in zip(SIDES, tensors, layer["books"]):
        needed = layer["trained"] and codec.needs_codebook(tensor.bits)
        require(book is not None or not needed, f"the {side} codebook of {name}", book, "a number")
        if book is not None:
            parts |= _book_parts(f"{name}.book{book}", chosen.codec, tensor, geometry, parts)
    for field, value, right in (("the last frame of its spans", end, frames), ("next_frame", layer["next_frame"], frames)):
        require(value == right, f"{field} in {name}", value, f"{right}, as header.frames_done")
    require(layer["trained_on"][0] <= layer["trained_on"][1] <= frames, f"trained_on in {name}", layer["trained_on"],
            f"a rising pair of at most header.frames_done, {frames}")
    require(layer["epoch_frames"] <= frames, f"epoch_frames in {name}", layer["epoch_frames"], f"at most header.frames_done, {frames}")
    return parts


def _check_bits(where: str, bits: float, chosen: QVGSettings, tensor: TensorSettings) -> None:
    allowed = {*PLAIN_BITS} if tensor.bits in PLAIN_BITS else {*CODECS[chosen.codec].widths}
    require(bits in allowed, where, bits, f"one of {', '.join(map(str, sorted(allowed)))}")


def _of_codec(part: base.Part) -> Part:
    return Part((part.dtype,), part.shape, part.within, part.e4m3)


def _span_parts(codec: str, tensor: TensorSettings, bits: float, tokens: int, geometry: Geometry, dtype: torch.dtype) -> dict[str, Part]:
    try:
        parts = CODECS[codec].span_parts(tensor, bits, SpanShape(tokens, geometry.rows, geometry.head_dim), dtype)
    except ValueError as error:
        raise FieldError(str(error).rstrip(".")) from None
    # rules between several tensors are checked by `Codec.check_stored`
    return {name: _of_codec(part) for name, part in parts.items()}


def _book_parts(name: str, codec: str, tensor: TensorSettings, geometry: Geometry, known: Mapping[str, Part]) -> dict[str, Part]:
    """Tensors of a codebook. known: parts so far; K and V may share a codebook only if both state the same parts for it."""
    sizes = range(1 if tensor.stages else 0, tensor.centroids + 1)
    parts = {f"{name}.{part}": _of_codec(stated) for part, stated in
             CODECS[codec].book_parts(tensor, sizes, geometry.rows, geometry.head_dim).items()}
    for part, stated in parts.items():
        require(known.get(part, stated) == stated, part, "used for both key and value", "a codebook of one of them")
    return parts


def span_tensors(name: str, codec: str, tensor: TensorSettings, bits: float, geometry: Geometry,
                 stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a span by the codec's names; theirs in the file begin with `name`."""
    parts = CODECS[codec].span_parts(tensor, bits, SpanShape(0, geometry.rows, geometry.head_dim), torch.float32)
    return {part: stored[f"{name}.{part}"] for part in parts}


def book_of(name: str, codec: str, tensor: TensorSettings, geometry: Geometry, stored: Mapping[str, Tensor], device="cpu"):
    """The codebook whose tensors begin with `name`."""
    parts = CODECS[codec].book_parts(tensor, 0, geometry.rows, geometry.head_dim)
    return CODECS[codec].make_book({part: stored[f"{name}.{part}"].to(device) for part in parts})


def check_causal(header: Mapping, stored: Mapping[str, Tensor]) -> None:
    """Check the rules between tensors of a causal model's session or a walk's, each of which has been checked alone. Raises FieldError."""
    frames = header["frames_done"]
    held = sum(stored[f"recent{number}"].shape[2] for number in range(header.get("recent", 0)))
    require(held <= frames, "the number of latent frames in recent0 and so on", held, f"at most header.frames_done, {frames}")
    for number, (chosen, place, layers) in enumerate(zip(header["settings"], header["geometry"], header["layers"])):
        geometry = geometry_of(place)
        for depth, layer in enumerate(layers):
            name = f"cache{number}.{depth}"
            try:
                torch.Generator().set_state(stored[f"{name}.random"])
            except RuntimeError:
                raise FieldError(f"{name}.random is no state of a generator") from None
            for index, (_, _, *bits_and_books) in enumerate(layer["entries"]):
                for side, tensor, bits, book in zip(SIDES, (chosen.key, chosen.value), bits_and_books[:2], bits_and_books[2:]):
                    if bits not in PLAIN_BITS:
                        where = f"{name}.{index}.{side}"
                        codebook = None if book is None else book_of(f"{name}.book{book}", chosen.codec, tensor, geometry, stored)
                        parts = span_tensors(where, chosen.codec, tensor, bits, geometry, stored)
                        CODECS[chosen.codec].check_stored(parts, codebook, where)


def segment_parts(header: Mapping) -> dict[str, Part]:
    """Every tensor of a session of segments whose fields have been checked."""
    listed, wanted = header["tensors"], len(header["new"])
    first = listed.get("part0", ["", [], ""])[1]
    height, width = first[3:] if len(first) == 5 and min(first) else (1, 1)
    parts = {f"part{number}": Part(FLOATS, (1, CHANNELS, range(new, MAX_FRAMES), height, width))
             for number, new in enumerate(header["new"])}
    extra = _extra_parts(listed)
    require(len(listed) - len(extra) == wanted + 1, "the number of tensors", len(listed) - len(extra),
            f"{wanted + 1}, one more than header.new has values")
    most = latent_frames(header["given_frames"], 1)
    return parts | extra | {"given": Part(FLOATS, (1, CHANNELS, range(1, most + 1), height, width))}


def stream_parts(header: Mapping) -> dict[str, Part]:
    """The tensor of a video's position whose fields have been checked."""
    return {"given": Part(FLOATS, (1, CHANNELS, *[range(1, MAX_FRAMES)] * 3))}


def parse(json_text: str, where: str) -> object:
    """JSON of a file. Raises FieldError."""
    try:
        return json.loads(json_text)
    except (ValueError, RecursionError) as error:
        raise FieldError(f"{where} is no JSON: {str(error) or type(error).__name__}"[:120]) from None


# the fields and tensors of each kind of header
KINDS = {
    None: (CAUSAL, causal_parts), WALK_KIND: (WALK, walk_parts), "segments": (SEGMENTS, segment_parts), "stream": (STREAM, stream_parts)}
