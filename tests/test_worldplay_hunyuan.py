"""The network of HY-WorldPlay 8B against the original code, below 1e-4 in float32.

tests/data/worldplay_hunyuan.safetensors holds a small random model (two layers of two heads of 16, weights exact in float8), a video of
twelve frames with its cameras and actions, and what the original network answered: text keys and values, a first chunk, a second one,
and one with retrieved context, each with the prompt and with a negative prompt. Also the parameter names of the released model.
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
from comfyui_qvg.qvg.attention.rope import NoRope
from comfyui_qvg.qvg.attention.world import View, WorldAttention
from comfyui_qvg.qvg.cache.kv_cache import KVCache
from comfyui_qvg.qvg.models import FAMILIES, open_checkpoint
from comfyui_qvg.qvg.models.hunyuan_layers import HunyuanSizes
from comfyui_qvg.qvg.models.worldplay_hunyuan import (
    CONTEXT_TIMESTEP,
    HY_WORLDPLAY_8B,
    PUBLISHED,
    WorldPlayHunyuan,
    is_worldplay_8b,
    with_start_image,
)
from comfyui_qvg.qvg.settings import QVGSettings

TOLERANCE = 1e-4
PREFIX = "model."
GRID = (2, 3)
FIRST, SECOND, RETRIEVED = ([], [0, 1]), ([0, 1], [2, 3]), ([0, 1, 4, 5, 8, 9], [10, 11])
LEVELS = {"first": 937.5, "second": 625.0, "retrieved": 833.3333}
CHUNKS = {"first": FIRST, "second": SECOND, "retrieved": RETRIEVED}


@pytest.fixture(scope="module")
def recorded():
    """Tensors by name, and the released parameters."""
    with safe_open(Path(__file__).parent / "data" / "worldplay_hunyuan.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        return {key: x.float() if x.is_floating_point() else x for key, x in tensors.items()}, json.loads(file.metadata()["official"])


@pytest.fixture(scope="module")
def tensors(recorded):
    return recorded[0]


@pytest.fixture(scope="module")
def published(tensors):
    return {key.removeprefix(PREFIX): value for key, value in tensors.items() if key.startswith(PREFIX)}


@pytest.fixture(scope="module")
def model(published):
    return WorldPlayHunyuan.from_state_dict(published)


@pytest.fixture(scope="module")
def texts(model, tensors):
    """Keys and values by prompt; only the positive one quotes words."""
    return {"positive": model.text(tensors["prompt"], tensors["prompt_mask"], glyphs=tensors["glyphs"], glyph_mask=tensors["glyph_mask"],
                                   image=tensors["siglip"]),
            "negative": model.text(tensors["negative"], tensors["negative_mask"], image=tensors["siglip"])}


class Attend:
    """[text, context, chunk] in both branches, from raw keys and values that a pass over the context stored.

    context, chunk: frames of the video. Context has positions from 0, the chunk follows it; cameras are those of the video.
    """

    def __init__(self, tensors, context, chunk, stored=None):
        self.start, self.frames, self.stored, self.kept = len(context), [*context, *chunk], stored, []
        self.rope = HY_WORLDPLAY_8B.rope(16, GRID)
        self.prope = Prope(16, GRID, *(tensors[name][0, self.frames] for name in ("viewmats", "intrinsics")))

    def keys(self, k, v, prope):
        if prope:
            return self.prope.keys(k), self.prope.values(v)
        return self.rope.apply(k, 0, len(self.frames)), v

    def __call__(self, layer, q, k, v, *, text):
        self.kept.append((k, v))
        if self.stored:
            k, v = (torch.cat(pair, 1) for pair in zip(self.stored[layer], (k, v)))
        new, results = slice(self.start, None), []
        for prope in (False, True):
            query = self.prope.queries(q, new) if prope else self.rope.apply(q, self.start, len(self.frames) - self.start)
            keys, values = (torch.cat(pair, 1) for pair in zip(text, self.keys(k, v, prope)))
            results.append(sdpa(query, keys, values))
        return results[0], self.prope.outputs(results[1], new)


def conditioned(tensors, frames):
    return with_start_image(tensors["latents"][:, :, frames], frames, tensors["image"])


def clean(frames):
    return torch.full((1, len(frames)), float(CONTEXT_TIMESTEP))


def encoded(model, tensors, text, context):
    """Raw keys and values of every layer after a pass over context frames."""
    store = Attend(tensors, [], context)
    model.encode(conditioned(tensors, context), clean(context), text, store, action=tensors["actions"][:, context])
    return store


def flow(model, tensors, text, name):
    context, chunk = CHUNKS[name]
    attend = Attend(tensors, context, chunk, encoded(model, tensors, text, context).kept if context else None)
    timestep = torch.full((1, len(chunk)), LEVELS[name])
    return model(conditioned(tensors, chunk), timestep, text, attend, action=tensors["actions"][:, chunk])


@pytest.mark.parametrize("prompt", ["positive", "negative"])
def test_text_pass(tensors, texts, prompt):
    """Image, quoted words and prompt in the original's order, without padding."""
    assert texts[prompt][0][0].shape[1] == {"positive": 5 + 3 + 5, "negative": 5 + 2}[prompt]
    for layer, pair in enumerate(texts[prompt]):
        for name, found in zip("kv", pair):
            expected = tensors[f"text.{prompt}.{layer}.{name}"]
            assert expected.std() > 0.5 and (found - expected).abs().amax() < TOLERANCE


def test_text_without_an_image(model, tensors):
    pair = model.text(tensors["prompt"][:, :5])[-1]
    for name, found in zip("kv", pair):
        assert (found - tensors[f"text.plain.1.{name}"]).abs().amax() < TOLERANCE


@pytest.mark.parametrize("prompt", ["positive", "negative"])
@pytest.mark.parametrize("name", CHUNKS)
def test_a_chunk(model, tensors, texts, name, prompt):
    """Without context, after one chunk, and with retrieved context that does not follow on."""
    expected = tensors[f"{name}.{prompt}"]
    assert expected.std() > 0.5
    assert (flow(model, tensors, texts[prompt], name) - expected).abs().amax() < TOLERANCE


def test_stored_keys_and_values(model, tensors, texts):
    """Raw ones of the last layer become the original's cached ones of both branches."""
    store = encoded(model, tensors, texts["positive"], RETRIEVED[0])
    for prope in (False, True):
        for name, found in zip("kv", store.keys(*store.kept[-1], prope)):
            assert (found[0] - tensors[f"retrieved.{name}"][int(prope)]).abs().amax() < TOLERANCE


def cached_flow(model, tensors, text, name, settings):
    """As `flow`, through a cache that stores the context pass and is then read; it numbers the frames that it holds from 0."""
    (context, chunk), sizes = CHUNKS[name], model.sizes
    cache = KVCache(settings, layers=sizes.layers, heads=sizes.heads, head_dim=sizes.head_dim, grid=GRID, rope=NoRope, branches=2,
                    dtype=torch.float32, max_frames=len(context), chunk_frames=len(context))
    prope = Prope(16, GRID, *(tensors[part][0, [*context, *chunk]] for part in ("viewmats", "intrinsics")))
    rope, held = HY_WORLDPLAY_8B.rope(16, GRID), range(len(context))
    store = WorldAttention(cache, View(rope, prope, [], held), store=True)
    model.encode(conditioned(tensors, context), clean(context), text, store, action=tensors["actions"][:, context])
    attend = WorldAttention(cache, View(rope, prope, held, range(len(context), len(context) + len(chunk))))
    timestep = torch.full((1, len(chunk)), LEVELS[name])
    return model(conditioned(tensors, chunk), timestep, text, attend, action=tensors["actions"][:, chunk])


@pytest.mark.parametrize("prompt", ["positive", "negative"])
@pytest.mark.parametrize("name", ["second", "retrieved"])
def test_a_chunk_from_the_cache(model, tensors, texts, name, prompt):
    found = cached_flow(model, tensors, texts[prompt], name, QVGSettings.preset("off"))
    assert (found - tensors[f"{name}.{prompt}"]).abs().amax() < TOLERANCE


def test_a_quantized_context_is_near_the_exact_one(model, tensors, texts):
    """The more bits, the nearer."""
    settings = replace(QVGSettings.preset("balanced").both(group=16), sink_frames=0, recent_frames=0)
    expected, errors = tensors["retrieved.positive"], []
    for bits in (8, 4, 2, 1):
        near = cached_flow(model, tensors, texts["positive"], "retrieved", settings.both(bits=bits))
        errors.append(float((near - expected).square().mean() / expected.square().mean()))
    assert errors == sorted(errors)
    assert errors[0] < 1e-3 < errors[-1] < 0.5


def test_what_must_matter(model, tensors, texts):
    """So that a network which ignored one of them would not pass the parity above."""
    expected, text = tensors["retrieved.positive"], texts["positive"]
    changed = {name: dict(tensors) for name in ("actions", "viewmats", "image", "latents")}
    changed["actions"]["actions"] = 80 - tensors["actions"]
    changed["viewmats"]["viewmats"] = tensors["viewmats"].flip(1)
    changed["image"]["image"] = -tensors["image"]
    changed["latents"]["latents"] = torch.cat([-tensors["latents"][:, :, :10], tensors["latents"][:, :, 10:]], 2)
    for name, other in changed.items():
        assert (flow(model, other, text, "retrieved") - expected).abs().mean() > 1e-3, name
    assert (flow(model, tensors, texts["negative"], "retrieved") - expected).abs().mean() > 0.01


def test_frames_have_their_own_timesteps(model, tensors, texts):
    """Context and chunk in one pass are not far from the same in two, where context does not see the chunk."""
    context, chunk = SECOND
    frames = [*context, *chunk]

    def together(*timesteps):
        return model(conditioned(tensors, frames), torch.tensor([timesteps]), texts["positive"], Attend(tensors, [], frames),
                     action=tensors["actions"][:, frames])

    noisy, expected = LEVELS["second"], tensors["second.positive"]
    both = together(CONTEXT_TIMESTEP, CONTEXT_TIMESTEP, noisy, noisy)
    assert 0 < (both[:, :, 2:] - expected).abs().mean() < 0.3 * expected.abs().mean()
    assert (together(noisy, noisy, noisy, noisy) - both)[:, :, :2].abs().mean() > 0.1


def test_the_start_image_stands_beside_frame_0_alone(tensors):
    x = with_start_image(tensors["latents"][:, :, [4, 0]], [4, 0], tensors["image"])
    assert torch.equal(x[:, 4:8, 1], tensors["image"][:, :, 0]) and (x[:, 8, 1] == 1).all() and not x[:, 4:, 0].any()
    assert not with_start_image(tensors["latents"], range(12))[:, 4:].any()


def test_prompts_of_different_lengths_are_refused(model, tensors):
    with pytest.raises(ValueError, match="have 5 and 2 tokens"):
        model.text(torch.cat([tensors["prompt"], tensors["negative"]]), torch.cat([tensors["prompt_mask"], tensors["negative_mask"]]))


def test_half_precision_is_near(published, tensors, texts):
    """bf16 weights and latents, and text of float32 after an image, as in the original."""
    small = WorldPlayHunyuan.from_state_dict(published, torch.bfloat16)
    half = {name: x.bfloat16() if name in ("latents", "image", "prompt", "siglip", "glyphs") else x for name, x in tensors.items()}
    text = small.text(half["prompt"], half["prompt_mask"], glyphs=half["glyphs"], glyph_mask=half["glyph_mask"], image=half["siglip"])
    assert text[-1][0].dtype == torch.bfloat16

    def attend(layer, q, k, v, text):
        assert q.dtype == k.dtype == v.dtype == torch.bfloat16
        exact = Attend(tensors, *FIRST)(layer, *(x.float() for x in (q, k, v)), text=[x.float() for x in text])
        return [x.bfloat16() for x in exact]

    found = small(conditioned(half, FIRST[1]), torch.full((1, 2), LEVELS["first"]), text, attend, action=tensors["actions"][:, FIRST[1]])
    assert found.dtype == torch.bfloat16
    assert (found.float() - tensors["first.positive"]).square().mean().sqrt() < 0.05 * tensors["first.positive"].std()


def test_weights_of_one_byte_compute_the_same(published, tensors, texts):
    """The recorded weights are exact in float8; layers convert them to the dtype of their input."""
    packed = {name: x.to(torch.float8_e4m3fn) for name, x in published.items()}
    assert all(torch.equal(x.float(), published[name]) for name, x in packed.items())
    small = WorldPlayHunyuan.from_state_dict(packed)
    assert {p.dtype for p in small.parameters()} == {torch.float8_e4m3fn}
    assert (flow(small, tensors, texts["positive"], "second") - tensors["second.positive"]).abs().amax() < TOLERANCE
    found = small.text(tensors["negative"], tensors["negative_mask"], image=tensors["siglip"])
    assert (found[1][0] - tensors["text.negative.1.k"]).abs().amax() < TOLERANCE
    assert PUBLISHED.our_names("double_blocks.7.img_attn_prope_proj.scale_weight") == ["double_blocks.7.img.prope.scale_weight"]


def released(official):
    """The released size on the meta device."""
    names = {}
    for name, shape in official["shapes"].items():
        for layer in range(official["layers"] if name.startswith("double_blocks.0.") else 1):
            names[name.replace("double_blocks.0.", f"double_blocks.{layer}.")] = torch.empty(shape, device="meta")
    return names


def test_released_names_and_shapes_load(recorded):
    """None missing, none unexpected, every shape right, in both layouts."""
    official = recorded[1]
    names = released(official)
    assert len(names) == official["keys"] and is_worldplay_8b(names)
    state = PUBLISHED.convert(names)
    model = WorldPlayHunyuan.from_state_dict(names)
    assert model.sizes == HunyuanSizes(dim=2048, head_dim=128, ffn_dim=8192, layers=54)
    shape = HY_WORLDPLAY_8B.shapes["hy-worldplay-8b"]
    assert sum(p.numel() for p in model.parameters()) == official["parameters"] == shape.parameters
    assert (shape.layers, shape.heads, shape.head_dim) == (54, model.sizes.heads, model.sizes.head_dim)
    assert PUBLISHED.convert(state).keys() == state.keys() == model.state_dict().keys()
    for ours in state:
        name, place, count = PUBLISHED.published_name(ours)
        assert name in names and PUBLISHED.our_names(name) == [ours] and (place, count) == (0, 1)
    assert HY_WORLDPLAY_8B.size_name(model.sizes) == "8.6B"


def test_weights_of_one_byte_spare_what_needs_precision(model):
    with torch.device("meta"):
        small = WorldPlayHunyuan(model.sizes, dtype=torch.float8_e4m3fn)
    bulk = {name for name, p in small.named_parameters() if p.dtype == torch.float8_e4m3fn}
    assert all(p.dtype == torch.bfloat16 for name, p in small.named_parameters() if name not in bulk)
    assert {name.split(".", 2)[2].rpartition(".")[0] for name in bulk} == {
        "img.prope", *(f"{side}.{layer}" for side in ("img", "txt") for layer in ("q", "k", "v", "o", "mlp.fc1", "mlp.fc2"))}


def test_rope():
    """16, 56 and 56 of 128 channels, base 256, pairs of neighbours."""
    rope = HY_WORLDPLAY_8B.rope(128, GRID)
    assert rope.dims == (16, 56, 56)
    cos, sin = rope.tables(3, 1, "cpu")
    angles = torch.atan2(sin, cos)[5]
    # frame 3, row 1, column 2: the second pair of each axis
    expected = [3 * 256 ** (-2 / 16), 1 * 256 ** (-2 / 56), 2 * 256 ** (-2 / 56)]
    assert torch.allclose(angles[[1, 8 + 1, 36 + 1]], torch.tensor(expected), atol=1e-6)


@pytest.mark.parametrize("prefix", ["", "model.", "model._fsdp_wrapped_module.", "model.diffusion_model."])
def test_its_checkpoint_is_recognized(tmp_path, published, model, prefix):
    """Published names, with whatever a trainer or a repackager puts before them."""
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({prefix + name: tensor for name, tensor in published.items()}, path)
    state, found = open_checkpoint(path)
    assert (found.family, found.layers, found.heads) == ("hy-worldplay-8b", 2, 2) and str(found).startswith(f"{path.name}: HY-WorldPlay 8B")
    assert FAMILIES[found.family].open(state).sizes == model.sizes == found.sizes


@pytest.mark.parametrize(("change", "sentence"), [
    ({"guidance_in.mlp.0.weight": torch.zeros(2, 2)}, "has guidance_in, which HY-WorldPlay 8B does not have"),
    ({"img_in.proj.weight": torch.zeros(32, 8, 1, 1, 1)}, "takes 8 channels and returns 4; .* 9 in all"),
    ({"time_in.mlp.0.weight": None}, "looks like HY-WorldPlay 8B but lacks time_in.mlp.0.weight"),
    ({"double_blocks.1.img_attn_prope_proj.bias": None}, "is HY-WorldPlay 8B but lacks double_blocks.1.img.prope.bias"),
    ({"double_blocks.1.txt_mlp.fc1.weight": torch.zeros(128, 31)}, "double_blocks.1.txt.mlp.fc1.weight as float32 of shape")])
def test_a_damaged_checkpoint_is_refused(tmp_path, published, change, sentence):
    path = tmp_path / "model.safetensors"
    save_file({name: tensor for name, tensor in (published | change).items() if tensor is not None}, path)
    with pytest.raises(ValueError, match=rf"^model\.safetensors .*{sentence}"):
        open_checkpoint(path)


def test_hunyuan_video_without_cameras_is_another_model(tmp_path, published):
    """ComfyUI's and the original HunyuanVideo-1.5 have neither actions nor a camera branch."""
    path = tmp_path / "hunyuanvideo1.5.safetensors"
    save_file({name: tensor for name, tensor in published.items() if "prope" not in name and not name.startswith("action_in.")}, path)
    with pytest.raises(ValueError, match="is a HunyuanVideo model without the actions and cameras of HY-WorldPlay"):
        open_checkpoint(path)


def test_heads_that_do_not_divide_the_width(model):
    with pytest.raises(ValueError, match="Heads of 5 channels do not divide a width of 32"):
        WorldPlayHunyuan(replace(model.sizes, head_dim=5))
