"""Rooms look as their cameras say."""

import math

import pytest
import torch

from comfyui_qvg.qvg.demo.world_scenes import (
    HALF,
    HALF_HEIGHT,
    INTRINSICS,
    PACE,
    WORLD_HEIGHT,
    WORLD_WIDTH,
    Rooms,
    random_rooms,
    random_starts,
    render,
)
from comfyui_qvg.qvg.video.camera_moves import Pace, walk
from comfyui_qvg.qvg.video.cameras import inverse

WALLS = torch.tensor([[0.4, 0, 0], [0, 0.4, 0], [0, 0, 0.4], [0.4, 0.4, 0]])


@pytest.fixture(scope="module")
def room():
    """Red ahead, green to the right, blue behind, yellow to the left; white circles, black floor, grey ceiling."""
    return Rooms(wall=WALLS[None], shape=torch.zeros(1, 4, dtype=torch.long), picture=torch.ones(1, 4, 3), floor=torch.zeros(1, 3),
                 ceiling=torch.full((1, 3), 0.25))


def seen(room, moves, pace=PACE):
    """The last picture of a path, [3, H, W] in 0..1."""
    return (render(room, walk(moves, pace).cameras[None, -1:])[0, :, 0] + 1) / 2


@pytest.mark.parametrize(("turns", "wall"), [("still-1", 0), ("right-1", 1), ("right-2", 2), ("left-1", 3)])
def test_a_quarter_turn_shows_the_next_wall(room, turns, wall):
    picture = seen(room, turns, Pace(turn=90))
    assert picture.shape == (3, WORLD_HEIGHT, WORLD_WIDTH)
    assert torch.allclose(picture[:, WORLD_HEIGHT // 2, WORLD_WIDTH // 2], torch.ones(3)), "the picture hangs in the middle"
    assert torch.allclose(picture[:, 20, 20], WALLS[wall], atol=1e-6)


def test_a_wall_is_as_large_as_the_lens_makes_it(room):
    """From the middle the wall's edge is 45 degrees away; half a metre nearer its upper edge is beyond the picture's."""
    across = 0.5 + float(INTRINSICS[0, 0])
    assert across > 1, "the wall fills the width"
    nearer, further = (int((seen(room, moves, Pace(step=0.5))[0, :, WORLD_WIDTH // 4] == 0.25).sum()) for moves in ("w-1", "s-2"))
    assert nearer == 0
    edge = WORLD_HEIGHT * (0.5 - float(INTRINSICS[1, 1]) * HALF_HEIGHT / (HALF + 1))
    assert abs(further - edge) <= 1


def test_a_picture_on_the_right_is_met_by_turning_right(room):
    """The white circle moves to the left of the view as the camera turns right, and grows on that side."""
    def column(moves):
        white = seen(room, moves).amin(0) > 0.9
        return float((white.sum(0) * torch.arange(WORLD_WIDTH)).sum() / white.sum())

    shift = column("still-1") - column("right-1")
    assert shift == pytest.approx(WORLD_WIDTH * float(INTRINSICS[0, 0]) * math.tan(math.radians(PACE.turn)), rel=0.15)


def test_rooms_differ_and_walks_begin_inside():
    rooms = random_rooms(20, torch.Generator().manual_seed(1))
    for number in range(20):
        room = rooms[number]
        assert len({tuple(colour.tolist()) for colour in [*(2 * room.wall), *room.picture]}) == 8 and len(set(room.shape.tolist())) == 4
    starts = inverse(random_starts(50, torch.Generator().manual_seed(2)))
    assert starts[:, :3, 3].abs().amax() < HALF / 2 and (starts[:, 1, 3] == 0).all()
    assert torch.allclose(torch.linalg.det(starts[:, :3, :3]), torch.ones(50, dtype=torch.float64))


def test_moving_the_world_with_the_camera_changes_nothing(room):
    """A batch is drawn as its rooms alone are."""
    rooms = random_rooms(2, torch.Generator().manual_seed(3))
    cameras = walk("right-1", PACE).cameras[None] @ random_starts(2, torch.Generator().manual_seed(4))[:, None]
    both = render(rooms, cameras)
    for number in range(2):
        assert torch.equal(both[number:number + 1], render(rooms[number:number + 1], cameras[number:number + 1]))
