"""The pack inside a running ComfyUI: it loads, the server answers, refusals and messages reach the client."""

import pytest

from comfy_client import ComfyError

SOLID = {"class_type": "EmptyImage", "inputs": {"width": 32, "height": 16, "batch_size": 1, "color": 255}}
SAVE = {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "solid"}}


def test_pack_loads_without_a_complaint(comfy, comfy_server):
    assert "SamplerARVideo" in comfy.object_info()
    assert comfy_server.complaints_at_start == []


def test_run_returns_the_outputs(comfy):
    outputs = comfy.run({"1": SOLID, "2": SAVE})
    (image,) = outputs["2"]["images"]
    assert comfy.output_path(image).is_file()
    assert comfy.of_type("executed")[0]["node"] == "2"
    assert comfy.queue() == {"queue_running": [], "queue_pending": []}


def test_refused_graph_raises_the_node_error(comfy):
    wrong = {**SOLID, "inputs": {**SOLID["inputs"], "width": -1}}
    with pytest.raises(ComfyError, match=r"EmptyImage \(node 1\): .*width") as refused:
        comfy.run({"1": wrong, "2": SAVE})
    assert "node_errors" in refused.value.details


def test_failing_node_raises_its_own_sentence(comfy):
    outside = {**SAVE, "inputs": {**SAVE["inputs"], "filename_prefix": "../../solid"}}
    with pytest.raises(ComfyError, match=r"SaveImage \(node 2\): .*outside the output folder") as failed:
        comfy.run({"1": SOLID, "2": outside})
    assert not failed.value.interrupted


def test_interrupt_ends_the_run(comfy):
    """The queue is empty again, and the server takes the next graph."""
    slow = {"1": {**SOLID, "inputs": {"width": 512, "height": 512, "batch_size": 8, "color": 255}}}
    for node in range(2, 12):
        blur = {"image": [str(node - 1), 0], "blur_radius": 15, "sigma": 5.0}
        slow[str(node)] = {"class_type": "ImageBlur", "inputs": blur}
    slow["12"] = {**SAVE, "inputs": {"images": ["11", 0], "filename_prefix": "slow"}}
    prompt = comfy.submit(slow)
    comfy.wait_for("executing", lambda data: data["node"] == "3")
    comfy.interrupt()
    with pytest.raises(ComfyError) as ended:
        comfy.wait(prompt)
    assert ended.value.interrupted
    assert comfy.run({"1": SOLID, "2": SAVE})["2"]["images"]
    assert comfy.queue() == {"queue_running": [], "queue_pending": []}


def test_browser_opens_the_frontend(page, comfy_server):
    assert page.evaluate("app.api.clientId")
    assert page.evaluate("Object.keys(LiteGraph.registered_node_types).includes('SamplerARVideo')")
