"""A session on disk: everything that a run needs to continue as if it had never stopped, in one safetensors file.

    save(path, sampler, fingerprint=fingerprint(network), latents=made_so_far)
    session = load(path)                        # every field and tensor is checked first
    sampler = Sampler(model, session.run, session.shape)
    session.restore(sampler, fingerprint(network))

A file is replaced atomically (`files`): a process that is killed at any moment leaves the old file or the new one.
Its header has the dtype, shape and SHA-256 of each tensor, and the metadata a SHA-256 of the header, so a changed bit anywhere is noticed.
A header with the right checksum can still hold false values, so every field and every tensor is checked against its limits
(`session_parts`) before any is used.

The sampler's noise is a function of seed, chunk and step; the only random state kept is that of each layer's k-means.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..cache.codebook_lifetime import Lifetime
from ..cache.entry import Entry
from ..cache.geometry import Geometry
from ..cache.kv_cache import KVCache
from ..cache.layer import LayerCache
from ..files import first_line, short_repr, write_atomically
from ..files.fields import FieldError, require
from ..models.fingerprint import fingerprint as fingerprint
from ..settings import QVGSettings, TensorSettings
from .run import Run
from .sampler import Sampler
from .session_parts import KINDS, SIDES, Part, book_of, check_causal, geometry_of, parse, span_tensors

# versions of a file in which every tensor is stored separately, and of one that joins them, see `packed`
VERSION, PACKED = 1, 2
# safetensors refuses a header of more than 100 MB, in which a tensor takes about a line
MOST_HEADER_BYTES, LINE_BYTES = 80_000_000, 200
HEADER, DIGEST = "qvg_session", "qvg_session_sha256"
UNSETTLED = ("The run was broken off while a chunk was being stored, so this moment cannot be saved; an earlier checkpoint can be "
             "resumed.")
# what reading a file raises, whatever its content
DAMAGE = (SafetensorError, ValueError)


def _bytes(tensor: Tensor) -> memoryview:
    whole = tensor.detach().cpu().contiguous().flatten()
    return memoryview(whole.view(torch.uint8).numpy()) if whole.numel() else memoryview(b"")


def _own(tensor: Tensor) -> Tensor:
    """On the CPU, in memory that no other tensor shares, as safetensors requires."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _layer_state(layer: LayerCache, prefix: str, tensors: dict[str, Tensor]) -> dict:
    """A layer as JSON values; its tensors are added to `tensors` under names that begin with `prefix`."""
    books: dict[int, int] = {}

    def number(book) -> int | None:
        if book is None:
            return None
        if id(book) not in books:
            books[id(book)] = len(books)
            for part, tensor in layer.codec.book_tensors(book).items():
                tensors[f"{prefix}.book{books[id(book)]}.{part}"] = tensor
        return books[id(book)]

    entries = []
    for index, entry in enumerate(layer.entries):
        for side, span in zip(SIDES, entry.spans):
            for name, tensor in span.tensors().items():
                tensors[f"{prefix}.{index}.{side}.{name}"] = tensor
        entries.append([entry.first, entry.frames, entry.key_bits, entry.value_bits, *map(number, entry.books)])
    tensors[f"{prefix}.random"] = layer.generator.get_state()
    return {"entries": entries, "books": [number(side.book) for side in layer.sides], "next_frame": layer.next_frame,
            "epoch_frames": layer.life.frames, "trained": layer.life.trained, "trained_on": [layer.life.since, layer.life.until]}


def save(path: str | Path, sampler: Sampler, *, fingerprint: str, latents: Tensor | None = None, extra: Mapping | None = None,
         tensors: Mapping[str, Tensor] | None = None) -> None:
    """Write a session of a sampler between two chunks.

    latents: [B, C, F, H, W] made so far, if the caller keeps them. extra: JSON values of the caller's, and tensors: its tensors by name;
    `Session.extra` and `Session.tensors` return both unchanged.
    Raises OSError when the disk is full or cannot be written, ValueError when the sampler is in the middle of storing a chunk; an older
    session at `path` is then unchanged.
    """
    header, of_caches, stored = contents(sampler, fingerprint, latents, extra, tensors)
    write(path, header, stored | of_caches)


def contents(sampler: Sampler, fingerprint: str, latents: Tensor | None, extra: Mapping | None, tensors: Mapping[str, Tensor] | None
             ) -> tuple[dict, dict[str, Tensor], dict[str, Tensor]]:
    """The header of a session, the tensors of the caches, and the others."""
    stored = {f"extra.{name}": tensor for name, tensor in (tensors or {}).items()}
    stored |= {f"recent{number}": part for number, part in enumerate(sampler.recent)}
    if latents is not None:
        stored["latents"] = latents
    of_caches: dict[str, Tensor] = {}
    header = header_of(sampler, sampler.model.caches, of_caches, fingerprint, extra)
    return header | {"last_prompt": sampler.last_prompt, "recent": len(sampler.recent)}, of_caches, stored


def header_of(sampler: Sampler, kept: Sequence[KVCache], stored: dict[str, Tensor], fingerprint: str, extra: Mapping | None) -> dict:
    """The fields of a run between two chunks. The tensors of `kept`, caches whose contents are saved, are added to `stored`.

    Raises ValueError when the sampler is in the middle of storing a chunk.
    """
    if not sampler.settled:
        raise ValueError(UNSETTLED)
    caches, layers = sampler.model.caches, layer_states(kept, stored)
    return {
        "fingerprint": fingerprint, "run": asdict(sampler.run), "shape": sampler.shape,
        "settings": [cache.settings.to_json() for cache in caches], "geometry": [shape_of(cache.geometry) for cache in caches],
        "dtype": str(caches[0].workspace.dtype), "layers": layers, "peaks": [cache.peak_bytes for cache in caches],
        "frames_done": sampler.frames_done, "chunk": sampler.chunk, "extra": dict(extra or {})}


def layer_states(caches: Sequence[KVCache], stored: dict[str, Tensor]) -> list[list[dict]]:
    """All layers of caches as JSON values; their tensors are added to `stored`."""
    for cache in caches:
        if cache.host is not None:
            cache.host.wait()
    return [[_layer_state(layer, f"cache{number}.{depth}", stored) for depth, layer in enumerate(cache.layers)]
            for number, cache in enumerate(caches)]


def write(path: str | Path, header: Mapping, tensors: Mapping[str, Tensor]) -> None:
    """Write JSON values and named tensors, with checksums of both, atomically. Raises OSError as `write_atomically` does."""
    stored = {name: _own(tensor) for name, tensor in tensors.items()}
    fields = {"version": VERSION, **header, "tensors": {
        name: [str(tensor.dtype), list(tensor.shape), hashlib.sha256(_bytes(tensor)).hexdigest()] for name, tensor in stored.items()}}
    text = json.dumps(fields)
    # safetensors' own header escapes every quotation mark of the text, and has a line for each tensor
    long = len(text) + text.count('"') + LINE_BYTES * len(stored) > MOST_HEADER_BYTES
    content, metadata = packed({**fields, "version": PACKED}, stored) if long else (stored, {HEADER: text, DIGEST: _digest(text)})
    write_atomically(Path(path), lambda place: save_file(content, place, metadata))


def packed(fields: Mapping, stored: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file whose safetensors header is short however long the video is: the text of the fields is a tensor, and
    all tensors of one dtype are concatenated, in the order of `fields`."""
    text, groups = json.dumps(fields), {}
    for tensor in stored.values():
        groups.setdefault(str(tensor.dtype), []).append(tensor.flatten())
    joined = {dtype: torch.cat(parts) for dtype, parts in groups.items()}
    written = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    return {HEADER: written} | joined, {HEADER: json.dumps({"version": PACKED}), DIGEST: _digest(text)}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class SessionError(ValueError):
    """A session file that cannot be used; the text says why, as a sentence for the user."""


@dataclass
class Session:
    """A checked session file. shape: (B, C, H, W) of a latent frame; latents: [B, C, F, H, W] if they were saved."""

    path: Path
    fingerprint: str
    run: Run
    shape: tuple[int, ...]
    settings: list[QVGSettings]
    geometry: list[Geometry]
    dtype: str
    frames_done: int
    chunk: int
    last_prompt: str | None
    recent: list[Tensor]
    latents: Tensor | None
    extra: dict
    tensors: dict[str, Tensor]
    layers: list[list[dict]] = field(repr=False)
    peaks: list[int] = field(repr=False)
    stored: dict[str, Tensor] = field(repr=False)

    def check(self, sampler: Sampler, fingerprint: str) -> None:
        """See `check_same`."""
        check_same(self, sampler, fingerprint)

    def restore(self, sampler: Sampler, fingerprint: str) -> None:
        """Fill the sampler's empty caches and move it to the session's position, or change nothing and raise.

        The caches must have been made with this session's settings and geometry. Raises SessionError when anything differs.
        """
        self.check(sampler, fingerprint)
        fill(self, sampler)
        sampler.last_prompt = self.last_prompt
        sampler.recent = [part.to(sampler.device) for part in self.recent]


def check_same(session, sampler: Sampler, fingerprint: str) -> None:
    """Raises SessionError where a session is not of this model, size or cache. session: a `Session` or a `walk_session.WalkSession`."""
    caches, name = sampler.model.caches, session.path.name
    if fingerprint != session.fingerprint:
        raise SessionError(f"{name} was saved with another model than the one that is loaded. Load the model that made it.")
    if len(caches) != len(session.settings):
        raise SessionError(f"{name} holds {len(session.settings)} caches, but this run has {len(caches)} prompts that are weighed against "
                           "each other. Use the cfg and the number of prompts that it was saved with.")
    if tuple(sampler.shape) != session.shape:
        raise SessionError(f"{name} is of latents {session.shape} (batch, channels, height, width), but this run has "
                           f"{tuple(sampler.shape)}. Use the size it was saved with.")
    if sampler.run.frames < session.frames_done:
        raise SessionError(f"{name} holds {session.frames_done} latent frames already, but the run is {sampler.run.frames} long. Ask for a "
                           "longer video.")
    for cache, settings, geometry in zip(caches, session.settings, session.geometry):
        ours, theirs = (cache.settings, cache.geometry, str(cache.workspace.dtype)), (settings, geometry, session.dtype)
        if _content(*ours) != _content(*theirs):
            raise SessionError(f"{name} was saved with other cache settings, another size or another number type. Use the settings it was "
                               "saved with.")


def fill(session, sampler: Sampler) -> None:
    """Fill a sampler's empty caches, those whose layers were saved, and move it to the session's position."""
    caches = sampler.model.caches
    fill_caches(caches, session.layers, session.stored)
    for cache, peak in zip(caches, session.peaks):
        cache.peak_bytes = peak
    sampler.frames_done, sampler.chunk = session.frames_done, session.chunk


def fill_caches(caches: Sequence[KVCache], layers: list[list[dict]], stored: Mapping[str, Tensor]) -> None:
    """Fill empty caches with layers from a session, all or none of them."""
    filled = [[_restore_layer(cache, depth, state, f"cache{number}.{depth}", stored) for depth, state in enumerate(states)]
              for number, (cache, states) in enumerate(zip(caches, layers))]
    for cache, held in zip(caches, filled):
        cache.layers = held


def _content(settings: QVGSettings, geometry: Geometry, dtype: str) -> tuple:
    """What must be equal for stored spans to be valid."""
    return settings.kept, shape_of(geometry), dtype


def shape_of(geometry: Geometry) -> dict:
    """The fields of a geometry that stored shapes depend on."""
    return {name: getattr(geometry, name) for name in ("layers", "heads", "head_dim", "grid", "batch")}


def _restore_layer(cache: KVCache, depth: int, state: dict, name: str, stored: Mapping[str, Tensor]) -> LayerCache:
    """The inverse of `_layer_state`: a layer of `cache`. Its tensors, whose names begin with `name`, have been checked."""
    layer = LayerCache(cache, depth)
    settings, geometry, device = cache.settings, cache.geometry, cache.workspace.device
    books: dict[int, Any] = {}

    def book(number: int | None, tensor: TensorSettings):
        if number is not None and number not in books:
            books[number] = book_of(f"{name}.book{number}", settings.codec, tensor, geometry, stored, device)
        return books.get(number)

    for index, (first, frames, key_bits, value_bits, *numbers) in enumerate(state["entries"]):
        spans = []
        for side, tensor, bits, number in zip(SIDES, (settings.key, settings.value), (key_bits, value_bits), numbers):
            parts = span_tensors(f"{name}.{index}.{side}", settings.codec, tensor, bits, geometry, stored)
            parts = {part: held.to(device) for part, held in parts.items()}
            spans.append(layer.codec.make_span(tensor, bits, parts, book(number, tensor)))
        layer.spans.append(Entry(first, frames, first < settings.sink_frames, layer.sides, spans, cache))
    for side, tensor, number in zip(layer.sides, (settings.key, settings.value), state["books"]):
        side.book = book(number, tensor)
    layer.generator.set_state(stored[f"{name}.random"])
    layer.next_frame, layer.life = state["next_frame"], _lifetime(state, layer.sides)
    return layer


def _lifetime(state: dict, sides: tuple) -> Lifetime:
    """Older sessions do not say what their codebooks were trained on."""
    since, until = state["trained_on"]
    size = max((side.book.size for side in sides if side.book is not None), default=0)
    return Lifetime(state["trained"], state["epoch_frames"], since, until, size)


def load(path: str | Path) -> Session:
    """Read and check a session of a causal model. Raises SessionError for a file that is damaged, of another kind or release, or not a
    session at all, and FileNotFoundError when there is none."""
    return session_of(Path(path), *read(path))


def session_of(path: Path, header: dict, stored: dict[str, Tensor]) -> Session:
    """The session that `read` returned for `path`. Raises SessionError."""
    if "kind" in header:
        raise SessionError(f"{path.name} holds a video of another kind ({header['kind']}). Choose one that a causal model made.")
    with refused(path):
        run = Run(**header["run"])
        check_causal(header, stored)
    return Session(
        path=path, fingerprint=header["fingerprint"], run=run, shape=tuple(header["shape"]), settings=header["settings"],
        geometry=[geometry_of(place) for place in header["geometry"]], dtype=header["dtype"],
        frames_done=header["frames_done"], chunk=header["chunk"], last_prompt=header["last_prompt"],
        recent=[stored[f"recent{number}"] for number in range(header["recent"])], latents=stored.get("latents"), extra=header["extra"],
        tensors={name.removeprefix("extra."): tensor for name, tensor in stored.items() if name.startswith("extra.")},
        layers=header["layers"], peaks=header["peaks"], stored=stored)


@contextmanager
def refused(path: Path) -> Iterator[None]:
    """Inside, errors that a file's content causes become SessionErrors."""
    try:
        yield
    except SessionError:
        raise
    except DAMAGE as error:
        raise SessionError(f"{path.name} is damaged or no session ({first_line(error)}). Use an earlier checkpoint.") from None


def read(path: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """Checked header and tensors of a file that `write` made. Raises SessionError and FileNotFoundError as `load` does."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no session file {path}.")
    with refused(path), safe_open(path, "pt") as file:
        header = _header(path, file)
        listed = header["tensors"]
        expected = {HEADER, *(dtype for dtype, _, _ in listed.values())} if header["version"] == PACKED else listed.keys()
        if set(file.keys()) != expected:
            raise SessionError(f"{path.name} lacks tensors that its header lists, or has others. Use an earlier checkpoint.")
        parts = KINDS[header.get("kind")][1](header)
        if strange := sorted(parts.keys() ^ listed.keys()):
            raise FieldError(f"it {'lacks' if strange[0] in parts else 'has a tensor that nothing needs,'} {strange[0]}")
        for name, part in parts.items():
            part.check_listed(name, *listed[name][:2])
        found = _unpacked(file, listed) if header["version"] == PACKED else ((name, file.get_tensor(name)) for name in listed)
        return header, {name: _checked(tensor, name, *listed[name], parts[name], path) for name, tensor in found}


def _header(path: Path, file) -> dict:
    """The checked fields of a file."""
    metadata = file.metadata() or {}
    if HEADER not in metadata:
        raise SessionError(f"{path.name} is no session of QuantVideoGen. Choose one that Save Video Session or `qvg generate` wrote.")
    text = metadata[HEADER]
    header = parse(text, "its header")
    require(isinstance(header, dict), "its header", header, "an object")
    # another release may compute checksums differently, so the version is checked first
    if header.get("version") not in (VERSION, PACKED):
        raise SessionError(f"{path.name} has version {short_repr(header.get('version'))}; this release reads versions {VERSION} and "
                           f"{PACKED}. Use the release that wrote it.")
    if header["version"] == PACKED:
        require(HEADER in file.keys(), "its header", "missing", "a tensor")
        written = file.get_tensor(HEADER)
        good = written.dtype == torch.uint8 and written.ndim == 1
        require(good, "its header", f"{written.dtype} of {written.ndim} axes", "the bytes of a text")
        text = _bytes(written).tobytes().decode()
        header = parse(text, "its header")
    if _digest(text) != metadata.get(DIGEST):
        raise SessionError(f"The header of {path.name} has been changed since it was written. Use an earlier checkpoint.")
    require(isinstance(header, dict), "its header", header, "an object")
    kind = header.get("kind")
    if not isinstance(kind, str | None) or kind not in KINDS:
        raise SessionError(f"{path.name} holds a video of another kind ({short_repr(kind)}). Choose one that a causal model made.")
    return KINDS[kind][0](header, "header")


def _unpacked(file, listed: Mapping[str, list]) -> Iterator[tuple[str, Tensor]]:
    """The tensors that `packed` joined, as views of the file. Raises FieldError when it holds more or fewer elements."""
    joined, needed, places = {}, Counter(), {}
    for name, (dtype, shape, _) in listed.items():
        places[name] = needed[dtype]
        needed[dtype] += math.prod(shape)
    for dtype, count in needed.items():
        joined[dtype] = file.get_tensor(dtype)
        good = str(joined[dtype].dtype) == dtype and tuple(joined[dtype].shape) == (count,)
        require(good, f"the shape of {dtype}", joined[dtype].shape, f"[{count}]")
    return ((name, joined[dtype][places[name]:places[name] + math.prod(shape)].view(shape)) for name, (dtype, shape, _) in listed.items())


def _checked(tensor: Tensor, name: str, dtype: str, shape: list[int], digest: str, part: Part, path: Path) -> Tensor:
    """A copy of a tensor of a file, because the tensor may be a view of the mapped file, which must be free to be replaced."""
    whole = [str(tensor.dtype), list(tensor.shape)] == [dtype, shape]
    tensor = tensor.clone() if whole else tensor
    if not whole or hashlib.sha256(_bytes(tensor)).hexdigest() != digest:
        raise SessionError(f"{name} in {path.name} is not what was written. The file is damaged; use an earlier checkpoint.")
    part.check_values(name, tensor)
    return tensor
