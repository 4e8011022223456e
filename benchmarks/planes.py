"""The QVG codec at three sizes, for comparison with the presets: codebooks and 4, 2 or 1 bit planes."""

from __future__ import annotations

from ..qvg.settings import QVGSettings, TensorSettings

_FOUR = TensorSettings(bits=4, stages=2, group=64)
_TWO, _ONE = (TensorSettings(bits=bits, stages=2, centroids=128, group=128) for bits in (2, 1))
PLANES = {
    "quality": QVGSettings(name="4 planes", key=_FOUR, value=_FOUR, sink_bits=16),
    "balanced": QVGSettings(name="2 planes", key=_TWO, value=_TWO),
    "smallest": QVGSettings(name="1 plane", key=_ONE, value=_ONE, codebook_frames=48),
}
