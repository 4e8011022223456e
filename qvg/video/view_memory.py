"""Which frames a world model reads when it makes the next chunk: the newest, and the earlier ones that saw the same place.

    memory = ViewMemory(recent=12, retrieved=4)            # HY-WorldPlay 5B; the 8B keeps first=4 as well
    memory.select(path, chunk_start=40)                     # [8, 9, 10, 11, 28, 29, ..., 39]

While all frames fit into the window, all are read. After that they are chosen in clips of four latent frames: what a camera sees counts as
the points within 60 x 35 degrees around its view direction and within 8 world units, and a clip is as good as the share of the new frames'
points that its first and third camera see. Everything is relative to the new cameras, so any world will do. Clips begin at multiples of
four, so with chunks of four a selection is always whole chunks.

The original counts 50 000 random points of a ball, of which the view holds some 2500, so that clips that are nearly as good as each other
change places from run to run. Here the points are fixed, evenly spread and symmetric; of clips that are as good, the earliest is read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .cameras import CameraPath, inverse

CLIP = 4  # latent frames
SEEN = (0, 2)  # the cameras of a clip that are compared
ACROSS, DOWN, REACH = 60.0, 35.0, 8.0  # degrees, degrees, world units
POINTS = 1024  # in each quarter of the view
DIGITS = 6  # shares that are equal to so many digits are the same: the rest is rounding
PAIRS = 256  # of cameras compared at a time, 4096 points each


@dataclass(frozen=True)
class ViewMemory:
    """recent: latent frames before the chunk that are always read. first: latent frames from the start that are too. retrieved: frames in
    clips that saw the most of what the chunk will see. Raises ValueError for numbers that are no multiples of four.
    """

    recent: int = 12
    first: int = 0
    retrieved: int = 4

    def __post_init__(self):
        for name in ("recent", "first", "retrieved"):
            value = getattr(self, name)
            if value < 0 or value % CLIP:
                raise ValueError(f"{name} is {value} latent frames; frames are remembered in clips of {CLIP}: give a multiple of {CLIP}.")

    @property
    def window(self) -> int:
        """The most latent frames that a chunk of four reads."""
        return self.recent + self.first + self.retrieved

    def select(self, path: CameraPath, chunk_start: int, chunk_frames: int = CLIP) -> list[int]:
        """The latent frames to read for the chunk at `chunk_start`, sorted, all before it.

        A chunk of more than four frames reads what each of its clips would, without the chunk itself; a path that ends within the chunk is
        compared up to its end. Raises ValueError if the chunk begins beyond the end of the path.
        """
        if not 0 <= chunk_start < len(path):
            raise ValueError(f"The chunk starts at latent frame {chunk_start}, and the path has {len(path)}; make the path longer.")
        chosen = set()
        for start in range(chunk_start, min(chunk_start + chunk_frames, len(path)), CLIP):
            chosen.update(self._select_clips(path, start))
        return sorted(frame for frame in chosen if frame < chunk_start)

    def _select_clips(self, path: CameraPath, start: int) -> list[int]:
        if start <= self.window:
            return list(range(start))
        newest = range(start - self.recent, start)
        clips = range(self.first, start - self.recent, CLIP)
        shares = clip_shares(path, start, clips)
        best = sorted(range(len(clips)), key=lambda number: -shares[number])[:self.retrieved // CLIP]
        return [*range(self.first), *(clips[number] + frame for number in best for frame in range(CLIP)), *newest]


WORLDPLAY_5B = ViewMemory(recent=12, first=0, retrieved=4)
WORLDPLAY_8B = ViewMemory(recent=12, first=4, retrieved=4)


def clip_shares(path: CameraPath, start: int, clips: range) -> list[float]:
    """For each clip, the share 0..1 of what the four frames from `start` see that the clip saw."""
    queries = range(start, min(start + CLIP, len(path)))
    seen = overlap(path.cameras[queries.start:queries.stop], path.cameras[[clip + frame for clip in clips for frame in SEEN]])
    return [round(share, DIGITS) for share in seen.mean(0).unflatten(0, (-1, len(SEEN))).mean(-1).tolist()]


def overlap(cameras: Tensor, others: Tensor) -> Tensor:
    """[Q, N]: the share of what each of Q cameras sees that each of N others sees too. World to camera, [., 4, 4]."""
    points = view_points()
    # each other camera, seen from each of the Q
    relative = (cameras[:, None] @ inverse(others)[None]).flatten(0, 1)
    shares = [_seen(points, piece).double().mean(-1) for piece in relative.split(PAIRS)]
    return torch.cat(shares).view(len(cameras), len(others))


def _seen(points: Tensor, poses: Tensor) -> Tensor:
    """[N, P] which points [P, 3] cameras see. poses: camera to the world of the points, [N, 4, 4]; a roll about the view is ignored."""
    to = points - poses[:, None, :3, 3]
    x, y, z = to.unbind(-1)
    ahead_x, ahead_y, ahead_z = poses[:, :3, 2, None].unbind(1)
    level = torch.hypot(ahead_x, ahead_z)
    # angles are compared by their sines and cosines, without computing any: first round the vertical, then up and down
    side, forward = x * ahead_z - z * ahead_x, x * ahead_x + z * ahead_z
    distance = torch.hypot(x, z)
    up, out = y * level - distance * ahead_y, distance * level + y * ahead_y
    across, down = math.tan(math.radians(ACROSS / 2)), math.tan(math.radians(DOWN / 2))
    return (side.abs() < across * forward) & (up.abs() < down * out) & (to.norm(dim=-1) < REACH)


def view_points() -> Tensor:
    """[4 * POINTS, 3] float64: evenly spread in what a camera at the origin sees, symmetric to its axes."""
    # the sequence of the plastic number in three dimensions: its multiples fill a cube evenly (Roberts 2018)
    ratio = 1.2207440846057596
    steps = torch.tensor([ratio**-1, ratio**-2, ratio**-3], dtype=torch.float64)
    cube = (0.5 + torch.arange(1, POINTS + 1, dtype=torch.float64)[:, None] * steps) % 1
    azimuth = math.radians(ACROSS / 2) * cube[:, 0]
    height = math.sin(math.radians(DOWN / 2)) * cube[:, 1]  # the area of a sphere is even in the height
    level, radius = (1 - height.square()).sqrt(), REACH * cube[:, 2] ** (1 / 3)
    quarter = torch.stack([level * azimuth.sin(), height, level * azimuth.cos()], dim=1) * radius[:, None]
    mirrors = torch.tensor([[1, 1, 1], [-1, 1, 1], [1, -1, 1], [-1, -1, 1]], dtype=torch.float64)
    return (quarter * mirrors[:, None]).flatten(0, 1)
