"""LoRAs in every layout that trainers write, through core's own loader: the weights that come out are those worked out by hand.

The matrix is model x names (those here, or the author's) x layout x kind of change. Each file changes every linear layer of a tiny random
network; what is expected is W + strength * scale * B @ A, with the scale that the layout's trainer means.
"""

import logging
import re

import pytest
import torch

from comfyui_qvg.qvg.demo import METADATA, TEXT_DIM
from comfyui_qvg.qvg.models import longcat, worldplay_hunyuan, worldplay_wan
from comfyui_qvg.qvg.models.longcat import LongCat, LongCatSizes
from comfyui_qvg.qvg.models.wan import CausalWan, WanSizes
from random_models import worldplay_state

RANK, STRENGTH = 2, 0.5
DIFFUSERS = {
    "self_attn.q": "attn1.to_q", "self_attn.k": "attn1.to_k", "self_attn.v": "attn1.to_v", "self_attn.o": "attn1.to_out.0",
    "cross_attn.q": "attn2.to_q", "cross_attn.k": "attn2.to_k", "cross_attn.v": "attn2.to_v", "cross_attn.o": "attn2.to_out.0",
    "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2", "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2", "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2", "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out"}


@pytest.fixture(scope="module")
def models(comfy_modules):
    import comfy.sd

    from comfyui_qvg.nodes.adapters import longcat as longcat_adapter
    from comfyui_qvg.nodes.adapters import worldplay_5b, worldplay_8b

    def state(network):
        draw = torch.Generator().manual_seed(6)
        return {name: torch.randn(tensor.shape, generator=draw) for name, tensor in network.state_dict().items()}

    sizes = LongCatSizes(dim=64, head_dim=16, ffn_dim=96, layers=2, text_dim=32, time_dim=16, freq_dim=32)
    wan = comfy.sd.load_diffusion_model_state_dict(state(CausalWan(WanSizes(128, 96, 2, TEXT_DIM))), metadata=METADATA)
    return {"wan": wan, "longcat": longcat_adapter.load(state(LongCat(sizes))), "worldplay 5b": worldplay_5b.load(worldplay_state("5b")),
            "worldplay 8b": worldplay_8b.load(worldplay_state("8b"))}


def layers(model):
    """Shape of every linear layer, by name. A table of three rows, of the kinds of text, is none."""
    return {name.removesuffix(".weight").removeprefix("diffusion_model."): tuple(tensor.shape)
            for name, tensor in model.model.state_dict().items() if name.endswith(".weight") and tensor.ndim == 2 and tensor.shape[0] > 3}


def modules(model, names):
    """{name in the file: [layers of ours that its rows are]}. names: "ours", "diffusers", or the `layer_name` of a family's layout."""
    found = {}
    for name in layers(model):
        if names == "ours":
            found[name] = [name]
        elif names == "diffusers":
            end = next(ours for ours in DIFFUSERS if name.endswith(ours))
            found[name.removesuffix(end) + DIFFUSERS[end]] = [name]
        else:
            published, place, count = names(name)
            found.setdefault(published, [None] * count)[place] = name
    return found


# name of the layout: (what stands before a module's name, whether its dots become underscores, names of A and B, name of the scale)
LAYOUTS = {
    "bare": ("", False, "lora_A.weight", "lora_B.weight", None),
    "bare kohya fields": ("", False, "lora_down.weight", "lora_up.weight", "alpha"),
    "diffusers": ("transformer.", False, "lora_A.weight", "lora_B.weight", None),
    "diffusers, old": ("transformer.", False, "lora.down.weight", "lora.up.weight", None),
    "diffusers, older": ("unet.", False, "lora_linear_layer.down.weight", "lora_linear_layer.up.weight", None),
    "peft": ("base_model.model.", False, "lora_A.weight", "lora_B.weight", None),
    "peft, adapter's name": ("base_model.model.", False, "lora_A.default.weight", "lora_B.default.weight", None),
    "peft, compiled": ("base_model.model._orig_mod.", False, "lora_A.weight", "lora_B.weight", "alpha"),
    "peft under diffusers": ("transformer.base_model.model.", False, "lora_A.weight", "lora_B.weight", None),
    "fsdp": ("generator.model._fsdp_wrapped_module.", False, "lora_A.weight", "lora_B.weight", None),
    "comfy": ("diffusion_model.", False, "lora_down.weight", "lora_up.weight", "alpha"),
    "comfy, peft fields": ("diffusion_model.", False, "lora_A.weight", "lora_B.weight", None),
    "kohya": ("lora_unet_", True, "lora_down.weight", "lora_up.weight", "alpha"),
    "kohya, wan fun": ("lora_unet__", True, "lora_down.weight", "lora_up.weight", "alpha"),
    "onetrainer": ("lora_transformer_", True, "lora_down.weight", "lora_up.weight", "alpha"),
    "lycoris": ("lycoris_", True, "lora_down.weight", "lora_up.weight", "alpha"),
    "underscores alone": ("", True, "lora_down.weight", "lora_up.weight", "alpha"),
}
MODELS = [pytest.param(model, names, id=f"{model}, {names if isinstance(names, str) else 'published'} names") for model, names in (
    ("wan", "ours"), ("wan", "diffusers"), ("longcat", "ours"), ("longcat", longcat.PUBLISHED.layer_name),
    ("worldplay 5b", "ours"), ("worldplay 5b", worldplay_wan.PUBLISHED.layer_name),
    ("worldplay 8b", "ours"), ("worldplay 8b", worldplay_hunyuan.PUBLISHED.layer_name))]


def spelled(name, layout):
    before, underscores, *_ = LAYOUTS[layout]
    return before + (name.replace(".", "_") if underscores else name)


def lora_file(model, names, layout):
    """A LoRA and the change that it means of every weight of ours."""
    draw, file, changes, sizes = torch.Generator().manual_seed(7), {}, {}, layers(model)
    *_, down_field, up_field, scale_field = LAYOUTS[layout]
    for name, parts in modules(model, names).items():
        inner, outer = sizes[parts[0]][1], sum(sizes[part][0] for part in parts)
        down, up = torch.randn(RANK, inner, generator=draw), torch.randn(outer, RANK, generator=draw)
        key = spelled(name, layout)
        file |= {f"{key}.{down_field}": down, f"{key}.{up_field}": up}
        if scale_field:
            file[f"{key}.{scale_field}"] = torch.tensor(3.0)
        delta = up @ down * (3.0 / RANK if scale_field else 1.0)
        changes |= dict(zip(parts, delta.chunk(len(parts))))
    return file, changes


def weights_after(model, file, strength=STRENGTH):
    """Every linear weight as core would load it with this LoRA; and that nothing else is patched."""
    import comfy.lora
    import comfy.sd

    patched = comfy.sd.load_lora_for_models(model, None, file, strength, 0.0)[0]
    before = model.model.state_dict()
    found = {key.removeprefix("diffusion_model.").removesuffix(".weight"): comfy.lora.calculate_weight(patches, before[key].clone(), key)
             for key, patches in patched.patches.items()}
    return found, {name: before[f"diffusion_model.{name}.weight"] for name in layers(model)}


def check(model, file, changes, caplog, strength=STRENGTH):
    after, before = weights_after(model, file, strength)
    assert after.keys() == changes.keys()
    for name, delta in changes.items():
        torch.testing.assert_close(after[name], before[name] + strength * delta, rtol=1e-4, atol=1e-4)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("model", "names"), MODELS)
def test_every_layout(models, model, names, layout, caplog):
    check(models[model], *lora_file(models[model], names, layout), caplog)


@pytest.mark.parametrize("layout", ["lycoris", "kohya", "peft", "bare", "comfy"])
@pytest.mark.parametrize("kind", ["loha", "lokr", "lokr, cut evenly", "lokr, low rank", "difference"])
@pytest.mark.parametrize(("model", "names"), MODELS)
def test_other_kinds_of_changes(models, model, names, layout, kind, caplog):
    draw, file, changes = torch.Generator().manual_seed(8), {}, {}
    model, sizes = models[model], layers(models[model])

    def randn(*shape):
        return torch.randn(*shape, generator=draw)

    for name, parts in modules(model, names).items():
        inner, outer, key = sizes[parts[0]][1], sum(sizes[part][0] for part in parts), spelled(name, layout)
        if kind == "difference":
            delta = randn(outer, inner)
            fields = {"diff": delta}
        elif kind == "loha":
            fields = {"hada_w1_a": randn(outer, RANK), "hada_w1_b": randn(RANK, inner), "hada_w2_a": randn(outer, RANK),
                      "hada_w2_b": randn(RANK, inner), "alpha": torch.tensor(3.0)}
            delta = (fields["hada_w1_a"] @ fields["hada_w1_b"]) * (fields["hada_w2_a"] @ fields["hada_w2_b"]) * 3.0 / RANK
        else:
            rows = len(parts) if "evenly" in kind else 4
            first, second = randn(rows, 2), randn(outer // rows, inner // 2)
            fields = {"lokr_w1": first, "lokr_w2": second, "alpha": torch.tensor(3.0)}
            if "low rank" in kind:
                fields = {"lokr_w1": first, "lokr_w2_a": randn(outer // rows, RANK), "lokr_w2_b": randn(RANK, inner // 2)}
                fields["alpha"] = torch.tensor(3.0)
                second = fields["lokr_w2_a"] @ fields["lokr_w2_b"] * 3.0 / RANK
            delta = torch.kron(first, second)
        file |= {f"{key}.{field}": tensor for field, tensor in fields.items()}
        changes |= dict(zip(parts, delta.chunk(len(parts))))
    check(model, file, changes, caplog)


@pytest.mark.parametrize("field", ["dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.default.weight"])
@pytest.mark.parametrize(("model", "names"), MODELS)
def test_weights_decomposed_by_rows(models, model, names, field):
    """DoRA: the sum of weight and change, its rows set to the lengths in the file. (Core divides by the length of the weight alone.)"""
    draw, model = torch.Generator().manual_seed(9), models[model]
    file, changes = lora_file(model, names, "peft")
    sizes, lengths = layers(model), {}
    for name, parts in modules(model, names).items():
        scale = 1 + torch.rand(sum(sizes[part][0] for part in parts), 1, generator=draw)
        file[f"{spelled(name, 'peft')}.{field}"] = scale if field == "dora_scale" else scale[:, 0]
        lengths |= dict(zip(parts, scale.chunk(len(parts))))
    after, before = weights_after(model, file, 1.0)
    for name, delta in changes.items():
        expected = (before[name] + delta) * lengths[name] / before[name].norm(dim=1, keepdim=True)
        torch.testing.assert_close(after[name], expected, rtol=1e-4, atol=1e-4)


def test_longlives_file(models, tmp_path, caplog):
    """lora.pt: a dict of networks, one of which judges, in PEFT's names through a trainer's wrapper; opened as LoraLoader does."""
    import comfy.utils

    model = models["wan"]
    file, changes = lora_file(model, "ours", "peft")
    other, _ = lora_file(model, "ours", "peft")
    path = tmp_path / "lora.pt"
    torch.save({"generator_lora": file, "critic_lora": {key: tensor + 1 for key, tensor in other.items()}, "step": 3000}, path)
    with caplog.at_level(logging.INFO):
        check(model, comfy.utils.load_torch_file(str(path), safe_load=True), changes, caplog)
    message, = (text for text in caplog.messages if "QVG" in text)
    assert f"{len(other)} keys of the LoRA belong to a network that is not the one that samples (critic_lora." in message
    torch.save({"generator_lora": file}, path)
    check(model, comfy.utils.load_torch_file(str(path), safe_load=True), changes, caplog)


def test_a_scale_that_is_a_plain_number(models, tmp_path, caplog):
    import comfy.utils

    file, changes = lora_file(models["wan"], "ours", "kohya")
    path = tmp_path / "lora.pt"
    torch.save({key: 3.0 if key.endswith("alpha") else tensor for key, tensor in file.items()}, path)
    check(models["wan"], comfy.utils.load_torch_file(str(path), safe_load=True), changes, caplog)


@pytest.mark.parametrize("model", ["wan", "longcat"])
def test_keys_that_are_not_taken_are_counted_and_named(models, model, caplog):
    file, changes = lora_file(models[model], "ours", "diffusers")
    strange = {f"transformer.blocks.{number}.adapter.lora_{side}.weight": torch.zeros(2, 2) for number in range(3) for side in "AB"}
    lonely = {"transformer.blocks.0.norm3.lora_B.weight": torch.zeros(2, 2), "transformer.blocks.7.ffn.2.diff": torch.zeros(2)}
    after, _ = weights_after(models[model], file | strange | lonely)
    assert after.keys() == changes.keys()
    message, = (record.getMessage() for record in caplog.records)
    assert f"{len(strange | lonely)} of the LoRA's {len(file | strange | lonely)} keys do not fit" in message
    assert message.count("adapter.lora_") == 3 and message.endswith(", ...")


STRANGERS = {
    "image model": ({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight": torch.zeros(4, 2),
                     "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": torch.zeros(2, 4)}, "None of this LoRA's 2 keys"),
    "text encoder": ({"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.zeros(4, 2)}, "None of this LoRA's 1 keys"),
    "vace": ({"vace_blocks.0.self_attn.q.lora_A.weight": torch.zeros(2, 2), "vace_blocks.0.self_attn.q.lora_B.weight": torch.zeros(2, 2)},
             "None of this LoRA's 2 keys"),
    "nothing": ({}, "it holds no tensors"),
}


@pytest.mark.parametrize("kind", STRANGERS)
@pytest.mark.parametrize("model", ["wan", "longcat", "worldplay 5b", "worldplay 8b"])
def test_a_lora_of_another_model_is_refused(models, model, kind):
    file, words = STRANGERS[kind]
    with pytest.raises(ValueError, match=words):
        weights_after(models[model], file)


@pytest.mark.parametrize("model", ["wan", "longcat", "worldplay 5b", "worldplay 8b"])
def test_a_lora_of_a_larger_model_is_refused(models, model):
    name = next(name for name in layers(models[model]) if "blocks.0." in name)
    file = {f"diffusion_model.{name}.lora_A.weight": torch.zeros(2, 512), f"diffusion_model.{name}.lora_B.weight": torch.zeros(512, 2)}
    with pytest.raises(ValueError, match=rf"another size than .*{re.escape(name)} is changed as \[512, 512\] and is \["):
        weights_after(models[model], file)


def test_a_published_lora_for_wan_and_the_other_way_round(models):
    theirs, _ = lora_file(models["longcat"], longcat.PUBLISHED.layer_name, "diffusers")
    with pytest.raises(ValueError, match=r"None of this LoRA's .* belongs to the Wan 2\.1 model"):
        weights_after(models["wan"], {key: tensor for key, tensor in theirs.items() if "attn" in key})


def test_hooks_ask_the_network_and_the_text_encoder_in_turn(models):
    """Core's LoRA hooks hand the whole file to both, and want nothing said where one of them has no part in it."""
    import comfy.lora

    names, text = comfy.lora.model_lora_keys_unet(models["longcat"].model, {}), STRANGERS["text encoder"][0]
    file, changes = lora_file(models["longcat"], longcat.PUBLISHED.layer_name, "peft")
    assert comfy.lora.load_lora(text, names, log_missing=False) == {}
    assert len(comfy.lora.load_lora(file | text, names, log_missing=False)) == len(changes)
    with pytest.raises(ValueError, match=r"None of this LoRA's 2 keys"):
        comfy.lora.load_lora(STRANGERS["vace"][0], names, log_missing=False)


@pytest.mark.parametrize("fields", [("lokr_w1", "lokr_w2"), ("lokr_w1_a", "lokr_w1_b", "lokr_w2")])
def test_a_stopped_video_is_not_gone_on_with_under_another_lora(models, fields):
    """A file of segments is named by what it is made from; LoRAs of every kind are part of that."""
    import comfy.sd

    from comfyui_qvg.nodes.longcat import run_key

    def key(seed):
        draw = torch.Generator().manual_seed(seed)
        sizes = {"lokr_w1": (4, 2), "lokr_w2": (48, 32), "lokr_w1_a": (4, 3), "lokr_w1_b": (3, 2)}
        file = {f"lycoris_blocks_0_attn_qkv.{field}": torch.randn(sizes[field], generator=draw) for field in fields}
        return run_key(comfy.sd.load_lora_for_models(models["longcat"], None, file, 1.0, 0.0)[0], [], [], None, [])

    assert key(1) == key(1) != key(2)


@pytest.mark.parametrize(("names", "kind"), [(longcat.PUBLISHED.layer_name, "lora"), ("ours", "lora"),
                                             (longcat.PUBLISHED.layer_name, "lokr")],
                         ids=["published-lora", "ours-lora", "published-lokr"])
def test_loras_beside_the_weights(models, names, kind):
    """Core's bypass loader adds a LoRA to what layers give out, and leaves their weights alone."""
    import comfy.sd

    model, draw = models["longcat"], torch.Generator().manual_seed(10)
    file, changes = lora_file(model, names, "diffusers")
    if kind == "lokr":
        first, second = torch.randn(4, 2, generator=draw), torch.randn(48, 32, generator=draw)
        file = {"transformer.blocks.0.attn.qkv.lokr_w1": first, "transformer.blocks.0.attn.qkv.lokr_w2": second}
        changes = dict(zip((f"blocks.0.self_attn.{part}" for part in "qkv"), torch.kron(first, second).chunk(3)))
    patched = comfy.sd.load_bypass_lora_for_models(model, None, file, STRENGTH, 0.0)[0]
    network, (injection,) = model.model.diffusion_model, patched.injections["bypass_lora"]
    x = torch.randn(3, 64, generator=draw)
    names = [f"blocks.0.self_attn.{part}" for part in "qkv"]
    before = [network.get_submodule(name)(x) for name in names]
    injection.inject(patched)
    try:
        after = [network.get_submodule(name)(x) for name in names]
    finally:
        injection.eject(patched)
    for name, plain, changed in zip(names, before, after):
        torch.testing.assert_close(changed, plain + STRENGTH * x @ changes[name].T, rtol=1e-4, atol=1e-4)


def test_ordinary_models_are_cores_own_business(models, caplog):
    """An ordinary Wan of the same names: core's rules, nothing of ours said, nothing refused."""
    import comfy.lora
    import comfy.sd

    network = CausalWan(WanSizes(128, 96, 2, 4096))
    plain = comfy.sd.load_diffusion_model_state_dict({name: torch.randn(t.shape) for name, t in network.state_dict().items()})
    assert type(comfy.lora.model_lora_keys_unet(plain.model, {})) is dict
    file, _ = lora_file(models["longcat"], longcat.PUBLISHED.layer_name, "diffusers")
    assert comfy.sd.load_lora_for_models(plain, None, file, 1.0, 0.0)[0].patches == {}
    assert "QVG" not in caplog.text
