"""A long video without ComfyUI: streamed to a file, checkpointed, resumed. `qvg generate` is this with the tiny model.

    for event, sampler in generate(network, vae, embed, Job(out, session, schedule, run, settings, latent)):
        ...

It works for any network with the interface of `models.wan`, of `models.longcat` for a job with `given`, or of HY-WorldPlay for a `WalkJob`,
and any VAE with that of `models.wan_vae`; a .latent file needs none. Its memory does not grow with the length of the video: latents are
decoded as they come, and kept no longer than a change of prompt needs them. Of a video in segments and of a walk they are kept, some kB a
frame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace

from torch import Tensor, nn

from ..attention.ranks import Ranks
from ..models.wan_vae import WanVAE
from . import segments, sessions
from . import session as storage
from .events import ChunkDone, Event
from .job import Job
from .prepare import prepare, sampler_of
from .ranks import Leader, ranked
from .recorder import Recorder
from .sampler import Sampler
from .segments import SegmentSession
from .session import Session
from .walk_job import START, WalkInputs, WalkJob
from .walk_session import WalkSession


@dataclass(frozen=True)
class Notice:
    """Something to report that does not end the run, as a sentence."""

    message: str


def generate(network: nn.Module, vae: WanVAE | None, embed: Callable[[str], Tensor] | WalkInputs, job: Job | WalkJob, *,
             start: Tensor | None = None, resume: Session | SegmentSession | WalkSession | None = None, ranks: Ranks | None = None
             ) -> Iterator[tuple[Event | Notice, Sampler]]:
    """Make the video; yields every event with the sampler. The file and the session are whole whenever and however this ends.

    vae: not needed where latents are written. embed: from a prompt to a text embedding, or the inputs of a walk. start: latents
    [1, C, n, H, W] to begin with, not of a walk. resume: a session to continue.
    ranks: of the processes that make the video, of which this is the first; the others call `ranks.follow`.
    Raises ValueError before the first step if a place or a value cannot be used, and OSError if the disk refuses the video.
    """
    with ExitStack() as held:
        if ranks is None:
            sampler = prepare(network, embed, job, start)
        else:
            sampler = sampler_of(held.enter_context(Leader(ranked(network, embed, job, ranks), ranks)), network, job, start)
        for cache in sampler.model.caches:
            held.callback(cache.free)
        name = storage.fingerprint(network)
        if resume is not None:
            sessions.restore(resume, sampler, name)
        if isinstance(resume, WalkSession):
            # what else it holds is the decoder's
            resume = replace(resume, tensors={part: tensor for part, tensor in resume.tensors.items() if part != START})
        recorder = Recorder(job, sampler, vae, name, resume, _save_of(job, embed))
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


def _save_of(job: Job | WalkJob, embed: Callable[[str], Tensor] | WalkInputs) -> Callable:
    """What writes the session of a job, called as `session.save`."""
    if isinstance(job, WalkJob):
        return lambda *place, tensors, **more: sessions.save_walk(*place, tensors=tensors | {START: embed.start}, **more)
    return segments.save_sampler if job.given else sessions.save
