"""The templates of HY-WorldPlay run whole in the real ComfyUI, on tiny random checkpoints in the published layouts and under the published
names. Only what has no tiny one is exchanged: the text encoders, by the tiny model's prompt.

Core fixes the sizes of the two VAEs and of SigLIP in its code, so a pack of this test makes them smaller in the server.
"""

import copy
import json
import shutil

import av
import pytest
import torch
from safetensors.torch import save_file

from comfy_paths import REPOSITORY
from comfy_server import ComfyServer
from comfyui_qvg.qvg.demo import PROMPTS
from comfyui_qvg.qvg.models.worldplay_hunyuan import PUBLISHED as PUBLISHED_8B
from comfyui_qvg.qvg.models.worldplay_wan import PUBLISHED as PUBLISHED_5B
from in_process import drawn, small_siglip, world_vae
from random_models import worldplay_state
from template_graphs import HUNYUAN_VAE, SIGLIP, TEMPLATES, WAN22_VAE, WORLDPLAY_5B, WORLDPLAY_8B

NAMES = [name for name in TEMPLATES if name.startswith("HY-WorldPlay")]
# width, height and video frames per second
SHOWN = {"5B": (96, 64, 16), "8B": (64, 48, 24)}
PACK = f"""
import sys
from contextlib import ExitStack
sys.path.insert(0, {str(REPOSITORY / "tests" / "comfy")!r})
from in_process import small_siglip, small_world_vaes
# for as long as the server runs
held = ExitStack()
held.enter_context(small_world_vaes())
held.enter_context(small_siglip())
NODE_CLASS_MAPPINGS = {{}}
"""


def published(layout, state):
    return {layout.published_name(name)[0]: tensor for name, tensor in state.items()}


def siglip_state():
    import comfy.clip_vision

    with small_siglip():
        folder = comfy.clip_vision.__file__.rpartition("/")[0]
        shapes = comfy.clip_vision.ClipVisionModel(f"{folder}/clip_vision_siglip_384.json").get_sd()
    state = {name: (0.02 * drawn(number, *tensor.shape)).half() for number, (name, tensor) in enumerate(shapes.items())}
    # core takes 23 layers and more for one of the large encoders
    return state | {"vision_model.encoder.layers.22.layer_norm1.weight": torch.ones(1)}


@pytest.fixture(scope="module")
def server(comfy_modules, tmp_path_factory):
    server = ComfyServer(tmp_path_factory.mktemp("worlds"))
    networks, vaes = server.folder("models", "diffusion_models"), server.folder("models", "vae")
    torch.save({"generator": {f"model.{name}": tensor for name, tensor in published(PUBLISHED_5B, worldplay_state("5b")).items()}},
               networks / WORLDPLAY_5B[0])
    save_file(published(PUBLISHED_8B, worldplay_state("8b", image_dim=1152)), networks / WORLDPLAY_8B[0])
    for variant, file in (("5b", WAN22_VAE), ("8b", HUNYUAN_VAE)):
        save_file({name: tensor.contiguous() for name, tensor in world_vae(variant).get_sd().items()}, vaes / file[0])
    save_file(siglip_state(), server.folder("models", "clip_vision") / SIGLIP[0])
    shutil.copy(server.comfyui / "input" / "example.png", server.folder("input"))
    (server.folder("custom_nodes") / "small_world_models.py").write_text(PACK)
    with server:
        yield server


@pytest.mark.parametrize("name", NAMES)
def test_a_template_walks(server, name):
    template, (width, height, rate) = TEMPLATES[name], SHOWN[name.split()[1]]
    graph = copy.deepcopy(template.graph)
    del graph["clip"]
    graph["prompt"] = {"class_type": "QVGDemoPrompt", "inputs": {"text": PROMPTS[0]}}
    graph["walk"]["inputs"] |= {"width": width, "height": height}
    graph["report"] = {"class_type": "PreviewAny", "inputs": {"source": ["monitor", 1]}}
    outputs = server.client.run(graph, timeout=500)

    frames = 48
    assert outputs["path"]["qvg_text"][0].startswith(f"{frames} latent frames: 12 chunks of four\n{4 * frames - 3} video frames")
    assert "European Union" in outputs["load"]["qvg_text"][0]
    said = outputs["walk"]["qvg_text"][0].splitlines()
    assert said[0] == f"{frames} latent frames, {4 * frames - 3} video frames"
    # at the end the camera is back where it was, and a chunk reads frames that are not among the newest
    assert "36-47" not in said[-1] and said[-1].startswith("chunk 12 reads")
    report = json.loads(outputs["report"]["text"][0])
    assert report["now"]["stored_bytes"] > 0
    (saved,) = (item for item in outputs["save"]["images"] if item["filename"].endswith(".mp4"))
    with av.open(str(server.client.output_path(saved))) as container:
        (stream,) = container.streams.video
        assert (stream.width, stream.height, float(stream.average_rate)) == (width, height, rate)
        assert sum(1 for _ in container.decode(stream)) == 4 * frames - 3
