"""Paths seen from above: what is drawn, and where."""

import pytest
import torch

from comfyui_qvg.qvg.report.chart import LAYERS, PEAK, SSIM
from comfyui_qvg.qvg.report.draw import INK, PANEL
from comfyui_qvg.qvg.report.top_view import SECTOR, draw_top_view, round_step, summary
from comfyui_qvg.qvg.video.camera_moves import PRESETS, preset, walk
from comfyui_qvg.qvg.video.view_memory import WORLDPLAY_5B


def pixels(image, colour):
    """Middle (x, y) and number of the pixels of exactly this colour."""
    wanted = torch.tensor([int(colour[i:i + 2], 16) for i in (1, 3, 5)], dtype=torch.uint8)
    found = (torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3) == wanted).all(-1).nonzero()
    return found.double().mean(0).flip(0).tolist() if len(found) else None, len(found)


@pytest.mark.parametrize(("text", "across", "down"), [("w-20", 0, -1), ("s-20", 0, 1), ("a-20", -1, 0), ("d-20", 1, 0),
                                                      ("right-30, w-20", 1, 0), ("right-60, w-20", 0, 1)])
def test_ahead_is_up_and_right_is_right(text, across, down):
    """From the start to the last chunk of a straight way."""
    path = walk(text)
    image = draw_top_view(*path.positions(), chunk=range(len(path) - 5, len(path) - 1))
    start, end = pixels(image, SSIM)[0], pixels(image, LAYERS)[0]
    way = [end[axis] - start[axis] for axis in (0, 1)]
    assert image.size == (640, 640) and image.mode == "RGB"
    assert (way[0] * across > 50 or across == 0) and (way[1] * down > 50 or down == 0)


def test_what_is_marked_is_drawn():
    path = walk("right-35, left-35, w-5")
    read = WORLDPLAY_5B.select(path, 72)
    plain, marked = draw_top_view(*path.positions()), draw_top_view(*path.positions(), read=read, chunk=range(72, 76), field_of_view=90)
    for colour in (PEAK, LAYERS, SECTOR):
        assert pixels(plain, colour)[1] == 0 < pixels(marked, colour)[1]
    for colour in (PANEL, INK, SSIM):
        assert pixels(plain, colour)[1] and pixels(marked, colour)[1]
    assert pixels(draw_top_view(*path.positions(), chunk=range(72, 76)), SECTOR)[1] == 0


def test_turns_on_a_spot_are_told_apart():
    """The arc back lies outside the arc there."""
    path = walk("right-30, left-30")
    there, back = (pixels(draw_top_view(*path.positions(), read=frames), PEAK) for frames in (range(15, 20), range(41, 46)))
    assert there[1] and back[1] and back[0][0] > there[0][0] + 5


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_drawn_within_the_panel(name):
    path = preset(name, 201)
    image = draw_top_view(*path.positions(), chunk=range(100, 104), field_of_view=path.field_of_view[0])
    edge = image.crop((0, 72, 24, 560)), image.crop((620, 72, 640, 560))
    assert all(len(part.getcolors(1 << 16)) == 1 for part in edge)
    assert pixels(image, SECTOR)[1]


@pytest.mark.parametrize("text", ["still-1", "up-30, down-60", "up-30"])
def test_paths_that_hardly_show_from_above(text):
    for path in (walk(text), walk(text)[:1]):
        assert pixels(draw_top_view(*path.positions(), chunk=[0], field_of_view=90), PANEL)[1] > 10_000


def test_a_path_in_words():
    assert summary(*walk("w-10, right-30, w-10").positions()) == "51 latent frames, 1.6 units of way, 90 degrees turned"
    assert summary(*walk("up-30, w-5, down-30").positions()) == "66 latent frames, 0.4 units of way, 180 degrees turned, height by 0.4"


@pytest.mark.parametrize(("rough", "step"), [(1, 1), (1.1, 2), (0.3, 0.5), (0.07, 0.1), (34, 50)])
def test_grids_have_round_steps(rough, step):
    assert round_step(rough) == pytest.approx(step)


def test_what_is_given_is_checked():
    centres, directions = walk("w-3").positions()
    with pytest.raises(ValueError, match="Frame 4 was to be marked, and the path has 4 frames"):
        draw_top_view(centres, directions, read=[4])
    with pytest.raises(ValueError, match=r"shape \[4, 3\] and directions \[3, 3\]"):
        draw_top_view(centres, directions[1:])
