"""What a measurement of a person's own model needs: its network, text embeddings and, for decoded frames, its VAE.

An embeddings file is safetensors with

    positive    [N, L, C]: a text embedding for each of N videos, as the model's text encoder gives it, padded as in training
    negative    [1, L, C], optional: of the prompt that guidance leads away from

where C is the width of the model's text embedding: 4096 for umt5-xxl, which Wan 2.1 and LongCat-Video use. [L, C] stands for one of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..files import first_line, read_pickled, read_safetensors, short_repr
from ..models import FAMILIES, Description, Family, open_checkpoint
from ..models.checkpoint import SAFETENSORS, part_names
from ..models.wan_vae import WanVAE

POSITIVE, NEGATIVE = "positive", "negative"
READ_BYTES = 1 << 24


@dataclass(frozen=True)
class Embeddings:
    """positive: [1, L, C] for every video. negative: [1, L, C] or None."""

    positive: tuple[Tensor, ...]
    negative: Tensor | None


def read_embeddings(path: Path, width: int) -> Embeddings:
    """The embeddings of a file, as the module's docstring says; width: C. Raises ValueError for a file that does not hold them."""
    content, _ = read_safetensors(path)
    if POSITIVE not in content:
        raise ValueError(f"{path.name} has no tensor {POSITIVE!r}; it holds {short_repr(sorted(content))}. Save the text embeddings under "
                         f"that name, as [prompts, tokens, {width}].")
    found = {}
    for name in (POSITIVE, NEGATIVE):
        if name not in content:
            continue
        tensor = content[name][None] if content[name].ndim == 2 else content[name]
        if tensor.ndim != 3 or not tensor.numel() or not tensor.is_floating_point() or tensor.shape[2] != width:
            raise ValueError(f"{path.name} holds {name!r} as {str(tensor.dtype).removeprefix('torch.')} of shape "
                             f"{short_repr(list(content[name].shape))}, but this model takes text embeddings [prompts, tokens, {width}].")
        if not bool(tensor.float().isfinite().all()):
            raise ValueError(f"{path.name} holds values in {name!r} that are not finite. Encode the prompts again, in float32 or bfloat16.")
        found[name] = tensor
    negative = found.get(NEGATIVE)
    if negative is not None and len(negative) != 1:
        raise ValueError(f"{path.name} holds {len(negative)} embeddings in {NEGATIVE!r}; there can be one, for all videos.")
    return Embeddings(found[POSITIVE].split(1), negative)


def open_network(path: Path, device: str, walks: bool = False) -> tuple[nn.Module, Family, Description]:
    """The network of a released checkpoint on a device, in bfloat16, or in float32 on a CPU. walks: whether it may need a camera path.

    Raises ValueError for a file that cannot be opened (see `models.open_checkpoint`), for packed weights, and for another model than that.
    """
    state, found = open_checkpoint(path)
    family = FAMILIES[found.family]
    if family.walks and not walks:
        raise ValueError(cannot_walk(path.name, family))

    def build() -> nn.Module:
        return family.open(state, torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16)

    return _strictly(path, build).to(device), family, found


def cannot_walk(name: str, family: Family) -> str:
    """Why a model is not measured here, as a sentence."""
    return (f"{name} is {family.title}, which walks along a camera path; the closed loop is for models without cameras. Make the same walk "
            "with the presets to compare.")


def open_vae(path: Path, device: str) -> WanVAE:
    """The VAE of Wan 2.1 from a .safetensors or .pth file. Raises ValueError for a file that is not one."""
    state = read_safetensors(path)[0] if path.suffix.lower() in SAFETENSORS else read_pickled(path)
    return _strictly(path, lambda: WanVAE.from_state_dict(state, torch.float32)).to(device)


def _strictly(path: Path, build: Callable[[], nn.Module]) -> nn.Module:
    """Raises ValueError where the weights are not exactly those of the network."""
    try:
        return build()
    except RuntimeError as error:
        raise ValueError(f"{path.name} holds other weights than plain ones of this network ({first_line(error)}). Files with scaled or "
                         "packed weights run in ComfyUI: use the node Measure Presets (QVG).") from error
    except ValueError as error:
        raise ValueError(f"{path.name} cannot be opened. {error}") from error


def files_of(path: Path) -> list[dict[str, str]]:
    """Name and SHA-256 of a file, or of all parts of the model that it is a part of."""
    def digest(part: Path) -> str:
        found = hashlib.sha256()
        with open(part, "rb") as file:
            while block := file.read(READ_BYTES):
                found.update(block)
        return found.hexdigest()

    return [{"file": name, "sha256": digest(path.parent / name)} for name in part_names(path.name)]


def described(found: Description) -> Mapping[str, object]:
    """What a report says about a checkpoint."""
    return {"family": found.family, "layers": found.layers, "heads": found.heads, "head_dim": found.sizes.head_dim,
            "parameters": found.parameters, "dtype": found.dtype}
