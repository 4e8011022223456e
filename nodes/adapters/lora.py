"""LoRAs in ComfyUI's own loaders, for causal Wan and LongCat-Video, in every layout that `qvg.lora` reads.

Core looks up a LoRA's names in two steps: what a model's weights are called in files, and which keys of a file those are. Both are
wrapped here. The first remembers the network where it is one of ours; the second then hands core the file with the names that it knows,
and says what was not taken. For every other model both are core's, unchanged. So LoraLoader, LoraLoaderModelOnly, hooks and bypass loaders
all work, whoever wrote them.
"""

from __future__ import annotations

import logging
from functools import wraps

import comfy.lora
import comfy.model_base
import comfy.weight_adapter
import torch

from ...qvg.models import lora as layouts
from ...qvg.models.longcat import LongCat

PREFIX = "diffusion_model."


class Names(dict):
    """Core's map from names in files to weights, with the network that they belong to and what a person calls it."""

    def __init__(self, names: dict, network, model: str):
        super().__init__(names)
        self.network, self.model = network, model


class FusedLoKr(comfy.weight_adapter.LoKrAdapter):
    """A Kronecker product over a fused layer, of which one layer gets its rows. weights: core's nine, which part, of how many."""

    def calculate_weight(self, weight, key, *args, **kwargs):
        *product, place, count = self.weights
        whole = weight.new_zeros(count, *weight.shape)
        whole[place] = weight
        core = comfy.weight_adapter.LoKrAdapter(self.loaded_keys, tuple(product))
        weight.copy_(core.calculate_weight(whole.flatten(0, 1), key, *args, **kwargs).view_as(whole)[place])
        return weight

    def h(self, x, base_out):
        *product, place, count = self.weights
        core = comfy.weight_adapter.LoKrAdapter(self.loaded_keys, tuple(product))
        core.multiplier = self.multiplier
        return core.h(x, base_out).chunk(count, -1)[place]


def shapes(network) -> dict[str, tuple[int, ...] | None]:
    """Shape of every parameter by name without ".weight"; of a layer the one that it computes with, however its weight is packed."""
    found = {}
    for name, parameter in network.named_parameters():
        owner, _, last = name.rpartition(".")
        if last == "bias":
            continue
        layer = network.get_submodule(owner)
        linear = last == "weight" and hasattr(layer, "in_features")
        found[name.removesuffix(".weight")] = (layer.out_features, layer.in_features) if linear else tuple(parameter.shape)
    return found


def _wrap_names(core):
    @wraps(core)
    def names(model, key_map=None):
        found = core(model, {} if key_map is None else key_map)
        network = getattr(model, "diffusion_model", None)
        if isinstance(network, LongCat):
            return Names(found, network, "LongCat-Video")
        if isinstance(model, comfy.model_base.WAN21_CausalAR):
            return Names(found, network, "the causal Wan model")
        return found

    return names


def _wrap_load(core):
    @wraps(core)
    def load(lora, to_load, log_missing=True):
        if not isinstance(to_load, Names):
            return core(lora, to_load, log_missing)
        mapped = layouts.convert(lora, shapes(to_load.network))
        # what is a text encoder's, and fields that only core knows
        rest = {key: lora[key] for key in (*mapped.text, *mapped.left) if isinstance(lora.get(key), torch.Tensor)}
        patches = core(rest, to_load, log_missing=False)
        spelled = tuple(name for name, key in to_load.items() if key in patches)
        others = {key for key in rest if key.startswith(spelled)} if spelled else set()
        mapped.taken += len(others)
        mapped.left = [key for key in mapped.left if key not in others]
        patches |= core({PREFIX + key: tensor for key, tensor in mapped.weights.items()}, to_load, log_missing=False)
        for name, part in mapped.fused.items():
            adapter = comfy.weight_adapter.LoKrAdapter.load(
                "", {f".{key}": tensor for key, tensor in part.fields.items()}, _number(part.fields.get("alpha")), None, set())
            patches[f"{PREFIX}{name}.weight"] = FusedLoKr(adapter.loaded_keys, (*adapter.weights, part.place, part.count))
        if mapped.text and not log_missing:
            return patches  # a hook asks the network and the text encoder in turn
        warning = mapped.check(to_load.model)
        if warning:
            logging.warning("QVG: %s", warning)
        if mapped.aside:
            logging.info("QVG: %d keys of the LoRA belong to a network that is not the one that samples (%s, ...)", len(mapped.aside),
                         mapped.aside[0])
        return patches

    return load


def _number(tensor) -> float | None:
    return None if tensor is None else float(tensor)


comfy.lora.model_lora_keys_unet = _wrap_names(comfy.lora.model_lora_keys_unet)
comfy.lora.load_lora = _wrap_load(comfy.lora.load_lora)
