"""HY-WorldPlay 5B against the original code, below 1e-4 in float32, and its checkpoints.

tests/data/worldplay_wan.safetensors holds a small random model (three layers of three heads of 8 channels), a video of 24 latent frames
with cameras and actions, and what the original network answered: for a first chunk, for one with a start image, and for chunks that attend
to context frames of a pass at timestep 14, contiguous ones and retrieved ones. Also the six chunks that the original pipeline made from `x`
as noise, with a start image and without, and the parameter names of the released model.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from comfyui_qvg.qvg.attention.functions import sdpa
from comfyui_qvg.qvg.attention.prope import Prope
from comfyui_qvg.qvg.attention.rope import NoRope, Rope
from comfyui_qvg.qvg.attention.world import View, WorldAttention
from comfyui_qvg.qvg.cache.kv_cache import KVCache
from comfyui_qvg.qvg.models import open_checkpoint
from comfyui_qvg.qvg.models.lora import convert
from comfyui_qvg.qvg.models.wan import CausalWan, WanSizes
from comfyui_qvg.qvg.models.worldplay_wan import HY_WORLDPLAY_5B, PUBLISHED, WorldWan, WorldWanSizes, is_world_wan
from comfyui_qvg.qvg.settings import QVGSettings

TOLERANCE = 1e-4
PREFIX = "model."
HEAD_DIM, GRID, FINISHED = 8, (2, 3), 14.0


@pytest.fixture(scope="module")
def recorded():
    """Tensors by name, and the file's metadata."""
    with safe_open(Path(__file__).parent / "data" / "worldplay_wan.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()


@pytest.fixture(scope="module")
def official(recorded):
    return {key.removeprefix(PREFIX): value for key, value in recorded[0].items() if key.startswith(PREFIX)}


@pytest.fixture(scope="module")
def model(official):
    state = PUBLISHED.convert(official)
    model = WorldWan(replace(WorldWanSizes.read(state), head_dim=HEAD_DIM))
    model.load_state_dict(state)
    return model.requires_grad_(False)


class Memory:
    """Attention of one pass, to the keys and values of context frames and to its own, everything in full precision.

    Positions number context frames from 0 and go on through the pass.
    """

    def __init__(self, recorded, frames, context=None):
        self.frames, self.context, self.held = frames, context, {}
        cameras = recorded["viewmats"][frames]
        self.prope = Prope(HEAD_DIM, GRID, cameras, recorded["intrinsics"].expand(len(cameras), 3, 3))
        self.first = len(context.frames) if context else 0
        self.rope = Rope(HEAD_DIM, GRID)

    def keys_values(self, layer):
        """Keys with RoPE, values, keys and values of PRoPE, of what a layer holds."""
        k, v = self.held[layer]
        return self.rope.apply(k, self.first, len(self.frames)), v, self.prope.keys(k), self.prope.values(v)

    def __call__(self, layer, q, k, v):
        self.held[layer] = k, v
        seen = self.keys_values(layer)
        if self.context:
            seen = [torch.cat(both, 1) for both in zip(self.context.keys_values(layer), seen)]
        out = sdpa(self.rope.apply(q, self.first, len(self.frames)), *seen[:2])
        return out, self.prope.outputs(sdpa(self.prope.queries(q), *seen[2:]))


def asked(tensors, frames, timestep):
    return tensors["x"][:, :, frames], torch.as_tensor(timestep).expand(1, len(frames)), tensors["context"]


def remembered(model, tensors, frames):
    """The context that a pass over finished frames leaves."""
    memory = Memory(tensors, frames)
    model.encode(*asked(tensors, frames, FINISHED), memory, action=tensors["action"][None, frames])
    return memory


def continued(model, tensors, frames, timestep, context=None):
    memory = Memory(tensors, frames, context)
    return model(*asked(tensors, frames, timestep), memory, action=tensors["action"][None, frames])


FIRST, SECOND, LAST = list(range(4)), list(range(8, 12)), list(range(20, 24))
# frames that the last chunk sees: the newest twelve, and the four that saw most of what it will see
CHOSEN = [*range(4), *range(8, 20)]


@pytest.mark.parametrize(("name", "timestep"), [("plain", 1000.0), ("image", [FINISHED, 960.0, 960.0, 960.0])])
def test_a_first_chunk(recorded, model, name, timestep):
    """From noise, and with a start image that has the timestep of a finished frame."""
    expected = recorded[0][name]
    assert expected.std() > 1
    flow = continued(model, recorded[0], FIRST, timestep)
    assert flow.dtype == torch.float32 and (flow - expected).abs().amax() < TOLERANCE


@pytest.mark.parametrize(("name", "history", "frames", "timestep"), [
    ("continued", list(range(8)), SECOND, 888.8889), ("retrieved", CHOSEN, LAST, 727.2728)])
def test_a_chunk_after_its_context(recorded, model, name, history, frames, timestep):
    """The context comes from a pass of its own; positions are those of a video that has no other frames."""
    tensors = recorded[0]
    flow = continued(model, tensors, frames, timestep, remembered(model, tensors, history))
    assert (flow - tensors[name]).abs().amax() < TOLERANCE


def test_keys_and_values_of_the_context(recorded, model):
    """The last layer's, which the original keeps as RoPE's and PRoPE's side by side; both follow from raw keys, values and cameras."""
    tensors = recorded[0]
    held = remembered(model, tensors, CHOSEN).keys_values(model.sizes.layers - 1)
    for name, pair in (("cached_keys", held[::2]), ("cached_values", held[1::2])):
        assert (torch.cat(pair, -1).transpose(1, 2) - tensors[name]).abs().amax() < TOLERANCE


def made(model, tensors, image=None):
    """All chunks, as the original's pipeline makes them: four Euler steps each, after a pass over the context."""
    x, sigmas = tensors["x"].clone(), (1.0, 0.96, 0.8888889, 0.7272728, 0.0)
    if image is not None:
        x[:, :, :1] = image
    for first in range(0, x.shape[2], 4):
        frames, context = list(range(first, first + 4)), CHOSEN if first == LAST[0] else list(range(first))
        memory = remembered(model, tensors | {"x": x}, context) if context else None
        given = image is not None and first == 0
        for sigma, following in zip(sigmas, sigmas[1:]):
            timestep = torch.tensor([FINISHED if given else 1000 * sigma, *[1000 * sigma] * 3])
            flow = continued(model, tensors | {"x": x}, frames, timestep, memory)
            x[:, :, frames[given:]] += (following - sigma) * flow[:, :, int(given):]
    return x


@pytest.mark.parametrize(("name", "image"), [("rollout", "rollout_image"), ("rollout_text", "")])
def test_six_chunks(recorded, model, name, image):
    """Differences of rounding grow from chunk to chunk."""
    tensors = recorded[0]
    x = made(model, tensors, tensors.get(image))
    errors = (x - tensors[name]).abs().amax((0, 1, 3, 4)).view(6, 4).amax(1)
    assert tensors[name].std() > 1 and errors[0] < TOLERANCE and errors.amax() < 10 * TOLERANCE


def through_the_cache(model, tensors, settings):
    """The last chunk, after its context was stored in a cache, which numbers the frames that it holds from 0."""
    sizes, count = model.sizes, len(CHOSEN)
    cache = KVCache(settings, layers=sizes.layers, heads=sizes.heads, head_dim=sizes.head_dim, grid=GRID, rope=NoRope, branches=2,
                    dtype=torch.float32, max_frames=count, chunk_frames=count)
    cameras = tensors["viewmats"][[*CHOSEN, *LAST]]
    prope, rope = Prope(HEAD_DIM, GRID, cameras, tensors["intrinsics"].expand(len(cameras), 3, 3)), Rope(HEAD_DIM, GRID)
    store = WorldAttention(cache, View(rope, prope, [], range(count)), store=True)
    model.encode(*asked(tensors, CHOSEN, FINISHED), store, action=tensors["action"][None, CHOSEN])
    attend = WorldAttention(cache, View(rope, prope, range(count), range(count, count + 4)))
    return model(*asked(tensors, LAST, 727.2728), attend, action=tensors["action"][None, LAST])


def test_a_chunk_from_the_cache(recorded, model):
    """The more bits, the nearer to what the original made; 16 bits are within the tolerance."""
    tensors = recorded[0]
    exact = through_the_cache(model, tensors, QVGSettings.preset("off"))
    assert (exact - tensors["retrieved"]).abs().amax() < TOLERANCE
    settings = replace(QVGSettings.preset("balanced").both(group=8), sink_frames=0, recent_frames=0)
    errors = [float((through_the_cache(model, tensors, settings.both(bits=bits)) - exact).square().mean()) for bits in (8, 4, 2)]
    assert errors == sorted(errors) and errors[0] < 1e-4 * exact.square().mean() < errors[-1] < 0.1 * exact.square().mean()


def test_everything_that_the_network_is_given_matters(recorded, model):
    """So that a network which ignored it would not pass the parity above."""
    tensors = recorded[0]
    context = remembered(model, tensors, CHOSEN)
    still = tensors | {"action": torch.zeros_like(tensors["action"])}
    turned = tensors | {"viewmats": tensors["viewmats"].flip(0)}
    for other in (continued(model, still, LAST, 727.2728, context), continued(model, turned, LAST, 727.2728, context),
                  continued(model, tensors, LAST, 888.8889, context), continued(model, tensors, LAST, 727.2728),
                  continued(model, tensors, LAST, 727.2728, remembered(model, tensors, CHOSEN[::-1])),
                  continued(model, tensors | {"context": tensors["context"].flip(-1)}, LAST, 727.2728, context)):
        assert (other - tensors["retrieved"]).abs().mean() > 0.01


def test_a_projected_prompt_and_several_videos(recorded, model):
    """Two videos with their own timesteps and actions are those of two passes."""
    tensors = recorded[0]
    prompt = model.project_context(tensors["context"])
    x, times = tensors["x"][:, :, :8].unflatten(2, (2, 4))[0].transpose(0, 1), torch.tensor([[14.0, 800, 600, 400], [900.0, 700, 500, 14]])
    actions = tensors["action"][:8].view(2, 4)
    memory = Memory(tensors, FIRST)
    both = model(x, times, [(k.expand(2, -1, -1, -1), v.expand(2, -1, -1, -1)) for k, v in prompt], memory, action=actions)
    for row in range(2):
        part = slice(row, row + 1)
        alone = model(x[part], times[part], tensors["context"], Memory(tensors, FIRST), action=actions[part])
        assert (both[part] - alone).abs().amax() < 1e-5


def test_no_action_is_standing_still(recorded, model):
    tensors = recorded[0] | {"action": torch.zeros_like(recorded[0]["action"])}
    alone = model(*asked(tensors, FIRST, 500.0), Memory(tensors, FIRST))
    assert torch.equal(alone, continued(model, tensors, FIRST, 500.0))


def test_half_precision_is_near(recorded, official):
    """Weights and latents in bfloat16: the flow is float32, and off by what bfloat16 rounds."""
    state = PUBLISHED.convert(official)
    model = WorldWan(replace(WorldWanSizes.read(state), head_dim=HEAD_DIM), dtype=torch.bfloat16)
    model.load_state_dict(state)
    tensors = {name: recorded[0][name].bfloat16() for name in ("x", "context")}
    with torch.no_grad():
        flow = continued(model, recorded[0] | tensors, FIRST, 1000.0)
    expected = recorded[0]["plain"]
    assert flow.dtype == torch.float32 and (flow - expected).square().mean() < 1e-3 * expected.square().mean()


def test_weights_of_one_byte_spare_what_needs_precision(model):
    with torch.device("meta"):
        small = WorldWan(model.sizes, dtype=torch.float8_e4m3fn)
    bulk = {name for name, p in small.named_parameters() if p.dtype == torch.float8_e4m3fn}
    assert all(p.dtype == torch.bfloat16 for name, p in small.named_parameters() if name not in bulk)
    assert {name.split(".", 2)[2].rpartition(".")[0] for name in bulk} == {
        *(f"{part}.{layer}" for part in ("self_attn", "cross_attn") for layer in "qkvo"), "self_attn.o_prope", "ffn.0", "ffn.2"}
    exact = {name.rpartition(".")[0] for name, p in small.named_parameters() if p.ndim == 2 and name not in bulk}
    names = {layer: name for name, layer in small.named_modules()}
    assert {names[layer] for layer in small.float32_layers()} == {name for name in exact if not name.startswith("text_embedding")}


@pytest.mark.parametrize(("change", "sentence"), [
    ({"x": torch.zeros(1, 4, 4, 3, 6)}, r"6 x 3.*multiples of 32 pixels"),
    ({"timestep": torch.zeros(1, 3)}, r"timestep has the shape \[1, 3\] for 1 videos of 4 latent frames"),
    ({"action": torch.zeros(4)}, r"action has the shape \[4\] .* give one a frame, \[1, 4\]")])
def test_what_does_not_fit_is_refused(recorded, model, change, sentence):
    given = {"x": recorded[0]["x"][:, :, :4], "timestep": torch.zeros(1, 4), "context": recorded[0]["context"],
             "attend": Memory(recorded[0], FIRST), "action": torch.zeros(1, 4)}
    with pytest.raises(ValueError, match=sentence):
        model(**given | change)


@pytest.fixture(scope="module")
def released(recorded):
    """Every parameter of the released model on the meta device, and its numbers."""
    numbers = json.loads(recorded[1]["official"])
    names = {}
    for name, shape in numbers["shapes"].items():
        for layer in range(numbers["layers"] if name.startswith("blocks.0.") else 1):
            names[name.replace("blocks.0.", f"blocks.{layer}.")] = torch.empty(shape, device="meta")
    return names, numbers


def test_released_names_and_shapes_load(released):
    """None missing, none unexpected, every shape right; names convert back to the published ones."""
    names, numbers = released
    assert is_world_wan(names)
    model = WorldWan.from_state_dict(names)
    assert model.sizes == WorldWanSizes(dim=3072, ffn_dim=14336, layers=30, text_dim=4096)
    assert (model.sizes.channels, model.sizes.heads, model.sizes.head_dim) == (48, 24, 128)
    shape = HY_WORLDPLAY_5B.shapes["hy-worldplay-5b"]
    assert sum(p.numel() for p in model.parameters()) == numbers["parameters"] == shape.parameters
    assert (shape.layers, shape.heads, shape.head_dim) == (model.sizes.layers, model.sizes.heads, model.sizes.head_dim)
    state = PUBLISHED.convert(names)
    assert PUBLISHED.convert(state).keys() == state.keys() == model.state_dict().keys()
    assert {PUBLISHED.published_name(ours)[0] for ours in state} == names.keys()


def small_state(layers=2, channels=48):
    """Random weights of a small network that a file can hold: one head of 128."""
    draw = torch.Generator().manual_seed(3)
    with torch.device("meta"):
        state = WorldWan(WorldWanSizes(dim=128, ffn_dim=32, layers=layers, text_dim=16, channels=channels, freq_dim=32)).state_dict()
    return {name: torch.randn(tensor.shape, generator=draw) for name, tensor in state.items()}


def published(state):
    return {PUBLISHED.published_name(name)[0]: tensor for name, tensor in state.items()}


@pytest.mark.parametrize("layout", [published, dict])
@pytest.mark.parametrize("prefix", ["", "model.", "model._fsdp_wrapped_module.", "_fsdp_wrapped_module."])
def test_files_of_both_layouts_open(tmp_path, layout, prefix):
    """A training checkpoint of the distilled model, and safetensors."""
    state = small_state()
    content = {prefix + name: tensor for name, tensor in layout(state).items()}
    torch.save({"generator": content, "step": 1}, tmp_path / "model.pt")
    save_file(content, tmp_path / "diffusion_pytorch_model.safetensors")
    for path, container in ((tmp_path / "model.pt", "generator"), (tmp_path / "diffusion_pytorch_model.safetensors", "")):
        opened, found = open_checkpoint(path)
        assert opened.keys() == state.keys() and all(torch.equal(opened[name], state[name]) for name in state)
        assert (found.family, found.layers, found.heads, found.container) == ("hy-worldplay-5b", 2, 1, container)
    assert found.label == f"HY-WorldPlay 5B, 2 layers, 1 heads ({sum(x.numel() for x in state.values()) / 1e6:.0f} M parameters)"
    assert HY_WORLDPLAY_5B.size_name(WorldWanSizes(3072, 14336, 30, 4096)) == "5B"


def test_scaled_fp8_files_open(tmp_path):
    """Scales follow their layers into our names."""
    file = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}
    for name, tensor in published(small_state()).items():
        matrix = tensor.ndim == 2 and name.startswith("blocks.")
        file[name] = tensor.to(torch.float8_e4m3fn) if matrix else tensor
        if matrix:
            file[name.replace(".weight", ".scale_weight")] = torch.tensor(0.5)
    save_file(file, tmp_path / "fp8.safetensors")
    state, found = open_checkpoint(tmp_path / "fp8.safetensors")
    assert found.dtype == "float8_e4m3fn"
    scaled = {name.removesuffix(".scale_weight") for name in state if name.endswith(".scale_weight")}
    assert scaled == {name.removesuffix(".weight") for name, x in state.items() if x.dtype == torch.float8_e4m3fn and x.ndim == 2}
    assert "blocks.1.self_attn.o_prope" in scaled and len(scaled) == 2 * 11


def without(*fragments):
    return {name: x for name, x in small_state().items() if not any(fragment in name for fragment in fragments)}


WRONG = {
    "a plain Wan 2.2 5B of diffusers": (lambda: published(without("action_", "_prope")), "diffusers layout, without the actions"),
    "a plain Wan 2.2 5B": (lambda: without("action_", "_prope"), "is a Wan 2.2 5B"),
    "no second output layer": (lambda: published(without("_prope")), "diffusers layout, without the actions"),
    "other latents": (lambda: small_state() | {"patch_embedding.weight": torch.zeros(128, 36, 1, 2, 2)}, "takes 36 latent channels"),
    "an odd width": (lambda: small_state() | {"patch_embedding.weight": torch.zeros(96, 48, 1, 2, 2)}, "has width 96"),
    "one weight missing": (lambda: published(without("blocks.1.self_attn.o_prope.bias")),
                           "HY-WorldPlay 5B but lacks blocks.1.self_attn.o_prope.bias"),
    "another size": (lambda: small_state() | {"action_embedding.2.weight": torch.zeros(128, 64)}, "action_embedding.2.weight as float32"),
    "a LoRA": (lambda: {"blocks.0.attn1.to_out_prope.0.lora_A.weight": torch.zeros(1)}, "is a LoRA"),
}


@pytest.mark.parametrize("name", WRONG)
def test_other_files_are_refused(tmp_path, name):
    content, sentence = WRONG[name]
    save_file(content(), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=sentence) as error:
        open_checkpoint(tmp_path / "other.safetensors")
    assert str(error.value).startswith("other.safetensors ") and str(error.value).endswith(".")


def test_a_causal_wan_stays_one(tmp_path):
    with torch.device("meta"):
        state = CausalWan(WanSizes(dim=128, ffn_dim=32, layers=1, text_dim=16)).state_dict()
    save_file({name: torch.zeros(tensor.shape) for name, tensor in state.items()}, tmp_path / "wan.safetensors")
    assert open_checkpoint(tmp_path / "wan.safetensors")[1].family == "wan"


def test_a_network_on_the_latents_of_wan_21_opens(tmp_path):
    """Its number of channels says which VAE it needs."""
    save_file(small_state(channels=16), tmp_path / "small.safetensors")
    state, found = open_checkpoint(tmp_path / "small.safetensors")
    assert found.family == "hy-worldplay-5b" and WorldWanSizes.read(state).channels == 16


def test_an_opened_family_is_a_network():
    state = small_state()
    network = HY_WORLDPLAY_5B.open(published(state), torch.bfloat16)
    assert isinstance(network, WorldWan) and network.head.modulation.dtype == torch.bfloat16
    assert torch.equal(network.blocks[1].self_attn.o_prope.bias, state["blocks.1.self_attn.o_prope.bias"].bfloat16())


@pytest.mark.parametrize("stem", [
    "diffusion_model.blocks.1.self_attn.o_prope", "transformer.blocks.1.attn1.to_out_prope.0", "lora_unet_blocks_1_self_attn_o_prope"])
def test_loras_in_every_spelling(stem):
    """Those of Wan 2.2 5B fit, too: its names are kept."""
    shapes = {name.removesuffix(".weight"): tuple(x.shape) for name, x in small_state().items()}
    file = {f"{stem}.lora_down.weight": torch.zeros(2, 128), f"{stem}.lora_up.weight": torch.zeros(128, 2),
            "diffusion_model.blocks.0.ffn.2.lora_A.weight": torch.zeros(2, 32),
            "diffusion_model.blocks.0.ffn.2.lora_B.weight": torch.zeros(128, 2)}
    mapped = convert(file, shapes, HY_WORLDPLAY_5B)
    assert mapped.taken == 4 and not mapped.left
    assert {name.rpartition(".lora_")[0] for name in mapped.weights} == {"blocks.1.self_attn.o_prope", "blocks.0.ffn.2"}
