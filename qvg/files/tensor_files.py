"""Files of tensors that somebody else made, opened so that a false one costs a sentence: no code, and no more memory than the file has.

    content, metadata = read_safetensors(path)
    content = read_pickled(path)                # what torch.save wrote: dicts in dicts
    check(state, path.stat().st_size)           # what is taken of it

Tensors stay mapped from the file where its format allows it. `read_pickled` gives a tree of dicts with text for keys and tensors for
leaves; whatever else a training checkpoint holds is left out, and so is a dict that comes a second time, since one that holds itself
would have no end.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from .fields import short_repr

# far beyond any checkpoint there is, and read in seconds
MOST_TENSORS = 100_000
DEEPEST = 16
LONGEST_NAME = 300
# a file that shares weights between two layers names more than it holds
SHARED = 2
# what a file system says, whatever is in the file
PLACE = (FileNotFoundError, PermissionError, IsADirectoryError)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, and the file's own metadata. Raises ValueError with a sentence for a file that is damaged or false."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names, metadata = list(file.keys()), file.metadata() or {}
            fault = _fault(names)
            content = {} if fault else {name: file.get_tensor(name) for name in names}
    except PLACE:
        raise
    # the library has an error of its own for most damage, and lets those of torch, of the system and of Python through for the rest
    except Exception as error:
        raise ValueError(f"{path.name} is not a whole safetensors file ({first_line(error)}); download it again.") from error
    if fault:
        raise ValueError(f"{path.name} {fault}")
    return content, metadata


def read_pickled(path: Path) -> dict:
    """What `torch.save` put into a file, as the module's text says. Raises ValueError with a sentence for a file that is damaged or false,
    or that holds other Python objects, which could run code."""
    mapped = _is_whole_zip(path)
    try:
        # no mmap for the format before torch 1.6
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except PLACE:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path.name} holds Python objects besides tensors, or is damaged. It is not opened, because such a file can run "
                         "code. Get a .safetensors file, or a .pt of plain tensors.") from error
    # for other damage torch has no error of its own: what a false number leads to is raised as it comes
    except Exception as error:
        raise ValueError(f"{path.name} is damaged ({first_line(error)}); download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds a {type(content).__name__}, not a state dict.")
    seen: set[int] = set()
    tree = _tree(content, seen, DEEPEST)
    waiting, names = [tree], []
    while waiting:
        inside = waiting.pop()
        names += inside
        waiting += [value for value in inside.values() if isinstance(value, dict)]
    if fault := _fault(names):
        raise ValueError(f"{path.name} {fault}")
    return tree


def check(state: Mapping[str, Tensor], available: int) -> None:
    """Raises ValueError where a tensor is none that a network could have as a weight, or where all of them together are more than the
    `available` bytes that their file has."""
    for key, tensor in state.items():
        plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not plain or tensor.is_quantized or tensor.is_complex() or tensor.is_nested:
            raise ValueError(f"It holds {key} as a {_kind(tensor)} tensor, which no layer takes. Get a file of plain tensors.")
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(f"It holds {key} with shape {short_repr(tensor.shape)}, but fewer numbers than that; download it again.")
    total = sum(tensor.nbytes for tensor in state.values())
    if total > SHARED * available:
        raise ValueError(f"It names tensors of {total:,} bytes together, but has only {available:,}; download it again.")


def first_line(error: Exception) -> str:
    """What an error says, short enough to be part of a sentence."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:120].rstrip(" .:")


def _fault(names: list[str]) -> str:
    """What is wrong with the names of a file's tensors, as the end of a sentence: they are shown to people, and taken apart."""
    if len(names) > MOST_TENSORS:
        return f"holds {len(names):,} tensors; no video model has more than {MOST_TENSORS:,}. Choose another file."
    strange = next((name for name in names if not name.isprintable() or len(name) > LONGEST_NAME), None)
    return "" if strange is None else f"holds a tensor with the name {short_repr(strange)}, which no weight has; download it again."


def _is_whole_zip(path: Path) -> bool:
    """Whether this is torch's format since 1.6, which can be mapped. Raises ValueError for one that is damaged, or compressed: torch never
    compresses, and what is read through a map must not be."""
    with open(path, "rb") as file:
        if file.read(2) != b"PK":
            return False
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception as error:
        # an archive's index is at its end, which a broken download lacks
        raise ValueError(f"{path.name} is not a whole .pt file ({first_line(error)}); download it again.") from error
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise ValueError(f"{path.name} is compressed ({entry.filename[:80]}), which torch never does. Get the file that its authors "
                             "published.")
    return True


def _tree(content: dict, seen: set[int], deep: int) -> dict:
    seen.add(id(content))
    kept = {}
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, Tensor):
            seen.add(id(value))
            kept[key] = value
        elif isinstance(key, str) and isinstance(value, dict) and id(value) not in seen and deep:
            kept[key] = _tree(value, seen, deep - 1)
    return kept


def _kind(tensor) -> str:
    if not isinstance(tensor, Tensor):
        return type(tensor).__name__
    if tensor.layout != torch.strided or tensor.is_nested:
        return "sparse or nested"
    return tensor.device.type if tensor.device.type != "cpu" else f"quantized or special {tensor.dtype}"
