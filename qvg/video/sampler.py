"""The chunk-by-chunk loop of autoregressive video, as a generator of events. It knows neither a user interface nor a model.

    model = CachedNetwork(network, [Condition(network.project_context(embedding), cache)])
    sampler = Sampler(model, Run(frames=180), shape=(1, 16, 60, 104))
    for event in sampler:
        ...                                     # StepDone, ChunkDone, Adapted; break to stop, iterate again to continue

Each chunk is denoised over the sigmas while it attends to the history. A final pass over the clean chunk stores it; no other pass stores
anything. Between two steps fresh noise is added (`renoise`), or with the solver "euler" what is left of the chunk's own stays. All noise
comes from generators keyed by seed, chunk and step, so a resumed run needs no random state. Source of the loop: Self-Forcing (arXiv
2506.08009), pipeline/causal_inference.py.

Sigmas need not end in 0. A chunk is then returned at the last sigma, for another run to finish, while later chunks see its denoised
prediction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..backends.memory import ran_out
from .events import Adapted, ChunkDone, Event, StepDone
from .network import Model
from .noise import Renoise, draw_noise, flow_renoise
from .run import Run


class Sampler:
    """One video. Iterating yields events and continues from the present position; the caller's grad mode is left alone.

    shape: (B, C, H, W) of a latent frame. start: given latents [B, C, n, H, W], which are stored in causal chunks.
    noise: [B, C, frames, H, W], scaled by the first sigma, from which each chunk begins; drawn chunk by chunk without it.
    renoise: a function (denoised, sigma, noise) -> x that brings clean latents to a noise level, between two steps and for
    `context_noise`. The default is flow matching's (1 - sigma) * denoised + sigma * noise; for EDM, denoised + sigma * noise.

    frames_done, chunk, last_prompt and recent are the position, which `session` saves. settled is False while a finished chunk is being
    stored: a run interrupted then can continue here, but bit for bit only from an earlier session.
    Raises ValueError if start, noise or sigmas do not fit the run.
    """

    def __init__(self, model: Model, run: Run, shape: Sequence[int], *, start: Tensor | None = None, noise: Tensor | None = None,
                 device="cpu", renoise: Renoise = flow_renoise):
        self.model, self.run, self.shape, self.device = model, run, tuple(shape), torch.device(device)
        self.start, self.noise, self.renoise = start, noise, renoise
        for name, given, fits in (("start", start, lambda n: n <= run.frames), ("noise", noise, lambda n: n == run.frames)):
            if given is not None and not (given.ndim == 5 and self._frame_shape(given) == self.shape and fits(given.shape[2])):
                raise ValueError(f"The {name} has shape {tuple(given.shape)}, which does not fit a video of {run.frames} latent frames of "
                                 f"shape {self.shape} (batch, channels, height, width).")
        if renoise is flow_renoise and run.sigmas[0] > 1:
            raise ValueError(f"The sigmas are {run.listed_sigmas}; a flow model needs sigmas that fall from at most 1. For another noise "
                             "schedule, pass its renoise.")
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
        """Generated chunks of the whole run."""
        given = 0 if self.start is None else self.start.shape[2]
        return self.chunk + self.run.chunk_count(max(given, self.frames_done), self.run.frames)

    # as a decorator, torch disables gradients only while the generator runs, not while it is suspended at a yield
    @torch.no_grad()
    def __iter__(self) -> Iterator[Event]:
        if not self.settled:
            self.model.rewind(self.frames_done)
        yield from self._store_start()
        while self.frames_done < self.run.frames:
            yield from self._make_chunk(next(self.run.chunk_lengths(self.frames_done, self.run.frames)))

    def _store_start(self) -> Iterator[Event]:
        """Store the given start frames that are not stored yet."""
        if self.start is None:
            return
        first = 0
        for length in self.run.start_chunk_lengths(self.start.shape[2]):
            if first == self.frames_done:
                latents = self.start[:, :, first:first + length].to(self.device, torch.float32)
                yield from self._store(latents, first)
                yield self._finish(latents, latents, generated=False)
            first += length

    def _make_chunk(self, length: int) -> Iterator[Event]:
        """Denoise the next chunk and store it."""
        run, first, chunk, chunks = self.run, self.frames_done, self.chunk, self.chunks
        yield from self._switch_prompt(first)
        x = self._draw(length, "start") * run.sigmas[0] if self.noise is None else self._given_noise(length)
        for step, (sigma, following) in enumerate(zip(run.sigmas, run.sigmas[1:])):
            denoised = yield from self._attempt(x, sigma, first, prompt_frame=first, store=False)
            yield StepDone(chunk, chunks, step, run.steps, first, denoised)
            x = self._step(x, denoised, sigma, following, step)
        yield from self._store(denoised, first)
        yield self._finish(x, denoised, generated=True)

    def _step(self, x: Tensor, denoised: Tensor, sigma: float, following: float, step: int) -> Tensor:
        """From noise level sigma to the following one."""
        if following == 0:
            return denoised
        if self.run.solver == "euler":
            # on the straight line to the prediction, of flow matching and of EDM alike
            return denoised + (x - denoised) * (following / sigma)
        return self.renoise(denoised, following, self._draw(x.shape[2], step))

    def _finish(self, latents: Tensor, clean: Tensor, generated: bool) -> ChunkDone:
        """Move the position behind a stored chunk, once nothing else can fail."""
        first, chunk, frames = self.frames_done, self.chunk, latents.shape[2]
        recent = [*self.recent, clean]
        while recent and sum(part.shape[2] for part in recent[1:]) >= self.run.recache_frames:
            del recent[0]
        done = ChunkDone(chunk if generated else None, self.chunks, first, latents, self.model.stats())
        # in one call, so that an interrupt finds either the old position or the new one
        vars(self).update(frames_done=first + frames, chunk=chunk + generated, last_prompt=self.model.prompt(first), recent=recent,
                          settled=True)
        return done

    def _store(self, clean: Tensor, first: int, prompt_frame: int | None = None) -> Iterator[Event]:
        """The pass that adds clean latents to the history, under the prompt of their first frame or of another one."""
        self.settled = False
        level = self.run.context_noise
        context = clean if not level else self.renoise(clean, level, self._draw(clean.shape[2], f"context {first}"))
        yield from self._attempt(context, level, first, prompt_frame=first if prompt_frame is None else prompt_frame, store=True)

    def _switch_prompt(self, first: int) -> Iterator[Event]:
        """Where the prompt changes, store the newest frames again under the new one, from their clean latents."""
        if not self.run.recache_frames or self.last_prompt in (None, self.model.prompt(first)):
            return
        begin, self.settled = first - sum(part.shape[2] for part in self.recent), False
        self.model.rewind(begin)
        for part in self.recent:
            yield from self._store(part, begin, prompt_frame=first)
            begin += part.shape[2]
        self.last_prompt, self.settled = self.model.prompt(first), True

    def _attempt(self, x: Tensor, sigma: float, first: int, *, prompt_frame: int, store: bool) -> Iterator[Event]:
        """One pass of the model. When memory runs out, the pass is repeated after the model has shrunk."""
        while True:
            try:
                return self.model.denoise(x, sigma, first, prompt_frame=prompt_frame, store=store)
            except Exception as error:
                if not ran_out(error):
                    raise
                if store:
                    # some layers have already stored their part
                    self.model.rewind(first)
                given_up = self.model.shrink()
                if given_up is None:
                    raise
            yield Adapted(given_up)

    def _given_noise(self, length: int) -> Tensor:
        return self.noise[:, :, self.frames_done:self.frames_done + length].to(self.device, torch.float32)

    def _draw(self, length: int, step: int | str) -> Tensor:
        """Standard noise [B, C, length, H, W] float32 for a step of the present chunk."""
        return draw_noise(self.run, self.chunk, step, (*self.shape[:2], length, *self.shape[2:]), self.device)
