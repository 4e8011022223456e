"""Attention over a history through ComfyUI's own: which kernels may attend to it a piece at a time."""

from dataclasses import replace

import pytest
import torch

from comfyui_qvg.qvg.cache import geometry
from comfyui_qvg.qvg.settings import PRESETS
from comfyui_qvg.qvg.video.world import MEMORIES
from in_process import causal_model, longcat_model, sample_causal, sample_longcat, sample_walk, world_model


@pytest.fixture
def adapter(comfy_modules):
    from comfyui_qvg.nodes.adapters import attention

    return attention


@pytest.fixture
def chosen(adapter, monkeypatch):
    """Has core use an attention function of its module."""
    import comfy.ldm.modules.attention as core

    return lambda name: monkeypatch.setattr(adapter, "optimized_attention", getattr(core, name))


def test_torchs_attention_may_attend_in_pieces(adapter, chosen):
    chosen("attention_pytorch")
    attend = adapter.attention_of({})
    q, k, v = torch.randn(3, 1, 12, 2, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    torch.testing.assert_close(attend.partial(q, k, v)[0], attend(q, k, v))


@pytest.mark.parametrize("name", ["attention_sage", "attention_flash", "attention_xformers", "attention_sub_quad", "attention_split"])
def test_other_kernels_attend_to_the_whole(adapter, chosen, name):
    chosen(name)
    assert not hasattr(adapter.attention_of({}), "partial")


def test_an_override_attends_to_the_whole(adapter, chosen):
    chosen("attention_pytorch")
    assert not hasattr(adapter.attention_of({"optimized_attention_override": lambda function, *args, **more: None}), "partial")


# all is kept as it is: as a sink, or, where frames are given, as old frames
EXACT = replace(PRESETS["balanced"].both(bits=16), sink_frames=1000, sink_bits=16)
RUNS = ("core's sampler", "packs sampler", "longcat", "rebuild", "append", "bank")


def sampled(run):
    """The latents, and the log, of a run without guidance."""
    from comfyui_qvg.nodes.adapters import longcat, wan, worldplay
    from comfyui_qvg.nodes.long_video import ARSampler, Options
    from comfyui_qvg.nodes.run_log import ATTACHMENT

    if run in MEMORIES:
        model = worldplay.quantize(world_model("5b"), EXACT)
        made = sample_walk(model, frames=16, memory=run)
    elif run == "longcat":
        model = longcat.quantize(longcat_model(), EXACT)
        made = sample_longcat(model)
    else:
        model = wan.quantize(causal_model(), EXACT)
        made = sample_causal(model, **({"sampler": ARSampler(Options())} if run == "packs sampler" else {}))
    log = model.get_attachment(ATTACHMENT)
    return made, getattr(log, "run", log)


@pytest.mark.parametrize("run", RUNS)
def test_a_run_in_pieces_is_the_run_over_the_whole(adapter, chosen, monkeypatch, run):
    """With a workspace of a few frames, as forecast; with attention that returns no sums, as if there were no limit."""
    counts = []

    def counted(q, k, v):
        counts.append(k.shape[1])
        return exact(q, k, v)

    exact = adapter.pieces.partial
    monkeypatch.setattr(adapter.pieces, "partial", counted)
    chosen("attention_pytorch")
    whole, log = sampled(run)
    used = log.history[-1].workspace_bytes
    assert not counts and log.forecast.workspace_bytes == used
    monkeypatch.setattr(geometry, "WORKSPACE_LIMIT", 2 * used // 3)
    made, log = sampled(run)
    assert counts and log.history[-1].workspace_bytes == log.forecast.workspace_bytes <= 2 * used // 3
    torch.testing.assert_close(made, whole, rtol=0, atol=2e-4)
    counts.clear()
    chosen("attention_sub_quad")
    made, log = sampled(run)
    assert not counts and log.history[-1].workspace_bytes == log.forecast.workspace_bytes == used
