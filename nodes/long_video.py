"""AR Video Sampler (QVG): a SAMPLER that makes long video chunk by chunk, streams it, resumes it, and follows a schedule of prompts.

    QVGARVideoSampler  knobs (+ start LATENT, + QVG_SESSION) -> SAMPLER for SamplerCustom and SamplerCustomAdvanced

The loop is `qvg.video.sampler`; caches and conditions are `adapters.causal`. Save Video Session and Stream Video to File add themselves to
the SAMPLER.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import comfy.model_management
import comfy.samplers
import torch
from comfy_api.latest import io

from ..qvg import backends
from ..qvg.cache.kv_cache import KVCache
from ..qvg.models.wan import WAN
from ..qvg.settings import PRESETS, QVGSettings
from ..qvg.units import GIB
from ..qvg.video import Adapted, ChunkDone, Run, Sampler, StepDone, check_positions, sessions
from ..qvg.video.prepare import MARGIN
from ..qvg.video.progress import Meter
from ..qvg.video.session import Session, fingerprint
from . import live, where
from .adapters.attention import reading
from .adapters.causal import CausalWan, cache_shape
from .adapters.checks import check_size, evaluated
from .adapters.patches import CAUSAL, check_patches
from .memory_check import Memory, check_memory
from .ranks.causal import CausalRun, causal_run
from .ranks.mark import split_of
from .ranks.runs import ComfyLeader
from .run_log import ATTACHMENT
from .session_kinds import check_kind

SessionType = io.Custom("QVG_SESSION")
NOISES = {"Same on every device": "private", "As Sampler AR Video": "core"}


@dataclass(frozen=True)
class Options:
    """Choices of the node and of the nodes that add themselves to its SAMPLER. save: a `session_saver.SaveTo`; stream: a
    `stream.StreamTo`."""

    chunk_frames: int = 3
    first_alone: bool = False
    noise: str = "private"
    context_noise: float = 0.0
    recache_frames: int = 0
    position_limit: int = 0
    auto_budget: bool = False
    keep_partial: bool = True
    start: torch.Tensor | None = None
    session: Session | None = None
    save: object | None = None
    stream: object | None = None
    # id of the node that made this SAMPLER, at the time it was executed
    node_id: str | None = None


class ARSampler(comfy.samplers.Sampler):
    """Core calls `sample`. keeps_own_caches tells the hook of Quantize KV Cache (QVG) that this run does not use the hook's cache."""

    keeps_own_caches = True
    splits_over_gpus = True

    def __init__(self, options: Options):
        self.options = options
        # the hook reads the chunk length here for its forecast
        self.extra_options = {"num_frame_per_block": options.chunk_frames}

    def changed(self, **changes) -> ARSampler:
        return ARSampler(replace(self.options, **changes))

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):
        """noise and latent_image [B, C, F, H, W]. Returns the video, shorter if it was interrupted.

        Raises ValueError before the first step for a graph or a size that cannot work.
        """
        base, options = model_wrap.inner_model, self.options
        self._check(model_wrap, noise, denoise_mask)
        x = base.model_sampling.noise_scaling(sigmas[0], noise, latent_image, self.max_denoise(model_wrap, sigmas))
        log = model_wrap.model_patcher.get_attachment(ATTACHMENT)
        run = Run(frames=x.shape[2], chunk_frames=options.chunk_frames, sigmas=tuple(sigmas.tolist()), seed=extra_args.get("seed") or 0,
                  first_alone=options.first_alone, context_noise=options.context_noise, recache_frames=options.recache_frames,
                  noise=options.noise)
        line, split = StatusLine(options.node_id), split_of(model_wrap.model_patcher)
        # the graph's noise is used where it matters: with core's own noise, or for latents that another pass began
        given = options.noise == "core" or not noise.any() or not self.max_denoise(model_wrap, sigmas)
        with ExitStack() as stack:
            ranks = None if split is None else stack.enter_context(causal_run(model_wrap, split, x.shape, line.write))
            model = stack.enter_context(self._model(model_wrap, extra_args, run, x, ranks))
            stack.enter_context(backends.on_compile(line.write))
            sampler = Sampler(model, run, (*x.shape[:2], *x.shape[3:]), device=x.device, noise=x if given else None,
                              start=None if options.session else self._start(base, model_wrap, x))
            made = self._run(sampler, base, callback, log, x, line)
        return base.model_sampling.inverse_noise_scaling(sigmas[-1], made)

    @contextmanager
    def _model(self, guider, extra_args, run: Run, x: torch.Tensor, ranks: CausalRun | None) -> Iterator[CausalWan | ComfyLeader]:
        """The model of a run, with a cache for each condition. Raises ValueError where the caches do not fit."""
        # each condition that the guider evaluates has a cache, and an equal share of the memory
        share = len(evaluated(guider))
        free = ranks.free if ranks else Memory(*(
            comfy.model_management.get_free_memory(device) // share for device in (x.device, torch.device("cpu"))))
        settings = self._settings(guider.model_patcher.get_attachment(ATTACHMENT), share, free)
        limit = self.options.position_limit
        shape = cache_shape(guider.inner_model, x.shape)
        shape |= reading(settings, extra_args["model_options"], shape["head_dim"])
        if ranks:
            shape |= {"heads": shape["heads"] // ranks.size, "workspace_limit": None}
        check_positions(settings, run, limit)
        check_memory(settings, shape, run, x.device, free)
        if ranks:
            with ranks.model(settings, run, limit) as model:
                yield model
            return
        model = CausalWan(guider, extra_args, lambda: KVCache(
            settings, **shape, rope=WAN.rope, device=x.device, max_frames=run.frames, chunk_frames=run.chunk_frames), limit)
        with model.installed():
            yield model

    @staticmethod
    def _check(guider, noise, denoise_mask) -> None:
        """Raises ValueError for a model, a latent or a patch that does not work chunk by chunk."""
        network = guider.inner_model.diffusion_model
        if denoise_mask is not None:
            raise ValueError("The latent has a noise mask, which does not work chunk by chunk. Remove Set Latent Noise Mask.")
        if noise.ndim != 5 or not hasattr(network, "init_kv_caches"):
            raise ValueError(f"The model is {type(network).__name__} and the latent has {noise.ndim} axes, but this sampler needs a causal "
                             "video model and a latent of 5 axes. Use Load AR Video Model (QVG) and Empty Long Video Latent (QVG).")
        check_size(noise.shape)
        check_patches(guider, CAUSAL)

    def _settings(self, log, share: int, free: Memory) -> QVGSettings:
        """Settings of each of `share` caches: the session's where there is one, else those of Quantize KV Cache (QVG)."""
        session = self.options.session
        settings = session.settings[0] if session else log.settings if log else PRESETS["off"]
        if session is None:
            budget, host = settings.budget_gib / share, settings.host_gib / share
            if self.options.auto_budget:
                budget, host = (part * (1 - MARGIN) / GIB for part in (free.device, free.host if settings.offload else 0))
            return replace(settings, budget_gib=budget, host_gib=host)
        if log is None:
            return settings
        # a session determines what is stored, the graph determines where, and how it is attended to
        return replace(settings, offload=log.settings.offload, host_gib=log.settings.host_gib / share, attention=log.settings.attention)

    def _start(self, base, guider, x) -> torch.Tensor | None:
        """The start latents in the network's scale: this node's, or those of AR Video I2V."""
        start = self.options.start
        if start is None:
            start = guider.model_options.get("transformer_options", {}).get("ar_config", {}).get("initial_latent")
        if start is None:
            return None
        start = base.process_latent_in(start).to(x)
        return start.expand(x.shape[0], *start.shape[1:]) if start.shape[0] == 1 else start

    def _run(self, sampler: Sampler, base, callback, log, x, line: StatusLine) -> torch.Tensor:
        options, video, meter, done = self.options, torch.zeros_like(x), Meter(), 0
        if options.session is not None:
            made = _resume(options.session, sampler, base)
            done = made.shape[2]
            video[:, :, :done] = made
        recorders = self._opened(sampler, base)
        try:
            for recorder in recorders if done else ():
                recorder.resume(video[:, :, :done])
            try:
                for event in sampler:
                    if isinstance(event, ChunkDone):
                        # stored before anything else, which may fail
                        done = event.first + event.latents.shape[2]
                        video[:, :, event.first:done] = event.latents
                    self._tell(event, sampler, meter, callback, video, line)
                    if isinstance(event, ChunkDone):
                        if log is not None:
                            log.note(event.stats)
                        for recorder in recorders:
                            self._record(line, recorder.chunk, event, video[:, :, :done])
            except comfy.model_management.InterruptProcessingException:
                if not options.keep_partial or not done:
                    line.write("Stopped.")
                    raise
                line.continues(done, x.shape[2])
        finally:
            with ExitStack() as stack:
                for recorder in reversed(recorders):
                    stack.callback(self._record, line, recorder.close, video[:, :, :done])
        return video[:, :, :done]

    def _opened(self, sampler: Sampler, base) -> list:
        """The recorders of the video and of the session. Raises ValueError where a file cannot be written."""
        recorders = []
        try:
            for part in (self.options.save, self.options.stream):
                if part is not None:
                    recorders.append(part.open(sampler, base, self.options.session))
        except BaseException:
            for recorder in recorders:
                recorder.release()
            raise
        return recorders

    @staticmethod
    def _record(line: StatusLine, write, *what) -> None:
        """Call a recorder; a disk error is reported but does not end the video, which is in memory."""
        try:
            write(*what)
        except OSError as error:
            logging.error("QVG: %s", error)
            line.write(str(error))

    @staticmethod
    def _tell(event, sampler: Sampler, meter: Meter, callback, video, line: StatusLine) -> None:
        """Report progress over all chunks and steps, a preview of the newest frames, and a status line."""
        if isinstance(event, StepDone) and callback is not None:
            total = event.chunks * event.steps
            at = event.chunk * event.steps + event.step
            shown = event.denoised
            if at == total - 1:
                # core returns what the last call shows as denoised_output
                shown = torch.cat([video[:, :, :event.first], shown], 2)
            callback(at, shown, shown, total)
        line.write(event.message if isinstance(event, Adapted) else meter.line(event, sampler) if event.chunk is not None else "")


class StatusLine:
    """The text on the AR Video Sampler (QVG) of the graph being executed. made_by: the node that made the SAMPLER, whose id may have
    changed since."""

    def __init__(self, made_by: str | None):
        self.place = where.here()
        self.node = self.place and where.sampler_of(self.place, made_by)

    def write(self, text: str) -> None:
        live.write(self.place, self.node, text)

    def continues(self, done: int, total: int) -> None:
        """The run was stopped, and the graph continues with the finished frames."""
        self.write(f"Stopped. The {done} finished latent frames, of {total}, continue through the graph. Press Stop again to end "
                   "immediately.")
        live.tell_partial(self.place, done, total)


def _resume(session: Session, sampler: Sampler, base) -> torch.Tensor:
    """Restore the sampler and return the latents made so far."""
    sessions.restore(session, sampler, model_name(base))
    return session.latents.to(sampler.device)


def model_name(base, patcher=None) -> str:
    """The fingerprint of a loaded BaseModel's network, without the weights that LoRAs change. patcher: the one with the LoRAs, by default
    the current one."""
    patched = {key.removeprefix("diffusion_model.") for key in getattr(patcher or base.current_patcher, "patches", {})}
    return fingerprint(base.diffusion_model, patched)


class QVGARVideoSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QVGARVideoSampler", display_name="AR Video Sampler (QVG)", category="QuantVideoGen",
            description="Makes long video chunk by chunk: any length, any cfg, prompts at given times, from images, a video or a saved "
                        "session.",
            search_aliases=["qvg", "long video", "autoregressive", "self forcing", "causal forcing", "continue video", "resume"],
            inputs=[
                io.Int.Input("chunk_frames", default=3, min=1, max=64,
                             tooltip="Latent frames per chunk. Use what the model was trained with: 3 for Self-Forcing, 1 for frame-wise "
                                     "models."),
                io.Latent.Input("start", optional=True,
                                tooltip="Latents of an image or a video to continue. They are stored in causal chunks and are the "
                                        "beginning of the result."),
                SessionType.Input("session", optional=True, tooltip="A saved video to continue, from Load Video Session (QVG)."),
                io.Boolean.Input("auto_budget", default=False, optional=True,
                                 tooltip="Set the cache's memory budget to what is free now, less a margin: when it is full, the oldest "
                                         "frames lose bits and then are dropped, instead of an error. Default: off."),
                io.Boolean.Input("keep_partial", default=True, optional=True,
                                 tooltip="When interrupted, continue the graph with the finished frames. Default: on."),
                io.Int.Input("recache_frames", default=0, min=0, max=1000, optional=True, advanced=True,
                             tooltip="Newest latent frames to store again when the prompt changes, so that the new prompt takes effect "
                                     "immediately. 0 keeps the history as it is."),
                io.Boolean.Input("first_alone", default=False, optional=True, advanced=True,
                                 tooltip="The first latent frame is a chunk of its own. Default: off."),
                io.Int.Input("position_limit", default=0, min=0, max=100000, optional=True, advanced=True,
                             tooltip="Latent frames that the model was trained on (21 for Self-Forcing). Positions grow no further than "
                                     "this; needs a window in QVG Settings. 0 is no limit."),
                io.Float.Input("context_noise", default=0.0, min=0.0, max=0.99, step=0.01, optional=True, advanced=True,
                               tooltip="Noise level at which finished chunks are stored: 0 for all released models."),
                io.Combo.Input("noise", options=list(NOISES), default="Same on every device", optional=True, advanced=True,
                               tooltip="'As Sampler AR Video' draws the same noise as ComfyUI's sampler for the same seed. Default: Same "
                                       "on every device."),
            ],
            outputs=[io.Sampler.Output(display_name="sampler", tooltip="For SamplerCustom or SamplerCustomAdvanced.")],
            hidden=[io.Hidden.unique_id])

    @classmethod
    def execute(cls, chunk_frames, start=None, session=None, auto_budget=False, keep_partial=True, recache_frames=0, first_alone=False,
                position_limit=0, context_noise=0.0, noise="Same on every device") -> io.NodeOutput:
        check_kind(session, Session)
        return io.NodeOutput(ARSampler(Options(
            chunk_frames=chunk_frames, first_alone=first_alone, noise=NOISES[noise], context_noise=context_noise,
            recache_frames=recache_frames, position_limit=position_limit, auto_budget=auto_budget, keep_partial=keep_partial,
            start=None if start is None else start["samples"], session=session, node_id=cls.hidden.unique_id)))
