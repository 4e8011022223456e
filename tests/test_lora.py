"""Reading LoRA files without ComfyUI: spellings, cuts, and the account of every key. tests/comfy/test_lora_names.py applies them."""

import math
import random

import pytest
import torch

from comfyui_qvg.qvg.models import lora
from comfyui_qvg.qvg.models.longcat import LONGCAT, PUBLISHED, LongCat, LongCatSizes
from comfyui_qvg.qvg.models.lora_fields import Fused
from comfyui_qvg.qvg.models.wan import WAN, CausalWan, WanSizes

RANK = 2


def shapes(network):
    return {name.removesuffix(".weight"): tuple(t.shape) for name, t in network.state_dict().items() if not name.endswith(".bias")}


@pytest.fixture(scope="module")
def wan():
    return shapes(CausalWan(WanSizes(dim=128, ffn_dim=64, layers=11, text_dim=32)))


@pytest.fixture(scope="module")
def longcat():
    return shapes(LongCat(LongCatSizes(dim=64, head_dim=16, ffn_dim=32, layers=2, text_dim=32, time_dim=16, freq_dim=32)))


def pair(name, outer, inner, seed=0):
    draw = torch.Generator().manual_seed(seed)
    down, up = torch.randn(RANK, inner, generator=draw), torch.randn(outer, RANK, generator=draw)
    return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}


def convert(file, parameters):
    return lora.convert(file, parameters, LONGCAT if "blocks.0.ffn.w3" in parameters else WAN)


def delta(mapped, name):
    up, down = (mapped.weights[f"{name}.lora_{side}.weight"] for side in ("up", "down"))
    alpha = mapped.weights.get(f"{name}.alpha")
    return up @ down * (1 if alpha is None else alpha / down.shape[0])


def test_no_two_parameters_share_a_spelling(wan, longcat):
    for parameters, family in ((wan, WAN), (longcat, LONGCAT)):
        for parts in lora.Spellings(parameters, family.lora_name).table.values():
            places = [(place, count) for _, place, count in parts]
            assert places == [(place, len(parts)) for place in range(len(parts))] and len({name for name, *_ in parts}) == len(parts)


@pytest.mark.parametrize(("spelling", "name"), [
    ("blocks.10.self_attn.q", "blocks.10.self_attn.q"), ("lora_unet_blocks_1_self_attn_q", "blocks.1.self_attn.q"),
    ("transformer.blocks.1.attn1.to_out.0", "blocks.1.self_attn.o"), ("blocks.1.attn2.to_out.0", "blocks.1.cross_attn.o"),
    ("blocks.1.attn2.norm_k", "blocks.1.cross_attn.norm_k"), ("blocks.1.norm2", "blocks.1.norm3"),
    ("blocks.1.scale_shift_table", "blocks.1.modulation"), ("scale_shift_table", "head.modulation"), ("proj_out", "head.head"),
    ("condition_embedder.time_proj", "time_projection.1"), ("base_model.model.patch_embedding", "patch_embedding"),
    ("model.blocks.1._orig_mod.ffn.2", "blocks.1.ffn.2"), ("lora_unet__blocks_0__fsdp_wrapped_module_ffn_0", "blocks.0.ffn.0")])
def test_spellings_of_wan(wan, spelling, name):
    assert lora.Spellings(wan, WAN.lora_name).find(spelling) == [(name, 0, 1)]


@pytest.mark.parametrize("spelling", [
    "vace_blocks.0.self_attn.q", "double_blocks.0.self_attn.q", "blocks.11.self_attn.q", "blocks.0.self_attn", "", "transformer.",
    "blocks.0.attn.qkv", "text_encoder.blocks.0.self_attn.q", "blocks.1.self_attn.q.extra"])
def test_what_is_none_of_wans(wan, spelling):
    assert lora.Spellings(wan, WAN.lora_name).find(spelling) == []


def test_a_fused_layer_is_cut_by_rows(longcat):
    file = pair("transformer.blocks.1.attn.qkv", 192, 64) | pair("lora_unet_blocks_0_cross_attn_kv_linear", 128, 64)
    mapped = convert(file, longcat)
    whole = {f"{name}.weight": file[f"{key}.lora_B.weight"] @ file[f"{key}.lora_A.weight"] for name, key in (
        ("blocks.1.attn.qkv", "transformer.blocks.1.attn.qkv"),
        ("blocks.0.cross_attn.kv_linear", "lora_unet_blocks_0_cross_attn_kv_linear"))}
    expected = PUBLISHED.convert(whole)
    assert len(expected) == 5 and mapped.taken == 4 and mapped.check("it") == ""
    for name, matrix in expected.items():
        torch.testing.assert_close(delta(mapped, name.removesuffix(".weight")), matrix)


def test_a_ladder_with_its_own_scale(longcat):
    """As LongCat-Video publishes: one down of all parts, an up for each, and a scale that is divided already."""
    draw = torch.Generator().manual_seed(1)
    key = "lora___lorahyphen___blocks___lorahyphen___0___lorahyphen___attn___lorahyphen___qkv"
    down, ups = torch.randn(3 * RANK, 64, generator=draw), torch.randn(3, 64, RANK, generator=draw)
    file = {f"{key}.lora_down.weight": down, f"{key}.alpha_scale": torch.tensor(0.25)}
    file |= {f"{key}.lora_up.blocks.{number}.weight": up for number, up in enumerate(ups)}
    mapped = convert(file, longcat)
    assert mapped.taken == 5
    for part, up, rows in zip("qkv", ups, down.chunk(3)):
        torch.testing.assert_close(delta(mapped, f"blocks.0.self_attn.{part}"), 0.25 * up @ rows)
    del file[f"{key}.lora_up.blocks.1.weight"]
    assert convert(file, longcat).left == list(file)


def test_a_kronecker_product_that_no_cut_fits(longcat):
    file = {"lycoris_blocks_0_attn_qkv.lokr_w1": torch.ones(4, 2), "lycoris_blocks_0_attn_qkv.lokr_w2": torch.ones(48, 32)}
    mapped = convert(file, longcat)
    assert mapped.weights == {} and mapped.taken == 2
    assert {name: (part.place, part.count) for name, part in mapped.fused.items()} == {
        f"blocks.0.self_attn.{part}": (place, 3) for place, part in enumerate("qkv")}
    assert all(isinstance(part, Fused) for part in mapped.fused.values())
    even = {"lycoris_blocks_0_attn_qkv.lokr_w1": torch.ones(3, 2), "lycoris_blocks_0_attn_qkv.lokr_w2": torch.ones(64, 32)}
    assert convert(even, longcat).fused == {}


@pytest.mark.parametrize("lost", ["lora_A", "lora_B"])
def test_half_a_pair_is_not_taken(wan, lost):
    file = {key: tensor for key, tensor in pair("blocks.0.ffn.0", 64, 128).items() if lost not in key}
    mapped = convert(file | pair("blocks.0.ffn.2", 128, 64), wan)
    assert mapped.left == list(file) and mapped.taken == 2
    assert "1 of the LoRA's 3 keys do not fit the model" in mapped.check("the model")


@pytest.mark.parametrize("columns", [1, 3])
def test_lengths_of_columns_cannot_be_cut(longcat, columns):
    """DoRA over columns needs the whole fused weight; lengths of rows are cut with it."""
    file = pair("blocks.0.attn.qkv", 192, 64)
    rows = file | {"blocks.0.attn.qkv.dora_scale": torch.ones(192, 1)}
    assert convert(rows, longcat).weights["blocks.0.self_attn.k.dora_scale"].shape == (64, 1)
    wide = file | {"blocks.0.attn.qkv.dora_scale": torch.ones(columns, 64)}
    assert convert(wide, longcat).left == list(wide)


def test_peft_keeps_lengths_without_a_second_dimension(wan):
    file = pair("blocks.0.ffn.0", 64, 128) | {"blocks.0.ffn.0.lora_magnitude_vector": torch.arange(64.0)}
    lengths = convert(file, wan).weights["blocks.0.ffn.0.dora_scale"]
    assert lengths.shape == (64, 1) and torch.equal(lengths[:, 0], torch.arange(64.0))


def test_a_field_under_two_names_counts_once(wan):
    file = pair("blocks.0.ffn.0", 64, 128)
    again = {"blocks.0.ffn.0.lora_down.weight": torch.ones(RANK, 128)}
    mapped = convert(file | again, wan)
    assert mapped.taken == 2 and mapped.left == list(again)
    assert torch.equal(mapped.weights["blocks.0.ffn.0.lora_down.weight"], file["blocks.0.ffn.0.lora_A.weight"])


def test_other_sizes_are_named(wan):
    wrong, right = pair("blocks.0.ffn.0", 640, 1280), pair("blocks.0.ffn.2", 128, 64)
    mapped = convert(wrong | right, wan)
    assert mapped.unfit == list(wrong) and mapped.misfits == {"blocks.0.ffn.0": ((640, 1280), (64, 128))}
    assert "2 of the LoRA's 4 keys do not fit it" in mapped.check("it") and "[640, 1280] and is [64, 128] here" in mapped.check("it")
    with pytest.raises(ValueError, match=r"another size than it: blocks\.0\.ffn\.0 is changed as \[640, 1280\] and is \[64, 128\]"):
        convert(wrong, wan).check("it")
    assert convert(wrong, dict.fromkeys(wan)).taken == 2, "where the shape is not known, the file is believed"


def test_averaged_weights_are_preferred(wan):
    best, other, judge = (pair("base_model.model.blocks.0.ffn.0", 64, 128, seed) for seed in range(3))
    for content in ({"generator_lora": other, "generator_ema_lora": best, "critic_lora": judge},
                    {"critic_lora": judge, "generator_ema_lora": best, "generator_lora": other}):
        mapped = convert(content, wan)
        expected = best["base_model.model.blocks.0.ffn.0.lora_B.weight"] @ best["base_model.model.blocks.0.ffn.0.lora_A.weight"]
        torch.testing.assert_close(delta(mapped, "blocks.0.ffn.0"), expected)
        assert mapped.taken == 2 and len(mapped.aside) == 4 and mapped.check("it") == ""


def test_a_lora_of_a_judge_alone(wan):
    """Whoever names such a file means it."""
    assert convert({"critic_lora": pair("blocks.0.ffn.0", 64, 128)}, wan).taken == 2


def test_notes_in_a_file_are_no_keys(wan):
    mapped = convert({"generator_lora": pair("blocks.0.ffn.0", 64, 128), "step": 3000, "name": "run", "rate": 1e-5}, wan)
    assert mapped.check("it") == "" and mapped.taken == 2


def test_nothing_at_all(wan):
    with pytest.raises(ValueError, match=r"None of this LoRA's 0 keys belongs to it \(it holds no tensors\)"):
        convert({}, wan).check("it")


DAMAGED = {
    "another rank": {"lora_A.weight": (3, 128), "lora_B.weight": (64, 2)},
    "a row": {"lora_A.weight": (128,), "lora_B.weight": (64, 2)},
    "no dimensions": {"lora_A.weight": (), "lora_B.weight": ()},
    "two scales": {"lora_A.weight": (2, 128), "lora_B.weight": (64, 2), "alpha": (2,)},
    "flat factors": {"lokr_w1": (4,), "lokr_w2": (16, 64)},
    "factors of another rank": {"hada_w1_a": (64, 2), "hada_w1_b": (3, 128), "hada_w2_a": (64, 2), "hada_w2_b": (2, 128)},
    "a difference of nothing": {"diff": ()},
    "a lone factor": {"lokr_w1_a": (4, 2), "lokr_w2": (16, 64)},
}


@pytest.mark.parametrize("kind", DAMAGED)
@pytest.mark.parametrize("name", ["blocks.0.ffn.w1", "blocks.0.attn.qkv"])
def test_damaged_changes_are_left_and_named(longcat, kind, name):
    file = {f"{name}.{field}": torch.zeros(shape) for field, shape in DAMAGED[kind].items()}
    mapped = convert(file, longcat)
    assert mapped.taken == 0 and mapped.left == list(file)
    with pytest.raises(ValueError, match=rf"None of this LoRA's {len(file)} keys belongs to it \(it holds {next(iter(file))}"):
        mapped.check("it")


def test_a_ladder_of_another_rank_is_left(longcat):
    file = {"blocks.0.attn.qkv.lora_down.weight": torch.zeros(6, 64)}
    file |= {f"blocks.0.attn.qkv.lora_up.blocks.{number}.weight": torch.zeros(64, 3) for number in range(3)}
    assert convert(file, longcat).left == list(file)


def test_files_of_random_content(longcat):
    """Whatever a file holds, every key is accounted for, and what is taken has the shapes of the network."""
    chance = random.Random(12)
    fields = ["lora_A.weight", "lora_B.weight", "lora_A.default.weight", "lora_down.weight", "lora_up.weight", "lora_up.blocks.0.weight",
              "lora_up.blocks.1.weight", "lora_up.blocks.2.weight", "alpha", "alpha_scale", "dora_scale", "lora_mid.weight", "hada_w1_a",
              "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b",
              "lokr_t2", "diff", "diff_b", "set_weight", "reshape_weight", "weight", "oft_blocks"]
    layers = ["blocks.0.attn.qkv", "blocks.1.self_attn.q", "blocks.0.cross_attn.kv_linear", "blocks.1.ffn.w2", "x_embedder.proj", "other"]
    befores = ["", "transformer.", "base_model.model.", "diffusion_model.", "lora_unet_", "lora_te_", "critic.", "__", "."]
    taken = 0
    for _ in range(1500):
        file = {}
        for _ in range(chance.randint(1, 4)):
            layer, before = chance.choice(layers), chance.choice(befores)
            for field in chance.sample(fields, chance.randint(1, 4)) if chance.random() < 0.5 else chance.choice(
                    (fields[:2], fields[3:5], fields[12:16], fields[17:19], [fields[3], *fields[5:8]], ["diff"])):
                shape = [chance.choice((0, 1, 2, 3, 32, 64, 128, 192)) for _ in range(chance.choice((0, 1, 2, 2, 2, 2, 3, 5)))]
                if chance.random() < 0.7 and field.startswith(("lora_", "hada_w", "lokr_w", "diff")):
                    rows = {"blocks.0.attn.qkv": 192, "blocks.0.cross_attn.kv_linear": 128}.get(layer, 64)
                    shape = {"B": [rows, 2], "p": [rows, 2], "a": [rows, 2], "1": [4, 2], "2": [rows // 4, 32]}.get(
                        field.removesuffix(".weight")[-1], [2, 64])
                file[f"{before}{layer}.{field}"] = torch.zeros(()).expand(shape)
        mapped = convert(file, longcat)
        assert mapped.taken + len(mapped.left) + len(mapped.unfit) + len(mapped.text) + len(mapped.aside) == len(file)
        taken += mapped.taken
        for key, tensor in mapped.weights.items():
            name, _, field = key.partition(".lora_up")
            if field == ".weight" and f"{name}.reshape_weight" not in mapped.weights and f"{name}.lora_mid.weight" not in mapped.weights:
                down = mapped.weights[f"{name}.lora_down.weight"]
                assert (tensor.flatten(1) @ down.flatten(1)).shape == (longcat[name][0], math.prod(longcat[name][1:]))
    assert taken > 500
