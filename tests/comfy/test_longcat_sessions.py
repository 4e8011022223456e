"""Sessions of LongCat-Video in the real ComfyUI: a run that was stopped anywhere ends, bit for bit, like one that never was."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from comfy_client import ComfyError
from longcat_graphs import build, run, write_files
from random_models import write_random_models


@pytest.fixture(scope="module", autouse=True)
def files(comfy_server):
    write_files(comfy_server)


def graph_of(**settings):
    """A graph that also saves its frames. `build`'s settings; steps as many as an interrupt needs to fall into the middle."""
    graph = build(**{"steps": 4, "segments": 4} | settings)
    graph.add("frames", "SaveImage", images=["continue", 0], filename_prefix="frames")
    return graph


def made(comfy, **settings):
    """(latents, frames as one array)"""
    return collected(comfy, comfy.run(graph_of(**settings)))


def collected(comfy, outputs):
    frames = [np.asarray(Image.open(comfy.output_path(item)).convert("RGB")) for item in outputs["frames"]["images"]]
    return load_file(comfy.output_path(outputs["save"]["latents"][0]))["latent_tensor"], np.stack(frames)


def equal(one, two):
    return torch.equal(one[0], two[0]) and np.array_equal(one[1], two[1])


def interrupted(comfy, graph, steps):
    """Stop a run after so many steps of all of its segments."""
    comfy.messages.clear()
    prompt = comfy.submit(graph)
    comfy.wait_for("progress", lambda data: data["node"] == "continue" and data["value"] >= steps)
    comfy.interrupt()
    with pytest.raises(ComfyError) as ended:
        comfy.wait(prompt)
    assert ended.value.interrupted
    comfy.messages.clear()


@pytest.mark.parametrize("settings", [{}, {"carry": "latents"}, {"start": 12}, {"start": 1, "carry": "latents", "cfg": 1.0}],
                         ids=["text", "text, latents", "video", "image, latents"])
def test_a_shorter_run_is_made_longer(comfy, settings):
    """Each saved run continues the one before, and ends like the whole."""
    whole = made(comfy, **settings)
    name = " ".join(["grown", *map(str, settings.values())])
    for segments, load in ((1, None), (3, name)):
        part = made(comfy, segments=segments, save=name, load=load, **settings)
        assert equal(part, (whole[0][:, :, :part[0].shape[2]], whole[1][:len(part[1])]))
    last = made(comfy, load=name, **settings)
    assert equal(last, whole) and len(last[1]) == 4 * last[0].shape[2] - 3 + (3 if settings.get("start") == 12 else 0)
    # the LATENT of Load Video Session is that of the node
    graph = graph_of(load=name, **settings)
    graph.add("save", "SaveLatent", samples=["session", 1], filename_prefix="loaded")
    for key in ("continue", "frames", "size", "count", "monitor", "report"):
        del graph[key]
    loaded = load_file(comfy.output_path(comfy.run(graph)["save"]["latents"][0]))["latent_tensor"]
    assert torch.equal(loaded, whole[0][:, :, :loaded.shape[2]]) and loaded.shape[2] < whole[0].shape[2]


@pytest.mark.parametrize("carry", ["pixels", "latents"])
def test_an_interrupt_within_a_segment_loses_that_segment_alone(comfy, carry):
    whole = made(comfy, segments=6, steps=12, carry=carry, seed=5)
    interrupted(comfy, graph_of(segments=6, steps=12, carry=carry, seed=5, save="broken", every=1000), 12 + 12 + 5)
    again = graph_of(segments=6, steps=12, carry=carry, seed=5, load="broken", save="broken")
    outputs = comfy.run(again)
    assert comfy.of_type("progress")[0]["value"] > 24, "progress begins where the run was stopped"
    assert equal(collected(comfy, outputs), whole)


def test_a_run_that_was_killed_goes_on(start_comfy):
    """Nothing but the last save is left; a server that never saw the run makes the same video."""
    settings = {"segments": 6, "steps": 12, "seed": 6}
    server = start_comfy()
    write_files(server)
    whole = made(server.client, **settings)
    server.client.messages.clear()
    server.client.submit(graph_of(save="killed", **settings))
    server.client.wait_for("progress", lambda data: data["node"] == "continue" and data["value"] > 40)
    server.process.kill()
    server.process.wait()

    other = start_comfy()
    write_files(other)
    (other.folder("output", "video_sessions") / "killed.safetensors").write_bytes(
        (server.folder("output", "video_sessions") / "killed.safetensors").read_bytes())
    graph = graph_of(load="killed", **settings)
    assert equal(collected(other.client, other.client.run(graph)), whole)


def test_a_session_and_a_stream(comfy):
    """The file holds the whole video, including what the session brought, and what is saved can be continued."""
    import av

    whole = made(comfy, seed=7)
    made(comfy, segments=2, seed=7, save="streamed", stream_to="video/first")
    outputs = comfy.run(graph_of(seed=7, load="streamed", save="streamed", stream_to="video/rest"))
    path = comfy.output_path(outputs["continue"]["images"][0])
    with av.open(str(path)) as file:
        frames = [frame.to_ndarray(format="rgb24").astype(int) for frame in file.decode(video=0)]
    assert len(frames) == len(whole[1])
    # lossy, so near; a segment put into the wrong place is far
    assert max(np.abs(one - two).mean() for one, two in zip(frames, whole[1].astype(int))) < 8
    assert not list(path.parent.glob("*.safetensors"))
    # outputs are of the last segment alone, those that it continues included
    latents, last = collected(comfy, outputs)
    assert torch.equal(latents[:, :, -2:], whole[0][:, :, -2:]) and latents.shape[2] == 5
    assert np.array_equal(last, whole[1][-8:])
    assert torch.equal(made(comfy, segments=5, seed=7, load="streamed")[0], made(comfy, segments=5, seed=7)[0])


def test_another_sampler_makes_another_video(comfy):
    """Noise that a sampler adds is a function of the segment's seed, so sessions hold for it too."""
    plain, other = (made(comfy, sampler=name, seed=8) for name in ("euler", "euler_ancestral"))
    assert torch.equal(plain[0], made(comfy, seed=8)[0]) and not torch.equal(plain[0], other[0])
    made(comfy, segments=2, sampler="euler_ancestral", seed=8, save="ancestral")
    assert equal(made(comfy, sampler="euler_ancestral", seed=8, load="ancestral"), other)


def test_a_lora_does_not_make_it_another_model(comfy):
    """Nor does one that an earlier run left in the weights."""
    settings = {"seed": 9, "lora": "published"}
    whole = made(comfy, **settings)
    made(comfy, segments=2, save="with lora", **settings)
    made(comfy, segments=1, seed=9, lora="named")
    assert equal(made(comfy, load="with lora", **settings), whole)


REFUSED = {
    "another model": ({"file": "longcat_other.safetensors"}, "saved with another model"),
    "another size": ({"width": 80}, "latents of 8 x 6"), "another carry": ({"carry": "latents"}, "Use the value it was made with"),
    "other given frames": ({"given_frames": 13}, "given_frames 9, but this run has 13"),
    "nothing to do": ({"segments": 2}, "already has 2 segments"), "another start": ({"start": 1}, "does not begin with the frames"),
    "nowhere": ({"load": "nowhere"}, "There is no session file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(comfy, name):
    if not (comfy.output / "video_sessions" / "refused.safetensors").is_file():
        made(comfy, segments=2, steps=1, save="refused")
    settings, sentence = REFUSED[name]
    with pytest.raises(ComfyError, match=sentence):
        comfy.run(graph_of(**{"load": "refused"} | settings))


def test_sessions_of_the_two_families_are_not_mixed_up(comfy, comfy_server):
    write_random_models(comfy_server, "mixed", 7)
    made(comfy, segments=1, steps=1, save="segments")
    graph = build(load="segments")
    graph.add("sampler", "QVGARVideoSampler", chunk_frames=3, session=["session", 0])
    graph["continue"]["inputs"] |= {"sampler": ["sampler", 0]}
    with pytest.raises(ComfyError, match="Connect it to Continue Video"):
        comfy.run(graph)
    del graph["sampler"]["inputs"]["session"]
    with pytest.raises(ComfyError, match="makes video with causal models"):
        comfy.run(graph)
    # a plain sampler that saves is of no use anywhere else
    graph = build(save="x")
    graph.add("latent", "EmptyHunyuanLatentVideo", width=64, height=48, length=17, batch_size=1)
    graph.add("sigmas", "BasicScheduler", model=["quantize", 0], scheduler="simple", steps=2, denoise=1.0)
    graph.add("save", "SaveLatent", filename_prefix="x", samples=graph.add(
        "sample", "SamplerCustom", model=["quantize", 0], add_noise=True, noise_seed=1, cfg=1.0, positive=["positive", 0],
        negative=["negative", 0], sampler=["keep", 0], sigmas=["sigmas", 0], latent_image=["latent", 0]))
    for key in ("continue", "size", "count", "monitor", "report", "vae"):
        del graph[key]
    with pytest.raises(ComfyError, match="Connect AR Video Sampler"):
        comfy.run(graph)


def test_saving_changes_nothing(comfy):
    before, report = run(comfy, build(segments=2, seed=11))[::2]
    latents, _, again = run(comfy, build(segments=2, seed=11, save="watched"))
    assert torch.equal(latents, before) and again["now"]["peak_bytes"] == report["now"]["peak_bytes"]
