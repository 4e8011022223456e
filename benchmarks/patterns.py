"""Patterns of videos for the closed loop of `qvg bench quality`: chunk lengths, sizes, and changes of content.

A codebook trained on one chunk is later used for chunks of other lengths, content and prompts. So a method is measured on all of these,
each as its own loop of the tiny model.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from ..qvg.cache.ageing import Limits
from ..qvg.cache.codebook_lifetime import Lifetime
from ..qvg.cache.entry import Entry
from ..qvg.cache.forecast import PlannedLayer
from ..qvg.cache.geometry import Geometry
from ..qvg.cache.kv_cache import KVCache
from ..qvg.cache.layer import LayerCache
from ..qvg.cache.sizes import codebook_bytes
from ..qvg.codec import pair as codec
from ..qvg.codec.plain import PlainSpan
from ..qvg.demo import LATENT, PROMPTS, embed_prompt
from ..qvg.measure.loop import CausalLoop, closeness
from ..qvg.settings import PRESETS, QVGSettings
from ..qvg.video import Run


@dataclass(frozen=True)
class Pattern:
    """frames: latent frames of the video; scale: of height and width; switch: another prompt from the middle on; cut: the first half of the
    video is given and has a cut in its middle."""

    name: str
    frames: int = 24
    chunk_frames: int = 3
    first_alone: bool = False
    scale: int = 1
    switch: bool = False
    cut: bool = False

    @property
    def later(self) -> int:
        """First latent frame of the third chunk or, after a cut, of the generated part."""
        if self.cut:
            return self.frames // 2
        return (1 if self.first_alone else self.chunk_frames) + self.chunk_frames


PATTERNS = (
    Pattern("3,3,3"), Pattern("1,3,3", frames=25, first_alone=True), Pattern("2,2,2", chunk_frames=2), Pattern("1,1,1", chunk_frames=1),
    Pattern("twice the size", scale=2), Pattern("prompt switch", switch=True), Pattern("cut", cut=True),
    Pattern("20 chunks", frames=60))


SIZE, FRAMES = Geometry(30, 12, 128, (30, 52)), 180

# the released scripts for Self-Forcing encode eight chunks of three frames together and keep newer ones in bf16
RELEASED_FRAMES = 24


class ReleasedLayer(LayerCache):
    """A layer of the paper codec on the released schedule: bf16 until `RELEASED_FRAMES` are full, then one span of them all."""

    def append(self, key: Tensor, value: Tensor, frames: int, newest: int = 0) -> None:
        spans = [PlainSpan(x.transpose(0, 1).flatten(1, 2).to(self.owner.workspace.dtype)) for x in (key, value)]
        self.spans.append(Entry(self.next_frame, frames, False, self.sides, spans, self.owner))
        self.next_frame += frames
        self.owner._note_peak(self)
        waiting = [entry for entry in self.spans if entry.key_bits == 16]
        if sum(entry.frames for entry in waiting) < RELEASED_FRAMES:
            return
        codecs, bits = [side.codec for side in self.sides], (self.settings.key.bits, self.settings.value.bits)
        whole = [torch.cat([entry.spans[number].data for entry in waiting]) for number in range(2)]
        books = codec.train(codecs, whole, [True, True], self.generator, [None, None])
        frames = sum(entry.frames for entry in waiting)
        spans = codec.encode(codecs, whole, bits, books)
        self.spans[-len(waiting):] = [Entry(waiting[0].first, frames, False, self.sides, spans, self.owner)]
        self.owner._note_peak(self)


def bits_at_size(cache: KVCache, pattern: Pattern) -> float:
    """Bits per element of 180 latent frames at Self-Forcing's size: its spans, and as many codebooks as a layer of this cache holds (a
    codec that trains one for every span: for every span)."""
    settings, layer = cache.settings, PlannedLayer(cache.settings, SIZE, Limits())
    for first in range(0, FRAMES, pattern.chunk_frames):
        layer.append(first, pattern.chunk_frames)
    total = layer.held()
    if cache.layers[0].codec.adaptive:
        held = [{id(book) for book in (*(side.book for side in one.sides), *(book for entry in one.spans for book in entry.books))
                 if book is not None} for one in cache.layers]
        one = sum(codebook_bytes(SIZE, settings.codec, tensor, FRAMES * SIZE.frame_tokens) for tensor in (settings.key, settings.value)) / 2
        total += sum(map(len, held)) / len(held) * one - layer.book_bytes()
    return 8 * total / (SIZE.bf16_bytes(FRAMES) / 2 / SIZE.layers)


@dataclass
class Switched:
    """A prompt that changes at a latent frame; see `video.Condition`."""

    before: Tensor
    after: Tensor
    at: int

    def name(self, frame: int) -> str:
        return "before" if frame < self.at else "after"

    def context(self, frame: int) -> Tensor:
        return self.before if frame < self.at else self.after


class PatternLoop:
    """The tiny model in one pattern, with a batch of `videos` prompts and one seed."""

    def __init__(self, network, pattern: Pattern, videos: int, device, seed: int = 0):
        self.network, self.pattern, self.videos, self.device = network, pattern, videos, torch.device(device)
        self.run = Run(frames=pattern.frames, chunk_frames=pattern.chunk_frames, first_alone=pattern.first_alone, seed=seed)
        self.shape = videos, 16, *(side * pattern.scale for side in LATENT)
        self.prompt, self.start = self._context(seed), None
        if pattern.switch:
            self.prompt = Switched(self.prompt, self._context(seed + 1), pattern.frames // 2)
        if pattern.cut:
            half = pattern.frames // 2
            scenes = [self._loop(Run(frames=half, seed=seed), context).make(PRESETS["off"]).latents for context in
                      (self._context(seed + 1), self._context(seed))]
            self.start = torch.cat([scenes[0][:, :, :half // 2], scenes[1][:, :, half // 2:]], dim=2)
        self.loop = self._loop(self.run, self.prompt, self.start)
        self.truth, _ = self.make(PRESETS["off"])

    @torch.no_grad()
    def _context(self, offset: int) -> list:
        prompts = [embed_prompt(PROMPTS[(number + offset) % len(PROMPTS)]) for number in range(self.videos)]
        return self.network.project_context(torch.cat(prompts).to(self.device))

    def _loop(self, run: Run, prompt, start: Tensor | None = None) -> CausalLoop:
        return CausalLoop(self.network, prompt, run, self.shape, start=start, device=self.device)

    def other_books(self, settings: QVGSettings) -> list[tuple]:
        """The codebooks of K and V of every layer at the end of other videos: other prompts, other seeds, one video for all rows."""
        other = PatternLoop(self.network, self.pattern, self.videos, self.device, seed=1)
        return [tuple(side.book for side in layer.sides) for layer in other.make(settings)[1].layers]

    def make(self, settings: QVGSettings, released: bool = False, books: list[tuple] | None = None) -> tuple[Tensor, KVCache]:
        """The videos, latents [B, 16, F, h, w] float32, and their cache as it stands at the end. released: on the released schedule.
        books: codebooks of K and V of every layer, which then serve for the whole video."""
        cache = self.loop.cache(settings)
        for layer, pair in zip(cache.layers, books or ()):
            layer.life = Lifetime(trained=True, until=sys.maxsize, size=1)
            for side, book in zip(layer.sides, pair):
                side.book = book
        if released:
            cache.layers = [ReleasedLayer(cache, number) for number in range(len(cache.layers))]
        return self.loop.run_with([cache]).latents, cache

    def closeness(self, latents: Tensor) -> Tensor:
        """See `measure.loop.closeness`."""
        return closeness(latents, self.truth)
