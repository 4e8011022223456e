"""Continue Video (LongCat, QVG): text, image or video to long video with LongCat-Video, segment after segment.

    QVGLongCatContinue  MODEL, CONDITIONING, VAE (+ IMAGE) -> IMAGE, LATENT

A segment's new frames continue the last frames before it, whose keys and values one pass stores in the KV cache (`adapters.longcat`). With
`stream_to`, finished segments are appended to a file, and a stopped run continues after the last one. Save and Load Video Session do the
same without a file (`qvg.video.segments`).
"""

from __future__ import annotations

import glob
import hashlib
import json
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy_api.latest import io, ui

from ..qvg.files import InUse, Taken
from ..qvg.models.longcat_schedule import GUIDANCE, STEPS, noise_levels
from ..qvg.video.segment_file import SegmentFile
from ..qvg.video.segments import Segments, SegmentSession, digest
from . import live, where
from .adapters import longcat
from .adapters.checks import is_autoregressive
from .live import TEXT
from .long_video import ARSampler, SessionType, model_name
from .outputs import places
from .ranks.crews import CREWS
from .ranks.mark import split_of
from .ranks.segments import split_segment
from .segments import CHANNELS, STRIDE, LongVideo, latent_frames
from .session_kinds import check_kind
from .session_saver import SavingSampler, SegmentSaver

SCHEDULES = ("base", "distilled")
CARRIES = ("pixels", "latents")
FRAME_RATE = 15


@dataclass
class Inputs:
    """The inputs of the node, with the defaults of its optional ones."""

    model: object
    positive: list
    negative: list
    vae: object
    width: int
    height: int
    length: int
    given_frames: int
    segments: int
    seed: int
    steps: int
    cfg: float
    schedule: str
    carry: str = CARRIES[0]
    fine_tail: bool = True
    stream_to: str = ""
    start: torch.Tensor | None = None
    sampler: object | None = None
    session: SegmentSession | None = None

    def check(self) -> None:
        """Raises ValueError for inputs that do not belong together."""
        longcat.check(self.model)
        check_kind(self.session, SegmentSession)
        if self.stream_to and self.carry != "pixels":
            raise ValueError("stream_to writes frames as segments are done, but segments carried as latents are decoded at the end. Set "
                             "carry to pixels, or leave stream_to empty.")

    @cached_property
    def schedules(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise levels without and with the fine tail."""
        shift = self.model.get_model_object("model_sampling").shift
        plain, tailed = (noise_levels(self.steps, distilled=self.schedule == "distilled", tail=tail, shift=shift)
                         for tail in (False, self.fine_tail))
        return plain, tailed

    def levels(self, segment: int) -> torch.Tensor:
        """Noise levels of a segment; one that starts from text or from one image has no tail."""
        return self.schedules[bool(segment) or (self.start is not None and len(self.start) != 1)]

    def key(self) -> str:
        """What identifies the video in a file that is written without a session."""
        return run_key(self.model, self.positive, self.negative, self.start, [
            self.width, self.height, self.length, self.given_frames, self.seed, self.cfg, self.schedule,
            [level.tolist() for level in self.schedules]])


class QVGLongCatContinue(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QVGLongCatContinue", display_name="Continue Video (LongCat, QVG)", category="QuantVideoGen",
            description="Makes a video of any length with LongCat-Video, from text, an image or a video. Each segment continues the last "
                        "frames of the one before; their keys and values are in a KV cache that Quantize KV Cache (QVG) makes small.",
            search_aliases=["longcat", "long video", "video continuation", "extend video", "text to video", "image to video", "qvg"],
            inputs=[
                io.Model.Input("model", tooltip="LongCat-Video from Load AR Video Model (QVG), through Quantize KV Cache (QVG)."),
                io.Conditioning.Input("positive", tooltip="From CLIPTextEncode with umt5_xxl, CLIP type wan."),
                io.Conditioning.Input("negative", tooltip="Not used at cfg 1."),
                io.Vae.Input("vae", tooltip="The VAE of Wan 2.1."),
                io.Int.Input("width", default=832, min=16, max=4096, step=16, tooltip="Pixels of the video, a multiple of 16. "
                                                                                      "Default: 832."),
                io.Int.Input("height", default=480, min=16, max=4096, step=16, tooltip="Pixels of the video, a multiple of 16. "
                                                                                       "Default: 480."),
                io.Int.Input("length", default=93, min=5, max=393, step=4,
                             tooltip="Video frames per segment, including those that it continues. The model was trained with 93."),
                io.Int.Input("given_frames", default=13, min=1, max=389, step=4,
                             tooltip="Video frames that a segment continues. 13 is fast; 73 remembers more, but then each segment adds "
                                     "only 20."),
                io.Int.Input("segments", default=1, min=1, max=1000,
                             tooltip="Number of segments. A segment of 93 frames that continues 13 adds 80, which is 5.3 s at 15 frames "
                                     "per second. Default: 1."),
                io.Int.Input("seed", default=0, min=0, max=2**64 - 1, control_after_generate=True, tooltip="Seed of the sampler's noise. "
                                                                                                           "Default: 0."),
                io.Int.Input("steps", default=STEPS, min=1, max=1000, tooltip="50 for the base model, 16 with the distillation LoRA."),
                io.Float.Input("cfg", default=GUIDANCE, min=1.0, max=100.0, step=0.1, round=0.01,
                               tooltip="4 for the base model (CFG-Zero*), 1 with the distillation LoRA."),
                io.Combo.Input("schedule", options=list(SCHEDULES), default=SCHEDULES[0],
                               tooltip="Noise levels of the base model, or those of the distillation LoRA."),
                io.Combo.Input("carry", options=list(CARRIES), default=CARRIES[0], advanced=True, optional=True,
                               tooltip="How a segment gets the frames that it continues: decoded and encoded again, as in the published "
                                       "code, or as latents, which is faster and lossless. Default: pixels."),
                io.Boolean.Input("fine_tail", default=True, advanced=True, optional=True,
                                 tooltip="Ten equal steps in the lower half of the noise levels, for fine detail. Only when the base model "
                                         "continues a video. Default: on."),
                io.String.Input("stream_to", default="", advanced=True, optional=True,
                                tooltip="Prefix of an MP4 file in the output folder, such as video/cat. It grows segment by segment and "
                                        "can be played at any time; a stopped run continues after the last whole segment. The outputs are "
                                        "then the last segment only, so that memory does not grow with length. Needs carry pixels."),
                io.Image.Input("start", optional=True,
                               tooltip="One image to start from, or a video to continue. Without it, the first segment comes from text."),
                io.Sampler.Input("sampler", optional=True,
                                 tooltip="Default: euler, as in the published code. With Save Video Session (QVG), each finished segment "
                                         "is saved."),
                SessionType.Input("session", optional=True, tooltip="A saved video to continue, from Load Video Session (QVG)."),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The whole video, including the frames that it started with."),
                io.Latent.Output(display_name="latent", tooltip="The latents of all segments, in order."),
            ])

    @classmethod
    def execute(cls, **inputs) -> io.NodeOutput:
        return Continuation(Inputs(**inputs)).run()


class Continuation:
    """One execution of the node."""

    def __init__(self, inputs: Inputs):
        inputs.check()
        self.inputs = inputs
        self.video = LongVideo(inputs.vae, inputs.width, inputs.height, inputs.length, inputs.given_frames, inputs.segments, inputs.carry)
        self.sampler, self.save = unwrap_sampler(inputs.sampler)
        self.start = None if inputs.start is None else self.video.resized(inputs.start)
        self.levels = [inputs.levels(segment) for segment in range(inputs.segments)]
        self.progress = Progress(inputs.model, sum(map(len, self.levels)) - inputs.segments)

    def run(self) -> io.NodeOutput:
        inputs = self.inputs
        made, name = self._session()
        saver, shown = None, None
        with ExitStack() as held:
            held.enter_context(CREWS.kept())
            if self.save is not None:
                saver = SegmentSaver(self.save, name, made, inputs.session,
                                     segment_bytes(inputs.width, inputs.height, inputs.length, inputs.segments))
                held.callback(saver.place.release)
            done = made.done
            if inputs.stream_to:
                shown = self._open_file(held)
                done = max(done, self.video.file.done)
            self.progress.done = sum(len(level) - 1 for level in self.levels[:done])
            images, latents = self.video.make(self._sample, self.start, made, saver)
            said, place = {TEXT: [f"segment {inputs.segments} of {inputs.segments} is done"]}, where.here()
            live.forget(place, place and place.node)
            if shown is None:
                return io.NodeOutput(images, {"samples": latents}, ui=said)
            self.video.file.finish()
            return io.NodeOutput(images, {"samples": latents}, ui=ui.PreviewVideo([shown]).as_dict() | said)

    def _session(self) -> tuple[Segments, str]:
        """The segments made so far, and the fingerprint of the model, "" without a session."""
        inputs, made = self.inputs, Segments(self.inputs.carry, self.inputs.given_frames)
        if self.save is None and inputs.session is None:
            return made, ""
        made.start = "" if self.start is None else digest(self.start)
        # the fingerprint is taken from the loaded weights, because a LoRA of an earlier run may still be in them
        comfy.model_management.load_models_gpu([inputs.model])
        name = model_name(inputs.model.model, inputs.model)
        if inputs.session is not None:
            made = inputs.session.resume(name, made, inputs.segments, inputs.width // STRIDE, inputs.height // STRIDE)
        return made, name

    def _open_file(self, held: ExitStack) -> ui.SavedResult:
        """Open the video's file, which `held` releases. Raises ValueError where it already has all segments."""
        inputs, video = self.inputs, self.video
        # with a session, the session is what a stopped run continues from
        key = None if self.save is not None or inputs.session is not None else inputs.key()
        video.file, shown = open_file(inputs.stream_to, key, inputs.width, inputs.height)
        held.callback(video.file.release)
        video.check_given(video.file.given)
        if video.file.done >= inputs.segments:
            raise ValueError(f"{video.file.path.name} has {video.file.done} segments already. Raise segments to continue it, or "
                             "change stream_to to start a new video.")
        return shown

    def _sample(self, segment: int, given: torch.Tensor | None, frames: int) -> torch.Tensor:
        """New latents [1, C, frames, H, W] of a segment, which continue the given ones."""
        inputs, device = self.inputs, comfy.model_management.intermediate_device()
        empty = torch.zeros(1, CHANNELS, frames, inputs.height // STRIDE, inputs.width // STRIDE, device=device)
        guider = comfy.samplers.CFGGuider(self._model(given, empty.shape))
        guider.set_conds(inputs.positive, inputs.negative)
        guider.set_cfg(inputs.cfg)
        seed = (inputs.seed + segment) % 2**64
        noise = comfy.sample.prepare_noise(empty, seed)
        samples = guider.sample(noise, empty, self.sampler, self.levels[segment], callback=self.progress.step,
                                disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED, seed=seed)
        return samples.to(device)

    def _model(self, given: torch.Tensor | None, shape):
        """The MODEL whose run makes new latents of `shape`, which continue the given ones."""
        model, split = self.inputs.model, split_of(self.inputs.model)
        if split is not None:
            return split_segment(model, split, given, shape)
        if given is not None:
            return longcat.continue_from(model, given)
        longcat.note_nothing(model)
        return model


def unwrap_sampler(sampler) -> tuple:
    """The sampler that makes a segment, and where to save a session, or None. Raises ValueError for a sampler of causal models."""
    if isinstance(sampler, ARSampler) or is_autoregressive(sampler):
        raise ValueError("This SAMPLER makes video with causal models. For LongCat-Video connect one of KSamplerSelect, or none.")
    if isinstance(sampler, SavingSampler):
        return unwrap_sampler(sampler.sampler)[0], sampler.save
    return sampler or comfy.samplers.sampler_object("euler"), None


def run_key(model, positive, negative, start, settings: list) -> str:
    """A hash of everything that a video is made from, except its number of segments, so that a stopped video can be made longer."""
    loras = sorted((str(name), [[patch[0], *_numbers(patch[1])] for patch in patches]) for name, patches in model.patches.items())
    source = (model.cached_patcher_init or (None, ()))[1]
    # as with a session, another attention continues a video
    kept = replace(longcat.settings_of(model), attention="auto").to_json()
    digest = hashlib.blake2b(json.dumps([settings, source, kept, loras]).encode(), digest_size=16)
    for tensor in [condition[0] for condition in (*positive, *negative)] + ([] if start is None else [start]):
        digest.update(str(tuple(tensor.shape)).encode() + tensor.float().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def _numbers(patch) -> list[float]:
    """Eight elements of the first tensor in a weight patch, to tell LoRAs apart."""
    inside = getattr(patch, "weights", patch)
    if isinstance(inside, torch.Tensor):
        return inside.flatten()[:8].tolist()
    if not isinstance(inside, list | tuple):
        return []
    return next((numbers for numbers in map(_numbers, inside) if numbers), [])


def segment_bytes(width: int, height: int, length: int, segments: int) -> int:
    """Approximate bytes of a session of the whole video: the latents of its segments in float32."""
    return 4 * CHANNELS * latent_frames(length) * (width // STRIDE) * (height // STRIDE) * (segments + 1)


def open_file(prefix: str, key: str | None, width: int, height: int) -> tuple[SegmentFile, ui.SavedResult]:
    """The unfinished video with this prefix and key, or a new one; and its entry for the frontend."""
    numbered = places(prefix, ".mp4", width, height)
    first, subfolder = next(numbered)
    name = first.name.removesuffix("_.mp4").rpartition("_")[0]
    unfinished = key and SegmentFile.find(first.parent, f"{glob.escape(name)}_*_.mp4", key)
    for path in chain([unfinished] if unfinished else [], [first], (path for path, _ in numbered)):
        try:
            return SegmentFile(path, key, FRAME_RATE), ui.SavedResult(path.name, subfolder, io.FolderType.output)
        except (Taken, InUse):
            # another run uses it
            continue


class Progress:
    """One progress bar, with previews, over the steps of all segments. steps: of all of them together."""

    def __init__(self, model, steps: int):
        self.bar = comfy.utils.ProgressBar(steps)
        self.steps, self.done = steps, 0
        self.previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)

    def step(self, step, denoised, x, total) -> None:
        self.done += 1
        preview = self.previewer and self.previewer.decode_latent_to_preview_image("JPEG", denoised)
        self.bar.update_absolute(self.done, self.steps, preview)
