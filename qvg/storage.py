"""A session on disk: everything that a run needs to go on as if it had never stopped, in one safetensors file.

    save(path, sampler, fingerprint=fingerprint(network), latents=made_so_far)
    session = load(path)                        # checked whole before anything is believed
    sampler = Sampler(model, session.run, session.shape)
    session.restore(sampler, fingerprint(network))

A file is put in its place whole (`files`): whoever is killed at any moment leaves the old file or the new one.
Its header says what each tensor is, with a SHA-256 of it, and a SHA-256 of the header itself, so that a changed bit anywhere is noticed.
A header that is whole can still be false; so `restore` compares every tensor with what the settings prescribe before the first one is used.

The random numbers of the sampler are a function of seed, chunk and step; the only random state kept is that of each layer's k-means.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .budget import Geometry
from .cache import Entry, KVCache, LayerCache
from .codec import PaperCodebook, PlaneSpan
from .files import write_atomically
from .fingerprint import fingerprint as fingerprint
from .layout import make_span, span_layout, span_tensors
from .sampler import Run, Sampler
from .settings import PLAIN_BITS, PLANE_BITS, QVGSettings, TensorSettings
from .smoothing import Codebook

VERSION = 1
HEADER, DIGEST = "qvg_session", "qvg_session_sha256"
SIDES = ("key", "value")
# what reading a file of any content can raise
DAMAGE = (SafetensorError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, RuntimeError, MemoryError)


def _bytes(tensor: Tensor) -> memoryview:
    whole = tensor.detach().cpu().contiguous().flatten()
    return memoryview(whole.view(torch.uint8).numpy()) if whole.numel() else memoryview(b"")


def _own(tensor: Tensor) -> Tensor:
    """On the CPU, with memory that no other tensor shares, which safetensors asks for."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _book_type(codec: str) -> type:
    return PaperCodebook if codec == "paper" else Codebook


def _layer_state(layer: LayerCache, prefix: str, tensors: dict[str, Tensor]) -> dict:
    """A layer as plain values; its tensors go into `tensors` under names that begin with `prefix`."""
    books: dict[int, int] = {}

    def number(book) -> int | None:
        if book is None:
            return None
        if id(book) not in books:
            books[id(book)] = len(books)
            for part in fields(book):
                tensors[f"{prefix}.book{books[id(book)]}.{part.name}"] = getattr(book, part.name)
        return books[id(book)]

    entries = []
    for index, entry in enumerate(layer.entries):
        for side, span in zip(SIDES, entry.spans):
            for name, tensor in span_tensors(span).items():
                tensors[f"{prefix}.{index}.{side}.{name}"] = tensor
        entries.append([entry.first, entry.frames, entry.key_bits, entry.value_bits, *map(number, entry.books)])
    tensors[f"{prefix}.random"] = layer.generator.get_state()
    return {"entries": entries, "books": [number(side.book) for side in layer.sides], "next_frame": layer.next_frame,
            "epoch_frames": layer.epoch_frames, "trained": layer.trained}


def save(path: str | Path, sampler: Sampler, *, fingerprint: str, latents: Tensor | None = None, extra: Mapping | None = None,
         tensors: Mapping[str, Tensor] | None = None) -> None:
    """Write a session of a sampler that stands between two chunks.

    latents: [B, C, F, H, W] made so far, where the caller keeps them. extra: plain values, and tensors: named ones, that the caller
    wants back as they are (`Session.extra`, `Session.tensors`).
    Raises OSError when the disk is full or cannot be written, ValueError when the sampler is in the middle of storing a chunk; an older
    session at `path` then is as it was.
    """
    if not sampler.settled:
        raise ValueError("The run was broken off while a chunk was being stored, so this moment cannot be saved; an earlier checkpoint can "
                         "be resumed.")
    stored = {f"extra.{name}": tensor for name, tensor in (tensors or {}).items()}
    stored |= {f"recent{number}": part for number, part in enumerate(sampler.recent)}
    if latents is not None:
        stored["latents"] = latents
    caches = sampler.model.caches
    for cache in caches:
        if cache.host is not None:
            cache.host.wait()
    layers = [[_layer_state(layer, f"cache{number}.{depth}", stored) for depth, layer in enumerate(cache.layers)]
              for number, cache in enumerate(caches)]
    write(path, {
        "fingerprint": fingerprint, "run": asdict(sampler.run), "shape": sampler.shape,
        "settings": [cache.settings.to_json() for cache in caches], "geometry": [_shape_of(cache.geometry) for cache in caches],
        "dtype": str(caches[0].workspace.dtype), "layers": layers, "peaks": [cache.peak_bytes for cache in caches],
        "frames_done": sampler.frames_done, "chunk": sampler.chunk, "last_prompt": sampler.last_prompt, "recent": len(sampler.recent),
        "extra": dict(extra or {})}, stored)


def write(path: str | Path, header: Mapping, tensors: Mapping[str, Tensor]) -> None:
    """A file of plain values and named tensors, with checksums of both, put in its place whole. Raises OSError as `write_atomically`."""
    stored = {name: _own(tensor) for name, tensor in tensors.items()}
    text = json.dumps({"version": VERSION, **header, "tensors": {
        name: [str(tensor.dtype), list(tensor.shape), hashlib.sha256(_bytes(tensor)).hexdigest()] for name, tensor in stored.items()}})
    write_atomically(Path(path), lambda place: save_file(
        stored, place, {HEADER: text, DIGEST: hashlib.sha256(text.encode()).hexdigest()}))


class SessionError(ValueError):
    """A session file that cannot be used, as a sentence."""


@dataclass
class Session:
    """A checked session file. shape: (B, C, H, W) of a latent frame; latents [B, C, F, H, W] where they were kept."""

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

    def restore(self, sampler: Sampler, fingerprint: str) -> None:
        """Fill the sampler's empty caches and move it to where the session stands; either all of it or nothing.

        The caches must have been made with this session's settings and geometry. Raises SessionError where anything differs.
        """
        caches = sampler.model.caches
        if fingerprint != self.fingerprint:
            raise SessionError(f"{self.path.name} was saved with another model than the one that is loaded. Load the model that made it.")
        if len(caches) != len(self.settings):
            raise SessionError(f"{self.path.name} holds {len(self.settings)} caches, but this run has {len(caches)} prompts that are "
                               "weighed against each other. Use the cfg and the number of prompts that it was saved with.")
        if tuple(sampler.shape) != self.shape:
            raise SessionError(f"{self.path.name} is of latents {self.shape} (batch, channels, height, width), but this run has "
                               f"{tuple(sampler.shape)}. Use the size it was saved with.")
        if sampler.run.frames < self.frames_done:
            raise SessionError(f"{self.path.name} holds {self.frames_done} latent frames already, but the run is {sampler.run.frames} "
                               "long. Ask for a longer video.")
        for cache, settings, geometry in zip(caches, self.settings, self.geometry):
            ours, theirs = (cache.settings, cache.geometry, str(cache.workspace.dtype)), (settings, geometry, self.dtype)
            if _content(*ours) != _content(*theirs):
                raise SessionError(f"{self.path.name} was saved with other cache settings, another size or another number type. "
                                   "Use the settings it was saved with.")
        try:
            filled = [[_restore_layer(cache, depth, states[depth], self._tensors_of(number, depth), self.frames_done)
                       for depth in range(cache.geometry.layers)] for number, (cache, states) in enumerate(zip(caches, self.layers))]
        except DAMAGE as error:
            raise SessionError(f"{self.path.name} contradicts itself ({error}), so it cannot be used. Use an earlier checkpoint.") from None
        for cache, layers, peak in zip(caches, filled, self.peaks):
            cache.layers, cache.peak_bytes = layers, peak
        sampler.frames_done, sampler.chunk, sampler.last_prompt = self.frames_done, self.chunk, self.last_prompt
        sampler.recent = [part.to(sampler.device) for part in self.recent]

    def _tensors_of(self, cache: int, depth: int) -> dict[str, Tensor]:
        prefix = f"cache{cache}.{depth}."
        return {name[len(prefix):]: tensor for name, tensor in self.stored.items() if name.startswith(prefix)}


def _content(settings: QVGSettings, geometry: Geometry, dtype: str) -> tuple:
    """What decides what is stored. Where it lies may differ from run to run."""
    return replace(settings, offload=False, host_gib=0.0), _shape_of(geometry), dtype


def _shape_of(geometry: Geometry) -> dict:
    """What of a geometry decides the shapes of what is stored."""
    return {name: getattr(geometry, name) for name in ("layers", "heads", "head_dim", "grid", "batch")}


def _restore_layer(cache: KVCache, depth: int, state: dict, tensors: dict[str, Tensor], frames_done: int) -> LayerCache:
    """A layer of `cache` as `_layer_state` saw it. Raises ValueError where a tensor is not what the settings prescribe."""
    layer = LayerCache(cache, depth)
    settings, geometry, device = cache.settings, cache.geometry, cache.workspace.device
    kind, books = _book_type(settings.codec), {}

    def book(side: int, number: int | None):
        if number is None:
            return None
        if number not in books:
            found = kind(**{part.name: tensors[f"book{number}.{part.name}"].to(device) for part in fields(kind)})
            _check_book(found, (settings.key, settings.value)[side], geometry)
            books[number] = found
        return books[number]

    end = None
    for index, (first, frames, key_bits, value_bits, *numbers) in enumerate(state["entries"]):
        _check_whole(f"span {index} in layer {depth}", first, frames, key_bits, value_bits)
        if not {key_bits, value_bits} <= {*PLANE_BITS, *PLAIN_BITS}:
            raise ValueError(f"span {index} in layer {depth} has {key_bits} and {value_bits} bits")
        if frames < 1 or first < (0 if end is None else end):
            raise ValueError(f"span {index} begins at latent frame {first}")
        end = first + frames
        spans = []
        for side, (name, bits, number) in enumerate(zip(SIDES, (key_bits, value_bits), numbers)):
            tensor = (settings.key, settings.value)[side]
            layout = span_layout(settings.codec, tensor, bits, frames * geometry.frame_tokens, geometry.rows, geometry.head_dim,
                                 cache.workspace.dtype)
            parts = {part: tensors[f"{index}.{name}.{part}"] for part in layout}
            for part, (dtype, shape) in layout.items():
                if (parts[part].dtype, tuple(parts[part].shape)) != (dtype, shape):
                    raise ValueError(f"{part} of the {name} of span {index} in layer {depth} has the wrong shape")
            own = book(side, number)
            if bits not in PLAIN_BITS:
                if own is None:
                    raise ValueError(f"span {index} in layer {depth} has no codebook")
                if parts["ids"].numel() and int(parts["ids"].max()) >= own.centroids.shape[2]:
                    raise ValueError(f"span {index} in layer {depth} asks for a centroid that is not there")
            span = make_span(settings.codec, bits, {part: x.to(device) for part, x in parts.items()}, own, tensor.gain)
            spans.append(span.gather_rows() if isinstance(span, PlaneSpan) else span)
        entry = Entry(first, frames, first < settings.sink_frames, layer.sides, spans, cache)
        entry.books = tuple(book(side, number) for side, number in enumerate(numbers))
        layer.entries.append(entry)
    if (end is not None and end != state["next_frame"]) or state["next_frame"] != frames_done:
        raise ValueError(f"layer {depth} ends at latent frame {end}, not {frames_done}")
    for side, number in enumerate(state["books"]):
        layer.sides[side].book = book(side, number)
    layer.generator.set_state(tensors["random"])
    layer.next_frame, layer.epoch_frames, layer.trained = frames_done, state["epoch_frames"], state["trained"]
    _check_whole(f"layer {depth}", layer.epoch_frames)
    if layer.epoch_frames > frames_done or not isinstance(layer.trained, bool):
        raise ValueError(f"layer {depth} has an epoch of {layer.epoch_frames} latent frames")
    if layer.trained and any(side.book is None and tensor.bits not in PLAIN_BITS
                             for side, tensor in zip(layer.sides, (settings.key, settings.value))):
        raise ValueError(f"layer {depth} lacks its codebooks")
    return layer


def _check_whole(what: str, *numbers) -> None:
    for number in numbers:
        if type(number) is not int or number < 0:
            raise ValueError(f"{what} has {number!r} where a whole number belongs")


def _check_book(book, tensor: TensorSettings, geometry: Geometry) -> None:
    stages, rows, count, dim = book.centroids.shape
    good = (stages, rows, dim) == (tensor.stages, geometry.rows, geometry.head_dim) and (count <= tensor.centroids or not stages)
    if isinstance(book, Codebook):
        good &= (book.centroids.dtype, book.centroid_scale.dtype, book.channel_scale.dtype) == (torch.uint8, torch.bfloat16, torch.bfloat16)
        good &= tuple(book.centroid_scale.shape) == (stages, rows, 1, dim) and tuple(book.channel_scale.shape) == (rows, dim)
    else:
        good &= book.centroids.dtype == torch.bfloat16
    if not good:
        raise ValueError("a codebook has the wrong shape")


def load(path: str | Path) -> Session:
    """Read and check a session of a causal model. Raises SessionError for one that is damaged, of another kind or release, or no session
    at all, and FileNotFoundError where there is none."""
    return session_of(Path(path), *read(path))


def session_of(path: Path, header: dict, stored: dict[str, Tensor]) -> Session:
    """The session that `read` found at `path`. Raises SessionError."""
    if "kind" in header:
        raise SessionError(f"{path.name} holds a video of another kind ({header['kind']}). Choose one that a causal model made.")
    with refused(path):
        run, latents, shape, frames = Run(**header["run"]), stored.get("latents"), tuple(header["shape"]), header["frames_done"]
        _check_whole("its header", frames, header["chunk"], *header["peaks"], *shape)
        _check_whole("its run", run.frames, run.chunk_frames, run.recache_frames, run.seed)
        if header["recent"] != sum(name.startswith("recent") for name in stored) or len(header["peaks"]) != len(header["settings"]):
            raise ValueError("its header counts other tensors than it has")
        if latents is not None and tuple(latents.shape) != (*shape[:2], frames, *shape[2:]):
            raise ValueError(f"its latents have shape {tuple(latents.shape)}")
        if not isinstance(run.first_alone, bool) or not isinstance(header["last_prompt"], str | None):
            raise ValueError("its header names no prompt or no order of chunks")
        return Session(
            path=path, fingerprint=header["fingerprint"], run=run, shape=shape,
            settings=[QVGSettings.from_json(text) for text in header["settings"]],
            geometry=[Geometry(**{**place, "grid": tuple(place["grid"])}) for place in header["geometry"]], dtype=header["dtype"],
            frames_done=frames, chunk=header["chunk"], last_prompt=header["last_prompt"],
            recent=[stored[f"recent{number}"] for number in range(header["recent"])], latents=latents, extra=header["extra"],
            tensors={name.removeprefix("extra."): tensor for name, tensor in stored.items() if name.startswith("extra.")},
            layers=header["layers"], peaks=header["peaks"], stored=stored)


@contextmanager
def refused(path: Path) -> Iterator[None]:
    """Whatever a file's content raises inside becomes a SessionError."""
    try:
        yield
    except SessionError:
        raise
    except DAMAGE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SessionError(f"{path.name} is damaged or no session ({reason}). Use an earlier checkpoint.") from None


def read(path: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """Header and tensors of a file that `write` made, checked whole. Raises SessionError and FileNotFoundError as `load` does."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no session file {path}.")
    with refused(path), safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if HEADER not in metadata:
            raise SessionError(f"{path.name} is no session of QuantVideoGen. Choose one that Save Video Session or `qvg generate` wrote.")
        header = json.loads(metadata[HEADER])
        # another release may count its checksums in another way, so its version is looked at first
        if header.get("version") != VERSION:
            raise SessionError(f"{path.name} has version {header.get('version')!r}; this release reads version {VERSION}. "
                               "Use the release that wrote it.")
        if hashlib.sha256(metadata[HEADER].encode()).hexdigest() != metadata.get(DIGEST):
            raise SessionError(f"The header of {path.name} has been changed since it was written. Use an earlier checkpoint.")
        if set(file.keys()) != set(header["tensors"]):
            raise SessionError(f"{path.name} lacks tensors that its header lists, or has others. Use an earlier checkpoint.")
        return header, dict(_checked(file, header["tensors"], path))


def _checked(file, expected: dict[str, list], path: Path) -> Iterator[tuple[str, Tensor]]:
    for name, (dtype, shape, digest) in expected.items():
        # cloned, because what safetensors gives may be a window into the file, which must be free to be replaced
        tensor = file.get_tensor(name).clone()
        if [str(tensor.dtype), list(tensor.shape)] != [dtype, shape] or hashlib.sha256(_bytes(tensor)).hexdigest() != digest:
            raise SessionError(f"{name} in {path.name} is not what was written. The file is damaged; use an earlier checkpoint.")
        yield name, tensor
