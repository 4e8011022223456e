"""Attention of world models: two branches over one history, RoPE for when and PRoPE for whence.

HY-WorldPlay attends twice from the same queries, keys and values: once at the positions of the frames in the context, once by the cameras
that saw them (`prope`). The original caches what both branches read, so it keeps every key and value twice. Here the cache holds them once
and raw; both are made from what is decoded, a few heads at a time. So any frames can be read together, at any positions, with their true
cameras, and position and camera are a matter of reading.

    view = View(rope, prope, frames=[0, 1, 2, 3, 12, 13, 14, 15], new=[16, 17, 18, 19])
    attend = WorldAttention(cache, view)
    network(..., attend)                # attend(layer, q, k, v, text) -> (out of RoPE, out of PRoPE)

The frames that are read take the positions 0, 1, 2 and so on in their order, and the new ones follow. Tokens of the text, if the network
attends to any, come first and have neither position nor camera.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import cached_property, partial

import torch
from torch import Tensor

from .. import backends
from ..cache.kv_cache import KVCache
from ..cache.layer import LayerCache
from .choice import attention_of
from .functions import Attention
from .pieces import Running
from .prope import Prope, Turn
from .rope import Rope
from .streams import DecodeAhead, PieceReader

Pair = tuple[Tensor, Tensor]
Text = Pair | None


class View:
    """What one pass sees. rope: of the model. prope: the cameras of all latent frames of the walk. frames: latent frames that are read, in
    rising order; new: those of the pass.

    Raises ValueError when the frames do not rise.
    """

    def __init__(self, rope: Rope, prope: Prope, frames: Sequence[int], new: Sequence[int]):
        order = [*frames, *new]
        if order != sorted(set(order)):
            raise ValueError(f"A pass over latent frames {list(new)} is to read {list(frames)}; frames must rise, and the new ones follow "
                             "those that are read.")
        self.rope, self.prope, self.frames, self.new = rope, prope, tuple(frames), tuple(new)

    def angles(self, device) -> tuple[Tensor, Tensor]:
        """cos and sin, [T, 1, D / 2] float32, of the frames that are read and of the new ones."""
        cos, sin = self.rope.tables(0, len(self.frames) + len(self.new), device)
        return cos[:, None], sin[:, None]


class WorldAttention:
    """One forward pass of a model with two branches. Nothing in it is differentiated.

    cache: made with `rope=NoRope` and `branches=2`; it must read as many frames as `view` has, see `KVCache.choose`. A cache that holds one
    context may number them in its own way. store: keep the keys and values of the pass; newest: see `LayerCache.append`. attention: by
    default the one that the cache's settings ask for, see `choice`.
    Raises ValueError for a cache that was not made so.
    """

    def __init__(self, cache: KVCache, view: View, *, store: bool = False, newest: int = 0, attention: Attention | None = None):
        if cache.geometry.branches != 2:
            raise ValueError("World models attend in two branches; make the cache with branches=2 and rope=NoRope.")
        self.cache, self.view, self.store, self.newest = cache, view, store, newest
        self.attention = attention or attention_of(cache)
        self._ahead = None if cache.workspace.side is None else DecodeAhead(cache)

    @cached_property
    def _angles(self) -> tuple[Tensor, Tensor]:
        return self.view.angles(self.cache.workspace.device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, text: Text = None) -> Pair:
        """Attention of layer `layer` from q, k and v [B, T, H, D], raw, to two of [B, T, H, D], that of PRoPE projected back.

        text: keys and values [B, L, H, D] that come first in both branches.
        Raises ValueError when the tokens are not those of the new frames, or the cache does not hold the frames that are to be read.
        """
        history = self.cache.layers[layer]
        tokens = len(self.view.new) * self.cache.geometry.frame_tokens
        if not q.shape[1] == k.shape[1] == v.shape[1] == tokens:
            raise ValueError(f"Queries have {q.shape[1]} tokens, keys {k.shape[1]} and values {v.shape[1]}, but {len(self.view.new)} "
                             f"latent frames of this cache have {tokens}.")
        if self.view.frames and len(history.seen_frames) != len(self.view.frames):
            raise ValueError(f"{len(self.view.frames)} latent frames are to be read, but the cache reads {len(history.seen_frames)}; "
                             "choose whole chunks that it holds.")
        with torch.no_grad(), backends.recording(self.cache.calls):
            outs = self._attend(history, q, k, v, text)
            if self.store and not self._beside:
                history.append(k, v, len(self.view.new), self.newest)
            return outs

    @property
    def _beside(self) -> bool:
        """Whether keys and values are encoded while they attend: where nothing is read, and a context pass has many to encode."""
        return self._ahead is not None and not self.view.frames

    def _attend(self, history: LayerCache, q: Tensor, k: Tensor, v: Tensor, text: Text) -> Pair:
        past = history.tokens if self.view.frames else 0
        lead = text[0].shape[1] if text is not None else 0
        cos, sin = self._angles
        prope, new, tokens = self.view.prope, self.view.new, lead + past + k.shape[1]
        turned = torch.empty_like(q)
        queries = turned, prope.queries(q, new, turn=Turn(cos[past:], sin[past:], turned))
        # allocated while only the current stream is at work, because both streams write their heads here
        outs = torch.empty_like(q), torch.empty_like(q)
        rough = past and hasattr(self.attention, "history")
        in_pieces = rough or (not self.cache.workspace.fits(tokens) and hasattr(self.attention, "partial"))
        try:
            if self.store and self._beside:
                with self._ahead.beside():
                    history.append(k, v, len(new), self.newest)
            if in_pieces:
                self._attend_in_pieces(history, queries, k, v, text, outs)
            else:
                self._attend_whole(history, queries, k, v, text, outs)
        finally:
            if self._ahead:
                self._ahead.close()
        prope.outputs(outs[1], new, out=outs[1])
        return outs

    def _attend_whole(self, history: LayerCache, queries: Pair, k: Tensor, v: Tensor, text: Text, outs: Pair) -> None:
        """Both branches over all that is read, to `outs`."""
        past = history.tokens if self.view.frames else 0
        lead = text[0].shape[1] if text is not None else 0
        near, far = ([self.cache.workspace.views(lead + past + k.shape[1], buffer) for buffer in buffers] for buffers in self._buffers)
        for heads, number, stream in self._groups(history, k, v, [_after(pair, lead) for pair in near], past):
            with stream:
                self._branch(_after(near[number], lead), _after(far[number], lead), slice(None))
                if text is not None:
                    for buffer in (*zip(near[number], text), *zip(far[number], text)):
                        buffer[0][:, :lead] = buffer[1][:, :, heads]
                for out, q, (keys, values) in zip(outs, queries, (near[number], far[number])):
                    out[:, :, heads] = self.attention(q[:, :, heads], keys, values)

    def _attend_in_pieces(self, history: LayerCache, queries: Pair, k: Tensor, v: Tensor, text: Text, outs: Pair) -> None:
        """Both branches over a few latent frames at a time, which are decoded once for both, to `outs`."""
        exact, history_in_few = self.attention.partial, getattr(self.attention, "history", None)
        unfinished: dict[int, list[tuple[Tensor, Running]]] = {}
        with PieceReader(self.cache, history, reads=bool(self.view.frames), apart=history_in_few is not None) as reader:
            for (heads, number, stream), piece, first, *near, _ in reader.steps():
                with stream:
                    if heads.start not in unfinished:
                        unfinished[heads.start] = [(q[:, :, heads], Running()) for q in queries]
                        if text is not None:
                            lead = tuple(part[:, :, heads] for part in text)
                            _add(unfinished[heads.start], (lead, lead), exact)
                    if piece is None:
                        branches = unfinished.pop(heads.start)
                        for frames, pair in self._new_frames(reader, heads, number, k, v):
                            _add(branches, self._branches(reader, number, pair, frames), exact)
                        for out, (_, running) in zip(outs, branches):
                            running.finish(out[:, :, heads])
                        continue
                    attention = exact
                    if piece.coarse and history_in_few:
                        # one branch packs after the other
                        attention = partial(history_in_few, space=self.cache.workspace.packing(number))
                    pairs = self._branches(reader, number, tuple(near), slice(first, first + piece.frames))
                    _add(unfinished[heads.start], pairs, attention)

    @property
    def _buffers(self) -> tuple[range, range]:
        """Of the workspace: for raw keys and values and RoPE's, and for PRoPE's."""
        count = self.cache.geometry.buffers
        return range(count), range(count, 2 * count)

    def _new_frames(self, reader: PieceReader, heads: slice, number: int, k: Tensor, v: Tensor) -> Iterator[tuple[slice, Pair]]:
        """Which of the frames that are read and made, and their raw keys and values, a few frames that are made at a time."""
        done, size = len(self.view.frames), self.cache.geometry.frame_tokens
        for start in range(0, len(self.view.new), reader.frames):
            frames = min(reader.frames, len(self.view.new) - start)
            pair, at = reader.views(frames, number), slice(start * size, (start + frames) * size)
            for target, own in zip(pair, (k, v)):
                target[:] = own[:, at, heads]
            yield slice(done + start, done + start + frames), pair

    def _branches(self, reader: PieceReader, number: int, near: Pair, frames: slice) -> tuple[Pair, Pair]:
        """See `_branch`, in the buffers of a group."""
        far = reader.views(frames.stop - frames.start, self._buffers[1][number])
        self._branch(near, far, frames)
        return near, far

    def _groups(self, history: LayerCache, k: Tensor, v: Tensor, buffers: list[Pair], past: int) -> Iterator[tuple]:
        """Groups of heads, the number of the buffer that holds their raw keys and values, and the stream on which to attend."""
        slices = self.cache.head_slices()

        def append(heads: slice, keys: Tensor, values: Tensor) -> None:
            keys[:, past:], values[:, past:] = k[:, :, heads], v[:, :, heads]

        if self._ahead is None:
            keys, values = buffers[0]
            for heads in slices:
                append(heads, keys, values)
                if past:
                    history.read(heads, keys[:, :past], values[:, :past])
                yield heads, 0, nullcontext()
            return
        append(slices[0], *buffers[0])
        following = next(iter(self.cache.layers[history.number + 1:history.number + 2]), None) if past else None
        for number, (heads, _, stream) in enumerate(self._ahead.groups(history, slices, buffers, 0, append, following, bool(past))):
            yield heads, number % 2, torch.cuda.stream(stream)

    def _branch(self, near: Pair, far: Pair, frames: slice) -> None:
        """Raw keys and values of some of the frames that are read and made to those of both branches: PRoPE's in `far`, RoPE's in place."""
        (keys, values), size = near, self.cache.geometry.frame_tokens
        first, stop, _ = frames.indices(len(self.view.frames) + len(self.view.new))
        cos, sin = (x[first * size:stop * size] for x in self._angles)
        # parts of one set of matrices, which is made while one stream alone is at work
        self.view.prope.keys_values(keys, values, (*self.view.frames, *self.view.new), far, Turn(cos, sin, keys), frames)


def _add(branches: Sequence[tuple[Tensor, Running]], pairs: tuple[Pair, Pair], attention: Callable) -> None:
    """Attend in each branch to keys and values of its own. branches: queries, and what they attended to before."""
    for (q, running), pair in zip(branches, pairs):
        running.add(*attention(q, *pair))


def _after(pair: Pair, lead: int) -> Pair:
    """Keys and values without the first `lead` tokens."""
    return pair[0][:, lead:], pair[1][:, lead:]
