"""`qvg generate`: a long video with the tiny model, saved while it is made, and resumed.

    qvg generate --prompt "red circle moving right, over green dots still" --seconds 30 --out ball.mp4
    qvg generate --resume --out ball.mp4                        after a crash or an interrupt, or with another --seconds or --prompt

Existing files are replaced only with --overwrite. Values that a session fixes may be repeated, but not changed.
"""

from __future__ import annotations

import re
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch

from ..files import PlaceError, Taken, check_place, same_place
from ..settings import PRESETS, QVGSettings
from ..units import format_bytes
from ..video import MAX_FRAMES, Adapted, ChunkDone, Run, Schedule, latent_frames
from ..video import session as storage
from ..video.decode import encode_stream
from ..video.generate import Notice, generate
from ..video.job import Job, resumed
from ..video.prepare import auto_budget
from ..video.reader import read_frames
from ..video.session import Session
from .arguments import DAY, budget, device, number, whole
from .progress import bar

INTERRUPTED = 130  # the exit status of shells for Ctrl-C
FRAME_RATE = 16
MOST_FRAMES = 100_000  # the largest number of frames in a setting
# options whose value a session fixes -> that value in the job of the session
FIXED = {"seed": lambda job: job.run.seed, "preset": lambda job: job.settings.name, "window": lambda job: job.settings.window_frames,
         "sink": lambda job: job.settings.sink_frames, "budget": lambda job: job.settings.budget_gib,
         "position_limit": lambda job: job.position_limit, "cfg": lambda job: job.cfg, "negative": lambda job: job.negative}


def add_arguments(command) -> None:
    text = command.add_mutually_exclusive_group()
    text.add_argument("--prompt", help="one prompt, or a schedule with lines such as '0s: ...' and '6.5s: ...'")
    text.add_argument("--prompt-file", type=Path, help="a text file with the same")
    command.add_argument("--seconds", type=number(above=0, most=DAY), help="length of the video (default 10)")
    command.add_argument("--out", type=Path, required=True, help="ball.mp4, ball.webm, or ball.png for numbered images")
    command.add_argument("--start", type=Path, nargs="+", help="images or a video to continue, cropped to the video's shape")
    what = command.add_mutually_exclusive_group()
    what.add_argument("--resume", action="store_true", help="continue from the session; --seconds, --prompt and --recache may change")
    what.add_argument("--overwrite", action="store_true", help="replace an existing video and session")
    command.add_argument("--session", type=Path, help="where checkpoints go (default: OUT.session.safetensors)")
    command.add_argument("--checkpoint", type=whole(1, MAX_FRAMES), metavar="CHUNKS", help="chunks between checkpoints (default 4)")
    command.add_argument("--seed", type=whole(0, 2**64 - 1), help="seed of the noise (default 0)")
    command.add_argument("--preset", choices=PRESETS, help="preset of the cache (default balanced)")
    command.add_argument("--window", type=whole(0, MOST_FRAMES), metavar="FRAMES",
                         help="latent frames of history besides the sink (default 0: all)")
    command.add_argument("--sink", type=whole(0, MOST_FRAMES), metavar="FRAMES", help="first latent frames, kept permanently")
    command.add_argument("--budget", type=budget, metavar="GIB",
                         help="memory budget of the cache, or auto for what is free (default 0: no limit)")
    command.add_argument("--offload", action="store_true", help="keep the cache in host memory, on the device one layer at a time")
    command.add_argument("--position-limit", type=whole(0, MAX_FRAMES), metavar="FRAMES", help="positions grow no further than this")
    command.add_argument("--recache", type=whole(0, MOST_FRAMES), metavar="FRAMES",
                         help="latent frames stored again when the prompt changes")
    command.add_argument("--cfg", type=number(0, 100), help="guidance scale (default 1)")
    command.add_argument("--negative", help="negative prompt for cfg")
    command.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")


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


def _resumed(arguments, place: Path, text: str | None) -> tuple[Job, Session]:
    """The job of a session, with the values that may change. Raises ValueError if others differ, or if there is no session."""
    if not place.is_file():
        raise ValueError(f"There is no session {place} to resume. Give the --session of the video, or leave out --resume to start over.")
    session = storage.load(place)
    job = resumed(session, arguments.out, arguments.device)
    for name, of in FIXED.items():
        given = getattr(arguments, name)
        if given is not None and given != "auto" and given != of(job):
            option = name.replace("_", "-")
            raise ValueError(f"{place.name} was made with --{option} {of(job)}, which cannot become {given} now. Leave out --{option}, or "
                             "start over with another --out.")
    run = replace(job.run, frames=latent_frames(arguments.seconds, FRAME_RATE) if arguments.seconds else job.run.frames,
                  recache_frames=job.run.recache_frames if arguments.recache is None else arguments.recache)
    settings = replace(job.settings, offload=arguments.offload, host_gib=job.settings.host_gib if arguments.offload else 0.0)
    return replace(job, run=run, settings=settings, schedule=Schedule.parse(text) if text else job.schedule,
                   checkpoint=arguments.checkpoint or job.checkpoint), session


def _settings(arguments) -> QVGSettings:
    settings = QVGSettings.preset(arguments.preset or "balanced")
    most = auto_budget(arguments.device) if arguments.budget == "auto" else arguments.budget or 0.0
    host = auto_budget("cpu") if arguments.offload and arguments.budget == "auto" else 0.0
    return replace(settings, window_frames=arguments.window or 0, budget_gib=most, offload=arguments.offload, host_gib=host,
                   sink_frames=settings.sink_frames if arguments.sink is None else arguments.sink)


def _job(arguments, latent: tuple[int, int]) -> tuple[Job, Session | None]:
    """The job, and the session to continue. Raises ValueError before anything is written."""
    out, place = arguments.out, arguments.session or arguments.out.with_name(arguments.out.name + ".session.safetensors")
    text = _text(arguments)
    for path in (out, place):
        check_place(path)
    sources = [*(arguments.start or ()), *([arguments.prompt_file] if arguments.prompt_file else ())]
    check_out(out, place, sources, arguments.resume, arguments.overwrite)
    if arguments.resume:
        return _resumed(arguments, place, text)
    if not text or not text.strip():
        raise ValueError("There is no prompt. Give --prompt or --prompt-file.")
    cfg = 1.0 if arguments.cfg is None else arguments.cfg
    if arguments.negative and cfg == 1:
        raise ValueError("A --negative prompt is not used with cfg 1. Give --cfg, such as 3, or leave out --negative.")
    run = Run(frames=latent_frames(arguments.seconds or 10.0, FRAME_RATE), seed=arguments.seed or 0, recache_frames=arguments.recache or 0)
    return Job(out=out, session=place, schedule=Schedule.parse(text), run=run, settings=_settings(arguments), latent=latent,
               frame_rate=FRAME_RATE, checkpoint=arguments.checkpoint or 4, cfg=cfg, negative=arguments.negative or "",
               position_limit=arguments.position_limit or 0, device=arguments.device, overwrite=arguments.overwrite), None


def main(arguments) -> int:
    from ..demo import HEIGHT, LATENT, WIDTH, embed_prompt, load_tiny

    if not arguments.out.name:
        raise PlaceError(f"{arguments.out} is a folder. Give the name of a file, such as ball.mp4.")
    job, session = _job(arguments, LATENT)
    start = None
    if arguments.start and session is None:
        start = read_frames(arguments.start, WIDTH, HEIGHT)
    network, vae = (part.to(arguments.device) for part in load_tiny())
    if start is not None:
        start = encode_stream(vae, start.to(arguments.device))
    try:
        # closed here rather than by the garbage collector: an interrupt between two events must also save
        with bar(job.out.name) as shown, closing(generate(network, vae, embed_prompt, job, start=start, resume=session)) as events:
            _show(events, shown)
    except KeyboardInterrupt:
        print(f"\n{job.out} has the finished part; the same command with --resume continues it.", file=sys.stderr)
        return INTERRUPTED
    print(f"{job.out}: {job.run.frames} latent frames, session in {job.session}", file=sys.stderr)
    return 0


def _show(events, shown) -> None:
    for event, sampler in events:
        if isinstance(event, Adapted | Notice):
            shown.say(event.message)
        elif event.chunk is not None:
            passes, ended = sampler.run.steps + 1, isinstance(event, ChunkDone)
            text = f"chunk {event.chunk + 1}/{event.chunks}"
            if ended:
                text += f", cache {format_bytes(event.stats.stored_bytes)}"
            shown.show(event.chunk * passes + (passes if ended else event.step + 1), event.chunks * passes, text)
