"""torch.compile on either side of the pack's nodes, of the whole network or of its blocks: the video is the uncompiled one."""

import pytest
import torch

from comfyui_qvg.qvg.settings import QVGSettings
from in_process import causal_model, longcat_model, sample_causal, sample_longcat, sample_walk, world_model

WAYS = [("whole", "compiled last"), ("whole", "compiled first"), ("blocks", "compiled last"), ("patched", "compiled first")]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def causal(comfy_modules):
    return causal_model()


@pytest.fixture(scope="module")
def longcat(comfy_modules):
    return longcat_model()


@pytest.fixture(scope="module")
def world(comfy_modules):
    return world_model("5b")


@pytest.fixture(autouse=True)
def nothing_compiled_before(comfy_modules):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def compiled(model, how, backend="eager", **more):
    """As core's TorchCompileModel does it, of the "whole" network or of its "blocks"; or "patched", as older nodes did."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

    model = model.clone(disable_dynamic=True)
    blocks = [f"diffusion_model.blocks.{layer}" for layer in range(2)]
    if how == "patched":
        for name in blocks:
            model.add_object_patch(name, torch.compile(model.get_model_object(name), backend=backend))
    else:
        set_torch_compile_wrapper(model, backend, {"guard_filter_fn": skip_torch_compile_dict},
                                  keys=blocks if how == "blocks" else ["diffusion_model"], **more)
    return model


def quantized(model, preset="balanced"):
    from comfyui_qvg.nodes.adapters.families import adapter_of, family_of

    family = family_of(model.get_model_object("diffusion_model"))
    return adapter_of(family).quantize(model, QVGSettings.preset(preset))


def check(model, sample, reference):
    found = sample(model)
    assert (found - reference).abs().max() <= 1e-5 * reference.abs().max()
    # graphs are of places in the network, shared by its layers and passes; of the cache there is none
    assert 0 < graphs() <= 32


@pytest.mark.parametrize(("how", "order"), WAYS)
def test_causal_wan(causal, how, order):
    model = compiled(quantized(causal), how) if order == "compiled last" else quantized(compiled(causal, how))
    check(model, sample_causal, sample_causal(quantized(causal)))


def test_causal_wan_with_its_own_cache(causal):
    check(compiled(quantized(causal, "off"), "whole"), sample_causal, sample_causal(causal))


@pytest.mark.parametrize("how", ["whole", "patched"])
def test_the_packs_sampler(causal, how):
    from comfyui_qvg.nodes.long_video import ARSampler, Options

    def sample(model):
        return sample_causal(model, cfg=3.0, sampler=ARSampler(Options()))

    reference = sample(quantized(causal))
    check(compiled(quantized(causal), how), sample, reference)


@pytest.mark.parametrize(("how", "order"), WAYS)
def test_longcat(longcat, how, order):
    model = compiled(quantized(longcat), how) if order == "compiled last" else quantized(compiled(longcat, how))
    check(model, sample_longcat, sample_longcat(quantized(longcat)))


@pytest.mark.parametrize(("how", "order"), WAYS)
def test_worldplay(world, how, order):
    model = compiled(quantized(world), how) if order == "compiled last" else quantized(compiled(world, how))
    check(model, sample_walk, sample_walk(quantized(world)))


def test_longcat_continues_after_a_segment_from_text(longcat):
    """Code that was compiled where nothing is given holds for given frames, and the other way round."""
    model = compiled(quantized(longcat), "whole")
    for given in (0, 3, 0):
        reference = sample_longcat(quantized(longcat), given=given)
        assert (sample_longcat(model, given=given) - reference).abs().max() <= 1e-5 * reference.abs().max()


def test_a_second_run_compiles_nothing(causal):
    model = compiled(quantized(causal), "blocks")
    sample_causal(model)
    before = graphs()
    sample_causal(model)
    assert graphs() == before > 0


def test_core_node_with_its_own_compiler(longcat):
    """TorchCompileModel as a graph runs it, with C++ that it makes here: of one network, because that takes a minute."""
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    (node,) = TorchCompileModel.execute(quantized(longcat), "inductor").args
    check(node, sample_longcat, sample_longcat(quantized(longcat)))


@pytest.mark.parametrize(("family", "sample"), [("causal", sample_causal), ("longcat", sample_longcat), ("world", sample_walk)])
def test_code_in_one_piece_is_refused(family, sample, request):
    model = request.getfixturevalue(family)
    steps = []
    with pytest.raises(ValueError, match="Turn fullgraph off"):
        sample(compiled(quantized(model), "whole", fullgraph=True), callback=lambda *_: steps.append(None))
    assert not steps
