"""A long video without ComfyUI: streamed to a file, checkpointed, resumed. `qvg generate` is this with the tiny model.

    for event, sampler in generate(network, vae, embed, Job(out, session, schedule, run, settings, latent)):
        ...

It works for any network and VAE with the interfaces of `models.wan` and `models.wan_vae`. Its memory does not grow with the length of the
video: latents are decoded as they come, and kept no longer than a change of prompt needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from ..models.wan import CausalWan
from ..models.wan_vae import WanVAE
from . import session as storage
from .events import ChunkDone, Event
from .job import Job
from .prepare import prepare
from .recorder import Recorder
from .sampler import Sampler
from .session import Session


@dataclass(frozen=True)
class Notice:
    """Something to report that does not end the run, as a sentence."""

    message: str


def generate(network: CausalWan, vae: WanVAE, embed: Callable[[str], Tensor], job: Job, *, start: Tensor | None = None,
             resume: Session | None = None) -> Iterator[tuple[Event | Notice, Sampler]]:
    """Make the video; yields every event with the sampler. The file and the session are whole whenever and however this ends.

    embed: from a prompt to a text embedding. start: latents [1, C, n, H, W] to begin with. resume: a session to continue.
    Raises ValueError before the first step if a place or a value cannot be used, and OSError if the disk refuses the video.
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
