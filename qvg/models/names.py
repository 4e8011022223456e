"""Names of weights: how trainers, publishers and repackagers write what the networks here call by Wan's names.

Three things happen to a name on its way into a file. A trainer's wrapper puts a word before it or into it (`module.`, `model.`,
`_fsdp_wrapped_module.`, `_orig_mod.`), a training checkpoint puts whole networks into containers (`generator_ema`, `generator`,
`state_dict`), and an author may call the same layers otherwise: LongCat-Video publishes one `qkv` and one `kv_linear` where the networks
here, and the LoRAs and FP8 files that circulate, have `q`, `k` and `v`. `find_network` undoes the first two, `split_layout` the third,
with whatever stands beside a weight (biases, the scales of quantized files). `qvg.lora` reads names in LoRA files, from the same tables.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# words that wrappers of modules put anywhere into a name
WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
# words before the name of a network's own parameter
PREFIXES = ("module.", "model.", "diffusion_model.", "generator.", "transformer.")
# where a training checkpoint keeps the network that samples, best first; averaged weights ("ema") come before all of them
CONTAINERS = ("generator", "model", "state_dict", "module")
# networks of the same layout that judge or teach, and do not sample
OTHERS = ("critic", "fake_score", "real_score", "discriminator", "teacher", "optimizer", "optim")
DEPTH = 16

NETWORK = re.compile(r"((?:[^.]+\.)*?)(blocks\.\d+\.|patch_embedding\.|x_embedder\.)")

# LongCat-Video's published name -> name here, in this order; what splits into several is listed in SPLITS
RENAMED = (
    ("x_embedder.proj.", "patch_embedding."), ("t_embedder.", "time_embedding."), ("y_embedder.y_proj.", "text_embedding."),
    ("final_layer.linear.", "head.head."), (".adaLN_modulation.", ".modulation."), ("final_layer.modulation.", "head.modulation."),
    (".pre_crs_attn_norm.", ".norm3."), (".attn.", ".self_attn."), (".q_linear.", ".q."), ("attn.proj.", "attn.o."),
    (".q_norm.", ".norm_q."), (".k_norm.", ".norm_k."))
SPLITS = ((".self_attn.qkv.", (".self_attn.q.", ".self_attn.k.", ".self_attn.v.")),
          (".cross_attn.kv_linear.", (".cross_attn.k.", ".cross_attn.v.")))
FUSED = re.compile(r"(.*\.(?:qkv|kv_linear)\.)(.+)")
# what belongs to a quantized layer's input, or says how it was made, and not to its rows
WHOLE = re.compile(r"input|pre_quant|comfy_quant|quant_map|quant_state")


def split_names(name: str) -> list[str]:
    """Names here of a published parameter of LongCat-Video, in the order in which its rows hold them; a name of ours stays as it is."""
    for old, new in RENAMED:
        name = name.replace(old, new)
    for fused, parts in SPLITS:
        if fused in name:
            return [name.replace(fused, part) for part in parts]
    return [name]


def official_name(name: str) -> tuple[str, int, int]:
    """LongCat-Video's published parameter that holds one of ours: its name, which of its equal parts it is, and how many there are."""
    place, count = 0, 1
    for fused, parts in SPLITS:
        for number, part in enumerate(parts):
            if part in name:
                name, place, count = name.replace(part, fused), number, len(parts)
    for old, new in reversed(RENAMED):
        name = name.replace(new, old)
    return name, place, count


def split_layout(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of LongCat-Video in either layout with the names used here; weights are views of those given.

    Raises ValueError where rows cannot be shared out among the parts of a fused layer.
    """
    state = {}
    for name, tensor in state_dict.items():
        names = split_names(name)
        if len(names) == 1:
            state[names[0]] = tensor
            continue
        fused = FUSED.fullmatch(name)
        if fused is None:
            raise ValueError(f"{name!r} is no part of a layer; the file may be damaged.")
        layer, field = fused.groups()
        weight = state_dict.get(f"{layer}weight")
        rows = weight.shape[0] if weight is not None and weight.ndim else 0
        state.update(zip(names, _share(name, field, tensor, len(names), rows)))
    return state


def _share(name: str, field: str, tensor: Tensor, count: int, rows: int) -> list[Tensor]:
    """A fused layer's weight, bias or side tensor for each of its `count` parts. rows: of the fused weight.

    A scale of the whole layer, and all that is about its input, serves every part; scales of rows, or of blocks of rows, are cut like
    the rows.
    """
    length = tensor.shape[0] if tensor.ndim else 1
    if field not in ("weight", "bias") and (length == 1 or WHOLE.search(field)):
        return [tensor.clone() for _ in range(count)]
    if tensor.ndim == 0 or length % count or (field != "bias" and rows % length and length % max(1, rows)):
        raise ValueError(f"{name} has the shape {list(tensor.shape)}, which cannot be shared out among {count} layers of {rows} rows in "
                         "all; the file may be damaged, or be quantized in a way that is not known here.")
    return list(tensor.chunk(count))


@dataclass(frozen=True)
class Found:
    """What `find_network` took. container: the words that led to it, "" where there were none. left: tensors beside it, not taken."""

    container: str
    state: dict[str, Tensor]
    left: tuple[str, ...] = ()


def find_network(content: Mapping) -> Found:
    """The network that samples, out of a file's content: a state dict, or dicts in dicts, with any words before its parameters' names.

    Averaged weights are preferred, then a generator. Where there is no video network all tensors of the largest dict are given, with
    the usual words taken off, for the caller to say what they are. Raises ValueError when several networks are equally good.
    """
    tensors = list(tensors_in(content))
    parts: dict[tuple, set[str]] = {}
    for path, name, _ in tensors:
        match = NETWORK.match(name)
        if match and not any("lora" in word for word in path):
            parts.setdefault((path, match[1]), set()).add("blocks" if match[2].startswith("blocks") else "embedding")
    whole = [place for place, kinds in parts.items() if len(kinds) == 2] or [place for place, kinds in parts.items() if "blocks" in kinds]
    if not whole:
        return _largest(tensors)
    best = min(map(rank, whole))
    chosen = [place for place in whole if rank(place) == best]
    if len(chosen) > 1:
        names = " and ".join(_label(place) or "one without a name" for place in chosen[:3])
        raise ValueError(f"It holds several networks, {names}, and none of them is called generator or model, so which one samples "
                         "cannot be known. Keep one of them.")
    (path, prefix), = chosen
    beside = [(name, tensor) for place, name, tensor in tensors if place == path]
    state = {name.removeprefix(prefix): tensor for name, tensor in beside if name.startswith(prefix)}
    return Found(_label((path, prefix)), state, tuple(name for name, _ in beside if not name.startswith(prefix)))


def plain(name: str) -> str:
    """A name without the words of wrappers."""
    return ".".join(word for word in name.split(".") if word not in WRAPPERS)


def tensors_in(content: Mapping, numbers: re.Pattern | None = None) -> Iterator[tuple[tuple[str, ...], str, Tensor]]:
    """(names of the dicts around it, plain name, tensor) of every tensor, and of plain numbers whose name `numbers` finds.

    A dict is entered once, and not deeper than DEPTH.
    """
    waiting, seen = [((), content)], {id(content)}
    while waiting:
        path, inside = waiting.pop()
        for key, value in inside.items():
            if isinstance(value, Tensor) and isinstance(key, str):
                yield path, plain(key), value
            elif numbers and isinstance(value, int | float) and isinstance(key, str) and numbers.search(key):
                yield path, plain(key), torch.tensor(value)
            elif isinstance(value, Mapping) and id(value) not in seen and len(path) < DEPTH:
                seen.add(id(value))
                waiting.append(((*path, str(key)), value))


def judges(words: Iterable[str]) -> bool:
    """Whether words on the way to a network say that it judges or teaches, and does not sample."""
    return any(other in word for word in words for other in OTHERS)


def _words(place: tuple[tuple[str, ...], str]) -> list[str]:
    path, prefix = place
    return [*path, *prefix.split(".")[:-1]]


def rank(place: tuple[tuple[str, ...], str]) -> int:
    """How likely this network is the one that samples; 0 is best."""
    words = _words(place)
    if judges(words):
        return len(CONTAINERS) + 2
    if any("ema" in word.split("_") for word in words):
        return 0
    return min((1 + CONTAINERS.index(word) for word in words if word in CONTAINERS), default=len(CONTAINERS) + 1 if words else 2)


def _label(place: tuple[tuple[str, ...], str]) -> str:
    """Names of the dicts, and those words of a prefix that tell networks of one file apart."""
    path, prefix = place
    telling = [word for word in prefix.split(".")[:-1] if word not in ("model", "module", "diffusion_model")]
    return ".".join([*path, *telling])


def _largest(tensors: list[tuple[tuple[str, ...], str, Tensor]]) -> Found:
    """All tensors of the dict that has most of them, with the usual words taken off their names."""
    groups: dict[tuple[str, ...], dict[str, Tensor]] = {}
    for path, name, tensor in tensors:
        while name.startswith(PREFIXES):
            name = name.partition(".")[2]
        groups.setdefault(path, {})[name] = tensor
    path = max(groups, key=lambda path: len(groups[path]), default=())
    return Found(".".join(path), groups.get(path, {}))
