"""A published layout of weights that names the layers of a network differently, and stores some of them fused.

LongCat-Video publishes one `qkv` and one `kv_linear` where the network here, and the LoRAs and FP8 files that circulate, have `q`, `k` and
`v`. A `Layout` holds the two tables of such a difference and applies them to names, to state dicts (weights, biases, and the scales of
quantized files) and, backwards, to LoRA names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

# side tensors that describe a quantized layer's input, or how it was quantized; they are not split by rows
WHOLE = re.compile(r"input|pre_quant|comfy_quant|quant_map|quant_state")


@dataclass(frozen=True)
class Layout:
    """renamed: (published fragment, our fragment), applied in this order. fused: (fragment of a fused layer, fragments of its parts in
    the order of their rows)."""

    renamed: tuple[tuple[str, str], ...]
    fused: tuple[tuple[str, tuple[str, ...]], ...]

    def our_names(self, name: str) -> list[str]:
        """Our names of a published parameter, in the order of its rows. A name of ours is returned as it is."""
        for theirs, ours in self.renamed:
            name = name.replace(theirs, ours)
        for whole, parts in self.fused:
            if whole in name:
                return [name.replace(whole, part) for part in parts]
        return [name]

    def published_name(self, name: str) -> tuple[str, int, int]:
        """The published parameter that contains one of ours: its name, which of its equal parts ours is, and the number of parts."""
        place, count = 0, 1
        for whole, parts in self.fused:
            for number, part in enumerate(parts):
                if part in name:
                    name, place, count = name.replace(part, whole), number, len(parts)
        for theirs, ours in reversed(self.renamed):
            name = name.replace(ours, theirs)
        return name, place, count

    def layer_name(self, name: str) -> tuple[str, int, int]:
        """`published_name` of a layer, without ".weight", for `Family.lora_name`."""
        published, place, count = self.published_name(f"{name}.")
        return published.rstrip("."), place, count

    def convert(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict in either layout under our names; weights are views of those given.

        Raises ValueError where the rows of a fused layer cannot be divided among its parts.
        """
        layers = "|".join(re.escape(whole.rpartition(".")[0].rpartition(".")[2]) for whole, _ in self.fused)
        field_of = re.compile(rf"(.*\.(?:{layers})\.)(.+)")
        state = {}
        for name, tensor in state_dict.items():
            names = self.our_names(name)
            if len(names) == 1:
                state[names[0]] = tensor
                continue
            match = field_of.fullmatch(name)
            if match is None:
                raise ValueError(f"{name!r} is not part of a layer; the file may be damaged.")
            layer, field = match.groups()
            weight = state_dict.get(f"{layer}weight")
            rows = weight.shape[0] if weight is not None and weight.ndim else 0
            state.update(zip(names, _split(name, field, tensor, len(names), rows)))
        return state


def _split(name: str, field: str, tensor: Tensor, count: int, rows: int) -> list[Tensor]:
    """A fused layer's weight, bias or side tensor for each of its `count` parts. rows: of the fused weight.

    Scales of the whole layer, and side tensors of its input, are copied to every part. Scales of rows, or of blocks of rows, are split
    like the rows.
    """
    length = tensor.shape[0] if tensor.ndim else 1
    if field not in ("weight", "bias") and (length == 1 or WHOLE.search(field)):
        return [tensor.clone() for _ in range(count)]
    if tensor.ndim == 0 or length % count or (field != "bias" and rows % length and length % max(1, rows)):
        raise ValueError(f"{name} has the shape {list(tensor.shape)}, which cannot be divided among {count} layers of {rows} rows in "
                         "total; the file may be damaged, or be quantized in a way that is not supported.")
    return list(tensor.chunk(count))
