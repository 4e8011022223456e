"""The LongCat-Video network against the original code, below 1e-4 in float32.

tests/data/longcat.safetensors holds a small random model (two layers of four heads of 16), its inputs, and what the original network
answered without given frames, with them, and from its own KV cache; also its schedules and the parameter names of the released model.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from comfyui_qvg.qvg.attention.cached import CachedAttention
from comfyui_qvg.qvg.cache.kv_cache import KVCache
from comfyui_qvg.qvg.models.longcat import LONGCAT, PUBLISHED, LongCat, LongCatSizes, is_longcat
from comfyui_qvg.qvg.settings import QVGSettings

TOLERANCE = 1e-4
PREFIX = "model."


@pytest.fixture(scope="module")
def recorded():
    """Tensors by name, and the file's metadata."""
    with safe_open(Path(__file__).parent / "data" / "longcat.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        return {key: x if x.dtype == torch.bool else x.float() for key, x in tensors.items()}, file.metadata()


@pytest.fixture(scope="module")
def official(recorded):
    return {key.removeprefix(PREFIX): value for key, value in recorded[0].items() if key.startswith(PREFIX)}


@pytest.fixture(scope="module")
def model(official):
    return LongCat.from_state_dict(official)


@pytest.fixture(scope="module")
def asked(recorded):
    """x and timestep of a CFG batch, context, mask, and how many frames are given."""
    tensors, metadata = recorded
    x = tensors["x"].repeat(2, 1, 1, 1, 1)
    return x, torch.full((2,), float(metadata["timestep"])), tensors["context"], tensors["mask"], int(metadata["given"])


def encoded(model, x, given, settings=QVGSettings.preset("off"), **more):  # noqa: B008 (frozen)
    """The cache of the first `given` frames of one video, stored layer by layer."""
    sizes = model.sizes
    cache = KVCache(settings, layers=sizes.layers, heads=sizes.heads, head_dim=sizes.head_dim, grid=(2, 3), rope=LONGCAT.rope,
                    dtype=torch.float32, max_frames=x.shape[2], **more)
    model.encode(x[:1, :, :given], CachedAttention(cache, start_frame=0, frames=given, store=True))
    return cache


def continued(model, cache, x, timestep, context, mask, given):
    attend = CachedAttention(cache, start_frame=given, frames=x.shape[2] - given, store=False)
    return model(x[:, :, given:], timestep, context, mask, attend=attend)


def test_without_given_frames(recorded, model, asked):
    x, timestep, context, mask, _ = asked
    expected = recorded[0]["plain"]
    assert expected.std() > 1
    assert (model(x, timestep, context, mask) - expected).abs().amax() < TOLERANCE


def test_given_frames_in_the_same_pass(recorded, model, asked):
    x, timestep, context, mask, given = asked
    assert (model(x, timestep, context, mask, given=given) - recorded[0]["uncached"]).abs().amax() < TOLERANCE


def test_given_frames_from_the_cache(recorded, model, asked):
    """One video is stored; both conditions read it."""
    x, *_, given = asked
    flow = continued(model, encoded(model, x, given), *asked)
    assert (flow - recorded[0]["cached"]).abs().amax() < TOLERANCE


@pytest.mark.parametrize("places", [1, 2, 3, 4])
def test_given_frames_from_the_cache_in_pieces(recorded, model, asked, places):
    """places: heads times frames that fit into the workspace; the given frames are one span, so a head of it is decoded whole."""
    x, *_, given = asked
    sizes = model.sizes
    cache = encoded(model, x, given, workspace_limit=places * 2 * 6 * sizes.head_dim * 4)
    assert not cache.workspace.fits(6 * x.shape[2])
    assert (continued(model, cache, *asked) - recorded[0]["cached"]).abs().amax() < TOLERANCE
    assert cache.workspace.nbytes == max(places, given) * 2 * 6 * sizes.head_dim * 4


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_conditions_in_two_calls_in_either_order(recorded, model, asked, order):
    x, timestep, context, mask, given = asked
    cache = encoded(model, x, given)
    for one in order:
        part = slice(one, one + 1)
        flow = continued(model, cache, x[part], timestep[part], context[part], mask[part], given)
        assert (flow - recorded[0]["cached"][part]).abs().amax() < TOLERANCE


def test_stored_keys_and_values(recorded, model, asked):
    """The last layer's keys before RoPE and values, as the original caches them."""
    tensors, cache = recorded[0], encoded(model, asked[0], asked[-1])
    for span, name in zip(cache.layers[-1].entries[0].spans, ("keys", "values")):
        assert (span.data - tensors[name][0]).abs().amax() < TOLERANCE


def test_padding_is_found_where_rows_are_zero(recorded, model, asked):
    """ComfyUI's text encoder zeroes padding before the projection and gives no mask."""
    x, timestep, context, mask, given = asked
    flow = model(x, timestep, context * mask[..., None], given=given)
    assert (flow - recorded[0]["uncached"]).abs().amax() < TOLERANCE


def test_the_mask_and_the_history_matter(recorded, model, asked):
    """So that a network which ignored them would not pass the parity above."""
    x, timestep, context, mask, given = asked
    expected = recorded[0]["cached"]
    assert (model(x, timestep, context, torch.ones_like(mask), given=given)[:, :, given:] - expected).abs().mean() > 0.01
    alone = continued(model, encoded(model, x.flip(2), given), *asked)
    assert (alone - expected).abs().mean() > 0.01


def test_quantized_history_is_near_the_exact_one(model, asked):
    """The more bits, the nearer."""
    exact = continued(model, encoded(model, asked[0], asked[-1]), *asked)
    balanced = replace(QVGSettings.preset("balanced").both(group=16), sink_frames=0, recent_frames=0)
    errors = []
    for bits in (8, 4, 3, 2, 1):
        near = continued(model, encoded(model, asked[0], asked[-1], balanced.both(bits=bits)), *asked)
        errors.append(float((near - exact).square().mean() / exact.square().mean()))
    assert errors == sorted(errors)
    assert errors[0] < 1e-4 < errors[-1] < 0.5


def test_released_names_and_shapes_load(recorded):
    """Both layouts of the released size, on the meta device: none missing, none unexpected, every shape right."""
    released = json.loads(recorded[1]["official"])
    names = {}
    for name, shape in released["shapes"].items():
        for layer in range(released["layers"] if name.startswith("blocks.0.") else 1):
            names[name.replace("blocks.0.", f"blocks.{layer}.")] = torch.empty(shape, device="meta")
    assert is_longcat(names)
    state = PUBLISHED.convert(names)
    model = LongCat.from_state_dict(names)
    assert model.sizes == LongCatSizes(dim=4096, head_dim=128, ffn_dim=11008, layers=48, text_dim=4096)
    assert sum(p.numel() for p in model.parameters()) == released["parameters"]
    assert PUBLISHED.convert(state).keys() == state.keys() == model.state_dict().keys()
    for ours in state:
        name, place, count = PUBLISHED.published_name(ours)
        assert name in names and PUBLISHED.our_names(name)[place] == ours and len(PUBLISHED.our_names(name)) == count


def test_weights_of_one_byte_spare_what_needs_precision(model):
    with torch.device("meta"):
        small = LongCat(model.sizes, dtype=torch.float8_e4m3fn)
    bulk = {name for name, p in small.named_parameters() if p.dtype == torch.float8_e4m3fn}
    assert all(p.dtype == torch.bfloat16 for name, p in small.named_parameters() if name not in bulk)
    assert {name.split(".", 2)[2].rpartition(".")[0] for name in bulk} == {
        *(f"{part}.{layer}" for part in ("self_attn", "cross_attn") for layer in "qkvo"), "ffn.w1", "ffn.w2", "ffn.w3"}


def test_an_odd_size_is_refused(model, asked):
    with pytest.raises(ValueError, match=r"6 x 3.*multiples of 16 pixels"):
        model(asked[0][..., :3, :], *asked[1:4])
