"""What a run says reaches the nodes of the graph that is executed, whatever core kept of an earlier one; and pages ask while it runs."""

import asyncio
import json
import sys
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from comfy_client import ComfyError
from comfyui_qvg.qvg.demo import NETWORK_FILE, PROMPTS, VAE_FILE


@pytest.fixture(scope="module", autouse=True)
def files(tiny_model):
    pass


def graph(seed, names=None, sampler="SamplerARVideo", preset="Smallest"):
    """A short video of the tiny model. names: other ids of the nodes."""
    knobs = {"chunk_frames": 3} if sampler == "QVGARVideoSampler" else {"num_frame_per_block": 3}
    nodes = {
        "load": ("UNETLoader", {"unet_name": NETWORK_FILE, "weight_dtype": "default"}),
        "settings": ("QVGSettings", {"preset": preset}),
        "quantize": ("QVGQuantizeKVCache", {"model": ["load", 0], "settings": ["settings", 0]}),
        "shift": ("ModelSamplingSD3", {"model": ["quantize", 0], "shift": 5.0}),
        "prompt": ("QVGDemoPrompt", {"text": PROMPTS[0]}),
        "latent": ("EmptyARVideoLatent", {"width": 96, "height": 64, "length": 21, "batch_size": 1}),
        "sampler": (sampler, knobs),
        "sigmas": ("BasicScheduler", {"model": ["shift", 0], "scheduler": "simple", "steps": 2, "denoise": 1.0}),
        "guider": ("BasicGuider", {"model": ["shift", 0], "conditioning": ["prompt", 0]}),
        "noise": ("RandomNoise", {"noise_seed": seed}),
        "sample": ("SamplerCustomAdvanced", {
            "noise": ["noise", 0], "guider": ["guider", 0], "sampler": ["sampler", 0], "sigmas": ["sigmas", 0],
            "latent_image": ["latent", 0]}),
        "monitor": ("QVGMemoryMonitor", {"model": ["quantize", 0], "samples": ["sample", 0]})}
    names = names or {}
    return {names.get(name, name): {"class_type": kind, "inputs": {
        key: [names.get(value[0], value[0]), value[1]] if isinstance(value, list) else value for key, value in inputs.items()}}
        for name, (kind, inputs) in nodes.items()}


def shown(comfy, prompt):
    """(nodes that got a text, nodes that got a chart) while the graph ran."""
    comfy.messages.clear()
    outputs = comfy.run(prompt)
    texts = {data["node"] for data in comfy.of_type("qvg.text")}
    charts = {node for data in comfy.of_type("qvg.memory") for node in data["nodes"]}
    return texts, charts, outputs


@pytest.mark.parametrize("sampler", ["SamplerARVideo", "QVGARVideoSampler"])
def test_a_cached_model_reports_to_the_graph_it_runs_in(comfy, sampler):
    """The same nodes under other ids, so that only the seed is new: MODEL and SAMPLER come out of core's cache."""
    own = {"sampler"} if sampler.startswith("QVG") else set()
    texts, charts, _ = shown(comfy, graph(1, sampler=sampler))
    assert texts == {"quantize"} | own and charts == {"monitor"}
    names = {name: f"9:{name}" for name in ("quantize", "sampler", "monitor", "sample", "guider", "shift")}
    texts, charts, outputs = shown(comfy, graph(2, names, sampler=sampler))
    cached = {node for data in comfy.of_type("execution_cached") for node in data["nodes"]}
    assert {"9:quantize", "9:sampler"} <= cached, "the graph before made them"
    assert texts == {names.get(node, node) for node in {"quantize"} | own} and charts == {"9:monitor"}
    assert outputs["9:monitor"]["qvg_memory"][0]["now"]["frames"] == 6


def test_a_monitor_elsewhere_gets_its_report(comfy):
    """On a second node with the same inputs, whose MODEL is then the same, and whose latent comes through others."""
    prompt = graph(3)
    prompt["quantize2"] = prompt["quantize"]
    prompt["lora"] = {"class_type": "ModelSamplingSD3", "inputs": {"model": ["quantize2", 0], "shift": 3.0}}
    prompt["later"] = {"class_type": "LatentMultiply", "inputs": {"samples": ["sample", 0], "multiplier": 1.0}}
    prompt["elsewhere"] = {"class_type": "QVGMemoryMonitor", "inputs": {"model": ["lora", 0], "samples": ["later", 0]}}
    _, charts, outputs = shown(comfy, prompt)
    assert charts == {"monitor", "elsewhere"}
    assert outputs["elsewhere"]["qvg_memory"][0]["chart"] == outputs["monitor"]["qvg_memory"][0]["chart"]


def test_each_of_two_samplers_has_its_own_chart(comfy):
    """One MODEL samples twice, for two lengths of video."""
    prompt = graph(4)
    prompt["latent2"] = {"class_type": "EmptyARVideoLatent", "inputs": {"width": 96, "height": 64, "length": 33, "batch_size": 1}}
    prompt["sample2"] = {"class_type": "SamplerCustomAdvanced", "inputs": prompt["sample"]["inputs"] | {"latent_image": ["latent2", 0]}}
    prompt["monitor2"] = {"class_type": "QVGMemoryMonitor", "inputs": {"model": ["quantize", 0], "samples": ["sample2", 0]}}
    _, charts, outputs = shown(comfy, prompt)
    assert charts == {"monitor", "monitor2"}
    for node, frames in (("monitor", 6), ("monitor2", 9)):
        assert {data["latent_frames"] for data in comfy.of_type("qvg.memory") if node in data["nodes"]} == {frames}
        assert outputs[node]["qvg_memory"][0]["latent_frames"] == frames


def test_a_chart_of_a_workflow_stays_when_its_model_runs_in_another(comfy):
    """A page of the first workflow that is opened after the second ran."""
    for workflow, frames in (("first", 21), ("second", 33)):
        prompt = graph(5)
        prompt["latent"]["inputs"]["length"] = frames
        comfy.wait(comfy.submit(prompt, extra_pnginfo={"workflow": {"id": workflow}}))
    for workflow, frames in (("first", 6), ("second", 9)):
        answer = comfy.get(f"{comfy.url}/qvg/memory?workflow={workflow}")
        (run,) = answer["runs"]
        assert run["workflow"] == workflow and run["nodes"] == ["monitor"] and run["now"]["frames"] == frames
        (text,) = (entry["text"] for entry in answer["texts"] if entry["node"] == "quantize")
        assert f"{frames} of {frames} latent frames" in text


def test_what_a_node_said_is_there_for_a_page_that_comes_later(comfy):
    """Also where core had the node in its cache, under another id."""
    for workflow, node in (("plan", "1"), ("plan again", "2")):
        comfy.wait(comfy.submit({node: {"class_type": "QVGPlanMemory", "inputs": {
            "model": "self-forcing", "width": 0, "height": 0, "seconds": 31.0, "preset": "Balanced", "memory_gib": 24.0}}},
            extra_pnginfo={"workflow": {"id": workflow}}))
        ((text,),) = (output["output"]["qvg_text"] for output in comfy.of_type("executed") if output["node"] == node)
        answer = comfy.get(f"{comfy.url}/qvg/memory?workflow={urllib.request.quote(workflow)}")
        assert answer["texts"] == [{"workflow": workflow, "node": node, "text": text}] and len(text.splitlines()) > 3


def test_stop_says_that_the_finished_part_goes_on(comfy):
    prompt = graph(6, sampler="QVGARVideoSampler")
    prompt["latent"]["inputs"]["length"] = 1021
    sent = comfy.submit(prompt)
    comfy.wait_for("qvg.memory", lambda data: data["now"] and data["now"]["frames"] >= 6)
    comfy.interrupt()
    outputs = comfy.wait(sent)
    (partial,) = comfy.of_type("qvg.partial")
    done = outputs["monitor"]["qvg_memory"][0]["now"]["frames"]
    assert partial["done"] == done < partial["total"] == 256
    text = comfy.of_type("qvg.text")[-2:]
    assert any(f"Stopped. The {done} finished latent frames" in data["text"] and data["node"] == "sampler" for data in text)


def test_the_second_stop_ends_it(comfy):
    """The words of the first say so: the next node does not begin."""
    prompt = graph(7, sampler="QVGARVideoSampler")
    prompt["latent"]["inputs"]["length"] = 1021
    prompt["vae"] = {"class_type": "VAELoader", "inputs": {"vae_name": VAE_FILE}}
    prompt["decode"] = {"class_type": "VAEDecode", "inputs": {"vae": ["vae", 0], "samples": ["sample", 0]}}
    prompt["monitor"] = {"class_type": "PreviewImage", "inputs": {"images": ["decode", 0]}}
    sent = comfy.submit(prompt)
    comfy.wait_for("qvg.text", lambda data: data["node"] == "sampler" and "chunk 20/" in data["text"])
    comfy.interrupt()
    comfy.wait_for("qvg.partial")
    comfy.wait_for("executing", lambda data: data["node"] == "decode")
    comfy.interrupt()
    with pytest.raises(ComfyError, match="interrupted"):
        comfy.wait(sent)


def test_pages_may_ask_while_runs_begin(comfy_modules):
    """The route reads in the server's thread what sampling threads change."""
    from comfyui_qvg.nodes import live, run_log
    from comfyui_qvg.nodes.where import Place
    from comfyui_qvg.qvg.settings import QVGSettings

    class Queue:
        def get_history(self, **_):
            return {}

    class Server:
        prompt_queue = Queue()

        def send_sync(self, *_):
            pass

    class Request:
        query = {}

    prompt = {"monitor": {"class_type": "QVGMemoryMonitor", "inputs": {"model": ["quantize", 0], "samples": ["sample", 0]}},
              "quantize": {"class_type": "QVGQuantizeKVCache", "inputs": {}},
              "sample": {"class_type": "S", "inputs": {"m": ["quantize", 0]}}}
    old, live.PromptServer.instance = getattr(live.PromptServer, "instance", None), Server()
    failures, stop = [], threading.Event()
    # threads take turns as often as they can
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def run():
        number = 0
        while not stop.is_set():
            number += 1
            place = Place("p", "sample", prompt, f"w{number % 64}")
            run_log.Run(QVGSettings(), place, None, 9, None).begin()
            live.write(place, f"n{number}", "text")

    thread = threading.Thread(target=run)
    # the page asks in a thread of its own, since the tests in a browser leave an event loop running in this one
    asks = ThreadPoolExecutor(1)
    try:
        thread.start()
        for _ in range(400):
            try:
                answer = json.loads(asks.submit(asyncio.run, live.answer(Request())).result().body)
            except RuntimeError as error:
                failures.append(str(error))
        assert failures == [] and len(answer["runs"]) == live.RUNS_KEPT
    finally:
        stop.set()
        thread.join()
        asks.shutdown()
        sys.setswitchinterval(interval)
        live.PromptServer.instance = old
        live._runs.clear()
        live._texts.clear()
