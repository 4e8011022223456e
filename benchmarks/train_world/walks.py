"""Camera paths to train on, with the frames that the chunks of each would read; and latents of rooms seen along them.

Choosing frames takes a CPU far longer than drawing a path, so a few hundred paths serve thousands of rooms: each is walked from many places
in many directions, and what a model of relative cameras sees of a path is the same from wherever it begins.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from ...qvg.attention.prope import projections
from ...qvg.demo.world_scenes import PACE, random_rooms, random_starts, render
from ...qvg.models.wan_vae import WanVAE, normalize
from ...qvg.video.camera_moves import walk
from ...qvg.video.cameras import CameraPath, video_cameras
from ...qvg.video.view_memory import ViewMemory
from ..train_demo.clock import Clock

FRAMES = 40  # latent frames of a path
CHUNK = 4
SEQUENCE = 20  # latent frames that a step trains on: what a chunk reads, and the chunk
# what a chunk reads beside the newest frames is chosen among all earlier ones
VIEWS = ViewMemory(recent=12, retrieved=4)


@dataclass
class Walks:
    """N paths. cameras: [N, F, 4, 4] float64. forward, back: their projections and the inverse ones, [N, F, 4, 4] float32.
    actions: [N, F]. chosen: latent frames that the chunks from the fifth on read, and the chunk's own, [N, chunks, SEQUENCE]."""

    cameras: Tensor
    forward: Tensor
    back: Tensor
    actions: Tensor
    chosen: Tensor

    def to(self, device) -> Walks:
        return Walks(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def __len__(self) -> int:
        return len(self.cameras)


def random_path(generator: torch.Generator, frames: int = FRAMES) -> CameraPath:
    """Mostly turns of up to 120 degrees to and fro, so that a path returns to what it left; some steps in between."""
    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    side, moves, total = draw(0, 1), [], 0
    while total < frames:
        if draw(0, 5) == 0:
            keys, count = ("w", "s", "w", "still")[draw(0, 3)], draw(1, 3)
        else:
            keys, count = ("left", "right")[side], draw(4, 13)
            # most turns go back where the last one came from
            side = 1 - side if draw(0, 4) else side
        moves.append(f"{keys}-{count}")
        total += count
    return walk(", ".join(moves), PACE).resized(frames)


def make_walks(count: int, seed: int, frames: int = FRAMES) -> Walks:
    generator = torch.Generator().manual_seed(seed)
    paths = [random_path(generator, frames) for _ in range(count)]
    both = [projections(path.cameras, path.intrinsics) for path in paths]
    chosen = [[[*VIEWS.select(path, start), *range(start, start + CHUNK)] for start in range(VIEWS.window, frames, CHUNK)]
              for path in paths]
    return Walks(
        cameras=torch.stack([path.cameras for path in paths]), forward=torch.stack([pair[0] for pair in both]).float(),
        back=torch.stack([pair[1] for pair in both]).float(), actions=torch.stack([path.actions for path in paths]),
        chosen=torch.tensor(chosen))


def kept_walks(count: int, path: Path | None) -> Walks:
    """The walks in a file, which is written if there is none."""
    if path and path.exists():
        return Walks(**torch.load(path))
    walks = make_walks(count, 5)
    if path:
        torch.save({field.name: getattr(walks, field.name) for field in fields(walks)}, path)
    return walks


class RoomScenes:
    """Rooms on the device for the training of an autoencoder; `draw` has them seen along pieces of walks."""

    def __init__(self, walks: Walks, rooms: int, seed: int, device, most: int = 37):
        generator = torch.Generator().manual_seed(seed)
        self.device = torch.device(device)
        self.rooms = random_rooms(rooms, generator).to(device)
        number = torch.arange(rooms) % len(walks)
        # a different piece for each
        first = torch.randint(FRAMES - 1 - most // 4, (rooms, 1), generator=generator)
        pieces = walks.cameras[number[:, None], first + torch.arange(most // 4 + 1)]
        self.cameras = video_cameras(pieces @ random_starts(rooms, generator)[:, None]).float().to(device)

    def draw(self, batch: int, frames: int) -> Tensor:
        """[batch, 3, frames, H, W]; at most as many frames as the pieces have."""
        pick = torch.randint(len(self.rooms), (batch,), device=self.device)
        return render(self.rooms[pick], self.cameras[pick, :frames])


@dataclass
class Pool:
    """latents [N, 16, F, h, w], normalized, of rooms seen along the walks of these numbers [N]."""

    latents: Tensor
    walk: Tensor


@torch.no_grad()
def encode_pool(vae: WanVAE, walks: Walks, minutes: float, device, most: int = 1 << 30, batch: int = 16) -> Pool:
    """As many rooms as the minutes allow, at most `most`."""
    generator, clock, latents, numbers = torch.Generator().manual_seed(3), Clock(minutes), [], []
    while not (latents and clock.over()) and len(latents) * batch < most:
        number = torch.randint(len(walks), (batch,), generator=generator)
        cameras = video_cameras(walks.cameras[number] @ random_starts(batch, generator)[:, None])
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            video = render(random_rooms(batch, generator).to(device), cameras)
            latents.append(normalize(vae.encode(video).float()).bfloat16())
        numbers.append(number)
    return Pool(torch.cat(latents), torch.cat(numbers).to(device))
