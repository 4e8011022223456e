"""What a walk will need before its first step, in bytes, for each of the three memories (see `world`)."""

from __future__ import annotations

from dataclasses import replace

from ..cache.forecast import Forecast
from ..cache.geometry import Geometry, division, workspace_bytes
from ..cache.walks import forecast_caches
from ..settings import QVGSettings
from .view_memory import ViewMemory
from .world import CHUNK


def forecast_walk(settings: QVGSettings, geometry: Geometry, *, memory: str, views: ViewMemory, frames: int, itemsize: int = 2,
                  chunk_frames: int = CHUNK, conditions: int = 1, text_tokens: int = 0, misfit: bool = False) -> Forecast:
    """The bytes of the caches that `walk_cache` makes for a walk of `frames` latent frames, one for each of `conditions`; see
    `cache.walks.forecast_caches`.

    geometry: of `on_device`. text_tokens: of a prompt that stands before the frames in self-attention.
    """
    found = forecast_caches(settings, geometry, memory=memory, window=views.window, frames=frames, chunk_frames=chunk_frames,
                            itemsize=itemsize, misfit=misfit)
    geometry = replace(geometry, branches=2)
    text = workspace_bytes(replace(geometry, grid=(1, text_tokens), limit=0), 1, itemsize)
    if (piece := division(geometry, itemsize).frames) is not None:
        # what does not fit is attended to in pieces, and then the text lies where it is
        text = min(text, max(0, workspace_bytes(geometry, piece, itemsize) - found.workspace_bytes))
    found = replace(found, workspace_bytes=found.workspace_bytes + text, peak_bytes=found.peak_bytes + text)
    return replace(found, **{name: conditions * getattr(found, name) for name in (
        "bf16_bytes", "stored_bytes", "peak_bytes", "workspace_bytes", "elements", "host_bytes")})
