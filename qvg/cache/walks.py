"""The caches of a walk through a world model, whose chunks read at most `window` latent frames of what was before: how each of the three
memories of `video.world` makes them, and what they will need.

- **rebuild**: a context of up to `window` frames that is stored anew for every chunk.
- **append**: every finished chunk is stored once, and all that is held is read.
- **bank**: the same, but a chunk reads `window` frames of what is held.

Both branches of attention read one copy of keys and values. The original keeps one for each in bf16, so it takes twice `bf16_bytes`.
"""

from __future__ import annotations

from dataclasses import replace

from ..settings import QVGSettings
from .context import context_settings, forecast_context
from .forecast import Forecast, forecast
from .geometry import Geometry

MEMORIES = ("rebuild", "append", "bank")


def check_memory(memory: str) -> None:
    """Raises ValueError for an unknown name."""
    if memory not in MEMORIES:
        raise ValueError(f"The memory is {memory!r}; choose one of {', '.join(MEMORIES)}.")


def read_limit(memory: str, window: int, frames: int, chunk_frames: int) -> int | None:
    """`read_frames` of `KVCache` and `forecast` for a cache that grows with a walk of `frames` latent frames."""
    return min(window + chunk_frames, max(frames, chunk_frames + 1)) if memory == "bank" else None


def forecast_caches(settings: QVGSettings, geometry: Geometry, *, memory: str, window: int, frames: int, chunk_frames: int,
                    itemsize: int = 2, misfit: bool = False) -> Forecast:
    """The bytes of one cache in a walk of `frames` latent frames.

    geometry: of `on_device`. itemsize: bytes of the model's dtype. misfit: in the worst case, see `forecast`. Tokens of the text, which the
    workspace holds beside the frames, come on top.
    Raises ValueError for an unknown memory, and where a budget is too small or the settings do not fit the heads.
    """
    check_memory(memory)
    geometry = replace(geometry, branches=2)
    if memory != "rebuild":
        return forecast(settings, geometry, frames, chunk_frames, itemsize=itemsize, misfit=misfit,
                        read_frames=read_limit(memory, window, frames, chunk_frames))
    kept = context_settings(settings, geometry, window, chunk_frames, itemsize)
    given = max(chunk_frames, min(window, frames - chunk_frames))
    kept = replace(kept, recent_frames=min(kept.recent_frames, given - 1))
    # memory is allocated for the longest context, however short the walk
    return forecast_context(kept, geometry, given, chunk_frames, itemsize, window + chunk_frames)
