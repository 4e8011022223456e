"""A network with a cache for each condition: passes that fail half-way, guidance, prompts over time, and giving up memory."""

import pytest
import torch

from comfyui_qvg.qvg.attention.functions import sdpa
from comfyui_qvg.qvg.attention.rope import Rope
from comfyui_qvg.qvg.cache.kv_cache import KVCache
from comfyui_qvg.qvg.cache.stats import CacheStats
from comfyui_qvg.qvg.settings import QVGSettings, TensorSettings
from comfyui_qvg.qvg.video import (
    Adapted,
    CachedNetwork,
    ChunkDone,
    Condition,
    Run,
    Sampler,
    guided,
)

EXACT = QVGSettings.preset("off")


class Toy:
    """Wan's forward with two layers of attention and nothing else: 8 heads of 8 channels are the latents' 64 channels."""

    def __init__(self):
        self.timesteps, self.weight = [], 1

    def __call__(self, x, timestep, context, attend):
        self.timesteps.append(timestep)
        tokens = x.permute(0, 2, 3, 4, 1).flatten(1, 3).unflatten(-1, (8, 8)) * self.weight + context
        for layer in range(2):
            tokens = tokens + attend(layer, tokens, 0.5 * tokens, tokens.roll(1, -1))
        return tokens.flatten(2).unflatten(1, (-1, *x.shape[3:])).permute(0, 4, 1, 2, 3)


class Failing:
    """Attention that runs out of memory in its n-th call, once."""

    def __init__(self, number):
        self.number, self.count = number, 0

    def __call__(self, q, k, v):
        self.count += 1
        if self.count == self.number:
            raise torch.OutOfMemoryError("full")
        return sdpa(q, k, v)


def toy(attention=sdpa, settings=EXACT, prompts=((0.1, 1.0),), **options):
    """A toy network under conditions, each a context and a weight, over caches of its own."""
    caches = [KVCache(settings, layers=2, heads=8, head_dim=8, grid=(4, 4), rope=Rope, dtype=torch.float32) for _ in prompts]
    conditions = [Condition(context, cache, weight) for (context, weight), cache in zip(prompts, caches)]
    return CachedNetwork(Toy(), conditions, attention=attention, **options)


def made(model, frames=9, **options):
    events = list(Sampler(model, Run(frames=frames, sigmas=(1, 0), **options), (1, 64, 4, 4)))
    return torch.cat([event.latents for event in events if isinstance(event, ChunkDone)], 2), events


def test_a_network_runs_without_gradients():
    """Also where its weights need them, and outside of the loop."""
    model = toy()
    model.network.weight = torch.ones(1, requires_grad=True)
    found = model.denoise(torch.randn(1, 64, 3, 4, 4), 0.5, 0, prompt_frame=0, store=True)
    assert not found.requires_grad


# of each chunk two passes of two layers attend: all heads together in the first chunk, two of eight in four calls a layer later
@pytest.mark.parametrize("number", [2, 3, 4, 5, 4 + 8 + 1, 4 + 8 + 5, 4 + 8 + 8, 4 + 16 + 14])
def test_a_storing_pass_that_fails_half_way_stores_once(number):
    """Whichever layer it reached: every layer then holds every chunk once, and the video is what it would have been."""
    whole, events = made(toy())
    assert not any(isinstance(event, Adapted) for event in events)
    model = toy(Failing(number))
    video, events = made(model)
    assert sum(isinstance(event, Adapted) for event in events) == 1
    for layer in model.caches[0].layers:
        assert [(entry.first, entry.frames) for entry in layer.entries] == [(0, 3), (3, 3), (6, 3)]
    torch.testing.assert_close(video, whole, rtol=1e-5, atol=1e-5)


def test_a_denoised_chunk():
    """x - sigma * flow, at sigma * 1000 for every frame, and conditions by their weights."""
    x, flows = torch.randn(2, 64, 3, 4, 4), []
    for context in (0.1, -0.4):
        network = Toy()
        flows.append(network(x, None, context, lambda layer, q, k, v: _alone(q, k, v)))
    model = toy(prompts=((0.1, 3.0), (-0.4, -2.0)))
    for condition in model.conditions:
        condition.cache = KVCache(EXACT, layers=2, heads=8, head_dim=8, grid=(4, 4), rope=Rope, batch=2, dtype=torch.float32)
    found = model.denoise(x, 0.625, 0, prompt_frame=0, store=False)
    torch.testing.assert_close(found, 3 * (x - 0.625 * flows[0]) - 2 * (x - 0.625 * flows[1]), rtol=1e-4, atol=1e-4)
    for timestep in model.network.timesteps:
        assert timestep.shape == (2, 3) and (timestep == 625).all()


def _alone(q, k, v):
    rope = KVCache(EXACT, layers=1, heads=8, head_dim=8, grid=(4, 4), rope=Rope, dtype=torch.float32).rope
    return sdpa(rope.apply(q, 0, 3), rope.apply(k, 0, 3), v)


def test_every_condition_has_a_history_of_its_own():
    """Rewinding and statistics cover all of them."""
    model = toy(prompts=((0.1, 2.5), (0.7, -1.5)))
    made(model)
    first, second = ([entry.spans[0].data for entry in cache.layers[1].entries] for cache in model.caches)
    assert len(first) == len(second) == 3 and not torch.equal(first[0], second[0])
    stats, parts = model.stats(), [cache.stats() for cache in model.caches]
    for name in ("elements", "stored_bytes", "workspace_bytes", "peak_bytes", "bf16_bytes", "host_bytes"):
        assert getattr(stats, name) == sum(getattr(part, name) for part in parts)
    assert (stats.frames, stats.held_frames, stats.tokens) == (9, 9, parts[0].tokens)
    assert stats == CacheStats.total(parts)
    model.rewind(3)
    assert [cache.frames for cache in model.caches] == [3, 3]


def test_conditions_of_guidance():
    pair = guided("a", "cache a", "b", "cache b", 4.5)
    assert [(one.prompt, one.cache, one.weight) for one in pair] == [("a", "cache a", 4.5), ("b", "cache b", -3.5)]
    plain = Condition("text", None)
    assert (plain.weight, plain.name(7), plain.context(7)) == (1.0, "", "text")


class Track:
    def name(self, frame):
        return f"name {frame}"

    def context(self, frame):
        return frame


def test_prompts_over_time():
    model = toy()
    model.conditions.append(Condition(Track(), None))
    assert model.prompt(5) == "\nname 5" and model.conditions[1].context(6) == 6


def test_giving_up_memory_goes_on_until_nothing_is_left():
    model = toy(settings=QVGSettings(key=TensorSettings(stages=0), value=TensorSettings(stages=0), sink_frames=0, recent_frames=0))
    made(model)
    said = []
    while (message := model.shrink()) is not None:
        said.append(message)
    assert len(said) == 4 and "1 at a time" in said[0] and "hold fewer bits" in said[1] and all("older half" in text for text in said[2:])
