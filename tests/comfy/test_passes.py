"""Which pass stores, known without asking the device: against what the device says, in real runs of core's sampler."""

from types import SimpleNamespace

import pytest
import torch

from comfyui_qvg.qvg.demo import METADATA, PROMPTS, TEXT_DIM, embed_prompt
from comfyui_qvg.qvg.models.wan import CausalWan, WanSizes
from comfyui_qvg.qvg.settings import QVGSettings


def core(function: str = "sample_ar_video"):
    return SimpleNamespace(sampler_function=SimpleNamespace(__name__=function))


@pytest.mark.parametrize("given", [False, True])
def test_the_order_of_passes(comfy_modules, given):
    from comfyui_qvg.nodes.adapters.passes import Passes

    passes = Passes()
    passes.expect(core(), torch.tensor([1.0, 0.9, 0.5, 0.0]), given)
    # a tensor without numbers: whoever looks into it gets an error, as whoever looks into one on a GPU waits
    level, found = torch.empty(1, 3, device="meta"), []
    for number in range(9):
        assert passes.predict_noise(lambda *arguments: arguments, number) == (number,)
        found += [passes.is_clean(level)] * (1 + number % 2)  # guidance may call the network twice in a pass
        assert found[-1] == passes.clean
    order = [True] * given + [False, False, False, True] * 3
    assert found == [clean for number, clean in enumerate(order[:9]) for _ in range(1 + number % 2)]


def test_other_samplers_are_asked(comfy_modules):
    from comfyui_qvg.nodes.adapters.passes import Passes

    passes = Passes()
    passes.expect(core("sample_of_another_pack"), torch.tensor([1.0, 0.0]), False)
    passes.predict_noise(lambda: None)
    assert passes.clean is None
    assert passes.is_clean(torch.zeros(1, 3)) and not passes.is_clean(torch.tensor([[0.0, 5.0]]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_is_not_waited_for(comfy_modules):
    from comfyui_qvg.nodes.adapters.passes import Passes

    passes, found = Passes(), []
    passes.expect(core(), torch.tensor([1.0, 0.5, 0.0]), False)
    levels = [torch.full((1, 3), level, device="cuda") for level in (1000.0, 500.0, 0.0)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for level in levels:
            passes.predict_noise(lambda: None)
            found.append(passes.is_clean(level))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found == [False, False, True]
    torch.cuda.synchronize()
    passes.predict_noise(lambda: None)
    with pytest.raises(RuntimeError, match="do not come in the order"):
        for _ in range(2):
            passes.is_clean(levels[2])
            torch.cuda.synchronize()


@pytest.mark.parametrize("frames", [0, 1], ids=["text", "start image"])
def test_the_order_is_what_the_noise_levels_say(comfy_modules, frames, monkeypatch):
    """Two runs of one patched model, the second after one that was broken off in the middle of a chunk."""
    import comfy.sample
    import comfy.samplers
    import comfy.sd

    from comfyui_qvg.nodes.adapters.passes import Passes
    from comfyui_qvg.nodes.adapters.wan import quantize

    draw = torch.Generator().manual_seed(2)
    state = CausalWan(WanSizes(dim=256, ffn_dim=256, layers=1, text_dim=TEXT_DIM)).state_dict()
    state = {name: 0.05 * torch.randn(tensor.shape, generator=draw) for name, tensor in state.items()}
    model = quantize(comfy.sd.load_diffusion_model_state_dict(state, metadata=METADATA), QVGSettings.preset("balanced"))
    if frames:
        model.model_options["transformer_options"]["ar_config"] = {"initial_latent": torch.randn(1, 16, frames, 8, 12, generator=draw)}
    found = []
    real = Passes.is_clean
    monkeypatch.setattr(Passes, "is_clean", lambda passes, level: found.append((passes.clean, real(passes, level))) or found[-1][1])

    def run(stop=0):
        def callback(*_):
            if len(found) == stop:
                raise InterruptedError

        condition = [[embed_prompt(PROMPTS[0]), {}]]
        latent = torch.zeros(1, 16, 6 + frames, 8, 12)
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
        sampler = comfy.samplers.ksampler("ar_video", {"num_frame_per_block": 3})
        comfy.sample.sample_custom(model, noise, 1.0, sampler, torch.tensor([1.0, 0.9, 0.6, 0.0]), condition, condition, latent,
                                   callback=callback, disable_pbar=True, seed=0)

    with pytest.raises(InterruptedError):
        run(stop=2 + bool(frames))
    found.clear()
    run()
    assert found == [(clean, clean) for clean in [True] * bool(frames) + [False, False, False, True] * 2]
