"""`qvg generate`: a long video with the tiny model or a released checkpoint, saved while it is made, and resumed.

    qvg generate --prompt "red circle moving right, over green dots still" --seconds 30 --out ball.mp4
    qvg generate --resume --out ball.mp4                        after a crash or an interrupt, or with another --seconds or --prompt
    qvg generate --checkpoint self_forcing_dmd.pt --vae wan_2.1_vae.safetensors --embeddings prompts.safetensors --out long.mp4
    qvg generate --checkpoint worldplay.safetensors --embeddings scene.safetensors --camera "w-8, right-4" --out walk.latent
    torchrun --nproc-per-node 2 -m comfyui_qvg generate ...     one video by two GPUs, or by two processes on a CPU

Existing files are replaced only with --overwrite. Values that a session fixes may be repeated, but not changed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..files import PlaceError, Taken, check_place, same_place
from ..measure.inputs import NEGATIVE
from ..models.wan_vae import WanVAE
from ..settings import ATTENTIONS, PRESETS
from ..units import format_bytes
from ..video import MAX_FRAMES, Adapted, ChunkDone, Run, Schedule, latent_frames
from ..video.decode import encode_stream
from ..video.generate import Notice, generate
from ..video.job import Job, resumed
from ..video.latent_file import holds_latents
from ..video.reader import read_frames
from ..video.segments import SegmentSession, load
from ..video.session import Session
from ..video.walk_job import WalkJob
from ..video.walk_session import WalkSession
from . import job_options, own_model, walk, walk_inputs
from .arguments import DAY, WHOLE, budget, device, number, whole
from .job_options import check_fixed, check_weights, refuse, resumed_settings, settings_of
from .processes import check_division, follow_job, processes
from .progress import bar
from .source import Opened, Source

INTERRUPTED = 130  # the exit status of shells for Ctrl-C
FRAME_RATE = 16
STRIDE = 8  # pixels of a latent
MOST_FRAMES = 100_000  # the largest number of frames in a setting
# options whose value a session fixes -> that value in the job of the session
FIXED = job_options.FIXED | {
    "position_limit": lambda job: job.position_limit, "negative": lambda job: job.negative, "given": lambda job: job.given,
    "chunk_frames": lambda job: job.run.chunk_frames, "width": lambda job: STRIDE * job.latent[1],
    "height": lambda job: STRIDE * job.latent[0]}
# options of a model that is not the tiny one, and those of a history that segments do not have
OWN = ("chunk_frames", "given", "width", "height", "sigmas")
HISTORY = ("window", "sink", "position_limit", "recache")


def add_arguments(command) -> None:
    text = command.add_mutually_exclusive_group()
    text.add_argument("--prompt", help="one prompt, or a schedule with lines such as '0s: ...' and '6.5s: ...'; with a checkpoint, numbers "
                                       "of embeddings (default 1)")
    text.add_argument("--prompt-file", type=Path, help="a text file with the same")
    command.add_argument("--seconds", type=number(above=0, most=DAY), help="length of the video (default 10)")
    command.add_argument("--out", type=Path, required=True, help="ball.mp4, ball.webm, ball.png for numbered images, or ball.latent "
                         "for Load Latent and VAE Decode in ComfyUI, which needs no --vae and is the way for HY-WorldPlay")
    command.add_argument("--start", type=Path, nargs="+", help="images or a video to continue, cropped to the video's shape")
    what = command.add_mutually_exclusive_group()
    what.add_argument("--resume", action="store_true", help="continue from the session; --seconds, --prompt, --recache, "
                      "--offload and --attention may change, of a walk --camera, which begins as before")
    what.add_argument("--overwrite", action="store_true", help="replace an existing video and session")
    command.add_argument("--session", type=Path, help="where checkpoints go (default: OUT.session.safetensors)")
    command.add_argument("--save-every", type=whole(1, MAX_FRAMES), metavar="CHUNKS", help="chunks between checkpoints (default 4)")
    command.add_argument("--seed", type=whole(0, 2**64 - 1), help="seed of the noise (default 0)")
    command.add_argument("--preset", choices=PRESETS, help="preset of the cache (default balanced)")
    command.add_argument("--window", type=whole(0, MOST_FRAMES), metavar="FRAMES",
                         help="latent frames of history besides the sink (default 0: all)")
    command.add_argument("--sink", type=whole(0, MOST_FRAMES), metavar="FRAMES", help="first latent frames, kept permanently")
    command.add_argument("--budget", type=budget, metavar="GIB",
                         help="memory budget of the cache, or auto for what is free (default 0: no limit)")
    command.add_argument("--offload", action="store_true", help="keep the cache in host memory, on the device one layer at a time")
    command.add_argument("--attention", choices=ATTENTIONS,
                         help="to the cache: exact; fast, in eight bits; or auto, the default: fast where that is known to be better")
    command.add_argument("--position-limit", type=whole(0, MAX_FRAMES), metavar="FRAMES", help="positions grow no further than this")
    command.add_argument("--recache", type=whole(0, MOST_FRAMES), metavar="FRAMES",
                         help="latent frames stored again when the prompt changes")
    command.add_argument("--cfg", type=number(0, 100), help="guidance scale (default 1)")
    command.add_argument("--negative", help="negative prompt for cfg")
    command.add_argument("--checkpoint", type=_weights, metavar="FILE",
                         help=f"{own_model.CHECKPOINT}; also HY-WorldPlay (default: the tiny model). A number is that of --save-every")
    command.add_argument("--vae", type=Path, metavar="FILE", help="of a checkpoint: the VAE of Wan 2.1, .safetensors or .pth; "
                         "HY-WorldPlay has others, so give --out a .latent file instead")
    command.add_argument("--embeddings", type=Path, metavar="FILE", help=f"of a checkpoint: {own_model.EMBEDDINGS}; {walk_inputs.HELP}")
    walk.add_arguments(command)
    own_model.add_sampling(command)
    command.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")


def _weights(text: str) -> Path | int:
    """A file, or as before there were any, chunks between checkpoints."""
    return whole(1, MAX_FRAMES)(text) if WHOLE.fullmatch(text) else Path(text)


def _text(arguments) -> str | None:
    """The prompt. Raises ValueError if its file cannot be read."""
    if arguments.prompt_file is None:
        return arguments.prompt
    try:
        return arguments.prompt_file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise ValueError(f"{arguments.prompt_file} cannot be read as a prompt: {reason}. Give a text file.") from None


def _is_image_of(out: Path, path: Path) -> bool:
    """Whether a file is named as a numbered image of `out`, on a file system that ignores case, too."""
    return bool(re.fullmatch(re.escape(out.stem) + r"_[0-9]{6}\.png", path.name, re.IGNORECASE))


def check_out(out: Path, session: Path, sources: list[Path], resume: bool, overwrite: bool) -> None:
    """Raises PlaceError if video, session and sources are not all different files, or if an existing file would be replaced. sources: files
    that are read."""
    if same_place(out, session):
        raise PlaceError(f"{out} is given for the video and the session. Give one of them another name.")
    for source in sources:
        for target in (out, session):
            beside = target.suffix.lower() == ".png" and source.resolve().parent == target.resolve().parent
            numbered = beside and _is_image_of(target, source)
            if same_place(source, target) or numbered:
                raise PlaceError(f"{source} is read, but {target} would be written in its place. Give --out or --session another name.")
    if resume or overwrite:
        return
    images = out.parent.glob("*.png") if out.suffix.lower() == ".png" else ()
    taken = [path for path in images if _is_image_of(out, path)]
    for path in [*sorted(taken)[:1], out, session]:
        if path.exists():
            raise Taken(f"{path} already exists. Choose another --out, --resume to continue it, or --overwrite to replace it.")


def _resumed(arguments, opened: Opened, place: Path, text: str | None) -> tuple[Job, Session | SegmentSession]:
    """The job of a session, with the values that may change. Raises ValueError if others differ, or if there is no session."""
    if not place.is_file():
        raise ValueError(f"There is no session {place} to resume. Give the --session of the video, or leave out --resume to start over.")
    session = load(place)
    check_weights(session, opened)
    job = resumed(session, arguments.out, arguments.device)
    check_fixed(arguments, place, job, FIXED)
    run = replace(job.run, frames=latent_frames(arguments.seconds, job.frame_rate) if arguments.seconds else job.run.frames,
                  recache_frames=job.run.recache_frames if arguments.recache is None else arguments.recache)
    return replace(job, run=run, settings=resumed_settings(arguments, job.settings),
                   schedule=Schedule.parse(text) if text else job.schedule, checkpoint=arguments.save_every or job.checkpoint), session


def _source(arguments) -> Source:
    """The files of the model. Raises ValueError for options that do not belong together."""
    if isinstance(arguments.checkpoint, int):
        if arguments.save_every:
            raise ValueError(f"--checkpoint {arguments.checkpoint} and --save-every {arguments.save_every} say the same twice. Leave out "
                             "--checkpoint, or give it a file.")
        arguments.save_every, arguments.checkpoint = arguments.checkpoint, None
    source = Source(arguments.checkpoint, arguments.vae, arguments.embeddings, holds_latents(arguments.out))
    if source.checkpoint is None:
        refuse(arguments, (*OWN, *walk.WALKS), "is for a --checkpoint; the tiny model has one size and one schedule. Leave it out.")
    if source.checkpoint is not None and arguments.negative:
        raise ValueError(f"--negative is text, but the negative prompt of a --checkpoint is the embedding 'negative' in "
                         f"{source.embeddings.name}. Leave it out.")
    return source


def _begun(arguments, opened: Opened, place: Path, text: str | None) -> Job:
    """The job of a new video. Raises ValueError for options that do not fit the model."""
    more = {"out": arguments.out, "session": place, "settings": settings_of(arguments), "checkpoint": arguments.save_every or 4,
            "position_limit": arguments.position_limit or 0, "device": arguments.device, "overwrite": arguments.overwrite}
    arguments.seed = arguments.seed or 0
    if opened.embeddings is None:
        from ..demo import LATENT

        run = Run(frames=latent_frames(arguments.seconds or 10.0, FRAME_RATE), seed=arguments.seed, recache_frames=arguments.recache or 0)
        return Job(schedule=Schedule.parse(text), run=run, latent=LATENT, frame_rate=FRAME_RATE,
                   cfg=1.0 if arguments.cfg is None else arguments.cfg, negative=arguments.negative or "", **more)
    usual = own_model.usual_of(opened.family, opened.network)
    arguments.frames = latent_frames(arguments.seconds or 10.0, usual.frame_rate)
    run, cfg, given = own_model.run_of(arguments, usual, opened.family, opened.embeddings)
    if given:
        refuse(arguments, HISTORY, f"is for models that keep a history; {opened.family.title} makes segments, which read the --given "
                                   "frames alone. Leave it out.")
    return Job(schedule=Schedule.parse(text or "1"), run=replace(run, recache_frames=arguments.recache or 0), given=given, cfg=cfg,
               latent=own_model.size_of(arguments, usual)[2], frame_rate=usual.frame_rate, negative=NEGATIVE if cfg != 1 else "", **more)


def _job(arguments) -> tuple[Job | WalkJob, Session | SegmentSession | WalkSession | None, Opened]:
    """The job, the session to continue, and the model. Raises ValueError before anything is written."""
    out, place = arguments.out, arguments.session or arguments.out.with_name(arguments.out.name + ".session.safetensors")
    source, text = _source(arguments), _text(arguments)
    for path in (out, place):
        check_place(path)
    poses = Path(arguments.camera.strip()) if walk.is_file_of_poses(arguments.camera) else None
    files = (arguments.prompt_file, source.checkpoint, source.vae, source.embeddings, poses)
    check_out(out, place, [*(arguments.start or ()), *(file for file in files if file)], arguments.resume, arguments.overwrite)
    if not arguments.resume and source.checkpoint is None:
        if not text or not text.strip():
            raise ValueError("There is no prompt. Give --prompt or --prompt-file.")
        if arguments.negative and arguments.cfg in (None, 1):
            raise ValueError("A --negative prompt is not used with cfg 1. Give --cfg, such as 3, or leave out --negative.")
    opened = source.open(arguments.device)
    if opened.family.walks:
        return *walk.job_of(arguments, opened, place, text), opened
    refuse(arguments, walk.WALKS, f"is for HY-WorldPlay, which walks along a camera path; {opened.family.title} does not. Leave it out.")
    job, session = _resumed(arguments, opened, place, text) if arguments.resume else (_begun(arguments, opened, place, text), None)
    opened.check(job.schedule)
    return job, session, opened


def main(arguments) -> int:
    if not arguments.out.name:
        raise PlaceError(f"{arguments.out} is a folder. Give the name of a file, such as ball.mp4.")
    with processes(arguments.device) as (ranks, arguments.device):
        if ranks is not None and not ranks.leads:
            return follow_job(ranks, arguments.device)
        try:
            job, session, opened = _job(arguments)
            if ranks is not None:
                check_division(ranks, opened.network, job.grid)
            start_given = session is None and bool(arguments.start)
            vae = opened.vae() if start_given or not holds_latents(job.out) else None
            start = _start(arguments, job, vae) if start_given else None
        except BaseException:
            if ranks is not None:
                ranks.command()
            raise
        if opened.family.licence:
            print(opened.family.licence, file=sys.stderr)
        if ranks is not None:
            ranks.command((opened.source, job))
        return _make(job, generate(opened.network, vae, opened.embed, job, start=start, resume=session, ranks=ranks))


def _start(arguments, job: Job, vae: WanVAE) -> Tensor:
    """Latents of what the video begins with."""
    pictures = read_frames(arguments.start, STRIDE * job.latent[1], STRIDE * job.latent[0])
    return encode_stream(vae, pictures.to(arguments.device))


def _make(job: Job | WalkJob, made: Iterator) -> int:
    """Show the events of `generate`; the exit status."""
    try:
        # closed here rather than by the garbage collector: an interrupt between two events must also save
        with bar(job.out.name) as shown, closing(made) as events:
            _show(events, shown)
    except KeyboardInterrupt:
        print(f"\n{job.out} has the finished part; the same command with --resume continues it.", file=sys.stderr)
        return INTERRUPTED
    which = " for Load Latent and VAE Decode in ComfyUI" if holds_latents(job.out) else ""
    print(f"{job.out}: {job.run.frames} latent frames{which}, session in {job.session}", file=sys.stderr)
    return 0


def _show(events, shown) -> None:
    attention = ""
    for event, sampler in events:
        if isinstance(event, Adapted | Notice):
            shown.say(event.message)
        elif event.chunk is not None:
            passes, ended = sampler.run.steps + 1, isinstance(event, ChunkDone)
            text = f"chunk {event.chunk + 1}/{event.chunks}"
            if ended and event.stats.attention != attention:
                attention = event.stats.attention
                shown.say(f"attention to the cache: {attention}")
            if ended:
                text += f", cache {format_bytes(event.stats.stored_bytes)}"
            shown.show(event.chunk * passes + (passes if ended else event.step + 1), event.chunks * passes, text)
