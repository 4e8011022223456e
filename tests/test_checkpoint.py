"""Opening published checkpoints: every wrapping that authors use, and a sentence for every other file."""

import json
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from comfyui_qvg.qvg.models.checkpoint import Description, open_checkpoint
from comfyui_qvg.qvg.models.longcat import PUBLISHED, LongCat, LongCatSizes
from comfyui_qvg.qvg.models.wan import CausalWan, WanSizes, causal_metadata


def wan_state(layers=2, dim=256, channels=16, text_dim=64):
    """The weights of a small Wan 2.1, all zeros."""
    with torch.device("meta"):
        state = CausalWan(WanSizes(dim=dim, ffn_dim=32, layers=layers, text_dim=text_dim, channels=channels)).state_dict()
    return {key: torch.zeros(tensor.shape) for key, tensor in state.items()}


def config_of(found):
    """What ComfyUI is told about a causal Wan."""
    return json.loads(causal_metadata(found.sizes, found.config)["config"])


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
    assert (found.container, found.layers, found.heads, found.sizes.text_dim) == (container or "", 2, 2, 64)
    assert found.label.startswith("causal Wan 2.1 layout, 2 layers, 2 heads")


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
    save_file(wrapped(wan_state(text_dim=4096), prefix), path)
    state, found = open_checkpoint(path)
    assert state.keys() == wan_state().keys()
    assert config_of(found) == {"transformer": {"causal_ar": True}}


def test_metadata_keeps_the_files_own_config_and_adds_text_width(tmp_path):
    path = tmp_path / "tiny.safetensors"
    save_file(wan_state(text_dim=64), path, metadata={"config": json.dumps({"transformer": {"eps": 1e-5}})})
    assert config_of(open_checkpoint(path)[1]) == {"transformer": {"eps": 1e-5, "causal_ar": True, "text_dim": 64}}


def test_known_sizes_are_named():
    found = Description("self_forcing_dmd.pt", "generator", "wan", WanSizes(1536, 8960, 30, 4096), 1_419_000_000, "bfloat16")
    assert "30 layers, 12 heads" in found.label and "1.3B" in found.label and "Self-Forcing" in found.label
    assert str(found).startswith("self_forcing_dmd.pt: causal Wan 2.1 layout")


WRONG = {
    "lora": ({"blocks.0.self_attn.q.lora_A.weight": torch.zeros(1)}, "LoraLoaderModelOnly"),
    "loha": ({"lycoris_blocks_0_self_attn_q.hada_w1_a": torch.zeros(1)}, "LoraLoaderModelOnly"),
    "lokr": ({"blocks.0.self_attn.q.lokr_w1": torch.zeros(1)}, "LoraLoaderModelOnly"),
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
    "unknown": ({"layers.0.weight": torch.zeros(1)}, "not a video model of a known family .* Wan 2.1 \\(Self-Forcing, .*LongCat-Video"),
    "shard": ({key: t for key, t in wan_state().items() if "head.head" not in key}, "lacks head.head.weight"),
    "narrow": (wan_state() | {"patch_embedding.weight": torch.zeros(192, 16, 1, 2, 2)}, "192"),
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


FALSE = {
    "a layer far away": (wan_state() | {"blocks.999999999.ffn.0.weight": torch.zeros(1)}, "not part of a numbered layer"),
    "a layer left out": ({key.replace("blocks.1.", "blocks.2."): x for key, x in wan_state().items()}, "numbers 2 layers from 0 to 2"),
    "too many layers": (wan_state() | {f"blocks.{number}.x": torch.zeros(1) for number in range(300)}, "numbers 300 layers"),
    "a layer without a number": (wan_state() | {"blocks.x.ffn.0.weight": torch.zeros(1)}, "not part of a numbered layer"),
    "an empty weight": (wan_state() | {"blocks.0.ffn.0.weight": torch.zeros(10**9, 0)}, r"\(1000000000, 0\)"),
    "a vector for a matrix": (wan_state() | {"text_embedding.0.weight": torch.zeros(64)}, "numbers above 0"),
    "a wide layer": (wan_state() | {"blocks.0.ffn.0.weight": torch.zeros(100_000, 256)},
                     r"blocks.0.ffn.0.bias as float32 of shape \(32,\), but"),
    "one weight of another size": (wan_state() | {"blocks.1.cross_attn.k.weight": torch.zeros(256, 8)}, "blocks.1.cross_attn.k.weight"),
    "packed without a word": (wan_state() | {"blocks.1.ffn.0.weight": torch.zeros(32, 128, dtype=torch.uint8)}, "0.weight as uint8 of"),
    "packed in fewer numbers than a bit each": (
        wan_state() | {"blocks.1.ffn.0.weight": torch.zeros(32, 8, dtype=torch.uint8), "blocks.1.ffn.0.comfy_quant": torch.zeros(2)},
        "blocks.1.ffn.0.weight"),
    "a vector of whole numbers": (wan_state() | {"blocks.1.norm3.bias": torch.zeros(256, dtype=torch.int64)}, "norm3.bias as int64"),
    "one weight missing": ({key: x for key, x in wan_state().items() if key != "blocks.1.norm3.bias"}, "lacks blocks.1.norm3.bias"),
    "complex": (wan_state() | {"blocks.1.norm3.bias": torch.zeros(256, dtype=torch.complex64)}, "no layer uses"),
}


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
@pytest.mark.parametrize("name", FALSE)
def test_false_sizes_are_refused_before_a_network_is_built(tmp_path, name, ending):
    content, expected = FALSE[name]
    path = tmp_path / f"false.{ending}"
    (save_file if ending == "safetensors" else torch.save)(content, path)
    with pytest.raises(ValueError, match=expected) as error:
        open_checkpoint(path)
    assert str(error.value).startswith(path.name) and str(error.value).endswith(".")


def test_packed_weights_open(tmp_path):
    """Their shapes are the packing's own; side tensors are the loader's business."""
    path = tmp_path / "packed.safetensors"
    packed = {"blocks.1.ffn.0.weight": torch.zeros(32, 128, dtype=torch.uint8), "blocks.1.ffn.0.weight_scale": torch.zeros(32, 16),
              "blocks.1.ffn.0.comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)}
    save_file(wan_state() | packed, path)
    assert open_checkpoint(path)[0]["blocks.1.ffn.0.weight"].shape == (32, 128)


SPECIAL = {
    "sparse": lambda: torch.zeros(256).to_sparse(), "meta": lambda: torch.zeros(256, device="meta"),
    "expanded": lambda: torch.zeros(1).expand(256), "huge": lambda: torch.zeros(1).expand(10**12),
    "quantized": lambda: torch.quantize_per_tensor(torch.zeros(256), 1.0, 0, torch.quint8),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SPECIAL)
def test_tensors_that_no_layer_takes(tmp_path, name):
    path = tmp_path / "special.pt"
    torch.save({"generator": wan_state() | {"blocks.1.norm3.bias": SPECIAL[name]()}}, path)
    with pytest.raises(ValueError, match=r"^special\.pt (cannot be opened\. It holds blocks\.1\.norm3\.bias|holds Python).*\.$"):
        open_checkpoint(path)


def test_many_views_of_one_storage(tmp_path):
    """Each is whole, but to give every one memory of its own would take a thousand times the file's."""
    path = tmp_path / "views.pt"
    block = torch.zeros(1_000_000)
    torch.save(wan_state() | {f"extra.{number}": block.view(1000, 1000) for number in range(1000)}, path)
    with pytest.raises(ValueError, match="lists tensors of 4,0"):
        open_checkpoint(path)


def test_a_compressed_file_is_not_unpacked(tmp_path):
    """A gigabyte of zeros, deflated to a megabyte."""
    path, plain = tmp_path / "bomb.pt", tmp_path / "plain.pt"
    torch.save(wan_state(), plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    with pytest.raises(ValueError, match=r"bomb\.pt is compressed \(plain/data\.pkl\)"):
        open_checkpoint(path)


def test_dicts_without_end(tmp_path):
    """A dict that holds itself, and one whose copies double at every level."""
    path = tmp_path / "loop.pt"
    loop = wan_state()
    loop["model"] = loop
    torch.save({"generator": loop, "model": loop}, path)
    assert open_checkpoint(path)[0].keys() == wan_state().keys()
    bomb = {}
    for _ in range(60):
        bomb = {"model": bomb, "generator": bomb}
    torch.save(bomb, path)
    with pytest.raises(ValueError, match="not a video model of a known family"):
        open_checkpoint(path)


@pytest.mark.parametrize("count, words", [("99999", "is named part 1 of 99999"), ("00000", "is named part 1 of 0")])
def test_absurd_numbers_of_parts(tmp_path, count, words):
    path = tmp_path / f"model-00001-of-{count}.safetensors"
    save_file(wan_state(), path)
    with pytest.raises(ValueError, match=words):
        open_checkpoint(path)


@pytest.mark.parametrize("config", [
    "{", "[]", '{"transformer": 3}', '{"transformer": {"num_layers": 1000000000, "eps": "x"}}', 100_000 * "["])
def test_metadata_does_not_decide_sizes(tmp_path, config):
    """Core adds what it is given to the sizes that it reads itself."""
    path = tmp_path / "a.safetensors"
    save_file(wan_state(text_dim=4096), path, metadata={"config": config})
    try:
        assert config_of(open_checkpoint(path)[1]) == {"transformer": {"causal_ar": True}}
    except ValueError as error:
        assert "metadata that cannot be read" in str(error)


def test_a_fused_layer_without_a_field(tmp_path):
    path = tmp_path / "fused.safetensors"
    save_file(longcat_state()[1] | {"blocks.0.attn.qkv.": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv\..* is not part of a layer"):
        open_checkpoint(path)


@pytest.mark.parametrize("name", ["blocks.0.\nnorm3.bias", "blocks.\x1b[2J", 400 * "x"])
@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_names_that_no_weight_has(tmp_path, name, ending):
    path = tmp_path / f"names.{ending}"
    content = wan_state() | {name: torch.zeros(1)}
    save_file(content, path) if ending == "safetensors" else torch.save({"generator": content}, path)
    with pytest.raises(ValueError, match=r"names\.\w+ holds a tensor with the name .*, which no weight has") as error:
        open_checkpoint(path)
    assert type(error.value) is ValueError


def longcat_state():
    """A tiny LongCat-Video in the layout of ComfyUI, and in the official one."""
    state = LongCat(LongCatSizes(dim=32, head_dim=16, ffn_dim=64, layers=2, text_dim=8, time_dim=16, freq_dim=16)).state_dict()
    fused = {}
    for ours, tensor in state.items():
        fused.setdefault(PUBLISHED.published_name(ours)[0], []).append(tensor)
    return state, {name: torch.cat(parts) for name, parts in fused.items()}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_both_layouts_of_longcat(tmp_path, prefix):
    split, official = longcat_state()
    assert len(official) < len(split)
    for name, content in (("split", split), ("official", official)):
        save_file(wrapped(content, prefix), tmp_path / f"{name}.safetensors")
        state, found = open_checkpoint(tmp_path / f"{name}.safetensors")
        assert state.keys() == split.keys() and all(torch.equal(state[key], split[key]) for key in split)
        assert (found.family, found.layers, found.heads, found.sizes.text_dim, found.dtype) == ("longcat", 2, 2, 8, "float32")
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
    with pytest.raises(ValueError, match=r"part\.safetensors looks like LongCat-Video but lacks patch_embedding\.weight"):
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
