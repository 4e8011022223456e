"""Names of weights in training checkpoints: how trainers and repackagers wrap the names that a network uses.

A trainer's wrapper puts a word before a name or into it (`module.`, `model.`, `_fsdp_wrapped_module.`, `_orig_mod.`), and a training
checkpoint puts whole networks into containers (`generator_ema`, `generator`, `state_dict`). `find_network` undoes both and selects the
network that samples. A published layout with other layer names is the family's own concern (`models.layout`). `models.lora` reads the
same containers in LoRA files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .family import FAMILIES

# words that module wrappers insert anywhere in a name
WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
# words that may stand before a parameter's own name
PREFIXES = ("module.", "model.", "diffusion_model.", "generator.", "transformer.")
# where a training checkpoint keeps the network that samples, best first; averaged weights ("ema") are better than all of them
CONTAINERS = ("generator", "model", "state_dict", "module")
# networks of the same layout that are used in training only
OTHERS = ("critic", "fake_score", "real_score", "discriminator", "teacher", "optimizer", "optim")
DEPTH = 16


@dataclass(frozen=True)
class Found:
    """What `find_network` selected. container: the words on the path to it, "" if there are none. left: names of the tensors beside it."""

    container: str
    state: dict[str, Tensor]
    left: tuple[str, ...] = ()


def find_network(content: Mapping) -> Found:
    """The network that samples, from a file's content: a state dict, or nested dicts, with any words before its parameters' names.

    Averaged weights are preferred, then a generator. If no network of a registered family is found, all tensors of the largest dict are
    returned with the usual prefixes removed, for the caller to identify. Raises ValueError when several networks are equally good.
    """
    tensors, network = list(tensors_in(content)), _network_names()
    parts: dict[tuple, set[str]] = {}
    for path, name, _ in tensors:
        match = network.match(name)
        if match and not any("lora" in word for word in path):
            parts.setdefault((path, match[1]), set()).add("blocks" if match["block"] else "embedding")
    whole = [place for place, kinds in parts.items() if len(kinds) == 2] or [place for place, kinds in parts.items() if "blocks" in kinds]
    if not whole:
        return _largest(tensors)
    best = min(map(rank, whole))
    chosen = [place for place in whole if rank(place) == best]
    if len(chosen) > 1:
        names = " and ".join(_label(place) or "one without a name" for place in chosen[:3])
        raise ValueError(f"It holds several networks, {names}, and none of them is called generator or model, so it is "
                         "unclear which one samples. Keep one of them.")
    (path, prefix), = chosen
    beside = [(name, tensor) for place, name, tensor in tensors if place == path]
    state = {name.removeprefix(prefix): tensor for name, tensor in beside if name.startswith(prefix)}
    return Found(_label((path, prefix)), state, tuple(name for name, _ in beside if not name.startswith(prefix)))


def _network_names() -> re.Pattern:
    """Matches the start of a name inside a network of any registered family: the words before it, then a layer or an embedding."""
    families = [family for family in FAMILIES.values() if family.recognizes is not None]
    blocks = "|".join(re.escape(name) for name in dict.fromkeys(family.blocks for family in families))
    embeddings = "|".join(re.escape(name) for name in dict.fromkeys(name for family in families for name in family.embeddings))
    return re.compile(rf"((?:[^.]+\.)*?)(?:(?P<block>(?:{blocks})\.\d+\.)|(?:{embeddings})\.)")


def plain(name: str) -> str:
    """A name without the words that module wrappers insert."""
    return ".".join(word for word in name.split(".") if word not in WRAPPERS)


def tensors_in(content: Mapping, numbers: re.Pattern | None = None) -> Iterator[tuple[tuple[str, ...], str, Tensor]]:
    """(names of the dicts around it, plain name, tensor) of every tensor, and of Python numbers whose name matches `numbers`.

    Each dict is entered once, and no deeper than DEPTH.
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


def trains_only(words: Iterable[str]) -> bool:
    """Whether words on the path to a network say that it is a critic, a teacher or the like, which does not sample."""
    return any(other in word for word in words for other in OTHERS)


def _words(place: tuple[tuple[str, ...], str]) -> list[str]:
    path, prefix = place
    return [*path, *prefix.split(".")[:-1]]


def rank(place: tuple[tuple[str, ...], str]) -> int:
    """How likely this network is the one that samples; 0 is most likely."""
    words = _words(place)
    if trains_only(words):
        return len(CONTAINERS) + 2
    if any("ema" in word.split("_") for word in words):
        return 0
    return min((1 + CONTAINERS.index(word) for word in words if word in CONTAINERS), default=len(CONTAINERS) + 1 if words else 2)


def _label(place: tuple[tuple[str, ...], str]) -> str:
    """Names of the dicts, and those words of a prefix that distinguish networks of one file."""
    path, prefix = place
    telling = [word for word in prefix.split(".")[:-1] if word not in ("model", "module", "diffusion_model")]
    return ".".join([*path, *telling])


def _largest(tensors: list[tuple[tuple[str, ...], str, Tensor]]) -> Found:
    """All tensors of the dict that holds the most, with the usual prefixes removed from their names."""
    groups: dict[tuple[str, ...], dict[str, Tensor]] = {}
    for path, name, tensor in tensors:
        while name.startswith(PREFIXES):
            name = name.partition(".")[2]
        groups.setdefault(path, {})[name] = tensor
    path = max(groups, key=lambda path: len(groups[path]), default=())
    return Found(".".join(path), groups.get(path, {}))
