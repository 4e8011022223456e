"""One module's change in a LoRA file: the fields that trainers write, which of them make a complete change, and splitting by rows.

Kinds of change: a low-rank product (LoRA, DoRA, PEFT), a product of two such products (LoHa), a Kronecker product (LoKr), and plain
differences. A layer that is fused in the file (`qkv`) and split in the network is divided by its rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

FIELD = re.compile(r"""(?:
    (?P<up_block>\.lora_up\.blocks\.(?P<number>\d+)\.weight)
    |(?P<down>\.lora_(?:A|down)(?:\.(?!weight$)\w+)?(?:\.weight)?|[._]lora\.down\.weight|\.lora_linear_layer\.down\.weight)
    |(?P<up>\.lora_(?:B|up)(?:\.(?!weight$|bias$)\w+)?(?:\.weight)?|[._]lora\.up\.weight|\.lora_linear_layer\.up\.weight)
    |(?P<magnitude>\.dora_scale|\.lora_magnitude_vector(?:\.(?!weight$)\w+)?(?:\.weight)?)
    |\.(?P<other>alpha|alpha_scale|lora_mid\.weight|hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2|diff|diff_b|set_weight
        |reshape_weight|w_norm|b_norm|oft_blocks|rescale|[ab][12]\.weight)
    )$""", re.VERBOSE)
NAMES = {"down": "lora_down.weight", "up": "lora_up.weight", "magnitude": "dora_scale"}
TEXT = re.compile(r"(?:^|[._])(?:lora_te\d?|text_encoders?(?:_\d)?|te\d?|clip_[lg]|t5xxl|umt5\w*)[._]")
# prefix of a kind of product's fields -> the sets of fields that make one complete product
PRODUCTS = {
    "lora_": ({"lora_up.weight", "lora_down.weight"},), "hada_": ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},),
    "lokr_": tuple({*one, *two} for one in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
                   for two in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b")))}
# fields, or sets of them, that are a complete change without a product
ALONE = ({"diff"}, {"diff_b"}, {"set_weight"}, {"w_norm"}, {"oft_blocks"}, {"a1.weight", "a2.weight", "b1.weight", "b2.weight"})
# fields with one row per output channel, and those that may accompany them when a fused layer's change is split
ROWS = {"lora_up.weight", "hada_w1_a", "hada_w2_a", "diff", "diff_b", "set_weight", "dora_scale"}
CUTTABLE = ROWS | {"lora_down.weight", "hada_w1_b", "hada_w2_b", "alpha", "alpha_scale"}
# factors of a product: the first has as many columns as the second has rows
FACTORS = (("lora_up.weight", "lora_down.weight"), ("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b"), ("lokr_w1_a", "lokr_w1_b"),
           ("lokr_w2_a", "lokr_w2_b"))


@dataclass(frozen=True)
class Fused:
    """One part of a fused layer's change that no split of its factors yields. fields: of the whole; place: which of `count` equal parts."""

    fields: dict[str, Tensor]
    place: int
    count: int


@dataclass
class Change:
    """What a file says about one module: fields in ComfyUI's spelling, numbered `lora_up` blocks, and the file's keys."""

    fields: dict[str, Tensor] = field(default_factory=dict)
    ups: dict[int, Tensor] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)

    def part(self, place: int, count: int) -> dict[str, Tensor] | Fused | None:
        """The fields of one of `count` equal parts of the rows; None if they do not make a complete change."""
        names = self.fields.keys() | ({"lora_up.weight"} if self.ups else set())
        if not _complete(names) or not _sound(self.fields, self.ups):
            return None
        fields = dict(self.fields)
        if self.ups:
            if sorted(self.ups) != list(range(count)):
                return None
            fields |= {"lora_up.weight": self.ups[place], "lora_down.weight": fields["lora_down.weight"].chunk(count)[place]}
        elif count > 1:
            cut = _cut(fields, place, count)
            if cut is None or isinstance(cut, Fused):
                return cut
            fields = cut
        scale, down = fields.pop("alpha_scale", None), fields.get("lora_down.weight")
        if scale is not None and down is not None:
            # ComfyUI divides by the rank; this scale is already divided
            fields["alpha"] = torch.tensor(float(scale) * down.shape[0])
        if "dora_scale" in fields and fields["dora_scale"].ndim == 1:
            fields["dora_scale"] = fields["dora_scale"][:, None]
        return fields


def _complete(names: Collection[str]) -> bool:
    """Whether fields of these names make one complete change: a product with all its factors, or a change without one."""
    kinds = [kind for kind in PRODUCTS if any(name.startswith(kind) for name in names)]
    return len(kinds) < 2 and any(needed <= set(names) for needed in (PRODUCTS[kinds[0]] if kinds else ALONE))


def _sound(fields: dict[str, Tensor], ups: dict[int, Tensor]) -> bool:
    """Whether factors can be multiplied and each scale is a single number."""
    if any(tensor.numel() != 1 for name, tensor in fields.items() if name in ("alpha", "alpha_scale")):
        return False
    matrices = [*ups.values(), *(fields[name] for pair in FACTORS for name in pair if name in fields),
                *(tensor for name, tensor in fields.items() if name in ("lokr_w1", "lokr_w2"))]
    if any(tensor.ndim < 2 for tensor in matrices) or any(tensor.ndim < 1 for name, tensor in fields.items() if name in ROWS):
        return False
    if fields.keys() & {"lora_mid.weight", "hada_t1", "hada_t2", "lokr_t2"}:
        return True
    products = [(fields[first], fields[second]) for first, second in FACTORS if first in fields and second in fields]
    if ups and "lora_down.weight" in fields:
        down = fields["lora_down.weight"]
        if down.shape[0] % len(ups) or any(math.prod(up.shape[1:]) != down.shape[0] // len(ups) for up in ups.values()):
            return False
    return all(math.prod(first.shape[1:]) == second.shape[0] for first, second in products)


def _cut(fields: dict[str, Tensor], place: int, count: int) -> dict[str, Tensor] | Fused | None:
    """The fields of one of `count` equal parts of a fused layer's rows; None if they cannot be split."""
    lokr = {name for name in fields if name.startswith("lokr_")}
    if lokr:
        outer = next((name for name in ("lokr_w1", "lokr_w1_a") if name in fields), None)
        if outer is None or "lokr_t2" in fields or fields.keys() - lokr - {"alpha"}:
            return None
        # a Kronecker product has the rows of its first factor, each as often as the second has rows
        if fields[outer].shape[0] % count:
            return Fused(fields, place, count)
        return fields | {outer: fields[outer].chunk(count)[place]}
    rows = [fields[name].shape[0] for name in ROWS & fields.keys() if fields[name].ndim]
    if fields.keys() - CUTTABLE or len(set(rows)) != 1 or rows[0] % count:
        return None
    return {name: tensor.chunk(count)[place] if name in ROWS else tensor for name, tensor in fields.items()}


def extent(fields: dict[str, Tensor]) -> tuple[int, ...] | None:
    """Rows and columns of a change, None if its fields do not determine them."""
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
