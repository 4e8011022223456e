"""A kernel that is compiled while a graph samples is told of on its nodes. The server has no GPU: of kernels one is pretended."""

import pytest

import longcat_graphs
from comfy_client import Graph
from comfyui_qvg.qvg.demo import PROMPTS
from random_models import write_random_models

TOLD = "Compiling GPU kernels (first run): rotate"
PRETEND = '''
import sys


class PretendGPU:
    """Takes the CPU for a device with one kernel, which no run has launched yet."""

    CATEGORY, FUNCTION, RETURN_TYPES = "test", "run", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "label": ("STRING", {"default": ""})}}

    def run(self, model, label):
        backends, launches, rope = (next(module for name, module in sys.modules.items() if name.endswith(f".qvg.{part}"))
                                    for part in ("backends", "backends.launches", "attention.rope"))

        def rotate(*arguments):
            backends.before_launch("rotate", label)
            return rope._rotate(*arguments)

        backends.remove("pretend")
        backends.register(backends.Backend("pretend", devices=("cpu",), ops={"rotate": rotate}))
        launches._launched.clear()
        return (model,)


NODE_CLASS_MAPPINGS = {"PretendGPU": PretendGPU}
'''


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    from comfy_server import ComfyServer

    server = ComfyServer(tmp_path_factory.mktemp("kernels"))
    (server.folder("custom_nodes") / "pretend_gpu.py").write_text(PRETEND)
    write_random_models(server, "causal", 3)
    longcat_graphs.write_files(server)
    with server:
        yield server


def causal(label, sampler, **inputs):
    graph = Graph()
    model = graph.add("gpu", "PretendGPU", label=label,
                      model=graph.add("load", "UNETLoader", unet_name="causal.safetensors", weight_dtype="default"))
    model = graph.add("quantize", "QVGQuantizeKVCache", model=model)
    prompt = graph.add("prompt", "QVGDemoPrompt", text=PROMPTS[0])
    samples = graph.add(
        "sample", "SamplerCustom", model=model, add_noise=True, noise_seed=1, cfg=1.0, positive=prompt, negative=prompt,
        sampler=graph.add("sampler", sampler, **inputs),
        sigmas=graph.add("sigmas", "BasicScheduler", model=model, scheduler="simple", steps=2, denoise=1.0),
        latent_image=graph.add("latent", "EmptyARVideoLatent", width=96, height=64, length=21, batch_size=1))
    graph.add("save", "SaveLatent", samples=samples, filename_prefix="kernels")
    return graph


def texts(server, graph, *nodes):
    """What the nodes showed, in order."""
    client = server.client
    client.messages.clear()
    client.run(graph)
    return [[data["text"] for data in client.of_type("qvg.text") if data["node"] == node] for node in nodes]


def test_on_the_node_that_quantizes(server):
    (shown,) = texts(server, causal("core", "SamplerARVideo", num_frame_per_block=3), "quantize")
    told, title = shown.index(TOLD), "KV cache, Balanced, 0 of 6 latent frames"
    assert shown[told - 1] == shown[told + 1] == title and "6 of 6" in shown[-1] and shown.count(TOLD) == 1
    again = causal("core", "SamplerARVideo", num_frame_per_block=3)
    again["sample"]["inputs"]["noise_seed"] = 2
    (shown,) = texts(server, again, "quantize")
    assert shown and TOLD not in shown, "a kernel is compiled once"


def test_on_the_sampler(server):
    """The sampler's own line, and the node that quantizes as well."""
    quantize, sampler = texts(server, causal("ours", "QVGARVideoSampler", chunk_frames=3), "quantize", "sampler")
    assert sampler[:2] == [TOLD, ""] and sampler[2].startswith("chunk 1/2, step 1/2")
    assert TOLD in quantize[:-1]


def test_on_continue_video(server):
    graph = longcat_graphs.build(segments=2, start=9)
    graph["gpu"] = {"class_type": "PretendGPU", "inputs": {"model": ["load", 0], "label": "longcat"}}
    graph["quantize"]["inputs"]["model"] = ["gpu", 0]
    quantize, shown = texts(server, graph, "quantize", "continue")
    told = shown.index(TOLD)
    assert shown[told - 1] == shown[told + 1] == "segment 1 of 2, 3 of 5 latent frames given" and shown.count(TOLD) == 1
    assert TOLD in quantize[:-1]
