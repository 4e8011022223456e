"""Which frames are remembered, against the original's choices.

tests/data/worldplay_cameras.safetensors holds, for three walks, what the original chose for each chunk with three sets of random points,
[chunks, 3, frames], -1 where it chose fewer, and how much of each other's view pairs of cameras have, the mean of the three.
"""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from comfyui_qvg.qvg.video.camera_moves import Pace, walk
from comfyui_qvg.qvg.video.cameras import CameraPath
from comfyui_qvg.qvg.video.view_memory import WORLDPLAY_5B, WORLDPLAY_8B, ViewMemory, clip_shares, overlap, view_points

WALKS = ("wander", "look", "there")
VARIANTS = {"5b": WORLDPLAY_5B, "8b": WORLDPLAY_8B}


@pytest.fixture(scope="module")
def recorded():
    """Tensors by name, and the path of each walk."""
    with safe_open(Path(__file__).parent / "data" / "worldplay_cameras.safetensors", "pt") as file:
        metadata = file.metadata()
        return {key: file.get_tensor(key) for key in file.keys()}, {name: walk(metadata[f"walk.{name}"]) for name in WALKS}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", WALKS)
def test_choices_are_the_original_s(recorded, name, variant):
    """Wherever its three sets of points agree with each other, and otherwise one of the three."""
    tensors, paths = recorded
    memory = VARIANTS[variant]
    for number, choices in enumerate(tensors[f"walk.{name}.{variant}"].tolist()):
        start = memory.window + 4 * number
        assert memory.select(paths[name], start) in [[frame for frame in choice if frame >= 0] for choice in choices], start


@pytest.mark.parametrize("name", WALKS)
def test_overlaps_are_the_original_s(recorded, name):
    """Its mean of three counts of about 2500 points has a standard error of half a percent."""
    tensors, paths = recorded
    pairs = tensors[f"walk.{name}.pairs"]
    cameras = paths[name].cameras
    found = torch.cat([overlap(cameras[one:one + 1], cameras[other:other + 1])[0] for one, other in pairs.tolist()])
    wanted = tensors[f"walk.{name}.overlaps"].double()
    assert (found - wanted).abs().max() < 0.02 and (found - wanted).abs().mean() < 0.004
    assert found.min() < 0.4 and found.max() > 0.5


@pytest.mark.parametrize("memory", [WORLDPLAY_5B, WORLDPLAY_8B, ViewMemory(8, 4, 12), ViewMemory(4, 0, 0)])
def test_selections_are_whole_chunks(recorded, memory):
    path = recorded[1]["look"]
    for start in range(0, len(path) - 3, 4):
        frames = memory.select(path, start)
        assert frames == sorted(set(frames)) and len(frames) == min(start, memory.window)
        assert all(frame // 4 * 4 + offset in frames for frame in frames for offset in range(4))
        assert set(range(max(0, start - memory.recent), start)) <= set(frames)
        assert set(range(min(start, memory.first))) <= set(frames)


def test_a_place_is_remembered():
    """After a look to the right and back, what was seen at the start is read again; a view never seen before gets the earliest clip."""
    path = walk("right-40, left-40, w-7")
    assert WORLDPLAY_5B.select(path, 72)[:4] == [4, 5, 6, 7]
    assert WORLDPLAY_5B.select(path, 84)[:4] == [0, 1, 2, 3]
    assert WORLDPLAY_8B.select(path, 72)[:8] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert WORLDPLAY_5B.select(walk("right-59", Pace(turn=6)), 40)[:4] == [0, 1, 2, 3]


def test_the_same_view_twice_is_the_earlier_one():
    path = walk("still-20, right-40, left-40, still-15")
    assert WORLDPLAY_5B.select(path, 112)[:4] == [0, 1, 2, 3]
    assert ViewMemory(12, 0, 12).select(path, 112)[:12] == list(range(12))
    assert clip_shares(path, 112, range(0, 20, 4)) == [1.0] * 5


def test_any_world_will_do(recorded):
    path = recorded[1]["wander"]
    moved = CameraPath.from_cameras(path.cameras @ walk("right-17, up-9, w-99").cameras[-1])
    for start in range(24, 112, 8):
        assert WORLDPLAY_8B.select(moved, start) == WORLDPLAY_8B.select(path, start)


def test_longer_chunks_read_what_each_clip_would(recorded):
    """Sixteen frames at once, as the model that is not causal makes them."""
    path = recorded[1]["wander"]
    parts = [WORLDPLAY_8B.select(path, start) for start in range(64, 80, 4)]
    assert WORLDPLAY_8B.select(path, 64, 16) == sorted({frame for part in parts for frame in part if frame < 64})


def test_a_path_that_ends_within_the_chunk():
    path = walk("w-20, right-30, w-5")
    assert len(path) == 56 and WORLDPLAY_5B.select(path[:54], 52) == WORLDPLAY_5B.select(path[:54], 52, 16)
    assert len(WORLDPLAY_5B.select(path[:53], 52)) == 16


def test_points_are_evenly_spread_and_symmetric():
    points = view_points()
    assert points.norm(dim=1).max() < 8
    for axis in (0, 1):
        mirrored = points.clone()
        mirrored[:, axis].neg_()
        assert torch.equal(torch.sort(mirrored, dim=0)[0], torch.sort(points, dim=0)[0])
    # half of a ball's volume lies beyond 0.79 of its radius
    assert abs((points.norm(dim=1) > 8 * 0.5 ** (1 / 3)).double().mean() - 0.5) < 0.01
    assert (overlap(torch.eye(4, dtype=torch.float64)[None], torch.eye(4, dtype=torch.float64)[None]) == 1).all()


def test_what_is_given_is_checked():
    with pytest.raises(ValueError, match="recent is 10 latent frames; frames are remembered in clips of 4: give"):
        ViewMemory(10)
    with pytest.raises(ValueError, match="retrieved is -4"):
        ViewMemory(retrieved=-4)
    with pytest.raises(ValueError, match="starts at latent frame 8, and the path has 8"):
        WORLDPLAY_5B.select(walk("w-7"), 8)
