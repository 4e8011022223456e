"""One rank of the videos of test_ranks, a process of its own on a CPU or a GPU: `python ranks_worker.py FOLDER RANK SIZE PLACE CASE`."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from comfyui_qvg.qvg.attention import CachedAttention, Rope
from comfyui_qvg.qvg.attention.ranks import Cut, Ranks, ShardedAttention
from comfyui_qvg.qvg.cache.kv_cache import KVCache
from comfyui_qvg.qvg.models.longcat import LongCat, LongCatSizes
from comfyui_qvg.qvg.models.longcat_schedule import noise_levels
from comfyui_qvg.qvg.models.wan import CausalWan, WanSizes
from comfyui_qvg.qvg.settings import PRESETS
from comfyui_qvg.qvg.video import CachedNetwork, ChunkDone, Condition, Run, Sampler, guided, rank_sessions
from comfyui_qvg.qvg.video import ranks as ranks_module
from comfyui_qvg.qvg.video.rank_work import Meeting, joined
from comfyui_qvg.qvg.video.ranks import Leader, RankedNetwork, RankedSegments, RankedWorld, RankEnded, follow, rank_cache
from comfyui_qvg.qvg.video.segment_model import segment_cache
from comfyui_qvg.qvg.video.segments import load, save_sampler
from comfyui_qvg.qvg.video.world import WorldCondition, walk_cache

HEADS, GRID = 4, (4, 3)
SHAPE = (1, 16, 8, 6)
RUN = Run(frames=12, sigmas=(1, 0.5, 0), seed=3)
SETTINGS = {name: PRESETS[name] for name in ("off", "balanced", "paper")} | {
    "offload": replace(PRESETS["tiny"], offload=True), "budget": replace(PRESETS["balanced"], budget_gib=0.006)}


def network(device="cpu", dtype=torch.float32) -> CausalWan:
    torch.manual_seed(0)
    made = CausalWan(WanSizes(dim=128 * HEADS, ffn_dim=64, layers=2, text_dim=8)).requires_grad_(False).eval()
    return made.to(device, dtype)


def prompts(net) -> list:
    place = next(net.parameters())
    return [net.project_context(random_text(seed).to(place)) for seed in (0, 1)]


def conditions(net, make_cache, cfg: float) -> list[Condition]:
    prompt, negative = prompts(net)
    return [Condition(prompt, make_cache())] if cfg == 1 else guided(prompt, make_cache(), negative, make_cache(), cfg)


def alone(settings, run=RUN, cfg=1.0, device="cpu", dtype=torch.float32) -> Sampler:
    """The same video by one process without ranks."""
    net = network(device, dtype)

    def cache() -> KVCache:
        return KVCache(settings, layers=2, heads=HEADS, head_dim=128, grid=GRID, rope=Rope, dtype=dtype, device=device,
                       max_frames=run.frames)

    return Sampler(CachedNetwork(net, conditions(net, cache, cfg)), run, SHAPE, device=device)


def main(folder: Path, rank: int, size: int, place: str, case: dict) -> None:
    device = f"cuda:{rank}" if case.get("device") == "cuda" else "cpu"
    with joined(Meeting(place, size), rank, device) as ranks:
        take_part(folder, case, ranks, device)


def take_part(folder: Path, case: dict, ranks: Ranks, device: str) -> None:
    if "limits" in case:
        ranks_module.usual_limit = lambda kind: case["limits"][ranks.rank]
        cache = rank_cache(network(), SETTINGS["balanced"], RUN, GRID, ranks)
        torch.save({"limit": cache.geometry.limit}, folder / f"{ranks.rank}.pt")
    elif "copies" in case:
        torch.save({"copies": copies(ranks, case["copies"])}, folder / f"{ranks.rank}.pt")
    elif "keys" in case:
        torch.save(coded(case["keys"], case["frames"], ranks, device), folder / f"{ranks.rank}.pt")
    elif "memory" in case:
        walk(folder, case, ranks)
    elif "segments" in case:
        segments(folder, case, ranks, device)
    else:
        history(folder, case, ranks, device)


def history(folder: Path, case: dict, ranks: Ranks, device: str) -> None:
    net = network(device, getattr(torch, case.get("dtype", "float32")))
    settings, run = SETTINGS[case["settings"]], replace(RUN, frames=case.get("frames", RUN.frames))
    grid = tuple(case.get("grid", GRID))
    sides = conditions(net, lambda: rank_cache(net, settings, run, grid, ranks, device=device), case.get("cfg", 1.0))
    model = RankedNetwork(net, sides, ranks)
    if ranks.leads:
        make(folder, case, model, ranks, run, (1, 16, 2 * grid[0], 2 * grid[1]), device)
        return
    if case.get("dies"):
        die_in_the_middle(net, passes=5)
    follow(model, ranks, device)


def coded(name: str, frames: int, ranks: Ranks | None = None, device="cpu") -> list:
    """What is stored behind each chunk of 12 frames of random keys and values, equal for any number of ranks, and the attention of the
    chunk."""
    heads = HEADS if ranks is None else ranks.heads(HEADS)
    cache = KVCache(PRESETS[name], layers=1, heads=heads, head_dim=128, grid=GRID, rope=Rope, dtype=torch.bfloat16, device=device,
                    max_frames=RUN.frames, chunk_frames=frames, **({} if ranks is None else {"agree": ranks.mean}))
    draw, found = torch.Generator().manual_seed(0), []
    for first in range(0, RUN.frames, frames):
        x = torch.randn(3, 1, frames * GRID[0] * GRID[1], HEADS, 128, generator=draw).to(device, torch.bfloat16)
        attend = CachedAttention(cache, start_frame=first, frames=frames, store=True)
        if ranks is not None:
            cut = Cut(ranks, GRID)
            x, attend = cut.split(x)[ranks.rank], ShardedAttention(attend, ranks, cut)
        found.append({"out": attend(0, *x).cpu()} | stored(cache.layers[0]))
    return found


def stored(layer) -> dict:
    return {f"{number} {half} {name}": part.cpu().clone() for number, pair in enumerate(layer.spans) for half, span in zip("kv", pair.spans)
            for name, part in span.tensors().items()}


class Copied(TorchDispatchMode):
    """Counts the elements that operations copy."""

    NAMES = ("aten.cat", "aten.stack", "aten.clone", "aten.copy_", "aten._to_copy", "aten._reshape_copy", "aten.contiguous")

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        if str(function).startswith(self.NAMES):
            self.elements += out.numel()
        return out


def copies(ranks: Ranks, frames: int) -> float:
    """How many times the elements of q are copied by one call."""
    q = torch.randn(2, frames * GRID[0] * GRID[1] // ranks.size, HEADS, 8)
    attend = ShardedAttention(lambda layer, q, k, v: q + k + v, ranks, Cut(ranks, GRID))
    with torch.no_grad(), Copied() as copied:
        out = attend(0, q, q, q)
    assert torch.equal(out, q + q + q)
    return copied.elements / q.numel()


GIVEN = 4
# a first segment of six latent frames, then two of three
SEGMENTS = Run(frames=12, chunk_frames=3, first_frames=6, sigmas=tuple(noise_levels(2, distilled=True).tolist()), solver="euler", seed=3)


def longcat(device="cpu") -> LongCat:
    """Of four heads of 16."""
    torch.manual_seed(0)
    return LongCat(LongCatSizes(dim=64, head_dim=16, ffn_dim=64, layers=2, text_dim=8, time_dim=16, freq_dim=16)).requires_grad_(
        False).eval().to(device)


def segments_of(settings, make, cfg: float, device="cpu", **options):
    """A model of segments. make: called as `SegmentModel` is, options: for its cache."""
    net = longcat(device)
    prompt, negative = (random_text(seed).to(device) for seed in (0, 1))
    cache = segment_cache(net, settings, GRID, given=GIVEN, new=SEGMENTS.chunk_frames, device=device, **options)
    return make(net, prompt, cache, given=GIVEN, negative=None if cfg == 1 else negative, cfg=cfg)


def random_text(seed: int) -> torch.Tensor:
    return torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(seed))


def start_of(case: dict) -> torch.Tensor | None:
    """Latents of a start video, if the case has any frames of it."""
    frames = case.get("start", 0)
    return torch.randn(1, 16, frames, *SHAPE[2:], generator=torch.Generator().manual_seed(7)) if frames else None


def segments(folder: Path, case: dict, ranks: Ranks, device: str) -> None:
    model = segments_of(SETTINGS[case["settings"]], lambda net, prompt, cache, **more: RankedSegments(net, prompt, cache, ranks, **more),
                        case["segments"], device, heads=ranks.heads(HEADS), agree=ranks.mean)
    if ranks.leads:
        make(folder, case, model, ranks, SEGMENTS, SHAPE, device)
        return
    if case.get("dies"):
        die_in_the_middle(model.network, passes=4)
    follow(model, ranks, device)


def walk(folder: Path, case: dict, ranks: Ranks) -> None:
    from test_world import RUN as WALK
    from test_world import SHAPE as WALK_SHAPE

    model = walk_of(ranks, case["memory"])
    if ranks.leads:
        make(folder, case, model, ranks, WALK, WALK_SHAPE)
        return
    if case.get("dies"):
        die_in_the_middle(model.conditions[0].scene.network, passes=8)
    follow(model, ranks, "cpu")


def walk_of(ranks: Ranks, memory: str) -> RankedWorld:
    """The walk of test_world on one rank, rebuilt from the same seeds."""
    from test_world import GEOMETRY, PATH, VIEWS, made_wan, random_tensor, wan_scene
    from test_world import SHAPE as WALK_SHAPE

    geometry = replace(GEOMETRY, heads=ranks.heads(GEOMETRY.heads))
    image = Cut(ranks, GEOMETRY.grid).share(random_tensor(1, 48, 1, *WALK_SHAPE[2:], seed=5))
    cache = walk_cache(PRESETS["balanced"], geometry, memory=memory, views=VIEWS, frames=len(PATH), dtype=torch.float32, agree=ranks.mean)
    return RankedWorld([WorldCondition(wan_scene(made_wan(), image), cache)], PATH, ranks, memory=memory, views=VIEWS, rope=Rope)


def make(folder: Path, case: dict, model, ranks: Ranks, run: Run, shape: tuple[int, ...], device="cpu") -> None:
    """The first rank's part."""
    parts, said = [], ""
    try:
        with Leader(model, ranks) as leader:
            sampler = Sampler(leader, run, shape, start=start_of(case), device=device)
            if case.get("resume"):
                rank_sessions.restore(load(folder / case["resume"]), sampler, ranks, "tiny")
            for event in sampler:
                if isinstance(event, ChunkDone):
                    parts.append(event.latents)
                    if sampler.frames_done == case.get("save_at"):
                        save(folder / case["save"], sampler, case, ranks)
                    if sampler.frames_done == case.get("stop_at"):
                        break
    except RankEnded as error:
        said = str(error)
    stats = model.stats()
    torch.save({"latents": torch.cat(parts, 2).cpu(), "said": said, "stored": stats.stored_bytes, "bits": stats.by_bits},
               folder / case["out"])


def save(path: Path, sampler: Sampler, case: dict, ranks: Ranks) -> None:
    more = {"fingerprint": "tiny", "extra": {"x": 1}, "tensors": {"y": torch.ones(3)}}
    if "segments" in case:
        save_sampler(path, sampler, **more)
    else:
        (rank_sessions.save_walk if "memory" in case else rank_sessions.save)(path, sampler, ranks=ranks, **more)


def die_in_the_middle(network, passes: int) -> None:
    """End this process in the second layer of so many passes of a network."""
    calls, forward = [], network.blocks[1].forward

    def dying(*arguments, **options):
        calls.append(1)
        if len(calls) == passes:
            os._exit(9)
        return forward(*arguments, **options)

    network.blocks[1].forward = dying


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], json.loads(sys.argv[5]))
    # as in `commands.processes.leave`
    sys.stderr.flush()
    os._exit(0)
