"""The plain causal Wan over an unquantized cache against the original Self-Forcing code, below 1e-4 in float32.

tests/data/self_forcing.safetensors holds a small random model (two layers, two heads of 128), its inputs, and what the
original network answered chunk after chunk with its own KV cache; the file's metadata tells what made it.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from comfyui_qvg.qvg.attention.cached import CachedAttention
from comfyui_qvg.qvg.attention.rope import Rope
from comfyui_qvg.qvg.cache.kv_cache import KVCache
from comfyui_qvg.qvg.models.wan import CausalWan
from comfyui_qvg.qvg.settings import QVGSettings

TOLERANCE = 1e-4
PREFIX = "model."


@pytest.fixture(scope="module")
def recorded():
    """Tensors by name, and the timesteps that every chunk runs at, the clean pass last."""
    with safe_open(Path(__file__).parent / "data" / "self_forcing.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key).float() for key in file.keys()}
        return tensors, json.loads(file.metadata()["timesteps"])


@pytest.fixture(scope="module")
def model(recorded):
    return CausalWan.from_state_dict({
        key.removeprefix(PREFIX): value for key, value in recorded[0].items() if key.startswith(PREFIX)})


def empty_cache(model, inputs):
    grid = tuple(size // 2 for size in inputs.shape[-2:])
    return KVCache(QVGSettings.preset("off"), layers=model.sizes.layers, heads=model.sizes.heads, head_dim=128,
                   grid=grid, rope=Rope, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def replayed(recorded, model):
    """Flows like the recorded ones, and the cache that the run leaves behind."""
    tensors, timesteps = recorded
    inputs = tensors["inputs"]
    frames = inputs.shape[-3]
    prompt = model.project_context(tensors["context"])
    cache = empty_cache(model, inputs)
    flows = torch.empty_like(tensors["outputs"])
    for chunk, steps in enumerate(inputs):
        for step, (x, timestep) in enumerate(zip(steps, timesteps, strict=True)):
            attend = CachedAttention(cache, start_frame=chunk * frames, frames=frames, store=timestep == 0)
            flows[chunk, step] = model(x, torch.full((1, frames), timestep), prompt, attend=attend)
    return flows, cache


def test_every_chunk_and_timestep_agrees(recorded, replayed):
    expected, flows = recorded[0]["outputs"], replayed[0]
    assert expected.std() > 1
    assert (flows - expected).abs().amax() < TOLERANCE


def test_keys_and_values_agree(recorded, replayed):
    """The last layer's cache: keys turned to their positions as the original keeps them, and values."""
    tensors, cache = recorded[0], replayed[1]
    tokens = tensors["values"].shape[1]
    layer = cache.layers[-1]
    keys, values = (torch.full((1, layer.tokens, cache.geometry.heads, 128), torch.nan) for _ in range(2))
    for heads in cache.head_slices():
        layer.read(heads, keys[:, :, heads], values[:, :, heads])
    assert (keys[:, -tokens:] - tensors["roped_keys"]).abs().amax() < TOLERANCE
    assert (values[:, -tokens:] - tensors["values"]).abs().amax() < TOLERANCE
    newest = layer.entries[-1].spans[0].data.unflatten(0, (1, -1))
    assert (newest - tensors["keys"][:, -newest.shape[1]:]).abs().amax() < TOLERANCE


def test_the_history_matters(recorded, model):
    """What the cache holds shows in the answer, so that a network which ignored it would not pass the parity above."""
    tensors, timesteps = recorded
    x = tensors["inputs"][-1, 0]
    frames = x.shape[2]
    attend = CachedAttention(empty_cache(model, x), start_frame=0, frames=frames, store=False)
    alone = model(x, torch.full((1, frames), timesteps[0]), tensors["context"], attend=attend)
    assert (alone - tensors["outputs"][-1, 0]).abs().mean() > 0.01
