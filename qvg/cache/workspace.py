"""The buffers that keys and values are decoded to: one for a group of heads, two where the device has streams, and twice as many where the
model has two branches of attention; and what attention in eight bits packs them to. Their size has a limit, within which a long history is
decoded a piece at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from .geometry import Division, Geometry, at_a_time, division, fewer_heads, packed_bytes


class Workspace:
    """Decoded K and V of a group of heads, reused by every layer and step; a second buffer where one is filled while the other is read, and
    as many more for the same at other positions (`Geometry.branches`).

    side: the stream that every second group is decoded and attends on, where the device has streams. group: heads that are decoded at a
    time, if the frames are no more than `piece`; None where a whole history is decoded.
    """

    def __init__(self, geometry: Geometry, dtype: torch.dtype, device, capacity_frames: int | None):
        self.geometry, self.dtype, self.device = geometry, dtype, device
        self.group, self.piece = division(geometry, dtype.itemsize)
        self.side = torch.cuda.Stream(device) if geometry.buffers > 1 else None
        self.capacity = None if capacity_frames is None else capacity_frames * geometry.frame_tokens
        self._storage: Tensor | None = None
        self._packed: dict[int, Tensor] = {}  # by buffer

    @cached_property
    def third(self) -> torch.cuda.Stream:
        """The stream on which a pass encodes while it attends; one for the whole run, because each stream keeps memory of its own."""
        return torch.cuda.Stream(self.device, priority=-1)

    @property
    def nbytes(self) -> int:
        return (0 if self._storage is None else self._storage.nbytes) + sum(packed.nbytes for packed in self._packed.values())

    def fits(self, tokens: int) -> bool:
        """Whether K and V of so many tokens are decoded whole."""
        return self.piece is None or tokens <= self.piece * self.geometry.frame_tokens

    def at_a_time(self, longest: int) -> Division:
        """See `geometry.at_a_time`."""
        return at_a_time(self.geometry.heads, Division(self.group, self.piece), longest)

    def _reserved(self, tokens: int, heads: int) -> int:
        """Tokens of one head to allocate where so many are needed now; heads: of a piece, or 0."""
        # a quarter more where the length is unknown, so that a growing video does not reallocate at every chunk
        whole = self.capacity if self.capacity is not None else tokens + tokens // 4
        most = whole if self.piece is None else self.piece * self.geometry.frame_tokens
        if self.fits(tokens):
            return max(tokens, min(whole, most)) * self.group
        return max(tokens * heads, most * self.group) if heads else max(tokens, whole) * self.group

    def views(self, tokens: int, buffer: int = 0, heads: int = 0) -> tuple[Tensor, Tensor]:
        """K and V [B, tokens, group, D], or of `heads` heads where they are a piece of a history, uninitialized. They share memory with
        what an earlier call returned for this buffer."""
        shape = self.geometry.batch, tokens, heads or self.group, self.geometry.head_dim
        size = math.prod(shape)
        if self._storage is None or self._storage.shape[1] < size:
            reserved = self.geometry.batch * self._reserved(tokens, heads) * self.geometry.head_dim
            self.free()
            self._storage = torch.empty(2 * self.geometry.copies, reserved, dtype=self.dtype, device=self.device)
            if self.side is not None:
                # the current stream may still use that memory, and an interrupted run leaves work on the second stream that must finish
                # before the memory is reused
                self.side.wait_stream(torch.cuda.current_stream(self.device))
                self._storage.record_stream(self.side)
        return self._storage[2 * buffer, :size].view(shape), self._storage[2 * buffer + 1, :size].view(shape)

    def packing(self, buffer: int) -> Callable[[int], Tensor]:
        """Memory for what attention in eight bits makes of the keys and values in this buffer: called with a number of bytes, uint8 [n],
        uninitialized, which is that of earlier calls. It belongs to the stream that reads the buffer."""
        def take(size: int) -> Tensor:
            held = self._packed.get(buffer)
            if held is None or held.nbytes < size:
                places = self._storage.shape[1] // (self.geometry.batch * self.geometry.head_dim)
                reserved = packed_bytes(replace(self.geometry, buffers=1), places, self.group)
                held = None
                self._packed.pop(buffer, None)
                held = self._packed[buffer] = torch.empty(max(size, reserved), dtype=torch.uint8, device=self.device)
            return held[:size]

        return take

    def halve(self) -> bool:
        """Decode at most half as many heads at a time; False where it is one already."""
        self.free()
        before, self.group = self.group, fewer_heads(self.geometry.heads, self.group // 2, self.group)
        return self.group < before

    def free(self) -> None:
        self._storage = None
        self._packed.clear()
