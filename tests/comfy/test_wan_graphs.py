"""The graphs that people build around the node: start image, LoRA, chunk sizes, interrupts, errors and what comes after them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from comfy_client import ComfyError, Graph
from comfyui_qvg.qvg.demo import PROMPTS
from random_models import write_random_models


@pytest.fixture(scope="module", autouse=True)
def files(comfy_server):
    draw = write_random_models(comfy_server, "graphs", 6)
    lora = {}
    for part in ("q", "k", "v"):
        for side, shape in (("down", (4, 256)), ("up", (256, 4))):
            name = f"diffusion_model.blocks.0.self_attn.{part}.lora_{side}.weight"
            lora[name] = 0.3 * torch.randn(shape, generator=draw)
    save_file(lora, comfy_server.folder("models", "loras") / "graphs_lora.safetensors")


def build(seed=1, frames=9, block=3, preset="Balanced", dtype="default", image=False, batch=1, lora=None, steps=4, order="quantize first",
          advanced=False, size=(96, 64)):
    graph = Graph()
    width, height, length = *size, 4 * frames - 3
    model = graph.add("load", "UNETLoader", unet_name="graphs.safetensors", weight_dtype=dtype)
    latent = graph.add("latent", "EmptyARVideoLatent", width=width, height=height, length=length, batch_size=batch)

    def quantize(model):
        if preset is None:
            return model
        return graph.add("quantize", "QVGQuantizeKVCache", model=model, settings=graph.add("settings", "QVGSettings", preset=preset))

    def others(model):
        nonlocal latent
        if lora is not None:
            model = graph.add("lora", "LoraLoaderModelOnly", model=model, lora_name="graphs_lora.safetensors", strength_model=lora)
        if image:
            picture = graph.add("picture", "EmptyImage", width=width, height=height, batch_size=1, color=0xC04020)
            vae = graph.add("vae", "VAELoader", vae_name="graphs_vae.safetensors")
            model = graph.add("image", "ARVideoI2V", model=model, vae=vae, start_image=picture, width=width, height=height,
                              length=length, batch_size=batch)
            latent = ["image", 1]
        return model

    model = others(quantize(model)) if order == "quantize first" else quantize(others(model))
    prompt = graph.add("prompt", "QVGDemoPrompt", text=PROMPTS[0])
    sampler = graph.add("sampler", "SamplerARVideo", num_frame_per_block=block)
    sigmas = graph.add("sigmas", "BasicScheduler", model=model, scheduler="simple", steps=steps, denoise=1.0)
    if advanced:
        guider = graph.add("guider", "CFGGuider", model=model, positive=prompt, negative=prompt, cfg=1.0)
        noise = graph.add("noise", "RandomNoise", noise_seed=seed)
        samples = graph.add("sample", "SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas,
                            latent_image=latent)
    else:
        samples = graph.add("sample", "SamplerCustom", model=model, add_noise=True, noise_seed=seed, cfg=1.0, positive=prompt,
                            negative=prompt, sampler=sampler, sigmas=sigmas, latent_image=latent)
    graph.add("save", "SaveLatent", samples=samples, filename_prefix="graphs")
    if preset is not None:
        graph.add("monitor", "QVGMemoryMonitor", model=["quantize", 0], samples=samples)
        graph.add("report", "PreviewAny", source=["monitor", 1])
    return graph


def run(comfy, graph):
    """(latent, the monitor's report or None)"""
    outputs = comfy.run(graph)
    latent = load_file(comfy.output_path(outputs["save"]["latents"][0]))["latent_tensor"]
    return latent, json.loads(outputs["report"]["text"][0]) if "report" in outputs else None


def exact(graph):
    """The same graph with everything held as a sink at 16 bits."""
    graph["settings"]["inputs"] |= {"sink_frames": 1000, "sink_bits": "16"}
    return graph


@pytest.mark.parametrize("order", ["quantize first", "quantize last"])
@pytest.mark.parametrize("extra", [{"lora": 1.0}, {"image": True}, {"image": True, "block": 1}])
def test_lora_and_start_image_on_either_side(comfy, extra, order):
    core, _ = run(comfy, build(preset=None, **extra))
    ours, _ = run(comfy, exact(build(order=order, **extra)))
    assert (ours - core).abs().max() < 1e-3 * core.abs().max()
    plain, _ = run(comfy, build(preset=None))
    assert not torch.allclose(ours, plain, atol=1e-2)


def test_both_custom_samplers_agree(comfy):
    assert torch.equal(run(comfy, build())[0], run(comfy, build(advanced=True))[0])


@pytest.mark.parametrize(("block", "frames", "ends"), [
    (1, 4, [1, 2, 3, 4]), (2, 5, [2, 4, 5]), (3, 7, [3, 6, 7]), (3, 2, [2]), (4, 4, [4])])
def test_chunks_are_stored_once_each(comfy, block, frames, ends):
    latent, report = run(comfy, build(block=block, frames=frames))
    assert latent.isfinite().all() and latent.shape[2] == frames
    assert [point["frames"] for point in report["history"]] == ends


def test_start_image_is_a_chunk_of_its_own(comfy):
    _, report = run(comfy, build(image=True, frames=7))
    assert [point["frames"] for point in report["history"]] == [1, 4, 7]
    assert report["forecast"]["stored_bytes"] == report["now"]["stored_bytes"]
    assert report["forecast"]["peak_bytes"] == report["now"]["peak_bytes"]


def test_start_image_with_fp8_weights(comfy):
    assert run(comfy, build(image=True, dtype="fp8_e4m3fn"))[0].isfinite().all()


@pytest.mark.parametrize("image", [False, True])
def test_off_with_fp8_weights(comfy, image):
    """Core makes its cache in the type of the weights, which cannot hold what attention computes; Off makes it in the type of computing."""
    with pytest.raises(ComfyError):
        run(comfy, build(preset=None, image=image, dtype="fp8_e4m3fn"))
    off, report = run(comfy, build(preset="Off", image=image, dtype="fp8_e4m3fn"))
    assert off.isfinite().all() and report["now"]["by_kind"]["plain"] == report["now"]["stored_bytes"] > 0
    ours, _ = run(comfy, exact(build(image=image, dtype="fp8_e4m3fn")))
    assert (ours - off).abs().max() < 1e-3 * off.abs().max()


@pytest.mark.parametrize("extra", [{"advanced": True}, {"image": True}, {"lora": 1.0}, {"block": 2, "frames": 5}])
def test_off_is_bit_identical(comfy, extra):
    assert torch.equal(run(comfy, build(preset=None, **extra))[0], run(comfy, build(preset="Off", **extra))[0])


PLANES = {"codec": "qvg", "key_bits": "2", "value_bits": "2", "stages": 2, "centroids": 128, "group_size": "128"}


@pytest.mark.parametrize(("settings", "held"), [
    ({"budget_gib": 0.0012} | PLANES, 24), ({"budget_gib": 0.0006} | PLANES, None), ({"preset": "Paper", "budget_gib": 0.0006}, None),
    ({"window_frames": 6} | PLANES, 9), ({"budget_gib": 0.0009}, None), ({"window_frames": 6}, 9),
    ({"preset": "Quality", "sink_frames": 0, "window_frames": 6, "budget_gib": 0.01}, 6)])
def test_budget_and_window_hold(comfy, settings, held):
    """held: latent frames still in the cache at the end, None where the budget decides and some must have left."""
    graph = build(frames=24)
    graph["settings"]["inputs"] |= settings
    latent, report = run(comfy, graph)
    now, forecast = report["now"], report["forecast"]
    assert latent.isfinite().all()
    assert 0 < now["held_frames"] < 24 if held is None else now["held_frames"] == held
    if "codec" in settings or settings.get("preset") == "Paper":
        # the forecast is exact where codebooks serve as long as they may; a basis that fits poorly is renewed at another chunk
        assert [now[name] for name in ("stored_bytes", "peak_bytes", "held_frames")] == [
            forecast[name] for name in ("stored_bytes", "peak_bytes", "held_frames")]
    if "budget_gib" in settings:
        assert now["peak_bytes"] <= settings["budget_gib"] * 2**30


def test_batch_of_two(comfy):
    core, _ = run(comfy, build(preset=None, batch=2))
    ours, _ = run(comfy, exact(build(batch=2)))
    assert (ours - core).abs().max() < 1e-3 * core.abs().max()


def test_the_last_of_two_nodes_counts(comfy):
    graph = build()
    once, report = run(comfy, build(preset="Smallest"))
    graph.add("again", "QVGQuantizeKVCache", model=["quantize", 0], settings=graph.add("small", "QVGSettings", preset="Smallest"))
    for node in ("sigmas", "sample", "monitor"):
        graph[node]["inputs"]["model"] = ["again", 0]
    twice, second = run(comfy, graph)
    assert torch.equal(once, twice) and second["now"] == report["now"]
    graph["small"]["inputs"]["preset"] = "Off"
    assert torch.equal(run(comfy, graph)[0], run(comfy, build(preset=None))[0])


def test_interrupt_in_the_middle_then_again(comfy):
    """The next run gives what it gave before, from an empty cache."""
    before, report = run(comfy, build(seed=11, frames=12))
    comfy.messages.clear()
    prompt = comfy.submit(build(seed=12, frames=60, block=1))
    comfy.wait_for("qvg.text", lambda data: " of 60 latent" in data["text"] and not data["text"].startswith("KV cache, Balanced, 0 "))
    comfy.interrupt()
    with pytest.raises(ComfyError) as ended:
        comfy.wait(prompt)
    assert ended.value.interrupted
    graph = build(seed=11, frames=12)
    graph["save"]["inputs"]["filename_prefix"] = "again"
    graph["prompt"]["inputs"]["text"] = PROMPTS[1]
    run(comfy, graph)
    graph["prompt"]["inputs"]["text"] = PROMPTS[0]
    after, second = run(comfy, graph)
    assert torch.equal(before, after) and second["now"] == report["now"]


def wrong(**changes):
    graph = build(frames=6)
    for node, inputs in changes.items():
        graph[node]["inputs"] |= inputs
    return graph


def two_prompts():
    graph = wrong(sample={"positive": ["both", 0]})
    graph.add("both", "ConditioningCombine", conditioning_1=["prompt", 0], conditioning_2=["prompt", 0])
    return graph


def whole_video_sampler():
    graph = wrong(sample={"sampler": ["euler", 0]})
    graph.add("euler", "KSamplerSelect", sampler_name="euler")
    return graph


def other_size():
    graph = build(image=True)
    graph["sample"]["inputs"]["latent_image"] = ["latent", 0]
    graph["latent"]["inputs"]["width"] = 128
    return graph


WRONG = {
    "cfg": (lambda: wrong(sample={"cfg": 4.0}), "cfg is 4.*Set cfg to 1"),
    "cfg with Off": (lambda: wrong(sample={"cfg": 4.0}, settings={"preset": "Off"}), "cfg is 4.*Set cfg to 1"),
    "start image of another size": (other_size, "start image is 96 x 64 pixels, but the latent is for 128 x 64"),
    "two prompts": (two_prompts, "2 conditions are combined"),
    "other sampler": (whole_video_sampler, "sampler euler makes the whole video at once.*Sampler AR Video"),
    "small budget": (lambda: wrong(settings={"budget_gib": 1e-5}), "memory budget of 1e-05 GiB is too small"),
    "batch with a start image": (lambda: build(image=True, batch=2), "start image is one. Set batch_size"),
    "three bits of paper mode": (lambda: wrong(settings={"preset": "Paper", "key_bits": "3"}), "paper codec stores 2 or 4 bits, not 3"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_has_a_sentence_and_leaves_no_harm(comfy, name):
    make, sentence = WRONG[name]
    with pytest.raises(ComfyError, match=sentence):
        comfy.run(make())
    assert not comfy.of_type("progress"), "refused before the first step"
    assert run(comfy, build(frames=3))[0].isfinite().all()
