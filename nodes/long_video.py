"""Long video: a SAMPLER that streams, remembers, resumes and takes its prompts by the clock, and an empty latent of any length.

    QVGARVideoSampler        knobs (+ start LATENT, + QVG_SESSION) -> SAMPLER for SamplerCustom and SamplerCustomAdvanced
    QVGEmptyLongVideoLatent  seconds (+ VAE) -> LATENT
    QVGPromptSchedule        CLIP, "0s: ...  6.5s: ..." -> CONDITIONING
    QVGPromptAt              CONDITIONING, CONDITIONING, seconds -> CONDITIONING

The loop is `qvg.video.sampler`; what a condition keeps is `adapters.causal`. Save Video Session and Stream Video to File put themselves
into the SAMPLER.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass, replace

import comfy.model_management
import comfy.samplers
import torch
from comfy_api.latest import io

from ..qvg.attention.rope import Rope
from ..qvg.backends import dispatch
from ..qvg.cache.budget import Geometry, buffers_on
from ..qvg.cache.forecast import forecast
from ..qvg.cache.kv_cache import KVCache
from ..qvg.settings import PRESETS, QVGSettings
from ..qvg.units import GIB, format_bytes
from ..qvg.video import Adapted, ChunkDone, Run, Sampler, Schedule, StepDone, check_positions, first_frame, latent_frames
from ..qvg.video.generate import MARGIN, Meter
from ..qvg.video.session import Session, fingerprint
from . import live, where
from .adapters.causal import SCHEDULE, CausalWan, cache_shape
from .adapters.checks import check_size, evaluated
from .adapters.patches import CAUSAL, check_patches
from .run_log import ATTACHMENT

SessionType = io.Custom("QVG_SESSION")
NOISES = {"Same on every device": "private", "As Sampler AR Video": "core"}


@dataclass(frozen=True)
class Options:
    """What the node and those that put themselves into its SAMPLER choose. save: a `session.SaveTo`; stream: a `stream.StreamTo`."""

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
    # of the node that made this SAMPLER, as it was when that was executed
    node_id: str | None = None


class ARSampler(comfy.samplers.Sampler):
    """Core calls `sample`. keeps_own_caches tells the hook of Quantize KV Cache (QVG) that its own cache is not used in this run."""

    keeps_own_caches = True

    def __init__(self, options: Options):
        self.options = options
        # where the hook looks for the chunk size, for its forecast
        self.extra_options = {"num_frame_per_block": options.chunk_frames}

    def changed(self, **changes) -> ARSampler:
        return ARSampler(replace(self.options, **changes))

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):
        """noise and latent_image [B, C, F, H, W]; returns the video, shorter when it was interrupted."""
        base, options = model_wrap.inner_model, self.options
        if denoise_mask is not None:
            raise ValueError("The latent has a noise mask, which a video made chunk by chunk cannot follow. Remove Set Latent Noise Mask.")
        if noise.ndim != 5 or not hasattr(base.diffusion_model, "init_kv_caches"):
            raise ValueError(f"{type(base.diffusion_model).__name__} with a latent of {noise.ndim} axes is no autoregressive video. Load "
                             "the model with Load AR Video Model (QVG) and connect Empty Long Video Latent (QVG).")
        check_size(noise.shape)
        check_patches(model_wrap, CAUSAL)
        x = base.model_sampling.noise_scaling(sigmas[0], noise, latent_image, self.max_denoise(model_wrap, sigmas))
        session, log = options.session, model_wrap.model_patcher.get_attachment(ATTACHMENT)
        settings = session.settings[0] if session else log.settings if log else PRESETS["off"]
        run = Run(frames=x.shape[2], chunk_frames=options.chunk_frames, sigmas=tuple(sigmas.tolist()), seed=extra_args.get("seed") or 0,
                  first_alone=options.first_alone, context_noise=options.context_noise, recache_frames=options.recache_frames,
                  noise=options.noise)
        # each prompt that the guider weighs has its share
        count = len(evaluated(model_wrap))
        free, free_host = (comfy.model_management.get_free_memory(device) // count for device in (x.device, torch.device("cpu")))
        if session is None:
            budget, host = settings.budget_gib / count, settings.host_gib / count
            if options.auto_budget:
                budget, host = (part * (1 - MARGIN) / GIB for part in (free, free_host if settings.offload else 0))
            settings = replace(settings, budget_gib=budget, host_gib=host)
        elif log:
            # a session says what is stored, the graph where
            settings = replace(settings, offload=log.settings.offload, host_gib=log.settings.host_gib / count)
        check_positions(settings, run, options.position_limit)
        shape = cache_shape(base, x.shape)
        _check_memory(settings, shape, run, x.device, free, free_host)
        model = CausalWan(model_wrap, extra_args, lambda: KVCache(
            settings, **shape, rope=Rope, device=x.device, max_frames=run.frames, chunk_frames=run.chunk_frames), options.position_limit)
        # the frames that the graph drew are taken where they mean something: core's own noise, or latents that another pass began
        given = options.noise == "core" or not noise.any() or not self.max_denoise(model_wrap, sigmas)
        sampler = Sampler(model, run, (*x.shape[:2], *x.shape[3:]), device=x.device, noise=x if given else None,
                          start=None if session else self._start(base, model_wrap, x))
        line = StatusLine(options.node_id)
        with model.installed(), dispatch.on_compile(line.write):
            made = self._run(sampler, base, callback, log, x, line)
        return base.model_sampling.inverse_noise_scaling(sigmas[-1], made)

    def _start(self, base, guider, x) -> torch.Tensor | None:
        """The latents to begin with, as the network reads them: this node's, or those of AR Video I2V."""
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
                        # kept before anything else, which may fail
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
                line.goes_on(done, x.shape[2])
        finally:
            with ExitStack() as stack:
                for recorder in reversed(recorders):
                    stack.callback(self._record, line, recorder.close, video[:, :, :done])
        return video[:, :, :done]

    def _opened(self, sampler: Sampler, base) -> list:
        """What writes the video and the session. Raises ValueError where a place cannot be used."""
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
        """A disk that refuses does not end the video, which is in memory."""
        try:
            write(*what)
        except OSError as error:
            logging.error("QVG: %s", error)
            line.write(str(error))

    @staticmethod
    def _tell(event, sampler: Sampler, meter: Meter, callback, video, line: StatusLine) -> None:
        """Progress over all chunks and steps, a preview of the newest frames, and a line on the node."""
        if isinstance(event, StepDone) and callback is not None:
            total = event.chunks * event.steps
            at = event.chunk * event.steps + event.step
            shown = event.denoised
            if at == total - 1:
                # core gives out what the last call shows as denoised_output
                shown = torch.cat([video[:, :, :event.first], shown], 2)
            callback(at, shown, shown, total)
        line.write(event.message if isinstance(event, Adapted) else meter.line(event, sampler) if event.chunk is not None else "")


class StatusLine:
    """What the AR Video Sampler (QVG) of the graph being executed shows. made_by: the node that made the SAMPLER, whose id may be another
    by now."""

    def __init__(self, made_by: str | None):
        self.place = where.here()
        self.node = self.place and where.sampler_of(self.place, made_by)

    def write(self, text: str) -> None:
        live.write(self.place, self.node, text)

    def goes_on(self, done: int, total: int) -> None:
        """The run was stopped, and the graph goes on with what is finished."""
        self.write(f"Stopped. The {done} latent frames that are finished, of {total}, go on through the graph. Press Stop again to end at "
                   "once.")
        live.tell_partial(self.place, done, total)


def _resume(session: Session, sampler: Sampler, base) -> torch.Tensor:
    """Restore the sampler; the latents made so far."""
    session.restore(sampler, model_name(base))
    return session.latents.to(sampler.device)


def model_name(base, patcher=None) -> str:
    """The fingerprint of a BaseModel's network that is loaded, LoRAs left out where they are added to the weights.
    patcher: whose LoRAs they are; during a run, that of the run."""
    patched = {key.removeprefix("diffusion_model.") for key in getattr(patcher or base.current_patcher, "patches", {})}
    return fingerprint(base.diffusion_model, patched)


def _check_memory(settings: QVGSettings, shape: dict, run: Run, device, free: int, free_host: int) -> None:
    """Raises ValueError before the first step where a cache cannot fit into `free` bytes (and offloaded spans into `free_host`), with the
    choices that would."""
    shape = dict(shape, buffers=buffers_on(device.type, shape["heads"]))
    itemsize, geometry = shape.pop("dtype").itemsize, Geometry(**shape)

    def planned(settings: QVGSettings, frames: int = run.frames):
        return forecast(settings, geometry, frames, run.chunk_frames, itemsize=itemsize)

    def fits(settings: QVGSettings, frames: int = run.frames) -> bool:
        try:
            found = planned(settings, frames)
        except ValueError:
            return False
        return found.peak_bytes <= free and found.host_bytes <= free_host

    def most(fits) -> int:
        """The largest number of whole chunks that fits, as frames."""
        low, high = 0, run.frames // run.chunk_frames
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle * run.chunk_frames) else (low, middle - 1)
        return low * run.chunk_frames

    if fits(settings):
        return
    needed = planned(settings)
    place = "" if needed.peak_bytes > free else " of host memory"
    bytes_needed, bytes_free = (needed.peak_bytes, free) if needed.peak_bytes > free else (needed.host_bytes, free_host)
    ways = []
    if names := [name.capitalize() for name in PRESETS if fits(replace(PRESETS[name], offload=settings.offload))]:
        ways.append(f"the preset {' or '.join(names)} in QVG Settings")
    if not settings.offload and fits(replace(settings, offload=True)):
        ways.append("offload in QVG Settings")
    if window := most(lambda frames: fits(replace(settings, window_frames=frames))):
        ways.append(f"window_frames of at most {window} in QVG Settings")
    if fits(replace(settings, budget_gib=free * (1 - MARGIN) / GIB, host_gib=free_host * (1 - MARGIN) / GIB if settings.offload else 0.0)):
        ways.append("auto_budget in AR Video Sampler (QVG)")
    if frames := most(lambda frames: fits(settings, frames)):
        ways.append(f"a video of at most {frames} latent frames")
    raise ValueError(f"The KV cache of {run.frames} latent frames needs {format_bytes(bytes_needed)}{place}, but it can have "
                     f"{format_bytes(bytes_free)}. {'Any of these fits: ' + '; '.join(ways) if ways else 'Choose a smaller picture'}.")


class QVGARVideoSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QVGARVideoSampler", display_name="AR Video Sampler (QVG)", category="QuantVideoGen",
            description="Makes long video chunk by chunk: any length, any cfg, prompts by the clock, from a start or a saved session.",
            search_aliases=["qvg", "long video", "autoregressive", "self forcing", "causal forcing", "continue video", "resume"],
            inputs=[
                io.Int.Input("chunk_frames", default=3, min=1, max=64,
                             tooltip="Latent frames made at a time. It must be what the model was trained for: 3 for Self-Forcing, 1 for "
                                     "framewise models."),
                io.Latent.Input("start", optional=True,
                                tooltip="Latents of an image or a video to go on from. They are stored in causal chunks and are the "
                                        "beginning of the result."),
                SessionType.Input("session", optional=True, tooltip="A video to go on with, from Load Video Session (QVG)."),
                io.Boolean.Input("auto_budget", default=False, optional=True,
                                 tooltip="Let the KV cache take what memory is free now, less a margin: when it is full, the oldest frames "
                                         "lose bits and then leave, instead of an error. Default: off."),
                io.Boolean.Input("keep_partial", default=True, optional=True,
                                 tooltip="On interrupt, go on through the graph with the frames that are finished. Default: on."),
                io.Int.Input("recache_frames", default=0, min=0, max=1000, optional=True, advanced=True,
                             tooltip="Newest latent frames that are stored anew when the prompt changes, so that the new prompt takes hold "
                                     "at once. 0 keeps the history as it is."),
                io.Boolean.Input("first_alone", default=False, optional=True, advanced=True,
                                 tooltip="The first latent frame is a chunk by itself. Default: off."),
                io.Int.Input("position_limit", default=0, min=0, max=100000, optional=True, advanced=True,
                             tooltip="Latent frames that the model was trained on (21 for Self-Forcing). Beyond it positions no longer "
                                     "grow; needs a window in QVG Settings. 0 counts on."),
                io.Float.Input("context_noise", default=0.0, min=0.0, max=0.99, step=0.01, optional=True, advanced=True,
                               tooltip="Noise level at which finished chunks are stored. 0 for all released models."),
                io.Combo.Input("noise", options=list(NOISES), default="Same on every device", optional=True, advanced=True,
                               tooltip="'As Sampler AR Video' draws the same numbers as core's sampler for the same seed. "
                                       "Default: Same on every device."),
            ],
            outputs=[io.Sampler.Output(display_name="sampler", tooltip="For SamplerCustom or SamplerCustomAdvanced.")],
            hidden=[io.Hidden.unique_id])

    @classmethod
    def execute(cls, chunk_frames, start=None, session=None, auto_budget=False, keep_partial=True, recache_frames=0, first_alone=False,
                position_limit=0, context_noise=0.0, noise="Same on every device") -> io.NodeOutput:
        if session is not None and not isinstance(session, Session):
            raise ValueError(f"{session.path.name} is a video of LongCat-Video. Connect it to Continue Video (LongCat, QVG).")
        return io.NodeOutput(ARSampler(Options(
            chunk_frames=chunk_frames, first_alone=first_alone, noise=NOISES[noise], context_noise=context_noise,
            recache_frames=recache_frames, position_limit=position_limit, auto_budget=auto_budget, keep_partial=keep_partial,
            start=None if start is None else start["samples"], session=session, node_id=cls.hidden.unique_id)))


class QVGEmptyLongVideoLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QVGEmptyLongVideoLatent", display_name="Empty Long Video Latent (QVG)", category="QuantVideoGen",
            description="An empty video latent by seconds, as long as you like.",
            search_aliases=["qvg", "long video", "empty latent", "seconds"],
            inputs=[
                io.Float.Input("seconds", default=10.0, min=0.1, max=86400.0, step=0.1, tooltip="At least so long; whole latent frames. "
                                                                                                "Default: 10."),
                io.Int.Input("frame_rate", default=16, min=1, max=120, tooltip="Frames a second of the model: 16 for Wan 2.1."),
                io.Int.Input("width", default=832, min=16, max=8192, step=16, tooltip="Pixels. Default: 832."),
                io.Int.Input("height", default=480, min=16, max=8192, step=16, tooltip="Pixels. Default: 480."),
                io.Int.Input("batch_size", default=1, min=1, max=64, advanced=True, tooltip="Videos made beside each other. Default: 1."),
                io.Vae.Input("vae", optional=True, tooltip="Takes channels and strides from this VAE; without it they are Wan 2.1's."),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="For the sampler."),
                     io.Int.Output(display_name="latent_frames", tooltip="How many latent frames there are.")])

    @classmethod
    def execute(cls, seconds, frame_rate, width, height, batch_size, vae=None) -> io.NodeOutput:
        channels, space, stride = (16, 8, 4) if vae is None else (
            vae.latent_channels, vae.spacial_compression_encode(), vae.temporal_compression_decode() or 1)
        frames = latent_frames(seconds, frame_rate, stride)
        samples = torch.zeros([batch_size, channels, frames, height // space, width // space],
                              device=comfy.model_management.intermediate_device())
        return io.NodeOutput({"samples": samples}, frames)


def _scheduled(conditionings: list[tuple[float, list, str]], frame_rate: int) -> list:
    """The first conditioning with the others in it, each at the latent frame of its time."""
    entries = [(first_frame(seconds, frame_rate), conditioning[0][0], name) for seconds, conditioning, name in conditionings]
    (embedding, extra), *more = conditionings[0][1]
    return [[embedding, {**extra, SCHEDULE: entries}], *more]


class QVGPromptSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QVGPromptSchedule", display_name="Prompt Schedule (QVG)", category="QuantVideoGen",
            description="Prompts that change while the video is made.",
            search_aliases=["qvg", "prompt travel", "timeline", "multi prompt", "storyboard"],
            inputs=[
                io.Clip.Input("clip", tooltip="The model's text encoder."),
                io.String.Input("text", multiline=True, default="0s: a calm sea\n6.5s: a storm comes up",
                                tooltip="One prompt a line with the time at which it begins: '0s: ...', '6.5s: ...', '1:05: ...'. A line "
                                        "without a time continues the one above."),
                io.Int.Input("frame_rate", default=16, min=1, max=120, tooltip="Frames a second of the model. Default: 16."),
            ],
            outputs=[io.Conditioning.Output(display_name="conditioning", tooltip="For AR Video Sampler (QVG); other samplers take the "
                                                                                 "first prompt.")])

    @classmethod
    def execute(cls, clip, text, frame_rate) -> io.NodeOutput:
        return io.NodeOutput(_scheduled([
            (seconds, clip.encode_from_tokens_scheduled(clip.tokenize(prompt)), prompt)
            for seconds, prompt in Schedule.parse(text).entries], frame_rate))


class QVGPromptAt(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QVGPromptAt", display_name="Prompt at Time (QVG)", category="QuantVideoGen",
            description="Adds a prompt, from any text encoder, that takes over at a time of the video.",
            search_aliases=["qvg", "prompt travel", "timeline", "multi prompt"],
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="What holds until then; may come from another Prompt at Time."),
                io.Conditioning.Input("next", tooltip="What holds from then on."),
                io.Float.Input("seconds", default=5.0, min=0.0, max=86400.0, step=0.1, tooltip="When it takes over. Default: 5."),
                io.Int.Input("frame_rate", default=16, min=1, max=120, tooltip="Frames a second of the model. Default: 16."),
            ],
            outputs=[io.Conditioning.Output(display_name="conditioning", tooltip="For AR Video Sampler (QVG); other samplers take the "
                                                                                 "first prompt.")])

    @classmethod
    def execute(cls, conditioning, next, seconds, frame_rate) -> io.NodeOutput:
        (embedding, extra), *more = conditioning
        entries = list(extra.get(SCHEDULE) or [(0, embedding, "0")])
        at = first_frame(seconds, frame_rate)
        if at <= entries[-1][0]:
            raise ValueError(f"A prompt at {seconds:g}s does not come after the one before it; chain the nodes in the order of time.")
        # the name tells prompts apart in a session, so it must follow from what the prompt is
        name = f"{at} {float(next[0][0].float().sum()):.6g}"
        return io.NodeOutput([[embedding, {**extra, SCHEDULE: [*entries, (at, next[0][0], name)]}], *more])
