"""Where the camera is in each latent frame, and what the person at the keys did: the input of world models.

    path = walk("w-8, right-4").extended(walk("s-3"))     # camera_moves
    path = read_poses("poses.json")                         # camera_file
    path.cameras[4:8], path.intrinsics[4:8], path.actions[4:8]

Conventions are those of HY-WorldPlay. A camera is a 4 x 4 matrix from world to camera; the camera's x points right, y down and z ahead.
The first camera of a path in keys is the world's origin, but nothing depends on that: PRoPE, action labels and the choice of remembered
frames use cameras relative to each other. Intrinsics are in widths and heights of the picture, with the principal point in its middle.

An action label is 9 * movement + turn, 0 to 80, of a camera relative to the one before it; the first camera has label 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.worldplay_wan import ACTIONS

# of the original's cameras made from keys: 969.697 pixels of focal length in a picture of 1920 x 1080
FOCAL = (969.6969696969696 / 1920, 969.6969696969696 / 1080)
MOST_FRAMES = 10_000
# beyond what any lens has, and what any walk reaches
LEAST_FOCAL, MOST_FOCAL, MOST_DISTANCE = 0.01, 100.0, 1e5
# a smaller step counts as standing still, and a smaller angle as no turn; in world units and degrees
LEAST_STEP, LEAST_TURN = 1e-4, 0.05
SECTOR = 60.0  # degrees to either side of an axis within which a step follows that axis
# how far values that a file rounded may be from a rotation
ROTATION_TOLERANCE = 1e-3

# label -> words, in this order of none, then one axis, then both
MOVEMENTS = ("", "forward", "backward", "right", "left", "forward right", "forward left", "backward right", "backward left")
TURNS = ("", "turn right", "turn left", "look up", "look down", "turn right and up", "turn right and down", "turn left and up",
         "turn left and down")
# label of (direction on the first axis, on the second): 0 none, 1 towards its positive end, 2 towards its negative one
_LABELS = torch.tensor([[0, 3, 4], [1, 5, 6], [2, 7, 8]])


@dataclass(frozen=True, eq=False)
class CameraPath:
    """One camera a latent frame.

    cameras: world to camera, [F, 4, 4] float64. intrinsics: [F, 3, 3] float64, the focal lengths in widths and heights of the picture.
    actions: [F] int64 labels; `from_cameras` derives them.
    """

    cameras: Tensor
    intrinsics: Tensor
    actions: Tensor

    @classmethod
    def from_cameras(cls, cameras: Tensor, intrinsics: Tensor | None = None) -> CameraPath:
        """The path of world-to-camera matrices [F, 4, 4], with labels derived from them.

        intrinsics: [3, 3] or [F, 3, 3], by default those of paths in keys. Raises ValueError for a matrix that is no rotation with a place,
        for values that are not finite, and for focal lengths that are not above 0.
        """
        cameras = torch.as_tensor(cameras).to("cpu", torch.float64)
        intrinsics = intrinsic_matrix(*FOCAL) if intrinsics is None else torch.as_tensor(intrinsics).to("cpu", torch.float64)
        if cameras.ndim == 3 and intrinsics.ndim == 2:
            intrinsics = intrinsics.expand(len(cameras), *intrinsics.shape)
        check_cameras(cameras, intrinsics)
        return cls(cameras.clone(), intrinsics.clone(), action_labels(cameras))

    def __len__(self) -> int:
        return len(self.cameras)

    def __getitem__(self, frames: slice) -> CameraPath:
        """Some frames, each with the label that it has here. Raises ValueError if there are none."""
        if not isinstance(frames, slice):
            raise TypeError(f"path[{frames!r}] would be one camera; give a range, such as path[0:4].")
        part = CameraPath(self.cameras[frames], self.intrinsics[frames], self.actions[frames])
        if not len(part):
            raise ValueError(f"Frames {frames.start} to {frames.stop} are none of the {len(self)} of this path.")
        return part

    def extended(self, other: CameraPath) -> CameraPath:
        """This path, continued by the movements of `other` from where it ends: other's first camera is this path's last one, so the result
        has len(self) + len(other) - 1 frames."""
        moved = other.cameras @ inverse(other.cameras[:1]) @ self.cameras[-1:]
        joined = CameraPath(torch.cat([self.cameras, moved[1:]]), torch.cat([self.intrinsics, other.intrinsics[1:]]),
                            torch.cat([self.actions, other.actions[1:]]))
        _check_length(len(joined))
        return joined

    def resized(self, frames: int) -> CameraPath:
        """The first `frames` frames; after the end of the path the camera stands still."""
        _check_length(frames)
        index = torch.arange(frames).clamp(max=len(self) - 1)
        actions = torch.where(torch.arange(frames) < len(self), self.actions[index], 0)
        return CameraPath(self.cameras[index], self.intrinsics[index], actions)

    def from_origin(self) -> CameraPath:
        """The same path in a world whose origin is its first camera."""
        return CameraPath(self.cameras @ inverse(self.cameras[:1]), self.intrinsics, self.actions)

    def with_field_of_view(self, degrees: float) -> CameraPath:
        """The same path with another horizontal field of view; the pixels stay as square as they were. Raises ValueError for an angle that
        no lens has."""
        if not 1 <= degrees <= 170:
            raise ValueError(f"The field of view is {degrees:g} degrees; it must be 1 to 170.")
        intrinsics = self.intrinsics.clone()
        intrinsics[:, :2, :2] *= (0.5 / math.tan(math.radians(degrees) / 2) / self.intrinsics[:, 0, 0])[:, None, None]
        return CameraPath(self.cameras, intrinsics, self.actions)

    @property
    def field_of_view(self) -> tuple[float, float]:
        """Horizontal and vertical field of view of the first camera in degrees."""
        across, down = (2 * math.degrees(math.atan(0.5 / float(self.intrinsics[0, axis, axis]))) for axis in (0, 1))
        return across, down

    def positions(self) -> tuple[Tensor, Tensor]:
        """Centres and view directions of the cameras in the world, [F, 3] each."""
        world = inverse(self.cameras)
        return world[:, :3, 3], world[:, :3, 2]


def intrinsic_matrix(across: float, down: float) -> Tensor:
    """[3, 3] float64 of focal lengths in widths and heights of the picture."""
    return torch.tensor([[across, 0.0, 0.5], [0.0, down, 0.5], [0.0, 0.0, 1.0]], dtype=torch.float64)


def inverse(cameras: Tensor) -> Tensor:
    """Camera to world of world to camera, and the other way round, [F, 4, 4]."""
    return torch.linalg.inv(cameras)


def video_cameras(cameras: Tensor, frames: int = 4) -> Tensor:
    """[..., 1 + (F - 1) * frames, 4, 4]: cameras [..., F, 4, 4] of latent frames, evenly filled up to one camera a video frame.

    The first latent frame is one video frame, each other one `frames`, of which the last has its camera. Rotations about one axis are cut
    into equal parts; centres follow straight lines.
    """
    poses = inverse(cameras)
    earlier, later = poses[..., :-1, :, :], poses[..., 1:, :, :]
    turn = earlier[..., :3, :3].mT @ later[..., :3, :3]
    axis = torch.stack([turn[..., 2, 1] - turn[..., 1, 2], turn[..., 0, 2] - turn[..., 2, 0], turn[..., 1, 0] - turn[..., 0, 1]], -1) / 2
    sine = axis.norm(dim=-1)
    angle = torch.atan2(sine, (turn.diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2)
    x, y, z = (axis * (angle / sine.clamp(min=1e-12))[..., None]).unbind(-1)
    zero = torch.zeros_like(x)
    generator = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).unflatten(-1, (3, 3))
    parts = torch.arange(1, frames + 1, dtype=cameras.dtype)[:, None, None] / frames
    # [..., F - 1, frames, 4, 4]
    before, after = earlier[..., None, :, :], later[..., None, :, :]
    filled = after.repeat_interleave(frames, dim=-3)
    filled[..., :3, :3] = before[..., :3, :3] @ torch.linalg.matrix_exp(parts * generator[..., None, :, :])
    filled[..., :3, 3:] = before[..., :3, 3:] * (1 - parts) + after[..., :3, 3:] * parts
    filled[..., -1, :, :] = later  # exactly
    return inverse(torch.cat([poses[..., :1, :, :], filled.flatten(-4, -3)], dim=-3))


def action_labels(cameras: Tensor) -> Tensor:
    """[F] int64: what was done between each camera [F, 4, 4] and the one before it; 0 for the first."""
    steps = cameras[:-1] @ inverse(cameras[1:])  # the later camera, seen from the earlier one
    move, rotation = steps[:, :3, 3], steps[:, :3, :3]
    length = move.norm(dim=-1, keepdim=True)
    angles = torch.rad2deg(torch.acos((move / length.clamp(min=LEAST_STEP)).clamp(-1, 1)))
    moves = length > LEAST_STEP
    along = (moves & (angles < SECTOR)).long() + 2 * (moves & (angles > 180 - SECTOR)).long()  # of x, y, z
    # rotations about x, then y, then z of the earlier camera: R = Rz Ry Rx
    yaw = torch.rad2deg(torch.asin((-rotation[:, 2, 0]).clamp(-1, 1)))
    pitch = torch.rad2deg(torch.atan2(rotation[:, 2, 1], rotation[:, 2, 2]))
    turn_across, turn_up = ((angle > LEAST_TURN).long() + 2 * (angle < -LEAST_TURN).long() for angle in (yaw, pitch))
    labels = 9 * _LABELS[along[:, 2], along[:, 0]] + _LABELS[turn_across, turn_up]
    return torch.cat([torch.zeros(1, dtype=torch.long), labels])


def action_words(label: int) -> str:
    """28 -> "right, turn right"; 0 -> "still". Raises ValueError for a label that is none of 0 to 80."""
    if not 0 <= label < ACTIONS:
        raise ValueError(f"An action label is {label}; labels are 0 to 80.")
    return ", ".join(words for words in (MOVEMENTS[label // 9], TURNS[label % 9]) if words) or "still"


def check_cameras(cameras: Tensor, intrinsics: Tensor, names: Sequence[str] | None = None) -> None:
    """Raises ValueError about the first camera that is none, by its name in `names` or its number."""
    if cameras.ndim != 3 or cameras.shape[1:] != (4, 4) or intrinsics.shape != (len(cameras), 3, 3):
        raise ValueError(f"Cameras have the shape {list(cameras.shape)} and intrinsics {list(intrinsics.shape)}; give [frames, 4, 4] and "
                         "[frames, 3, 3].")
    _check_length(len(cameras))
    for number, (camera, matrix) in enumerate(zip(cameras, intrinsics)):
        wrong = _wrong(camera, matrix)
        if wrong:
            raise ValueError(f"Camera {names[number] if names else number} {wrong}.")


def _check_length(frames: int) -> None:
    if not 1 <= frames <= MOST_FRAMES:
        raise ValueError(f"A path of {frames} latent frames was asked for; it can have 1 to {MOST_FRAMES}.")


def _wrong(camera: Tensor, intrinsics: Tensor) -> str:
    """What is wrong with a camera, as the rest of a sentence; "" if nothing is."""
    if not (camera.isfinite().all() and intrinsics.isfinite().all()):
        return "holds a value that is not finite; all values must be numbers"
    rotation, tolerance = camera[:3, :3], ROTATION_TOLERANCE
    if not torch.allclose(camera[3], camera.new_tensor([0, 0, 0, 1]), atol=tolerance):
        return f"has the last row {[round(value, 4) for value in camera[3].tolist()]}; it must be 0, 0, 0, 1, with the place in the column"
    error = float((rotation @ rotation.mT - torch.eye(3, dtype=camera.dtype)).abs().max())
    if error > tolerance:
        return (f"is no rotation: its axes are off by {error:.2g} from length 1 and right angles, and {tolerance:g} is allowed; give a "
                "rotation without scale")
    if torch.linalg.det(rotation) < 0:
        return "is a mirror image; its axes must be x right, y down and z ahead, so negate one of them"
    focal = intrinsics.diagonal()[:2]
    if not ((focal >= LEAST_FOCAL) & (focal <= MOST_FOCAL)).all():
        found = ", ".join(f"{value:g}" for value in focal.tolist())
        return f"has the focal lengths {found}; in widths and heights of the picture they are {LEAST_FOCAL:g} to {MOST_FOCAL:g}"
    if camera[:3, 3].abs().max() > MOST_DISTANCE:
        return f"is {float(camera[:3, 3].abs().max()):g} world units away; {MOST_DISTANCE:g} is the most"
    return ""
