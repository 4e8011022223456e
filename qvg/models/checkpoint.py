"""Opens the checkpoint of an autoregressive video model as its authors published it.

Self-Forcing, Causal-Forcing, LongLive and Krea Realtime publish training checkpoints: a dict with a `generator_ema` or a `generator`
inside, keys wrapped by the trainer (`model.`, `_fsdp_wrapped_module.`), and nothing in the file that says that the network is causal.
LongCat-Video is published in parts, any one of which may be named. `open_checkpoint` unwraps such a file, and repackaged safetensors too,
to the parameter names of its family's network (`models.family`), and says what it found. Every other file is refused with a sentence that
says what it is.

Causal and ordinary Wan 2.1 text-to-video files have the same keys and shapes, so no reader can tell them apart.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..files import tensor_files
from .family import FAMILIES, Family, Sizes
from .names import find_network
from .refusals import LORA, refuse_other_models, unknown_file
from .validate import check_layers, check_sizing, check_weights

SAFETENSORS = (".safetensors", ".sft")
PICKLED = (".pt", ".pth", ".ckpt", ".bin")
SUFFIXES = SAFETENSORS + PICKLED

PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)")
MOST_PARTS = 1000


@dataclass(frozen=True)
class Description:
    """What `open_checkpoint` found.

    file: name of the file. container: where in the file the state dict was, "" for a flat file. family: its name in `FAMILIES`. sizes:
    what that family reads from the weights. parameters: number of elements. dtype: of most of them. config: what the file's metadata says
    about the network. left: number of tensors beside the network, which were not loaded.
    """

    file: str
    container: str
    family: str
    sizes: Sizes
    parameters: int
    dtype: str
    config: dict = field(default_factory=dict)
    left: int = 0

    @property
    def layers(self) -> int:
        return self.sizes.layers

    @property
    def heads(self) -> int:
        return self.sizes.heads

    @property
    def label(self) -> str:
        """One line for the user. Models of one family and size have the same keys, so only the size can be named."""
        family = FAMILIES[self.family]
        size = family.size_name(self.sizes) or f"{self.parameters / 1e6:.0f} M parameters"
        return f"{family.layout or family.title}, {self.layers} layers, {self.heads} heads ({size})"

    def __str__(self) -> str:
        taken = f", from {self.container!r}" if self.container else ""
        left = f"; {self.left} other tensors were not loaded" if self.left else ""
        return f"{self.file}: {self.label}, {self.dtype}{taken}{left}"


def open_checkpoint(path: str | Path) -> tuple[dict[str, torch.Tensor], Description]:
    """State dict in the parameter names of its family's network (tensors on the CPU, mapped from the file), and what it is.

    Raises ValueError with a sentence for a file of no registered family, and for a damaged one.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path.name} is not a checkpoint that can be read here; choose a {', '.join(SUFFIXES)} file.")
    if path.suffix.lower() in SAFETENSORS:
        content, config, available = _read_parts(path)
    else:
        content, config, available = tensor_files.read_pickled(path), {}, path.stat().st_size
    try:
        found = find_network(content)
        tensor_files.check_tensors(found.state, available)
        family = next((family for family in FAMILIES.values() if family.recognizes is not None and family.recognizes(found.state)), None)
        state = found.state if family is None else family.convert(found.state)
    except ValueError as error:
        raise ValueError(f"{path.name} cannot be opened. {error}") from error
    if "lora" in found.container:
        raise ValueError(f"{path.name} {LORA}.")
    refuse_other_models(path.name, state, family)
    if family is None:
        raise ValueError(unknown_file(path.name, state))
    return state, Description(
        file=path.name, container=found.container, family=family.name, sizes=_checked_sizes(path.name, state, family),
        parameters=sum(tensor.numel() for tensor in state.values()), dtype=_dtype(state), config=config, left=len(found.left))


def _checked_sizes(name: str, state: dict[str, torch.Tensor], family: Family) -> Sizes:
    """Raises ValueError where a recognized state dict is not a complete network."""
    check_sizing(name, state, family)
    if wrong := family.refuse(state):
        raise ValueError(f"{name} {wrong}")
    check_layers(name, state, family)
    try:
        sizes = family.sizes(state)
    except (ValueError, LookupError) as error:
        raise ValueError(f"{name} cannot be opened. {error}") from error
    check_weights(name, state, family, sizes)
    return sizes


def _dtype(state: dict[str, torch.Tensor]) -> str:
    """The type of most elements."""
    elements = Counter()
    for tensor in state.values():
        elements[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    return elements.most_common(1)[0][0]


def part_names(name: str) -> list[str]:
    """The names of all parts of the model that a file is a part of, or its own. Raises ValueError for a part that cannot exist."""
    numbered = PART.fullmatch(name)
    if numbered is None:
        return [name]
    stem, count, suffix = numbered["stem"], int(numbered["count"]), numbered["suffix"]
    if not 1 <= int(numbered["number"]) <= count <= MOST_PARTS:
        raise ValueError(f"{name} is named part {int(numbered['number'])} of {count}, which does not exist. Give the file the name that it "
                         "was published with.")
    return [f"{stem}-{number:05}-of-{count:05}{suffix}" for number in range(1, count + 1)]


def _read_parts(path: Path) -> tuple[dict[str, torch.Tensor], dict, int]:
    """The tensors of a file, or of all parts of the model that it is a part of; their metadata's config; and their bytes."""
    names = part_names(path.name)
    missing = [name for name in names if not (path.parent / name).is_file()] if len(names) > 1 else []
    if missing:
        raise ValueError(f"{path.name} is one part of {len(names)}, and {', '.join(missing[:3])} is not beside it. Put all parts into one "
                         "folder under the names they were published with.")
    content, config, available = {}, {}, 0
    for name in names:
        part, metadata = tensor_files.read_safetensors(path.parent / name)
        content |= part
        config |= _config(name, metadata)
        available += (path.parent / name).stat().st_size
    return content, config, available


def _config(name: str, metadata: dict[str, str]) -> dict:
    """What a file's metadata says about its network, apart from sizes: those are read from the weights."""
    try:
        config = json.loads(metadata.get("config", "{}"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} has metadata that cannot be read ({tensor_files.first_line(error)}); download it again.") from None
    config = config.get("transformer") if isinstance(config, dict) else None
    eps = config.get("eps") if isinstance(config, dict) else None
    return {"eps": eps} if isinstance(eps, float) and 0 < eps < 1 else {}
