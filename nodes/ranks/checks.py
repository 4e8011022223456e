"""What other nodes can set on a model, a prompt or a guider that only ComfyUI's own process would follow: refused before the first step."""

from __future__ import annotations

import comfy.samplers
from comfy.model_sampling import CONST

from ...qvg.models.wan import WAN
from ..adapters.families import family_of
from ..adapters.patches import OVERRIDE, found, is_own, refusal

HERE_ALONE = "works in ComfyUI's own process, but the other GPUs have processes of their own that do not have it"
# patches that are in the weights, which the other processes get, or that nothing but the sampler reads
FOLLOWED = {"model_sampling"}
# wrappers around all of sampling, in which no network is called
AROUND = ("outer_sample/", "prepare_sampling/", "sampler_sample/")
# parts of a prompt that core applies around the network
OF_A_PROMPT = ("hooks", "mask", "start_percent", "end_percent")
TIMESTEPS = 1000


def check_followed(guider) -> None:
    """Raises ValueError for what the other ranks cannot follow."""
    patcher, options = guider.model_patcher, guider.model_options
    for where, name, thing in found(patcher, options, guider.conds):
        if not is_own(thing) and _here_alone(where, name, thing):
            raise ValueError(refusal(name, thing, HERE_ALONE, where))
    if patcher.injections:
        raise ValueError(refusal(next(iter(patcher.injections)), None, HERE_ALONE))
    if type(guider).predict_noise is not comfy.samplers.CFGGuider.predict_noise:
        raise ValueError(f"{type(guider).__name__} computes guidance in a way of its own, where ranks weigh the prompts themselves. Use "
                         "CFG Guider or Basic Guider.")
    sampling = guider.inner_model.model_sampling
    if not isinstance(sampling, CONST) or getattr(sampling, "multiplier", TIMESTEPS) != TIMESTEPS:
        raise ValueError(f"The model samples in another way than {_kind(guider)}. Remove the node that changes it.")
    _check_prompts(guider)


def _kind(guider) -> str:
    family = family_of(guider.inner_model.diffusion_model)
    return "causal Wan models do" if family is WAN else f"{family.title} does"


def _here_alone(where: str, name: str, thing) -> bool:
    if where == "wrapper":
        return not name.startswith(AROUND)
    if where == "object":
        return name not in FOLLOWED
    if where == "condition":
        return name in OF_A_PROMPT
    if where == "option":
        return name == OVERRIDE or callable(thing)
    return where in ("function", "patches", "replace")


def _check_prompts(guider) -> None:
    more = sorted(set(guider.conds) - {"positive", "negative"})
    if more:
        raise ValueError(f"{type(guider).__name__} also evaluates {', '.join(more)}, but over several GPUs there are a positive and a "
                         "negative prompt. Use CFG Guider or Basic Guider.")
    for name in weights_of(guider):
        if len(guider.conds.get(name, ())) != 1:
            raise ValueError(f"{len(guider.conds.get(name, ()))} conditions are combined in the {name} prompt, but over several GPUs it "
                             "has one. Connect a single prompt.")


def weights_of(guider) -> dict[str, float]:
    """The conditions that guidance evaluates, and the weights of their predictions."""
    return {"positive": 1.0} if guider.cfg == 1 else {"positive": guider.cfg, "negative": 1.0 - guider.cfg}
