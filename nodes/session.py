"""Sessions: a video saved while it is made, and gone on with later.

    QVGSaveVideoSession  SAMPLER -> SAMPLER that writes a session every few chunks (or segments) and at the end
    QVGLoadVideoSession  file -> QVG_SESSION, LATENT made so far
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import comfy.samplers
import folder_paths
from comfy.latent_formats import Wan21
from comfy_api.latest import io

from ..qvg.files import Lock, check_place, relative_path, remove_parts
from ..qvg.models.wan_vae import CHANNELS
from ..qvg.video import segments
from ..qvg.video import session as storage
from ..qvg.video.recorder import session_bytes
from .adapters.checks import is_autoregressive
from .long_video import ARSampler, SessionType, model_name
from .outputs import TOKEN

FOLDER = "video_sessions"
ENDING = ".safetensors"


def folder() -> Path:
    return Path(folder_paths.get_output_directory()) / FOLDER


def path_of(name: str, existing: bool = False) -> Path:
    """Where a session of this name lies; existing: one that is to be read. Raises ValueError for a name that leads out of the folder of
    sessions, by itself or by a link, and for a new one that some system cannot store."""
    path = folder() / relative_path(name, ENDING, existing)
    if not path.resolve().is_relative_to(folder().resolve()):
        raise ValueError(f"The session name {name!r} leads out of {folder()}. Use a plain name.")
    return path


@dataclass(frozen=True)
class SaveTo:
    """Part of an `ARSampler`."""

    path: Path
    every: int

    def open(self, sampler, base, session) -> Saver:
        shape = sampler.shape
        latents = 4 * sampler.run.frames * shape[0] * shape[1] * shape[2] * shape[3]
        return Saver(SessionPlace(self.path, session, session_bytes(sampler) + latents), self.every, sampler, model_name(base))


class SessionPlace:
    """The file of a session while a run saves there. Raises ValueError where it cannot be written or another run writes it.

    session: the one that the run goes on from, or None. needed_bytes: about what the file will take.
    A session of another video that has this name is not lost: the first save gives it a number.
    """

    def __init__(self, path: Path, session, needed_bytes: int):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        check_place(path, needed_bytes)
        self.own = session is not None and session.path.resolve() == path.resolve()
        self.lock = Lock(path)
        remove_parts(path)

    def save(self, write) -> None:
        """Call `write` with the path. Raises OSError where the disk refuses; what was there is then there still."""
        aside = None
        if not self.own and self.path.exists():
            aside = next(path for number in count(1) if not (path := self.path.with_stem(f"{self.path.stem} {number}")).exists())
            self.path.rename(aside)
        try:
            write(self.path)
        except BaseException:
            if aside is not None:
                aside.rename(self.path)
            raise
        self.own = True
        if aside is not None:
            logging.info("QVG: the session of another video, %s, is now %s", self.path.name, aside)

    def release(self) -> None:
        self.lock.release()


class Saver:
    def __init__(self, place: SessionPlace, every: int, sampler, fingerprint: str):
        self.place, self.every, self.sampler, self.fingerprint = place, every, sampler, fingerprint
        given = 0 if sampler.start is None else sampler.start.shape[2]
        self.saved_frames = max(given, sampler.frames_done)

    def resume(self, video) -> None:
        """What the session that the run goes on from holds is saved already."""

    def chunk(self, event, video) -> None:
        if event.chunk is not None and (event.chunk + 1) % self.every == 0:
            self._save(video)

    def close(self, video) -> None:
        try:
            # the sampler may count a chunk that an error kept from the video
            if self.sampler.settled and self.sampler.frames_done == video.shape[2] > self.saved_frames:
                self._save(video)
        finally:
            self.release()

    def release(self) -> None:
        self.place.release()

    def _save(self, video) -> None:
        self.place.save(lambda path: storage.save(path, self.sampler, fingerprint=self.fingerprint, latents=video))
        self.saved_frames = video.shape[2]
        logging.info("QVG: %d latent frames are saved in %s", self.saved_frames, self.place.path)


class SavingSampler(comfy.samplers.Sampler):
    """A sampler with the place of a session, for Continue Video (LongCat, QVG), which takes it apart and saves segments."""

    def __init__(self, sampler, save: SaveTo):
        self.sampler, self.save = sampler, save

    def sample(self, *args, **kwargs):
        raise ValueError("Save Video Session (QVG) saves whole chunks or segments, which this sampler does not make here. Connect AR Video "
                         "Sampler (QVG) to it, or its SAMPLER to Continue Video (LongCat, QVG).")


class SegmentSaver:
    """Writes a session of a video in segments. made: what is saved already. needed_bytes: about what all segments will take.
    Raises ValueError as `SessionPlace`."""

    def __init__(self, save: SaveTo, fingerprint: str, made: segments.Segments, session, needed_bytes: int):
        self.place, self.every = SessionPlace(save.path, session, needed_bytes), save.every
        self.fingerprint, self.saved = fingerprint, made.done

    def segment(self, made: segments.Segments) -> None:
        if made.done % self.every == 0:
            self._save(made)

    def close(self, made: segments.Segments) -> None:
        try:
            if made.done > self.saved:
                self._save(made)
        finally:
            self.place.release()

    def _save(self, made: segments.Segments) -> None:
        """A disk that refuses does not end the video."""
        try:
            self.place.save(lambda path: made.save(path, self.fingerprint))
        except OSError as error:
            logging.error("QVG: %s", error)
            return
        self.saved = made.done
        logging.info("QVG: %d segments are saved in %s", made.done, self.place.path)


class QVGSaveVideoSession(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QVGSaveVideoSession", display_name="Save Video Session (QVG)", category="QuantVideoGen",
            description="Saves what is needed to continue a video (cache, latents, position) while it is made, so that a crash loses "
                        "little.",
            search_aliases=["qvg", "checkpoint", "resume", "autosave", "crash"],
            inputs=[
                io.Sampler.Input("sampler", tooltip="From AR Video Sampler (QVG); for Continue Video (LongCat, QVG), any sampler such as "
                                                    "euler from KSamplerSelect."),
                io.String.Input("name", default="my video",
                                tooltip=f"The file below output/{FOLDER}. Every save replaces it whole; what another video saved "
                                        "there gets a number. Default: my video."),
                io.Int.Input("every_chunks", default=4, min=1, max=10000,
                             tooltip="Chunks (for LongCat-Video, segments) between saves. The session is also saved at the end and on "
                                     "interrupt. Default: 4."),
            ],
            outputs=[io.Sampler.Output(display_name="sampler", tooltip="The same sampler, which now saves.")])

    @classmethod
    def execute(cls, sampler, name, every_chunks) -> io.NodeOutput:
        if TOKEN.search(name):
            raise ValueError(f"The session name {name!r} holds {TOKEN.search(name)[0]}, which would name another file when the session is "
                             "loaded. Use a plain name.")
        save = SaveTo(path_of(name), every_chunks)
        if isinstance(sampler, ARSampler) or is_autoregressive(sampler):
            return io.NodeOutput(own(sampler).changed(save=save))
        return io.NodeOutput(SavingSampler(sampler, save))


def own(sampler) -> ARSampler:
    """Raises ValueError for a sampler that is not of this pack."""
    if not isinstance(sampler, ARSampler):
        raise ValueError("This SAMPLER cannot be watched chunk by chunk. Connect AR Video Sampler (QVG). (Continue Video (LongCat, QVG) "
                         "has stream_to instead of Stream Video.)")
    return sampler


class QVGLoadVideoSession(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QVGLoadVideoSession", display_name="Load Video Session (QVG)", category="QuantVideoGen",
            description="Opens a saved video to continue it. Damaged files and files of another release are refused.",
            search_aliases=["qvg", "checkpoint", "resume", "continue video"],
            inputs=[io.String.Input("name", default="my video",
                                    tooltip=f"A file below output/{FOLDER}, as Save Video Session (QVG) named it. Default: my video.")],
            outputs=[
                SessionType.Output(display_name="session",
                                   tooltip="For AR Video Sampler (QVG), where the latent sets the length of the whole video, or for "
                                           "Continue Video (LongCat, QVG), where segments sets it."),
                io.Latent.Output(display_name="latent", tooltip="The latent frames made so far, for VAE Decode."),
                io.Int.Output(display_name="latent_frames", tooltip="Number of latent frames made so far."),
            ])

    @classmethod
    def fingerprint_inputs(cls, name):
        path = path_of(name, existing=True)
        return path.stat().st_mtime_ns if path.is_file() else ""

    @classmethod
    def execute(cls, name) -> io.NodeOutput:
        session = segments.load(path_of(name, existing=True))
        if isinstance(session, segments.SegmentSession):
            return io.NodeOutput(session, {"samples": session.latents}, session.latents.shape[2])
        if session.latents is None:
            raise ValueError(f"{session.path.name} was saved without its latents, by `qvg generate`; it goes on on the command line alone.")
        if session.shape[1] != CHANNELS:
            raise ValueError(f"{session.path.name} is of latents with {session.shape[1]} channels; the causal models that ComfyUI knows "
                             f"have {CHANNELS}. It goes on on the command line alone.")
        # every causal model that core knows has Wan 2.1's latents
        return io.NodeOutput(session, {"samples": Wan21().process_out(session.latents)}, session.frames_done)
