"""LoRA files in every layout that trainers write, as changes of a network's own parameters.

A key of such a file is a module's name in some spelling (prefixes, dots or underscores, the author's published names or ours) and a field
(`lora_A.weight`, `lora_down.weight`, `hada_w1_a`, ...). All spellings of all parameters are collected in one table, keyed by the name with
underscores instead of dots; prefixes are removed one at a time until the table knows the rest. A layer that is fused in the file and split
here (`qkv`, `kv_linear`) is split by rows. Nothing is dropped silently: `Mapped` lists the keys that were not used, and `check` refuses a
file of which nothing fits.

    mapped = convert(file, shapes, family)    # shapes: of every parameter of the network, by name without ".weight"
    mapped.check("the LongCat-Video model")
    mapped.weights["blocks.0.self_attn.q.lora_up.weight"]        # fields in ComfyUI's spelling
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from .family import Family
from .lora_fields import FIELD, NAMES, TEXT, Change, Fused, extent
from .names import WRAPPERS, rank, tensors_in, trains_only

# prefixes of a module's name, with underscores instead of dots; longer ones first
PREFIXES = ("base_model_model_", "base_model_", "diffusion_model_", "lora_transformer_", "lora_unet_", "lora_dit_", "lycoris_", "lora_",
            "transformer_", "generator_ema_", "generator_", "model_", "module_", "network_", "net_", "unet_", "dit_", "_")


@dataclass
class Mapped:
    """A LoRA file as changes of a network.

    weights: "<parameter>.<field>" -> tensor. fused: parameter -> a change that is split when it is computed. taken: number of the file's
    keys that these use. left: keys that match no parameter. unfit: keys of the wrong shape, and misfits: parameter -> (shape in the file,
    shape in the network). text: keys of a text encoder. aside: keys of a network that was used in training only, or that is worse than
    the selected one.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    fused: dict[str, Fused] = field(default_factory=dict)
    taken: int = 0
    left: list[str] = field(default_factory=list)
    unfit: list[str] = field(default_factory=list)
    misfits: dict[str, tuple] = field(default_factory=dict)
    text: list[str] = field(default_factory=list)
    aside: list[str] = field(default_factory=list)

    def check(self, model: str) -> str:
        """A warning about keys that were not used, "" if there are none. Raises ValueError if no key was. model: "the ... model"."""
        missed = [*self.left, *self.unfit]
        shape = next((f"{name} is changed as {list(theirs)} and is {list(ours)} here" for name, (theirs, ours) in self.misfits.items()), "")
        if not self.taken and shape:
            raise ValueError(f"This LoRA is for a model of another size than {model}: {shape}. Choose a LoRA of the same model.")
        if not self.taken:
            holds = ", ".join((self.left or self.text)[:3]) or "no tensors"
            raise ValueError(f"None of this LoRA's {len(missed) + len(self.text)} keys belongs to {model} (it holds {holds}). Choose a LoRA"
                             " that was trained for this model.")
        if not missed:
            return ""
        names = ", ".join(missed[:3]) + (", ..." if len(missed) > 3 else "")
        return (f"{len(missed)} of the LoRA's {len(missed) + self.taken} keys do not fit {model} and were ignored: {names}"
                + (f" ({shape})" if shape else ""))


def flat(name: str) -> str:
    """A name with underscores instead of dots, or of the words that encode dots, and without the words of wrappers."""
    name = name.replace("___lorahyphen___", "_").replace(".", "_")
    for wrapper in WRAPPERS:
        name = name.replace(f"{wrapper}_", "")
    return name


class Spellings:
    """Every spelling of every parameter -> the parameters that it denotes, as (parameter, place, count).

    other_name: `Family.lora_name`.
    """

    def __init__(self, parameters: Mapping[str, tuple], other_name: Callable[[str], tuple[str, int, int]] | None = None):
        self.table: dict[str, list[tuple[str, int, int]]] = {}
        for name in parameters:
            self.table[flat(name)] = [(name, 0, 1)]
        for name in parameters if other_name is not None else ():
            other, place, count = other_name(name)
            parts = self.table.setdefault(flat(other), [])
            if (name, place, count) not in parts:
                parts.append((name, place, count))

    def find(self, stem: str) -> list[tuple[str, int, int]]:
        """What a module's name in a file denotes; words before it are removed one at a time until the rest is known."""
        name = flat(stem)
        while name:
            if name in self.table:
                return self.table[name]
            prefix = next((word for word in PREFIXES if name.startswith(word)), None)
            if prefix is None:
                break
            name = name[len(prefix):]
        return []


def _changes(lora: Mapping, mapped: Mapped) -> Iterator[tuple[str, Change]]:
    """(module's name in the file, its change); keys without a known field are recorded in `mapped`."""
    entries = list(tensors_in(lora, numbers=FIELD))
    if not all(trains_only(path) for path, _, _ in entries):
        mapped.aside += [".".join((*path, key)) for path, key, _ in entries if trains_only(path)]
        entries = [entry for entry in entries if not trains_only(entry[0])]
    changes: dict[tuple, Change] = {}
    for path, key, tensor in entries:
        match = FIELD.search(key)
        if match is None or TEXT.search(key):
            (mapped.text if TEXT.search(key) else mapped.left).append(key)
            continue
        change = changes.setdefault((path, key[:match.start()]), Change())
        place, known = (int(match["number"]), change.ups) if match["up_block"] else (
            NAMES.get(match.lastgroup) or match[match.lastgroup], change.fields)
        if place in known:
            mapped.left.append(key)
            continue
        known[place] = tensor
        change.keys.append(key)
    # averaged weights first, as in a checkpoint
    for (_, stem), change in sorted(changes.items(), key=lambda item: rank((item[0][0], ""))):
        yield stem, change


def convert(lora: Mapping, shapes: Mapping[str, tuple[int, ...] | None], family: Family) -> Mapped:
    """The changes that a LoRA file, nested or flat, makes to the parameters in `shapes` (None: unknown shape) of a network of `family`.

    Names are without ".weight"; a parameter that is not a layer's weight (Wan's `modulation`) keeps its name.
    """
    mapped, spellings = Mapped(), Spellings(shapes, family.lora_name)
    for stem, change in _changes(lora, mapped):
        parts = [(name, change.part(place, count)) for name, place, count in spellings.find(stem)]
        if not parts or any(part is None for _, part in parts):
            mapped.left += change.keys
            continue
        wrong = {name: (theirs, ours) for name, part in parts for theirs, ours in [_shapes(part, shapes[name])] if theirs != ours}
        if wrong:
            mapped.misfits |= wrong
            mapped.unfit += change.keys
            continue
        weights = {f"{name}.{key}": tensor for name, part in parts if not isinstance(part, Fused) for key, tensor in part.items()}
        fused = {name: part for name, part in parts if isinstance(part, Fused)}
        if weights.keys() & mapped.weights.keys() or fused.keys() & mapped.fused.keys():
            mapped.aside += change.keys
            continue
        mapped.taken += len(change.keys)
        mapped.weights |= weights
        mapped.fused |= fused
    return mapped


def _shapes(part: dict[str, Tensor] | Fused, shape: tuple[int, ...] | None) -> tuple:
    """(rows and columns of the change, rows and columns of the parameter); equal if one of them is unknown."""
    whole = isinstance(part, Fused)
    changed = extent(part.fields if whole else part)
    if changed is None or shape is None:
        return None, None
    count = part.count if whole else 1
    return (changed[0] / count if changed[0] % count else changed[0] // count, changed[1]), (shape[0], math.prod(shape[1:]))
