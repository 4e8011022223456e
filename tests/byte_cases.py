"""Geometries and settings small enough that their bytes can be worked out by hand."""

from comfyui_qvg.qvg.cache.geometry import Geometry
from comfyui_qvg.qvg.settings import QVGSettings, TensorSettings

# three frames: 105 tokens of 4 rows of 64 channels, 26,880 numbers
ODD = Geometry(layers=2, heads=4, head_dim=64, grid=(5, 7))
# a frame: 256 tokens of a row of 8 channels, 2,048 numbers
EVEN = Geometry(layers=1, heads=1, head_dim=8, grid=(16, 16))
BARE = QVGSettings(key=TensorSettings(stages=0), value=TensorSettings(stages=0), sink_frames=0, recent_frames=0)
# 5,120 bytes a frame of `EVEN`: 2,048 of K and of V, and 256 scales of two bytes for each
EIGHT = BARE.both(bits=8)
