"""Tensor files from others, opened so that a false one costs no more than an error: no code runs, and memory is bounded by its size.

    content, metadata = read_safetensors(path)
    content = read_pickled(path)                        # what torch.save wrote: nested dicts
    check_tensors(state, path.stat().st_size)           # what is used of it

Tensors stay mapped from the file where its format allows it. `read_pickled` returns a tree of dicts with strings as keys and tensors as
leaves. Whatever else a training checkpoint holds is dropped, and so is a dict that appears a second time, because it could contain itself.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from .sentences import first_line, short_repr

# far more than any known checkpoint, and still read in seconds
MAX_TENSORS = 100_000
MAX_DEPTH = 16
MAX_NAME = 300
# a file in which two layers share weights lists more bytes than it holds
SHARED = 2
# errors of the file system, whatever the file holds
PLACE_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, and the file's metadata. Raises ValueError for a file that is damaged or false."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names, metadata = list(file.keys()), file.metadata() or {}
            problem = _names_problem(names)
            content = {} if problem else {name: file.get_tensor(name) for name in names}
    except PLACE_ERRORS:
        raise
    # most damage is a SafetensorError; the rest comes as errors of torch, the system or Python
    except Exception as error:
        raise ValueError(f"{path.name} is not a whole safetensors file ({first_line(error)}); download it again.") from error
    if problem:
        raise ValueError(f"{path.name} {problem}")
    return content, metadata


def read_pickled(path: Path) -> dict:
    """What `torch.save` wrote, as a tree of dicts (see the module's docstring).

    Raises ValueError for a file that is damaged or false, or that holds other Python objects, which could run code.
    """
    mapped = _is_zip(path)
    try:
        # the format before torch 1.6 cannot be mapped
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except PLACE_ERRORS:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path.name} holds Python objects besides tensors, or is damaged. It is not opened, because such a file can run "
                         "code. Get a .safetensors file, or a .pt of plain tensors.") from error
    # torch has no error of its own for other damage
    except Exception as error:
        raise ValueError(f"{path.name} is damaged ({first_line(error)}); download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds a {type(content).__name__}, not a state dict.")
    seen: set[int] = set()
    tree = _tree(content, seen, MAX_DEPTH)
    waiting, names = [tree], []
    while waiting:
        inside = waiting.pop()
        names += inside
        waiting += [value for value in inside.values() if isinstance(value, dict)]
    if problem := _names_problem(names):
        raise ValueError(f"{path.name} {problem}")
    return tree


def check_tensors(state: Mapping[str, Tensor], available: int) -> None:
    """Raises ValueError if a tensor cannot be a network's weight, or if all of them together exceed the `available` bytes of their
    file."""
    for key, tensor in state.items():
        plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not plain or tensor.is_quantized or tensor.is_complex() or tensor.is_nested:
            raise ValueError(f"It holds {key} as a {_kind(tensor)} tensor, which no layer uses. Get a file of plain tensors.")
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(f"It holds {key} with shape {short_repr(tensor.shape)}, but fewer elements than that; download it again.")
    total = sum(tensor.nbytes for tensor in state.values())
    if total > SHARED * available:
        raise ValueError(f"It lists tensors of {total:,} bytes in all, but has only {available:,}; download it again.")


def _names_problem(names: list[str]) -> str:
    """What is wrong with the names of a file's tensors, as the end of a sentence; "" if nothing is."""
    if len(names) > MAX_TENSORS:
        return f"holds {len(names):,} tensors; no video model has more than {MAX_TENSORS:,}. Choose another file."
    strange = next((name for name in names if not name.isprintable() or len(name) > MAX_NAME), None)
    return "" if strange is None else f"holds a tensor with the name {short_repr(strange)}, which no weight has; download it again."


def _is_zip(path: Path) -> bool:
    """Whether this is torch's zip format (since 1.6), which can be mapped.

    Raises ValueError for a zip that is damaged, or compressed: torch never compresses, and mapped data must not be.
    """
    with open(path, "rb") as file:
        if file.read(2) != b"PK":
            return False
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception as error:
        # the index is at the end, which an interrupted download lacks
        raise ValueError(f"{path.name} is not a whole .pt file ({first_line(error)}); download it again.") from error
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise ValueError(f"{path.name} is compressed ({entry.filename[:80]}), which torch never does. Get the file that its authors "
                             "published.")
    return True


def _tree(content: dict, seen_: set[int], depth: int) -> dict:
    """Only dicts and tensors, to a limited depth; `seen_` collects their ids."""
    seen_.add(id(content))
    kept = {}
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, Tensor):
            seen_.add(id(value))
            kept[key] = value
        elif isinstance(key, str) and isinstance(value, dict) and id(value) not in seen_ and depth:
            kept[key] = _tree(value, seen_, depth - 1)
    return kept


def _kind(tensor) -> str:
    if not isinstance(tensor, Tensor):
        return type(tensor).__name__
    if tensor.layout != torch.strided or tensor.is_nested:
        return "sparse or nested"
    return tensor.device.type if tensor.device.type != "cpu" else f"quantized or special {tensor.dtype}"
