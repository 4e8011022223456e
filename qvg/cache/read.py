"""The op `decode`: the history of a layer to keys and values, RoPE applied. Backends get a plain description, `History`, and never a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from .. import backends
from ..codec import Codec, Span, Tables
from ..codec.finite import saturated

# tokens decoded in one go, in float32; a span of the released models has as many
READ_TOKENS = 4680


class Held(NamedTuple):
    """A span of K and of V on the device, the latent frames that they hold, and the position of the first."""

    key: Span
    value: Span
    frames: int
    position: int


class History:
    """What is read of a layer.

    held: oldest first. heads: of a batch entry; a row is a head of a batch entry. rope: see `attention.rope.Rope`. tables: of the cache.
    run_memo, memo: what a backend keeps from one read to the next, for the whole cache and for the layer; `KVCache.free` clears both.
    """

    __slots__ = ("codec", "heads", "held", "memo", "rope", "run_memo", "tables")

    def __init__(self, held: list[Held], codec: Codec, heads: int, rope: Any, tables: Tables, run_memo: dict, memo: dict):
        self.held, self.codec, self.heads = held, codec, heads
        self.rope, self.tables, self.run_memo, self.memo = rope, tables, run_memo, memo

    @property
    def frame_tokens(self) -> int:
        height, width = self.rope.grid
        return height * width


def read(history: History, heads: slice, keys: Tensor, values: Tensor) -> None:
    """Decode the whole history of some heads: keys and values [B, T, h, D] are filled, oldest token first."""
    backends.run("decode", _read, history, heads, keys, values)


@dataclass
class _Group:
    """Spans that are decoded in one go. members: (latent frames held before it, what is held). free: latent frames that still fit."""

    members: list[tuple[int, Held]]
    free: int

    def takes(self, codec: Codec, held: Held) -> bool:
        first = self.members[0][1]
        return self.free >= held.frames and codec.joins(first.key, held.key) and codec.joins(first.value, held.value)


def _read(history: History, heads: slice, keys: Tensor, values: Tensor) -> None:
    size = history.frame_tokens
    for group in _groups(history):
        sides = [[held.key for _, held in group], [held.value for _, held in group]]
        runs = _runs(group)
        for batch in range(keys.shape[0]):
            rows = slice(batch * history.heads + heads.start, batch * history.heads + heads.stop)
            key, value = history.codec.decode(sides, rows, history.tables)
            key = history.rope.rotate_frames_(key, [(position, frames) for _, position, frames in runs])
            key, value = (saturated(x, keys.dtype) for x in (key, value))
            done = 0
            for start, _, frames in runs:
                at, part = slice(start * size, (start + frames) * size), slice(done, done + frames * size)
                keys[batch, at] = key[part]
                values[batch, at] = value[part]
                done = part.stop


def _groups(history: History) -> list[list[tuple[int, Held]]]:
    """What is held, with the frames held before each, in groups within `READ_TOKENS` whose spans of equal bits follow each other."""
    before, groups = 0, []
    for held in history.held:
        group = next((group for group in groups if group.takes(history.codec, held)), None)
        if group is None:
            groups.append(_Group([(before, held)], READ_TOKENS // history.frame_tokens - held.frames))
        else:
            group.members.append((before, held))
            group.free -= held.frames
        before += held.frames
    return [sorted(group.members, key=lambda member: [member[1].key.bits, member[1].value.bits]) for group in groups]


def _runs(group: Sequence[tuple[int, Held]]) -> list[tuple[int, int, int]]:
    """Frames held before it, position of its first frame, and frames, of every stretch of spans that follow each other in time."""
    runs = []
    for start, held in group:
        position, frames = held.position, held.frames
        if runs and runs[-1][0] + runs[-1][2] == start and runs[-1][1] + runs[-1][2] == position:
            start, position, before = runs.pop()
            frames += before
        runs.append((start, position, frames))
    return runs
