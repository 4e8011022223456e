"""What other nodes put on a MODEL or a condition: what works with a cache, and what is refused before the first step.

Core's causal network asks for no patches while it makes a video chunk by chunk, and the LongCat-Video of this pack for few. Without these
checks such a node is passed over in silence, or fails inside the network with a message about arguments. `PATCHES` is all there is to know;
the help page of Quantize KV Cache (QVG) has the same table.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from torch import nn

from .compiled import bare, check_compiled

CAUSAL, LONGCAT = "causal", "longcat"
OVERRIDE = "optimized_attention_override"

IGNORED = "changes parts of a network that this one does not have or does not ask about, so it would do nothing"
TAKES_PLACE = "takes the place of what reads the KV cache"
SKIPS = "leaves out passes by comparing them with the pass before, which may be of another chunk"
STEPS_IN_AND_OUT = "evaluates the negative prompt in some steps only, so that its cache would have gaps"
OTHER_NETWORK = "asks the network for something that only other networks have"
WHOLE = "belongs to the whole video, which is made chunk by chunk"
SECOND = "has no cache of its own for the prompt that it adds"
TWICE = "is what LongCat-Video does by itself, and would count twice"
WINDOWS = "cuts the video into windows, whose frames are not where the cache has them"
ONE_DEVICE = "spreads the model over several GPUs, but the cache is on one"


@dataclass(frozen=True)
class Patch:
    """A kind of patch. name: as a graph calls it; where: which of `_found` it is about; pattern: of a name there; causal, longcat: why it
    cannot work with these networks, "" where it works."""

    name: str
    where: str
    pattern: str
    causal: str = ""
    longcat: str = ""


# the first that fits counts
PATCHES = (
    Patch("torch.compile of the whole model or of its blocks (TorchCompileModel)", "compile", "."),
    Patch("LoRA, also by hooks", "hooks", "."),
    Patch("ModelSamplingSD3 and other samplings", "object", r"model_sampling$"),
    Patch("attention of another kind (SageAttention, FlashAttention)", "option", OVERRIDE + "$"),
    Patch("Perturbed-Attention Guidance, Self-Attention Guidance", "function", r"nodes_[ps]ag\b|perturbed", IGNORED, IGNORED),
    Patch("Skip Layer Guidance", "function", r"nodes_slg|skip_?layer", IGNORED, IGNORED),
    Patch("Perp-Neg as a patch", "function", r"nodes_perpneg|perp_?neg", SECOND),
    Patch("TeaCache, MagCache, First Block Cache", "function", r"tea_?cache|mag_?cache|first_?block_?cache|fb_?cache", SKIPS, IGNORED),
    Patch("CFGZeroStar", "function", r"sampler_post_cfg_function .*cfg_?zero", "", TWICE),
    Patch("RenormCFG", "function", r"renorm_?cfg", OTHER_NETWORK, OTHER_NETWORK),
    Patch("guidance that computes with what the network gave (APG, TCFG, FreSca, Mahiro, RescaleCFG, CFGNorm, EpsilonScaling)", "function",
          "."),
    Patch("CFGOverride", "wrapper", r"predict_noise/.*cfgoverride", STEPS_IN_AND_OUT),
    Patch("EasyCache, LazyCache", "option", r"easycache$", SKIPS),
    Patch("Normalized Attention Guidance, patches of attention and blocks (attn1_patch, attn2_patch, double_block)", "patches", ".",
          IGNORED, IGNORED),
    Patch("replaced attention and blocks (patches_replace)", "replace", ".", IGNORED, IGNORED),
    Patch("scaled positions (ScaleROPE)", "option", r"rope_options$", IGNORED, IGNORED),
    Patch("wrappers around the network (WrappersMP.DIFFUSION_MODEL)", "wrapper", "diffusion_model/", IGNORED),
    Patch("context windows", "model option", r"context_handler$", WINDOWS, WINDOWS),
    Patch("another forward of the network, a block or its attention", "object",
          r"diffusion_model(\.blocks\.\d+)?(\.(self|cross)_attn)?(\.forward(_orig|_block)?)?$|.*\.init_(kv|crossattn)_caches$",
          TAKES_PLACE, TAKES_PLACE),
    Patch("MultiGPU CFG Split", "models", r"multigpu$", ONE_DEVICE, ONE_DEVICE),
    Patch("ControlNet, GLIGEN", "condition", r"(control|gligen)$", IGNORED, IGNORED),
    Patch("image, camera and audio conditions (WanImageToVideo and its like)", "condition",
          r"(concat_latent_image|concat_mask|reference_latents|clip_vision_output|camera_conditions|time_dim_concat|vace_frames|audio_embed)$",
          IGNORED, IGNORED),
    Patch("prompts for an area", "condition", r"area$", WHOLE, "cuts the picture, whose frames are whole in the cache"),
    Patch("prompts for a mask", "condition", r"mask$", WHOLE),
    Patch("prompts for some steps", "condition", r"(start|end)_percent$", STEPS_IN_AND_OUT),
)


def check_patches(guider, family: str) -> None:
    """Raises ValueError where something that another node put on a guider's model or conditions cannot work. family: CAUSAL or LONGCAT."""
    patcher, options = guider.model_patcher, guider.model_options
    check_compiled(options)
    for where, name, thing in _found(patcher, options, guider.conds):
        row = next((row for row in PATCHES if row.where == where and re.match(_start(row), name)), None)
        if row is not None and (why := getattr(row, family)):
            raise ValueError(refusal(name, thing, why, where))
    override = options.get("transformer_options", {}).get(OVERRIDE)
    if override is not None:
        logging.info("QVG: attention over the KV cache is computed by %s%s", home(override) or "a function",
                     "; core's attention to the prompt does not ask for it" if family == CAUSAL else "")


def check_pass(transformer_options: dict) -> None:
    """Raises ValueError where a function that ran since `check_patches` asks for patches that the network would pass over."""
    for name in ("patches_replace", "patches"):
        for kind, thing in transformer_options.get(name, {}).items():
            if thing:
                raise ValueError(refusal(f"{name}/{kind}", next(iter(thing.values() if isinstance(thing, dict) else thing)), IGNORED))


def check_taken(model, names) -> None:
    """Raises ValueError where another node replaced a part of the network (one of `names`) that is about to be replaced."""
    for name in names:
        thing = model.object_patches.get(name)
        if thing is not None:
            raise ValueError(refusal(name, thing, TAKES_PLACE))


def refusal(name: str, thing, why: str, where: str = "") -> str:
    """The sentence that a person reads. name: its first word is shown."""
    what, place = ("condition", "prompt") if where == "condition" else ("patch", "model")
    maker = home(thing)
    return (f"A {what} on this {place} ({name.split()[0]}{f', from {maker}' if maker else ''}) {why}. Remove the node that sets it, or "
            f"connect it to another {place}.")


def home(thing) -> str:
    """Where a function was written, as far as it says: "PerturbedAttentionGuidance of nodes_pag"; "" for plain data."""
    module, name = _address(thing)
    if module.partition(".")[0] in ("builtins", "torch"):
        return ""
    pack = re.search(r"custom_nodes[/\\]([^/\\.]+)", module)
    return f"{name.split('.')[0]} of {pack[1] if pack else module.rpartition('.')[2]}"


def _address(thing) -> tuple[str, str]:
    """The module and the name of a function or of an object's class."""
    while isinstance(thing, partial):
        thing = thing.func
    thing = getattr(thing, "__func__", thing)
    if not hasattr(thing, "__qualname__"):
        thing = type(thing)
    return thing.__module__ or "", thing.__qualname__


def _own(thing) -> bool:
    return _address(thing)[0].startswith(__package__)


def _start(row: Patch) -> str:
    """Names of functions may have anything before what is looked for."""
    return rf"(?i).*({row.pattern})" if row.where == "function" else rf"(?i){row.pattern}"


def _found(patcher, options: dict, conds: dict) -> Iterator[tuple[str, str, object]]:
    """(where, name, what is there) of all that other nodes left. Functions are named by module and class."""
    inner = options.get("transformer_options", {})
    for key, value in options.items():
        if key.startswith("sampler_") or key == "model_function_wrapper":
            for function in value if isinstance(value, list) else [value]:
                if not _own(function):
                    yield "function", f"{key} {'.'.join(_address(function))}", function
        yield "model option", key, value
    for key, value in inner.items():
        yield "option", key, value
    for kind, things in inner.get("patches", {}).items():
        for thing in things:
            yield "patches", kind, thing
    for kind, things in inner.get("patches_replace", {}).items():
        for thing in things.values():
            yield "replace", kind, thing
    for kind, by_key in inner.get("wrappers", {}).items():
        for key, things in by_key.items():
            for thing in things:
                yield "wrapper", f"{kind}/{key} {home(thing)}", thing
    for name, thing in patcher.object_patches.items():
        # a compiled module is the module
        if not _own(thing) and not (isinstance(thing, nn.Module) and bare(thing) is not thing):
            yield "object", name, thing
    for name in patcher.additional_models:
        yield "models", name, None
    for cond in (cond for some in conds.values() for cond in some):
        for key, value in cond.items():
            whole = {"start_percent": 0.0, "end_percent": 1.0}.get(key)
            if value is not None and not (whole is not None and value == whole):
                yield "condition", key, value
