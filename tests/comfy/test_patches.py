"""What other nodes put on a model or a prompt: the real nodes of core, and functions as other packs write them. Each works with a quantized
cache, or is refused before the first step with a sentence that names it."""

import importlib
import logging
from dataclasses import replace

import pytest
import torch

from comfy_paths import REPOSITORY
from comfyui_qvg.qvg.demo import TEXT_DIM
from comfyui_qvg.qvg.settings import QVGSettings
from in_process import causal_model, drawn, longcat_model, sample_causal, sample_longcat
from longcat_graphs import SIZES

BALANCED = QVGSettings.preset("balanced")
# all is kept as it is: as a sink, or, where frames are given, as old frames
EXACT = replace(BALANCED, sink_frames=1000, sink_bits=16, key=replace(BALANCED.key, bits=16), value=replace(BALANCED.value, bits=16))
OFF = QVGSettings.preset("off")
FAMILIES = ("causal", "packs sampler", "longcat")


@pytest.fixture(scope="module")
def models(comfy_modules):
    return {"causal": causal_model(), "longcat": longcat_model()}


class Case:
    """One network with one way to sample it."""

    def __init__(self, models, family):
        from comfyui_qvg.nodes.adapters import longcat, wan

        self.family = family
        self.plain = models["longcat" if family == "longcat" else "causal"]
        self.adapter = longcat if family == "longcat" else wan

    def quantized(self, model=None, settings=BALANCED):
        return self.adapter.quantize(model or self.plain, settings)

    def sample(self, model, cfg=None, **more):
        from comfyui_qvg.nodes.long_video import ARSampler, Options

        if self.family == "longcat":
            return sample_longcat(model, **more)
        if self.family == "causal":
            return sample_causal(model, **more)
        return sample_causal(model, cfg=cfg or 3.0, sampler=ARSampler(Options()), **more)

    def refused(self, match, model, **more):
        steps = []
        with pytest.raises(ValueError, match=match):
            self.sample(model, callback=lambda *_: steps.append(None), **more)
        assert not steps
        assert self.sample(self.quantized()).isfinite().all()


@pytest.fixture(params=FAMILIES)
def case(request, models):
    return Case(models, request.param)


def core(module, name, model, *args):
    """The MODEL that a node of comfy_extras gives out."""
    node = getattr(importlib.import_module(f"comfy_extras.nodes_{module}"), name)
    found = node.execute(model, *args) if hasattr(node, "execute") else getattr(node(), node.FUNCTION)(model, *args)
    return getattr(found, "args", found)[0]


WORKS = {
    "APG": ("apg", 1.0, 5.0, 0.5), "TCFG": ("tcfg",), "FreSca": ("fresca", 1.0, 1.25, 2), "Mahiro": ("mahiro",),
    "CFGNorm": ("cfg", 1.0, False), "EpsilonScaling": ("eps", 1.05), "TemporalScoreRescaling": ("eps", 0.95, 1.0),
    "RescaleCFG": ("model_advanced", 0.7), "VideoLinearCFGGuidance": ("video_model", 1.0), "ModelSamplingSD3": ("model_advanced", 3.0),
    "DifferentialDiffusion": ("differential_diffusion",)}


@pytest.mark.parametrize("name", WORKS)
def test_what_computes_with_what_the_network_gave_works(case, name):
    """Over a cache that keeps all, the video is that of the preset Off, which is core's own where core has one."""
    module, *args = WORKS[name]
    ours, own = (case.sample(core(module, name, case.quantized(settings=settings), *args)) for settings in (EXACT, OFF))
    assert (ours - own).abs().max() < 1e-3 * own.abs().max()


@pytest.mark.parametrize("name", ["APG", "TCFG", "Mahiro", "CFGNorm", "EpsilonScaling", "RescaleCFG"])
@pytest.mark.parametrize("family", ["packs sampler", "longcat"])
def test_guidance_changes_the_video_where_there_is_guidance(models, name, family):
    case = Case(models, family)
    module, *args = WORKS[name]
    assert not torch.allclose(case.sample(core(module, name, case.quantized(), *args)), case.sample(case.quantized()), atol=1e-2)


REFUSED = {
    "PerturbedAttentionGuidance": ("pag", FAMILIES, 3.0), "SelfAttentionGuidance": ("sag", FAMILIES, 0.5, 2.0),
    "SkipLayerGuidanceDiT": ("slg", FAMILIES, 3.0, 0.0, 1.0, "0", "0"), "SkipLayerGuidanceDiTSimple": ("slg", FAMILIES, 0.0, 1.0, "0", "0"),
    "NAGuidance": ("nag", FAMILIES, 5.0, 0.5, 1.5), "RenormCFG": ("lumina2", FAMILIES, 100.0, 1.0),
    "TomePatchModel": ("tomesd", FAMILIES, 0.3), "HyperTile": ("hypertile", FAMILIES, 256, 2, 0, False),
    "ScaleROPE": ("rope", FAMILIES, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0), "CFGZeroStar": ("cfg", ("longcat",)),
    "CFGOverride": ("custom_sampler", FAMILIES[:2], 2.0, 0.0, 1.0), "EasyCacheNode": ("easycache", FAMILIES[:2], 0.2, 0.1, 0.95, False),
    "LazyCacheNode": ("easycache", FAMILIES[:2], 0.2, 0.1, 0.95, False),
    "ContextWindowsManualNode": ("context_windows", FAMILIES, 4, 1, "standard_static", 1, False, "pyramid", 2, False)}
# what the sentence calls them, where that is not the name of the node
CALLED = {"ScaleROPE": "rope_options", "EasyCacheNode": "easycache.*EasyCache", "LazyCacheNode": "easycache.*LazyCache",
          "ContextWindowsManualNode": "context_handler"}


@pytest.mark.parametrize("order", ["quantized first", "quantized last"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_the_network_would_pass_over_is_refused(case, name, order):
    module, families, *args = REFUSED[name]
    if case.family not in families:
        pytest.skip("works there, which other tests see")
    first = order == "quantized first"
    model = core(module, name, case.quantized() if first else case.plain, *args)
    if not first:
        model = case.quantized(model)
    case.refused(f"{CALLED.get(name, name)}.* Remove the node that sets it", model)


@pytest.mark.parametrize("name", ["EasyCacheNode", "LazyCacheNode"])
def test_cached_steps_work_where_all_frames_go_through_the_steps_together(models, name):
    case, levels = Case(models, "longcat"), tuple(torch.linspace(1.0, 0.0, 9).tolist())
    passes = []

    def count(executor, *args, **kwargs):
        passes.append(None)
        return executor(*args, **kwargs)

    def sample(model):
        model = model.clone()
        model.add_wrapper_with_key("apply_model", "count", count)
        passes.clear()
        return case.sample(model, sigmas=levels), len(passes)

    (plain, every), (cached, kept) = sample(case.quantized()), sample(core("easycache", name, case.quantized(), 100.0, 0.1, 0.95, False))
    # EasyCache is asked within a pass, LazyCache before it
    assert cached.isfinite().all() and not torch.allclose(cached, plain, atol=1e-2) and (kept < every) == (name == "LazyCacheNode")


def test_guidance_that_calls_the_network_twice_works(case):
    """As packs write it: the second call weighs nothing where it gives what the first one gave."""
    def twice(args):
        (again,) = importlib.import_module("comfy.samplers").calc_cond_batch(
            args["model"], [args["cond"]], args["input"], args["sigma"], args["model_options"])
        return args["denoised"] + 3.0 * (args["cond_denoised"] - again)

    model, plain = case.quantized().clone(), case.sample(case.quantized())
    model.set_model_sampler_post_cfg_function(twice)
    # passes of one condition and of two round differently
    assert (case.sample(model) - plain).abs().max() < 1e-4 * plain.abs().max()


def test_a_second_call_with_other_attention_is_refused(case):
    """As above, but of a pack whose name is not known, which sets its patch when it is called."""
    def weaker(args):
        from comfy.model_patcher import set_model_options_patch_replace
        from comfy.samplers import calc_cond_batch

        options = set_model_options_patch_replace(args["model_options"].copy(), lambda q, k, v, extra: v, "attn1", "middle", 0)
        (other,) = calc_cond_batch(args["model"], [args["cond"]], args["input"], args["sigma"], options)
        return args["denoised"] + other

    model = case.quantized().clone()
    model.set_model_sampler_post_cfg_function(weaker)
    case.refused("patches_replace/attn1, from test_a_second_call.*would do nothing", model)


@pytest.mark.parametrize("name", ["TeaCache.apply.<locals>.unet_wrapper_function", "MagCache.apply", "ApplyFBCacheOnModel.patch"])
def test_caches_of_other_packs_are_refused(case, name):
    def wrapper(apply, args):
        return apply(args["input"], args["timestep"], **args["c"])

    wrapper.__qualname__, wrapper.__module__ = name, "/srv/ComfyUI/custom_nodes/ComfyUI-Fast.nodes"
    model = case.quantized().clone()
    model.set_model_unet_function_wrapper(wrapper)
    case.refused(rf"model_function_wrapper, from {name.split('.')[0]} of ComfyUI-Fast\)", model)


def test_a_wrapper_of_the_model_works(case):
    calls = []

    def wrapper(apply, args):
        calls.append(args["input"].shape)
        return apply(args["input"], args["timestep"], **args["c"])

    model = case.quantized().clone()
    model.set_model_unet_function_wrapper(wrapper)
    assert torch.equal(case.sample(model), case.sample(case.quantized())) and len(calls) >= 3


def test_wrappers_of_the_network(case):
    """LongCat-Video calls them; core's causal network does not."""
    calls = []

    def wrapper(executor, *args, **kwargs):
        calls.append(None)
        return executor(*args, **kwargs)

    model = case.quantized().clone()
    model.add_wrapper_with_key("diffusion_model", "mine", wrapper)
    if case.family == "longcat":
        assert torch.equal(case.sample(model), case.sample(case.quantized())) and len(calls) == 3
    else:
        case.refused("diffusion_model/mine, from test_wrappers_of_the_network", model)


@pytest.mark.parametrize("settings", [BALANCED, OFF], ids=["balanced", "off"])
def test_an_attention_override_attends_over_the_cache(case, settings, caplog):
    """One that leaves all as it is changes nothing; one that does not does; and the log says whose it is."""
    seen = []

    def override(function, *args, **kwargs):
        assert "sample_sigmas" in kwargs["transformer_options"]
        seen.append((args[0].shape[1], args[1].shape[1]))
        return function(*args, **kwargs)

    if settings.codec == "plain" and case.family == "causal":
        pytest.skip("core's own attention and cache")
    plain = case.sample(case.quantized(settings=settings))
    model = case.quantized(settings=settings).clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    with caplog.at_level(logging.INFO):
        torch.testing.assert_close(case.sample(model), plain)
    assert any(keys > queries for queries, keys in seen), "the history is among the keys"
    said = [line for line in caplog.messages if "is computed by" in line and "test_an_attention_override" in line]
    assert len(said) == 1 + (case.family == "packs sampler" and settings is BALANCED)
    assert ("does not use" in said[0]) == (case.family != "longcat")
    model.model_options["transformer_options"]["optimized_attention_override"] = lambda function, *args, **more: 0 * function(*args, **more)
    assert not torch.allclose(case.sample(model), plain, atol=1e-2)


@pytest.mark.parametrize("part", ["forward", "blocks.0.forward", "blocks.1.self_attn.forward", "blocks.0.cross_attn.forward"])
def test_another_forward_is_refused_wherever_it_comes_from(case, part):
    def forward(*args, **kwargs):
        raise AssertionError("a step was made")

    def patched(model):
        model = model.clone()
        model.add_object_patch(f"diffusion_model.{part}", forward)
        return model

    words = f"diffusion_model.{part}, from test_another_forward.*replaces the code that reads the KV cache"
    case.refused(words, patched(case.quantized()))
    if part in ("forward", "blocks.1.self_attn.forward") and case.family != "longcat":
        with pytest.raises(ValueError, match=words):
            case.quantized(patched(case.plain))


def test_a_forward_of_another_layer_works(case):
    calls = []
    linear = case.plain.get_model_object("diffusion_model.blocks.0.ffn." + ("w1" if case.family == "longcat" else "0"))

    def forward(x):
        calls.append(None)
        return type(linear).forward(linear, x)

    model = case.quantized().clone()
    model.add_object_patch("diffusion_model.blocks.0.ffn." + ("w1" if case.family == "longcat" else "0") + ".forward", forward)
    assert torch.equal(case.sample(model), case.sample(case.quantized())) and calls


def prompts(case, **extra):
    shape = (1, 12, SIZES.text_dim) if case.family == "longcat" else (1, 512, TEXT_DIM)
    return [[drawn(1, *shape), extra]], [[drawn(2, *shape), {}]]


@pytest.mark.parametrize("key", ["control", "gligen", "area", "mask", "start_percent", "concat_latent_image", "reference_latents"])
def test_conditions_that_cannot_be_followed_are_refused(case, key):
    from comfy.controlnet import ControlBase

    value = {"area": (4, 4, 0, 0), "mask": torch.ones(1, 64, 96), "start_percent": 0.2, "control": ControlBase(),
             "gligen": ("position", None, []), "concat_latent_image": drawn(1, 1, 16, 9, 8, 12),
             "reference_latents": [drawn(1, 1, 16, 1, 8, 12)]}[key]
    if case.family == "longcat" and key in ("mask", "start_percent"):
        assert case.sample(case.quantized(), conditions=prompts(case, **{key: value})).isfinite().all()
    else:
        case.refused(rf"A condition on this prompt \({key}.*connect it to another prompt", case.quantized(),
                     conditions=prompts(case, **{key: value}))


def test_a_prompt_for_all_steps_works(case):
    """ConditioningSetTimestepRange as it comes."""
    plain = case.sample(case.quantized(), conditions=prompts(case))
    assert torch.equal(case.sample(case.quantized(), conditions=prompts(case, start_percent=0.0, end_percent=1.0)), plain)


def test_lora_by_hooks_works(case):
    """Create Hook LoRA and Set CLIP Hooks put weights on a prompt; a cache that keeps all gives what core's own gives."""
    import comfy.hooks

    name = "diffusion_model.blocks.0.self_attn.v.weight"
    width = case.plain.model_state_dict()[name].shape[0]

    def sample(settings, strength):
        hooks = comfy.hooks.HookGroup()
        hook = comfy.hooks.WeightHook(strength_model=strength)
        hook.weights, hook.need_weight_init = {name: (drawn(3, width, width),)}, False
        hooks.add(hook)
        model = case.quantized(settings=settings)
        model.register_all_hook_patches(hooks, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model))
        model.model_options["registered_hooks"] = hooks
        return case.sample(model, conditions=prompts(case, hooks=hooks))

    ours, own, without = sample(EXACT, 0.3), sample(OFF, 0.3), sample(EXACT, 0.0)
    assert (ours - own).abs().max() < 1e-3 * own.abs().max()
    assert not torch.allclose(ours, without, atol=1e-2)


def test_several_gpus_are_refused(case):
    model = case.quantized().clone()
    model.set_additional_models("multigpu", [case.plain.clone()])
    case.refused("multigpu.*the cache is on one", model)


def test_the_help_page_has_the_table():
    """Every row of the data, in its order, with what is so for each network."""
    from comfyui_qvg.nodes.adapters.patches import CAUSAL, LONGCAT, PATCHES, WALK

    page = (REPOSITORY / "web" / "docs" / "QVGQuantizeKVCache.md").read_text()
    rows = [" | ".join([f"| {row.name}", *("refused" if row.why_not(family) else "works" for family in (CAUSAL, LONGCAT, WALK)), ""])
            for row in PATCHES]
    assert "\n".join(row.rstrip() for row in rows) in page
