"""The template of the tiny world model in the real ComfyUI: it needs nothing, and what the camera comes back to is what it left."""

import copy
import json

import av
import pytest

from template_graphs import TEMPLATES

TEMPLATE = TEMPLATES["Tiny model - world walk"]
FRAMES = 40  # latent, of which the last four see what the first one saw
BACK = slice(4 * (FRAMES - 4), None)


def run(comfy, **settings):
    """Outputs, and the dB of each video frame against the real room."""
    graph = copy.deepcopy(TEMPLATE.graph)
    for node, inputs in settings.items():
        graph[node]["inputs"] |= inputs
    graph["decibels"] = {"class_type": "PreviewAny", "inputs": {"source": ["compare", 3]}}
    graph["report"] = {"class_type": "PreviewAny", "inputs": {"source": ["monitor", 1]}}
    outputs = comfy.run(graph, timeout=500)
    return outputs, json.loads(outputs["decibels"]["text"][0])["psnr_of_frame"]


def mean(values):
    return sum(values) / len(values)


@pytest.fixture(scope="module")
def walked(comfy_server):
    return run(comfy_server.client)


def test_it_walks_with_what_comes_with_the_pack(walked, comfy):
    outputs, decibels = walked
    assert len(decibels) == 4 * FRAMES - 3
    assert json.loads(outputs["report"]["text"][0])["now"]["stored_bytes"] > 0
    (saved,) = (item for item in outputs["save"]["images"] if item["filename"].endswith(".mp4"))
    with av.open(str(comfy.output_path(saved))) as container:
        (stream,) = container.streams.video
        assert (stream.width, stream.height) == (2 * 144, 80)
        assert sum(1 for _ in container.decode(stream)) == 4 * FRAMES - 3


def test_the_first_wall_comes_back_unless_it_was_forgotten(walked, comfy):
    """As the note of the template says: with a window of one chunk the walk ends at another wall."""
    _, decibels = walked
    _, forgetful = run(comfy, walk={"memory": "append"}, settings={"window_frames": 4, "sink_frames": 0})
    assert decibels[0] == pytest.approx(forgetful[0], abs=0.5)
    assert mean(decibels[BACK]) > mean(forgetful[BACK]) + 5
