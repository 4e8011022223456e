"""Procedural rooms, seen by cameras: the world in which the tiny world model walks.

    rooms = random_rooms(8, torch.Generator().manual_seed(1))
    path = walk("right-10, left-10", PACE)                 # video.camera_moves
    video = render(rooms, video_cameras(path.cameras).expand(8, -1, -1, -1))     # [8, 3, 81, 80, 144] in -1..1

A room is square. Each wall has a colour of its own and a picture, one of the shapes of `scenes`; floor and ceiling are plain. A ray for
every pixel meets one of the six sides, all of them computed together, so whole batches are drawn on the device of the rooms. World units
are metres, and the origin is the middle of the room at the height of the eyes.

A latent frame has one camera, that of its last video frame; `video.cameras.video_cameras` gives those of the frames between.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from ..video.camera_moves import Pace
from ..video.cameras import FOCAL, intrinsic_matrix, inverse
from .marks import fade, outline_distance
from .prompts import COLOURS, SHAPES

WORLD_WIDTH, WORLD_HEIGHT = 144, 80  # nearly 16 to 9, for which cameras of paths in keys have square pixels
INTRINSICS = intrinsic_matrix(*FOCAL)
PACE = Pace(step=0.15, turn=9.0)
STRIDE = 4  # video frames of a latent frame

HALF, HALF_HEIGHT = 2.0, 1.25  # from the middle to the walls, and to floor and ceiling
REACH = 0.4  # how far from the middle a walk begins
DRAWN = 36.0  # of the pixels of `scenes` in a metre: a wall that fills the view looks as large as the scenes do
RADIUS = 24.0  # of a picture on a wall, in these pixels
FINER = 2  # rays across a pixel


@dataclass
class Rooms:
    """A batch of rooms as tensors. Walls are those ahead of, right of, behind and left of a camera that is not turned."""

    wall: Tensor  # [B, 4, 3] colour in 0..1
    shape: Tensor  # [B, 4] index into SHAPES
    picture: Tensor  # [B, 4, 3]
    floor: Tensor  # [B, 3]
    ceiling: Tensor  # [B, 3]

    def to(self, device) -> Rooms:
        return Rooms(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def __len__(self) -> int:
        return len(self.wall)

    def __getitem__(self, rooms) -> Rooms:
        return Rooms(**{field.name: getattr(self, field.name)[rooms] for field in fields(self)})


def random_rooms(count: int, generator: torch.Generator) -> Rooms:
    """Rooms whose walls and pictures all have colours of their own."""
    colours = torch.tensor(list(COLOURS.values()))
    order = torch.stack([torch.randperm(len(colours), generator=generator) for _ in range(count)])
    shapes = torch.stack([torch.randperm(len(SHAPES), generator=generator)[:4] for _ in range(count)])
    last = colours[order[:, 8]]
    return Rooms(wall=0.5 * colours[order[:, :4]], shape=shapes, picture=colours[order[:, 4:8]],
                 floor=0.2 * last, ceiling=0.25 + 0.35 * last)


def random_starts(count: int, generator: torch.Generator) -> Tensor:
    """World to camera [count, 4, 4] float64: anywhere near the middle, in any direction."""
    angle = 2 * torch.pi * torch.rand(count, generator=generator, dtype=torch.float64)
    pose = torch.eye(4, dtype=torch.float64).repeat(count, 1, 1)
    pose[:, 0, 0] = pose[:, 2, 2] = angle.cos()
    pose[:, 0, 2], pose[:, 2, 0] = angle.sin(), -angle.sin()
    pose[:, [0, 2], 3] = REACH * (2 * torch.rand(count, 2, generator=generator, dtype=torch.float64) - 1)
    return inverse(pose)


def render(rooms: Rooms, cameras: Tensor, intrinsics: Tensor = INTRINSICS) -> Tensor:
    """Draw rooms from cameras inside them: world to camera [B, F, 4, 4] -> [B, 3, F, WORLD_HEIGHT, WORLD_WIDTH] in -1..1."""
    device = rooms.wall.device
    cameras = cameras.to(device, torch.float32)
    world = cameras[..., :3, :3].mT  # camera to world
    place = -(world @ cameras[..., :3, 3:])[..., None]  # [B, F, 3, 1, 1]
    height, width = FINER * WORLD_HEIGHT, FINER * WORLD_WIDTH
    x = ((torch.arange(width, device=device) + 0.5) / width - 0.5) / float(intrinsics[0, 0])
    y = ((torch.arange(height, device=device) + 0.5) / height - 0.5) / float(intrinsics[1, 1])
    ahead = torch.stack([x.expand(height, -1), y[:, None].expand(-1, width), torch.ones(height, width, device=device)])
    ray = torch.einsum("bfij,jhw->bfihw", world, ahead)
    # how far along the ray the side is that it meets, of those to the left and right, below and above, ahead and behind
    side = torch.where(ray < 0, -1.0, 1.0)
    ends = torch.stack([side[:, :, axis] * half for axis, half in enumerate((HALF, HALF_HEIGHT, HALF))], dim=2)
    distance = (ends - place) / torch.where(ray.abs() < 1e-6, 1e-6 * side, ray)
    nearest, axis = distance.min(dim=2, keepdim=True)
    picture = _paint(rooms, place + nearest * ray, axis[:, :, 0], side)
    images = F.avg_pool2d(picture.flatten(0, 1), FINER).unflatten(0, cameras.shape[:2])
    return images.transpose(1, 2) * 2 - 1


def _paint(rooms: Rooms, hit: Tensor, axis: Tensor, side: Tensor) -> Tensor:
    """Colours 0..1 [B, F, 3, H, W] of places [B, F, 3, H, W] on the sides across `axis` [B, F, H, W]. side: -1 or 1 along each axis."""
    x, y, z = (DRAWN * hit).unbind(2)
    across, right, ahead = axis == 0, side[:, :, 0] > 0, side[:, :, 2] > 0
    # which wall, and how far along it from left to right as it is seen
    number = torch.where(across, torch.where(right, 1, 3), torch.where(ahead, 0, 2))
    along = torch.where(across, torch.where(right, -z, z), torch.where(ahead, x, -x))
    shape = rooms.shape.gather(1, number.flatten(1)).view_as(number)
    cover = fade(outline_distance(along, y, torch.full_like(y, RADIUS), shape)).unsqueeze(2)
    ground = _colours(rooms.wall, number)
    wall = ground + cover * (_colours(rooms.picture, number) - ground)
    level = torch.where(side[:, :, 1:2] > 0, rooms.floor.view(-1, 1, 3, 1, 1), rooms.ceiling.view(-1, 1, 3, 1, 1))
    return torch.where((axis == 1).unsqueeze(2), level, wall)


def _colours(of_walls: Tensor, number: Tensor) -> Tensor:
    """[B, F, 3, H, W] of colours [B, 4, 3] and walls [B, F, H, W]."""
    index = number.flatten(1)[..., None].expand(-1, -1, 3)
    return of_walls.gather(1, index).unflatten(1, number.shape[1:]).movedim(-1, 2)
