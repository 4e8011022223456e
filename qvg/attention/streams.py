"""Two CUDA streams for one layer: a group of heads is decoded while the group before attends.

Attention to a few heads rarely fills a device to its last multiprocessor, so what is decoded beside it costs next to nothing. For the same
reason groups attend on two streams alternately: what the last blocks of one group leave idle, the next group uses, as if all heads attended
in one launch. A group is decoded on the stream on which it attends, into a buffer of its own, so the streams wait for each other only where
a layer begins and ends.

Decoding and attention use two streams and no more, the current one and `Workspace.side`: an H100 needs 0.6 us longer to start each kernel
of a network while two other streams wait for it (measured), and no longer while one does. A pass whose keys and values are encoded while
they attend has a third (`beside`): training a basis is a chain of many small kernels, which go first and leave most of the device to
attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import accumulate, product
from typing import NamedTuple

import torch
from torch import Tensor

from ..cache.host import Place
from ..cache.kv_cache import KVCache
from ..cache.layer import LayerCache, Piece

Buffer = tuple[Tensor, Tensor]


class DecodeAhead:
    """Decodes a group of heads ahead, and at the end of a layer the first group of the next.

    Lives as long as a pass, in which no history changes before its layer was read.
    """

    def __init__(self, cache: KVCache):
        self._workspace, self._offloads = cache.workspace, cache.host is not None
        self._filled: tuple | None = None  # what the first buffer was filled for
        self._third: torch.cuda.Stream | None = None

    @property
    def _current(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._workspace.device)

    def groups(self, history: LayerCache, slices: list[slice], buffers: list[Buffer], shift: int,
               append: Callable[[slice, Tensor, Tensor], None],
               following: LayerCache | None, reads: bool = True) -> Iterator[tuple[slice, Buffer, torch.cuda.Stream]]:
        """Groups of heads with a filled buffer and the stream on which to attend.

        append: copies the chunk's own tokens to the end of a buffer, where those of the first group are already. following: the next layer.
        reads: whether there is a history to decode.
        """
        current, side = self._current, self._workspace.side
        streams, tokens = (current, side), buffers[0][0].shape[1]

        def decode(layer: LayerCache, heads: slice, keys: Tensor, values: Tensor) -> None:
            if reads:
                layer.read(heads, keys[:, :layer.tokens], values[:, :layer.tokens], shift)

        if self._filled != (history.number, slices[0], tokens):
            decode(history, slices[0], *buffers[0])
        self._filled = None
        side.wait_event(current.record_event())
        for number, heads in enumerate(slices):
            if number + 1 < len(slices):
                coming, other = slices[number + 1], (number + 1) % 2
                with torch.cuda.stream(streams[other]):
                    # The copy goes first: meanwhile attention to the group before occupies the multiprocessors that it can use, and
                    # decoding gets the others. The other way round attention would wait.
                    append(coming, *buffers[other])
                    decode(history, coming, *buffers[other])
                    read = streams[other].record_event()
            elif number % 2 and following is not None and following.tokens == history.tokens:
                if self._offloads:
                    # reading on overwrites what was staged of this layer, so all of it must have been read
                    current.wait_event(read)
                decode(following, slices[0], *buffers[0])
                self._filled = following.number, slices[0], tokens
            yield heads, buffers[number % 2], streams[number % 2]

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Work inside goes to a stream of its own, after all that is queued on the current one, and is waited for at the end of the layer.
        """
        self._third = self._workspace.third
        # memory that was freed on that stream may still be read on the current one
        self._third.wait_stream(self._current)
        with torch.cuda.stream(self._third):
            yield

    def close(self) -> None:
        """Make the current stream wait for what the others still do for this layer."""
        self._current.wait_stream(self._workspace.side)
        if self._third is not None:
            self._current.wait_stream(self._third)


class Group(NamedTuple):
    """Heads that are decoded at a time, the number of their buffer, and the stream on which they are decoded and attend."""

    heads: slice
    number: int
    stream: AbstractContextManager


class Step(NamedTuple):
    """A piece of the history that was decoded for a group, or None where the group has all of it. first: latent frames before the piece.
    keys, values: [B, T, h, D], which the next step with this buffer overwrites. room: latent frames after the piece that are in them, too,
    uninitialized."""

    group: Group
    piece: Piece | None
    first: int = 0
    keys: Tensor | None = None
    values: Tensor | None = None
    room: int = 0


class PieceReader:
    """Decodes the history of a layer a piece at a time, for groups of heads:

        with PieceReader(cache, history) as reader:
            for group, piece, first, keys, values in reader.steps():
                with group.stream:

    Where there are two streams, groups are decoded and attend on both in turn, each with a buffer of its own, so that one group is decoded
    while the other attends. The memory that a group allocates belongs to its stream.

    One group reads all pieces and then the next, so that only one has unfinished results. Offloaded pieces come to the device once instead
    (`Geometry.by_piece`): all groups read one, while the next is copied, and the results of all groups are unfinished until the last.

    frames: the most latent frames of a piece. room: latent frames behind the last one. Leaving it makes the current stream wait for the
    other. The host launches kernels for every piece, so there are as few as can be.
    """

    def __init__(self, cache: KVCache, history: LayerCache, shift: int = 0, reads: bool = True, apart: bool = False, room: int = 0):
        """reads: whether there is a history to decode; shift: see `LayerCache.read`; apart: see `LayerCache.pieces`. room: latent frames
        that the last piece is to leave space for, if it can."""
        self._cache, self._history, self._shift, self._workspace = cache, history, shift, cache.workspace
        seen = history.seen if reads else []
        self._heads, frames = cache.workspace.at_a_time(max((entry.frames for entry in seen), default=0))
        # what is attended to in two ways is in pieces without a limit, too
        self.frames = frames or max(1, sum(entry.frames for entry in seen))
        # offloaded pieces come once for all groups
        self._once = cache.host is not None and cache.geometry.by_piece
        self._apart = apart
        self._pieces = history.pieces(self.frames, self._apart) if reads else []
        self.room = room if self._pieces and self._pieces[-1].frames + room <= self.frames else 0
        self._firsts = list(accumulate((piece.frames for piece in self._pieces), initial=0))
        self._described: list[torch.cuda.Event | None] = [None] * len(self._pieces)

    def __enter__(self) -> PieceReader:
        return self

    def __exit__(self, *_) -> None:
        # also after an interrupt, because memory that the second stream uses must not be reused
        if self._workspace.side is not None:
            torch.cuda.current_stream(self._workspace.device).wait_stream(self._workspace.side)

    def steps(self) -> Iterator[Step]:
        """Every group with every piece, oldest first, and at last without one."""
        groups = self._groups()
        for together in [groups] if self._once else [[group] for group in groups]:
            for index, group in product(range(len(self._pieces)), together):
                yield self._decoded(group, index)
            for group in together:
                yield Step(group, None)

    def _groups(self) -> list[Group]:
        side = self._workspace.side
        # allocated before the second stream begins to write to one
        self.views(self.frames, 0)
        slices = self._cache.head_slices(self._heads)
        if side is None:
            return [Group(heads, 0, nullcontext()) for heads in slices]
        side.wait_stream(torch.cuda.current_stream(self._workspace.device))
        return [Group(heads, number % 2, torch.cuda.stream(side) if number % 2 else nullcontext()) for number, heads in enumerate(slices)]

    def views(self, frames: int, buffer: int) -> tuple[Tensor, Tensor]:
        """Place for keys and values of a group of heads, see `Workspace.views`."""
        return self._workspace.views(frames * self._cache.geometry.frame_tokens, buffer, self._heads)

    def _decoded(self, group: Group, index: int) -> Step:
        piece, room = self._pieces[index], self.room if index + 1 == len(self._pieces) else 0
        keys, values = self.views(piece.frames + room, group.number)
        held = piece.frames * self._cache.geometry.frame_tokens
        with group.stream:
            current = None if self._workspace.side is None else torch.cuda.current_stream(self._workspace.device)
            if current is not None and self._described[index] is not None:
                # what a kernel needs to know of the spans is sent to the device once, by the group that reads them first
                current.wait_event(self._described[index])
            self._history.read(group.heads, keys[:, :held], values[:, :held], self._shift, piece.part, self._following(index))
            if current is not None:
                self._described[index] = current.record_event()
        return Step(group, piece, self._firsts[index], keys, values, room)

    def _following(self, index: int) -> Place | None:
        """The offloaded piece that is read after this one, of this layer or the next."""
        if not self._once:
            return None
        if index + 1 < len(self._pieces):
            return self._history, self._pieces[index + 1].part
        first = self._history.next.pieces(self.frames, self._apart)[:1]
        return (self._history.next, first[0].part) if first else None
