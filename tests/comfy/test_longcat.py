"""LongCat-Video in the real ComfyUI: a tiny random checkpoint in the official layout through core's samplers and the pack's node."""

import av
import pytest
import torch
from safetensors.torch import load_file

from comfy_client import ComfyError
from comfy_paths import find_comfyui
from comfyui_qvg.qvg.settings import CODECS, PRESETS
from longcat_graphs import HEIGHT, PROMPTS, WIDTH, build, run, write_files
from template_graphs import TEMPLATES


@pytest.fixture(scope="module", autouse=True)
def files(comfy_server):
    write_files(comfy_server)


def test_text_to_video(comfy):
    latents, frames, _ = run(comfy, build(preset=None))
    assert (latents.shape, frames) == ((1, 16, 5, HEIGHT // 8, WIDTH // 8), 17)
    assert latents.std() > 0.1
    assert [data["value"] for data in comfy.of_type("progress") if data["node"] == "continue"][-1] == 2


def test_text_alone_holds_no_cache_and_the_monitor_says_so(comfy):
    report = run(comfy, build())[2]
    assert report["now"]["stored_bytes"] == report["now"]["peak_bytes"] == report["latent_frames"] == 0


@pytest.mark.parametrize("file", ["longcat_split.safetensors", "longcat-00002-of-00002.safetensors"])
def test_every_packaging_gives_the_same(comfy, file):
    assert torch.equal(run(comfy, build(file, preset=None))[0], run(comfy, build(preset=None))[0])


@pytest.mark.parametrize("carry", ["pixels", "latents"])
def test_long_video_from_text(comfy, carry):
    latents, frames, report = run(comfy, build(segments=3, carry=carry))
    # 17 frames, then twice the 8 that follow 9 given ones; 5 latent frames, then twice 2
    assert (latents.shape[2], frames) == (9, 33)
    assert report["now"]["frames"] == 3
    for name in ("stored_bytes", "peak_bytes", "bf16_bytes"):
        assert report["now"][name] == report["forecast"][name]
    # settings say what old frames keep; all three given frames are the newest, which hold more
    assert report["now"]["by_kind"]["plain"] == 0 and list(report["now"]["by_bits"]) == bits_of_given()[1:]


def bits_of_given():
    """Of old given frames, and of the newest, which hold about one bit more."""
    balanced = PRESETS["balanced"]
    bits = balanced.key.bits
    return [str(bits), str(min(width for width in CODECS[balanced.codec].widths if width >= bits + 1))]


def test_the_newest_given_frames_hold_more_bits(comfy):
    """Five given latent frames of seven: two at the bits of old frames, three at one more, as the forecast says."""
    report = run(comfy, build(start=17, length=25, given_frames=17))[2]
    assert list(report["now"]["by_bits"]) == bits_of_given() and report["now"]["stored_bytes"] == report["forecast"]["stored_bytes"]
    graph = build(start=17, length=25, given_frames=17)
    graph["settings"]["inputs"]["recent_frames"] = 0
    plain = run(comfy, graph)[2]
    assert list(plain["now"]["by_bits"]) == bits_of_given()[:1] and plain["now"]["stored_bytes"] < report["now"]["stored_bytes"]


def test_previews_show_every_step(start_comfy):
    server = start_comfy("--preview-method", "latent2rgb")
    write_files(server)
    run(server.client, build(segments=2, steps=3, save="previewed"))
    pictures = [data for data in server.client.of_type("preview") if data.get("node_id") == "continue"]
    assert len(pictures) >= 2 and all(len(data["image"]) > 100 for data in pictures)


@pytest.mark.parametrize(("start", "frames", "given"), [(1, 17, 1), (12, 20, 3), (40, 48, 3)])
def test_image_and_video_are_continued(comfy, start, frames, given):
    latents, count, report = run(comfy, build(start=start))
    assert (count, report["now"]["frames"], latents.shape[2]) == (frames, given, 5)


def test_bits_decide_how_near_the_unquantized_run_is(comfy):
    second = {"segments": 2, "carry": "latents"}
    exact = run(comfy, build(preset=None, **second))[0]
    errors = []
    for bits in ("16", "8", "4", "2", "1"):
        graph = build(**second)
        graph["settings"]["inputs"] |= {"key_bits": bits, "value_bits": bits}
        errors.append(float((run(comfy, graph)[0] - exact).square().mean()))
    assert errors == sorted(errors) and errors[0] == 0 and errors[1] > 0
    assert torch.equal(run(comfy, build(preset="Off", **second))[0], exact)


def test_a_memory_budget_narrows_and_then_refuses(comfy):
    wide = run(comfy, build(start=9, preset="Quality"))[2]["now"]["peak_bytes"]
    graph = build(start=9, preset="Quality")
    graph["settings"]["inputs"]["budget_gib"] = (wide - 1000) / 2**30
    assert run(comfy, graph)[2]["now"]["peak_bytes"] <= wide - 1000
    graph["settings"]["inputs"]["budget_gib"] = 1e-6
    with pytest.raises(ComfyError, match="memory budget of 1e-06 GiB is too small: 3 given latent frames"):
        comfy.run(graph)


def test_conditions_apart_and_together_agree(comfy):
    """A prompt said five times over weighs its words as before, but is too long to go through the network beside the other one."""
    graph = build(start=9)
    together = run(comfy, graph)[0]
    said = graph["continue"]["inputs"]["negative"]
    for number in range(4):
        said = graph.add(f"again{number}", "ConditioningConcat", conditioning_to=said, conditioning_from=["negative", 0])
    graph["continue"]["inputs"]["negative"] = said
    apart = run(comfy, graph)[0]
    torch.testing.assert_close(apart, together, rtol=0, atol=1e-4)
    assert not torch.equal(apart, together)


def test_published_loras_work_like_named_ones(comfy):
    plain, published, named = (run(comfy, build(start=9, preset=None, lora=lora))[0] for lora in (None, "published", "named"))
    torch.testing.assert_close(published, named)
    assert (published - plain).abs().mean() > 0.01


def test_fp8_weights(comfy):
    exact, rounded = (run(comfy, build(start=9, dtype=dtype))[0] for dtype in ("default", "fp8_e4m3fn"))
    assert 0 < (rounded - exact).abs().mean() < 0.5 * exact.abs().mean()


def test_distilled_and_tail(comfy):
    latents = run(comfy, build(start=9, schedule="distilled", cfg=1.0))[0]
    assert not torch.equal(latents, run(comfy, build(start=9, schedule="base", cfg=1.0))[0])
    comfy.messages.clear()
    run(comfy, build(start=9, steps=4, fine_tail=True))
    # three of the four levels are above one half; ten steps follow
    assert [data["max"] for data in comfy.of_type("progress") if data["node"] == "continue"][-1] == 13


def test_core_sampler_makes_text_to_video(comfy):
    graph = build(preset=None)
    for node in ("continue", "save", "size", "count", "vae"):
        del graph[node]
    latent = graph.add("latent", "EmptyHunyuanLatentVideo", width=WIDTH, height=HEIGHT, length=17, batch_size=1)
    samples = graph.add("sample", "KSampler", model=["load", 0], positive=["positive", 0], negative=["negative", 0], latent_image=latent,
                        seed=3, steps=2, cfg=4.0, sampler_name="euler", scheduler="simple", denoise=1.0)
    graph.add("save", "SaveLatent", samples=samples, filename_prefix="longcat")
    latents = load_file(comfy.output_path(comfy.run(graph)["save"]["latents"][0]))["latent_tensor"]
    assert latents.isfinite().all() and latents.shape[2] == 5


def test_interrupt_then_again(comfy):
    before = run(comfy, build(start=9))[0]
    comfy.messages.clear()
    prompt = comfy.submit(build(start=9, segments=200, steps=20))
    comfy.wait_for("progress", lambda data: data["node"] == "continue" and data["value"] > 3)
    comfy.interrupt()
    with pytest.raises(ComfyError) as ended:
        comfy.wait(prompt)
    assert ended.value.interrupted
    graph = build(start=9)
    graph["save"]["inputs"]["filename_prefix"] = "again"
    assert torch.equal(run(comfy, graph)[0], before)


def video_frames(path):
    with av.open(str(path)) as file:
        return [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]


def streamed(comfy, graph):
    """The video that the node says it wrote, and how many frames came out of it."""
    outputs = comfy.run(graph)
    path = comfy.output_path(outputs["continue"]["images"][0])
    return path, int(outputs["count"]["text"][0])


def test_a_stopped_stream_goes_on_where_it_was(comfy):
    """The same video, to the last frame, as a run that was never stopped; and only the last segment is held in memory."""
    whole, count = streamed(comfy, build(segments=6, steps=6, stream_to="video/whole"))
    frames = video_frames(whole)
    assert (len(frames), count) == (17 + 5 * 8, 8)
    assert not whole.with_suffix(".safetensors").exists()

    comfy.messages.clear()
    graph = build(segments=6, steps=6, stream_to="video/stopped")
    prompt = comfy.submit(graph)
    comfy.wait_for("progress", lambda data: data["node"] == "continue" and data["value"] > 14)
    comfy.interrupt()
    with pytest.raises(ComfyError) as ended:
        comfy.wait(prompt)
    assert ended.value.interrupted
    (stopped,) = (comfy.output / "video").glob("stopped_*_.mp4")
    so_far = len(video_frames(stopped))
    assert 17 <= so_far < len(frames) and (so_far - 17) % 8 == 0

    comfy.messages.clear()
    path, _ = streamed(comfy, graph)
    assert path == stopped and not path.with_suffix(".safetensors").exists()
    assert comfy.of_type("progress")[0]["value"] > 6, "progress begins where the run was stopped"
    gone_on = video_frames(path)
    assert len(gone_on) == len(frames) and all((a == b).all() for a, b in zip(gone_on, frames))


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name.startswith("LongCat")])
def test_templates_run_with_small_files_in_place_of_theirs(comfy, name):
    """The text encoder alone is replaced by a node, because core opens no small one."""
    graph = {key: {"class_type": node["class_type"], "inputs": dict(node["inputs"])} for key, node in TEMPLATES[name].graph.items()}
    del graph["clip"]
    segments = min(2, graph["continue"]["inputs"]["segments"])
    small = {"QVGLoadARVideoModel": {"model_name": "longcat.safetensors"}, "VAELoader": {"vae_name": "longcat_vae.safetensors"},
             "LoraLoaderModelOnly": {"lora_name": "longcat_published.safetensors"},
             "QVGLongCatContinue": {"width": WIDTH, "height": HEIGHT, "steps": 1, "segments": segments}}
    for node in graph.values():
        node["inputs"] = {key: value for key, value in node["inputs"].items() if key != "control_after_generate"}
        node["inputs"] |= small.get(node["class_type"], {})
        if node["class_type"] == "CLIPTextEncode":
            node |= {"class_type": "QVGDemoPrompt", "inputs": {"text": PROMPTS[0]}}
    (comfy.output.parent / "input" / "example.png").write_bytes((find_comfyui() / "input" / "example.png").read_bytes())
    outputs = comfy.run(graph)
    assert outputs["save"]["images"][0]["filename"].endswith(".mp4")


WRONG = {
    "nothing new": ({"given_frames": 17}, "17 frames that continue 17 frames contain no new frame"),
    "latents into a file": ({"stream_to": "video/x", "carry": "latents"}, "Set carry to pixels, or leave stream_to empty"),
    "too many steps": ({"schedule": "distilled", "steps": 60}, "steps is 60; choose 1 to 50"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_has_a_sentence(comfy, name):
    settings, sentence = WRONG[name]
    with pytest.raises(ComfyError, match=sentence):
        comfy.run(build(**settings))
