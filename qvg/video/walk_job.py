"""A walk to be made without ComfyUI, as one value that a session file can hold, and what it begins with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..files import first_line
from ..files.fields import integer, partial_record, real_number, text
from ..models import HY_WORLDPLAY_5B, HY_WORLDPLAY_8B
from ..models.wan import PATCH
from ..models.worldplay_hunyuan import PATCH as PATCH_8B
from ..models.worldplay_schedule import SAMPLING_5B, SAMPLING_8B, WorldSampling
from ..settings import QVGSettings
from .cameras import CameraPath
from .run import MAX_FRAMES, Run
from .session import SessionError
from .view_memory import WORLDPLAY_5B, WORLDPLAY_8B, ViewMemory
from .walk_session import WalkSession

# in a session of a walk: latents of its start image, in the scale of the VAE
START = "start"
MOST_PROMPTS = 10**9
KEPT = ("family", "frame_rate", "checkpoint", "cfg", "prompt")


@dataclass(frozen=True)
class WalkKind:
    """What differs between the two models. patch: latent pixels of a token, (frames, down, across). frame_rate: of its video."""

    views: ViewMemory
    sampling: WorldSampling
    frame_rate: int
    patch: tuple[int, int, int]
    vae: str


KINDS = {
    HY_WORLDPLAY_5B.name: WalkKind(WORLDPLAY_5B, SAMPLING_5B, 16, PATCH, "Wan 2.2"),
    HY_WORLDPLAY_8B.name: WalkKind(WORLDPLAY_8B, SAMPLING_8B, 24, PATCH_8B, "HunyuanVideo 1.5")}
# what `WalkJob.values` writes, and how many frames the file has
EXTRA = partial_record(
    family=text(), frame_rate=integer(1, 1000), checkpoint=integer(1, MAX_FRAMES), cfg=real_number(-1000, 1000),
    prompt=integer(1, MOST_PROMPTS), settings=text(), video_frames=integer(0, 4 * MAX_FRAMES))


@dataclass(frozen=True)
class WalkText:
    """A prompt as its encoders give it: tokens [1, L, C], and for the 8B byT5's tokens of quoted words [1, M, C]. Masks [1, L] and [1, M]
    are 0 where there is padding."""

    tokens: Tensor
    mask: Tensor | None = None
    glyphs: Tensor | None = None
    glyph_mask: Tensor | None = None


@dataclass(frozen=True)
class WalkInputs:
    """What a walk begins with. start: latents of the start image [1, C, 1, h, w] in the scale of the VAE. negative: for guidance. vision:
    SigLIP's tokens of the start image [1, N, C], for the 8B."""

    start: Tensor
    texts: tuple[WalkText, ...]
    negative: WalkText | None = None
    vision: Tensor | None = None


@dataclass(frozen=True)
class WalkJob:
    """What `generate` makes with HY-WorldPlay; see `Job` for what is not said here.

    family: its name in `models.FAMILIES`. path: a camera for every latent frame of the run. memory: see `world`. prompt: which of
    `WalkInputs.texts`, from 1. Raises ValueError for a value that a session could not hold, and for a path of another length.
    """

    out: Path
    session: Path
    family: str
    path: CameraPath
    run: Run
    settings: QVGSettings
    latent: tuple[int, int]
    memory: str
    frame_rate: int
    checkpoint: int = 4
    cfg: float = 1.0
    prompt: int = 1
    device: str = "cpu"
    overwrite: bool = False

    # it keeps latents, of which a context is rebuilt
    saves_latents = True

    def __post_init__(self):
        for name in ("checkpoint", "frame_rate", "prompt"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a whole number, at least 1.")
        if not math.isfinite(self.cfg):
            raise ValueError(f"cfg is {self.cfg}; give a number such as 1 or 5.")
        if len(self.path) != self.run.frames:
            raise ValueError(f"The camera path has {len(self.path)} latent frames and the run {self.run.frames}; give one camera for each.")
        if any(size < 1 or size % patch for size, patch in zip(self.latent, self.kind.patch[1:])):
            raise ValueError(f"Start latents of {self.latent[0]} x {self.latent[1]} (height x width) do not divide into tokens; make both "
                             f"multiples of {self.kind.patch[1]}.")

    @property
    def kind(self) -> WalkKind:
        return KINDS[self.family]

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens (height, width) of a latent frame."""
        return self.latent[0] // self.kind.patch[1], self.latent[1] // self.kind.patch[2]

    @property
    def saves_caches(self) -> bool:
        return self.memory != "rebuild"

    def values(self) -> dict:
        """What a session must remember besides run, cameras and memory."""
        return {name: getattr(self, name) for name in KEPT} | {"settings": self.settings.to_json()}


def resumed_walk(session: WalkSession, out: Path, device: str = "cpu") -> WalkJob:
    """The job that saved a session of a walk. Raises SessionError for a session that `generate` did not save."""
    try:
        values = EXTRA(session.extra, "extra")
        settings = QVGSettings.from_json(values["settings"])
        if values["family"] not in KINDS:
            raise ValueError(f"its family is {values['family'][:40]!r}")
    except ValueError as error:
        raise SessionError(f"{session.path.name} was not saved by `qvg generate` ({first_line(error)}). Open it in ComfyUI, or use an "
                           "earlier checkpoint.") from None
    kept = {name: values[name] for name in KEPT}
    return WalkJob(out=out, session=session.path, path=session.cameras[:session.run.frames], run=session.run, settings=settings,
                   latent=tuple(session.shape[2:]), memory=session.memory, device=device, **kept)
