"""A whole LongCat-Video run through ComfyUI's sampler against the original pipeline's loop, in the test process itself.

tests/data/longcat.safetensors holds what the original made of four steps with its own KV cache, CFG-Zero*, and the tail of ten steps.
"""

import gc
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from comfyui_qvg.qvg.models.longcat import split_layout
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
    return longcat.load(split_layout(state))


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
    """Bytes of all uint8 tensors alive: bit planes and E4M3 numbers are kept in no other type, and core has none."""
    gc.collect()
    return sum(thing.nbytes for thing in gc.get_objects() if type(thing) is torch.Tensor and thing.dtype == torch.uint8)


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
    return split_layout({key.removeprefix(PREFIX): value.to(dtype) for key, value in recorded[0].items() if key.startswith(PREFIX)})


def test_computing_in_bf16_as_a_gpu_does(loaded, recorded, monkeypatch):
    """Modulation, the timestep's embedding and the output stay in float32 although everything around them does not."""
    import comfy.model_management
    import comfy.ops

    from comfyui_qvg.nodes.adapters import longcat

    expected = sample(loaded, recorded, sigmas=EXACT_SIGMAS)
    monkeypatch.setattr(comfy.model_management, "unet_manual_cast", lambda *_: None)
    small = longcat.load(weights(recorded, torch.bfloat16), torch.bfloat16)
    network, seen = small.model.diffusion_model, set()
    assert type(network.blocks[0].self_attn.q) is comfy.ops.disable_weight_init.Linear
    for name, layer in network.named_modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(lambda _, given, made, name=name: seen.add((name, given[0].dtype, made.dtype)))
    assert relative_error(sample(small, recorded, sigmas=EXACT_SIGMAS), expected) < 0.05
    exact = {name for name, given, made in seen if given == made == torch.float32}
    assert len(seen) == len({name for name, *_ in seen}), "one type each"
    assert {name.split(".")[0] if "modulation" not in name else "modulation" for name in exact} == {"time_embedding", "modulation", "head"}


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_scaled_fp8_weights(loaded, recorded, monkeypatch, compute):
    """The layout of files that circulate: bulk weights in E4M3 with a scale each."""
    import comfy.model_management

    from comfyui_qvg.nodes.adapters import longcat

    state = {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)}
    for name, tensor in weights(recorded, torch.bfloat16).items():
        if tensor.ndim == 2 and any(part in name for part in ("_attn.", ".ffn.")):
            scale = tensor.float().abs().amax() / 448
            state |= {name: (tensor / scale).to(torch.float8_e4m3fn), name.replace(".weight", ".scale_weight"): scale}
        else:
            state[name] = tensor
    monkeypatch.setattr(comfy.model_management, "unet_manual_cast", lambda *_: compute)
    small = longcat.load(state)
    assert small.model.get_dtype_inference() == compute
    expected = sample(loaded, recorded, sigmas=EXACT_SIGMAS)
    assert relative_error(sample(small, recorded, sigmas=EXACT_SIGMAS), expected) < 0.1
