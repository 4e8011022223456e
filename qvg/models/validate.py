"""Whether a state dict can be the network that its own sizes describe, checked before that network is built."""

from __future__ import annotations

import re

import torch

from ..files import short_repr, tensor_files
from .family import Family, Sizes, State

MOST_LAYERS = 256
# types of weights that are not packed
SINGLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
DAMAGED = "the file may be one part of several, or damaged."


def check_sizing(name: str, state: State, family: Family) -> None:
    """Raises ValueError where a weight that sizes are read from is missing, empty, or has the wrong number of axes."""
    for key, axes in family.sizing.items():
        shape = state[key].shape if key in state else (1,) * axes
        if len(shape) != axes or 0 in shape:
            raise ValueError(f"{name} holds {key} with shape {short_repr(shape)}, where {axes} numbers above 0 belong; the file is "
                             "damaged, download it again.")
    if missing := [key for key in family.sizing if key not in state]:
        raise ValueError(f"{name} looks like {family.title} but lacks {', '.join(missing[:3])}; {DAMAGED}")


def check_layers(name: str, state: State, family: Family) -> None:
    """Raises ValueError where the layers are not numbered 0, 1, 2, ...; checked early because a file may claim billions of them."""
    block = re.compile(rf"{re.escape(family.blocks)}\.(0|[1-9]\d{{0,3}})\..+")
    found = {key: block.fullmatch(key) for key in state if key.startswith(f"{family.blocks}.")}
    if strange := [key for key, match in found.items() if match is None]:
        raise ValueError(f"{name} holds {strange[0][:80]}, which is not part of a numbered layer; the file is damaged, download it again.")
    numbers = {int(match[1]) for match in found.values()}
    if numbers != set(range(len(numbers))) or len(numbers) > MOST_LAYERS:
        raise ValueError(f"{name} numbers {len(numbers)} layers from {min(numbers)} to {max(numbers)}; they should be consecutive from "
                         f"0 to {MOST_LAYERS - 1} at most. The file may be one part of several, or damaged.")


def check_weights(name: str, state: State, family: Family, sizes: Sizes) -> None:
    """Raises ValueError where the network of these sizes has weights that the file lacks, or has in another shape.

    Missing weights would stay uninitialized memory, and one wrong size can ask for more memory than any file holds.
    """
    try:
        with torch.device("meta"):
            expected = family.network(sizes).state_dict()
    except (ValueError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{name} describes a {family.title} network that cannot exist ({tensor_files.first_line(error)}); download it "
                         "again.") from error
    if missing := sorted(expected.keys() - state.keys()):
        raise ValueError(f"{name} is {family.title} but lacks {', '.join(missing[:3])}; {DAMAGED}")
    for key, weight in expected.items():
        shape, found = tuple(weight.shape), state[key]
        fits = tuple(found.shape) == shape and found.dtype in SINGLE
        if f"{key.removesuffix('weight')}comfy_quant" in state:
            # packed by ComfyUI's rules, of which only a lower bound is known here: one bit per element
            fits = found.ndim == weight.ndim and 8 * found.nbytes >= weight.numel()
        if not fits:
            raise ValueError(f"{name} holds {key} as {str(found.dtype).removeprefix('torch.')} of shape {short_repr(found.shape)}, but the "
                             f"network that its other weights describe has {shape} there; the file is damaged, download it again.")
