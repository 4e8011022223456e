"""World Walk (HY-WorldPlay, QVG): from an image, a prompt and a camera path to video, chunk by chunk, of any length.

    QVGWorldWalk  MODEL, CONDITIONING, VAE, QVG_CAMERA_PATH, IMAGE -> IMAGE, LATENT

The loop is `walk`; the network and its passes are `adapters.worldplay_scene`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial

import comfy.utils
import folder_paths
import node_helpers
import torch
from comfy_api.latest import io, ui

from ..qvg.models.worldplay_schedule import SAMPLING_5B, SAMPLING_8B
from ..qvg.settings import QVGSettings
from ..qvg.video import Run
from ..qvg.video.cameras import CameraPath
from ..qvg.video.session import SessionError
from ..qvg.video.walk_session import WalkSession
from ..qvg.video.world import CHUNK, MEMORIES
from . import live, where
from .adapters import worldplay
from .adapters.worldplay_scene import Variant, WalkMemory, variant_of
from .camera_type import CameraPathType
from .chunk_decoder import decode
from .live import TEXT
from .long_video import SessionType
from .longcat import Progress
from .outputs import check_prefix
from .ranks.mark import split_of
from .run_log import ATTACHMENT
from .session_kinds import check_kind
from .session_saver import SaveTo, SavingSampler
from .stream import Streamer, StreamTo
from .walk import LISTED, Walk, walk_through

SCHEDULES = ("distilled", "base")


@dataclass
class Inputs:
    """The inputs of the node, with the defaults of its optional ones."""

    model: object
    positive: list
    vae: object
    camera_path: CameraPath
    width: int
    height: int
    seed: int
    schedule: str
    steps: int
    cfg: float
    memory: str
    start_image: torch.Tensor | None = None
    negative: list | None = None
    clip_vision_output: object | None = None
    stream_to: str = ""
    path_continues: bool = True
    sampler: object | None = None
    session: WalkSession | None = None

    def check(self) -> None:
        """Raises ValueError for inputs that do not belong together."""
        worldplay.check(self.model)
        check_kind(self.session, WalkSession)
        variant = self.variant
        if not isinstance(self.camera_path, CameraPath):
            raise ValueError("There is no camera path. Connect Camera Path (QVG) to camera_path.")
        if self.start_image is None and self.session is None:
            raise ValueError("A walk begins with an image. Connect one to start_image, or a saved walk to session.")
        width, height = self.size
        if width % variant.multiple or height % variant.multiple:
            fitting = [max(1, round(side / variant.multiple)) * variant.multiple for side in (width, height)]
            raise ValueError(f"{variant.family.title} cannot make video of {width} x {height} pixels; width and height must be multiples "
                             f"of {variant.multiple}. Set them to {fitting[0]} x {fitting[1]}, or to 0 for {variant.size[0]} x "
                             f"{variant.size[1]}.")
        channels = worldplay.original(self.model.get_model_object("diffusion_model")).sizes.channels
        if self.vae.latent_channels != channels:
            raise ValueError(f"This VAE has latents of {self.vae.latent_channels} channels, but {variant.family.title} needs {channels}. "
                             f"Load the VAE of {variant.vae}.")
        self._check_prompts()

    def _check_prompts(self) -> None:
        title = self.variant.family.title
        if self.cfg != 1 and self.negative is None:
            raise ValueError(f"cfg is {self.cfg:g}, for which a negative prompt is needed. Connect one to negative, or set cfg to 1.")
        for name, prompt in (("positive", self.positive), ("negative", self.negative or [])):
            if len(prompt) > 1:
                raise ValueError(f"{len(prompt)} conditions are combined in {name}, but each prompt of a walk has one cache. Connect a "
                                 "single prompt.")
        if self.clip_vision_output is not None and self.variant.starts_with_image:
            raise ValueError(f"{title} takes no image from CLIP Vision; disconnect clip_vision_output.")

    @cached_property
    def variant(self) -> Variant:
        return variant_of(self.model)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        own = self.variant.size
        if self.session is not None:
            own = [self.variant.stride * side for side in self.session.shape[:1:-1]]
        return self.width or own[0], self.height or own[1]

    @property
    def sigmas(self) -> tuple[float, ...]:
        shift = self.model.get_model_object("model_sampling").shift
        return self.variant.sampling.levels(self.steps, distilled=self.schedule == "distilled", shift=shift)

    def prompts(self) -> list:
        """The positive and the negative condition, with what CLIP Vision saw in the start image."""
        prompts = [self.positive, self.negative or self.positive]
        if self.clip_vision_output is None:
            return prompts
        return [node_helpers.conditioning_set_values(prompt, {"clip_vision_output": self.clip_vision_output}) for prompt in prompts]


class QVGWorldWalk(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QVGWorldWalk", display_name="World Walk (HY-WorldPlay, QVG)", category="QuantVideoGen",
            description="Walks through a world that HY-WorldPlay makes from an image and a prompt, along a camera path of any length. What "
                        "was seen before is remembered in a KV cache that Quantize KV Cache (QVG) makes small. The licence of the model "
                        "excludes the European Union, the United Kingdom and South Korea.",
            search_aliases=["hy-worldplay", "worldplay", "world model", "camera", "walk", "image to video", "long video", "qvg"],
            inputs=[
                io.Model.Input("model", tooltip="HY-WorldPlay from Load AR Video Model (QVG), through Quantize KV Cache (QVG)."),
                io.Conditioning.Input("positive", tooltip="What the world looks like. For the 5B, from CLIPTextEncode with umt5_xxl, CLIP "
                                                          "type wan; for the 8B, with qwen_2.5_vl_7b and byt5, CLIP type "
                                                          "hunyuan_video_15."),
                io.Vae.Input("vae", tooltip="The VAE of Wan 2.2 for the 5B, of HunyuanVideo 1.5 for the 8B."),
                CameraPathType.Input("camera_path", tooltip="Where the camera goes, from Camera Path (QVG). It sets the length of the "
                                                            "video; at its end the camera stands still until the chunk is full."),
                io.Int.Input("width", default=0, min=0, max=4096, step=16,
                             tooltip="Pixels of the video, a multiple of 32 for the 5B and of 16 for the 8B. 0, the default, is that of "
                                     "the session, or the model's own: 1280 or 832."),
                io.Int.Input("height", default=0, min=0, max=4096, step=16,
                             tooltip="Pixels of the video, a multiple of 32 for the 5B and of 16 for the 8B. 0, the default, is that of "
                                     "the session, or the model's own: 704 or 480."),
                io.Int.Input("seed", default=0, min=0, max=2**64 - 1, control_after_generate=True,
                             tooltip="Seed of the noise. Default: 0."),
                io.Combo.Input("schedule", options=list(SCHEDULES), default=SCHEDULES[0],
                               tooltip="Noise levels of the distilled models or of the base models. Default: distilled."),
                io.Int.Input("steps", default=SAMPLING_5B.distilled_steps, min=1, max=1000,
                             tooltip="4 for distilled models, 30 to 50 for base models."),
                io.Float.Input("cfg", default=1.0, min=1.0, max=100.0, step=0.1, round=0.01,
                               tooltip=f"1 for distilled models; {SAMPLING_5B.guidance:g} (5B) or {SAMPLING_8B.guidance:g} (8B) for base "
                                       "models. Above 1, the negative prompt has a cache of its own."),
                io.Combo.Input("memory", options=list(MEMORIES), default=MEMORIES[0],
                               tooltip="What a chunk remembers. rebuild, the default: the newest frames and those that saw the same place, "
                                       "computed anew, as HY-WorldPlay does. append: all frames, or a window of them, as they were "
                                       "computed first. bank: all frames are kept, and those that saw the same place are read, without "
                                       "computing them anew."),
                io.Image.Input("start_image", optional=True, tooltip="What the camera sees first; cropped to the size of the video. Not "
                                                                     "needed to continue a session."),
                io.Conditioning.Input("negative", optional=True, tooltip="Not used at cfg 1."),
                io.ClipVisionOutput.Input("clip_vision_output", optional=True,
                                          tooltip="The start image as SigLIP (sigclip_vision_patch14_384) sees it, from CLIP Vision "
                                                  "Encode. For the 8B only."),
                io.String.Input("stream_to", default="", advanced=True, optional=True,
                                tooltip="Prefix of an MP4 file in the output folder, such as video/walk. It grows chunk by chunk and can "
                                        "be played at any time. images are then the last chunk only, so that memory does not grow with "
                                        "length."),
                io.Boolean.Input("path_continues", default=True, advanced=True, optional=True,
                                 tooltip="With a session: on, the camera path begins where the saved walk ends; off, it is the whole walk "
                                         "from its first frame, of which the saved part is not made again. Default: on."),
                io.Sampler.Input("sampler", optional=True,
                                 tooltip="From Save Video Session (QVG), so that the walk is saved while it is made. A walk always takes "
                                         "Euler steps, so connect euler to that node."),
                SessionType.Input("session", optional=True, tooltip="A saved walk to continue, from Load Video Session (QVG)."),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The whole video, 13 frames of the first chunk and 16 of each further one."),
                io.Latent.Output(display_name="latent", tooltip="The latents of the whole video."),
            ])

    @classmethod
    def execute(cls, **inputs) -> io.NodeOutput:
        return Execution(Inputs(**inputs)).run()


class Execution:
    """One execution of the node."""

    def __init__(self, inputs: Inputs):
        inputs.check()
        self.inputs, self.model, self.session = inputs, inputs.model, inputs.session
        self.save = save_of(inputs.sampler)
        path = inputs.camera_path if self.session is None else continued(inputs.camera_path, self.session, inputs.path_continues)
        self.path = path.resized(-(-len(path) // CHUNK) * CHUNK)
        (width, height), stride = inputs.size, inputs.variant.stride
        self.shape = (1, inputs.vae.latent_channels, len(self.path), height // stride, width // stride)
        self.fields = Run(frames=len(self.path), chunk_frames=CHUNK, sigmas=inputs.sigmas, seed=inputs.seed, solver="euler")
        self.streamer: Streamer | None = None

    def run(self) -> io.NodeOutput:
        inputs, cfg = self.inputs, self.inputs.cfg
        prompts = inputs.prompts()
        split = split_of(self.model)
        memory = WalkMemory(self.model, self._settings(), inputs.memory, self.shape, prompts[:1 + (cfg != 1)])
        if split is not None:
            memory.divide(split.shares)
        start = self._start()
        walk = Walk(self.path, self.fields, memory, cfg, start, self.session, self._recorders(start), self.model.get_attachment(ATTACHMENT))
        progress = Progress(self.model, self.fields.steps * len(self.path) // CHUNK)
        progress.done = 0 if self.session is None else self.fields.steps * self.session.chunk
        latents = walk_through(self.model, *prompts, walk, progress.step)
        # None where the disk refused the first frames
        newest = None if self.streamer is None else self.streamer.newest
        images = decode(inputs.vae, latents) if newest is None else newest.float() / 255
        place = where.here()
        live.forget(place, place and place.node)
        said = {TEXT: ["\n".join([f"{len(self.path)} latent frames, {4 * len(self.path) - 3} video frames", *walk.reads[-LISTED:]])]}
        if self.streamer is not None:
            said |= ui.PreviewVideo([self._shown()]).as_dict()
        return io.NodeOutput(images, {"samples": latents, "downscale_ratio_spacial": inputs.variant.stride}, ui=said)

    def _settings(self) -> QVGSettings:
        """Of all caches together: the session's where there is one, else those of Quantize KV Cache (QVG)."""
        chosen = worldplay.settings_of(self.model)
        if self.session is None:
            return chosen
        # a session determines what is stored, the graph determines where, and how it is attended to
        kept, count = self.session.settings[0], len(self.session.settings)
        return replace(kept, budget_gib=kept.budget_gib * count, offload=chosen.offload, host_gib=chosen.host_gib,
                       attention=chosen.attention)

    def _start(self) -> torch.Tensor:
        """Latents of the start image, in the scale of the VAE: the session's, or of the connected image.

        Raises ValueError where both are there and are not of one image.
        """
        image, kept = self.inputs.start_image, None if self.session is None else self.session.tensors.get("start")
        if image is None:
            return self._fitting(kept)
        pixels = comfy.utils.common_upscale(image[:1, ..., :3].movedim(-1, 1), *self.inputs.size, "lanczos", "center")
        start = self.inputs.vae.encode(pixels.movedim(1, -1))
        # a VAE on another device rounds differently
        if kept is not None and (start - self._fitting(kept)).abs().mean() > 0.05 * start.abs().mean():
            raise SessionError(f"{self.session.path.name} does not begin with the image that is connected to start_image. Connect that "
                               "image, or none.")
        return start if kept is None else kept

    def _fitting(self, kept: torch.Tensor | None) -> torch.Tensor:
        """The session's start latents. Raises ValueError where they are missing or of another size."""
        expected = (*self.shape[:2], 1, *self.shape[3:])
        if kept is None:
            raise SessionError(f"{self.session.path.name} holds no start image. Connect the one that the walk began with.")
        if tuple(kept.shape) != expected:
            raise SessionError(f"{self.session.path.name} begins with an image whose latents have the shape {list(kept.shape)}, but this "
                               f"run needs {list(expected)}. Use the model and the size that it was saved with.")
        return kept

    def _recorders(self, start: torch.Tensor) -> list:
        """What is written while the walk is made, see `Walk`."""
        inputs, found = self.inputs, []
        if self.save is not None:
            found.append(partial(self.save.open_walk, start=start))
        if inputs.stream_to:
            check_prefix(inputs.stream_to)
            found.append(self._open_stream)
        return found

    def _open_stream(self, sampler, base, session) -> Streamer:
        inputs = self.inputs
        self.streamer = StreamTo(inputs.vae, inputs.stream_to, ".mp4", inputs.variant.frame_rate, None).open(sampler, base, session)
        return self.streamer

    def _shown(self) -> ui.SavedResult:
        """The streamed file for the frontend."""
        path = self.streamer.writer.path
        folder = path.parent.relative_to(folder_paths.get_output_directory())
        return ui.SavedResult(path.name, "" if str(folder) == "." else folder.as_posix(), io.FolderType.output)


def save_of(sampler) -> SaveTo | None:
    """Where to save the session of a walk, if its `sampler` input says so. Raises ValueError for a sampler that is not Euler's."""
    inner = sampler.sampler if isinstance(sampler, SavingSampler) else sampler
    name = getattr(getattr(inner, "sampler_function", None), "__name__", type(inner).__name__)
    if inner is not None and name != "sample_euler":
        raise ValueError(f"A walk takes Euler steps, but the SAMPLER is {name.removeprefix('sample_')}. Connect KSamplerSelect with euler, "
                         "through Save Video Session (QVG) to save the walk, or nothing.")
    return sampler.save if isinstance(sampler, SavingSampler) else None


def continued(path: CameraPath, session: WalkSession, continues: bool) -> CameraPath:
    """The whole path of a walk that goes on. continues: `path` begins where the saved walk ends; else it is the whole path.

    Raises SessionError where nothing would be new.
    """
    done = session.frames_done
    if continues and done:
        if len(path) < 2:
            raise SessionError(f"The camera path has one camera, where {session.path.name} ends; give it at least one move.")
        return session.cameras[:done].extended(path)
    if len(path) <= done:
        raise SessionError(f"The camera path has {len(path)} latent frames, but {session.path.name} holds {done} already. Make it longer, "
                           "or turn path_continues on.")
    return path
