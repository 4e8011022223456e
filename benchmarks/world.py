"""What a walk remembers: the tiny world model turns away and back, with every preset, every memory, and none.

    qvg bench world [--small] [--rooms N] [--weights FOLDER] [--out DIR]

The model is shown one picture of a room and invents the rest. What comes into view again should be what it was, so every view is compared
with the first one of the same camera, made at least 16 latent frames earlier; and the view of the start, once it comes back, with the room
as it is drawn exactly. Rows differ in the cache alone: the preset, the memory (see `video.world`), or which frames a chunk reads. A window
of the newest frames, rebuilt for each chunk, takes no more bytes in bf16 than Balanced takes with that memory.

Bytes are those of keys and values at the end of the walk. The model is tiny and made for tests: the order of rows is an indication, the
decibels are its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..qvg.commands.arguments import whole
from ..qvg.demo.world import WORLD_GRID, TinyWorld, load_tiny_world
from ..qvg.demo.world_scenes import PACE, STRIDE, Rooms, random_rooms, render
from ..qvg.measure.rows import error_of_mean
from ..qvg.settings import PRESETS, QVGSettings
from ..qvg.video.camera_moves import walk
from ..qvg.video.cameras import CameraPath, video_cameras
from ..qvg.video.view_memory import WORLDPLAY_5B, ViewMemory
from ..qvg.video.world import CHUNK, MEMORIES
from .measure import add_places, claim, command_line, environment, progress, table, write

LOOK_AROUND = "right-18, left-18, still-3"
BACK_AND_FORTH = "left-14, right-14, w-4, s-4, still-3"
SHORT = "right-8, left-8, still-3"
VIEWS = WORLDPLAY_5B
SAME_CAMERA = 1e-6
COLUMNS = ("row", "reads", "bits per element", "kB", "again dB", "+-", "start dB", "+-")


@dataclass(frozen=True)
class Row:
    """A way to remember. instead_of: a memory; the row is a window of as many newest frames as the bytes of Balanced hold in bf16 there."""

    name: str
    settings: QVGSettings
    memory: str
    views: ViewMemory = VIEWS
    instead_of: str = ""

    @property
    def reads(self) -> str:
        """The most latent frames that a chunk reads."""
        return "all" if self.memory == "append" else str(self.views.window)


def rows(small: bool) -> list[Row]:
    found, off = [], PRESETS["off"]
    for memory in ("rebuild",) if small else MEMORIES:
        presets = ("balanced",) if small or memory == "append" else ("quality", "balanced", "smallest", "tiny")
        found += [Row(f"{memory}, exact", off, memory), *(Row(f"{memory}, {name}", PRESETS[name], memory) for name in presets),
                  Row(f"window of as many bytes as {memory}, balanced", off, "rebuild", instead_of=memory)]
    return [*found, Row("no memory", off, "rebuild", ViewMemory(0, 0, 0))]


def revisits(path: CameraPath, apart: int) -> list[tuple[int, int]]:
    """Latent frames (later, first) that have the same camera and are at least `apart` frames apart."""
    found = []
    for later in range(len(path)):
        same = (path.cameras[:later] - path.cameras[later]).abs().amax((1, 2)) < SAME_CAMERA
        first = int(same.float().argmax()) if same.any() else later
        if later - first >= apart:
            found.append((later, first))
    return found


def remembered(pictures: Tensor, exact: Tensor, path: CameraPath, apart: int = VIEWS.recent + CHUNK) -> dict[str, Tensor]:
    """PSNR in dB of every video [B, 3, 4F - 3, H, W] in -1..1: of views that come again against the first of the same camera ("again"), and
    of those of the very first camera against the exact room ("start")."""
    pairs = revisits(path, min(apart, len(path) // 3))
    later, first = (torch.tensor(part) * STRIDE for part in zip(*pairs))
    back = torch.tensor([frame for frame, origin in pairs if origin == 0]) * STRIDE
    return {"again": _psnr(pictures[:, :, later], pictures[:, :, first]), "start": _psnr(pictures[:, :, back], exact[:, :, back])}


def _psnr(a: Tensor, b: Tensor) -> Tensor:
    """[B]: the mean over frames of [B, 3, F, H, W]."""
    return (-10 * ((a - b.to(a)) / 2).square().mean((1, 3, 4)).clamp(min=1e-10).log10()).mean(1).cpu()


class Walks:
    """Some rooms, each walked along two paths, and how they look exactly."""

    def __init__(self, world: TinyWorld, rooms: Rooms, paths: list[CameraPath]):
        self.world, self.rooms, self.paths = world, rooms, paths
        self.exact = [render(rooms, video_cameras(path.cameras).expand(len(rooms), -1, -1, -1)) for path in paths]

    def measure(self, row: Row) -> dict:
        found, stats = {"again": [], "start": []}, None
        for seed, (path, exact) in enumerate(zip(self.paths, self.exact)):
            made = self.world.walk(self.rooms, path, row.settings, memory=row.memory, views=row.views, seed=seed)
            stats = made.stats
            for name, values in remembered(self.world.pictures(made.latents), exact, path).items():
                found[name] += values.tolist()
        return {"row": row.name, "memory": row.memory, "reads": row.reads, "bits": stats.bits_per_element,
                "bytes": stats.stored_bytes, **found}

    def window(self, stored: int) -> ViewMemory:
        """The newest whole chunks whose keys and values in bf16 take at most `stored` bytes for all rooms; at least one."""
        sizes = self.world.network.sizes
        frame = 2 * 2 * sizes.layers * sizes.heads * sizes.head_dim * WORLD_GRID[0] * WORLD_GRID[1] * len(self.rooms)
        return ViewMemory(recent=max(1, stored // frame // CHUNK) * CHUNK, retrieved=0)


def measured(walks: Walks, wanted: list[Row]) -> Iterator[dict]:
    stored = {}
    for row in wanted:
        if row.instead_of:
            row = replace(row, views=walks.window(stored[row.instead_of]))
        found = walks.measure(row)
        if row.settings.name == "balanced":
            stored[row.memory] = found["bytes"]
        progress(f"{row.name}: {found['bits']:.2f} bits, again {mean(found['again']):.2f} dB, start {mean(found['start']):.2f} dB")
        yield found


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="qvg bench world", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", metavar="FOLDER", help="what `benchmarks.train_world` wrote (default: the weights that ship)")
    parser.add_argument("--small", action="store_true", help="one room, one path and few rows, to see that it runs")
    parser.add_argument("--rooms", type=whole(1, 999))
    add_places(parser)
    options = parser.parse_args(arguments)
    try:
        weights = load_tiny_world(options.weights)
    except FileNotFoundError as error:
        parser.error(str(error))
    claim(options, "world")
    device = torch.device(options.device)
    rooms = random_rooms(options.rooms or (1 if options.small else 6), torch.Generator().manual_seed(31)).to(device)
    paths = [walk(text, PACE) for text in ((SHORT,) if options.small else (LOOK_AROUND, BACK_AND_FORTH))]
    found = list(measured(Walks(TinyWorld(*weights, device), rooms, paths), rows(options.small)))
    shown = [(row["row"], row["reads"], row["bits"], row["bytes"] / 1e3, mean(row["again"]), error_of_mean(row["again"]),
              mean(row["start"]), error_of_mean(row["start"])) for row in found]
    result = {"environment": environment(device, command_line("world", arguments)), "rooms": len(rooms), "rows": found}
    write(options.out, "world", result, table(COLUMNS, shown))
