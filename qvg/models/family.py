"""What the pack knows about a model family, stated in one place, and the registry of families.

    FAMILIES.register(Family(
        name="toy", title="Toy", shapes={"toy": ModelShape(layers=2, heads=2, head_dim=8, ...)},
        recognizes=lambda state: "toy.weight" in state, sizes=ToySizes.read, network=ToyNetwork))

The checkpoint reader, the LoRA reader, the memory plan, the `qvg` command and the ComfyUI nodes loop over `FAMILIES`; none of them names
a family. A family with `shapes` alone can be planned. With `recognizes`, `sizes` and `network` its checkpoints open and it runs in
`video.sampler`. With `adapter` it also runs in ComfyUI.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from ..attention.rope import Rope
from ..registry import Registry
from .shape import ModelShape

State = Mapping[str, Tensor]


class Sizes(Protocol):
    """What a family's state dict says about its network; families add fields of their own."""

    @property
    def layers(self) -> int: ...

    @property
    def heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...


def unchanged(state: State) -> State:
    return state


def nothing_wrong(state: State) -> str:
    return ""


@dataclass(frozen=True)
class Family:
    """Models that share a network and a layout of weights.

    name: the key in `FAMILIES`. title: what error sentences call it. examples: published models of it, for the same sentences.
    shapes: name that `qvg plan --model` takes -> sizes.

    How a checkpoint is recognized and read:
    recognizes: whether a state dict belongs to this family, in any of its layouts. None: its checkpoints cannot be opened.
    blocks: name of the list of layers. embeddings: names of the first layer. Both find the network inside a training checkpoint.
    convert: published layout -> the network's own parameter names. fragments: parts of keys that only a published, incomplete file has.
    own: fragments listed in `refusals.OTHER_MODELS` that are normal for this family.
    sizing: weights that sizes are read from -> number of axes. refuse: what is wrong with a recognized state dict, as the rest of a
    sentence that begins with the file's name; "" if nothing is.

    How it runs:
    sizes: reads `Sizes` from a state dict in the network's names. network: builds the network from sizes; its forward is
    (latents [B, C, F, H, W], timestep [B, F], context, attend) -> flow [B, C, F, H, W], see `models.wan`.
    rope: (head_dim, grid of tokens) -> positions of its keys and queries; `KVCache(..., rope=family.rope)`.
    walks: whether it follows a camera path in two branches of attention, see `video.world`; loops without cameras cannot run it.
    lora_name: a parameter's name -> (its other name in LoRA files, which of how many equal parts, how many parts).
    adapter: module with the functions of `nodes.adapters.families.Adapter`, for ComfyUI. A leading dot means a module of this pack. Only
    nodes/ imports it.
    layout: what a loaded file is said to be, `title` by default. licence: a sentence about the weights that a person who loads them should
    read, "" if their licence holds everywhere.
    """

    name: str
    title: str
    examples: str = ""
    shapes: Mapping[str, ModelShape] = field(default_factory=dict)
    recognizes: Callable[[State], bool] | None = None
    blocks: str = "blocks"
    embeddings: tuple[str, ...] = ("patch_embedding",)
    convert: Callable[[State], State] = unchanged
    fragments: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    sizing: Mapping[str, int] = field(default_factory=dict)
    refuse: Callable[[State], str] = nothing_wrong
    sizes: Callable[[State], Sizes] | None = None
    network: Callable[[Sizes], nn.Module] | None = None
    rope: Callable[[int, tuple[int, int]], Rope] = Rope
    walks: bool = False
    lora_name: Callable[[str], tuple[str, int, int]] | None = None
    adapter: str = ""
    layout: str = ""
    licence: str = ""

    def open(self, state: State, dtype: torch.dtype | None = None) -> nn.Module:
        """The network that a state dict describes, in any layout of this family, on the device of its tensors.

        dtype: of the weights, as stored by default. Raises ValueError for a family without a network and for missing weights.
        """
        if self.sizes is None or self.network is None:
            raise ValueError(f"No network of {self.title} is part of this pack; it can be planned, not run.")
        state = self.convert(state)
        return load_weights(self.network, self.sizes(state), state, dtype)

    def size_name(self, sizes: Sizes) -> str:
        """What models of this size are called, "" for an unknown size."""
        return next((shape.size_name for shape in self.shapes.values()
                     if (shape.layers, shape.dim) == (sizes.layers, sizes.heads * sizes.head_dim)), "")


def load_weights(build: Callable[[Sizes], nn.Module], sizes: Sizes, state: State, dtype: torch.dtype | None) -> nn.Module:
    """Build a network without allocating its weights, then assign those of `state` strictly, cast to `dtype` (default: as stored)."""
    with torch.device("meta"):
        network = build(sizes)
    network.load_state_dict({name: tensor.to(dtype or tensor.dtype) for name, tensor in state.items()}, assign=True)
    return network.requires_grad_(False).eval()


FAMILIES: Registry[Family] = Registry("model family")
