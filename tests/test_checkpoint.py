"""Opening published checkpoints: every wrapping that authors use, and a sentence for every other file."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from comfyui_qvg.qvg.checkpoint import open_checkpoint
from comfyui_qvg.qvg.models.longcat import LongCat, LongCatSizes
from comfyui_qvg.qvg.names import official_name

PARTS = ("self_attn.q", "self_attn.o", "cross_attn.o", "ffn.0", "ffn.2")


def wan_state(layers=2, dim=256, channels=16, text_dim=4096):
    """The keys that a Wan 2.1 is known by, with weights of one row where a shape does not matter."""
    state = {
        "patch_embedding.weight": torch.zeros(dim, channels, 1, 2, 2),
        "text_embedding.0.weight": torch.zeros(1, text_dim),
        "time_embedding.0.weight": torch.zeros(1, 256),
        "time_projection.1.weight": torch.zeros(6, 1),
        "head.head.weight": torch.zeros(4 * channels, 1),
        "head.modulation": torch.zeros(1, 2, dim),
    }
    for layer in range(layers):
        state |= {f"blocks.{layer}.{part}.weight": torch.full((2, 1), float(layer)) for part in PARTS}
    return state


def wrapped(state, prefix):
    return {prefix + key: tensor for key, tensor in state.items()}


@pytest.mark.parametrize("container", ["generator_ema", "generator", "model", "state_dict", None])
@pytest.mark.parametrize("prefix", ["", "model.", "model._fsdp_wrapped_module.", "model.diffusion_model.", "module."])
def test_training_checkpoints_are_unwrapped(tmp_path, container, prefix):
    path = tmp_path / "self_forcing_dmd.pt"
    content = wrapped(wan_state(), prefix)
    torch.save({container: content} if container else content, path)
    state, found = open_checkpoint(path)
    assert state.keys() == wan_state().keys()
    assert (found.container, found.layers, found.heads, found.text_dim) == (container or "", 2, 2, 4096)
    assert found.family.startswith("causal Wan 2.1 layout, 2 layers, 2 heads")


def test_averaged_weights_are_preferred(tmp_path):
    path = tmp_path / "causal_forcing.pt"
    torch.save({"critic": {}, "generator": wan_state(), "generator_ema": wan_state(layers=3), "step": 600}, path)
    assert open_checkpoint(path)[1].layers == 3


def test_wrapper_in_the_middle_of_a_key(tmp_path):
    path = tmp_path / "sharded.pt"
    torch.save({key.replace("blocks.0.", "blocks.0._fsdp_wrapped_module."): t for key, t in wan_state().items()}, path)
    assert open_checkpoint(path)[0].keys() == wan_state().keys()


def test_old_torch_format_opens_too(tmp_path):
    path = tmp_path / "old.pth"
    torch.save({"generator": wan_state()}, path, _use_new_zipfile_serialization=False)
    assert open_checkpoint(path)[1].container == "generator"


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "generator_ema.model."])
def test_safetensors(tmp_path, prefix):
    path = tmp_path / "repackaged.safetensors"
    save_file(wrapped(wan_state(), prefix), path)
    state, found = open_checkpoint(path)
    assert state.keys() == wan_state().keys()
    assert json.loads(found.metadata()["config"]) == {"transformer": {"causal_ar": True}}


def test_metadata_keeps_the_files_own_config_and_adds_text_width(tmp_path):
    path = tmp_path / "tiny.safetensors"
    save_file(wan_state(text_dim=64), path, metadata={"config": json.dumps({"transformer": {"eps": 1e-5}})})
    config = json.loads(open_checkpoint(path)[1].metadata()["config"])
    assert config == {"transformer": {"eps": 1e-5, "causal_ar": True, "text_dim": 64}}


def test_known_sizes_are_named(tmp_path):
    path = tmp_path / "self_forcing_dmd.pt"
    torch.save({"generator": wan_state(layers=30, dim=1536)}, path)
    found = open_checkpoint(path)[1]
    assert "30 layers, 12 heads" in found.family and "1.3B" in found.family and "Self-Forcing" in found.family
    assert str(found).startswith("self_forcing_dmd.pt: causal Wan 2.1 layout")


WRONG = {
    "lora": ({"blocks.0.self_attn.q.lora_A.weight": torch.zeros(1)}, "LoraLoaderModelOnly"),
    "image_to_video": (wan_state(channels=36) | {"img_emb.proj.0.bias": torch.zeros(1)}, "ARVideoI2V"),
    "wan22_5b": (wan_state(channels=48), "48 latent channels"),
    "inpaint": (wan_state(channels=36), "image-to-video Wan"),
    "vace": (wan_state() | {"vace_blocks.0.after_proj.bias": torch.zeros(1)}, "VACE"),
    "camera": (wan_state() | {"control_adapter.conv.weight": torch.zeros(1)}, "extra inputs"),
    "diffusers": ({"condition_embedder.time_proj.weight": torch.zeros(1)}, "diffusers layout"),
    "hunyuan": ({"double_blocks.0.img_attn.norm.key_norm.scale": torch.zeros(1)}, "HunyuanVideo"),
    "longcat": ({"blocks.0.pre_crs_attn_norm.weight": torch.zeros(1)}, "LongCat"),
    "vae": ({"decoder.conv1.weight": torch.zeros(1)}, "VAELoader"),
    "text_encoder": ({"shared.weight": torch.zeros(1)}, "CLIPLoader"),
    "unknown": ({"layers.0.weight": torch.zeros(1)}, "not a Wan 2.1 video model"),
    "shard": ({key: t for key, t in wan_state().items() if "head.head" not in key}, "lacks head.head.weight"),
    "narrow": (wan_state(dim=192), "192"),
    "empty": ({}, "no tensors"),
}


@pytest.mark.parametrize("name", WRONG)
def test_other_files_are_refused_with_a_sentence(tmp_path, name):
    content, expected = WRONG[name]
    path = tmp_path / f"{name}.safetensors"
    save_file(content, path)
    with pytest.raises(ValueError, match=expected) as error:
        open_checkpoint(path)
    assert str(error.value).startswith(path.name) and str(error.value).endswith(".")


def longcat_state():
    """A tiny LongCat-Video in the layout of ComfyUI, and in the official one."""
    state = LongCat(LongCatSizes(dim=32, head_dim=16, ffn_dim=64, layers=2, text_dim=8, time_dim=16, freq_dim=16)).state_dict()
    fused = {}
    for ours, tensor in state.items():
        fused.setdefault(official_name(ours)[0], []).append(tensor)
    return state, {name: torch.cat(parts) for name, parts in fused.items()}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_both_layouts_of_longcat(tmp_path, prefix):
    split, official = longcat_state()
    assert len(official) < len(split)
    for name, content in (("split", split), ("official", official)):
        save_file(wrapped(content, prefix), tmp_path / f"{name}.safetensors")
        state, found = open_checkpoint(tmp_path / f"{name}.safetensors")
        assert state.keys() == split.keys() and all(torch.equal(state[key], split[key]) for key in split)
        assert (found.model, found.layers, found.heads, found.text_dim, found.dtype) == ("longcat", 2, 2, 8, "float32")
        assert "LongCat-Video, 2 layers, 2 heads" in str(found)


def test_any_part_of_a_published_model_opens_all(tmp_path):
    split, official = longcat_state()
    names = [f"diffusion_pytorch_model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]
    for number, name in enumerate(names):
        save_file(dict(list(official.items())[number::3]), tmp_path / name)
    for name in names:
        assert open_checkpoint(tmp_path / name)[0].keys() == split.keys()
    (tmp_path / names[1]).unlink()
    with pytest.raises(ValueError, match=r"is one part of 3, and diffusion_pytorch_model-00002-of-00003\.safetensors is not beside it"):
        open_checkpoint(tmp_path / names[0])


def test_an_incomplete_longcat_is_named(tmp_path):
    path = tmp_path / "part.safetensors"
    save_file({name: tensor for name, tensor in longcat_state()[0].items() if not name.startswith("patch_embedding")}, path)
    with pytest.raises(ValueError, match=r"part\.safetensors cannot be opened.*patch_embedding\.weight is missing"):
        open_checkpoint(path)


@pytest.mark.parametrize("lost", ["blocks.1.ffn.w2.weight", "blocks.0.norm3.bias", "head.modulation.1.bias"])
def test_a_longcat_that_lacks_anything_is_named(tmp_path, lost):
    """Core would fill it with whatever is in memory."""
    path = tmp_path / "damaged.safetensors"
    save_file({name: tensor for name, tensor in longcat_state()[0].items() if name != lost}, path)
    with pytest.raises(ValueError, match=rf"damaged\.safetensors is LongCat-Video but lacks {lost}"):
        open_checkpoint(path)


def test_lora_container_is_refused(tmp_path):
    path = tmp_path / "lora.pt"
    torch.save({"generator_lora": {"blocks.0.weight": torch.zeros(1)}}, path)
    with pytest.raises(ValueError, match="is a LoRA"):
        open_checkpoint(path)


def test_code_in_a_pickle_is_not_run(tmp_path):
    path = tmp_path / "evil.pt"
    path.write_bytes(pickle.dumps({"generator": print}, protocol=2))
    with pytest.raises(ValueError, match="can run code"):
        open_checkpoint(path)


def test_a_broken_download_is_named(tmp_path):
    path = tmp_path / "half.safetensors"
    save_file(wan_state(), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="download it again"):
        open_checkpoint(path)
    path = tmp_path / "half.pt"
    torch.save({"generator": wan_state()}, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="download it again"):
        open_checkpoint(path)


def test_suffix_and_content_that_cannot_be_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"choose a \.safetensors"):
        open_checkpoint(tmp_path / "model.gguf")
    path = tmp_path / "list.pt"
    torch.save([torch.zeros(1)], path)
    with pytest.raises(ValueError, match="holds a list"):
        open_checkpoint(path)
