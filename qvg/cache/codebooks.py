"""What the settings and the shape of a cache say of codebooks before any is trained: the limits within which `codebook_lifetime`
decides."""

from __future__ import annotations

from ..registry import CODECS
from ..settings import PLAIN_BITS, QVGSettings
from .ageing import first_bits
from .geometry import Geometry

# in which spans wait for the first codebook; see `codebook_lifetime`
WAITING_BITS = 8


def pool_frames(settings: QVGSettings, chunk_frames: int) -> int:
    """Most latent frames that a codebook is trained on."""
    if not CODECS[settings.codec].adaptive:
        return chunk_frames
    return chunk_frames + max(settings.sink_frames, settings.recent_frames + chunk_frames - 1)


def waiting_frames(settings: QVGSettings, geometry: Geometry, chunk_frames: int) -> int:
    """Most latent frames that wait as int8 for the first codebook: all but the last of the sink, or all that are recent."""
    if not may_wait(settings, geometry):
        return 0
    if settings.sink_frames and settings.sink_bits not in PLAIN_BITS:
        return settings.sink_frames - 1
    return settings.recent_frames and settings.recent_frames + chunk_frames - 1


def waiting_behind(settings: QVGSettings, sink: int) -> tuple[int, tuple[float, float]]:
    """Frames of a plain sink that are held before those that wait, and the bits of K and V in which they wait. sink: its latent frames."""
    plain = settings.sink_bits in PLAIN_BITS
    bits = first_bits(settings, sink=bool(sink) and not plain)
    return sink if plain else 0, (max(WAITING_BITS, bits[0]), max(WAITING_BITS, bits[1]))


def may_wait(settings: QVGSettings, geometry: Geometry) -> bool:
    """Whether a frame has too few tokens for a codebook, so that spans may wait as int8; see `codebook_lifetime`."""
    return too_few(settings, geometry.frame_tokens, geometry.head_dim)


def too_few(settings: QVGSettings, tokens: int, dim: int) -> bool:
    """Whether so many tokens of a head are too few for a codebook of K or of V."""
    codec = CODECS[settings.codec]
    return any(tensor.bits not in PLAIN_BITS and codec.waits(tensor, tokens, dim) for tensor in (settings.key, settings.value))


def keeps_spare_bits(settings: QVGSettings) -> bool:
    """Whether both K and V of a span hold more bits while it is recent than when it settles."""
    return bool(settings.recent_frames) and max(settings.key.bits, settings.value.bits) < settings.recent_bits


def shortest_life(settings: QVGSettings, chunk_frames: int) -> int:
    """Fewest latent frames between two codebooks of a layer, however poorly they fit; see `codebook_lifetime`."""
    if not CODECS[settings.codec].adaptive:
        # each serves whole chunks
        return -(-settings.codebook_frames // chunk_frames) * chunk_frames
    return min(settings.codebook_frames, chunk_frames + settings.recent_frames if keeps_spare_bits(settings) else chunk_frames)
