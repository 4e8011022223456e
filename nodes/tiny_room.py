"""Tiny Room (QVG): a drawn room to walk in, whose every view is known, so that a walk shows what a world model remembers.

    QVGTinyRoom  seed (+ QVG_CAMERA_PATH) -> IMAGE, IMAGE, CONDITIONING
"""

from __future__ import annotations

import comfy.model_management
import torch
from comfy_api.latest import io

from ..qvg.demo.world import WORLD_FILE, world_prompt
from ..qvg.demo.world_scenes import HALF, HALF_HEIGHT, WORLD_HEIGHT, WORLD_WIDTH, Rooms, random_rooms, render
from ..qvg.video.cameras import CameraPath, video_cameras
from .camera_type import CameraPathType

# frames drawn at a time
AT_ONCE = 32


class QVGTinyRoom(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QVGTinyRoom", display_name="Tiny Room (QVG)", category="QuantVideoGen",
            description="A drawn room to walk in with a world model: the picture that the walk begins with, and every view along the "
                        "camera path as it really looks.",
            search_aliases=["qvg", "tiny", "demo", "room", "start image", "world model", "ground truth"],
            inputs=[
                io.Int.Input("seed", default=0, min=0, max=2**31 - 1, control_after_generate=False,
                             tooltip="Colours of the walls and the pictures on them. Default: 0."),
                CameraPathType.Input("camera_path", optional=True,
                                     tooltip="Where the camera goes, from Camera Path (QVG). It begins in the middle of the room, which is "
                                             f"{2 * HALF:g} units long and wide. Without it, views is the start image alone."),
            ],
            outputs=[
                io.Image.Output(display_name="start_image",
                                tooltip=f"What the first camera sees, {WORLD_WIDTH} x {WORLD_HEIGHT} pixels, for World Walk."),
                io.Image.Output(display_name="views", tooltip="What every video frame of the walk would show if it were drawn exactly."),
                io.Conditioning.Output(display_name="conditioning",
                                       tooltip=f"For the tiny world model that comes with the pack, {WORLD_FILE}, which knows no other "
                                               "prompt."),
            ])

    @classmethod
    def execute(cls, seed, camera_path=None) -> io.NodeOutput:
        room = random_rooms(1, torch.Generator().manual_seed(seed))
        path = CameraPath.from_cameras(torch.eye(4)[None]) if camera_path is None else camera_path.from_origin()
        views = _views(room, path)
        return io.NodeOutput(views[:1], views, [[world_prompt(), {}]])


def _views(room: Rooms, path: CameraPath) -> torch.Tensor:
    """[frames, height, width, 3] in 0..1. Raises ValueError for a path that leads out of the room."""
    centres, _ = path.positions()
    outside = (centres.abs() >= torch.tensor([HALF, HALF_HEIGHT, HALF])).any(1)
    if outside.any():
        place = ", ".join(f"{value:.2f}" for value in centres[outside][0].tolist())
        raise ValueError(f"The camera path leaves the room at latent frame {int(outside.float().argmax())}, at ({place}); walls are "
                         f"{HALF:g} units from where it begins, floor and ceiling {HALF_HEIGHT:g}. Make it shorter, or step smaller in "
                         "Camera Path (QVG).")
    cameras, views = video_cameras(path.cameras), []
    for part in cameras.split(AT_ONCE):
        comfy.model_management.throw_exception_if_processing_interrupted()
        views.append(render(room, part[None], path.intrinsics[0])[0].movedim(0, -1) / 2 + 0.5)
    return torch.cat(views)
