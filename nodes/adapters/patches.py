"""Patches that other nodes put on a MODEL or a condition: which work with a cache, and which are refused before the first step.

Core's causal network applies no patches while it makes a video chunk by chunk, and the networks of this pack apply few. Without
these checks such a node would be ignored silently, or fail inside the network with a message about arguments. The table `PATCHES` is
complete; the help page of Quantize KV Cache (QVG) has the same table.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from torch import nn

from .compiled import check_compiled, original

CAUSAL, LONGCAT, WALK = "causal", "longcat", "walk"
OVERRIDE = "optimized_attention_override"

IGNORED = "changes parts of a network that this network lacks or does not let patches change, so it would do nothing"
TAKES_PLACE = "replaces the code that reads the KV cache"
SKIPS = "skips passes by comparing them with the pass before, which may be of another chunk"
STEPS_IN_AND_OUT = "evaluates the negative prompt in some steps only, so that its cache would have gaps"
OTHER_NETWORK = "needs something that only other networks have"
WHOLE = "belongs to the whole video, which is made chunk by chunk"
SECOND = "has no cache of its own for the prompt that it adds"
TWICE = "is built into LongCat-Video, and would be applied twice"
WINDOWS = "divides the video into windows, whose frames are not at the positions in the cache"
GUIDES = "computes guidance in a way of its own, where a walk weighs the predictions of its prompts itself"
SWITCHED = "is switched on for one prompt and off for another, where a walk computes both with the same weights"
ONE_DEVICE = "spreads the model over several GPUs, but the cache is on one"


@dataclass(frozen=True)
class Patch:
    """A kind of patch. name: of the nodes that set it. where, pattern: which of `found` it matches. causal, longcat, walk: why it cannot
    work with these networks, "" if it works. walk is of HY-WorldPlay; by default as for LongCat-Video."""

    name: str
    where: str
    pattern: str
    causal: str = ""
    longcat: str = ""
    walk: str | None = None

    def why_not(self, family: str) -> str:
        """family: CAUSAL, LONGCAT or WALK."""
        return self.longcat if family == WALK and self.walk is None else getattr(self, family)


# the first match counts
PATCHES = (
    Patch("torch.compile of the whole model or of its blocks (TorchCompileModel)", "compile", "."),
    Patch("LoRA", "weights", "."),
    Patch("LoRA by hooks (Create Hook LoRA)", "condition", "hooks$", walk=SWITCHED),
    Patch("ModelSamplingSD3 and other samplings", "object", r"model_sampling$"),
    Patch("attention of another kind (SageAttention, FlashAttention)", "option", OVERRIDE + "$"),
    Patch("Perturbed-Attention Guidance, Self-Attention Guidance", "function", r"nodes_[ps]ag\b|perturbed", IGNORED, IGNORED),
    Patch("Skip Layer Guidance", "function", r"nodes_slg|skip_?layer", IGNORED, IGNORED),
    Patch("Perp-Neg as a patch", "function", r"nodes_perpneg|perp_?neg", SECOND, walk=GUIDES),
    Patch("TeaCache, MagCache, First Block Cache", "function", r"tea_?cache|mag_?cache|first_?block_?cache|fb_?cache", SKIPS, IGNORED),
    Patch("CFGZeroStar", "function", r"sampler_post_cfg_function .*cfg_?zero", "", TWICE, walk=GUIDES),
    Patch("RenormCFG", "function", r"renorm_?cfg", OTHER_NETWORK, OTHER_NETWORK),
    Patch("guidance that computes with what the network gave (APG, TCFG, FreSca, Mahiro, RescaleCFG, CFGNorm, EpsilonScaling)", "function",
          ".", walk=GUIDES),
    Patch("CFGOverride", "wrapper", r"predict_noise/.*cfgoverride", STEPS_IN_AND_OUT, walk=GUIDES),
    Patch("EasyCache, LazyCache", "option", r"easycache$", SKIPS, walk=SKIPS),
    Patch("Normalized Attention Guidance, patches of attention and blocks (attn1_patch, attn2_patch, double_block)", "patches", ".",
          IGNORED, IGNORED),
    Patch("replaced attention and blocks (patches_replace)", "replace", ".", IGNORED, IGNORED),
    Patch("scaled positions (ScaleROPE)", "option", r"rope_options$", IGNORED, IGNORED),
    Patch("wrappers around the network (WrappersMP.DIFFUSION_MODEL)", "wrapper", "diffusion_model/", IGNORED),
    Patch("context windows", "model option", r"context_handler$", WINDOWS, WINDOWS),
    Patch("another forward of the network, a block or its attention", "object",
          r"diffusion_model(\.(double_)?blocks\.\d+)?(\.(self|cross)_attn)?(\.forward(_orig|_block)?)?$|.*\.init_(kv|crossattn)_caches$",
          TAKES_PLACE, TAKES_PLACE),
    Patch("MultiGPU CFG Split", "models", r"multigpu$", ONE_DEVICE, ONE_DEVICE),
    Patch("ControlNet, GLIGEN", "condition", r"(control|gligen)$", IGNORED, IGNORED),
    Patch("image, camera and audio conditions (WanImageToVideo and its like)", "condition",
          r"(concat_latent_image|concat_mask|reference_latents|camera_conditions|time_dim_concat|vace_frames|audio_embed)$",
          IGNORED, IGNORED),
    Patch("an image as CLIP Vision sees it", "condition", "clip_vision_output$", IGNORED, IGNORED, walk=""),
    Patch("prompts for an area", "condition", r"area$", WHOLE, "divides the picture, whose frames are whole in the cache"),
    Patch("prompts for a mask", "condition", r"mask$", WHOLE, walk=WHOLE),
    Patch("prompts for some steps", "condition", r"(start|end)_percent$", STEPS_IN_AND_OUT, walk=STEPS_IN_AND_OUT),
)


def check_patches(guider, family: str) -> None:
    """Raises ValueError for a patch of another node, on the guider's model or conditions, that cannot work. family: CAUSAL, LONGCAT or
    WALK."""
    patcher, options = guider.model_patcher, guider.model_options
    check_compiled(options)
    for where, name, thing in found(patcher, options, guider.conds):
        row = next((row for row in PATCHES if row.where == where and re.match(_start(row), name)), None)
        if row is not None and (why := row.why_not(family)):
            raise ValueError(refusal(name, thing, why, where))
    override = options.get("transformer_options", {}).get(OVERRIDE)
    if override is not None:
        logging.info("QVG: attention over the KV cache is computed by %s%s", home(override) or "a function",
                     "; core's attention to the prompt does not use it" if family == CAUSAL else "")


def check_pass(transformer_options: dict) -> None:
    """Raises ValueError where patches were added after `check_patches` that the network would ignore."""
    for name in ("patches_replace", "patches"):
        for kind, thing in transformer_options.get(name, {}).items():
            if thing:
                raise ValueError(refusal(f"{name}/{kind}", next(iter(thing.values() if isinstance(thing, dict) else thing)), IGNORED))


def check_taken(model, names) -> None:
    """Raises ValueError where another node already replaced one of the parts `names` of the network."""
    for name in names:
        thing = model.object_patches.get(name)
        if thing is not None:
            raise ValueError(refusal(name, thing, TAKES_PLACE))


def refusal(name: str, thing, why: str, where: str = "") -> str:
    """The error sentence. name: its first word is shown."""
    what, place = ("condition", "prompt") if where == "condition" else ("patch", "model")
    maker = home(thing)
    return (f"A {what} on this {place} ({name.split()[0]}{f', from {maker}' if maker else ''}) {why}. Remove the node that sets it, or "
            f"connect it to another {place}.")


def home(thing) -> str:
    """Where a function was defined, such as "PerturbedAttentionGuidance of nodes_pag"; "" for plain data."""
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


def is_own(thing) -> bool:
    """Whether this pack set it."""
    return _address(thing)[0].startswith(__package__)


def _start(row: Patch) -> str:
    """The regular expression of a row; in names of functions it may match anywhere."""
    return rf"(?i).*({row.pattern})" if row.where == "function" else rf"(?i){row.pattern}"


def found(patcher, options: dict, conds: dict) -> Iterator[tuple[str, str, object]]:
    """(where, name, object) of everything that other nodes set. Functions are named by module and class."""
    inner = options.get("transformer_options", {})
    for key, value in options.items():
        if key.startswith("sampler_") or key == "model_function_wrapper":
            for function in value if isinstance(value, list) else [value]:
                if not is_own(function):
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
        if not is_own(thing) and not (isinstance(thing, nn.Module) and original(thing) is not thing):
            yield "object", name, thing
    for name in patcher.additional_models:
        yield "models", name, None
    for cond in (cond for some in conds.values() for cond in some):
        for key, value in cond.items():
            whole = {"start_percent": 0.0, "end_percent": 1.0}.get(key)
            if value is not None and not (whole is not None and value == whole):
                yield "condition", key, value
