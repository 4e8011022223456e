"""A walk as a SAMPLER of core: inside a guider's run, with the weights loaded, `qvg.video.world` makes the video chunk by chunk.

World Walk (HY-WorldPlay, QVG) makes one and gives it to a CFGGuider of its own. A run draws its noise itself, chunk by chunk, so the noise
that core passes is not used. Latents of finished chunks are on the CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import comfy.model_management
import comfy.samplers
import torch

from ..qvg import backends
from ..qvg.settings import QVGSettings
from ..qvg.video import Adapted, ChunkDone, Run, Sampler, StepDone, sessions
from ..qvg.video.cameras import CameraPath
from ..qvg.video.progress import Meter
from ..qvg.video.walk_session import WalkSession
from ..qvg.video.world import WorldCondition, WorldModel, walk_cache
from . import live, where
from .adapters.attention import attention_to
from .adapters.worldplay_scene import ComfyScene, WalkMemory
from .long_video import model_name
from .ranks.checks import weights_of
from .ranks.mark import split_of
from .ranks.runs import ComfyLeader
from .ranks.walks import walk_leader
from .run_log import RunLog

# chunks whose reads the finished node lists
LISTED = 12


@dataclass
class Walk:
    """What a run makes. path: a camera for each latent frame. start: latents of the start image [1, C, 1, H, W] in the scale of the VAE.
    recorders: made when sampling starts, called with (sampler, base, session); each has the methods of `session_saver.Saver`."""

    path: CameraPath
    run: Run
    memory: WalkMemory
    cfg: float
    start: torch.Tensor | None
    session: WalkSession | None = None
    recorders: Sequence = ()
    log: RunLog | None = None
    reads: list[str] = field(default_factory=list)


class WalkSampler(comfy.samplers.Sampler):
    """Core calls `sample`."""

    keeps_own_caches = True
    splits_over_gpus = True

    def __init__(self, walk: Walk):
        self.walk = walk

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):
        """noise: [1, C, f, H, W] of one chunk, of which size and device count. Returns the latents of the whole walk [1, C, F, H, W] in the
        network's scale, on the CPU."""
        walk, base, line = self.walk, model_wrap.inner_model, Line()
        with ExitStack() as stack:
            model = stack.enter_context(self._model(model_wrap, extra_args["model_options"].get("transformer_options", {}), noise, line))
            sampler = Sampler(model, walk.run, (*noise.shape[:2], *noise.shape[3:]), device=noise.device)
            stack.enter_context(backends.on_compile(line.write))
            return self._run(sampler, base, callback, line, torch.zeros(*walk.memory.shape))

    @contextmanager
    def _model(self, guider, options: dict, noise, line: Line) -> Iterator[WorldModel | ComfyLeader]:
        """The model of a run, with a cache for each condition. options: transformer_options."""
        walk, base, start = self.walk, guider.inner_model, self.walk.start
        if start is not None:
            start = base.process_latent_in(start).to(noise.device, torch.float32)
        weights, split = weights_of(guider), split_of(guider.model_patcher)
        settings = shared(walk.memory.settings, len(weights))
        if split is not None:
            with walk_leader(guider, split, walk.memory, settings, walk.path, start, line.write) as leader:
                yield leader
            return
        more = {"frames": walk.run.frames, "device": noise.device, "dtype": base.get_dtype_inference(),
                "workspace_limit": walk.memory.reading["workspace_limit"]}
        variant = walk.memory.variant
        conditions = [WorldCondition(
            ComfyScene(base, guider.conds[name][0], walk.path.actions, options, start, variant.starts_with_image),
            walk_cache(settings, walk.memory.geometry, memory=walk.memory.memory, views=variant.views, **more),
            weight) for name, weight in weights.items()]
        try:
            attention = attention_to(options, *(condition.cache for condition in conditions))
            yield WorldModel(conditions, walk.path, memory=walk.memory.memory, views=variant.views, rope=variant.family.rope,
                             attention=attention)
        finally:
            for condition in conditions:
                condition.cache.free()

    def _run(self, sampler: Sampler, base, callback, line: Line, video: torch.Tensor) -> torch.Tensor:
        walk, meter, done = self.walk, Meter(), 0
        if walk.session is not None:
            sessions.restore(walk.session, sampler, model_name(base))
            done = walk.session.frames_done
            video[:, :, :done] = walk.session.latents
        recorders = self._opened(sampler, base)
        try:
            for recorder in recorders if done else ():
                recorder.resume(video[:, :, :done])
            for event in sampler:
                if isinstance(event, ChunkDone):
                    # stored before anything else, which may fail
                    done = event.first + event.latents.shape[2]
                    video[:, :, event.first:done] = event.latents
                    self._finished(sampler, event, recorders, line, video[:, :, :done])
                elif isinstance(event, StepDone):
                    callback(event.chunk * event.steps + event.step, event.denoised, event.denoised, event.chunks * event.steps)
                line.write(event.message if isinstance(event, Adapted) else f"{meter.line(event, sampler)}\n{reads_of(sampler, event)}")
        finally:
            with ExitStack() as stack:
                for recorder in reversed(recorders):
                    stack.callback(line.record, recorder.close, video[:, :, :done])
        return video

    def _finished(self, sampler: Sampler, event: ChunkDone, recorders: list, line: Line, video: torch.Tensor) -> None:
        self.walk.reads.append(reads_of(sampler, event))
        if self.walk.log is not None:
            self.walk.log.note(event.stats)
        for recorder in recorders:
            line.record(recorder.chunk, event, video)

    def _opened(self, sampler: Sampler, base) -> list:
        """The recorders of the session and of the video. Raises ValueError where a file cannot be written."""
        opened = []
        try:
            for make in self.walk.recorders:
                opened.append(make(sampler, base, self.walk.session))
        except BaseException:
            for recorder in opened:
                recorder.release()
            raise
        return opened


class Line:
    """The text on the node that walks."""

    def __init__(self):
        self.place = where.here()

    def write(self, text: str) -> None:
        live.write(self.place, self.place and self.place.node, text)

    def record(self, write, *what) -> None:
        """Call a recorder; a disk error is reported but does not end the walk, which is in memory."""
        try:
            write(*what)
        except OSError as error:
            logging.error("QVG: %s", error)
            self.write(str(error))


def shared(settings: QVGSettings, conditions: int) -> QVGSettings:
    """The settings of each of several caches: an equal share of the memory."""
    return replace(settings, budget_gib=settings.budget_gib / conditions, host_gib=settings.host_gib / conditions)


def reads_of(sampler: Sampler, event: StepDone | ChunkDone) -> str:
    """Which latent frames the chunk reads, as a line of text."""
    return f"chunk {event.chunk + 1} reads {spans(sampler.model.reads)}"


def spans(frames: Sequence[int]) -> str:
    """Latent frames in rising order as text: "latent frames 0-3, 8-19"."""
    found: list[list[int]] = []
    for frame in frames:
        if found and found[-1][1] == frame - 1:
            found[-1][1] = frame
        else:
            found.append([frame, frame])
    return "latent frames " + ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in found) if found else "nothing"


def walk_through(model, positive, negative, walk: Walk, callback) -> torch.Tensor:
    """The latents [1, C, F, H, W] of a walk in the scale of the VAE. callback: core's, called after each step with (step, denoised, x,
    steps) over all chunks."""
    patched, shape = model.clone(), walk.memory.shape
    found = walk.memory.check(comfy.model_management.get_total_memory(model.load_device))
    walk.memory.install(patched)
    guider = comfy.samplers.CFGGuider(patched)
    guider.set_conds(positive, negative)
    guider.set_cfg(walk.cfg)
    if walk.log is not None:
        walk.log.start(walk.run.frames, found)
    # of one chunk, because core copies it to the device three times, however long the walk is
    empty = torch.zeros(*shape[:2], walk.run.chunk_frames, *shape[3:], device=comfy.model_management.intermediate_device())
    try:
        return guider.sample(empty, empty, WalkSampler(walk), torch.tensor(walk.run.sigmas), callback=callback, disable_pbar=True,
                             seed=walk.run.seed)
    finally:
        if walk.log is not None:
            walk.log.end()
