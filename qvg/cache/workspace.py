"""The buffers that keys and values are decoded to: one for a group of heads, or two where the device has streams."""

from __future__ import annotations

import torch
from torch import Tensor

from .geometry import Geometry, head_group


class Workspace:
    """Decoded K and V of a group of heads, reused by every layer and step; two buffers where one is filled while the other is read.

    side: the stream that every second group is decoded and attends on, where the device has streams.
    """

    def __init__(self, geometry: Geometry, dtype: torch.dtype, device, capacity_frames: int | None):
        self.geometry, self.dtype, self.device = geometry, dtype, device
        self.group = head_group(geometry.heads)
        self.side = torch.cuda.Stream(device) if geometry.buffers > 1 else None
        self.capacity = None if capacity_frames is None else capacity_frames * geometry.frame_tokens
        self._storage: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return 0 if self._storage is None else self._storage.nbytes

    def views(self, tokens: int, buffer: int = 0) -> tuple[Tensor, Tensor]:
        """K and V [B, tokens, group, D], uninitialized. They share memory with what an earlier call returned for this buffer."""
        size = self.geometry.batch * tokens * self.group * self.geometry.head_dim
        if self._storage is None or self._storage.shape[1] < size:
            # a quarter more where the length is unknown, so that a growing video does not reallocate at every chunk
            reserved = max(tokens, self.capacity if self.capacity is not None else tokens + tokens // 4)
            self._storage = None
            self._storage = torch.empty(2 * self.geometry.buffers, self.geometry.batch * reserved * self.group * self.geometry.head_dim,
                                        dtype=self.dtype, device=self.device)
            if self.side is not None:
                # the current stream may still use that memory, and an interrupted run leaves work on the second stream that must finish
                # before the memory is reused
                self.side.wait_stream(torch.cuda.current_stream(self.device))
                self._storage.record_stream(self.side)
        shape = (self.geometry.batch, tokens, self.group, self.geometry.head_dim)
        return self._storage[2 * buffer, :size].view(shape), self._storage[2 * buffer + 1, :size].view(shape)

    def halve(self) -> bool:
        """Decode at most half as many heads at a time; False where it is one already."""
        smaller = [group for group in range(1, self.group // 2 + 1) if self.geometry.heads % group == 0]
        self.free()
        self.group = max(smaller, default=self.group)
        return bool(smaller)

    def free(self) -> None:
        self._storage = None
