"""AR Video Sampler (QVG) and what goes with it, in the real ComfyUI: against core's sampler, and what core's sampler cannot do."""

import io
import json
import re
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from comfy_client import ComfyError, Graph
from comfyui_qvg.qvg.demo import PROMPTS
from random_models import write_random_models

NODES = ("QVGARVideoSampler", "QVGEmptyLongVideoLatent", "QVGPromptSchedule", "QVGPromptAt", "QVGSaveVideoSession", "QVGLoadVideoSession",
         "QVGStreamVideo")


@pytest.fixture(scope="module", autouse=True)
def files(comfy_server):
    write_random_models(comfy_server, "long", 7)


def build(seconds=2.0, own=None, preset="Balanced", cfg=1.0, batch=1, seed=3, prompts=((0, 0),), save=None, load=None, stream=None,
          start=0, split=0, steps=2, settings=None, combined=None, advanced=False):
    """own: inputs of AR Video Sampler (QVG), or None for core's sampler. prompts: (seconds, number). start: images to go on from. combined:
    number of a prompt that is combined with the first. advanced: sample with CFG Guider and SamplerCustomAdvanced."""
    graph = Graph()
    model = graph.add("load", "UNETLoader", unet_name="long.safetensors", weight_dtype="default")
    if preset is not None:
        model = graph.add("quantize", "QVGQuantizeKVCache", model=model,
                          settings=graph.add("settings", "QVGSettings", preset=preset, **settings or {}))
    latent = graph.add("latent", "QVGEmptyLongVideoLatent", seconds=seconds, frame_rate=16, width=96, height=64, batch_size=batch)
    vae = graph.add("vae", "VAELoader", vae_name="long_vae.safetensors")
    positive = graph.add("prompt", "QVGDemoPrompt", text=PROMPTS[0])
    for at, number in prompts[1:]:
        following = graph.add(f"prompt {at}", "QVGDemoPrompt", text=PROMPTS[number])
        positive = graph.add(f"at {at}", "QVGPromptAt", conditioning=positive, next=following, seconds=at, frame_rate=16)
    if combined is not None:
        positive = graph.add("combine", "ConditioningCombine", conditioning_1=positive,
                             conditioning_2=graph.add("other", "QVGDemoPrompt", text=PROMPTS[combined]))
    negative = graph.add("negative", "QVGDemoPrompt", text=PROMPTS[5])
    if own is None:
        sampler = graph.add("sampler", "SamplerARVideo", num_frame_per_block=3)
    else:
        inputs = dict(own)
        if load:
            inputs["session"] = graph.add("session", "QVGLoadVideoSession", name=load)
        if start:
            picture = graph.add("picture", "EmptyImage", width=96, height=64, batch_size=start, color=0xC04020)
            inputs["start"] = graph.add("encode", "VAEEncode", pixels=picture, vae=vae)
        sampler = graph.add("sampler", "QVGARVideoSampler", chunk_frames=3, **inputs)
    if save:
        sampler = graph.add("save session", "QVGSaveVideoSession", sampler=sampler, name=save, every_chunks=1)
    if stream:
        sampler = graph.add("stream", "QVGStreamVideo", sampler=sampler, vae=vae, filename_prefix="long", format=stream, frame_rate=16)
        graph.add("path", "PreviewAny", source=["stream", 1])
    sigmas = graph.add("sigmas", "BasicScheduler", model=model, scheduler="simple", steps=steps, denoise=1.0)

    def sample(name, sigmas, latent, add_noise=True):
        if advanced:
            return graph.add(name, "SamplerCustomAdvanced", noise=graph.add("noise", "RandomNoise", noise_seed=seed), sampler=sampler,
                             guider=graph.add("guider", "CFGGuider", model=model, positive=positive, negative=negative, cfg=cfg),
                             sigmas=sigmas, latent_image=latent)
        return graph.add(name, "SamplerCustom", model=model, add_noise=add_noise, noise_seed=seed, cfg=cfg, positive=positive,
                         negative=negative, sampler=sampler, sigmas=sigmas, latent_image=latent)

    if split:
        graph.add("split", "SplitSigmas", sigmas=sigmas, step=split)
        samples = sample("sample", ["split", 1], sample("first", ["split", 0], latent), add_noise=False)
    else:
        samples = sample("sample", sigmas, latent)
    graph.add("save", "SaveLatent", samples=samples, filename_prefix="long")
    if stream:
        graph.add("decode", "VAEDecode", samples=samples, vae=vae)
        graph.add("images", "SaveImage", images=["decode", 0], filename_prefix="whole")
    return graph


def latents(comfy, graph):
    outputs = comfy.run(graph)
    (item,) = outputs["save"]["latents"]
    return load_file(comfy.output_path(item))["latent_tensor"]


def stream_path(comfy, outputs):
    return comfy.output.__class__(outputs["path"]["text"][0])


@pytest.mark.parametrize("preset", ["Balanced", "Off"])
def test_equals_cores_sampler(comfy, preset):
    """With core's noise and the same settings, bit for bit where both read a quantized cache; core's own cache holds turned keys."""
    core = latents(comfy, build(own=None, preset=preset))
    ours = latents(comfy, build(own={"noise": "As Sampler AR Video"}, preset=preset))
    assert core.shape[2] == 9
    if preset == "Off":
        assert (core - ours).abs().max() < 1e-4
    else:
        assert torch.equal(core, ours)


def test_the_model_is_as_it_was(comfy):
    before = latents(comfy, build(own=None, seed=4))
    latents(comfy, build(own={}, cfg=2.0, seed=4))
    comfy.free()
    assert torch.equal(latents(comfy, build(own=None, seed=4, seconds=2.0, batch=1)), before)


def test_what_cores_sampler_cannot_do(comfy):
    """cfg, a batch with a start, sigmas in two parts: each is made, each makes a difference."""
    plain = latents(comfy, build(own={}))
    assert (latents(comfy, build(own={}, cfg=3.0)) - plain).abs().mean() > 1e-3
    several = latents(comfy, build(own={}, batch=2, start=5))
    assert several.shape[0] == 2 and torch.equal(several[0, :, :2], several[1, :, :2])
    assert (several[0] - several[1]).abs().mean() > 1e-3
    assert latents(comfy, build(own={}, split=1)).isfinite().all()
    assert (latents(comfy, build(own={"first_alone": True, "context_noise": 0.1})) - plain).abs().mean() > 1e-3


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_several_conditions_have_a_cache_each(comfy, cfg):
    """A prompt combined with itself is that prompt alone; combined with another it is neither. Both kinds of sampling node agree."""
    alone = latents(comfy, build(own={}, cfg=cfg))
    assert torch.equal(latents(comfy, build(own={}, cfg=cfg, combined=0)), alone)
    other = latents(comfy, build(own={}, cfg=cfg, combined=4))
    assert (other - alone).abs().mean() > 1e-4
    assert torch.equal(latents(comfy, build(own={}, cfg=cfg, combined=4, advanced=True)), other)


def test_two_parts_of_the_sigmas_make_the_first_chunk_of_one_run(comfy):
    """The first chunk has no history, so both chains of steps are the same up to rounding."""
    noise = {"noise": "As Sampler AR Video"}
    whole, parts = (latents(comfy, build(own=noise, split=split, seconds=0.5, steps=3)) for split in (0, 2))
    assert whole.shape[2] == 3 and (whole - parts).abs().max() < 1e-3


def test_start_latents_are_the_beginning(comfy):
    made = latents(comfy, build(own={}, start=5))
    other = latents(comfy, build(own={}))
    assert made.shape == other.shape
    assert (made[:, :, :2] - other[:, :, :2]).abs().mean() > 0.01


def test_prompts_by_the_clock(comfy):
    """1 s is latent frame 5, so the chunk from frame 6 on is the first under the other prompt."""
    one, two = (latents(comfy, build(own={"recache_frames": 3}, prompts=prompts)) for prompts in (((0, 0),), ((0, 0), (1.0, 4))))
    assert torch.equal(one[:, :, :6], two[:, :, :6])
    assert not torch.equal(one[:, :, 6:], two[:, :, 6:])
    with pytest.raises(ComfyError, match="in order of time"):
        comfy.run(build(own={}, prompts=((0, 0), (2.0, 1), (1.0, 4))))


def test_a_schedule_encodes_each_line_at_its_time(comfy_modules):
    """Through ComfyUI's own CLIP, with a text model of two small layers."""
    import comfy.model_patcher
    import comfy.sd
    from comfy import sd1_clip

    from comfyui_qvg.nodes.adapters.causal import SCHEDULE
    from comfyui_qvg.nodes.prompts import QVGPromptSchedule

    config = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64, "hidden_act": "quick_gelu",
              "max_position_embeddings": 77, "vocab_size": 49408, "eos_token_id": 49407, "projection_dim": 32}
    torch.manual_seed(0)
    clip = comfy.sd.CLIP(no_init=True)
    clip.cond_stage_model = sd1_clip.SD1ClipModel(clip_model=lambda **options: sd1_clip.SDClipModel(
        textmodel_json_config=config, **options))
    for weight in clip.cond_stage_model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    clip.tokenizer, clip.layer_idx, clip.use_clip_schedule, clip.apply_hooks_to_conds = sd1_clip.SD1Tokenizer(), None, False, None
    cpu = torch.device("cpu")
    clip.patcher = comfy.model_patcher.ModelPatcher(clip.cond_stage_model, load_device=cpu, offload_device=cpu)
    clip.tokenizer_options = {}
    ((embedding, extra),) = QVGPromptSchedule.execute(clip, "0s: a calm sea\n6.5s: a storm\n  comes up", 16).result[0]
    expected = [(0, "a calm sea"), (27, "a storm comes up")]
    assert [(at, name) for at, _, name in extra[SCHEDULE]] == expected
    for (_, text), (_, found, _) in zip(expected, extra[SCHEDULE]):
        assert torch.equal(found, clip.encode_from_tokens_scheduled(clip.tokenize(text))[0][0])
    assert torch.equal(embedding, extra[SCHEDULE][0][1]) and not torch.equal(embedding, extra[SCHEDULE][1][1])


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_a_session_goes_on_bit_for_bit(comfy, cfg):
    name = f"walk {cfg}"
    whole = latents(comfy, build(seconds=4.0, own={}, cfg=cfg))
    part = latents(comfy, build(seconds=2.0, own={}, cfg=cfg, save=name))
    assert part.shape[2] == 9 and whole.shape[2] == 17
    made = latents(comfy, build(seconds=4.0, own={}, cfg=cfg, load=name, save=name))
    assert torch.equal(made, whole)
    with pytest.raises(ComfyError, match="Ask for a longer video"):
        comfy.run(build(seconds=2.0, own={}, cfg=cfg, load=name))


def test_an_interrupt_keeps_what_is_made(comfy):
    """The graph goes on with the finished chunks, the session holds them, and the file plays; the resumed run ends like a whole one."""
    whole = latents(comfy, build(seconds=12.0, own={}))
    graph = build(seconds=12.0, own={}, save="broken", stream="MP4 (H.264)")
    prompt = comfy.submit(graph)
    since = len(comfy.messages)
    comfy.wait_for("progress", lambda data: data["node"] == "sample" and data["value"] >= 5, since=since - 1)
    comfy.interrupt()
    outputs = comfy.wait(prompt)
    (item,) = outputs["save"]["latents"]
    part = load_file(comfy.output_path(item))["latent_tensor"]
    frames = part.shape[2]
    assert 3 <= frames < whole.shape[2] and torch.equal(part, whole[:, :, :frames])
    with av.open(str(stream_path(comfy, outputs))) as video:
        assert sum(1 for _ in video.decode(video=0)) == 4 * frames - 3
    made = latents(comfy, build(seconds=12.0, own={}, load="broken"))
    assert torch.equal(made, whole)


def test_progress_counts_every_step_of_every_chunk(comfy):
    graph = build(seconds=2.0, own={}, seed=11)
    latents(comfy, graph)
    progress = [(data["value"], data["max"]) for data in comfy.of_type("progress") if data["node"] == "sample"]
    assert progress[-1] == (6, 6) and [value for value, _ in progress] == sorted(value for value, _ in progress)
    assert any("chunk 3/3" in data["text"] for data in comfy.of_type("qvg.text") if data["node"] == "sampler")


def test_the_preview_is_of_the_chunk_being_made(comfy, comfy_modules):
    """At the end of each chunk but the last it shows that chunk's first frame, through the latent's own colours."""
    from comfy.latent_formats import Wan21

    prompt = comfy.submit(build(seconds=2.0, own={}, seed=13), preview_method="latent2rgb")
    outputs = comfy.wait(prompt)
    made = load_file(comfy.output_path(outputs["save"]["latents"][0]))["latent_tensor"]
    shown = [data["image"] for data in comfy.of_type("preview")][-6:]
    assert len(shown) == 6
    firsts = Wan21().process_in(made)[0, :, ::3].permute(1, 2, 3, 0)
    colours = firsts @ torch.tensor(Wan21.latent_rgb_factors) + torch.tensor(Wan21.latent_rgb_factors_bias)
    expected = ((colours + 1) / 2).clamp(0, 1).mul(255)
    for chunk, preview in enumerate(shown[1:4:2]):
        image = Image.open(io.BytesIO(preview)).convert("RGB").resize((12, 8), Image.Resampling.BOX)
        errors = (torch.from_numpy(np.array(image)).float() - expected).abs().mean((1, 2, 3))
        # enlarged, as JPEG, and reduced again, noise keeps little more than its large shapes
        assert errors.argmin() == chunk and 2 * errors[chunk] < errors.topk(2, largest=False).values[1], errors


def test_streamed_images_equal_a_whole_decode(comfy):
    outputs = comfy.run(build(seconds=1.0, own={}, stream="PNG images", seed=12))
    whole = [np.asarray(Image.open(comfy.output_path(item)).convert("RGB")).astype(int) for item in outputs["images"]["images"]]
    path = stream_path(comfy, outputs)
    streamed = [np.asarray(Image.open(found)).astype(int) for found in sorted(path.parent.glob(f"{path.stem}_*.png"))]
    assert len(streamed) == len(whole) == 17
    # SaveImage cuts to whole numbers where the stream rounds
    assert max(np.abs(one - two).max() for one, two in zip(streamed, whole)) <= 1


def test_a_resumed_stream_holds_the_whole_video(comfy):
    latents(comfy, build(seconds=1.0, own={}, save="streamed"))
    outputs = comfy.run(build(seconds=2.0, own={}, load="streamed", stream="WebM (VP9)"))
    with av.open(str(stream_path(comfy, outputs))) as video:
        assert sum(1 for _ in video.decode(video=0)) == 33


def test_window_and_position_limit(comfy):
    settings = {"window_frames": 3, "sink_frames": 1}
    free, limited = (latents(comfy, build(seconds=6.0, own={"position_limit": limit}, settings=settings)) for limit in (0, 12))
    assert torch.equal(free[:, :, :12], limited[:, :, :12]) and not torch.equal(free[:, :, 12:], limited[:, :, 12:])
    with pytest.raises(ComfyError, match="positions are limited to 12"):
        comfy.run(build(seconds=6.0, own={"position_limit": 12}))


def test_budget_of_what_is_free(comfy):
    assert torch.equal(latents(comfy, build(own={"auto_budget": True})), latents(comfy, build(own={"auto_budget": False})))


@pytest.mark.parametrize("own", [None, {}])
def test_offloaded_spans_make_the_same_video(comfy, own):
    """With core's sampler and with ours; the log counts what the device and what the host hold, as it was forecast."""
    logs, made = [], []
    for offload in (False, True):
        graph = build(seconds=4.0, own=own, settings={"offload": offload, "window_frames": 9})
        graph.add("monitor", "QVGMemoryMonitor", model=["quantize", 0], samples=["sample", 0])
        graph.add("report", "PreviewAny", source=["monitor", 1])
        outputs = comfy.run(graph)
        logs.append(json.loads(outputs["report"]["text"][0]))
        made.append(load_file(comfy.output_path(outputs["save"]["latents"][0]))["latent_tensor"])
    assert torch.equal(*made)
    resident, offloaded = (log["now"] for log in logs)
    assert resident["host_bytes"] == 0 and resident["stored_bytes"] == offloaded["stored_bytes"]
    assert offloaded["host_bytes"] == logs[1]["history"][-1]["host_bytes"] <= logs[1]["forecast"]["host_bytes"]
    assert offloaded["peak_bytes"] == logs[1]["forecast"]["peak_bytes"]


def test_a_session_goes_on_where_the_graph_puts_it(comfy):
    """Saved from the device, gone on with in host memory: what a session holds is the same. With another attention it goes on, too."""
    whole = latents(comfy, build(seconds=4.0, own={}))
    latents(comfy, build(seconds=2.0, own={}, save="moves"))
    assert torch.equal(latents(comfy, build(seconds=4.0, own={}, load="moves", settings={"offload": True})), whole)
    fast = latents(comfy, build(seconds=4.0, own={}, load="moves", settings={"attention": "fast"}))
    made = latents(comfy, build(seconds=2.0, own={})).shape[2]
    assert torch.equal(fast[:, :, :made], whole[:, :, :made]) and not torch.equal(fast, whole)


def test_a_cache_that_cannot_fit_is_refused_before_the_first_step(comfy_modules):
    """Self-Forcing's 480p for a minute in 24 GiB: with the choices that do fit, each of which is then taken."""
    from comfyui_qvg.nodes.memory_check import Memory, check_memory
    from comfyui_qvg.qvg.settings import PRESETS
    from comfyui_qvg.qvg.units import GIB
    from comfyui_qvg.qvg.video.sampler import Run

    shape = {"layers": 30, "heads": 12, "head_dim": 128, "batch": 1, "grid": (30, 52), "dtype": torch.bfloat16}
    run, device, off = Run(frames=240), torch.device("cpu"), PRESETS["off"]

    def check(settings, run=run, free=24, host=64):
        check_memory(settings, shape, run, device, Memory(free * GIB, host * GIB))

    with pytest.raises(ValueError, match=r"needs 6\d\.\d+ GiB, but it can have 24\.0+ GiB") as refused:
        check(off)
    message = str(refused.value)
    assert "the preset Quality or Balanced or Smallest or Tiny or Paper" in message and "; auto_budget in AR Video Sampler (QVG)" in message
    assert "; offload in QVG Settings" not in message
    window, frames = (int(re.search(pattern, message)[1]) for pattern in (r"window_frames of at most (\d+)", r"most (\d+) latent"))
    check(replace(off, window_frames=window))
    check(off, replace(run, frames=frames))
    for beyond in ((replace(off, window_frames=window + 3), run), (off, replace(run, frames=frames + 3))):
        with pytest.raises(ValueError, match="it can have 24"):
            check(*beyond)
    with pytest.raises(ValueError, match="; offload in QVG Settings"):
        check(off, host=128)
    check(replace(off, offload=True), host=128)
    with pytest.raises(ValueError, match=r"needs 6\d\.\d+ GiB of host memory, but it can have 32"):
        check(replace(off, offload=True), host=32)
    with pytest.raises(ValueError, match="Choose a smaller picture"):
        check_memory(off, shape, run, device, Memory(1000, 1000))
    check(PRESETS["balanced"])


@pytest.mark.parametrize(("changes", "words"), [
    ({"own": None, "save": "x"}, "Connect AR Video Sampler"), ({"own": {}, "load": "nowhere"}, "There is no session file"),
    ({"own": {}, "load": "../../up"}, "leads out of"), ({"own": {}, "save": "../up"}, "leads out of")])
def test_refusals(comfy, changes, words):
    with pytest.raises(ComfyError, match=words):
        comfy.run(build(**changes))


def test_latent_of_any_vae(comfy):
    graph = Graph()
    vae = graph.add("vae", "VAELoader", vae_name="long_vae.safetensors")
    graph.add("latent", "QVGEmptyLongVideoLatent", seconds=120.0, frame_rate=16, width=96, height=64, batch_size=1, vae=vae)
    graph.add("save", "SaveLatent", samples=["latent", 0], filename_prefix="long")
    # longer than core's node allows
    assert latents(comfy, graph).shape == (1, 16, 481, 8, 12)


@pytest.mark.parametrize("node", NODES)
def test_every_input_and_output_is_explained(comfy, node):
    info = comfy.object_info(node)[node]
    inputs = info["input"]["required"] | info["input"].get("optional", {})
    assert all(options[1].get("tooltip") for options in inputs.values())
    assert all(info["output_tooltips"]) and info["description"] and info["category"] == "QuantVideoGen"
