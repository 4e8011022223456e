"""Spans in host memory that are copied to the device one layer at a time, or one piece of a layer.

A layer is read once per pass, so between two reads its spans need not be on the device. With `QVGSettings.offload` a span of K and of V is
encoded there, copied into one block of host memory, and freed. `HostStore.fetch` returns a layer's spans on the device: their blocks are
copied one by one into one of two staging buffers, which even and odd layers alternate, and while a layer is read and computed, the blocks
of the next one are copied. The bits are the same, so a video is the same with and without offloading. Where a history is read in pieces
(`Geometry.by_piece`), the buffers hold a piece each: one is copied while the one before is decoded and attended to.

On a GPU the host memory is pinned and all copies, in both directions, go through one stream of their own. Their order on that stream makes
it safe to reuse a block for another span: it is read before anything new is written. On a CPU the same happens with plain tensors, which
saves nothing.

Codebooks stay on the device, since every new span is encoded with them.
"""

from __future__ import annotations

import itertools
import logging
import mmap
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..codec import Span
from .geometry import aligned

ALL = slice(None)
_numbers = itertools.count()
# a layer, and some of the entries that a read of it decodes
Place = tuple[Any, slice]


class Block:
    """Host memory of one span of K and of V: data uint8 [n]. No two blocks have the same number."""

    def __init__(self, data: Tensor):
        self.data, self.number = data, next(_numbers)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


@dataclass
class StagedEntry:
    """A cache entry with its tensors in a staging buffer."""

    first: int
    frames: int
    sink: bool
    spans: list[Span]

    @property
    def last(self) -> int:
        return self.first + self.frames - 1


@dataclass
class StagingPlan:
    """Entries of a layer in a staging buffer, and where each block goes; it holds as long as the layer has the same blocks."""

    blocks: list[int]
    targets: list[Tensor]
    entries: list[StagedEntry]


@dataclass
class Stage:
    """A staging buffer. here: the plan whose bytes it holds; ready: recorded when they have arrived; plans: by number of the layer and
    place of the first entry."""

    buffer: Tensor | None = None
    here: StagingPlan | None = None
    ready: torch.cuda.Event | None = None
    plans: dict[tuple[int, int], StagingPlan] = field(default_factory=dict)


class HostStore:
    """The offloaded spans of one cache. capacity: bytes of a staging buffer where the most that a layer will hold is known."""

    def __init__(self, device, capacity: int | None = None):
        self.device, self.capacity = torch.device(device), capacity
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._stages, self._latest = (Stage(), Stage()), 0
        # pinning takes as long as a copy, and a chunk needs the sizes that the one before freed: one block of each is kept
        self._spare: dict[int, Tensor] = {}
        self._pinned: set[int] = set()
        self._largest = 0
        self._closed = False
        # a cache that is dropped without `free` must not leave freed memory pinned; its blocks hold the store, so this runs last
        weakref.finalize(self, _unpin_all, self._spare, self._pinned, self.stream).atexit = False

    @property
    def device_bytes(self) -> int:
        """The staging buffers, and one block that is being copied."""
        return sum(stage.buffer.nbytes for stage in self._stages if stage.buffer is not None) + self._largest

    # spans to the host and back

    def take_in(self, spans: Sequence[Span]) -> tuple[list[Span], Block]:
        """The same spans with their tensors in a block of host memory. The copy may not have finished; see `wait`."""
        parts = [tensor for span in spans for tensor in span.tensors().values()]
        block = self._block(sum(aligned(part.nbytes) for part in parts))
        self._largest = max(self._largest, block.nbytes)
        stored = list(_placed(spans, block.data, 0))
        with self._copying():
            for source, target in zip(parts, (tensor for span in stored for tensor in span.tensors().values())):
                target.copy_(source, non_blocking=True)
                self._used(source)
        return stored, block

    def bring(self, block: Block, spans: Sequence[Span]) -> list[Span]:
        """A copy of stored spans on the device, which later work on the current stream may read."""
        buffer = torch.empty(block.nbytes, dtype=torch.uint8, device=self.device)
        with self._copying():
            buffer.copy_(block.data, non_blocking=True)
            self._used(buffer)
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        return list(_placed(spans, buffer, 0))

    def fetch(self, layers: Sequence, number: int) -> list[StagedEntry]:
        """The entries of layer `number` on the device, valid until the layer after the next is fetched. Starts to copy the next layer."""
        stage = self._stages[number % 2]
        entries = self._fill(stage, layers[number])
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_event(stage.ready)
        following = (number + 1) % len(layers)
        # the first layer comes after the last, and of an odd number of layers both take the same buffer. When the last chunk of a video was
        # stored, it holds more than a pass ever reads
        if following % 2 != number % 2 and (self.capacity is None or _bytes(layers[following].seen) <= self.capacity):
            self._fill(self._stages[following % 2], layers[following])
        return entries

    def fetch_piece(self, place: Place, following: Place, readers: Sequence[torch.cuda.Stream] = ()) -> list[StagedEntry]:
        """Some entries of a layer on the device, valid until the second other piece after it is fetched. Starts to copy the following one.

        readers: streams beside the current one that read pieces. What all of them have queued is finished before anything is overwritten.
        """
        self._latest = self._piece(*place, readers)
        stage = self._stages[self._latest]
        entries = stage.here.entries
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_event(stage.ready)
        layer, part = following
        if self.capacity is None or _bytes(layer.seen[part]) <= self.capacity:
            self._piece(layer, part, readers)
        return entries

    def _piece(self, layer, part: slice, readers: Sequence[torch.cuda.Stream]) -> int:
        """The number of the staging buffer with a piece. Unless one holds it, starts to copy it to the one that was not fetched last."""
        # a whole layer may have nothing yet, and no buffer may hold anything
        numbers = [entry.block.number for entry in layer.seen[part]]
        for number, stage in enumerate(self._stages):
            if stage.here is not None and stage.here.blocks == numbers:
                return number
        if self.capacity is not None:
            for stage in self._stages:
                if stage.buffer is None:
                    self._allocate(stage, self.capacity, readers)
        self._fill(self._stages[1 - self._latest], layer, part, readers)
        return 1 - self._latest

    def _fill(self, stage: Stage, layer, part: slice = ALL, readers: Sequence[torch.cuda.Stream] = ()) -> list[StagedEntry]:
        """The entries of a layer in a staging buffer; starts to copy their spans there unless it holds them."""
        entries = layer.seen[part]
        blocks = [entry.block for entry in entries]
        numbers, key = [block.number for block in blocks], (layer.number, part.start or 0)
        plan = stage.plans.get(key)
        if plan is None or plan.blocks != numbers:
            self._forget_plans(layer)
            plan = self._plan(stage, entries, numbers, readers)
            stage.plans[key] = plan
        if stage.here is not plan:
            with self._copying(readers):
                for block, target in zip(blocks, plan.targets):
                    target.copy_(block.data, non_blocking=True)
                if self.stream is not None:
                    stage.ready = self.stream.record_event()
            stage.here = plan
        return plan.entries

    def _forget_plans(self, layer) -> None:
        """Those of spans that the layer no longer has, which would keep their codebooks alive."""
        held = {entry.block.number for entry in layer.entries}
        for stage in self._stages:
            stage.plans = {key: plan for key, plan in stage.plans.items() if key[0] != layer.number or held.issuperset(plan.blocks)}

    def _plan(self, stage: Stage, entries: Sequence, numbers: list[int], readers: Sequence[torch.cuda.Stream]) -> StagingPlan:
        needed = _bytes(entries)
        if stage.buffer is None or stage.buffer.nbytes < needed:
            # a quarter more where the length is unknown, so that a growing video does not reallocate at every chunk
            self._allocate(stage, needed + needed // 4 if self.capacity is None else max(self.capacity, needed), readers)
        at, targets, staged = 0, [], []
        for entry in entries:
            targets.append(stage.buffer[at:at + entry.block.nbytes])
            staged.append(StagedEntry(entry.first, entry.frames, entry.sink, list(_placed(entry.spans, stage.buffer, at))))
            at += entry.block.nbytes
        return StagingPlan(numbers, targets, staged)

    def _allocate(self, stage: Stage, size: int, readers: Sequence[torch.cuda.Stream]) -> None:
        stage.here = stage.buffer = None
        stage.plans.clear()
        stage.buffer = torch.empty(aligned(size), dtype=torch.uint8, device=self.device)
        self._used(stage.buffer)
        for stream in readers:
            # a piece may still be read there when its buffer is replaced
            stage.buffer.record_stream(stream)

    # streams

    def _copying(self, others: Sequence[torch.cuda.Stream] = ()) -> AbstractContextManager:
        """Copies inside run on the copy stream, after everything that is queued on the current stream, and on others."""
        if self.stream is None:
            return nullcontext()
        for stream in (torch.cuda.current_stream(self.device), *others):
            self.stream.wait_stream(stream)
        return torch.cuda.stream(self.stream)

    def _used(self, tensor: Tensor) -> None:
        """Keep the allocator from reusing device memory before the copy stream has finished with it."""
        if self.stream is not None:
            tensor.record_stream(self.stream)

    def wait(self) -> None:
        """Block until all copies have finished, so that the host can read them."""
        if self.stream is not None:
            self.stream.synchronize()

    # host memory

    def _block(self, size: int) -> Block:
        data = self._spare.pop(size, None)
        block = Block(self._pin(size) if data is None else data)
        weakref.finalize(block, self._take_back, block.data).atexit = False
        return block

    def _take_back(self, data: Tensor) -> None:
        if self._closed or data.nbytes in self._spare:
            _unpin(data, self._pinned, self.stream)
        else:
            self._spare[data.nbytes] = data

    def _pin(self, size: int) -> Tensor:
        """uint8 [size], pinned where the device is a GPU: torch's own pinned memory is rounded up to powers of two, and kept for good."""
        page = mmap.PAGESIZE
        try:
            memory = torch.empty(aligned(size) + 2 * page, dtype=torch.uint8)
        except (RuntimeError, MemoryError) as error:
            raise torch.OutOfMemoryError(f"There is no host memory for an offloaded span ({error}).") from None
        start = -memory.data_ptr() % page
        data = memory[start:start + size]
        if self.stream is not None:
            error = torch.cuda.cudart().cudaHostRegister(data.data_ptr(), -(-size // page) * page, 0)
            if int(error) == 0:
                self._pinned.add(data.data_ptr())
            else:
                logging.warning("QVG: offloaded spans are not pinned, which slows their copies down (%s)", error)
                _forget_error(self.device)
        return data

    def shrink(self) -> None:
        """Free the staging buffers, and allocate them no larger than needed from now on."""
        self._stages, self.capacity = (Stage(), Stage()), None

    def close(self) -> None:
        """Free everything; blocks that are still held are unpinned when they are freed."""
        self.wait()
        self._closed, self._stages = True, (Stage(), Stage())
        _unpin_all(self._spare, self._pinned, self.stream)


def _bytes(entries: Sequence) -> int:
    """Of the blocks that a read of these entries needs."""
    return sum(entry.block.nbytes for entry in entries)


def _placed(spans: Sequence[Span], buffer: Tensor, at: int) -> Iterator[Span]:
    """The spans with their tensors as views of a uint8 buffer, one after the other from byte `at`. Nothing is copied."""
    for span in spans:
        parts = {}
        for name, tensor in span.tensors().items():
            # with the tensor's own strides, so that the bytes of a row stay contiguous
            parts[name] = buffer[at:at + tensor.nbytes].view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
            at += aligned(tensor.nbytes)
        yield span.with_tensors(parts)


def _unpin(data: Tensor, pinned: set[int], stream: torch.cuda.Stream | None) -> None:
    if data.data_ptr() in pinned:
        stream.synchronize()
        pinned.discard(data.data_ptr())
        torch.cuda.cudart().cudaHostUnregister(data.data_ptr())


def _unpin_all(spare: dict[int, Tensor], pinned: set[int], stream: torch.cuda.Stream | None) -> None:
    while spare:
        _unpin(spare.popitem()[1], pinned, stream)


def _forget_error(device: torch.device) -> None:
    """Clear the error of a failed CUDA call, which the next operation would otherwise raise."""
    try:
        torch.zeros(1, device=device)
    except RuntimeError:
        pass
