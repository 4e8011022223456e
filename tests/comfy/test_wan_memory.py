"""Nothing of a cache outlives its run: finished, interrupted or failed. In the test process itself, where tensors can be counted."""

import gc
from dataclasses import replace

import pytest
import torch

from comfyui_qvg.qvg.demo import METADATA, PROMPTS, TEXT_DIM, embed_prompt
from comfyui_qvg.qvg.models.wan import CausalWan, WanSizes
from comfyui_qvg.qvg.settings import QVGSettings

FRAMES, CHUNK, STEPS = 9, 3, 2


@pytest.fixture(scope="module")
def loaded(comfy_modules):
    """A random causal Wan as ComfyUI's ModelPatcher."""
    import comfy.sd

    draw = torch.Generator().manual_seed(2)
    state = CausalWan(WanSizes(dim=256, ffn_dim=256, layers=2, text_dim=TEXT_DIM)).state_dict()
    state = {name: 0.05 * torch.randn(tensor.shape, generator=draw) for name, tensor in state.items()}
    return comfy.sd.load_diffusion_model_state_dict(state, metadata=METADATA)


@pytest.fixture
def patched(loaded):
    from comfyui_qvg.nodes.adapters.wan import quantize

    return quantize(loaded, QVGSettings.preset("balanced"))


def sample(model, at_call=lambda call: None, frames=FRAMES, sampler=None):
    """Core's autoregressive run, or that of another sampler; `at_call(n)` is called after the n-th noisy step."""
    import comfy.sample
    import comfy.samplers

    calls = []

    def callback(*_):
        calls.append(None)
        at_call(len(calls))

    sigmas = torch.tensor([1.0, 0.8333, 0.0])
    condition = [[embed_prompt(PROMPTS[0]), {}]]
    latent = torch.zeros(1, 16, frames, 8, 12)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
    sampler = sampler or comfy.samplers.ksampler("ar_video", {"num_frame_per_block": CHUNK})
    return comfy.sample.sample_custom(model, noise, 1.0, sampler, sigmas, condition, condition, latent, callback=callback,
                                      disable_pbar=True, seed=0)


def test_off_with_a_window_has_a_window(loaded):
    """Core's own cache knows none, so that another does the work as soon as Off is told to forget or to hold fewer bits."""
    from comfyui_qvg.nodes.adapters.wan import quantize
    from comfyui_qvg.nodes.run_log import ATTACHMENT

    off, found = QVGSettings.preset("off"), []
    for settings in (off, replace(off, window_frames=3), off.both(bits=8)):
        patched = quantize(loaded, settings)
        sample(patched)
        found.append(patched.get_attachment(ATTACHMENT).history[-1])
    assert [stats.held_frames for stats in found] == [9, 3, 9]
    assert list(found[2].by_bits) == [8] and found[2].stored_bytes < 0.6 * found[0].stored_bytes


def held_bytes():
    """Bytes of all uint8 and int16 tensors alive: codes and E4M3 numbers are kept in no other types, and core has none."""
    gc.collect()
    return sum(thing.nbytes for thing in gc.get_objects() if type(thing) is torch.Tensor and thing.dtype in (torch.uint8, torch.int16))


class Stop(Exception):
    pass


def test_a_finished_run_leaves_numbers_only(patched):
    from comfyui_qvg.nodes.run_log import ATTACHMENT

    before, during = held_bytes(), []
    sample(patched, lambda call: during.append(held_bytes()))
    log = patched.get_attachment(ATTACHMENT)
    assert max(during) > before and held_bytes() == before
    assert [stats.frames for stats in log.history] == [3, 6, 9]
    assert log.history[-1].stored_bytes == log.forecast.stored_bytes


@pytest.mark.parametrize("call", [1, STEPS + 1, 3 * STEPS])
@pytest.mark.parametrize("kind", ["interrupt", "error", "out of memory"])
def test_memory_is_back_after_a_run_that_did_not_end(patched, call, kind):
    import comfy.model_management

    errors = {"interrupt": comfy.model_management.InterruptProcessingException, "error": Stop, "out of memory": MemoryError}
    whole, before = sample(patched), held_bytes()

    def stop(now):
        if now == call:
            raise errors[kind]

    with pytest.raises(errors[kind]):
        sample(patched, stop)
    assert held_bytes() == before
    assert torch.equal(sample(patched), whole)


def test_the_model_without_the_node_is_untouched(loaded, patched):
    from comfyui_qvg.nodes.adapters.wan import quantize

    before = sample(loaded)
    quantized = sample(patched)
    assert not torch.equal(before, quantized)
    assert torch.equal(sample(loaded), before)
    assert torch.equal(sample(quantize(patched, QVGSettings.preset("off"))), before)
    assert torch.equal(sample(patched), quantized)


@pytest.fixture
def asked(monkeypatch):
    """(most, least) bytes of free memory that core was asked for by each run."""
    import comfy.model_management

    asked = []
    load = comfy.model_management.load_models_gpu

    def note(models, *args, **kwargs):
        asked.append((kwargs["memory_required"], kwargs["minimum_memory_required"]))
        return load(models, *args, **kwargs)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", note)
    return asked


def test_core_is_asked_for_the_caches_bytes(patched, asked):
    from comfyui_qvg.nodes.run_log import ATTACHMENT

    sample(patched)
    plain = patched.model.memory_required([1, 16, FRAMES, 8, 12])
    needed = patched.get_attachment(ATTACHMENT).forecast.peak_bytes
    ((required, least),) = asked
    assert least >= plain + needed and required >= least


@pytest.mark.parametrize("own", [False, True])
def test_core_is_asked_for_a_chunk_and_not_for_the_whole_video(patched, asked, monkeypatch, own):
    """Where attention keeps no scores, as on most GPUs: frames that are not in a pass cost what cache and latents take of them."""
    import comfy.model_management

    from comfyui_qvg.nodes.long_video import ARSampler, Options
    from comfyui_qvg.nodes.run_log import ATTACHMENT

    monkeypatch.setattr(comfy.model_management, "pytorch_attention_flash_attention", lambda: True)
    sampler = ARSampler(Options(chunk_frames=CHUNK)) if own else None
    estimate, expected = patched.model.memory_required, []
    for frames in (30, 60):
        sample(patched, frames=frames, sampler=sampler)
        cache, latents = patched.get_attachment(ATTACHMENT).forecast.peak_bytes, 4 * 4 * 16 * frames * 8 * 12
        expected.append(estimate([1, 16, 2 * CHUNK, 8, 12]) + cache + latents)
    frame = estimate([1, 16, 1, 8, 12])
    for (most, least), bytes_ in zip(asked, expected):
        assert bytes_ <= least <= bytes_ + frame and most >= least
    assert asked[1][1] < estimate([1, 16, 60, 8, 12]) / 3


def test_frames_given_to_core_are_one_pass(patched, asked, monkeypatch):
    import comfy.model_management

    monkeypatch.setattr(comfy.model_management, "pytorch_attention_flash_attention", lambda: True)
    sample(patched, frames=60)
    given = patched.clone()
    given.model_options["transformer_options"]["ar_config"] = {"initial_latent": torch.zeros(1, 16, 12, 8, 12)}
    sample(given, frames=60)
    (_, without), (_, least) = asked
    assert least - without > 0.9 * patched.model.memory_required([1, 16, 2 * (12 - CHUNK), 8, 12])


def test_positions_do_not_alias_late_in_a_video(patched, loaded):
    """Frame 300 in bf16: core's positions come from a bf16 linspace, where 301 is 300; the cache turns K in float32."""
    network = loaded.model.diffusion_model
    freqs = [network.rope_encode(1, 2, 2, t_start=frame, device="cpu", dtype=torch.bfloat16) for frame in (300, 301)]
    assert torch.equal(*freqs)
    from comfyui_qvg.qvg.attention.rope import Rope

    cos = [Rope(128, (2, 2)).tables(frame, 1, "cpu")[0] for frame in (300, 301)]
    assert not torch.equal(*cos)


def test_live_text_finds_its_monitors(comfy_modules):
    from comfyui_qvg.nodes.where import MONITOR, monitors_of

    prompt = {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "x"}},
        "2": {"class_type": "QVGQuantizeKVCache", "inputs": {"model": ["1", 0]}},
        "7:3": {"class_type": "LoraLoaderModelOnly", "inputs": {"model": ["2", 0], "strength_model": 1.0}},
        "4": {"class_type": MONITOR, "inputs": {"model": ["7:3", 0], "samples": ["9", 0]}},
        "7:5": {"class_type": MONITOR, "inputs": {"model": ["2", 0], "samples": ["9", 0]}},
        "6": {"class_type": MONITOR, "inputs": {"model": ["1", 0], "samples": ["9", 0]}},
    }
    assert monitors_of(prompt, "2") == ["4", "7:5"]
    assert monitors_of(prompt, "8") == []
