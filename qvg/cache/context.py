"""A context that is rebuilt for every segment: one pass stores the given frames, and every denoising step of the segment reads them.

Models such as LongCat-Video and HY-WorldPlay keep no history from chunk to chunk. They pass the frames that a segment continues through the
network once, and the segment's new frames attend to what that pass stored. Such a context is stored in one call and does not age: sinks and
windows have no meaning in it, since its first frame is not the video's. Its newest frames are those that the new ones join, so they hold
about one bit more than the others, if the settings let recent frames hold more; codebooks are trained on all of it.
"""

from __future__ import annotations

from dataclasses import replace

from ..registry import CODECS
from ..settings import PLAIN_BITS, QVGSettings
from ..units import GIB
from .ageing import Limits
from .forecast import Forecast, PlannedLayer
from .geometry import Geometry, workspace_bytes
from .limits import staging_bytes


def forecast_context(settings: QVGSettings, geometry: Geometry, given: int, new: int, itemsize: int = 2,
                     seen: int | None = None) -> Forecast:
    """The bytes of a context of `given` latent frames that passes over `new` latent frames read. Settings as `context_settings` gives
    them; itemsize: bytes of the model's dtype. seen: the most latent frames that a pass
    of the same cache sees, if more."""
    layer = PlannedLayer(settings, geometry, Limits(), itemsize)
    layer.append(0, given, settings.recent_frames)
    workspace = workspace_bytes(geometry, seen or given + new, itemsize, layer.longest)
    most = seen - new if seen else given
    staged = geometry.stages * (staging_bytes(settings, geometry, most, most, Limits(), itemsize) or 0)
    return Forecast(frames=given, held_frames=given, bf16_bytes=geometry.bf16_bytes(given), stored_bytes=geometry.layers * layer.nbytes(),
                    peak_bytes=geometry.layers * layer.device_bytes() + layer.largest + staged + workspace, workspace_bytes=workspace,
                    elements=geometry.bf16_bytes(given) // 2, host_bytes=geometry.layers * layer.host_bytes())


def context_settings(settings: QVGSettings, geometry: Geometry, given: int, new: int, itemsize: int = 2) -> QVGSettings:
    """The settings with which such a context is stored: the bits chosen for old frames, and recent_frames of about one bit more.

    Under a memory budget, the most bits up to those that fit. Raises ValueError where not even the fewest do.
    """
    whole = replace(settings, sink_frames=0, recent_frames=0, window_frames=0, budget_gib=0.0, host_gib=0.0)
    if not settings.budget_gib and not settings.host_gib:
        return _with_recent(whole, settings)
    limits = settings.budget_gib * GIB or float("inf"), settings.host_gib * GIB or float("inf")
    for width in CODECS[settings.codec].widths:
        fewer = replace(whole, **{name: replace(tensor, bits=min(tensor.bits, width))
                                  for name, tensor in (("key", whole.key), ("value", whole.value))})
        for kept in (_with_recent(fewer, settings), fewer):
            found = forecast_context(kept, geometry, given, new, itemsize)
            if found.peak_bytes <= limits[0] and found.host_bytes <= limits[1]:
                return kept
    if found.peak_bytes > limits[0]:
        raise ValueError(f"A memory budget of {settings.budget_gib:g} GiB is too small: {given} given latent frames and the workspace need "
                         f"{found.peak_bytes / GIB:.2f} GiB at the fewest bits. Raise the budget, or lower the resolution or the given "
                         "frames.")
    raise ValueError(f"A limit of {settings.host_gib:g} GiB for offloaded spans is too small: {given} given latent frames need "
                     f"{found.host_bytes / GIB:.2f} GiB at the fewest bits. Raise it, or lower the resolution or the given frames.")


def _with_recent(whole: QVGSettings, chosen: QVGSettings) -> QVGSettings:
    """`whole` with recent frames of about one bit more, if `chosen` has recent frames and its codec can hold that."""
    codec, least = CODECS[whole.codec], min(whole.key.bits, whole.value.bits)
    bits = min(chosen.recent_bits, min((width for width in codec.widths if width >= least + 1), default=least))
    if not codec.nested or bits in PLAIN_BITS or bits <= least:
        return whole
    return replace(whole, recent_frames=chosen.recent_frames, recent_bits=bits)
