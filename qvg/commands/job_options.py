"""Options of `qvg generate` that mean the same for every model, and what a session fixes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from ..settings import QVGSettings
from ..video import session as storage
from ..video.job import Job
from ..video.prepare import auto_budget
from ..video.walk_job import WalkJob
from .source import Opened

# options whose value a session fixes, of every model -> that value in the job of the session
FIXED = {"seed": lambda job: job.run.seed, "preset": lambda job: job.settings.name, "window": lambda job: job.settings.window_frames,
         "sink": lambda job: job.settings.sink_frames, "budget": lambda job: job.settings.budget_gib, "cfg": lambda job: job.cfg,
         "sigmas": lambda job: [*job.run.sigmas]}


def settings_of(arguments) -> QVGSettings:
    """The settings of a new video's cache."""
    settings = QVGSettings.preset(arguments.preset or "balanced")
    most = auto_budget(arguments.device) if arguments.budget == "auto" else arguments.budget or 0.0
    host = auto_budget("cpu") if arguments.offload and arguments.budget == "auto" else 0.0
    return replace(settings, window_frames=arguments.window or 0, budget_gib=most, offload=arguments.offload, host_gib=host,
                   attention=arguments.attention or settings.attention,
                   sink_frames=settings.sink_frames if arguments.sink is None else arguments.sink)


def resumed_settings(arguments, settings: QVGSettings) -> QVGSettings:
    """Those of a session, with what may change."""
    return replace(settings, offload=arguments.offload, host_gib=settings.host_gib if arguments.offload else 0.0,
                   attention=arguments.attention or settings.attention)


def check_weights(session, opened: Opened) -> None:
    """Raises ValueError for a session of another network."""
    if session.fingerprint != storage.fingerprint(opened.network):
        file = opened.source.checkpoint
        raise ValueError(f"{session.path.name} was made with other weights than those of {file.name if file else 'the tiny model'}. Give "
                         "the --checkpoint that made it, or start over with another --out.")


def check_fixed(arguments, place: Path, job: Job | WalkJob, fixed: Mapping[str, Callable]) -> None:
    """Raises ValueError where an option is not what the session at `place` was made with. fixed: option -> its value in a job."""
    for name, of in fixed.items():
        given = getattr(arguments, name)
        if given is not None and given != "auto" and given != of(job):
            option = name.replace("_", "-")
            raise ValueError(f"{place.name} was made with --{option} {of(job)}, which cannot become {given} now. Leave out --{option}, or "
                             "start over with another --out.")


def refuse(arguments, names: tuple[str, ...], reason: str) -> None:
    """Raises ValueError for the first of these options that is given. reason: the rest of a sentence that begins with the option."""
    for name in names:
        # 0 is the default of numbers
        if getattr(arguments, name):
            raise ValueError(f"--{name.replace('_', '-')} {reason}")
