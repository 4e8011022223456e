"""Camera Path (QVG): where the camera goes, for world models.

    QVGCameraPath  moves, a named path or a file of poses (+ QVG_CAMERA_PATH to continue) -> QVG_CAMERA_PATH, latent frames, drawn top view
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import folder_paths
import numpy as np
import torch
from comfy_api.latest import io, ui

from ..qvg.files import relative_path
from ..qvg.report.top_view import draw_top_view
from ..qvg.video.camera_file import read_poses
from ..qvg.video.camera_moves import DEFAULT_PACE, PRESETS, Pace, preset, walk
from ..qvg.video.cameras import MOST_FRAMES, CameraPath
from ..qvg.video.world import CHUNK
from .camera_type import CameraPathType
from .live import TEXT

MOVES, FILE = "moves", "file"
NO_FILE = "none"
SUFFIX = ".json"
USUAL_FRAMES = 16  # of a named path whose length is not set
STRIDE = 4  # video frames of each latent frame after the first
FRAME_RATES = {"5B": 16, "8B": 24}


def pose_files() -> list[str]:
    """Names of the JSON files in the input folder."""
    return sorted(path.name for path in Path(folder_paths.get_input_directory()).glob(f"*{SUFFIX}") if path.is_file())


def path_of(name: str) -> Path:
    """A file of poses in the input folder. Raises ValueError where there is none, also for a name that leads out of the folder."""
    folder = Path(folder_paths.get_input_directory())
    if name == NO_FILE:
        raise ValueError(f"No file of poses is chosen; copy one to {folder} and choose it in file, or set source to {MOVES}.")
    path = folder / relative_path(name, SUFFIX, existing=True)
    if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
        raise ValueError(f"There is no file {name!r} in {folder}; copy the poses there, and choose them in file.")
    return path


class QVGCameraPath(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QVGCameraPath", display_name="Camera Path (QVG)", category="QuantVideoGen", is_output_node=True,
            description="Where the camera goes in a world model: keys and how long they are held, a path with a name, or a file of poses. "
                        "Draws the path from above.",
            search_aliases=["qvg", "camera", "trajectory", "wasd", "worldplay", "pose", "orbit", "walk"],
            inputs=[
                io.Combo.Input("source", options=[MOVES, *PRESETS, FILE], default=MOVES,
                               tooltip="moves: the text below. file: a file of poses. The others are paths that fill the latent frames. "
                                       "Default: moves."),
                io.String.Input("moves", multiline=True, default="w-8, right-4, w-3",
                                tooltip="Keys and the latent frames that they are held, separated by commas or lines. w, s, a, d: step. "
                                        "left, right, up, down: turn. orbit-left, orbit-right: go round a point ahead. still: wait. "
                                        "w+left: both at once. One latent frame comes before the first move. Default: w-8, right-4, w-3."),
                io.Int.Input("frames", default=0, min=0, max=MOST_FRAMES,
                             tooltip="Latent frames of the whole path: a longer one is cut off, and after a shorter one the camera stands "
                                     "still. 0, the default: as many as the moves or the file have; for the other paths "
                                     f"{USUAL_FRAMES}, or as many as show them."),
                io.Combo.Input("file", options=[NO_FILE, *pose_files()], default=NO_FILE, optional=True,
                               tooltip="JSON in ComfyUI's input folder, in HY-WorldPlay's layout: one pose per latent frame. Read when "
                                       "source is file. Default: none."),
                CameraPathType.Input("path", optional=True, tooltip="A path to continue from where it ends."),
                io.Float.Input("step", default=DEFAULT_PACE.step, min=0.001, max=10.0, step=0.01, round=0.001, advanced=True, optional=True,
                               tooltip="World units that a step key moves in each latent frame. Default: 0.08."),
                io.Float.Input("turn", default=DEFAULT_PACE.turn, min=0.1, max=90.0, step=0.5, round=0.01, advanced=True, optional=True,
                               tooltip="Degrees that a turn key turns in each latent frame. Default: 3."),
                io.Float.Input("distance", default=DEFAULT_PACE.distance, min=0.01, max=100.0, step=0.1, round=0.01, advanced=True,
                               optional=True, tooltip="How far ahead the point is that is orbited, in world units. Default: 1."),
            ],
            outputs=[
                CameraPathType.Output(display_name="camera_path",
                                      tooltip="One camera per latent frame, for World Walk (HY-WorldPlay, QVG)."),
                io.Int.Output(display_name="frames", tooltip="Number of latent frames."),
                io.Image.Output(display_name="top_view", tooltip="The path from above."),
            ])

    @classmethod
    def fingerprint_inputs(cls, file=NO_FILE, **_):
        return "" if file == NO_FILE else hashlib.sha256(path_of(file).read_bytes()).hexdigest()

    @classmethod
    def execute(cls, source, moves, frames, file=NO_FILE, path=None, step=DEFAULT_PACE.step, turn=DEFAULT_PACE.turn,
                distance=DEFAULT_PACE.distance) -> io.NodeOutput:
        pace, done = Pace(step, turn, distance), 0 if path is None else len(path)
        if source == MOVES:
            new = walk(moves, pace)
        elif source == FILE:
            new = read_poses(path_of(file))
        else:
            new = _named(source, frames, done, pace)
        whole = new if path is None else path.extended(new)
        whole = whole.resized(frames) if frames else whole
        picture = draw_top_view(*whole.positions())
        shown = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)[None]
        return io.NodeOutput(whole, len(whole), shown, ui=ui.PreviewImage(shown, cls=cls).as_dict() | {TEXT: [describe(len(whole))]})


def _named(name: str, frames: int, done: int, pace: Pace) -> CameraPath:
    """A preset that makes `frames` latent frames of a path that has `done`; of its own length, in whole chunks, if `frames` is 0."""
    if frames and frames <= done:
        raise ValueError(f"The path to continue has {done} latent frames already; set frames above that, or to 0.")
    shared = min(done, 1)  # a path that is continued has the first frame
    if not frames:
        least = done - shared + max(USUAL_FRAMES + shared, PRESETS[name].least(pace) + PRESETS[name].room + 1)
        frames = -(-least // CHUNK) * CHUNK
    return preset(name, frames - done + shared, pace)


def describe(frames: int) -> str:
    """How long a path is, in all that counts time. A walk has whole chunks, and stands still until the last one is full."""
    chunks = -(-frames // CHUNK)
    video = STRIDE * chunks * CHUNK - STRIDE + 1
    still = f" and {chunks * CHUNK - frames} of standing still" if frames % CHUNK else ""
    seconds = ", ".join(f"{video / rate:.1f} s at {rate} fps ({model})" for model, rate in FRAME_RATES.items())
    return f"{_count(frames, 'latent frame')}{still}: {_count(chunks, 'chunk')} of four\n{video} video frames: {seconds}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
