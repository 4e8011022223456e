"""World Walk as a person uses it: graphs on a server, with previews, text on the node, the monitor, a stop, a file, and a session."""

from __future__ import annotations

import av
import pytest
import torch

from comfy_client import ComfyError
from comfy_server import ComfyServer
from comfyui_qvg.qvg.video.world import MEMORIES
from world_graphs import build, prepare, results


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = ComfyServer(tmp_path_factory.mktemp("world"), "--preview-method", "latent2rgb")
    prepare(server)
    with server:
        yield server


@pytest.fixture
def comfy(server):
    server.client.messages.clear()
    return server.client


def run(comfy, graph):
    return results(comfy, comfy.run(graph))


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("variant", ["5b", "8b"])
def test_a_walk(comfy, variant, memory):
    latents, frames, report, said = run(comfy, build(variant, memory=memory))
    assert latents.shape[1:3] == ({"5b": 48, "8b": 32}[variant], 24) and frames == 93 and latents.isfinite().all()
    # once for each chunk, and what is held then
    assert [moment["frames"] for moment in report["history"]] == (
        [4 * chunk for chunk in range(1, 7)] if memory != "rebuild" else [0, 4, 8, 12, 16, 16 if variant == "5b" else 20])
    assert report["preset"] == "balanced" and report["latent_frames"] == 24 and report["forecast"]["stored_bytes"] > 0
    assert said.startswith("24 latent frames, 93 video frames\nchunk 1 reads nothing") and "chunk 6 reads latent frames 0-" in said
    progress = [data for data in comfy.of_type("progress") if data["node"] == "walk"]
    assert (progress[-1]["value"], progress[-1]["max"]) == (12, 12)
    texts = [data["text"] for data in comfy.of_type("qvg.text") if data["node"] == "walk"]
    assert any("chunk 3/6, step 2/2" in text and "chunk 3 reads latent frames 0-7" in text for text in texts)
    assert len([data for data in comfy.of_type("preview") if data.get("node_id") == "walk"]) >= 2


def test_what_is_loaded_names_the_territory_of_the_licence(comfy):
    graph = build("8b", moves="w-3")
    # as it was not loaded before
    graph["load"]["inputs"]["weight_dtype"] = "fp8_e4m3fn"
    said = comfy.run(graph)["load"]["qvg_text"][0]
    assert "HY-WorldPlay 8B" in said and "excludes the European Union, the United Kingdom and South Korea" in said


def test_a_stopped_walk_goes_on_from_its_session(comfy, server):
    whole = run(comfy, build(memory="bank", steps=8))[0]
    comfy.messages.clear()
    prompt = comfy.submit(build(memory="bank", steps=8, save="stopped", stream_to="video/stopped"))
    comfy.wait_for("progress", lambda data: data["node"] == "walk" and data["value"] >= 20)
    comfy.interrupt()
    with pytest.raises(ComfyError) as ended:
        comfy.wait(prompt)
    assert ended.value.interrupted
    comfy.messages.clear()
    made = run(comfy, build(memory="bank", steps=8, load="stopped", path_continues=False))[0]
    torch.testing.assert_close(made, whole)
    # only what was left is made
    assert next(data for data in comfy.of_type("progress") if data["node"] == "walk" and data["value"])["value"] > 16
    with av.open(str(server.folder("output") / "video" / "stopped_00001_.mp4")) as file:
        assert sum(1 for _ in file.decode(video=0)) >= 29


def test_a_walk_is_made_longer_another_day(comfy):
    first = run(comfy, build("8b", moves="w-7", save="longer"))[0]
    latents, frames, *_ = run(comfy, build("8b", moves="left-8", load="longer"))
    assert latents.shape[2] == 16 and torch.equal(latents[:, :, :8], first) and frames == 61


def test_refusals_reach_the_page(comfy):
    for inputs, sentence in (({"width": 80}, "must be multiples of 32"), ({"cfg": 2.0, "negative": None}, "negative prompt is needed"),
                             ({"load": "absent"}, "There is no session file")):
        graph = build(**{key: value for key, value in inputs.items() if value is not None})
        if inputs.get("negative", 0) is None:
            del graph["walk"]["inputs"]["negative"]
        with pytest.raises(ComfyError, match=sentence):
            comfy.run(graph)
