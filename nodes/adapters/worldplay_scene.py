"""A condition of core's guider as a scene of a walk, and what core needs to know of a walk's memory.

Every pass goes through core's `apply_model`, so that patched, offloaded and streamed weights work as in any run. Core knows one noise level
for the whole video; the levels of single frames, actions and cameras are in a `Pass`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import comfy.model_management
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...qvg.attention.world import WorldAttention
from ...qvg.cache.forecast import Forecast
from ...qvg.cache.geometry import Geometry, on_device
from ...qvg.demo.world_scenes import WORLD_HEIGHT, WORLD_WIDTH
from ...qvg.models import HY_WORLDPLAY_5B, HY_WORLDPLAY_8B, Family
from ...qvg.models.worldplay_schedule import WorldSampling
from ...qvg.models.worldplay_wan import WAN21_CHANNELS
from ...qvg.settings import QVGSettings
from ...qvg.units import format_bytes
from ...qvg.video.network import TIMESTEPS
from ...qvg.video.view_memory import ViewMemory
from ...qvg.video.walk_job import KINDS
from ...qvg.video.world import CHUNK
from ...qvg.video.world_forecast import forecast_walk
from ..memory_check import fitting_presets
from .attention import reading
from .compiled import original
from .families import family_of
from .patches import WALK, check_patches
from .worldplay import PASS, Pass, Prompt

KEY = "quantvideogen"


@dataclass(frozen=True)
class Variant:
    """What differs between the two models. size: pixels (width, height) that it was made for; patch: latent pixels of a token, across and
    down. starts_with_image: latent frame 0 is the start image; otherwise the image is a condition of it. stride: pixels of a latent pixel.
    """

    family: Family
    size: tuple[int, int]
    patch: int
    starts_with_image: bool
    frame_rate: int
    views: ViewMemory
    sampling: WorldSampling
    vae: str
    stride: int = 16

    @property
    def multiple(self) -> int:
        """What width and height must be a multiple of."""
        return self.stride * self.patch


def _variant(family: Family, size: tuple[int, int], starts_with_image: bool) -> Variant:
    kind = KINDS[family.name]
    return Variant(family, size, kind.patch[1], starts_with_image, kind.frame_rate, kind.views, kind.sampling, kind.vae)


VARIANTS = {variant.family.name: variant for variant in (
    _variant(HY_WORLDPLAY_5B, (1280, 704), True), _variant(HY_WORLDPLAY_8B, (832, 480), False))}
# of the 5B's layout with the latents of Wan 2.1
WITH_WAN21 = replace(VARIANTS[HY_WORLDPLAY_5B.name], size=(WORLD_WIDTH, WORLD_HEIGHT), vae="Wan 2.1", stride=8)


def variant_of(model) -> Variant:
    """Of a MODEL that `worldplay.check` accepts."""
    network = model.get_model_object("diffusion_model")
    if original(network).sizes.channels == WAN21_CHANNELS:
        return WITH_WAN21
    return VARIANTS[family_of(network).name]


class ComfyScene:
    """A `qvg.video.world.Scene`. base: core's BaseModel. cond: an entry of a guider's conds during a run. options: transformer_options.

    start: latents of the start image in the network's scale, which latent frame 0 is, or which are a condition of it.
    """

    def __init__(self, base, cond: dict, actions: Tensor, options: dict, start: Tensor | None, starts_with_image: bool):
        self.base, self.actions, self.options = base, actions, options
        self.conditions = {name: entry.cond for name, entry in cond["model_conds"].items()}
        self.given, self.image = (start, None) if starts_with_image else (None, start)
        self.prompt = Prompt()

    def flow(self, x: Tensor, timestep: Tensor, frames: Sequence[int], attend: WorldAttention) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        # a given frame is the first of a chunk
        sigma = timestep[:, -1] / TIMESTEPS
        denoised = self._apply(x, sigma, timestep, frames, attend)
        return (x.float() - denoised) / sigma.view(-1, 1, 1, 1, 1)

    def encode(self, x: Tensor, timestep: Tensor, frames: Sequence[int], attend: WorldAttention) -> None:
        self._apply(x, timestep[:, -1] / TIMESTEPS, timestep, frames, attend, finished=True)

    def _apply(self, x: Tensor, sigma: Tensor, timestep: Tensor, frames: Sequence[int], attend: WorldAttention, finished: bool = False):
        action = self.actions[list(frames)].to(x.device).expand(x.shape[0], -1)
        walk = Pass(frames, timestep, action, attend, self.prompt, finished, self.image)
        return self.base.apply_model(x, sigma, transformer_options={**self.options, PASS: walk}, **self.conditions)


def text_tokens(prompt: list) -> int:
    """Tokens of a CONDITIONING: text, and for the 8B quoted words and an image."""
    text, fields = prompt[0]
    seen, glyphs = fields.get("clip_vision_output"), fields.get("conditioning_byt5small")
    return sum(part.shape[1] for part in (text, glyphs, None if seen is None else seen.last_hidden_state) if part is not None)


class WalkMemory:
    """What a walk's caches need, and wrappers that make core reserve it.

    shape: [B, C, F, H, W] of the latents. prompts: CONDITIONINGs that are weighed against each other, each with a cache of its own.
    """

    def __init__(self, model, settings: QVGSettings, memory: str, shape: Sequence[int], prompts: Sequence[list]):
        self.variant, self.settings, self.memory, self.shape, self.shares = variant_of(model), settings, memory, shape, 1
        self.prompts = [text_tokens(prompt) for prompt in prompts]
        self.sizes = original(model.get_model_object("diffusion_model")).sizes
        self.reading = reading(settings, model.model_options, self.sizes.head_dim)
        self.itemsize = comfy.model_management.dtype_size(model.model.get_dtype_inference())

    @property
    def text_bytes(self) -> int:
        """Keys and values of the text in every layer, which a run computes once."""
        return 2 * self.sizes.layers * self.sizes.heads * self.sizes.head_dim * self.itemsize * sum(self.prompts)

    def divide(self, shares: int) -> None:
        """Count what one of several ranks needs, which keeps a share of the heads and attends by itself."""
        self.shares, self.reading = shares, self.reading | {"workspace_limit": None}

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens (height, width) of a latent frame."""
        return self.shape[3] // self.variant.patch, self.shape[4] // self.variant.patch

    @property
    def geometry(self) -> Geometry:
        geometry = Geometry(self.sizes.layers, max(1, self.sizes.heads // self.shares), self.sizes.head_dim, self.grid, self.shape[0],
                            packs=self.reading["packs"])
        return on_device(geometry, comfy.model_management.get_torch_device().type, self.reading["workspace_limit"])

    def forecast(self, settings: QVGSettings | None = None) -> Forecast:
        """Of all caches. Raises ValueError where a budget is too small."""
        # the 8B attends to text and frames together
        text = 0 if self.variant.starts_with_image else max(self.prompts)
        return forecast_walk(settings or self.settings, self.geometry, memory=self.memory, views=self.variant.views, frames=self.shape[2],
                             itemsize=self.itemsize, conditions=len(self.prompts), text_tokens=text)

    def check(self, room: int, of: str = "the device has {} in all") -> Forecast:
        """The forecast. of: says what `room` bytes are. Raises ValueError for caches that are larger, naming the presets that would fit."""
        found = self.forecast()
        if found.peak_bytes <= room:
            return found
        ways = fitting_presets(lambda preset: self.forecast(preset).peak_bytes, room)
        ways += "the memory rebuild, " if self.memory != "rebuild" else ""
        raise ValueError(f"The KV cache of a walk of {self.shape[2]} latent frames needs {format_bytes(found.peak_bytes)}, but "
                         f"{of.format(format_bytes(room))}. Choose {ways}a shorter camera path, or a smaller video.")

    def install(self, patched) -> None:
        for kind, wrapper in ((WrappersMP.OUTER_SAMPLE, self._outer_sample), (WrappersMP.PREPARE_SAMPLING, self._prepare_sampling)):
            patched.remove_wrappers_with_key(kind, KEY)
            patched.add_wrapper_with_key(kind, KEY, wrapper)

    @staticmethod
    def _outer_sample(executor, *args, **kwargs):
        check_patches(executor.class_obj, WALK)
        return executor(*args, **kwargs)

    def _prepare_sampling(self, executor, model, noise_shape, conds, *args, **kwargs):
        """As an equivalent number of frames, because core accepts nothing else: of the largest pass, of the caches and of the text."""
        frame = model.model.memory_required([noise_shape[0], noise_shape[1], 1, *noise_shape[3:]])
        shape = list(noise_shape)
        shape[2] = self.variant.views.window if self.memory == "rebuild" else CHUNK
        shape[2] += -(-(self.forecast().peak_bytes + self.text_bytes) // max(1, int(frame)))
        return executor(model, shape, conds, *args, **kwargs)
