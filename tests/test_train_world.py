"""What the tiny world model is trained on is what it meets on a walk: the same frames, positions and cameras, in both branches."""

import pytest
import torch

from comfyui_qvg.benchmarks.train_world.diffusion import GROWING, SIGMAS, Trainer
from comfyui_qvg.benchmarks.train_world.walks import CHUNK, SEQUENCE, VIEWS, Pool, make_walks
from comfyui_qvg.qvg.attention import Rope
from comfyui_qvg.qvg.attention.prope import Prope
from comfyui_qvg.qvg.attention.rope import NoRope
from comfyui_qvg.qvg.attention.world import View, WorldAttention
from comfyui_qvg.qvg.cache.geometry import Geometry
from comfyui_qvg.qvg.cache.kv_cache import KVCache
from comfyui_qvg.qvg.demo.world_scenes import INTRINSICS
from comfyui_qvg.qvg.models.worldplay_wan import WorldWan, WorldWanSizes
from comfyui_qvg.qvg.settings import PRESETS
from comfyui_qvg.qvg.video.world import walk_cache

GRID, HEAD_DIM, CHANNELS = (2, 3), 128, 4
PAST = SEQUENCE - CHUNK


@pytest.fixture(scope="module")
def walks():
    return make_walks(2, seed=6, frames=24)


@pytest.fixture(scope="module")
def trainer(walks):
    torch.manual_seed(0)
    network = WorldWan(WorldWanSizes(HEAD_DIM, 32, 2, 8, CHANNELS, 16))
    for parameter in network.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    pool = Pool(torch.randn(3, CHANNELS, 24, 2 * GRID[0], 2 * GRID[1]), torch.tensor([0, 1, 1]))
    return Trainer(network, torch.zeros(1, 1, 8), GRID, pool, walks, "cpu")


def cached(trainer, walks, number, reads, clean, new, noisy, sigma, chunks):
    """The flow of latent frames `new` from the shipped attention, which reads frames that were stored in passes of `chunks`."""
    network, path = trainer.network, walks.cameras[number]
    cache = KVCache(PRESETS["off"], layers=2, heads=1, head_dim=HEAD_DIM, grid=GRID, rope=NoRope, branches=2, dtype=torch.float32,
                    max_frames=len(reads), chunk_frames=chunks, stored_frames=len(reads))
    prope, rope = Prope(HEAD_DIM, GRID, path, INTRINSICS.expand(len(path), 3, 3)), Rope(HEAD_DIM, GRID)

    def passed(frames, before, x, timestep, store):
        attend = WorldAttention(cache, View(rope, prope, before, frames), store=store)
        return network(x, torch.full((1, len(frames)), timestep), trainer.prompt, attend, action=walks.actions[number][frames][None])

    with torch.no_grad():
        for start in range(0, len(reads), chunks):
            passed(reads[start:start + chunks], reads[:start], clean[:, :, start:start + chunks], 14.0, True)
        return passed(new, reads, noisy, 1000 * sigma, False)


@pytest.mark.parametrize(("growing", "chunks"), [(False, PAST), (True, CHUNK)])
def test_a_chunk_sees_what_it_sees_on_a_walk(trainer, walks, growing, chunks):
    """In a rebuilt sequence the frames that are read see each other; in a growing one each sees those before it."""
    order = walks.chosen[1, -1].tolist()
    reads, new = order[:PAST], order[PAST:]
    assert reads != list(range(4, PAST + 4)) and new == list(range(20, 24)), "this chunk also reads frames that were found"
    clip = torch.randn(1, CHANNELS, SEQUENCE, 2 * GRID[0], 2 * GRID[1], generator=torch.Generator().manual_seed(1))
    forward, back, actions = walks.forward[1, order][None], walks.back[1, order][None], walks.actions[1, order][None]
    if growing:
        attend = trainer.attend(SEQUENCE, GROWING, forward.repeat(1, 2, 1, 1), back.repeat(1, 2, 1, 1), True)
        flow = trainer.flow(clip, clip, torch.full((1, SEQUENCE), SIGMAS[2]), attend, actions.repeat(1, 2))[:, :, PAST:]
    else:
        attend = trainer.attend(PAST, (PAST,), forward, back, False)
        flow = trainer.flow(clip[:, :, :PAST], clip[:, :, PAST:], torch.full((1, CHUNK), SIGMAS[2]), attend, actions)
    expected = cached(trainer, walks, 1, reads, clip[:, :, :PAST], new, clip[:, :, PAST:], SIGMAS[2], chunks)
    assert expected.std() > 0.1 and (flow - expected).abs().amax() < 1e-3 * expected.abs().amax()


def test_a_banked_walk_is_read_as_a_bank_is(trainer, walks):
    """Each chunk is stored when it is done, and the last one reads those that its camera chose, at positions from 0 on."""
    network, path, number = trainer.network, walks.cameras[1], 1
    clip = torch.randn(1, CHANNELS, 24, 2 * GRID[0], 2 * GRID[1], generator=torch.Generator().manual_seed(3))
    reads = [list(range(start)) for start in GROWING[:-1]] + walks.chosen[number, :, :PAST].tolist()
    assert reads[-1][:4] == [0, 1, 2, 3] and len(reads) == 6
    attend = trainer.bank([torch.tensor([read], dtype=torch.long) for read in reads], walks.forward[[number]], walks.back[[number]])
    actions = walks.actions[[number]]
    flow = trainer.flow(clip, clip, torch.full((1, 24), SIGMAS[2]), attend, actions.repeat(1, 2))[:, :, -CHUNK:]
    cache = walk_cache(PRESETS["off"], Geometry(2, 1, HEAD_DIM, GRID), memory="bank", views=VIEWS, frames=24, dtype=torch.float32)
    prope, rope = Prope(HEAD_DIM, GRID, path, INTRINSICS.expand(len(path), 3, 3)), Rope(HEAD_DIM, GRID)
    with torch.no_grad():
        for start, read in zip(range(0, 24, CHUNK), reads):
            new = list(range(start, start + CHUNK))
            cache.choose(read)
            timestep, store = (1000 * SIGMAS[2], False) if start == 20 else (14.0, True)
            expected = network(clip[:, :, new], torch.full((1, CHUNK), timestep), trainer.prompt,
                               WorldAttention(cache, View(rope, prope, read, new), store=store), action=actions[:, new])
    assert expected.std() > 0.1 and (flow - expected).abs().amax() < 1e-3 * expected.abs().amax()


def test_sequences_are_what_chunks_read(walks):
    assert walks.chosen.shape == (2, 2, SEQUENCE)
    assert walks.chosen[0, 0].tolist() == list(range(SEQUENCE)), "while all fit, all are read"
    assert (walks.chosen.diff(dim=-1) > 0).all() and VIEWS.window == PAST


def test_both_kinds_of_steps_lower_the_loss(trainer):
    """On one clip of two chunks, with a seed; the network's own context is taken in, too."""
    torch.manual_seed(2)
    before = [p.detach().clone() for p in trainer.network.parameters()]
    for own in (False, True):
        trainer.train(0.03, 2, 1e-3, own, "test")
    moved = [float((p.detach() - old).abs().amax()) for p, old in zip(trainer.network.parameters(), before)]
    assert trainer.step > 2 and sum(moved) > 0 and all(torch.isfinite(p).all() for p in trainer.network.parameters())
