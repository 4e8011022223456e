"""One video by two and four processes over Gloo, and where there are two GPUs by these, against the same by one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import pytest
import torch
from ranks_worker import GRID, HEADS, SETTINGS, alone, coded
from several_gpus import DEVICES
from test_world import SHAPE, made_wan, random_tensor, sampler_of, wan_scene

from comfyui_qvg.qvg.attention.ranks import Cut, Ranks
from comfyui_qvg.qvg.settings import PRESETS
from comfyui_qvg.qvg.video import ChunkDone, session, walk_session

# float32 in another order; and where that decides a bit of a quantized key
ROUNDING, FLIPS = 2e-5, 5e-3
WORKER = Path(__file__).with_name("ranks_worker.py")


def together(folder: Path, size: int, **case) -> dict:
    """Run a case by `size` processes; what the first one made. Raises AssertionError with what a process printed if one failed."""
    case, place = {"out": "out.pt"} | case, folder / f"ranks-{uuid4().hex}"
    processes = [subprocess.Popen([sys.executable, WORKER, folder, str(rank), str(size), place, json.dumps(case)],
                                  stderr=subprocess.PIPE, text=True) for rank in range(size)]
    errors = [process.communicate(timeout=600)[1] for process in processes]
    ended = [process.returncode for process in processes]
    assert ended == [0, *[9 if case.get("dies") else 0] * (size - 1)], "\n".join(errors)
    return torch.load(folder / case["out"])


def video(sampler) -> torch.Tensor:
    return torch.cat([event.latents for event in sampler if isinstance(event, ChunkDone)], 2).cpu()


@pytest.mark.parametrize(("settings", "size"), [("off", 4), ("balanced", 2), ("paper", 2), ("offload", 2), ("budget", 4)])
def test_ranks_make_the_video_of_one_process(settings, size, tmp_path):
    sampler = alone(SETTINGS[settings])
    exact, made = video(sampler), together(tmp_path, size, settings=settings)
    assert (made["latents"] - exact).abs().max() < (ROUNDING if settings == "off" else FLIPS)
    stats = sampler.model.stats()
    assert made["bits"].keys() == stats.by_bits.keys()
    # every rank keeps its heads, and what belongs to no head
    assert stats.stored_bytes / size <= made["stored"] <= stats.stored_bytes / size + 200


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("settings", "frames"), [
    ("off", 3), ("balanced", 3), ("balanced", 12), ("quality", 3), ("paper", 3), ("paper", 12)])
def test_what_is_stored_of_equal_keys_is_equal(settings, frames, device, tmp_path):
    """Of every chunk, to the last bit: each rank has its heads of what one process stores. And what attention makes of it is the same."""
    exact = coded(settings, frames, device=device)
    assert settings == "off" or any(part.dtype in (torch.uint8, torch.int16) for part in exact[-1].values())
    together(tmp_path, 2, keys=settings, frames=frames, device=device, out="0.pt")
    for rank in range(2):
        for whole, mine in zip(exact, torch.load(tmp_path / f"{rank}.pt"), strict=True):
            assert mine.keys() == whole.keys()
            out = Cut(Ranks(rank, 2), GRID).split(whole["out"])[rank]
            assert torch.allclose(mine.pop("out"), out, rtol=0, atol=2e-2)
            for name, part in mine.items():
                own = tuple(slice(None) if count == all_ else slice(rank * count, (rank + 1) * count)
                            for all_, count in zip(whole[name].shape, part.shape))
                assert torch.equal(part, whole[name][own]), name


def test_guidance(tmp_path):
    exact = video(alone(SETTINGS["balanced"], cfg=2.0))
    assert (together(tmp_path, 2, settings="balanced", cfg=2.0)["latents"] - exact).abs().max() < FLIPS


@pytest.mark.parametrize(("settings", "first", "then"), [("balanced", 2, 4), ("paper", 4, 2)])
def test_a_session_is_continued_by_any_number_of_ranks(settings, first, then, tmp_path):
    whole = video(alone(SETTINGS[settings]))
    begun = together(tmp_path, first, settings=settings, save="session", save_at=6, stop_at=6)
    loaded = session.load(tmp_path / "session")
    assert loaded.frames_done == 6 and loaded.geometry[0].heads == HEADS and loaded.extra == {"x": 1}
    assert torch.equal(loaded.tensors["y"], torch.ones(3))
    rest = together(tmp_path, then, settings=settings, resume="session")
    made = torch.cat([begun["latents"], rest["latents"]], 2)
    assert made.shape == whole.shape and (made - whole).abs().max() < FLIPS


def test_a_session_of_ranks_is_continued_by_one_process_and_the_other_way_round(tmp_path):
    whole = video(alone(SETTINGS["balanced"]))
    begun = together(tmp_path, 2, settings="balanced", save="ranks", save_at=6, stop_at=6)
    one = alone(SETTINGS["balanced"])
    session.load(tmp_path / "ranks").restore(one, "tiny")
    assert (torch.cat([begun["latents"], video(one)], 2) - whole).abs().max() < FLIPS
    one = alone(SETTINGS["balanced"])
    for event in one:
        if isinstance(event, ChunkDone) and one.frames_done == 6:
            break
    session.save(tmp_path / "one", one, fingerprint="tiny")
    rest = together(tmp_path, 2, settings="balanced", resume="one")
    assert (rest["latents"] - whole[:, :, 6:]).abs().max() < FLIPS


def test_a_rank_that_ends_in_the_middle_ends_the_video_with_a_sentence(tmp_path):
    made = together(tmp_path, 2, settings="balanced", dies=True, save="session", save_at=3)
    assert made["latents"].shape[2] == 3
    assert made["said"].startswith("Another rank of this video ended (") and made["said"].endswith("start all ranks again.")
    # the session that was saved before is whole
    assert session.load(tmp_path / "session").frames_done == 3


@pytest.mark.parametrize("memory", ["rebuild", "bank"])
def test_a_walk_by_two_ranks(memory, tmp_path):
    """Two branches of attention, chosen frames, and the share of a start image."""
    exact = video(sampler_of([wan_scene(made_wan(), random_tensor(1, 48, 1, *SHAPE[2:], seed=5))], memory, settings=PRESETS["balanced"]))
    made = together(tmp_path, 2, memory=memory)["latents"]
    assert made.shape == exact.shape
    assert (made - exact)[:, :, :8].abs().max() < FLIPS
    assert (made - exact).square().mean() < 1e-3 * exact.var()


@pytest.mark.parametrize(("memory", "first", "then"), [("rebuild", 2, 1), ("append", 1, 2), ("bank", 2, 1)])
def test_a_walk_is_continued_by_any_number_of_ranks(memory, first, then, tmp_path):
    """Of the chunks right behind the session: what rounding decides there is small, and grows along a walk."""
    def walk():
        return sampler_of([wan_scene(made_wan(), random_tensor(1, 48, 1, *SHAPE[2:], seed=5))], memory, settings=PRESETS["balanced"])

    def made(size: int, **case) -> torch.Tensor:
        if size > 1:
            return together(tmp_path, size, memory=memory, **case)["latents"]
        sampler, parts = walk(), []
        if "resume" in case:
            walk_session.load(tmp_path / case["resume"]).restore(sampler, "tiny")
        for event in sampler:
            if isinstance(event, ChunkDone):
                parts.append(event.latents)
            if sampler.frames_done == case["stop_at"]:
                break
        if "save" in case:
            walk_session.save(tmp_path / case["save"], sampler, fingerprint="tiny", extra={"x": 1}, tensors={"y": torch.ones(3)})
        return torch.cat(parts, 2)

    begun = made(first, save="walk", save_at=12, stop_at=12)
    loaded = walk_session.load(tmp_path / "walk")
    assert (loaded.frames_done, loaded.geometry[0].heads, loaded.extra) == (12, 2, {"x": 1})
    assert torch.equal(loaded.latents, begun) and torch.equal(loaded.tensors["y"], torch.ones(3))
    after, again = (made(size, resume="walk", stop_at=20) for size in (then, first))
    assert after.shape == again.shape == (*begun.shape[:2], 8, *begun.shape[3:])
    assert (after - again)[:, :, :4].abs().max() < FLIPS and (after - again).square().mean() < 1e-3 * again.var()


def test_a_rank_that_ends_in_the_middle_of_a_walk(tmp_path):
    made = together(tmp_path, 2, memory="bank", dies=True, save="walk", save_at=4)
    assert made["latents"].shape[2] == 4
    assert made["said"].startswith("Another rank of this video ended (") and made["said"].endswith("start all ranks again.")
    assert walk_session.load(tmp_path / "walk").frames_done == 4


def test_an_exchange_copies_as_little_as_it_can(tmp_path):
    """Queries, keys and values once before and once after they are sent, and so the result."""
    assert together(tmp_path, 2, copies=3, out="0.pt")["copies"] == 2 * 3 + 2


@pytest.mark.parametrize("limits", [(320 << 20, 96 << 20), (0, 96 << 20)])
def test_gpus_that_differ_have_one_workspace(limits, tmp_path):
    """So that a memory budget takes the same from the heads of each."""
    together(tmp_path, 2, limits=limits, out="0.pt")
    assert {torch.load(tmp_path / f"{rank}.pt")["limit"] for rank in range(2)} == {min(limits)}


def test_what_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="3 ranks do not divide the 4 heads of this model; use 1, 2, 4"):
        Ranks(0, 3).heads(4)
    with pytest.raises(ValueError, match="of 5 x 7 tokens cannot be divided evenly among 2 ranks"):
        Cut(Ranks(0, 2), (7, 5))


@pytest.mark.parametrize("grid", [(4, 3), (3, 4)])
def test_tokens_come_back_to_their_places(grid):
    size, frames = 2, 3
    cuts = [Cut(Ranks(rank, size), grid) for rank in range(size)]
    numbers = torch.arange(frames * grid[0] * grid[1], dtype=torch.float32)
    latents = numbers.view(1, 1, frames, *grid)
    parts = torch.stack([cut.share(latents).flatten(1).view(1, -1, 1, 1) for cut in cuts])
    joined = cuts[0].join(parts)
    assert joined.flatten().tolist() == numbers.tolist()
    assert torch.equal(cuts[0].split(joined), parts)
