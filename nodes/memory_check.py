"""Refuses a run whose KV cache cannot fit, before its first step, and lists the settings that would fit."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace

from ..qvg.cache.forecast import Forecast, forecast
from ..qvg.cache.geometry import Geometry, on_device
from ..qvg.settings import PRESETS, QVGSettings
from ..qvg.units import GIB, format_bytes
from ..qvg.video import Run
from ..qvg.video.prepare import MARGIN


@dataclass(frozen=True)
class Memory:
    """Bytes that one cache may take. device: where it lives; host: for offloaded spans."""

    device: int
    host: int


def fitting_presets(peak_of: Callable[[QVGSettings], int], room: int) -> str:
    """The presets whose peak is at most `room` bytes, as the beginning of a list of choices; empty where there is none."""
    names = [name.capitalize() for name, preset in PRESETS.items() if peak_of(preset) <= room]
    return f"the preset {' or '.join(names)} of Quantize KV Cache (QVG), " if names else ""


def check_memory(settings: QVGSettings, shape: dict, run: Run, device, free: Memory) -> None:
    """Raises ValueError where a cache needs more than `free`, naming the choices that need less.

    shape: see `adapters.causal.cache_shape`, and `workspace_limit` and `packs` of `KVCache`.
    """
    plan = _Plan(settings, shape, run, device, free)
    if plan.fits(settings):
        return
    needed = plan.forecast(settings)
    place = "" if needed.peak_bytes > free.device else " of host memory"
    bytes_needed, bytes_free = (needed.host_bytes, free.host) if place else (needed.peak_bytes, free.device)
    ways = plan.ways()
    raise ValueError(f"The KV cache of {run.frames} latent frames needs {format_bytes(bytes_needed)}{place}, but it can have "
                     f"{format_bytes(bytes_free)}. {'Any of these fits: ' + '; '.join(ways) if ways else 'Choose a smaller picture'}.")


class _Plan:
    """Forecasts of one run under other settings or of another length."""

    def __init__(self, settings: QVGSettings, shape: dict, run: Run, device, free: Memory):
        shape = dict(shape)
        limit = shape.pop("workspace_limit", None)
        self.itemsize, self.geometry = shape.pop("dtype").itemsize, on_device(Geometry(**shape), device.type, limit)
        self.settings, self.run, self.free = settings, run, free

    def forecast(self, settings: QVGSettings, frames: int = 0) -> Forecast:
        """frames: length of the video, the run's own by default."""
        return forecast(settings, self.geometry, frames or self.run.frames, self.run.chunk_frames, itemsize=self.itemsize)

    def fits(self, settings: QVGSettings, frames: int = 0) -> bool:
        try:
            found = self.forecast(settings, frames)
        except ValueError:
            return False
        return found.peak_bytes <= self.free.device and found.host_bytes <= self.free.host

    def _most_frames(self, fits) -> int:
        """The largest multiple of the chunk length, up to the run's, for which `fits` holds."""
        chunk = self.run.chunk_frames
        chunks = range(1, self.run.frames // chunk + 1)
        return chunk * bisect_left(chunks, True, key=lambda count: not fits(count * chunk))

    def ways(self) -> list[str]:
        """What the user can change so that the cache fits."""
        settings, free, found = self.settings, self.free, []
        if names := [name.capitalize() for name in PRESETS if self.fits(replace(PRESETS[name], offload=settings.offload))]:
            found.append(f"the preset {' or '.join(names)} in QVG Settings")
        if not settings.offload and self.fits(replace(settings, offload=True)):
            found.append("offload in QVG Settings")
        if window := self._most_frames(lambda frames: self.fits(replace(settings, window_frames=frames))):
            found.append(f"window_frames of at most {window} in QVG Settings")
        budget, host = (part * (1 - MARGIN) / GIB for part in (free.device, free.host if settings.offload else 0))
        if self.fits(replace(settings, budget_gib=budget, host_gib=host)):
            found.append("auto_budget in AR Video Sampler (QVG)")
        if frames := self._most_frames(lambda frames: self.fits(settings, frames)):
            found.append(f"a video of at most {frames} latent frames")
        return found
