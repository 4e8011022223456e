"""What a run of `generate` leaves on the disk: the video as it grows, and the session from which it continues.

The frames always come first: a session never counts a frame that is not in the file. Where the file cannot take its frames, the previous
session stays. Both places are checked, and locked against other processes, before the first step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack

import torch

from ..cache.forecast import forecast
from ..files import Lock, PlaceError, Taken, check_place, remove_parts, same_place
from ..models.wan_vae import WanVAE
from . import session as storage
from .decode import PixelFrames
from .events import ChunkDone
from .job import Job
from .latent_file import LatentFrames, holds_latents
from .sampler import Sampler
from .segments import SegmentSession
from .session import Session
from .sessions import ranks_of
from .writer import VideoWriter

# for a decoder's state, headers and checksums in a session, besides the cache
OVERHEAD_BYTES = 64 << 20


def session_bytes(sampler: Sampler, *, latents: bool = False, caches: bool = True) -> int:
    """About how many bytes a session of this run takes when the video is done. latents, caches: what it holds, of all ranks."""
    run, total, ranks = sampler.run, OVERHEAD_BYTES, ranks_of(sampler)
    if latents:
        total += torch.float32.itemsize * run.frames * math.prod(sampler.shape)
    given = 0 if sampler.start is None else sampler.start.shape[2]
    for cache in sampler.model.caches if caches else ():
        stored = forecast(cache.settings, cache.geometry, run.frames, run.chunk_frames, min(given, run.chunk_frames),
                          itemsize=cache.workspace.dtype.itemsize).stored_bytes
        total += stored * (ranks.size if ranks else 1)
    return total


class Recorder:
    """Writes the chunks of a run. resume: the session that the sampler was restored from. save: see `session.save`.

    Raises ValueError if a place cannot be used, see `VideoWriter` and `files`.
    """

    def __init__(self, job: Job, sampler: Sampler, vae: WanVAE, fingerprint: str, resume: Session | SegmentSession | None,
                 save: Callable = storage.save):
        self.save = save
        self.job, self.sampler, self.fingerprint = job, sampler, fingerprint
        self.decode = LatentFrames() if holds_latents(job.out) else PixelFrames(vae)
        frames, digest = 0, ""
        if resume is not None:
            self.decode.restore(resume.tensors, resume.shape, resume.frames_done)
            frames, digest = resume.extra["video_frames"], str(resume.extra.get("video_digest", ""))
        # latent frames that the writer has, and those in the last session. A resumed run always saves once, because it may have become
        # longer
        self.recorded_frames = sampler.frames_done
        self.saved_frames = -1 if resume is not None else 0 if sampler.start is None else sampler.start.shape[2]
        if same_place(job.session, job.out):
            raise PlaceError(f"{job.out} is both the video and the session. Give the session another name.")
        check_place(job.session, session_bytes(sampler, latents=job.saves_latents, caches=job.saves_caches))
        self.lock = Lock(job.session)
        try:
            if job.session.exists() and resume is None and not job.overwrite:
                raise Taken(f"{job.session} already exists. Choose another name.")
            remove_parts(job.session)
            self.writer = VideoWriter(job.out, job.frame_rate, frames=frames, digest=digest, overwrite=job.overwrite)
        except BaseException:
            self.lock.release()
            raise

    def chunk(self, event: ChunkDone) -> None:
        """Decode a chunk and hand its frames to the writer."""
        self.writer.write(self.decode(event.latents))
        self.recorded_frames = event.first + event.latents.shape[2]

    def checkpoint(self) -> str | None:
        """Save a session; returns a sentence if the disk refuses it. Raises OSError if the disk refuses the video."""
        self.writer.flush()
        try:
            self._save()
        except OSError as error:
            return f"The video continues, but a checkpoint failed: {error}"
        return None

    def _save(self) -> None:
        values = self.job.values() | {"video_frames": self.writer.frames, "video_digest": self.writer.digest}
        self.save(self.job.session, self.sampler, fingerprint=self.fingerprint, extra=values, tensors=self.decode.state())
        self.saved_frames = self.recorded_frames

    def _save_last(self) -> None:
        # a chunk that the sampler counts but that did not come here is in no file; the previous session makes it again
        if self.sampler.settled and self.sampler.frames_done == self.recorded_frames > self.saved_frames:
            self.writer.flush()
            self._save()

    def close(self) -> None:
        """Save the last session, then close the file; each is tried even if the other fails, and a failure is raised afterwards."""
        with ExitStack() as stack:
            stack.callback(self.lock.release)
            stack.callback(self.writer.close)
            stack.callback(self._save_last)
