"""What other nodes put on a MODEL that walks, or on its prompts: each works, or is refused before the first step."""

from __future__ import annotations

import importlib

import pytest
import torch

from comfyui_qvg.qvg.demo import TEXT_DIM
from comfyui_qvg.qvg.settings import QVGSettings
from in_process import drawn, sample_walk, world_model


@pytest.fixture(scope="module")
def model(comfy_modules):
    return world_model("5b", "balanced")


def core(module, name, model, *args):
    """The MODEL that a node of comfy_extras gives out."""
    node = getattr(importlib.import_module(f"comfy_extras.nodes_{module}"), name)
    found = node.execute(model, *args) if hasattr(node, "execute") else getattr(node(), node.FUNCTION)(model, *args)
    return getattr(found, "args", found)[0]


def refused(match, model, **more):
    steps = []
    with pytest.raises(ValueError, match=match):
        sample_walk(model, callback=lambda *_: steps.append(None), **more)
    assert not steps


GUIDES = "computes guidance in a way of its own"
REFUSED = {
    "APG": ("apg", GUIDES, 1.0, 5.0, 0.5), "CFGNorm": ("cfg", GUIDES, 1.0, False), "RescaleCFG": ("model_advanced", GUIDES, 0.7),
    "CFGZeroStar": ("cfg", GUIDES), "CFGOverride": ("custom_sampler", GUIDES, 2.0, 0.0, 1.0),
    "EasyCacheNode": ("easycache", "skips passes", 0.2, 0.1, 0.95, False), "ScaleROPE": ("rope", "would do nothing", *(1.0, 0.0) * 3),
    "PerturbedAttentionGuidance": ("pag", "would do nothing", 3.0),
    "ContextWindowsManualNode": ("context_windows", "divides the video", 4, 1, "standard_static", 1, False, "pyramid", 2, False)}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_walk_would_pass_over_is_refused(model, name):
    module, why, *args = REFUSED[name]
    refused(f"{why}.* Remove the node that sets it", core(module, name, model, *args))


def test_a_function_around_the_model_is_refused(model):
    wrapped = model.clone()
    wrapped.set_model_unet_function_wrapper(lambda apply, args: apply(args["input"], args["timestep"], **args["c"]))
    refused(GUIDES, wrapped)


def test_wrappers_of_the_network_are_asked(model):
    calls = []

    def wrapper(executor, x, *args, **kwargs):
        calls.append(x.shape[2])
        return executor(x, *args, **kwargs)

    wrapped = model.clone()
    wrapped.add_wrapper_with_key("diffusion_model", "mine", wrapper)
    assert torch.equal(sample_walk(wrapped), sample_walk(model))
    # two steps of each chunk, and the context of the second and the third
    assert calls == [4, 4, 4, 4, 4, 8, 4, 4]


@pytest.mark.parametrize("memory", ["rebuild", "bank"])
def test_an_attention_override_attends_over_the_cache(model, memory):
    seen = []

    def override(function, *args, **kwargs):
        seen.append((args[0].shape[1], args[1].shape[1]))
        return function(*args, **kwargs)

    plain, wrapped = sample_walk(model, memory=memory), model.clone()
    wrapped.model_options["transformer_options"]["optimized_attention_override"] = override
    torch.testing.assert_close(sample_walk(wrapped, memory=memory), plain)
    assert (24, 72) in seen, "the history is among the keys"


def test_the_shift_of_a_sampling_node_counts(model):
    shifted = core("model_advanced", "ModelSamplingSD3", model, 3.0)
    assert shifted.get_model_object("model_sampling").shift == 3.0
    assert torch.equal(sample_walk(shifted), sample_walk(model)), "the levels are the walk's"


def prompts(**extra):
    return [[[drawn(1, 1, 12, TEXT_DIM), extra]], [[drawn(2, 1, 12, TEXT_DIM), {}]]]


@pytest.mark.parametrize("key", ["area", "mask", "start_percent", "concat_latent_image"])
def test_conditions_that_cannot_be_followed_are_refused(model, key):
    value = {"area": (4, 4, 0, 0), "mask": torch.ones(1, 64, 96), "start_percent": 0.2,
             "concat_latent_image": drawn(1, 1, 48, 3, 4, 6)}[key]
    refused(rf"A condition on this prompt \({key}.*connect it to another prompt", model, conditions=prompts(**{key: value}))


def test_a_lora_by_hooks_is_refused(model):
    import comfy.hooks

    name, hooks = "diffusion_model.blocks.0.self_attn.v.weight", comfy.hooks.HookGroup()
    hook = comfy.hooks.WeightHook(strength_model=0.3)
    hook.weights, hook.need_weight_init = {name: (drawn(3, 256, 256),)}, False
    hooks.add(hook)
    hooked = model.clone()
    hooked.register_all_hook_patches(hooks, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model))
    hooked.model_options["registered_hooks"] = hooks
    refused(r"A condition on this prompt \(hooks.*switched on for one prompt", hooked, conditions=prompts(hooks=hooks))


def test_several_gpus_are_refused(model):
    spread = model.clone()
    spread.set_additional_models("multigpu", [model.clone()])
    refused("multigpu.*the cache is on one", spread)


def test_core_reserves_the_caches_and_the_text(model, monkeypatch):
    """As a number of frames, besides those of the largest pass."""
    import comfy.model_base
    import comfy.sampler_helpers

    from comfyui_qvg.nodes.run_log import ATTACHMENT

    asked, estimate = [], comfy.sampler_helpers.estimate_memory

    def seen(model, shape, conds):
        asked.append(shape[2])
        return estimate(model, shape, conds)

    monkeypatch.setattr(comfy.sampler_helpers, "estimate_memory", seen)
    monkeypatch.setattr(comfy.model_base.BaseModel, "memory_required", lambda *_, **__: 1000)
    for memory, frames in (("append", 4), ("rebuild", 16)):
        asked.clear()
        sample_walk(model, memory=memory)
        # in float32, the text's 12 tokens of 256 channels in each of two layers
        needed = model.get_attachment(ATTACHMENT).run.forecast.peak_bytes + 2 * 2 * 12 * 256 * 4
        assert asked == [frames + -(-needed // 1000)]


def test_budget_and_offload_come_from_the_settings(model):
    from dataclasses import replace

    from comfyui_qvg.nodes.adapters import worldplay
    from comfyui_qvg.nodes.run_log import ATTACHMENT

    balanced = QVGSettings.preset("balanced")
    plain = sample_walk(model, memory="bank")
    offloaded = worldplay.quantize(model, replace(balanced, offload=True))
    assert torch.equal(sample_walk(offloaded, memory="bank"), plain)
    assert offloaded.get_attachment(ATTACHMENT).run.history[-1].host_bytes > 0
    with pytest.raises(ValueError, match="A memory budget of 1e-06 GiB is too small"):
        sample_walk(worldplay.quantize(model, replace(balanced, budget_gib=1e-6)), memory="append")
