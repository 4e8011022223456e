"""Camera paths from and to JSON, in HY-WorldPlay's layout.

    {"0": {"extrinsic": [[...] * 4] * 4, "K": [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]}, "1": ...}

One camera a latent frame, named 0, 1, 2, ... `extrinsic` is from camera to world, x right, y down and z ahead. K is in pixels of any
picture size; the principal point counts as the middle of the picture, so fx / (2 cx) is the focal length in widths. A file is read as it
is: its first camera need not be the origin.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ..files import write_atomically
from ..files.fields import Check, FieldError, mapping, partial_record, real_number, tuple_of
from .cameras import MOST_FRAMES, CameraPath, check_cameras, intrinsic_matrix, inverse

MOST_BYTES = 32 * 2**20
FAR = 1e6  # the largest number that a file may hold


def _matrix(size: int) -> Check:
    return tuple_of(*[tuple_of(*[real_number(-FAR, FAR)] * size)] * size)


POSES = mapping(partial_record(extrinsic=_matrix(4), K=_matrix(3)))


def read_poses(path: str | Path) -> CameraPath:
    """The cameras of a JSON file. Raises ValueError with a sentence for a file that holds none, lacks one or has a wrong one, and OSError
    for a file that cannot be read."""
    path = Path(path)
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"{path.name} has {size} bytes; a file of cameras can have {MOST_BYTES}.")
    try:
        found = json.loads(path.read_text("utf-8"), object_pairs_hook=_without_doubles)
        return _path_of(POSES(found, "cameras"))
    except RecursionError:
        raise ValueError(f"{path.name} is no file of cameras: its lists are nested too deeply.") from None
    except (FieldError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} is no file of cameras: {str(error).rstrip('.')}.") from None
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None


def _without_doubles(pairs: list) -> dict:
    named = dict(pairs)
    if len(named) < len(pairs):
        raise FieldError("it names something twice; every camera and field has its own name")
    return named


def _path_of(poses: dict[str, dict]) -> CameraPath:
    if not 1 <= len(poses) <= MOST_FRAMES:
        raise ValueError(f"It holds {len(poses)} cameras; a path can have 1 to {MOST_FRAMES}.")
    names = [str(number) for number in range(len(poses))]
    missing = next((name for name in names if name not in poses), None)
    if missing is not None:
        other = next(name for name in poses if name not in names)
        raise ValueError(f"It has no camera {missing!r} but a camera {other!r}; name its {len(poses)} cameras 0 to {len(poses) - 1}, one a "
                         "latent frame.")
    worlds = torch.tensor([poses[name]["extrinsic"] for name in names], dtype=torch.float64)
    pixels = torch.tensor([poses[name]["K"] for name in names], dtype=torch.float64)
    off = (pixels[:, :2, 2] <= 0).any(1).nonzero().flatten().tolist()
    if off:
        raise ValueError(f"Camera {names[off[0]]} has its principal point at {pixels[off[0], :2, 2].tolist()}; it must be the middle of "
                         "the picture in pixels, above 0.")
    focal = pixels.diagonal(dim1=1, dim2=2)[:, :2] / (2 * pixels[:, :2, 2])
    intrinsics = intrinsic_matrix(0, 0).repeat(len(poses), 1, 1)
    intrinsics[:, 0, 0], intrinsics[:, 1, 1] = focal.T
    check_cameras(worlds, intrinsics, names)
    return CameraPath.from_cameras(inverse(worlds), intrinsics)


def write_poses(path: CameraPath, file: str | Path, size: tuple[int, int] = (1920, 1080)) -> None:
    """Write cameras for a picture of `size` (width, height), so that `read_poses` and HY-WorldPlay read them."""
    scale = torch.tensor([[size[0]], [size[1]], [1]], dtype=torch.float64)
    poses = {str(number): {"extrinsic": world.tolist(), "K": (scale * matrix).tolist()}
             for number, (world, matrix) in enumerate(zip(inverse(path.cameras), path.intrinsics))}
    write_atomically(file, lambda part: part.write_text(json.dumps(poses, indent=1), "utf-8"))
