"""Continue Video (LongCat, QVG): text, image or video to long video with LongCat-Video, segment after segment.

    QVGLongCatContinue  MODEL, CONDITIONING, VAE (+ IMAGE) -> IMAGE, LATENT

A segment's new frames continue the last frames before it, which one pass stores in the KV cache (`adapters.longcat`). With `stream_to`,
segments go into a file as they are done, and a run that was stopped goes on behind them; Save and Load Video Session do so without a file
(`qvg.segments`).
"""

from __future__ import annotations

import glob
import hashlib
import json
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy_api.latest import io, ui

from ..qvg.backends import dispatch
from ..qvg.files.places import InUse, Taken
from ..qvg.models.longcat_schedule import GUIDANCE, STEPS, noise_levels
from ..qvg.video.segment_file import SegmentFile
from ..qvg.video.segments import Segments, SegmentSession, digest
from . import live, where
from .adapters import longcat
from .adapters.checks import is_autoregressive
from .live import TEXT
from .long_video import ARSampler, SessionType, model_name
from .outputs import places
from .session import SavingSampler, SegmentSaver

SCHEDULES = ("base", "distilled")
CARRIES = ("pixels", "latents")
CHANNELS, STRIDE, FRAME_RATE = 16, 8, 15


def latent_frames(frames: int) -> int:
    """Latent frames that hold a video; its first frame is one by itself, then four share one."""
    return (frames - 1) // 4 + 1


def whole_frames(frames: int) -> int:
    """The most video frames up to `frames` that fill whole latent frames."""
    return 4 * latent_frames(frames) - 3


@dataclass
class LongVideo:
    """Segments of one video. length, given_frames: video frames of a segment, and those of them that it continues. file: where the video
    goes as it grows, or None.

    Raises ValueError where a segment would have nothing new, or the size does not divide into tokens.
    """

    vae: object
    width: int
    height: int
    length: int
    given_frames: int
    segments: int
    carry: str
    file: SegmentFile | None = None

    def __post_init__(self):
        if self.width % 16 or self.height % 16:
            raise ValueError(f"A video of {self.width} x {self.height} pixels does not divide into tokens of 16 x 16. Set width and height "
                             f"to {max(1, self.width // 16) * 16} x {max(1, self.height // 16) * 16}.")
        if latent_frames(self.given_frames) >= latent_frames(self.length):
            raise ValueError(f"Segments of {self.length} frames that continue {self.given_frames} frames have nothing new in them; "
                             "raise length, or lower given_frames.")

    def check_given(self, given: torch.Tensor | None) -> None:
        """Raises ValueError where latents that were stored beside a video are none that a segment of this one can continue."""
        size = (1, CHANNELS, self.height // STRIDE, self.width // STRIDE)
        if given is not None and ((*given.shape[:2], *given.shape[3:]) != size or given.shape[2] > latent_frames(self.given_frames)):
            raise ValueError(f"What was stored beside {self.file.path.name} has shape {list(given.shape)} and is of another video. Choose "
                             "another stream_to.")

    def make(self, sampler, start: torch.Tensor | None, made: Segments, saver: SegmentSaver | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Frames [n, H, W, 3] and latents [1, C, F, H, W] of the video, what it starts with included; of the last segment alone where
        the video goes into a file.

        sampler: called with (segment, given latents or None, new latent frames) -> new latents. start: frames [n, height, width, 3].
        made: the segments to go on behind, which grows.
        """
        first, opening, pixels = made.done, 0, []
        if self.file is not None and self.file.done:
            first, made.given = self.file.done, self.file.given
        elif start is not None:
            opening = whole_frames(min(self.given_frames, len(start)))
            self._show(pixels, start)
            if not first:
                made.given = self.vae.encode(start[-opening:])
        for number, part in enumerate(made.parts if self.carry == "pixels" else ()):
            self._show(pixels, self._decode(part)[whole_frames(self.given_frames) if number else opening:])
        try:
            for segment in range(first, self.segments):
                comfy.model_management.throw_exception_if_processing_interrupted()
                self._segment(segment, sampler, made, pixels, whole_frames(self.given_frames) if segment else opening, saver)
        finally:
            if saver is not None:
                saver.close(made)
        if self.carry == "latents":
            self._show(pixels, self._decode(made.latents)[opening:])
        return torch.cat(pixels), made.latents if self.file is None else made.parts[-1]

    def _segment(self, segment: int, sampler, made: Segments, pixels: list[torch.Tensor], shown: int, saver: SegmentSaver | None) -> None:
        """Make one more, of which `shown` video frames are there already."""
        given, frames = made.given, latent_frames(self.length)
        known = 0 if given is None else given.shape[2]
        text = f"segment {segment + 1} of {self.segments}, {known} of {frames} latent frames given"
        place = where.here()
        live.write(place, place and place.node, text)
        with dispatch.on_compile(lambda sentence: live.write(place, place and place.node, sentence or text)):
            new = sampler(segment, given, frames - known)
        whole = new if given is None else torch.cat([given.to(new), new], dim=2)
        if self.carry == "latents":
            made.add(new if made.parts else whole, new.shape[2], whole[:, :, -latent_frames(self.given_frames):])
        else:
            decoded = self._decode(whole)
            self._show(pixels, decoded[shown:])
            if saver is not None or segment + 1 < self.segments:
                given = self.vae.encode(decoded[-whole_frames(self.given_frames):])
            made.add(whole, new.shape[2], given)
        if saver is not None:
            saver.segment(made)
        elif self.file is not None:
            made.parts, made.new = [whole], [new.shape[2]]
        if self.file is not None:
            self.file.save(segment + 1, made.given)

    def _show(self, pixels: list[torch.Tensor], frames: torch.Tensor) -> None:
        if self.file is not None:
            self.file.add(frames)
            pixels.clear()
        pixels.append(frames)

    def resized(self, images: torch.Tensor) -> torch.Tensor:
        images = images[..., :3].movedim(-1, 1)
        return comfy.utils.common_upscale(images, self.width, self.height, "lanczos", "center").movedim(1, -1)

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        images = self.vae.decode(latents)
        return images.flatten(0, -4).cpu()


class QVGLongCatContinue(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QVGLongCatContinue", display_name="Continue Video (LongCat, QVG)", category="QuantVideoGen",
            description="Makes a video of any length with LongCat-Video, from text, an image or a video. Each segment continues the last "
                        "frames before it, whose keys and values are held in a KV cache that Quantize KV Cache (QVG) makes small.",
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
                             tooltip="Video frames of a segment, those that it continues included. The model was trained with 93."),
                io.Int.Input("given_frames", default=13, min=1, max=389, step=4,
                             tooltip="Frames that a segment continues. 13 is quick; 73 remembers more, and then each segment adds 20."),
                io.Int.Input("segments", default=1, min=1, max=1000,
                             tooltip="How many. Of 93 frames that continue 13, each adds 80, which is 5.3 s at 15 frames a second. "
                                     "Default: 1."),
                io.Int.Input("seed", default=0, min=0, max=2**64 - 1, control_after_generate=True, tooltip="Seed of the sampler's noise. "
                                                                                                           "Default: 0."),
                io.Int.Input("steps", default=STEPS, min=1, max=1000, tooltip="50 for the base model, 16 with the distillation LoRA."),
                io.Float.Input("cfg", default=GUIDANCE, min=1.0, max=100.0, step=0.1, round=0.01,
                               tooltip="4 for the base model (CFG-Zero*), 1 with the distillation LoRA."),
                io.Combo.Input("schedule", options=list(SCHEDULES), default=SCHEDULES[0],
                               tooltip="Noise levels of the base model, or those that the distillation LoRA was trained with."),
                io.Combo.Input("carry", options=list(CARRIES), default=CARRIES[0], advanced=True, optional=True,
                               tooltip="How a segment gets the frames that it continues: decoded and encoded again, as the model was "
                                       "published, or as latents, which is quicker and loses nothing on the way. Default: pixels."),
                io.Boolean.Input("fine_tail", default=True, advanced=True, optional=True,
                                 tooltip="Ten equal steps below half of the noise, for fine detail. Only where the base model continues. "
                                         "Default: on."),
                io.String.Input("stream_to", default="", advanced=True, optional=True,
                                tooltip="Prefix of an MP4 in the output folder, such as video/cat. It grows segment by segment and plays "
                                        "at any moment; a run that was stopped goes on behind the last whole segment. Outputs are then "
                                        "of the last segment alone, so that memory does not grow with length. Needs carry pixels."),
                io.Image.Input("start", optional=True,
                               tooltip="One image to start from, or a video to continue. Without it, the first segment comes from text."),
                io.Sampler.Input("sampler", optional=True,
                                 tooltip="Without it euler, as the model was published. Through Save Video Session (QVG), segments are "
                                         "saved as they are done."),
                SessionType.Input("session", optional=True, tooltip="A video to go on with, from Load Video Session (QVG)."),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The whole video, what it started with included."),
                io.Latent.Output(display_name="latent", tooltip="Its latents, one segment after the other."),
            ])

    @classmethod
    def execute(cls, model, positive, negative, vae, width, height, length, given_frames, segments, seed, steps, cfg, schedule,
                carry=CARRIES[0], fine_tail=True, stream_to="", start=None, sampler=None, session=None) -> io.NodeOutput:
        longcat.check(model)
        video = LongVideo(vae, width, height, length, given_frames, segments, carry)
        sampler, save = take_apart(sampler)
        if session is not None and not isinstance(session, SegmentSession):
            raise ValueError(f"{session.path.name} is a video of a causal model. Connect it to AR Video Sampler (QVG).")
        if stream_to and carry != "pixels":
            raise ValueError("stream_to writes frames as segments are done, but segments carried as latents are decoded at the end. Set "
                             "carry to pixels, or leave stream_to empty.")
        shift = model.get_model_object("model_sampling").shift
        plain, tailed = (noise_levels(steps, distilled=schedule == "distilled", tail=tail, shift=shift) for tail in (False, fine_tail))
        # what starts from text or from one image has no tail
        levels = [plain if not segment and (start is None or len(start) == 1) else tailed for segment in range(segments)]
        images = start
        if start is not None:
            start = video.resized(start)
        made, saver = Segments(carry, given_frames), None
        if save is not None or session is not None:
            made.start = "" if start is None else digest(start)
            # weights are told apart where they are used, since a LoRA of an earlier run may still be in them
            comfy.model_management.load_models_gpu([model])
            name = model_name(model.model, model)
            if session is not None:
                made = session.resume(name, made, segments, width // STRIDE, height // STRIDE)
        progress = Progress(model, sum(map(len, levels)) - segments)

        def sample(segment: int, given: torch.Tensor | None, frames: int) -> torch.Tensor:
            if given is None:
                longcat.note_nothing(model)
            guider = comfy.samplers.CFGGuider(model if given is None else longcat.continue_from(model, given))
            guider.set_conds(positive, negative)
            guider.set_cfg(cfg)
            device = comfy.model_management.intermediate_device()
            empty = torch.zeros(1, CHANNELS, frames, height // STRIDE, width // STRIDE, device=device)
            own_seed = (seed + segment) % 2**64
            noise = comfy.sample.prepare_noise(empty, own_seed)
            samples = guider.sample(noise, empty, sampler, levels[segment], callback=progress.step,
                                    disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED, seed=own_seed)
            return samples.to(device)

        with ExitStack() as held:
            if save is not None:
                saver = SegmentSaver(save, name, made, session, segment_bytes(width, height, length, segments))
                held.callback(saver.place.release)
            done = made.done
            if stream_to:
                # with a session, that is what a stopped run goes on from
                key = None if save is not None or session is not None else run_key(model, positive, negative, images, [
                    width, height, length, given_frames, seed, cfg, schedule, [level.tolist() for level in (plain, tailed)]])
                video.file, shown = open_file(stream_to, key, width, height)
                held.callback(video.file.release)
                video.check_given(video.file.given)
                done = max(done, video.file.done)
                if done >= segments:
                    raise ValueError(f"{video.file.path.name} has {done} segments already. Raise segments to go on, or change "
                                     "stream_to to begin anew.")
            progress.done = sum(len(level) - 1 for level in levels[:done])
            images, latents = video.make(sample, start, made, saver)
            said, place = {TEXT: [f"segment {segments} of {segments} is done"]}, where.here()
            live.forget(place, place and place.node)
            if not stream_to:
                return io.NodeOutput(images, {"samples": latents}, ui=said)
            video.file.finish()
            return io.NodeOutput(images, {"samples": latents}, ui=ui.PreviewVideo([shown]).as_dict() | said)


def take_apart(sampler) -> tuple:
    """The sampler that makes a segment, and where a session is saved, or None. Raises ValueError for a sampler of causal models."""
    if isinstance(sampler, ARSampler) or is_autoregressive(sampler):
        raise ValueError("This SAMPLER makes video with causal models. For LongCat-Video connect one of KSamplerSelect, or none.")
    if isinstance(sampler, SavingSampler):
        return take_apart(sampler.sampler)[0], sampler.save
    return sampler or comfy.samplers.sampler_object("euler"), None


def run_key(model, positive, negative, start, settings: list) -> str:
    """A name of what a video is made from; how many segments it shall have is left out, so that a stopped one can be made longer."""
    loras = sorted((str(name), [[patch[0], *_numbers(patch[1])] for patch in patches]) for name, patches in model.patches.items())
    source = (model.cached_patcher_init or (None, ()))[1]
    digest = hashlib.blake2b(json.dumps([settings, source, longcat.settings_of(model).to_json(), loras]).encode(), digest_size=16)
    for tensor in [condition[0] for condition in (*positive, *negative)] + ([] if start is None else [start]):
        digest.update(str(tuple(tensor.shape)).encode() + tensor.float().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def _numbers(patch) -> list[float]:
    """A few numbers of a weight patch, to tell LoRAs apart: of the first tensor in it."""
    inside = getattr(patch, "weights", patch)
    if isinstance(inside, torch.Tensor):
        return inside.flatten()[:8].tolist()
    if not isinstance(inside, list | tuple):
        return []
    return next((numbers for numbers in map(_numbers, inside) if numbers), [])


def segment_bytes(width: int, height: int, length: int, segments: int) -> int:
    """About what a session of a whole video takes: the latents of its segments, in 4 bytes a number."""
    return 4 * CHANNELS * latent_frames(length) * (width // STRIDE) * (height // STRIDE) * (segments + 1)


def open_file(prefix: str, key: str | None, width: int, height: int) -> tuple[SegmentFile, ui.SavedResult]:
    """The unfinished video under this prefix that was made from the same, or a new one; and what the frontend shows of it."""
    numbered = places(prefix, ".mp4", width, height)
    first, subfolder = next(numbered)
    name = first.name.removesuffix("_.mp4").rpartition("_")[0]
    unfinished = key and SegmentFile.find(first.parent, f"{glob.escape(name)}_*_.mp4", key)
    for path in chain([unfinished] if unfinished else [], [first], (path for path, _ in numbered)):
        try:
            return SegmentFile(path, key, FRAME_RATE), ui.SavedResult(path.name, subfolder, io.FolderType.output)
        except (Taken, InUse):
            # another run has it
            continue


class Progress:
    """One progress bar and previews over the steps of all segments."""

    def __init__(self, model, steps: int):
        self.bar = comfy.utils.ProgressBar(steps)
        self.steps, self.done = steps, 0
        self.previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)

    def step(self, step, denoised, x, total) -> None:
        self.done += 1
        preview = self.previewer and self.previewer.decode_latent_to_preview_image("JPEG", denoised)
        self.bar.update_absolute(self.done, self.steps, preview)
