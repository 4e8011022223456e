"""The plain causal Wan against the original Self-Forcing code, several chunks deep, below 1e-4 in float32.

tests/data/self_forcing.safetensors holds a small random model (two layers, two heads of 128), its inputs, and what the
original network answered chunk after chunk with its own KV cache; the file's metadata tells what made it.
"""

import json
from pathlib import Path

import pytest
import torch
from comfyui_qvg.qvg.models.wan import CausalWan, scaled_attention
from comfyui_qvg.qvg.rope import Rope
from safetensors import safe_open

TOLERANCE = 1e-4


class ExactAttention:
    """One chunk's attention over a history kept as it is: K before RoPE, turned to its positions on every read."""

    def __init__(self, history, grid, frames):
        self.history, self.frames = history, frames
        self.rope = Rope(128, grid)
        self.start = history[0][0].shape[1] // (grid[0] * grid[1]) if history else 0
        self.chunk = []

    def __call__(self, layer, q, k, v):
        self.chunk.append((k, v))
        if self.history:
            k, v = (torch.cat(pair, dim=1) for pair in zip(self.history[layer], (k, v), strict=True))
        k = self.rope.apply(k, 0, self.start + self.frames)
        return scaled_attention(self.rope.apply(q, self.start, self.frames), k, v)

    def committed(self):
        if not self.history:
            return self.chunk
        return [tuple(torch.cat(pair, dim=1) for pair in zip(*layer, strict=True))
                for layer in zip(self.history, self.chunk, strict=True)]


@pytest.fixture(scope="module")
def recorded():
    with safe_open(Path(__file__).parent / "data" / "self_forcing.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key).float() for key in file.keys()}
        return tensors, json.loads(file.metadata()["timesteps"])


@pytest.fixture(scope="module")
def replayed(recorded):
    """Flows like the recorded ones, and the last layer's K (before RoPE) and V of the whole history."""
    tensors, timesteps = recorded
    prefix = "model."
    model = CausalWan.from_state_dict({
        key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)})
    prompt = model.project_context(tensors["context"])
    grid = tuple(size // 2 for size in tensors["inputs"].shape[-2:])
    frames = tensors["inputs"].shape[-3]
    flows, history = torch.empty_like(tensors["outputs"]), []
    for chunk, steps in enumerate(tensors["inputs"]):
        for step, (x, timestep) in enumerate(zip(steps, timesteps, strict=True)):
            attend = ExactAttention(history, grid, frames)
            flows[chunk, step] = model(x, torch.full((1, frames), timestep), prompt, attend=attend)
        history = attend.committed()
    return flows, history[-1]


def test_every_chunk_and_timestep_agrees(recorded, replayed):
    tensors, _ = recorded
    flows, _ = replayed
    assert tensors["outputs"].std() > 1
    assert (flows - tensors["outputs"]).abs().amax() < TOLERANCE


def test_keys_and_values_agree(recorded, replayed):
    tensors, _ = recorded
    keys, values = replayed[1]
    tokens = tensors["values"].shape[1]
    grid = tuple(size // 2 for size in tensors["inputs"].shape[-2:])
    frames = tensors["inputs"].shape[-3]
    first = (len(tensors["inputs"]) - 1) * frames
    assert (keys[:, -tokens:] - tensors["keys"]).abs().amax() < TOLERANCE
    assert (values[:, -tokens:] - tensors["values"]).abs().amax() < TOLERANCE
    assert (Rope(128, grid).apply(tensors["keys"], first, frames) - tensors["roped_keys"]).abs().amax() < TOLERANCE


def test_the_history_matters(recorded):
    """A model that ignored its cache would fail the parity: later chunks answer differently without their history."""
    tensors, timesteps = recorded
    model = CausalWan.from_state_dict({
        key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")})
    grid = tuple(size // 2 for size in tensors["inputs"].shape[-2:])
    frames = tensors["inputs"].shape[-3]
    x = tensors["inputs"][-1, 0]
    alone = model(x, torch.full((1, frames), timesteps[0]), tensors["context"], attend=ExactAttention([], grid, frames))
    assert (alone - tensors["outputs"][-1, 0]).abs().mean() > 0.01
