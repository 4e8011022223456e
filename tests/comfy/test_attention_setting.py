"""The setting attention through ComfyUI: which attention reads the cache, what a run says about it, and what is refused before it."""

import json
import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from comfyui_qvg.qvg.attention import functions
from comfyui_qvg.qvg.settings import PRESETS, QVGSettings
from in_process import causal_model, longcat_model, sample_causal, sample_longcat, sample_walk, world_model

KINDS = ("causal", "packs sampler", "longcat", "walk")


@pytest.fixture(scope="module")
def models(comfy_modules):
    return {"causal": causal_model(), "longcat": longcat_model(), "walk": world_model("5b")}


@pytest.fixture(params=KINDS)
def sample(request, models):
    """Called with an attention and what sampling takes besides: latents, and what the run said of its attention."""
    from comfyui_qvg.nodes.adapters import longcat, wan, worldplay
    from comfyui_qvg.nodes.long_video import ARSampler, Options
    from comfyui_qvg.nodes.run_log import ATTACHMENT

    kind, model = request.param, models["causal" if request.param == "packs sampler" else request.param]
    adapter = {"longcat": longcat, "walk": worldplay}.get(kind, wan)
    runs = {"causal": lambda model, **more: sample_causal(model, frames=12, **more),
            "packs sampler": lambda model, **more: sample_causal(model, frames=12, cfg=3.0, sampler=ARSampler(Options()), **more),
            "longcat": sample_longcat, "walk": lambda model, **more: sample_walk(model, memory="append", frames=20, **more)}

    def run(attention, override=None, settings=PRESETS["balanced"], **more):
        quantized = adapter.quantize(model, replace(settings, attention=attention)).clone()
        if override:
            quantized.model_options["transformer_options"]["optimized_attention_override"] = override
        return runs[kind](quantized, **more), quantized.get_attachment(ATTACHMENT).history[-1].attention

    return run


def override(function, *args, **kwargs):
    return function(*args, **kwargs)


def test_fast_is_what_is_asked_for(sample, monkeypatch, caplog):
    """It attends in eight bits, and the run's figures and the log say so."""
    pieces = []

    def noted(q, k, v, space, before=functions.eight_bits.history):
        pieces.append(k.shape[1])
        return before(q, k, v, space)

    monkeypatch.setattr(functions.eight_bits, "history", noted)
    exact, said = sample("exact")
    assert said == "exact (as set)" and not pieces
    auto, said = sample("auto")
    assert torch.equal(auto, exact) and said.startswith("exact (") and "not cpu" in said and not pieces
    with caplog.at_level(logging.INFO):
        fast, said = sample("fast")
    assert pieces and said.startswith("fast (as set; in plain torch, which is slow: ")
    assert [line for line in caplog.messages if "attention over the KV cache" in line] == [f"QVG: attention over the KV cache: {said}"]
    # a random network makes much of little
    assert not torch.equal(fast, exact) and (fast - exact).norm() < 0.2 * exact.norm()


def test_nothing_is_rounded_twice(sample):
    """Where another node computes attention, auto is exact and says whose it is, and fast is refused before the first step."""
    plain, _ = sample("auto")
    found, said = sample("auto", override)
    torch.testing.assert_close(found, plain)
    assert said == "exact (override of test_attention_setting computes attention)"
    steps = []
    with pytest.raises(ValueError, match=r"\(fast\), but override of test_attention_setting computes attention here.*to auto or exact"):
        sample("fast", override, callback=lambda *_: steps.append(None))
    assert not steps


@pytest.mark.parametrize(("name", "who"), [
    ("attention_pytorch", ""), ("attention_flash", ""), ("attention_xformers", ""), ("attention_sub_quad", ""),
    ("attention_sage", "SageAttention"), ("attention3_sage", "SageAttention 3"), ("attention_comfy_kitchen_int8", "Comfy Kitchen")])
def test_who_rounds(comfy_modules, monkeypatch, name, who):
    import comfy.ldm.modules.attention as core

    from comfyui_qvg.nodes.adapters import attention

    if not hasattr(core, name):
        pytest.skip("an older ComfyUI")
    monkeypatch.setattr(attention, "optimized_attention", getattr(core, name))
    assert attention.own_attention({}) == who
    fast = replace(PRESETS["balanced"], attention="fast")
    if who:
        with pytest.raises(ValueError, match=f"but {who} computes attention here"):
            attention.reading(fast, {}, 128)
    else:
        attention.reading(fast, {"transformer_options": {}}, 128)


def test_a_session_goes_on_with_the_attention_of_the_graph(comfy_modules):
    from comfyui_qvg.nodes.long_video import ARSampler, Options
    from comfyui_qvg.nodes.memory_check import Memory
    from comfyui_qvg.nodes.run_log import RunLog

    kept = replace(PRESETS["smallest"], attention="exact")
    sampler = ARSampler(Options(session=SimpleNamespace(settings=[kept])))
    log, free = RunLog(replace(PRESETS["balanced"], attention="fast"), None), Memory(0, 0)
    assert sampler._settings(log, 1, free) == replace(kept, attention="fast")
    assert sampler._settings(None, 1, free) == kept
    log.settings = replace(PRESETS["off"])
    assert sampler._settings(log, 1, free) == replace(kept, attention="auto")


def test_the_input_of_qvg_settings(comfy_modules):
    from comfyui_qvg.nodes.kv_cache import QVGSettingsNode

    option = QVGSettingsNode.define_schema().inputs[-1]
    assert (option.id, option.options, option.default) == ("attention", ["auto", "exact", "fast"], "auto")
    assert option.optional and option.advanced
    (found,) = QVGSettingsNode.execute("Smallest", attention="fast").args
    assert found == replace(PRESETS["smallest"], attention="fast") == QVGSettings.from_json(found.to_json())
    with pytest.raises(ValueError, match=r"attention is 'fast'.*hold old frames in 16. Set attention to auto, or choose fewer bits"):
        QVGSettingsNode.execute("Off", attention="fast")


def test_a_stopped_longcat_video_goes_on_with_another_attention(models):
    from comfyui_qvg.nodes.adapters import longcat
    from comfyui_qvg.nodes.longcat import run_key

    prompt = [[torch.zeros(1, 2, 4), {}]]
    keys = [run_key(longcat.quantize(models["longcat"], settings), prompt, prompt, None, [1]) for settings in (
        PRESETS["balanced"], replace(PRESETS["balanced"], attention="fast"), PRESETS["smallest"])]
    assert keys[0] == keys[1] != keys[2]


def test_the_monitor_says_it(models, comfy_modules):
    """In the report, on the picture and on the page; of core's own cache, too."""
    from comfyui_qvg.nodes.adapters import wan
    from comfyui_qvg.nodes.run_log import ATTACHMENT

    tiny = replace(PRESETS["tiny"], attention="exact")
    for settings, said in ((tiny, "exact (as set)"), (PRESETS["off"], "exact (ComfyUI's own cache)")):
        model = wan.quantize(models["causal"], settings)
        sample_causal(model)
        run = model.get_attachment(ATTACHMENT).run
        assert json.loads(json.dumps(run.report()))["now"]["attention"] == run.page()["now"]["attention"] == said
        assert "; attention exact; " in run.notes()
