"""A walk with three kinds of memory on tiny random networks, against the same walk computed from plain tensors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from comfyui_qvg.qvg.attention import Rope
from comfyui_qvg.qvg.attention.functions import sdpa
from comfyui_qvg.qvg.attention.prope import Prope
from comfyui_qvg.qvg.attention.rope import rotate
from comfyui_qvg.qvg.cache.geometry import Geometry
from comfyui_qvg.qvg.models.hunyuan_layers import HunyuanSizes
from comfyui_qvg.qvg.models.worldplay_hunyuan import WorldPlayHunyuan
from comfyui_qvg.qvg.models.worldplay_wan import WorldWan, WorldWanSizes
from comfyui_qvg.qvg.settings import PRESETS
from comfyui_qvg.qvg.video import ChunkDone, Run, Sampler
from comfyui_qvg.qvg.video.camera_moves import walk
from comfyui_qvg.qvg.video.noise import draw_noise
from comfyui_qvg.qvg.video.view_memory import ViewMemory
from comfyui_qvg.qvg.video.world import CHUNK, DISTILLED, MEMORIES, HunyuanScene, WanScene, WorldCondition, WorldModel, walk_cache

GRID, LAYERS, HEADS, DIM = (2, 3), 2, 2, 128
SHAPE = (1, 48, 2 * GRID[0], 2 * GRID[1])
GEOMETRY = Geometry(LAYERS, HEADS, DIM, GRID)
VIEWS = ViewMemory(recent=4, retrieved=4)
PATH = walk("right-11, left-12")  # 24 cameras: turn away, turn back
RUN = Run(frames=len(PATH), chunk_frames=CHUNK, sigmas=DISTILLED, solver="euler", seed=3)


def random_tensor(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomized(made):
    for parameter in made.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.08)
    return made.requires_grad_(False).eval()


def made_wan():
    torch.manual_seed(0)
    return randomized(WorldWan(WorldWanSizes(dim=HEADS * DIM, ffn_dim=64, layers=LAYERS, text_dim=8)))


@pytest.fixture(scope="module")
def network():
    return made_wan()


@pytest.fixture(scope="module")
def image():
    return random_tensor(1, 48, 1, *SHAPE[2:], seed=5)


@pytest.fixture(scope="module")
def hunyuan():
    """A scene of a tiny 8B, whose grid is that of the latents."""
    torch.manual_seed(0)
    made = randomized(WorldPlayHunyuan(HunyuanSizes(
        dim=HEADS * DIM, head_dim=DIM, ffn_dim=64, layers=LAYERS, channels=8, inputs=17, text_dim=8, glyph_dim=8, glyph_hidden=8,
        image_dim=8)))
    text = made.text(random_tensor(1, 3, 8, seed=1), image=random_tensor(1, 2, 8, seed=2))
    return HunyuanScene(made, text, PATH.actions, random_tensor(1, 8, 1, *GRID, seed=5))


def wan_scene(network, image, seed=1):
    return WanScene(network, network.project_context(random_tensor(1, 3, 8, seed=seed)), PATH.actions, image)


def sampler_of(scenes, memory, shape=SHAPE, settings=PRESETS["off"], views=VIEWS, run=RUN, weights=(1.0,), path=PATH):
    conditions = [WorldCondition(scene, walk_cache(
        settings, GEOMETRY, memory=memory, views=views, frames=run.frames, dtype=torch.float32), weight)
        for scene, weight in zip(scenes, weights)]
    return Sampler(WorldModel(conditions, path, memory=memory, views=views, rope=Rope), run, shape)


def make(network, image, memory, settings=PRESETS["off"], views=VIEWS, run=RUN, cfg=None):
    scenes = [wan_scene(network, image, seed) for seed in (1, 2)]
    return sampler_of(scenes, memory, settings=settings, views=views, run=run, weights=(1.0,) if cfg is None else (cfg, 1 - cfg))


def video(sampler) -> torch.Tensor:
    return torch.cat([event.latents for event in sampler if isinstance(event, ChunkDone)], dim=2)


class Plain:
    """The same scene over plain lists of raw keys and values. A context has (k, v) of every layer, and the latent frames that they are."""

    def __init__(self, scene, shape):
        self.scene, self.shape = scene, shape
        self.rope, self.prope = Rope(DIM, GRID), Prope(DIM, GRID, PATH.cameras, PATH.intrinsics)

    def run(self, x, timestep, new, context, kept=None):
        every = [*context.get("frames", []), *new]
        cos, sin = (part[:, None] for part in self.rope.tables(0, len(every), "cpu"))

        def attend(layer, q, k, v, text=None):
            if kept is not None:
                kept[layer] = k, v
            past = 0
            if context:
                past = context[layer][0].shape[1]
                k, v = (torch.cat(pair, 1) for pair in zip(context[layer], (k, v)))
            near = [rotate(q, cos[past:], sin[past:]), rotate(k, cos, sin), v]
            far = [self.prope.queries(q, new), self.prope.keys(k, every), self.prope.values(v, every)]
            if text is not None:
                near[1:], far[1:] = ([torch.cat(pair, 1) for pair in zip(text, branch[1:])] for branch in (near, far))
            return sdpa(*near), self.prope.outputs(sdpa(*far), new)

        return self.scene.flow(x, timestep, new, attend)

    def walk(self, memory, noise, read):
        """Chunk by chunk; read(first) names the frames of the context."""
        done, bank, given = [], {}, self.scene.given
        for first in range(0, len(PATH), CHUNK):
            new, context, frames = list(range(first, first + CHUNK)), {}, read(first)
            if memory == "rebuild" and frames:
                kept = {}
                self.run(torch.cat(done, 2)[:, :, frames], torch.full((1, len(frames)), 14.0), frames, {}, kept)
                context = kept | {"frames": frames}
            elif frames:
                context = {layer: tuple(torch.cat([bank[frame][layer][part] for frame in frames], 1) for part in range(2))
                           for layer in range(LAYERS)} | {"frames": frames}
            x = noise(first)
            for sigma, following in zip(DISTILLED, DISTILLED[1:]):
                timestep = torch.full((1, CHUNK), 1000 * sigma)
                if not first and given is not None:
                    x[:, :, :1], timestep[:, 0] = given, 14.0
                x = x + (following - sigma) * self.run(x, timestep, new, context)
                if not first and given is not None:
                    x[:, :, :1] = given
            done.append(x)
            kept, size = {}, GRID[0] * GRID[1]
            self.run(x, torch.full((1, CHUNK), 14.0), new, context, kept)
            for number, frame in enumerate(new):
                at = slice(number * size, (number + 1) * size)
                bank[frame] = {layer: tuple(part[:, at] for part in kept[layer]) for layer in range(LAYERS)}
        return torch.cat(done, 2)


@pytest.mark.parametrize("variant", ["5b", "8b"])
@pytest.mark.parametrize("memory", MEMORIES)
def test_without_quantizer_a_walk_is_that_of_plain_tensors(network, image, hunyuan, memory, variant):
    scene = wan_scene(network, image) if variant == "5b" else hunyuan
    shape = SHAPE if variant == "5b" else (1, 8, *GRID)
    sampler = sampler_of([scene], memory, shape)

    def read(first):
        return list(range(first)) if memory == "append" else VIEWS.select(PATH, first)

    def noise(first):
        return draw_noise(RUN, first // CHUNK, "start", (*shape[:2], CHUNK, *shape[2:]), torch.device("cpu"))

    made, exact = video(sampler), Plain(scene, shape).walk(memory, noise, read)
    assert exact.std() > 0.3
    assert (made - exact).abs().max() < 1e-4
    # the start image is latent frame 0 of the 5B, and a condition of the 8B
    assert variant == "8b" or (made[:, :, :1] - image).abs().max() < 1e-6
    # the last chunk looks at what the first one saw
    assert memory == "append" or sampler.model.reads == [0, 1, 2, 3, 16, 17, 18, 19]


def test_memories_differ(network, image):
    made = [video(make(network, image, memory)) for memory in MEMORIES]
    # the first chunk has no context, and the second the same one
    assert all(torch.equal(one[:, :, :4], made[0][:, :, :4]) for one in made)
    assert min((made[a] - made[b])[:, :, 12:].abs().mean() for a, b in ((0, 1), (0, 2), (1, 2))) > 1e-3


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("preset", ["quality", "tiny", "paper"])
def test_with_quantizer(network, image, memory, preset):
    sampler = make(network, image, memory, PRESETS[preset])
    exact, made = video(make(network, image, memory)), video(sampler)
    error = (made - exact)[:, :, 4:].square().mean() / exact.var()
    assert 0 < error < 0.5
    stats = sampler.model.stats()
    assert stats.held_frames == (8 if memory == "rebuild" else 24)
    assert stats.stored_bytes > 0
    assert stats.peak_bytes >= stats.stored_bytes + stats.workspace_bytes


def test_rebuilding_and_the_bank_need_a_workspace_for_what_they_read_only(network, image):
    sizes = {}
    for memory in MEMORIES:
        sampler = make(network, image, memory)
        video(sampler)
        sizes[memory] = sampler.model.stats().workspace_bytes / (4 * GRID[0] * GRID[1] * DIM * 4)
    assert sizes == {"rebuild": 12, "append": 24, "bank": 12}


def test_guidance_keeps_a_cache_for_each_condition(network, image):
    guided, plain = video(make(network, image, "rebuild", cfg=3.0)), video(make(network, image, "rebuild"))
    assert (guided - plain).abs().mean() > 1e-3
    assert torch.equal(video(make(network, image, "rebuild", cfg=1.0)), plain)


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_walk_that_stops_goes_on_as_if_it_had_not(network, image, memory):
    settings = replace(PRESETS["balanced"], recent_frames=4)
    whole, sampler, parts = video(make(network, image, memory, settings)), make(network, image, memory, settings), []
    for event in sampler:
        if isinstance(event, ChunkDone):
            parts.append(event.latents)
            if len(parts) == 3:
                break
    parts += [event.latents for event in sampler if isinstance(event, ChunkDone)]
    assert torch.equal(torch.cat(parts, 2), whole)


@pytest.mark.parametrize("memory", MEMORIES)
def test_memory_that_runs_out_is_given_up_step_by_step(network, image, memory):
    class Scarce:
        failures = 3

        def __call__(self, q, k, v):
            if k.shape[1] > 2 * CHUNK * 6 - 1 and self.failures:
                self.failures -= 1
                raise torch.OutOfMemoryError("Tried to allocate more than there is.")
            return sdpa(q, k, v)

    sampler = make(network, image, memory, PRESETS["balanced"])
    sampler.model.attention = Scarce()
    assert video(sampler).shape[2] == len(PATH)
    assert not Scarce.failures or sampler.model.attention.failures == 0


def test_what_does_not_fit_is_refused(network, image):
    with pytest.raises(ValueError, match="The memory is 'all'; choose one of rebuild, append, bank"):
        walk_cache(PRESETS["off"], GEOMETRY, memory="all", views=VIEWS, frames=8)
    sampler = make(network, image, "bank", run=replace(RUN, frames=28))
    with pytest.raises(ValueError, match="reaches beyond the camera path of 24"):
        video(sampler)
