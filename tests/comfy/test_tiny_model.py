"""The tiny models that ship are listed by core's loaders where they lie, each file by its own loader alone."""

import pytest
from safetensors.torch import save_file

from comfyui_qvg.qvg.demo import HEIGHT, NETWORK_PATH, VAE_PATH, WIDTH
from comfyui_qvg.qvg.demo.world import WORLD_NETWORK_PATH, WORLD_VAE_PATH


@pytest.fixture
def folders(comfy_modules, monkeypatch):
    """ComfyUI's folders, as they are for this test alone."""
    import folder_paths

    kept = {name: (list(paths), kinds) for name, (paths, kinds) in folder_paths.folder_names_and_paths.items()}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", kept)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return folder_paths


@pytest.fixture
def registered(folders, tmp_path, monkeypatch):
    """ComfyUI's folders after the pack was loaded with weights in a folder of this test."""
    import torch

    import comfyui_qvg.nodes as pack

    for name, path in (("NETWORK_PATH", NETWORK_PATH), ("VAE_PATH", VAE_PATH), ("WORLD_NETWORK_PATH", WORLD_NETWORK_PATH),
                       ("WORLD_VAE_PATH", WORLD_VAE_PATH)):
        copy = tmp_path / path.relative_to(path.parents[1])
        copy.parent.mkdir(exist_ok=True)
        save_file({"x": torch.zeros(1)}, copy)
        monkeypatch.setattr(pack, name, copy)
    pack.list_tiny_model()
    return folders


def test_each_file_is_listed_by_its_loader(registered):
    import nodes

    networks = nodes.UNETLoader.INPUT_TYPES()["required"]["unet_name"][0]
    autoencoders = nodes.VAELoader.INPUT_TYPES()["required"]["vae_name"][0]
    for network, autoencoder in ((NETWORK_PATH, VAE_PATH), (WORLD_NETWORK_PATH, WORLD_VAE_PATH)):
        assert network.name in networks and autoencoder.name not in networks
        assert autoencoder.name in autoencoders and network.name not in autoencoders


def test_what_a_person_saves_goes_where_it_went(registered):
    """The folder is added behind ComfyUI's own, which stays the place for downloads."""
    for kind in ("diffusion_models", "vae"):
        assert registered.get_folder_paths(kind)[0].startswith(registered.models_dir)


def test_nothing_is_registered_without_weights(comfy_modules, tmp_path, monkeypatch):
    import folder_paths

    import comfyui_qvg.nodes as pack

    for name in ("NETWORK_PATH", "VAE_PATH", "WORLD_NETWORK_PATH", "WORLD_VAE_PATH"):
        monkeypatch.setattr(pack, name, tmp_path / "none" / "x.safetensors")
    pack.list_tiny_model()
    assert "none" not in folder_paths.folder_names_and_paths


def test_own_weights_have_the_licence_of_the_pack(folders):
    """And not that of HY-WorldPlay, whose layout the tiny world model has."""
    from comfyui_qvg.nodes import list_tiny_model
    from comfyui_qvg.nodes.loader import OWN, QVGLoadARVideoModel

    list_tiny_model()
    (said,) = QVGLoadARVideoModel.execute(WORLD_NETWORK_PATH.name).ui["qvg_text"]
    assert "HY-WorldPlay 5B" in said and said.endswith(OWN)


def test_core_and_pack_both_list_the_networks(comfy, tiny_model):
    core = comfy.object_info("UNETLoader")["UNETLoader"]["input"]["required"]["unet_name"][0]
    ours = comfy.object_info("QVGLoadARVideoModel")["QVGLoadARVideoModel"]["input"]["required"]["model_name"][1]["options"]
    vae = comfy.object_info("VAELoader")["VAELoader"]["input"]["required"]["vae_name"][0]
    for network, autoencoder in ((NETWORK_PATH, VAE_PATH), (WORLD_NETWORK_PATH, WORLD_VAE_PATH)):
        assert network.name in core and network.name in ours and autoencoder.name in vae
        assert autoencoder.name not in core + ours and network.name not in vae


def test_the_prompt_draws_its_scene(comfy):
    """Red on green dots: both are in the picture, and the seed moves them."""
    nodes = {"1": {"class_type": "QVGDemoPrompt", "inputs": {"text": "red circle still, over green dots still", "seed": 1}},
             "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 1], "filename_prefix": "scene"}}}
    from PIL import Image

    pictures = []
    for seed in (1, 2):
        nodes["1"]["inputs"]["seed"] = seed
        (item,) = comfy.run(nodes)["2"]["images"]
        pictures.append(Image.open(comfy.output_path(item)).convert("RGB"))
    assert pictures[0].size == (WIDTH, HEIGHT) and pictures[0].tobytes() != pictures[1].tobytes()
    colours = [colour for _, colour in pictures[0].getcolors(1 << 20)]
    assert any(red > 200 and green < 80 for red, green, _ in colours) and any(green > 80 > red for red, green, _ in colours)
