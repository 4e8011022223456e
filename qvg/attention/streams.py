"""Two CUDA streams for one layer: a group of heads is decoded while the group before attends.

Attention to a few heads rarely fills a device to its last multiprocessor, so what is decoded beside it costs next to nothing. For the same
reason groups attend on two streams alternately: what the last blocks of one group leave idle, the next group uses, as if all heads attended
in one launch. A group is decoded on the stream on which it attends, into a buffer of its own, so the streams wait for each other only where
a layer begins and ends.

There are two streams and no more, the current one and `Workspace.side`: an H100 needs 0.6 us longer to start each kernel of a network while
two other streams wait for it (measured), and no longer while one does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..cache.kv_cache import KVCache
from ..cache.layer import LayerCache

Buffer = tuple[Tensor, Tensor]


class DecodeAhead:
    """Decodes a group of heads ahead, and at the end of a layer the first group of the next.

    Lives as long as a pass, in which no history changes before its layer was read.
    """

    def __init__(self, cache: KVCache):
        self._workspace, self._offloads = cache.workspace, cache.host is not None
        self._filled: tuple | None = None  # what the first buffer was filled for

    @property
    def _current(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._workspace.device)

    def groups(self, history: LayerCache, slices: list[slice], buffers: list[Buffer], shift: int,
               append: Callable[[slice, Tensor, Tensor], None],
               following: LayerCache | None) -> Iterator[tuple[slice, Buffer, torch.cuda.Stream]]:
        """Groups of heads with a filled buffer and the stream on which to attend.

        append: copies the chunk's own tokens to the end of a buffer, where those of the first group are already. following: the next layer.
        """
        current, side = self._current, self._workspace.side
        streams, tokens = (current, side), buffers[0][0].shape[1]

        def decode(layer: LayerCache, heads: slice, keys: Tensor, values: Tensor) -> None:
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

    def close(self) -> None:
        """Make the current stream wait for what the other still does for this layer."""
        self._current.wait_stream(self._workspace.side)
