"""Names of weights in other people's checkpoints: every container and wrapper, and what stands beside a fused layer's weight."""

import itertools

import pytest
import torch
from safetensors.torch import save_file

from comfyui_qvg.qvg.models.checkpoint import open_checkpoint
from comfyui_qvg.qvg.models.longcat import PUBLISHED, LongCat, LongCatSizes
from comfyui_qvg.qvg.models.names import DEPTH, find_network, tensors_in
from comfyui_qvg.qvg.models.wan import CausalWan, WanSizes

CONTAINERS = ((), ("generator_ema",), ("generator",), ("model",), ("state_dict",), ("module",), ("ema_model",), ("weights",),
              ("state_dict", "generator"), ("checkpoint", "generator_ema", "model"), ("a", "b", "c", "d"))
PREFIXES = ("", "model.", "module.", "_orig_mod.", "_fsdp_wrapped_module.", "model.diffusion_model.", "module.model._orig_mod.",
            "model._fsdp_wrapped_module._orig_mod.", "net.", "pipe.dit.", "generator.model.")


def random_state(network):
    draw = torch.Generator().manual_seed(5)
    return {name: torch.randn(tensor.shape, generator=draw) for name, tensor in network.state_dict().items()}


@pytest.fixture(scope="module")
def wan():
    return random_state(CausalWan(WanSizes(dim=128, ffn_dim=64, layers=2, text_dim=32)))


@pytest.fixture(scope="module")
def longcat():
    return random_state(LongCat(LongCatSizes(dim=64, head_dim=16, ffn_dim=32, layers=2, text_dim=32, time_dim=16, freq_dim=32)))


def published(state):
    """A state dict of ours under LongCat-Video's published names, fused layers put together."""
    parts = {}
    for name, tensor in state.items():
        fused, place, count = PUBLISHED.published_name(name)
        parts.setdefault(fused, [None] * count)[place] = tensor
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def nested(state, container):
    for key in reversed(container):
        state = {key: state, "step": 600, "name": "run"}
    return state


def equal(state, expected):
    return state.keys() == expected.keys() and all(torch.equal(state[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("layout", ["wan", "longcat", "published longcat"])
@pytest.mark.parametrize("container", CONTAINERS, ids=".".join)
def test_every_container_and_prefix(tmp_path, wan, longcat, layout, container):
    expected = wan if layout == "wan" else longcat
    state = published(longcat) if layout.startswith("published") else expected
    for prefix in PREFIXES:
        content = nested({prefix + name: tensor for name, tensor in state.items()}, container)
        found = find_network(content)
        assert equal(found.state, state) and found.left == (), prefix
        assert found.container.startswith(".".join(container))
    path = tmp_path / "trained.pt"
    torch.save(content, path)
    opened, description = open_checkpoint(path)
    assert equal(opened, expected) and (description.left, description.container) == (0, found.container)


@pytest.mark.parametrize("wrapper", ["_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod."])
def test_wrappers_within_a_name(wan, wrapper):
    inside = {name.replace("blocks.0.", f"blocks.0.{wrapper}").replace("ffn.", f"ffn.{wrapper}"): t for name, t in wan.items()}
    assert equal(find_network(inside).state, wan)


@pytest.mark.parametrize(("best", "other"), [
    ("generator_ema", "generator"), ("generator", "critic"), ("model_ema", "model"), ("generator", "model"), ("ema", "generator"),
    ("model", "fake_score"), ("generator", "critic_ema"), ("anything", "teacher")])
@pytest.mark.parametrize("flat", [False, True])
def test_the_network_that_samples_is_taken(wan, best, other, flat):
    wrong = {name: tensor + 1 for name, tensor in wan.items()}
    for pair in itertools.permutations([(best, wan), (other, wrong)]):
        content = {f"{key}.{name}": t for key, state in pair for name, t in state.items()} if flat else dict(pair)
        assert equal(find_network(content).state, wan)


def test_a_whole_network_goes_before_blocks_of_another(wan):
    """Blocks without an embedding are an adapter, or part of a network, whatever they are called."""
    part = {f"generator.{name}": tensor + 1 for name, tensor in wan.items() if name.startswith("blocks.")}
    assert equal(find_network(part | {f"model.{name}": tensor for name, tensor in wan.items()}).state, wan)
    assert equal(find_network({"generator": part, "net": wan}).state, wan)


def test_two_networks_without_a_telling_name_are_refused(tmp_path, wan):
    path = tmp_path / "two.pt"
    torch.save({"first": wan, "second": dict(wan)}, path)
    with pytest.raises(ValueError, match=r"two\.pt cannot be opened\. It holds several networks, second and first, .*Keep one"):
        open_checkpoint(path)


def test_what_lies_beside_the_network_is_counted(tmp_path, wan):
    path = tmp_path / "all_in_one.safetensors"
    beside = {"text_encoder.shared.weight": torch.zeros(2), "vae.decoder.conv1.weight": torch.zeros(2)}
    save_file({f"model.diffusion_model.{name}": t for name, t in wan.items()} | beside, path)
    state, found = open_checkpoint(path)
    assert equal(state, wan) and found.left == 2 and "2 other tensors were not loaded" in str(found)


def test_a_base_model_with_its_lora_beside_it(tmp_path, wan):
    path = tmp_path / "both.pt"
    torch.save({"generator_lora": {f"base_model.model.{name}": t for name, t in wan.items()}, "generator": wan}, path)
    assert equal(open_checkpoint(path)[0], wan)
    torch.save({"generator_lora": {f"base_model.model.{name}": t for name, t in wan.items()}}, path)
    with pytest.raises(ValueError, match="is a LoRA"):
        open_checkpoint(path)


def test_a_dict_that_is_met_often_is_read_once():
    shared = {"weight": torch.zeros(1)}
    for _ in range(5):
        shared = {str(number): shared for number in range(4)}
    assert len(list(tensors_in(shared))) == 1


def test_dicts_within_each_other_end(tmp_path, wan):
    loop = {}
    loop["again"] = loop
    assert find_network(loop).state == {}
    deep = nested(wan, ("x",) * (DEPTH + 1))
    assert find_network(deep).state == {}
    path = tmp_path / "deep.pt"
    torch.save(deep, path)
    with pytest.raises(ValueError, match=r"is not a video model of a known family"):
        open_checkpoint(path)


def quantized(state, block):
    """Weights in E4M3 with a scale for each `block` rows (0: one a layer), named as the pairs of names in files that circulate are."""
    found = {}
    for number, (name, tensor) in enumerate(state.items()):
        if tensor.ndim != 2:
            found[name] = tensor
            continue
        rows = block or tensor.shape[0]
        blocks = tensor.unflatten(0, (-1, rows)).abs().amax((1, 2)) / 448
        scale = blocks[0] if not block else blocks[:, None] if number % 2 else blocks
        layer = name.removesuffix(".weight")
        found[name] = (tensor / blocks.repeat_interleave(rows)[:, None]).to(torch.float8_e4m3fn)
        found[f"{layer}.{'scale_weight' if number % 2 else 'weight_scale'}"] = scale
        found[f"{layer}.input_scale"] = torch.full((tensor.shape[1],), 2.0) if block else torch.tensor(2.0)
        found[f"{layer}.comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    return found


def dequantized(state):
    values = {}
    for name, tensor in state.items():
        if tensor.dtype is not torch.float8_e4m3fn:
            continue
        layer = name.removesuffix(".weight")
        scale, = (state[key] for key in (f"{layer}.scale_weight", f"{layer}.weight_scale") if key in state)
        scale = scale.reshape(-1)
        values[name] = tensor.float() * scale.repeat_interleave(tensor.shape[0] // scale.numel())[:, None]
    return values


@pytest.mark.parametrize("block", [0, 1, 16])
def test_side_tensors_follow_the_parts_of_a_fused_layer(tmp_path, longcat, block):
    path = tmp_path / "fused_fp8.safetensors"
    fused = quantized(published(longcat), block)
    save_file(fused, path)
    state, found = open_checkpoint(path)
    expected, values = PUBLISHED.convert(dequantized(fused)), dequantized(state)
    assert values.keys() == {name for name, tensor in longcat.items() if tensor.ndim == 2} == expected.keys()
    for name, value in values.items():
        assert torch.equal(value, expected[name])
        layer = name.removesuffix(".weight")
        assert bytes(state[f"{layer}.comfy_quant"].tolist()) == b'{"format": "float8_e4m3fn"}'
        assert state[f"{layer}.input_scale"].shape == ((value.shape[1],) if block else ())
    assert found.layers == 2 and not any("qkv" in name or "kv_linear" in name for name in state)


def test_scales_of_blocks_of_columns(longcat):
    """One long row of scales, so many for each row of the weight."""
    name = "blocks.0.attn.qkv"
    state = published(longcat) | {f"{name}.weight_scale": torch.arange(192 * 4.0)}
    for place, part in enumerate("qkv"):
        assert torch.equal(PUBLISHED.convert(state)[f"blocks.0.self_attn.{part}.weight_scale"], torch.arange(64 * 4.0) + 64 * 4 * place)


@pytest.mark.parametrize("shape", [(64 * 3 - 1,), (5,), ()])
def test_rows_that_cannot_be_shared_out_are_named(tmp_path, longcat, shape):
    path = tmp_path / "damaged.safetensors"
    save_file(published(longcat) | {"blocks.0.attn.qkv.bias": torch.zeros(shape)}, path)
    with pytest.raises(ValueError, match=r"damaged\.safetensors cannot be opened\. blocks\.0\.attn\.qkv\.bias has the shape .* 3 layers"):
        open_checkpoint(path)
