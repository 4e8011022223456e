"""Saves sessions while a video is made: of an `ARSampler` and of walks chunk by chunk, of LongCat-Video segment by segment."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import comfy.samplers

from ..qvg.files import Lock, check_place, remove_parts
from ..qvg.video import sessions
from ..qvg.video.recorder import session_bytes
from ..qvg.video.segments import Segments
from .long_video import model_name


@dataclass(frozen=True)
class SaveTo:
    """What Save Video Session (QVG) chose: the file, and after how many chunks or segments it is saved."""

    path: Path
    every: int

    def open(self, sampler, base, session) -> Saver:
        """Called by the `ARSampler` when sampling starts. session: the one that the run continues, or None."""
        place = SessionPlace(self.path, session, session_bytes(sampler, latents=True))
        return Saver(place, self.every, sampler, model_name(base))

    def open_walk(self, sampler, base, session, start) -> WalkSaver:
        """The same for a walk. start: latents of its start image."""
        place = SessionPlace(self.path, session, session_bytes(sampler, latents=True, caches=sampler.model.memory != "rebuild"))
        return WalkSaver(place, self.every, sampler, model_name(base), start)


class SessionPlace:
    """The file of a session, locked while a run saves there.

    session: the one that the run continues, or None. needed_bytes: about the size of the file. A session of another video under this name
    is not lost: the first save renames it, with a number.
    Raises ValueError if the file cannot be written or another run writes it.
    """

    def __init__(self, path: Path, session, needed_bytes: int):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        check_place(path, needed_bytes)
        self.is_ours = session is not None and session.path.resolve() == path.resolve()
        self.lock = Lock(path)
        remove_parts(path)

    def save(self, write) -> None:
        """Call `write` with the path. Raises OSError if the disk refuses; the previous file is then still there."""
        renamed = None
        if not self.is_ours and self.path.exists():
            renamed = next(path for number in count(1) if not (path := self.path.with_stem(f"{self.path.stem} {number}")).exists())
            self.path.rename(renamed)
        try:
            write(self.path)
        except BaseException:
            if renamed is not None:
                renamed.rename(self.path)
            raise
        self.is_ours = True
        if renamed is not None:
            logging.info("QVG: the session of another video, %s, is now %s", self.path.name, renamed)

    def release(self) -> None:
        self.lock.release()


class Saver:
    """A recorder of an `ARSampler`: its methods are called as the video grows. video: the latents so far [B, C, F, H, W]."""

    def __init__(self, place: SessionPlace, every: int, sampler, fingerprint: str):
        self.place, self.every, self.sampler, self.fingerprint = place, every, sampler, fingerprint
        given = 0 if sampler.start is None else sampler.start.shape[2]
        self.saved_frames = max(given, sampler.frames_done)

    def resume(self, video) -> None:
        """Nothing: what the resumed session holds is already saved."""

    def chunk(self, event, video) -> None:
        if event.chunk is not None and (event.chunk + 1) % self.every == 0:
            self._save(video)

    def close(self, video) -> None:
        """Save what is not saved yet, and let other runs write the file."""
        try:
            # after an error, the sampler may count a chunk that the video lacks, and other ranks may have no heads to give
            lost = getattr(self.sampler.model, "lost", False)
            if self.sampler.settled and not lost and self.sampler.frames_done == video.shape[2] > self.saved_frames:
                self._save(video)
        finally:
            self.release()

    def release(self) -> None:
        self.place.release()

    def _write(self, path: Path, video) -> None:
        sessions.save(path, self.sampler, fingerprint=self.fingerprint, latents=video)

    def _save(self, video) -> None:
        self.place.save(lambda path: self._write(path, video))
        self.saved_frames = video.shape[2]
        logging.info("QVG: %d latent frames are saved in %s", self.saved_frames, self.place.path)


class WalkSaver(Saver):
    """The same of a walk. start: latents of its start image, which a walk that continues needs."""

    def __init__(self, place: SessionPlace, every: int, sampler, fingerprint: str, start):
        super().__init__(place, every, sampler, fingerprint)
        self.start = start

    def _write(self, path: Path, video) -> None:
        sessions.save_walk(path, self.sampler, fingerprint=self.fingerprint, tensors={"start": self.start})


class SavingSampler(comfy.samplers.Sampler):
    """A sampler with the file of a session, for nodes that sample by themselves: Continue Video (LongCat, QVG) and World Walk
    (HY-WorldPlay, QVG) unpack it."""

    def __init__(self, sampler, save: SaveTo):
        self.sampler, self.save = sampler, save

    def sample(self, *args, **kwargs):
        raise ValueError("Save Video Session (QVG) saves whole chunks or segments, which this sampler does not make here. Connect AR Video "
                         "Sampler (QVG) to it, or its SAMPLER to Continue Video (LongCat, QVG) or World Walk (HY-WorldPlay, QVG).")


class SegmentSaver:
    """Saves a video in segments. made: what is already saved. needed_bytes: about the size of the file at the end.

    Raises ValueError as `SessionPlace`.
    """

    def __init__(self, save: SaveTo, fingerprint: str, made: Segments, session, needed_bytes: int):
        self.place, self.every = SessionPlace(save.path, session, needed_bytes), save.every
        self.fingerprint, self.saved = fingerprint, made.done

    def segment(self, made: Segments) -> None:
        """Called after each segment."""
        if made.done % self.every == 0:
            self._save(made)

    def close(self, made: Segments) -> None:
        """Save what is not saved yet, and let other runs write the file."""
        try:
            if made.done > self.saved:
                self._save(made)
        finally:
            self.place.release()

    def _save(self, made: Segments) -> None:
        """A disk that refuses does not end the video."""
        try:
            self.place.save(lambda path: made.save(path, self.fingerprint))
        except OSError as error:
            logging.error("QVG: %s", error)
            return
        self.saved = made.done
        logging.info("QVG: %d segments are saved in %s", made.done, self.place.path)
