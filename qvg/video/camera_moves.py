"""Camera paths in keys: `walk("w-8, right-4, w+left-6")`, and paths that have a name.

A move is keys and how many latent frames they are held. w, s, a and d step forward, backward, left and right; left, right, up and down turn
the view; orbit-left and orbit-right go round a point ahead, which stays in the middle of the picture; still waits. Keys joined by + are
held at once: the view turns first, then the steps follow it. The first camera stands at the origin before any move, so moves of n latent
frames give n + 1 cameras: "w-15" is four chunks of four.

Keys and speeds are those of HY-WorldPlay, whose text has no + and no orbit. It takes parts of a latent frame too and drops them, so that
"right-0.5" does nothing there; here that is an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .cameras import MOST_FRAMES, CameraPath, inverse


@dataclass(frozen=True)
class Pace:
    """What one latent frame changes. step: in world units. turn: in degrees. distance: of the point that is orbited."""

    step: float = 0.08
    turn: float = 3.0
    distance: float = 1.0

    def turns(self, degrees: float) -> int:
        """Latent frames that turn the view by so many degrees."""
        return max(1, round(degrees / self.turn))


# key -> (yaw, pitch, steps right, steps forward, orbit), in units of the pace. Positive yaw turns right, positive pitch up, and a positive
# orbit moves right around the point
KEYS = {
    "w": (0, 0, 0, 1, 0), "s": (0, 0, 0, -1, 0), "a": (0, 0, -1, 0, 0), "d": (0, 0, 1, 0, 0),
    "left": (-1, 0, 0, 0, 0), "right": (1, 0, 0, 0, 0), "up": (0, 1, 0, 0, 0), "down": (0, -1, 0, 0, 0),
    "orbit-left": (0, 0, 0, 0, -1), "orbit-right": (0, 0, 0, 0, 1), "still": (0, 0, 0, 0, 0)}
DEFAULT_PACE = Pace()
_MOVE = re.compile(r"([a-z+\s-]+?)\s*-\s*([^-\s]+)")


def walk(text: str, pace: Pace = DEFAULT_PACE, intrinsics: Tensor | None = None) -> CameraPath:
    """The path of moves such as "w-8, right-4", separated by commas or lines, in any case and with any spaces.

    intrinsics: [3, 3], by default the original's. Raises ValueError for text that is no list of moves.
    """
    poses = [torch.eye(4, dtype=torch.float64)]
    for keys, frames in parse_moves(text):
        motion = relative_pose(keys, pace)
        for _ in range(frames):
            poses.append(poses[-1] @ motion)
    return CameraPath.from_cameras(inverse(torch.stack(poses)), intrinsics)


def parse_moves(text: str) -> list[tuple[tuple[str, ...], int]]:
    """"W+right-8, s-2" -> [(("w", "right"), 8), (("s",), 2)]. Raises ValueError for text that is no list of moves."""
    moves = [_parse_move(part) for part in re.split(r"[,\n]", text) if part.strip()]
    if not moves:
        raise ValueError('No moves were given; write keys and latent frames, such as "w-8, right-4, s-2".')
    total = sum(frames for _, frames in moves)
    if total >= MOST_FRAMES:
        raise ValueError(f"The moves last {total} latent frames; a path can have {MOST_FRAMES - 1} of them.")
    return moves


def _parse_move(text: str) -> tuple[tuple[str, ...], int]:
    found = _MOVE.fullmatch(text.strip().lower())
    if not found:
        raise ValueError(f"{text.strip()!r} is no move; write a key, a dash and latent frames, such as w-8.")
    keys = tuple("".join(key.split()) for key in found[1].split("+"))
    for key in keys:
        if key not in KEYS:
            raise ValueError(f"{text.strip()!r} has the key {key!r}; keys are {', '.join(KEYS)}.")
    crowded = any(sum(map(bool, values)) > 1 for values in zip(*(KEYS[key] for key in keys)))
    if crowded or (len(keys) > 1 and "still" in keys):
        raise ValueError(f"{text.strip()!r} holds keys together that exclude each other; join a step and a turn, or two at right angles.")
    try:
        frames = float(found[2])
    except ValueError:
        frames = 0.0
    if not (frames >= 1 and frames.is_integer()):
        raise ValueError(f"{text.strip()!r} lasts {found[2]} latent frames; give a whole number of 1 or more.")
    return keys, int(frames)


def relative_pose(keys: tuple[str, ...], pace: Pace = DEFAULT_PACE) -> Tensor:
    """[4, 4] float64: the camera after one latent frame of these keys, seen from the one before it."""
    yaw, pitch, right, ahead, orbit = (float(sum(values)) for values in zip(*(KEYS[key] for key in keys)))
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, :3] = _about_y(yaw * pace.turn) @ _about_x(pitch * pace.turn)
    pose[:3, 3] = pose[:3, :3] @ pose.new_tensor([right, 0, ahead]) * pace.step
    # round a point ahead: to it, turn, and back
    there, back = torch.eye(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    there[2, 3], back[2, 3] = pace.distance, -pace.distance
    there[:3, :3] = _about_y(-orbit * pace.turn)
    return pose @ there @ back if orbit else pose


def _about_x(degrees: float) -> Tensor:
    """Positive looks up: y points down."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return torch.tensor([[1, 0, 0], [0, c, -s], [0, s, c]], dtype=torch.float64)


def _about_y(degrees: float) -> Tensor:
    """Positive looks right."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return torch.tensor([[c, 0, s], [0, 1, 0], [-s, 0, c]], dtype=torch.float64)


@dataclass(frozen=True)
class Preset:
    """A path with a name. moves: (moves to fill, pace) -> text of about so many. least: moves that it needs, of the pace. room: more that
    show it well where no length is given."""

    title: str
    moves: Callable[[int, Pace], str]
    least: Callable[[Pace], int] = lambda pace: 1
    room: int = 0


def _square(frames: int, pace: Pace) -> str:
    turn = pace.turns(90)
    return ", ".join([f"w-{(frames - 4 * turn) // 4}, right-{turn}"] * 4)


PRESETS = {
    "forward": Preset("walk forward", lambda frames, pace: f"w-{frames}"),
    "there and back": Preset("walk forward, then backward", lambda frames, pace: f"w-{frames // 2}, s-{frames // 2}", lambda pace: 2),
    "look around": Preset("turn right, then back left", lambda frames, pace: f"right-{frames // 2}, left-{frames // 2}", lambda pace: 2),
    "full turn": Preset("turn right all the way round", lambda frames, pace: f"right-{pace.turns(360)}", lambda pace: pace.turns(360)),
    "orbit": Preset("go round a point ahead", lambda frames, pace: f"orbit-right-{frames}"),
    "circle": Preset("walk in a circle to the right", lambda frames, pace: f"w+right-{frames}"),
    "square": Preset("walk a square to the right", _square, lambda pace: 4 * pace.turns(90) + 4, room=16),
    "return": Preset("walk forward, turn round and walk back",
                     lambda frames, pace: f"w-{(n := (frames - pace.turns(180)) // 2)}, right-{pace.turns(180)}, w-{n}",
                     lambda pace: pace.turns(180) + 2, room=16)}


def preset_moves(name: str, frames: int, pace: Pace = DEFAULT_PACE) -> str:
    """The text of a preset that fills about `frames` latent frames, the first one included. Raises ValueError for an unknown name and for
    fewer frames than the path needs."""
    if name not in PRESETS:
        raise ValueError(f"There is no camera path {name!r}; the paths are {', '.join(PRESETS)}.")
    least = PRESETS[name].least(pace) + 1
    if frames < least:
        raise ValueError(f"The path {name!r} takes {least} latent frames at {pace.turn:g} degrees a frame, and there are {frames}; make "
                         "the video longer, turn faster or choose another path.")
    return PRESETS[name].moves(frames - 1, pace)


def preset(name: str, frames: int, pace: Pace = DEFAULT_PACE, intrinsics: Tensor | None = None) -> CameraPath:
    """A preset of exactly `frames` latent frames; one that is done earlier stands still then. Raises ValueError as `preset_moves`."""
    return walk(preset_moves(name, frames, pace), pace, intrinsics).resized(frames)
