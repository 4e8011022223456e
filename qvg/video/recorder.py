"""What is left of a run of `generate` on the disk: the video as it grows, and the session that goes on with it.

The frames come first, always: a session counts no frame that is not in the file, and where the file cannot take its frames, the session
before stays. Both places are tried, and held against other processes, before the first step.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from ..cache.forecast import forecast
from ..files.places import Lock, PlaceError, Taken, check_place, remove_parts
from . import session as storage
from .events import ChunkDone
from .sampler import Sampler
from .session import Session
from .stream import ChunkDecoder, VideoWriter, to_bytes

if TYPE_CHECKING:
    from .generate import Job

# a decoder's state, headers and checksums beside the cache
BESIDE = 64 << 20


def session_bytes(sampler: Sampler) -> int:
    """About how much a session of this run takes when the video is done."""
    run, total = sampler.run, BESIDE
    given = 0 if sampler.start is None else sampler.start.shape[2]
    for cache in sampler.model.caches:
        total += forecast(cache.settings, cache.geometry, run.frames, run.chunk_frames, min(given, run.chunk_frames),
                          itemsize=cache.workspace.dtype.itemsize).stored_bytes
    return total


class Recorder:
    """Takes the chunks of a run. Raises ValueError where a place cannot be used, see `VideoWriter` and `files`.

    resume: the session that the sampler was restored from.
    """

    def __init__(self, job: Job, sampler: Sampler, vae, fingerprint: str, resume: Session | None):
        self.job, self.sampler, self.fingerprint = job, sampler, fingerprint
        self.decode = ChunkDecoder(vae)
        frames, digest = 0, ""
        if resume is not None:
            self.decode.restore(resume.tensors, resume.shape, resume.frames_done)
            frames, digest = resume.extra["video_frames"], str(resume.extra.get("video_digest", ""))
        # latent frames that the writer has, and those that the last session counts; of a resumed run the first save is always made,
        # because it may have become longer
        self.handed = sampler.frames_done
        self.saved = -1 if resume is not None else 0 if sampler.start is None else sampler.start.shape[2]
        check_places(job, sampler)
        self.lock = Lock(job.session)
        try:
            if job.session.exists() and resume is None and not job.overwrite:
                raise Taken(f"{job.session} is there already. Choose another name.")
            remove_parts(job.session)
            self.writer = VideoWriter(job.out, job.frame_rate, frames=frames, digest=digest, overwrite=job.overwrite)
        except BaseException:
            self.lock.release()
            raise

    def chunk(self, event: ChunkDone) -> None:
        self.writer.write(to_bytes(self.decode(event.latents)[0]))
        self.handed = event.first + event.latents.shape[2]

    def checkpoint(self) -> str | None:
        """Save a session; what is to be said where the disk refuses it. Raises OSError where it refuses the video."""
        self.writer.cut()
        try:
            self._save()
        except OSError as error:
            return f"The video goes on, but a checkpoint failed: {error}"
        return None

    def _save(self) -> None:
        values = self.job.values() | {"video_frames": self.writer.frames, "video_digest": self.writer.digest}
        storage.save(self.job.session, self.sampler, fingerprint=self.fingerprint, extra=values, tensors=self.decode.state())
        self.saved = self.handed

    def _save_last(self) -> None:
        # a chunk that the sampler counts and that did not come here is in no file: the session before makes it again
        if self.sampler.settled and self.sampler.frames_done == self.handed > self.saved:
            self.writer.cut()
            self._save()

    def close(self) -> None:
        """The last session, then the file's end; each is tried whatever becomes of the other. Raises what the first of them raises."""
        with ExitStack() as stack:
            stack.callback(self.lock.release)
            stack.callback(self.writer.close)
            stack.callback(self._save_last)


def check_places(job: Job, sampler: Sampler) -> None:
    """Raises PlaceError where the session of this run could not be written, or is the video itself."""
    if same_place(job.session, job.out):
        raise PlaceError(f"{job.out} is to be the video and the session. Give the session another name.")
    check_place(job.session, session_bytes(sampler))


def same_place(one, two) -> bool:
    """Whether two paths are one file, on a disk that knows no capitals too."""
    one, two = (path.resolve() for path in (one, two))
    if one.exists() and two.exists():
        return one.samefile(two)
    return str(one).casefold() == str(two).casefold()
