"""Tiny Room (QVG) in the real ComfyUI: its pictures are those of the room, along the path, and a path through a wall is refused."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from comfy_client import ComfyError, Graph
from comfyui_qvg.qvg.demo import TEXT_DIM
from comfyui_qvg.qvg.demo.world_scenes import WORLD_HEIGHT, WORLD_WIDTH, random_rooms, render
from comfyui_qvg.qvg.video.camera_moves import walk
from comfyui_qvg.qvg.video.cameras import video_cameras


@pytest.fixture
def node(comfy_modules):
    from comfyui_qvg.nodes.tiny_room import QVGTinyRoom

    return QVGTinyRoom


def graph_of(moves):
    graph = Graph()
    path = graph.add("path", "QVGCameraPath", source="moves", moves=moves, frames=0, turn=9.0)
    room = graph.add("room", "QVGTinyRoom", seed=3, camera_path=path)
    graph.add("start", "PreviewImage", images=[room[0], 0])
    graph.add("views", "PreviewImage", images=[room[0], 1])
    return graph


def test_a_room_along_a_camera_path(comfy):
    outputs = comfy.run(graph_of("right-4, w-2"))
    start, = outputs["start"]["images"]
    views = outputs["views"]["images"]
    assert len(views) == 1 + 4 * 6
    first, last = (Image.open(comfy.output_path(views[number])).convert("RGB") for number in (0, -1))
    assert first.size == (WORLD_WIDTH, WORLD_HEIGHT)
    assert Image.open(comfy.output_path(start)).convert("RGB").tobytes() == first.tobytes() != last.tobytes()


def test_a_path_through_a_wall_is_refused(comfy):
    with pytest.raises(ComfyError, match=r"leaves the room at latent frame 25, at \(0\.00, 0\.00, 2\.00\)"):
        comfy.run(graph_of("w-30"))


def test_pictures_are_those_of_the_room(node):
    path = walk("left-3, s-2, up-1")
    path = replace(path, cameras=path.cameras @ walk("right-7, w-9").cameras[-1:])  # begins elsewhere in its own world
    start, views, conditioning = node.execute(5, path).args
    expected = render(random_rooms(1, torch.Generator().manual_seed(5)), video_cameras(path.from_origin().cameras)[None])
    torch.testing.assert_close(views.movedim(-1, 0)[None] * 2 - 1, expected)
    assert torch.equal(start, views[:1]) and len(views) == 25
    assert conditioning[0][0].shape == (1, 1, TEXT_DIM) and not conditioning[0][0].any()


def test_without_a_path_it_is_one_picture(node):
    start, views, _ = node.execute(5).args
    other, _, _ = node.execute(6).args
    assert torch.equal(start, views) and start.shape == (1, WORLD_HEIGHT, WORLD_WIDTH, 3)
    assert 0 <= start.min() < start.max() <= 1 and not torch.equal(start, other)
