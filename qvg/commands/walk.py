"""`qvg generate` with HY-WorldPlay: a walk along a camera path.

    qvg generate --checkpoint worldplay.safetensors --embeddings scene.safetensors --camera "w-8, right-4, w-3" --out walk.latent
    qvg generate ... --resume --camera "w-8, right-4, w-3, s-8" --out walk.latent      further, along a path that begins with the first one

The start image and the prompts come from the file of embeddings (`walk_inputs`), and the camera path sets the length.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from ..models import Family
from ..models.worldplay_schedule import SAMPLING_5B
from ..video import Run
from ..video.camera_file import read_poses
from ..video.camera_moves import walk
from ..video.cameras import CameraPath
from ..video.segments import load
from ..video.walk_job import KINDS, START, WalkInputs, WalkJob, resumed_walk
from ..video.walk_session import WalkSession
from ..video.world import CHUNK, MEMORIES
from . import job_options
from .arguments import whole
from .job_options import check_fixed, check_weights, refuse, resumed_settings, settings_of
from .source import Opened

POSES = ".json"
# options of a walk alone
WALKS = ("camera", "memory", "steps")
# options of other models, and why they are not for a walk
SIZED = f"{START!r} in the file of --embeddings sets its size"
LEFT_OUT = {"seconds": "the camera path sets its length", "start": f"it begins with {START!r} in the file of --embeddings",
            "width": SIZED, "height": SIZED, "chunk_frames": f"its chunks have {CHUNK} latent frames",
            "given": "it is not made in segments", "position_limit": "the memory sets its positions", "recache": "it has one prompt"}
# options that tell which old frames are kept
KEPT = ("window", "sink")
# options whose value a session fixes -> that value in the job of the session
FIXED = job_options.FIXED | {"memory": lambda job: job.memory, "steps": lambda job: job.run.steps}


def add_arguments(command) -> None:
    command.add_argument("--camera", metavar="PATH", help="HY-WorldPlay: where the camera goes, such as 'w-8, right-4, w-3' (keys and "
                         "latent frames, as in Camera Path (QVG)), or a .json file of poses")
    command.add_argument("--memory", choices=MEMORIES, help="HY-WorldPlay: what a chunk remembers (default rebuild)")
    command.add_argument("--steps", type=whole(1, 1000), metavar="N",
                         help=f"HY-WorldPlay: denoising steps (default: the distilled models' {SAMPLING_5B.distilled_steps}; with --cfg, "
                              f"the base models' {SAMPLING_5B.steps})")


def is_file_of_poses(camera: str | None) -> bool:
    return camera is not None and camera.strip().lower().endswith(POSES)


def path_of(camera: str) -> CameraPath:
    """The path that --camera means, as long as whole chunks; the camera stands still at its end. Raises ValueError for one that is none."""
    if is_file_of_poses(camera):
        file = Path(camera.strip())
        if not file.is_file():
            raise ValueError(f"There is no file of poses {file}. Give --camera a file in HY-WorldPlay's layout, or moves such as 'w-8, "
                             "right-4'.")
        path = read_poses(file)
    else:
        path = walk(camera)
    return path.resized(-(-len(path) // CHUNK) * CHUNK)


def job_of(arguments, opened: Opened, place: Path, text: str | None) -> tuple[WalkJob, WalkSession | None]:
    """The job, and the session to continue. Raises ValueError for options that do not fit a walk, before anything is written."""
    for name, reason in LEFT_OUT.items():
        refuse(arguments, (name,), f"is not for a walk: {reason}. Leave it out.")
    if arguments.steps and arguments.sigmas:
        raise ValueError("--steps and --sigmas both say how the noise falls. Leave one out.")
    if not arguments.resume:
        return _begun(arguments, opened, place, _prompt(text, opened)), None
    return _resumed(arguments, opened, place, None if text is None else _prompt(text, opened))


def _prompt(text: str | None, opened: Opened) -> int:
    """Which prompt of the file. Raises ValueError for a text that is the number of none."""
    count, text = len(opened.embed.texts), "1" if text is None else text.strip()
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and 1 <= int(text) <= count):
        raise ValueError(f"The prompt {text[:40]!r} is not the number of an embedding: {opened.source.embeddings.name} holds {count}, and "
                         f"a walk has one prompt. Give --prompt a number from 1 to {count}.")
    return int(text)


def _begun(arguments, opened: Opened, place: Path, prompt: int) -> WalkJob:
    kind, inputs, memory = KINDS[opened.family.name], opened.embed, arguments.memory or MEMORIES[0]
    if not arguments.camera:
        raise ValueError(f"{opened.family.title} walks along a camera path. Give --camera, such as 'w-8, right-4, w-3'.")
    if memory != "append":
        refuse(arguments, KEPT, f"is for --memory append; {memory} chooses what a chunk reads. Leave it out.")
    cfg = 1.0 if arguments.cfg is None else arguments.cfg
    if cfg != 1 and inputs.negative is None:
        raise ValueError(f"--cfg {cfg:g} needs a negative prompt: save one as 'negative' in {opened.source.embeddings.name}, or leave out "
                         "--cfg.")
    path, sigmas = path_of(arguments.camera), _sigmas(arguments, opened.family, cfg)
    run = Run(frames=len(path), chunk_frames=CHUNK, sigmas=sigmas, solver="euler", seed=arguments.seed or 0)
    return WalkJob(
        out=arguments.out, session=place, family=opened.family.name, path=path, run=run, settings=settings_of(arguments),
        latent=tuple(inputs.start.shape[3:]), memory=memory, frame_rate=kind.frame_rate, checkpoint=arguments.save_every or 4, cfg=cfg,
        prompt=prompt, device=arguments.device, overwrite=arguments.overwrite)


def _sigmas(arguments, family: Family, cfg: float) -> tuple[float, ...]:
    """Those of the distilled models, or with guidance, which they do without, of the base models."""
    sampling, distilled = KINDS[family.name].sampling, cfg == 1
    if not arguments.sigmas:
        return sampling.levels(arguments.steps or (sampling.distilled_steps if distilled else sampling.steps), distilled=distilled)
    if arguments.sigmas[-1] != 0:
        raise ValueError(f"--sigmas end at {arguments.sigmas[-1]:g}; a chunk is finished at 0.")
    return tuple(arguments.sigmas)


def _resumed(arguments, opened: Opened, place: Path, prompt: int | None) -> tuple[WalkJob, WalkSession]:
    if not place.is_file():
        raise ValueError(f"There is no session {place} to resume. Give the --session of the walk, or leave out --resume to start over.")
    session = load(place)
    check_weights(session, opened)
    job = resumed_walk(session, arguments.out, arguments.device) if isinstance(session, WalkSession) else None
    if job is None or job.family != opened.family.name:
        raise ValueError(f"{place.name} is not the session of a walk by {opened.family.title}. Give the --session of one.")
    check_fixed(arguments, place, job, FIXED)
    if prompt not in (None, job.prompt):
        raise ValueError(f"{place.name} was made with --prompt {job.prompt}, and a walk has one prompt. Leave out --prompt, or start over "
                         "with another --out.")
    _check_inputs(session, job, opened.embed, opened.source.embeddings)
    path = job.path if arguments.camera is None else path_of(arguments.camera)
    return replace(job, path=path, run=replace(job.run, frames=len(path)), settings=resumed_settings(arguments, job.settings),
                   checkpoint=arguments.save_every or job.checkpoint), session


def _check_inputs(session: WalkSession, job: WalkJob, inputs: WalkInputs, file: Path) -> None:
    """Raises ValueError where a file of embeddings cannot be that of the session."""
    kept = session.tensors.get(START)
    if kept is None or not torch.equal(kept, inputs.start):
        raise ValueError(f"{session.path.name} does not begin with {START!r} in {file.name}. Give the --embeddings that it was made with.")
    if job.prompt > len(inputs.texts) or (job.cfg != 1 and inputs.negative is None):
        missing = "no negative prompt" if job.prompt <= len(inputs.texts) else f"{len(inputs.texts)} prompts"
        raise ValueError(f"{session.path.name} was made with --prompt {job.prompt} and --cfg {job.cfg:g}, but {file.name} holds {missing}. "
                         "Give the --embeddings that it was made with.")
