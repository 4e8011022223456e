"""A whole LongCat-Video run through ComfyUI's sampler against the original pipeline's loop, in the test process itself.

tests/data/longcat.safetensors holds what the original made of four steps with its own KV cache, CFG-Zero*, and the tail of ten steps.
"""

import gc
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from comfyui_qvg.qvg.models.longcat import PUBLISHED
from comfyui_qvg.qvg.models.longcat_schedule import GUIDANCE, noise_levels
from comfyui_qvg.qvg.settings import QVGSettings

TOLERANCE = 1e-4
PREFIX = "model."
# of timesteps that bf16 holds, since the network rounds them to the type that it computes in
EXACT_SIGMAS = torch.tensor([0.992, 0.752, 0.5, 0.25, 0.0])


@pytest.fixture(scope="module")
def recorded():
    with safe_open(Path(__file__).parents[1] / "data" / "longcat.safetensors", "pt") as file:
        return {key: file.get_tensor(key).float() for key in file.keys()}, int(file.metadata()["given"])


@pytest.fixture(scope="module")
def loaded(comfy_modules, recorded):
    from comfyui_qvg.nodes.adapters import longcat

    state = {key.removeprefix(PREFIX): value for key, value in recorded[0].items() if key.startswith(PREFIX)}
    return longcat.load(PUBLISHED.convert(state))


def sample(loaded, recorded, preset=None, callback=None, sigmas=None):
    """Latents that the recorded run would have made, as the network sees them."""
    import comfy.samplers

    from comfyui_qvg.nodes.adapters import longcat

    tensors, given = recorded
    if preset is not None:
        loaded = longcat.quantize(loaded, QVGSettings.preset(preset))
    model = longcat.continue_from(loaded, loaded.model.process_latent_out(tensors["x"][:, :, :given]))
    guider = comfy.samplers.CFGGuider(model)
    # ComfyUI's text encoder leaves zeros where there is no text
    negative, positive = (tensors["context"] * tensors["mask"][..., None]).split(1)
    guider.set_conds([[positive, {}]], [[negative, {}]])
    guider.set_cfg(GUIDANCE)
    noise = tensors["x"][:, :, given:]
    sampler, sigmas = comfy.samplers.sampler_object("euler"), noise_levels(4, tail=True) if sigmas is None else sigmas
    made = guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, callback=callback, disable_pbar=True)
    return loaded.model.process_latent_in(made)


def test_the_original_loop(loaded, recorded):
    """Sign, timesteps, guidance and order of the conditions, padding, given frames and positions: all at once."""
    expected = recorded[0]["continued"]
    assert expected.std() > 1
    assert (sample(loaded, recorded) - expected).abs().amax() < TOLERANCE * expected.abs().amax()


def test_a_quantized_history_is_near(loaded, recorded):
    expected = recorded[0]["continued"]
    errors = [float((sample(loaded, recorded, preset) - expected).square().mean()) for preset in ("quality", "balanced", "smallest")]
    assert errors == sorted(errors)
    assert 0 < errors[0] < 0.1 * expected.square().mean()


def held_bytes():
    """Bytes of all uint8 and int16 tensors alive: codes and E4M3 numbers are kept in no other types, and core has none."""
    gc.collect()
    return sum(thing.nbytes for thing in gc.get_objects() if type(thing) is torch.Tensor and thing.dtype in (torch.uint8, torch.int16))


class Stop(Exception):
    pass


def test_nothing_of_the_cache_outlives_a_run(loaded, recorded):
    before, during = held_bytes(), []

    def stop(*_):
        during.append(held_bytes())
        raise Stop

    with pytest.raises(Stop):
        sample(loaded, recorded, "balanced", stop)
    assert during[0] > before == held_bytes()
    sample(loaded, recorded, "balanced")
    assert held_bytes() == before


def relative_error(made, expected):
    return float((made - expected).square().mean() / expected.square().mean()) ** 0.5


def weights(recorded, dtype):
    return PUBLISHED.convert({key.removeprefix(PREFIX): value.to(dtype) for key, value in recorded[0].items() if key.startswith(PREFIX)})


def scaled(state, parts):
    """The state dict with weights whose name has one of `parts` in E4M3 and a scale beside each."""
    found = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}
    for name, tensor in state.items():
        if tensor.ndim == 2 and any(part in name for part in parts):
            scale = tensor.float().abs().amax() / 448
            found |= {name: (tensor / scale).to(torch.float8_e4m3fn), name.replace(".weight", ".scale_weight"): scale}
        else:
            found[name] = tensor
    return found


def test_computing_in_bf16_as_a_gpu_does(loaded, recorded, monkeypatch):
    """Modulation, the timestep's embedding and the output stay in float32 although everything around them does not."""
    import comfy.model_management
    import comfy.ops

    from comfyui_qvg.nodes.adapters import longcat

    expected = sample(loaded, recorded, sigmas=EXACT_SIGMAS)
    monkeypatch.setattr(comfy.model_management, "unet_manual_cast", lambda *_: None)
    small = longcat.load(weights(recorded, torch.bfloat16), dtype=torch.bfloat16)
    network, seen = small.model.diffusion_model, set()
    assert type(network.blocks[0].self_attn.q) is comfy.ops.disable_weight_init.Linear
    for name, layer in network.named_modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(lambda _, given, made, name=name: seen.add((name, given[0].dtype, made.dtype)))
    assert relative_error(sample(small, recorded, sigmas=EXACT_SIGMAS), expected) < 0.05
    exact = {name for name, given, made in seen if given == made == torch.float32}
    assert len(seen) == len({name for name, *_ in seen}), "one type each"
    assert {name.split(".")[0] if "modulation" not in name else "modulation" for name in exact} == {"time_embedding", "modulation", "head"}


@pytest.mark.parametrize("layout", ["ours", "published"])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_scaled_fp8_weights(loaded, recorded, monkeypatch, compute, layout):
    """Bulk weights in E4M3 with a scale each, as in the files that circulate, or made from the published layout with its fused layers."""
    import comfy.model_management

    from comfyui_qvg.nodes.adapters import longcat

    official = {key.removeprefix(PREFIX): value.to(torch.bfloat16) for key, value in recorded[0].items() if key.startswith(PREFIX)}
    state = PUBLISHED.convert(scaled(official if layout == "published" else weights(recorded, torch.bfloat16), ("attn.", ".ffn.")))
    monkeypatch.setattr(comfy.model_management, "unet_manual_cast", lambda *_: compute)
    small = longcat.load(state)
    assert small.model.get_dtype_inference() == compute
    expected = sample(loaded, recorded, sigmas=EXACT_SIGMAS)
    assert relative_error(sample(small, recorded, sigmas=EXACT_SIGMAS), expected) < 0.1


def test_fp8_products_leave_float32_layers_alone(loaded, recorded, monkeypatch):
    """A card that multiplies FP8 rounds the input of every scaled layer, except where modulation, timestep and output are computed."""
    import comfy.model_management
    import comfy.ops

    from comfyui_qvg.nodes.adapters import longcat

    monkeypatch.setattr(comfy.model_management, "unet_manual_cast", lambda *_: torch.bfloat16)
    monkeypatch.setattr(comfy.model_management, "supports_fp8_compute", lambda *_: True)
    small = longcat.load(scaled(weights(recorded, torch.bfloat16), ("_attn.", ".ffn.", "modulation", "time_embedding", "head.")))
    network, rounded, exact = small.model.diffusion_model, set(), set()
    for name, layer in network.named_modules():
        if getattr(layer, "layout_type", None) is not None:
            def watched(given, *args, name=name, plain=layer.forward_comfy_cast_weights, **kwargs):
                (rounded if isinstance(given, comfy.ops.QuantizedTensor) else exact).add((name, given.dtype))
                return plain(given, *args, **kwargs)

            layer.forward_comfy_cast_weights = watched
    expected = sample(loaded, recorded, sigmas=EXACT_SIGMAS)
    assert relative_error(sample(small, recorded, sigmas=EXACT_SIGMAS), expected) < 0.2
    assert len(rounded) == 2 * 11 and all("_attn." in name or ".ffn." in name for name, _ in rounded)
    assert {name for name, _ in exact} == {
        "time_embedding.mlp.0", "time_embedding.mlp.2", "head.head", "head.modulation.1", "blocks.0.modulation.1", "blocks.1.modulation.1"}
    assert {dtype for _, dtype in exact} == {torch.float32}


# official linear layers of a block, and how many parts of the network here each holds
FUSED = {"attn.qkv": 3, "cross_attn.kv_linear": 2}
PLAIN = ("attn.proj", "cross_attn.q_linear", "cross_attn.proj", "ffn.w1", "ffn.w2", "ffn.w3", "adaLN_modulation.1")
OUTSIDE = ("t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.y_proj.0", "y_embedder.y_proj.2", "final_layer.linear",
           "final_layer.adaLN_modulation.1")


def published_lora(official):
    """A LoRA of every linear layer as the authors write them, and by how much it changes each official weight."""
    draw, lora, change = torch.Generator().manual_seed(4), {}, {}
    layers = {f"blocks.{number}.{name}": count for number in range(2) for name, count in (FUSED | dict.fromkeys(PLAIN, 1)).items()}
    for name, count in (layers | dict.fromkeys(OUTSIDE, 1)).items():
        outer, inner = official[f"{name}.weight"].shape
        down, scale = torch.randn(2 * count, inner, generator=draw), 0.25
        ups = [torch.randn(outer // count, 2, generator=draw) for _ in range(count)]
        prefix = "lora___lorahyphen___" + name.replace(".", "___lorahyphen___")
        lora |= {f"{prefix}.lora_down.weight": down, f"{prefix}.alpha_scale": torch.tensor(scale)}
        if count == 1:
            lora[f"{prefix}.lora_up.weight"] = ups[0]
        else:
            lora |= {f"{prefix}.lora_up.blocks.{number}.weight": up for number, up in enumerate(ups)}
        change[f"{name}.weight"] = scale * torch.cat([up @ part for up, part in zip(ups, down.chunk(count))])
    return lora, change


def named_lora(change, form):
    """The same changes with the names of the network here, in one of the forms that circulate; of full rank, so that nothing is lost."""
    lora = {}
    for name, matrix in PUBLISHED.convert(change).items():
        name, inner = name.removesuffix(".weight"), matrix.shape[1]
        up, down = matrix.contiguous(), torch.eye(inner)
        if form == "kohya":
            key = "lora_unet_" + name.replace(".", "_")
            lora |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down, f"{key}.alpha": torch.tensor(float(inner))}
        else:
            lora |= {f"diffusion_model.{name}.lora_B.weight": up, f"diffusion_model.{name}.lora_A.weight": down}
    return lora


@pytest.mark.parametrize("form", ["published", "peft", "kohya"])
def test_loras_reach_every_layer_through_cores_loader(loaded, recorded, form, caplog):
    """Distillation and refinement LoRAs have one format: no key is left over, and every weight moves by what the authors' code adds."""
    import comfy.lora
    import comfy.sd

    official = {key.removeprefix(PREFIX): value for key, value in recorded[0].items() if key.startswith(PREFIX)}
    lora, change = published_lora(official)
    if form != "published":
        lora = named_lora(change, form)
    patched = comfy.sd.load_lora_for_models(loaded, None, lora, 0.5, 0.0)[0]
    assert "not loaded" not in caplog.text and "NOT LOADED" not in caplog.text
    before, change = loaded.model.diffusion_model.state_dict(), PUBLISHED.convert(change)
    assert len(patched.patches) == len(change) == sum(name.endswith("weight") and tensor.ndim == 2 for name, tensor in before.items())
    for name, moved in change.items():
        key = f"diffusion_model.{name}"
        after = comfy.lora.calculate_weight(patched.patches[key], before[name].clone(), key)
        torch.testing.assert_close(after, before[name] + 0.5 * moved, rtol=1e-4, atol=1e-4)


def test_wrappers_of_the_network_are_asked(loaded, recorded):
    """What wraps a diffusion model in core (EasyCache and its kind) wraps this one."""
    from comfy.patcher_extension import WrappersMP

    from comfyui_qvg.nodes.adapters import longcat_given

    seen = []

    def watch(executor, x, timestep, context, transformer_options, **kwargs):
        seen.append((tuple(x.shape), longcat_given.GIVEN in transformer_options))
        return executor(x, timestep, context, transformer_options, **kwargs)

    watched = loaded.clone()
    watched.add_wrapper(WrappersMP.DIFFUSION_MODEL, watch)
    plain = sample(loaded, recorded, sigmas=EXACT_SIGMAS)
    assert torch.equal(sample(watched, recorded, sigmas=EXACT_SIGMAS), plain)
    assert len(seen) == len(EXACT_SIGMAS) - 1 and all(given for _, given in seen)


def test_a_cache_that_exceeds_the_device_is_refused(loaded, recorded, monkeypatch):
    """Before anything is loaded, and with the presets that would fit."""
    import comfy.model_management

    monkeypatch.setattr(comfy.model_management, "get_total_memory", lambda *_: 15_000)
    with pytest.raises(ValueError, match=r"of 2 given latent frames needs 15\.\d+ KiB.* in all\. Choose the preset .*Paper of"):
        sample(loaded, recorded, "off")
    monkeypatch.setattr(comfy.model_management, "get_total_memory", lambda *_: 100)
    with pytest.raises(ValueError, match=r"in all\. Choose fewer given_frames"):
        sample(loaded, recorded, "balanced")


def test_a_model_on_several_gpus_is_refused(loaded, recorded):
    spread = loaded.clone()
    spread.set_additional_models("multigpu", [loaded.clone()])
    with pytest.raises(ValueError, match="spreads the model over several GPUs"):
        sample(spread, recorded)
