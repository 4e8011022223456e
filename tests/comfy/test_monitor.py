"""KV Memory Monitor (QVG) in the real ComfyUI: live text while sampling, chart and report after it."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from comfy_client import ComfyError
from comfyui_qvg.qvg.attention.rope import Rope
from comfyui_qvg.qvg.cache.kv_cache import KVCache
from comfyui_qvg.qvg.demo import METADATA, PROMPTS, TEXT_DIM
from comfyui_qvg.qvg.models.wan import CausalWan, WanSizes
from comfyui_qvg.qvg.settings import PRESETS, QVGSettings


@pytest.fixture(scope="module", autouse=True)
def checkpoint(comfy_server):
    draw = torch.Generator().manual_seed(4)
    network = CausalWan(WanSizes(dim=256, ffn_dim=256, layers=2, text_dim=TEXT_DIM))
    state = {name: 0.05 * torch.randn(tensor.shape, generator=draw) for name, tensor in network.state_dict().items()}
    save_file(state, comfy_server.folder("models", "diffusion_models") / "monitor.safetensors", metadata=METADATA)


def graph(preset, seed, block=3, watched="quantize"):
    model = ["quantize", 0]
    return {
        "load": {"class_type": "UNETLoader", "inputs": {"unet_name": "monitor.safetensors", "weight_dtype": "default"}},
        "settings": {"class_type": "QVGSettings", "inputs": {"preset": preset}},
        "quantize": {"class_type": "QVGQuantizeKVCache", "inputs": {"model": ["load", 0], "settings": ["settings", 0]}},
        "shift": {"class_type": "ModelSamplingSD3", "inputs": {"model": model, "shift": 5.0}},
        "prompt": {"class_type": "QVGDemoPrompt", "inputs": {"text": PROMPTS[0]}},
        "latent": {"class_type": "EmptyARVideoLatent", "inputs": {"width": 96, "height": 64, "length": 45, "batch_size": 1}},
        "sampler": {"class_type": "SamplerARVideo", "inputs": {"num_frame_per_block": block}},
        "sigmas": {"class_type": "BasicScheduler", "inputs": {"model": model, "scheduler": "simple", "steps": 2, "denoise": 1.0}},
        "sample": {"class_type": "SamplerCustom", "inputs": {
            "model": ["shift", 0], "add_noise": True, "noise_seed": seed, "cfg": 1.0, "positive": ["prompt", 0],
            "negative": ["prompt", 0], "sampler": ["sampler", 0], "sigmas": ["sigmas", 0], "latent_image": ["latent", 0]}},
        "monitor": {"class_type": "QVGMemoryMonitor", "inputs": {"model": [watched, 0], "samples": ["sample", 0]}},
        "chart": {"class_type": "SaveImage", "inputs": {"images": ["monitor", 0], "filename_prefix": "chart"}},
        "report": {"class_type": "PreviewAny", "inputs": {"source": ["monitor", 1]}},
    }


def report_of(outputs):
    return json.loads(outputs["report"]["text"][0])


@pytest.mark.parametrize("block", [3, 5])
def test_report_chart_and_forecast(comfy, block):
    outputs = comfy.run(graph("Balanced", seed=block, block=block))
    report = report_of(outputs)
    now = report["now"]
    chunks = [min(start + block, 12) for start in range(0, 12, block)]
    assert [point["frames"] for point in report["history"]] == chunks
    assert now["bf16_bytes"] == 2 * 2 * 2 * 12 * 24 * 2 * 128 and now["stored_bytes"] == sum(now["by_layer"])
    assert now["stored_bytes"] == sum(now["by_kind"].values())
    # bases are as large as those of a real model, and for so few tokens they weigh more than the tokens
    assert now["stored_bytes"] - now["by_kind"]["codebooks"] < now["bf16_bytes"] / 4
    # the forecast made before the first step is the count, to the byte
    assert report["forecast"]["stored_bytes"] == now["stored_bytes"]
    assert report["forecast"]["peak_bytes"] == now["peak_bytes"]
    with Image.open(comfy.output_path(outputs["chart"]["images"][0])) as chart:
        assert chart.size == (960, 540) and len(chart.getcolors(1 << 20)) > 50


def test_moments_reach_the_monitor_while_sampling(comfy):
    """Through another node, and before the monitor itself is executed; the node that patched the model shows two lines."""
    comfy.run(graph("Smallest", seed=7, watched="shift"))
    kinds = [message.type for message in comfy.messages if message.type == "qvg.memory"
             or (message.type == "executing" and message.data["node"] == "monitor")]
    assert kinds.index("qvg.memory") < kinds.index("executing"), "nothing was sent before the monitor was executed"
    events = comfy.of_type("qvg.memory")
    assert all(event["nodes"] == ["monitor"] for event in events)
    assert [frame for event in events for frame, _ in event["chart"]["lines"][0]["points"]] == [0, 3, 6, 9, 12]
    assert [event["ended"] for event in events] == [False] * (len(events) - 1) + [True]
    assert events[-1]["now"]["stored_bytes"] == events[-1]["forecast"]["stored_bytes"] and events[-1]["free_bytes"] > 0
    text = comfy.wait_for("qvg.text", lambda data: data["node"] == "quantize" and "12 of 12" in data["text"])["text"]
    assert "Smallest" in text and len(text.splitlines()) == 2


def test_a_page_that_comes_later_gets_the_whole_run(comfy):
    outputs = comfy.run(graph("Balanced", seed=11))
    (report,) = outputs["monitor"]["qvg_memory"]
    run = comfy.get(comfy.url + "/qvg/memory?workflow=")["runs"][-1]
    assert run["nodes"] == ["monitor"] and run["chart"] == report["chart"] and run["now"] == report["now"]
    assert comfy.get(comfy.url + "/qvg/memory?workflow=none")["runs"] == []


@pytest.mark.parametrize("preset", ["Balanced", "Tiny"])
def test_bytes_by_precision_add_up(comfy, preset):
    """Also with fractions of a bit, which are keys of the report as they are written: "0.5"."""
    outputs = comfy.run(graph(preset, seed=12))
    now, settings = report_of(outputs)["now"], PRESETS[preset.lower()]
    assert sum(now["by_bits"].values()) + now["by_kind"]["codebooks"] == now["stored_bytes"]
    assert set(now["by_bits"]) == {str(settings.key.bits), str(settings.sink_bits)}, "sinks and recent frames are held differently"
    (page,) = outputs["monitor"]["qvg_memory"]
    assert [area["id"] for area in page["chart"]["areas"]] == ["codebooks", *sorted(now["by_bits"], key=float), "workspace"]


def test_off_counts_cores_own_cache(comfy):
    now = report_of(comfy.run(graph("Off", seed=8)))["now"]
    # float32 on the CPU: twice the bytes of bf16
    assert now["stored_bytes"] == 2 * now["bf16_bytes"] == now["by_kind"]["plain"]


def test_an_unpatched_model_is_refused(comfy):
    with pytest.raises(ComfyError, match="is not watched"):
        comfy.run(graph("Balanced", seed=9, watched="load"))


def test_available_memory(comfy_modules):
    """What the cache holds on the device and what is free there: offloaded bytes are not on it, and after the run the cache is freed."""
    from comfyui_qvg.nodes.run_log import Run

    settings = QVGSettings.preset("balanced")
    run, empty = Run(settings), KVCache(settings, layers=1, heads=1, head_dim=8, grid=(1, 1), rope=Rope).stats()
    run.free_bytes, run.ended = 1000, False
    assert run._available() == (1000, "cpu")
    run.history.append(replace(empty, stored_bytes=500, workspace_bytes=30))
    assert run._available() == (1530, "cpu")
    run.history.append(replace(empty, stored_bytes=500, workspace_bytes=30, host_bytes=480))
    assert run._available() == (1050, "cpu")
    run.ended = True
    assert run._available() == (1000, "cpu")
