"""LoRA files in every layout that trainers write, as changes of a network's own parameters.

A key of such a file is a module's name in some spelling (words before it, dots or underscores, the published names of its author or those
here) and a field (`lora_A.weight`, `lora_down.weight`, `hada_w1_a`, ...). All spellings of all parameters are put into one table, keyed by
the name with underscores for dots; the words before it are taken off one at a time until the table knows what is left. A layer that is
fused in the file and split here (`qkv`, `kv_linear`) is cut by rows. Nothing is dropped in silence: `Mapped` says which keys were not
taken, and `check` refuses a file of which nothing fits.

    mapped = convert(file, shapes)            # shapes: of every parameter of the network, by name without ".weight"
    mapped.check("LongCat-Video")
    mapped.weights["blocks.0.self_attn.q.lora_up.weight"]        # fields as ComfyUI spells them
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .names import WRAPPERS, judges, official_name, rank, tensors_in

# words before a module's name, with underscores for dots; the longer ones first
PREFIXES = ("base_model_model_", "base_model_", "diffusion_model_", "lora_transformer_", "lora_unet_", "lora_dit_", "lycoris_", "lora_",
            "transformer_", "generator_ema_", "generator_", "model_", "module_", "network_", "net_", "unet_", "dit_", "_")
FIELD = re.compile(r"""(?:
    (?P<rung>\.lora_up\.blocks\.(?P<number>\d+)\.weight)
    |(?P<down>\.lora_(?:A|down)(?:\.(?!weight$)\w+)?(?:\.weight)?|[._]lora\.down\.weight|\.lora_linear_layer\.down\.weight)
    |(?P<up>\.lora_(?:B|up)(?:\.(?!weight$|bias$)\w+)?(?:\.weight)?|[._]lora\.up\.weight|\.lora_linear_layer\.up\.weight)
    |(?P<magnitude>\.dora_scale|\.lora_magnitude_vector(?:\.(?!weight$)\w+)?(?:\.weight)?)
    |\.(?P<other>alpha|alpha_scale|lora_mid\.weight|hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2|diff|diff_b|set_weight
        |reshape_weight|w_norm|b_norm|oft_blocks|rescale|[ab][12]\.weight)
    )$""", re.VERBOSE)
NAMES = {"down": "lora_down.weight", "up": "lora_up.weight", "magnitude": "dora_scale"}
TEXT = re.compile(r"(?:^|[._])(?:lora_te\d?|text_encoders?(?:_\d)?|te\d?|clip_[lg]|t5xxl|umt5\w*)[._]")
# factors of a product: the first word of their fields -> the sets that make one
PRODUCTS = {
    "lora_": ({"lora_up.weight", "lora_down.weight"},), "hada_": ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},),
    "lokr_": tuple({*one, *two} for one in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
                   for two in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b")))}
# fields, or sets of them, that are a change without a product
ALONE = ({"diff"}, {"diff_b"}, {"set_weight"}, {"w_norm"}, {"oft_blocks"}, {"a1.weight", "a2.weight", "b1.weight", "b2.weight"})
# fields with a row for every output channel, and those that can stand beside them when a fused layer's change is cut
ROWS = {"lora_up.weight", "hada_w1_a", "hada_w2_a", "diff", "diff_b", "set_weight", "dora_scale"}
CUTTABLE = ROWS | {"lora_down.weight", "hada_w1_b", "hada_w2_b", "alpha", "alpha_scale"}
# Wan's names -> those of its diffusers edition
DIFFUSERS = (
    ("self_attn.norm_", "attn1.norm_"), ("cross_attn.norm_", "attn2.norm_"), ("self_attn.o", "attn1.to_out.0"),
    ("cross_attn.o", "attn2.to_out.0"), ("self_attn.", "attn1.to_"), ("cross_attn.", "attn2.to_"), ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"), ("norm3", "norm2"), ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"), ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"), ("time_projection.1", "condition_embedder.time_proj"),
    ("head.head", "proj_out"), ("head.modulation", "scale_shift_table"), (".modulation", ".scale_shift_table"))


# factors of a product, of which the first has as many columns as the second has rows
FACTORS = (("lora_up.weight", "lora_down.weight"), ("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b"), ("lokr_w1_a", "lokr_w1_b"),
           ("lokr_w2_a", "lokr_w2_b"))


@dataclass(frozen=True)
class Fused:
    """A fused layer's change, of which no cut of its factors is a part. fields: of the whole; place: which of `count` equal parts is meant.
    """

    fields: dict[str, Tensor]
    place: int
    count: int


@dataclass
class Mapped:
    """A LoRA file as changes of a network.

    weights: "<parameter>.<field>" -> tensor. fused: parameter -> what has to be cut when it is computed. taken: how many keys of the
    file that is. left: keys that belong to nothing here. unfit: keys of another shape than the network's, and misfits: parameter -> (shape
    that the file changes, shape of the network). text: keys that belong to a text encoder. aside: keys of a network that judged in
    training and does not sample, and of one less good than that which was taken.
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
        """A warning about what was not taken, "" where all was. Raises ValueError when nothing was."""
        missed = [*self.left, *self.unfit]
        shape = next((f"{name} is changed as {list(theirs)} and is {list(ours)} here" for name, (theirs, ours) in self.misfits.items()), "")
        if not self.taken and shape:
            raise ValueError(f"This LoRA is for a model of another size than this {model}: {shape}. Choose a LoRA of the same model.")
        if not self.taken:
            holds = ", ".join((self.left or self.text)[:3]) or "no tensors"
            raise ValueError(f"None of this LoRA's {len(missed) + len(self.text)} keys belongs to {model} (it holds {holds}). Choose a LoRA"
                             " that was trained for this model.")
        if not missed:
            return ""
        names = ", ".join(missed[:3]) + (", ..." if len(missed) > 3 else "")
        return (f"{len(missed)} of the LoRA's {len(missed) + self.taken} keys do not fit {model} and were left out: {names}"
                + (f" ({shape})" if shape else ""))


def flat(name: str) -> str:
    """A name with underscores for dots and for the words that stand for them, and without those of wrappers."""
    name = name.replace("___lorahyphen___", "_").replace(".", "_")
    for wrapper in WRAPPERS:
        name = name.replace(f"{wrapper}_", "")
    return name


class Spellings:
    """Every name of every parameter -> the parameters that it stands for, as (parameter, place, count)."""

    def __init__(self, parameters: Mapping[str, tuple]):
        self.table: dict[str, list[tuple[str, int, int]]] = {}
        published = any(name.endswith(".ffn.w3") for name in parameters)
        for name in parameters:
            self.table[flat(name)] = [(name, 0, 1)]
        for name in parameters:
            other, place, count = official_name(f"{name}.") if published else (self._diffusers(name), 0, 1)
            parts = self.table.setdefault(flat(other.rstrip(".")), [])
            if (name, place, count) not in parts:
                parts.append((name, place, count))

    @staticmethod
    def _diffusers(name: str) -> str:
        for ours, theirs in DIFFUSERS:
            if name.startswith(ours) or f".{ours.lstrip('.')}" in name:
                return name.replace(ours, theirs)
        return name

    def find(self, stem: str) -> list[tuple[str, int, int]]:
        name = flat(stem)
        while name:
            if name in self.table:
                return self.table[name]
            prefix = next((word for word in PREFIXES if name.startswith(word)), None)
            if prefix is None:
                break
            name = name[len(prefix):]
        return []


@dataclass
class Change:
    """What a file says of one module: its fields as ComfyUI spells them, the rungs of a ladder, and the keys."""

    fields: dict[str, Tensor] = field(default_factory=dict)
    rungs: dict[int, Tensor] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)

    def part(self, place: int, count: int) -> dict[str, Tensor] | Fused | None:
        """The fields of one of `count` equal parts of the rows; None where they do not make one."""
        names = self.fields.keys() | ({"lora_up.weight"} if self.rungs else set())
        if not _complete(names) or not _sound(self.fields, self.rungs):
            return None
        fields = dict(self.fields)
        if self.rungs:
            if sorted(self.rungs) != list(range(count)):
                return None
            fields |= {"lora_up.weight": self.rungs[place], "lora_down.weight": fields["lora_down.weight"].chunk(count)[place]}
        elif count > 1:
            cut = _cut(fields, place, count)
            if cut is None or isinstance(cut, Fused):
                return cut
            fields = cut
        scale, down = fields.pop("alpha_scale", None), fields.get("lora_down.weight")
        if scale is not None and down is not None:
            # ComfyUI divides by the rank; this scale is divided already
            fields["alpha"] = torch.tensor(float(scale) * down.shape[0])
        if "dora_scale" in fields and fields["dora_scale"].ndim == 1:
            fields["dora_scale"] = fields["dora_scale"][:, None]
        return fields


def _complete(names: Collection[str]) -> bool:
    """Whether fields of these names make one change: a product with all its factors, or something without one."""
    kinds = [kind for kind in PRODUCTS if any(name.startswith(kind) for name in names)]
    return len(kinds) < 2 and any(needed <= set(names) for needed in (PRODUCTS[kinds[0]] if kinds else ALONE))


def _sound(fields: dict[str, Tensor], rungs: dict[int, Tensor]) -> bool:
    """Whether factors can be multiplied and scales are one number each."""
    if any(tensor.numel() != 1 for name, tensor in fields.items() if name in ("alpha", "alpha_scale")):
        return False
    matrices = [*rungs.values(), *(fields[name] for pair in FACTORS for name in pair if name in fields),
                *(tensor for name, tensor in fields.items() if name in ("lokr_w1", "lokr_w2"))]
    if any(tensor.ndim < 2 for tensor in matrices) or any(tensor.ndim < 1 for name, tensor in fields.items() if name in ROWS):
        return False
    if fields.keys() & {"lora_mid.weight", "hada_t1", "hada_t2", "lokr_t2"}:
        return True
    products = [(fields[first], fields[second]) for first, second in FACTORS if first in fields and second in fields]
    if rungs and "lora_down.weight" in fields:
        down = fields["lora_down.weight"]
        if down.shape[0] % len(rungs) or any(math.prod(up.shape[1:]) != down.shape[0] // len(rungs) for up in rungs.values()):
            return False
    return all(math.prod(first.shape[1:]) == second.shape[0] for first, second in products)


def _cut(fields: dict[str, Tensor], place: int, count: int) -> dict[str, Tensor] | Fused | None:
    lokr = {name for name in fields if name.startswith("lokr_")}
    if lokr:
        outer = next((name for name in ("lokr_w1", "lokr_w1_a") if name in fields), None)
        if outer is None or "lokr_t2" in fields or fields.keys() - lokr - {"alpha"}:
            return None
        # rows of a Kronecker product are those of its first factor, each as many times as the second has rows
        if fields[outer].shape[0] % count:
            return Fused(fields, place, count)
        return fields | {outer: fields[outer].chunk(count)[place]}
    rows = [fields[name].shape[0] for name in ROWS & fields.keys() if fields[name].ndim]
    if fields.keys() - CUTTABLE or len(set(rows)) != 1 or rows[0] % count:
        return None
    return {name: tensor.chunk(count)[place] if name in ROWS else tensor for name, tensor in fields.items()}


def _extent(fields: dict[str, Tensor]) -> tuple[int, ...] | None:
    """Rows and columns of a change, None where its fields do not say."""
    if "reshape_weight" in fields:
        return None
    if "lora_up.weight" in fields:
        return fields["lora_up.weight"].shape[0], math.prod(fields["lora_down.weight"].shape[1:])
    if "hada_w1_a" in fields and not fields.keys() & {"hada_t1", "hada_t2"}:
        return fields["hada_w1_a"].shape[0], fields["hada_w1_b"].shape[1]
    if any(name.startswith("lokr_") for name in fields) and "lokr_t2" not in fields:
        first = [fields.get(name, fields.get("lokr_w1")) for name in ("lokr_w1_a", "lokr_w1_b")]
        second = [fields.get(name, fields.get("lokr_w2")) for name in ("lokr_w2_a", "lokr_w2_b")]
        return first[0].shape[0] * second[0].shape[0], first[1].shape[1] * math.prod(second[1].shape[1:])
    for name in ("diff", "set_weight"):
        if name in fields:
            return fields[name].shape[0], math.prod(fields[name].shape[1:])
    return None


def _changes(lora: Mapping, mapped: Mapped) -> Iterator[tuple[str, Change]]:
    """(module's name in the file, what the file says of it); keys without a field that is known go to `mapped`."""
    entries = list(tensors_in(lora, numbers=FIELD))
    if not all(judges(path) for path, _, _ in entries):
        mapped.aside += [".".join((*path, key)) for path, key, _ in entries if judges(path)]
        entries = [entry for entry in entries if not judges(entry[0])]
    changes: dict[tuple, Change] = {}
    for path, key, tensor in entries:
        match = FIELD.search(key)
        if match is None or TEXT.search(key):
            (mapped.text if TEXT.search(key) else mapped.left).append(key)
            continue
        change = changes.setdefault((path, key[:match.start()]), Change())
        place, known = (int(match["number"]), change.rungs) if match["rung"] else (
            NAMES.get(match.lastgroup) or match[match.lastgroup], change.fields)
        if place in known:
            mapped.left.append(key)
            continue
        known[place] = tensor
        change.keys.append(key)
    # averaged weights first, as in a checkpoint
    for (_, stem), change in sorted(changes.items(), key=lambda item: rank((item[0][0], ""))):
        yield stem, change


def convert(lora: Mapping, shapes: Mapping[str, tuple[int, ...] | None]) -> Mapped:
    """The changes that a LoRA file, dicts in dicts or flat, makes to the parameters of `shapes` (None: shape not known).

    Names end without ".weight"; a parameter that is none (Wan's `modulation`) has its own name.
    """
    mapped, spellings = Mapped(), Spellings(shapes)
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
    """(rows and columns that are changed, rows and columns of the parameter), equal where one of them is not known."""
    whole = isinstance(part, Fused)
    extent = _extent(part.fields if whole else part)
    if extent is None or shape is None:
        return None, None
    count = part.count if whole else 1
    return (extent[0] / count if extent[0] % count else extent[0] // count, extent[1]), (shape[0], math.prod(shape[1:]))
