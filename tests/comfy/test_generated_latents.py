"""What `qvg generate` makes with HY-WorldPlay, in the real ComfyUI: Load Latent opens it, and World Walk makes the same and goes on."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from test_world_walk import VARIANTS, execute, image, prompt

from comfyui_qvg.qvg.commands.cli import main
from comfyui_qvg.qvg.models.latent_scale import to_network, to_vae
from comfyui_qvg.qvg.video.camera_moves import walk
from in_process import drawn, world_model, world_vae
from random_models import worldplay_state

MOVES = "right-7, left-4"


@pytest.mark.parametrize("variant", VARIANTS)
def test_load_latent_opens_the_latents_of_world_walk(comfy_modules, variant, tmp_path, monkeypatch):
    import folder_paths

    import nodes
    from comfyui_qvg.nodes.session import QVGLoadVideoSession

    vae, model, text = world_vae(variant), world_model(variant), prompt(1)[0][0]
    save_file(worldplay_state(variant), tmp_path / "model.safetensors")
    save_file({"positive": text, "start": vae.encode(image(variant))}, tmp_path / "scene.safetensors")
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    (tmp_path / "video_sessions").mkdir()
    made = main(["generate", "--checkpoint", str(tmp_path / "model.safetensors"), "--embeddings", str(tmp_path / "scene.safetensors"),
                 "--camera", MOVES, "--steps", "2", "--seed", "3", "--preset", "off", "--device", "cpu", "--out",
                 str(tmp_path / "walk.latent"), "--session", str(tmp_path / "video_sessions" / "walk.safetensors")])
    assert made == 0
    latent = nodes.LoadLatent().load("walk.latent")[0]["samples"]
    shown, frames, _ = execute({variant: model}, {variant: vae}, variant, "off", camera_path=walk(MOVES))
    assert latent.shape == shown.shape and (latent - shown).abs().max() < 1e-4
    decoded = nodes.VAEDecode().decode(vae, {"samples": latent})[0]
    assert decoded.shape == frames.shape and (decoded - frames).abs().max() < 1e-3
    session = QVGLoadVideoSession.execute("walk").args[0]
    whole = execute({variant: model}, {variant: vae}, variant, "off", camera_path=walk(f"{MOVES}, w-4"))[0]
    rest = execute({variant: model}, {variant: vae}, variant, "off", camera_path=walk("w-4"), start_image=None, session=session)[0]
    assert rest.shape == whole.shape and (rest - whole).abs().max() < 1e-3


def test_latents_are_scaled_as_core_does(comfy_modules):
    from comfy.latent_formats import HunyuanVideo15, Wan21, Wan22

    for form in (Wan21(), Wan22(), HunyuanVideo15()):
        x = drawn(1, 1, form.latent_channels, 2, 4, 4)
        assert torch.allclose(to_vae(x), form.process_out(x), atol=1e-6) and torch.allclose(to_network(x), form.process_in(x), atol=1e-6)
