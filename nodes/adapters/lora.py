"""LoRAs in ComfyUI's own loaders, for every registered model family, in every layout that `qvg.models.lora` reads.

Core loads a LoRA in two steps: it lists the names that a model's weights may have in files, then looks these names up in the file. Both
functions are wrapped here. For a network of a registered family, the first wrapper remembers the network, and the second gives core the
file under the names that core knows and reports unused keys. For every other model both are core's own. So LoraLoader,
LoraLoaderModelOnly, hooks and bypass loaders all work, those of other packs included.
"""

from __future__ import annotations

import logging
from functools import wraps

import comfy.lora
import comfy.weight_adapter
import torch

from ...qvg.models import Family
from ...qvg.models import lora as layouts
from .families import family_of

PREFIX = "diffusion_model."


class Names(dict):
    """Core's map from names in files to weights, with the network that they belong to and its family."""

    def __init__(self, names: dict, network, family: Family):
        super().__init__(names)
        self.network, self.family = network, family


class FusedLoKr(comfy.weight_adapter.LoKrAdapter):
    """A Kronecker product over a fused layer, applied to one layer's rows. weights: core's nine, which part, number of parts."""

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
    """Shape of every parameter by name without ".weight". A linear layer's is that of its matrix, even if the weight is packed."""
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
        family = None if network is None else family_of(network)
        return found if family is None else Names(found, network, family)

    return names


def _wrap_load(core):
    @wraps(core)
    def load(lora, to_load, log_missing=True):
        if not isinstance(to_load, Names):
            return core(lora, to_load, log_missing)
        mapped = layouts.convert(lora, shapes(to_load.network), to_load.family)
        # keys of a text encoder, and fields that only core knows
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
            return patches  # a hook loads the network and the text encoder separately
        warning = mapped.check(f"the {to_load.family.title} model")
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
