"""Sessions: a video saved while it is made, and continued later.

    QVGSaveVideoSession  SAMPLER -> SAMPLER that writes a session every few chunks (or segments) and at the end
    QVGLoadVideoSession  file -> QVG_SESSION, LATENT made so far
"""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy.latent_formats import HunyuanVideo15, Wan21, Wan22
from comfy_api.latest import io

from ..qvg.files import relative_path
from ..qvg.models.wan_vae import CHANNELS
from ..qvg.video import segments
from ..qvg.video.walk_session import WalkSession
from .adapters.checks import is_autoregressive
from .long_video import ARSampler, SessionType
from .outputs import TOKEN
from .session_saver import SaveTo, SavingSampler

FOLDER = "video_sessions"
SUFFIX = ".safetensors"
# channels -> the latents of walks
WALK_FORMATS = {form.latent_channels: form for form in (Wan22, HunyuanVideo15, Wan21)}


def folder() -> Path:
    """Where sessions are."""
    return Path(folder_paths.get_output_directory()) / FOLDER


def path_of(name: str, existing: bool = False) -> Path:
    """The file of a session. existing: it is to be read.

    Raises ValueError for a name that leads out of the folder of sessions, directly or by a link, and for a new name that some system
    cannot store.
    """
    path = folder() / relative_path(name, SUFFIX, existing)
    if not path.resolve().is_relative_to(folder().resolve()):
        raise ValueError(f"The session name {name!r} leads out of {folder()}. Use a plain name.")
    return path


class QVGSaveVideoSession(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QVGSaveVideoSession", display_name="Save Video Session (QVG)", category="QuantVideoGen",
            description="Saves what is needed to continue a video (cache, latents, position) while it is made, so that a crash loses "
                        "little.",
            search_aliases=["qvg", "checkpoint", "resume", "autosave", "crash"],
            inputs=[
                io.Sampler.Input("sampler", tooltip="From AR Video Sampler (QVG); for Continue Video (LongCat, QVG), any sampler such as "
                                                    "euler from KSamplerSelect; for World Walk (HY-WorldPlay, QVG), euler."),
                io.String.Input("name", default="my video",
                                tooltip=f"The file below output/{FOLDER}. Every save replaces it whole; what another video saved "
                                        "there gets a number. Default: my video."),
                io.Int.Input("every_chunks", default=4, min=1, max=10000,
                             tooltip="Chunks (for LongCat-Video, segments) between saves. The session is also saved at the end and on "
                                     "interrupt. Default: 4."),
            ],
            outputs=[io.Sampler.Output(display_name="sampler", tooltip="The same sampler, which now saves.")])

    @classmethod
    def execute(cls, sampler, name, every_chunks) -> io.NodeOutput:
        if TOKEN.search(name):
            raise ValueError(f"The session name {name!r} holds {TOKEN.search(name)[0]}, which would name another file when the session is "
                             "loaded. Use a plain name.")
        save = SaveTo(path_of(name), every_chunks)
        if isinstance(sampler, ARSampler) or is_autoregressive(sampler):
            return io.NodeOutput(require_ar_sampler(sampler).changed(save=save))
        return io.NodeOutput(SavingSampler(sampler, save))


def require_ar_sampler(sampler) -> ARSampler:
    """Raises ValueError for a sampler of another kind."""
    if not isinstance(sampler, ARSampler):
        raise ValueError("This SAMPLER cannot be watched chunk by chunk. Connect AR Video Sampler (QVG). (Continue Video (LongCat, QVG) "
                         "and World Walk (HY-WorldPlay, QVG) have stream_to instead of Stream Video.)")
    return sampler


class QVGLoadVideoSession(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QVGLoadVideoSession", display_name="Load Video Session (QVG)", category="QuantVideoGen",
            description="Opens a saved video to continue it. Damaged files and files of another release are refused.",
            search_aliases=["qvg", "checkpoint", "resume", "continue video"],
            inputs=[io.String.Input("name", default="my video",
                                    tooltip=f"A file below output/{FOLDER}, as Save Video Session (QVG) named it. Default: my video.")],
            outputs=[
                SessionType.Output(display_name="session",
                                   tooltip="For AR Video Sampler (QVG), where the latent sets the length of the whole video; for "
                                           "Continue Video (LongCat, QVG), where segments sets it; for World Walk (HY-WorldPlay, QVG), "
                                           "which continues it along its camera path."),
                io.Latent.Output(display_name="latent", tooltip="The latent frames made so far, for VAE Decode."),
                io.Int.Output(display_name="latent_frames", tooltip="Number of latent frames made so far."),
            ])

    @classmethod
    def fingerprint_inputs(cls, name):
        path = path_of(name, existing=True)
        return path.stat().st_mtime_ns if path.is_file() else ""

    @classmethod
    def execute(cls, name) -> io.NodeOutput:
        session = segments.load(path_of(name, existing=True))
        if isinstance(session, segments.SegmentSession):
            return io.NodeOutput(session, {"samples": session.latents}, session.latents.shape[2])
        if isinstance(session, WalkSession):
            if session.shape[1] not in WALK_FORMATS:
                raise ValueError(f"{session.path.name} has latents of {session.shape[1]} channels; walks of HY-WorldPlay have "
                                 f"{' or '.join(map(str, WALK_FORMATS))}. Continue it without ComfyUI.")
            return io.NodeOutput(session, {"samples": WALK_FORMATS[session.shape[1]]().process_out(session.latents)}, session.frames_done)
        if session.latents is None:
            raise ValueError(f"{session.path.name} was saved by `qvg generate`, without its latents. Continue it there with --resume.")
        if session.shape[1] != CHANNELS:
            raise ValueError(f"{session.path.name} has latents of {session.shape[1]} channels; the causal models that ComfyUI knows have "
                             f"{CHANNELS}. Continue it with `qvg generate --resume`.")
        # every causal model in core uses Wan 2.1's latents
        return io.NodeOutput(session, {"samples": Wan21().process_out(session.latents)}, session.frames_done)
