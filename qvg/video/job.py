"""A video to be made without ComfyUI, as one value that a session file can hold."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

from ..files import first_line
from ..files.fields import integer, partial_record, real_number, text
from ..models.wan import PATCH
from ..settings import QVGSettings
from .run import MAX_CHUNK, MAX_FRAMES, Run
from .schedule import Schedule
from .segments import SegmentSession
from .session import Session, SessionError
from .session_parts import RUN

KEPT = ("frame_rate", "checkpoint", "cfg", "negative", "position_limit", "given")
# what `Job.values` writes, and how many frames the video file has
EXTRA = partial_record(
    frame_rate=integer(1, 1000), checkpoint=integer(1, MAX_FRAMES), cfg=real_number(-1000, 1000), negative=text(), schedule=text(1_000_000),
    position_limit=integer(0, MAX_FRAMES), settings=text(), video_frames=integer(0, 4 * MAX_FRAMES), given=integer(0, MAX_CHUNK))


@dataclass(frozen=True)
class Job:
    """What `generate` makes.

    out, session: files of the video and of its checkpoints, one every `checkpoint` chunks. latent: (height, width) of its latents.
    frame_rate: frames per second. negative: the prompt that cfg guides away from. position_limit: see `CachedAttention`.
    given: latent frames that a chunk continues, of a model that makes segments (`segment_model`); 0 for one that keeps its history.
    overwrite: replace other files at `out` and `session`.
    Raises ValueError for a value that a session could not hold.
    """

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
    given: int = 0
    device: str = "cpu"
    overwrite: bool = False

    def __post_init__(self):
        for name, low in (("checkpoint", 1), ("frame_rate", 1), ("position_limit", 0), ("given", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < low:
                raise ValueError(f"{name} is {value!r}; it must be a whole number, at least {low}.")
        if not math.isfinite(self.cfg):
            raise ValueError(f"cfg is {self.cfg}; give a number such as 1 or 4.5.")
        if any(size < 1 or size % patch for size, patch in zip(self.latent, PATCH[1:])):
            raise ValueError(f"A latent frame of {self.latent[0]} x {self.latent[1]} (height x width) does not divide into tokens; make "
                             f"both even, so that width and height are multiples of {8 * PATCH[1]} pixels.")

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens (height, width) of a latent frame."""
        return self.latent[0] // PATCH[1], self.latent[1] // PATCH[2]

    @property
    def saves_latents(self) -> bool:
        """Whether a session holds the video's latents."""
        return self.given > 0

    @property
    def saves_caches(self) -> bool:
        """Whether a session holds keys and values."""
        return not self.given

    def values(self) -> dict:
        """What a session must remember besides run and settings; one of segments remembers these, too."""
        kept = {name: getattr(self, name) for name in KEPT}
        run = {"run": asdict(self.run)} if self.given else {}
        return kept | run | {"schedule": str(self.schedule), "settings": self.settings.to_json()}


def resumed(session: Session | SegmentSession, out: Path, device: str = "cpu") -> Job:
    """The job that saved a session. Raises SessionError for a session that `generate` did not save."""
    segments = isinstance(session, SegmentSession)
    try:
        # older sessions are of models that keep their history
        values = EXTRA({"given": 0} | session.extra, "extra")
        settings, schedule = QVGSettings.from_json(values["settings"]), Schedule.parse(values["schedule"])
        run = Run(**RUN(session.extra.get("run"), "extra.run")) if segments else session.run
        if segments != bool(values["given"]):
            raise ValueError("its given frames are not those of its kind")
    except ValueError as error:
        raise SessionError(f"{session.path.name} was not saved by `qvg generate` ({first_line(error)}). Open it in ComfyUI, or use an "
                           "earlier checkpoint.") from None
    kept = {name: values[name] for name in KEPT}
    return Job(out=out, session=session.path, schedule=schedule, run=run, settings=settings, latent=tuple(session.shape[2:]),
               device=device, **kept)
