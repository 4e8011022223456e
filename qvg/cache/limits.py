"""What a memory budget leaves to a layer, and how many frames that is."""

from __future__ import annotations

from bisect import bisect_left

from ..registry import CODECS
from ..settings import PLAIN_BITS, QVGSettings
from ..units import GIB
from .ageing import Limits, first_bits
from .codebooks import pool_frames, shortest_life, waiting_behind, waiting_frames
from .geometry import ALIGN, Geometry, at_a_time, division, workspace_bytes
from .sizes import codebook_bytes, entry_bytes

# latent frames of a video whose length is not known
ENDLESS = 1_000_000


def limits(settings: QVGSettings, geometry: Geometry, chunk_frames: int, total_frames: int | None, itemsize: int = 2,
           read_frames: int | None = None) -> Limits:
    """Share a budget between the workspace and the layers. itemsize: bytes of the model's dtype. read_frames: most latent frames that a
    pass sees, if not all that are held.

    Raises ValueError where the budget cannot hold the sink, one older chunk and the chunk being made.
    """
    if not settings.budget_gib and not settings.host_gib:
        return Limits()
    share = _Share(settings, geometry, chunk_frames, total_frames, itemsize, read_frames)
    share.check()
    most = (total_frames or ENDLESS) - share.sink
    # the most frames that fit; fewer always do
    lengths = range(chunk_frames + 1, max(chunk_frames, most) + 1)
    cap = chunk_frames + bisect_left(lengths, True, key=lambda frames: not share.fits(frames))
    return Limits(share.layer_bytes(cap), cap)


class _Share:
    """What a run with `frames` latent frames besides the sink would take, in bytes; every method counts at the fewest bits."""

    def __init__(self, settings: QVGSettings, geometry: Geometry, chunk_frames: int, total_frames: int | None, itemsize: int,
                 read_frames: int | None = None):
        self.read = read_frames
        self.settings, self.geometry, self.chunk, self.total, self.itemsize = settings, geometry, chunk_frames, total_frames, itemsize
        self.codec, tensors = CODECS[settings.codec], (settings.key, settings.value)
        self.budget, self.host = (int(gib * GIB) if gib else None for gib in (settings.budget_gib, settings.host_gib))
        self.sink = min(settings.sink_frames, total_frames or settings.sink_frames)
        self.copies = geometry.stages if settings.offload else geometry.layers
        # of offloaded spans that come in pieces, the most that a piece can take
        self.piece = (staging_bytes(settings, geometry, chunk_frames, ENDLESS, Limits(), itemsize)
                      if settings.offload and geometry.by_piece else None)
        self.least = tuple(min(self.codec.widths) if self.codec.nested and tensor.bits not in PLAIN_BITS else tensor.bits
                           for tensor in tensors)
        # the newest is encoded before it can lose bits
        self.newest = self._entry(chunk_frames, first_bits(settings, sink=False))
        self.encoding = max(self.newest, self.sink and self._entry(min(self.sink, chunk_frames), first_bits(settings, sink=True)))
        behind, waiting_bits = waiting_behind(settings, self.sink)
        self.waiting = (self._entry(waiting_frames(settings, geometry, chunk_frames), waiting_bits) + self.newest
                        + (behind and self._entry(behind, first_bits(settings, sink=True))))
        # the largest that a codebook can be: trained on a chunk and all that is recent
        self.codebook = sum(codebook_bytes(geometry, settings.codec, tensor, pool_frames(settings, chunk_frames) * geometry.frame_tokens)
                            for tensor in tensors if tensor.bits not in PLAIN_BITS)

    def _entry(self, frames: int, bits: tuple[float, float]) -> int:
        return entry_bytes(self.geometry, self.settings, frames, bits, self.itemsize)

    def _spans(self, frames: int) -> int:
        """Spans of a layer."""
        at_sink_bits = (self.settings.sink_bits, self.settings.sink_bits)
        older = (-(-frames // self.chunk) - 1) * self._entry(self.chunk, self.least)
        return max(bool(self.sink) * self._entry(self.sink, at_sink_bits) + older + self.newest, self.waiting)

    def _codebooks(self, frames: int) -> int:
        """Codebooks of a layer. On the device they share a limit with the spans, which lose bits to make space. Offloaded spans have a
        limit of their own, so space is reserved for the most codebooks there can be, with the sink's and one that was just trained."""
        if self.settings.offload:
            others = 0 if self.codec.adaptive else self.sink
            return self.codebook * (2 + -(-(others + frames + self.chunk) // shortest_life(self.settings, self.chunk)))
        # each serves whole chunks
        return self.codebook * (1 + -(-frames // (-(-self.settings.codebook_frames // self.chunk) * self.chunk)))

    def _apart(self, frames: int) -> int:
        """Bytes on the device that are not the spans'."""
        seen = self.read or self.sink + frames + 2 * self.chunk - 1
        workspace = workspace_bytes(self.geometry, seen if self.total is None else min(seen, self.total), self.itemsize, self.chunk)
        return workspace + (self.geometry.layers * self._codebooks(frames) + self.encoding if self.settings.offload else 0)

    def needed(self, frames: int) -> int:
        """On the device."""
        if self.read and self.settings.offload:
            # the device has only what is read, at the bits that it has: that the host holds fewer frames would free nothing
            return self._apart(frames) + self.copies * staging_bytes(
                self.settings, self.geometry, self.chunk, min(self.read - self.chunk, self.sink + frames), Limits(), self.itemsize)
        spans = self._spans(frames) if self.piece is None else min(self._spans(frames), self.piece)
        return self._apart(frames) + self.copies * (spans + (0 if self.settings.offload else self._codebooks(frames)))

    def fits(self, frames: int) -> bool:
        on_device = self.budget is None or self.needed(frames) <= self.budget
        return on_device and (self.host is None or self.geometry.layers * self._spans(frames) <= self.host)

    def check(self) -> None:
        """Raises ValueError unless one chunk fits."""
        if self.budget is not None and self.needed(self.chunk) > self.budget:
            raise ValueError(
                f"A memory budget of {self.settings.budget_gib:g} GiB is too small: the first frames, one chunk and the workspace need "
                f"{self.needed(self.chunk) / GIB:.3g} GiB{'' if self.read and self.settings.offload else ' at the fewest bits'}. Raise the "
                "budget, or lower the resolution or the sink frames.")
        if not self.fits(self.chunk):
            raise ValueError(
                f"A limit of {self.settings.host_gib:g} GiB for offloaded spans is too small: the first frames and one chunk need "
                f"{self.geometry.layers * self._spans(self.chunk) / GIB:.3g} GiB at the fewest bits. Raise it, or lower the resolution or "
                "the sink frames.")

    def layer_bytes(self, frames: int) -> int | None:
        """The share of one layer when `frames` frames are to be held; None where nothing limits it."""
        on_device = self.budget is not None and not (self.read and self.settings.offload)
        shares = [(self.budget - self._apart(frames)) // self.copies] if on_device else []
        if self.piece is not None and shares and self.piece <= shares[0]:
            # whatever a layer holds, no more of it is on the device
            shares = []
        shares += [] if self.host is None else [self.host // self.geometry.layers]
        least = min(shares, default=None)
        return least // ALIGN * ALIGN if self.settings.offload and least is not None else least


def capacity_frames(settings: QVGSettings, chunk_frames: int, total_frames: int | None, cap_frames: int | None) -> int | None:
    """Most latent frames that a pass can see, its own included; None where nothing limits them."""
    most = [total_frames] if total_frames else []
    for window in (settings.window_frames, cap_frames):
        if window:
            # a span is evicted with its last frame, so the oldest may overhang the window by a chunk less one
            most.append(settings.sink_frames + window + 2 * chunk_frames - 1)
    return min(most, default=None)


def history_frames(settings: QVGSettings, chunk_frames: int, total_frames: int | None, cap_frames: int | None) -> int | None:
    """Most latent frames that a pass can find stored; None where nothing limits them."""
    capacity = capacity_frames(settings, chunk_frames, total_frames, cap_frames)
    if capacity is None:
        return None
    if capacity == total_frames:
        return total_frames - ((total_frames - 1) % chunk_frames + 1)
    return capacity - chunk_frames


def staging_bytes(settings: QVGSettings, geometry: Geometry, chunk_frames: int, history: int | None, share: Limits,
                  itemsize: int = 2, longest: int = 0) -> int | None:
    """The most bytes that the spans of a layer take while `history` frames of it are stored, or those of a piece: a staging buffer. None:
    not offloaded, or no limit is known. longest: of pieces, frames of the longest span, if more than a chunk."""
    if not settings.offload or history is None:
        return None
    if geometry.by_piece:
        chunk_frames = max(chunk_frames, longest)
    sink = min(history, settings.sink_frames)
    recent = min(history - sink, settings.recent_frames + chunk_frames - 1)
    # frame by frame, which takes no less than any longer spans do
    kinds = ((sink, first_bits(settings, sink=True)), (recent, first_bits(settings, sink=False)),
             (history - sink - recent, (settings.key.bits, settings.value.bits)))
    behind, waiting_bits = waiting_behind(settings, sink)
    waiting = min(history - behind, waiting_frames(settings, geometry, chunk_frames))
    piece = history
    if geometry.by_piece:
        piece = min(history, at_a_time(geometry.heads, division(geometry, itemsize), chunk_frames).frames)

    def largest(*kinds: tuple[int, tuple[float, float]]) -> int:
        """Of the frames that take most, as many as are read at once. kinds: frames, and their bits."""
        left, total = piece, 0
        for size, frames in sorted(((entry_bytes(geometry, settings, 1, bits, itemsize), frames) for frames, bits in kinds), reverse=True):
            taken = min(left, frames)
            left, total = left - taken, total + taken * size
        return total

    most = max(largest(*kinds), largest((behind, first_bits(settings, sink=True)), (waiting, waiting_bits)))
    return most if share.layer_bytes is None else min(most, share.layer_bytes)


