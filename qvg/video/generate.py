"""A long video without ComfyUI: streamed to a file, checkpointed, resumed. `qvg generate` is this with the tiny model.

    for event, sampler in generate(network, vae, embed, Job(out, session, schedule, run, settings, latent)):
        ...

It is the same for any network and VAE with the interfaces of `models.wan` and `models.wan_vae`. Nothing in it grows with the
length of the video: latents are decoded as they come and kept no longer than a change of prompt needs them.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ..attention.rope import Rope
from ..cache.kv_cache import KVCache
from ..files.fields import integer, partial_record, real_number, text
from ..files.tensor_files import first_line
from ..models.wan import HEAD_DIM, PATCH, CausalWan
from ..models.wan_vae import WanVAE
from ..settings import QVGSettings
from ..units import GIB, format_bytes
from . import session as storage
from .events import ChunkDone, Event
from .network import CachedNetwork, Condition, check_positions, guided
from .recorder import Recorder
from .run import MAX_FRAMES, Run
from .sampler import Sampler
from .schedule import PromptTrack, Schedule
from .session import Session

# of what is free, left to everything that is not the cache
MARGIN = 0.2
KEPT = ("frame_rate", "checkpoint", "cfg", "negative", "position_limit")
# what `Job.values` writes, and how many frames of the video are in its file
EXTRA = partial_record(
    frame_rate=integer(1, 1000), checkpoint=integer(1, MAX_FRAMES), cfg=real_number(-1000, 1000), negative=text(), schedule=text(1_000_000),
    position_limit=integer(0, MAX_FRAMES), settings=text(), video_frames=integer(0, 4 * MAX_FRAMES))


@dataclass(frozen=True)
class Notice:
    """Something to be told that does not end the run, as a sentence."""

    message: str


@dataclass(frozen=True)
class Job:
    """A video to be made. latent: (height, width) of its latents; session: where checkpoints go, every `checkpoint` chunks; negative: the
    prompt that cfg leads away from. overwrite: put video and session in the place of others.

    Raises ValueError for a value that a session could not hold."""

    out: Path
    session: Path
    schedule: Schedule
    run: Run
    settings: QVGSettings
    latent: tuple[int, int]
    frame_rate: int = 16
    checkpoint: int = 4
    cfg: float = 1.0
    negative: str = ""
    position_limit: int = 0
    device: str = "cpu"
    overwrite: bool = False

    def __post_init__(self):
        for name, least in (("checkpoint", 1), ("frame_rate", 1), ("position_limit", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name} is {value!r}; it must be a whole number, at least {least}.")
        if not math.isfinite(self.cfg):
            raise ValueError(f"cfg is {self.cfg}; give a number such as 1 or 4.5.")
        if any(size < 1 or size % patch for size, patch in zip(self.latent, PATCH[1:])):
            raise ValueError(f"A latent frame of {self.latent[0]} x {self.latent[1]} (height x width) does not divide into tokens; make "
                             f"both even, that is a picture of whole multiples of {8 * PATCH[1]} pixels.")

    def values(self) -> dict:
        """What a session must remember besides run and settings."""
        kept = {name: getattr(self, name) for name in KEPT}
        return kept | {"schedule": str(self.schedule), "settings": self.settings.to_json()}


def resumed(session: Session, out: Path, device: str = "cpu") -> Job:
    """The job that a session was saved by."""
    try:
        values = EXTRA(session.extra, "extra")
        settings, schedule = QVGSettings.from_json(values["settings"]), Schedule.parse(values["schedule"])
    except ValueError as error:
        raise storage.SessionError(f"{session.path.name} was not saved by `qvg generate` ({first_line(error)}). Open it in ComfyUI, or use "
                                   "an earlier checkpoint.") from None
    kept = {name: values[name] for name in KEPT}
    return Job(out=out, session=session.path, schedule=schedule, run=session.run, settings=settings, latent=tuple(session.shape[2:]),
               device=device, **kept)


def free_bytes(device: str) -> int:
    """Memory that is free now on a device, or on the host; 0 where the system does not say."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0


def auto_budget(device: str) -> float:
    """GiB that a cache may take so that it always fits: what is free now, less a margin."""
    return free_bytes(device) * (1 - MARGIN) / GIB


def cache_of(network: CausalWan, settings: QVGSettings, run: Run, grid: tuple[int, int], *, batch: int = 1, device="cpu",
             dtype: torch.dtype | None = None) -> KVCache:
    """A cache for a run of a network; grid: tokens (height, width) of a latent frame; dtype: of what it keeps unquantized and hands
    out, the network's own by default."""
    return KVCache(settings, layers=network.sizes.layers, heads=network.sizes.heads, head_dim=HEAD_DIM, grid=grid, rope=Rope, batch=batch,
                   device=device, dtype=dtype or network.dtype, max_frames=run.frames, chunk_frames=run.chunk_frames)


def prepare(network: CausalWan, embed: Callable[[str], Tensor], job: Job, start: Tensor | None = None) -> Sampler:
    """A sampler with its caches. Raises ValueError where settings, budget or positions do not fit the network and the run."""
    run = job.run
    check_positions(job.settings, run, job.position_limit)

    def project(text: str):
        return network.project_context(embed(text).to(job.device))

    def cache() -> KVCache:
        return cache_of(network, settings, run, (job.latent[0] // PATCH[1], job.latent[1] // PATCH[2]), device=job.device)

    prompt = PromptTrack(job.schedule, project, job.frame_rate)
    guides = job.cfg != 1
    settings = replace(job.settings, budget_gib=job.settings.budget_gib / (1 + guides), host_gib=job.settings.host_gib / (1 + guides))
    if guides:
        conditions = guided(prompt, cache(), project(job.negative), cache(), job.cfg)
    else:
        conditions = [Condition(prompt, cache())]
    model = CachedNetwork(network, conditions, position_limit=job.position_limit)
    return Sampler(model, run, (1, network.sizes.channels, *job.latent), start=start, device=job.device)


def generate(network: CausalWan, vae: WanVAE, embed: Callable[[str], Tensor], job: Job, *, start: Tensor | None = None,
             resume: Session | None = None) -> Iterator[tuple[Event | Notice, Sampler]]:
    """Make the video; yields every event with the sampler. The file and the session are whole whenever and however this ends.

    start: latents [1, C, n, H, W] to go on from.
    Raises ValueError before the first step where a place or a value cannot be used, and OSError where the disk refuses the video.
    """
    sampler = prepare(network, embed, job, start)
    try:
        name = storage.fingerprint(network)
        if resume is not None:
            resume.restore(sampler, name)
        recorder = Recorder(job, sampler, vae, name, resume)
        try:
            for event in sampler:
                failure = None
                if isinstance(event, ChunkDone):
                    recorder.chunk(event)
                    if event.chunk is not None and (event.chunk + 1) % job.checkpoint == 0:
                        failure = recorder.checkpoint()
                yield event, sampler
                if failure:
                    yield Notice(failure), sampler
        finally:
            recorder.close()
    finally:
        for cache in sampler.model.caches:
            cache.free()


@dataclass
class Meter:
    """Progress as a line of text: steps of all steps, frames a second, time left."""

    steps_done: int = 0
    began: float = field(default_factory=time.monotonic)

    def line(self, event: Event, sampler: Sampler) -> str:
        self.steps_done += 1
        run = sampler.run
        seconds = time.monotonic() - self.began
        # a pass that stores costs about as much as a step
        left = (sampler.chunks - event.chunk) * (run.steps + 1) - getattr(event, "step", run.steps) - 1
        text = f"chunk {event.chunk + 1}/{event.chunks}"
        if not isinstance(event, ChunkDone):
            text += f", step {event.step + 1}/{event.steps}"
        text += f", {left * seconds / self.steps_done:.0f} s left"
        if isinstance(event, ChunkDone):
            frames = 4 * event.latents.shape[2]
            text += f", {frames * self.steps_done / (run.steps + 1) / seconds:.1f} frames/s, cache {format_bytes(event.stats.stored_bytes)}"
        return text
