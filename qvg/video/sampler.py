"""The chunk-by-chunk loop of autoregressive video, as a generator of events. It knows no user interface and no model.

    model = CachedNetwork(network, [Condition(network.project_context(embedding), cache)])
    sampler = Sampler(model, Run(frames=180), shape=(1, 16, 60, 104))
    for event in sampler:
        ...                                     # StepDone, ChunkDone, Adapted; leave the loop to stop, iterate again to go on

Each chunk is denoised over the sigmas while it reads what is behind it, then passes once more, clean, and only that pass stores. Between
two steps comes fresh noise: x = (1 - sigma) * denoised + sigma * noise. All noise is drawn from generators keyed by seed, chunk and step,
so it is the same on every device, a resumed run needs no random state, and the global one is never touched. `Run(noise="core")` draws as
ComfyUI's sample_ar_video does. Source of the loop: Self-Forcing (arXiv 2506.08009), pipeline/causal_inference.py.

Sigmas need not end in 0: a chunk then leaves the loop at the last sigma, for another pass to finish it, while the chunks after it see
its denoised prediction.

A model is anything with the methods of `Model`; `CachedNetwork` makes one of a network that asks `attend` for its self-attention.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..attention.cached import Attention, CachedAttention, sdpa
from ..backends.memory import ran_out
from ..cache import budget
from ..cache.kv_cache import SEEDS, CacheStats, KVCache, shrink
from ..settings import QVGSettings

# four steps at shift 5, what Self-Forcing was distilled to
SELF_FORCING_SIGMAS = (1.0, 0.9375, 5 / 6, 0.625, 0.0)
TIMESTEPS = 1000
NOISES = ("private", "core")
# almost three days of video
MAX_FRAMES = 1_000_000
MAX_CHUNK, MAX_SIGMAS = 256, 10_001


@dataclass(frozen=True)
class Run:
    """What a run is. Two runs with equal fields over equal weights and settings make equal videos.

    frames: latent frames of the whole video, given start frames included.
    chunk_frames: latent frames made at a time. first_alone: the first frame is a chunk by itself.
    sigmas: falling from at most 1; chunks are finished where the last is 0.
    context_noise: noise level of a finished chunk in the pass that stores it, 0 to below 1.
    recache_frames: newest latent frames that are stored anew when the prompt changes (LongLive, arXiv 2509.22622); 0 stores none.
    noise: "private" (equal on every device) or "core" (ComfyUI's own per-step seeds on the latents' device).
    Raises ValueError for a value outside these limits.
    """

    frames: int
    chunk_frames: int = 3
    sigmas: tuple[float, ...] = SELF_FORCING_SIGMAS
    seed: int = 0
    first_alone: bool = False
    context_noise: float = 0.0
    recache_frames: int = 0
    noise: str = "private"

    def __post_init__(self):
        object.__setattr__(self, "sigmas", tuple(map(float, self.sigmas)))
        # what a session can hold; one that cannot be read again is noticed when hours have gone into it
        for name, least, most in (("frames", 1, MAX_FRAMES), ("chunk_frames", 1, MAX_CHUNK), ("recache_frames", 0, MAX_FRAMES),
                                  ("seed", 0, 2**64 - 1)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise ValueError(f"{name} is {value!r}; it must be a whole number, at least {least} and at most {most}.")
        if type(self.first_alone) is not bool:
            raise ValueError(f"first_alone is {self.first_alone!r}; it must be true or false.")
        falling = all(high > low for high, low in zip(self.sigmas, self.sigmas[1:]))
        if not 2 <= len(self.sigmas) <= MAX_SIGMAS or not falling or self.sigmas[0] > 1 or self.sigmas[-1] < 0:
            raise ValueError(f"The sigmas are {', '.join(f'{sigma:g}' for sigma in self.sigmas) or 'empty'}; give 2 to "
                             f"{MAX_SIGMAS} that fall from at most 1 to at least 0.")
        if not 0 <= self.context_noise < 1:
            raise ValueError(f"context_noise is {self.context_noise:g}; it must be at least 0 and below 1.")
        if self.noise not in NOISES:
            raise ValueError(f"noise is {self.noise!r}; choose one of {', '.join(NOISES)}.")

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def pieces(self, first: int, stop: int) -> Iterator[int]:
        """Lengths of the chunks made from frame `first` to `stop`; the last is shorter where they do not divide."""
        while first < stop:
            length = 1 if self.first_alone and not first else min(self.chunk_frames, stop - first)
            yield length
            first += length

    def count(self, first: int, stop: int) -> int:
        """How many `pieces` there are."""
        alone = bool(self.first_alone and not first and stop)
        return alone + -(-max(0, stop - first - alone) // self.chunk_frames)

    def given_pieces(self, frames: int) -> list[int]:
        """Lengths of the chunks that given start frames are stored in: an odd remainder first, as a start image stands alone."""
        remainder = frames % self.chunk_frames
        return [remainder] * bool(remainder) + [self.chunk_frames] * (frames // self.chunk_frames)


@dataclass(frozen=True)
class StepDone:
    """A denoising step of generated chunk `chunk` of `chunks`, whose first latent frame is `first`; denoised [B, C, f, H, W]."""

    chunk: int
    chunks: int
    step: int
    steps: int
    first: int
    denoised: Tensor


@dataclass(frozen=True)
class ChunkDone:
    """Latents [B, C, f, H, W] that are final, and stored. chunk is None for given start frames."""

    chunk: int | None
    chunks: int
    first: int
    latents: Tensor
    stats: CacheStats | None


@dataclass(frozen=True)
class Adapted:
    """Memory did not suffice; what was given up so that the run goes on, as a sentence."""

    message: str


Event = StepDone | ChunkDone | Adapted


class Model(Protocol):
    """What the loop asks for. caches: all that it fills, for `storage`."""

    caches: list[KVCache]

    def denoise(self, x: Tensor, sigma: float, first: int, *, at: int, store: bool) -> Tensor:
        """Predict the clean latents of x [B, C, f, H, W], which starts at latent frame `first`, under the prompt of frame `at`.
        With `store`, the pass is kept as history and what it returns is not used."""

    def prompt(self, frame: int) -> str:
        """What names the prompt at a latent frame; another name is another prompt."""

    def rewind(self, first: int) -> None:
        """Forget the history from latent frame `first` on."""

    def shrink(self) -> str | None:
        """Give up something to need less memory, and say what; None when nothing is left to give."""

    def stats(self) -> CacheStats | None: ...


class Sampler:
    """One video. Iterating yields events and goes on from where the video stands.

    shape: (B, C, H, W) of a latent frame. start: latents [B, C, n, H, W] that are given; they are stored in causal chunks.
    noise: [B, C, frames, H, W] at the scale of the first sigma, to begin each chunk with; drawn chunk by chunk without it.
    frames_done, chunk, last_prompt and recent are the position, which `storage` keeps. settled: false while finished latents are being
    stored; a run that is broken off then goes on from here, but bit for bit only from an earlier session.
    Raises ValueError when start or noise does not fit the run.
    """

    def __init__(self, model: Model, run: Run, shape: Sequence[int], *, start: Tensor | None = None, noise: Tensor | None = None,
                 device="cpu"):
        self.model, self.run, self.shape, self.device = model, run, tuple(shape), torch.device(device)
        self.start, self.noise = start, noise
        for name, given, fits in (("start", start, lambda n: n <= run.frames), ("noise", noise, lambda n: n == run.frames)):
            if given is not None and not (given.ndim == 5 and self._frame_shape(given) == self.shape and fits(given.shape[2])):
                raise ValueError(f"The {name} has shape {tuple(given.shape)}, which does not fit a video of {run.frames} latent frames of "
                                 f"shape {self.shape} (batch, channels, height, width).")
        self.frames_done = 0
        self.chunk = 0
        self.last_prompt: str | None = None
        self.recent: list[Tensor] = []
        self.settled = True

    @staticmethod
    def _frame_shape(x: Tensor) -> tuple[int, ...]:
        return (*x.shape[:2], *x.shape[3:])

    @property
    def chunks(self) -> int:
        """Generated chunks, those to come included."""
        given = 0 if self.start is None else self.start.shape[2]
        return self.chunk + self.run.count(max(given, self.frames_done), self.run.frames)

    def __iter__(self) -> Iterator[Event]:
        with torch.no_grad():
            if not self.settled:
                self.model.rewind(self.frames_done)
            yield from self._given()
            while self.frames_done < self.run.frames:
                yield from self._make_chunk(next(self.run.pieces(self.frames_done, self.run.frames)))

    def _given(self) -> Iterator[Event]:
        if self.start is None:
            return
        at = 0
        for length in self.run.given_pieces(self.start.shape[2]):
            if at == self.frames_done:
                latents = self.start[:, :, at:at + length].to(self.device, torch.float32)
                yield from self._store(latents, at)
                yield self._finish(latents, latents, generated=False)
            at += length

    def _make_chunk(self, length: int) -> Iterator[Event]:
        run, first, chunk, chunks = self.run, self.frames_done, self.chunk, self.chunks
        yield from self._switch_prompt(first)
        x = self._draw(length, "start") * run.sigmas[0] if self.noise is None else self._begin(length)
        for step, (sigma, following) in enumerate(zip(run.sigmas, run.sigmas[1:])):
            denoised = yield from self._attempt(x, sigma, first, at=first, store=False)
            yield StepDone(chunk, chunks, step, run.steps, first, denoised)
            x = denoised if following == 0 else (1.0 - following) * denoised + following * self._draw(length, step)
        yield from self._store(denoised, first)
        yield self._finish(x, denoised, generated=True)

    def _finish(self, latents: Tensor, clean: Tensor, generated: bool) -> ChunkDone:
        """Move the position behind a stored chunk, once nothing else can fail."""
        first, chunk, frames = self.frames_done, self.chunk, latents.shape[2]
        recent = [*self.recent, clean]
        while recent and sum(part.shape[2] for part in recent[1:]) >= self.run.recache_frames:
            del recent[0]
        done = ChunkDone(chunk if generated else None, self.chunks, first, latents, self.model.stats())
        # at once, so that an interrupt finds the old position or the new one
        vars(self).update(frames_done=first + frames, chunk=chunk + generated, last_prompt=self.model.prompt(first), recent=recent,
                          settled=True)
        return done

    def _store(self, clean: Tensor, first: int, at: int | None = None) -> Iterator[Event]:
        self.settled = False
        level = self.run.context_noise
        context = clean if not level else (1.0 - level) * clean + level * self._draw(clean.shape[2], f"context {first}")
        yield from self._attempt(context, level, first, at=first if at is None else at, store=True)

    def _switch_prompt(self, first: int) -> Iterator[Event]:
        """Where the prompt changes, store the newest frames anew under the new one, from the clean latents."""
        if not self.run.recache_frames or self.last_prompt in (None, self.model.prompt(first)):
            return
        begin, self.settled = first - sum(part.shape[2] for part in self.recent), False
        self.model.rewind(begin)
        for part in self.recent:
            yield from self._store(part, begin, at=first)
            begin += part.shape[2]
        self.last_prompt, self.settled = self.model.prompt(first), True

    def _attempt(self, x: Tensor, sigma: float, first: int, *, at: int, store: bool) -> Iterator[Event]:
        """One pass of the model; where memory does not suffice, again with less of it."""
        while True:
            try:
                return self.model.denoise(x, sigma, first, at=at, store=store)
            except Exception as error:
                if not ran_out(error):
                    raise
                if store:
                    # the layers that the pass reached have stored their part
                    self.model.rewind(first)
                given_up = self.model.shrink()
                if given_up is None:
                    raise
            yield Adapted(given_up)

    def _begin(self, length: int) -> Tensor:
        return self.noise[:, :, self.frames_done:self.frames_done + length].to(self.device, torch.float32)

    def _draw(self, length: int, step: int | str) -> Tensor:
        """Standard noise [B, C, length, H, W] float32 for a step of the present chunk."""
        shape = (*self.shape[:2], length, *self.shape[2:])
        if self.run.noise == "core" and isinstance(step, int):
            generator = torch.Generator(self.device).manual_seed((self.run.seed + self.chunk * 1000 + step) % SEEDS)
            return torch.randn(shape, generator=generator, device=self.device)
        digest = hashlib.blake2b(f"{self.run.seed}/{self.chunk}/{step}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        return torch.randn(shape, generator=generator).to(self.device)


def check_positions(settings: QVGSettings, run: Run, position_limit: int) -> None:
    """Raises ValueError where a history reaches further than a position limit lets it: its frames would take the places of sinks."""
    most = budget.capacity_frames(settings, run.chunk_frames, run.frames, None)
    if position_limit and most > position_limit:
        raise ValueError(f"A pass sees up to {most} latent frames, but positions are limited to {position_limit}. Set a window of at most "
                         f"{max(0, position_limit - settings.sink_frames - 2 * run.chunk_frames + 1)} frames.")


@dataclass
class Condition:
    """One side of guidance: a prompt, the cache that its passes fill, and the weight of its prediction.

    prompt: what the network takes as context, or an object with `name(frame)` and `context(frame)` (see `schedule.PromptTrack`).
    """

    prompt: Any
    cache: KVCache
    weight: float = 1.0

    def name(self, frame: int) -> str:
        return self.prompt.name(frame) if hasattr(self.prompt, "name") else ""

    def context(self, frame: int):
        return self.prompt.context(frame) if hasattr(self.prompt, "context") else self.prompt


def guided(prompt, cache: KVCache, negative, negative_cache: KVCache, cfg: float) -> list[Condition]:
    """The two conditions of classifier-free guidance: negative + cfg * (prompt - negative)."""
    return [Condition(prompt, cache, cfg), Condition(negative, negative_cache, 1.0 - cfg)]


class CachedNetwork:
    """A `Model` of a network with Wan's forward(x, timestep, context, attend) that predicts the flow, and a cache for each condition.

    The weights of the conditions add up to 1. attention: what computes attention, torch's by default. position_limit: see
    `CachedAttention`.
    Raises ValueError where two conditions share a cache or the weights do not add up.
    """

    def __init__(self, network: nn.Module, conditions: Sequence[Condition], *, attention: Attention = sdpa,
                 position_limit: int = 0):
        self.network, self.conditions = network, list(conditions)
        self.caches = [condition.cache for condition in self.conditions]
        self.attention, self.position_limit = attention, position_limit
        for cache in self.caches:
            cache.said = self.caches[0].said  # one warning a run
        if len({id(cache) for cache in self.caches}) < len(self.caches):
            raise ValueError("Two conditions share a KV cache, but keys and values depend on the prompt; give each its own.")
        total = sum(condition.weight for condition in self.conditions)
        if abs(total - 1) > 1e-6:
            raise ValueError(f"The weights of the conditions add up to {total:g}; they must add up to 1.")

    def denoise(self, x: Tensor, sigma: float, first: int, *, at: int, store: bool) -> Tensor:
        batch, frames = x.shape[0], x.shape[2]
        timestep = torch.full((batch, frames), TIMESTEPS * sigma, device=x.device)
        mixed = None
        for condition in self.conditions:
            attend = CachedAttention(condition.cache, start_frame=first, frames=frames, store=store, attention=self.attention,
                                     position_limit=self.position_limit)
            flow = self.network(x, timestep, condition.context(at), attend)
            denoised = (x - sigma * flow.float()) * condition.weight
            mixed = denoised if mixed is None else mixed + denoised
        return mixed

    def prompt(self, frame: int) -> str:
        return "\n".join(condition.name(frame) for condition in self.conditions)

    def rewind(self, first: int) -> None:
        for cache in self.caches:
            cache.rewind(first)

    def shrink(self) -> str | None:
        return shrink(self.caches)

    def stats(self) -> CacheStats:
        return CacheStats.total([cache.stats() for cache in self.caches])
