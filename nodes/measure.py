"""Measure Presets (QVG): what each preset does to the videos of your own model, on the device it runs on.

    QVGMeasurePresets  MODEL, CONDITIONING -> chart, table, JSON (also a file in the output folder)
"""

from __future__ import annotations

import json
from pathlib import Path

import comfy.utils
import numpy as np
import torch
from comfy_api.latest import io
from comfyui_version import __version__ as comfyui_version

from ..qvg.files import check_place, write_atomically
from ..qvg.measure.inputs import files_of
from ..qvg.measure.rows import CONTROLS, EXACT, markdown, measure, pareto, presets, summary
from ..qvg.report.environment import environment
from . import live, where
from .kv_cache import Settings
from .live import TEXT
from .measure_loops import Source, loop_of
from .outputs import places

OWN = "settings"


class QVGMeasurePresets(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QVGMeasurePresets", display_name="Measure Presets (QVG)", category="QuantVideoGen", is_output_node=True,
            description="Makes one video with each preset from the same noise, and measures how close it stays to the video with an exact "
                        "cache, in how many bits and how fast: on this model, at this size, on this device.",
            search_aliases=["benchmark", "quality", "pareto", "bits", "psnr", "compare presets", "qvg"],
            inputs=[
                io.Model.Input("model", tooltip="A causal video model (Self-Forcing, Causal-Forcing), or LongCat-Video."),
                io.Conditioning.Input("positive", tooltip="The prompt of the video."),
                io.Int.Input("width", default=832, min=16, max=8192, step=16, tooltip="Pixels of the video, a multiple of 16. "
                                                                                      "Default: 832."),
                io.Int.Input("height", default=480, min=16, max=8192, step=16, tooltip="Pixels of the video, a multiple of 16. "
                                                                                       "Default: 480."),
                io.Int.Input("latent_frames", default=0, min=0, max=100000,
                             tooltip="Length of the video. 0, the default: ten chunks, or three segments of LongCat-Video. Three at "
                                     "least; more show how errors add up."),
                io.String.Input("presets", default="", tooltip="Presets to measure, such as Balanced, Smallest; empty measures all but "
                                                               "Off, which is the reference."),
                io.Int.Input("seed", default=0, min=0, max=2**64 - 1, control_after_generate=False,
                             tooltip="Seed of the video's noise, the same for all presets. Default: 0."),
                io.Float.Input("cfg", default=1.0, min=1.0, max=100.0, step=0.1, round=0.01,
                               tooltip="1 for distilled models, the default; 4 for LongCat-Video without its distillation LoRA."),
                io.Conditioning.Input("negative", optional=True, tooltip="Needed when cfg is not 1."),
                Settings.Input("settings", optional=True, tooltip="Settings of your own to measure beside the presets, from QVG Settings."),
                io.Sigmas.Input("sigmas", optional=True,
                                tooltip="Noise levels that end in 0. Default: the four steps of Self-Forcing; of LongCat-Video 50 steps, "
                                        "or 16 at cfg 1."),
                io.Int.Input("chunk_frames", default=0, min=0, max=64, advanced=True, optional=True,
                             tooltip="Latent frames per chunk, or new ones per segment. 0, the default, is the model's usual number; 1 for "
                                     "frame-wise models."),
                io.String.Input("filename_prefix", default="qvg/presets", advanced=True, optional=True,
                                tooltip="Name of the JSON file in the output folder, which gets a number. Default: qvg/presets."),
            ],
            outputs=[
                io.Image.Output(display_name="chart", tooltip="Bits per element against dB of latents; the line joins the best."),
                io.String.Output(display_name="table", tooltip="A row for each preset: bits, bytes, seconds, dB."),
                io.String.Output(display_name="report", tooltip="JSON to share: hardware, versions, model, settings, all figures."),
            ])

    @classmethod
    def execute(cls, model, positive, width, height, latent_frames, presets, seed, cfg, negative=None, settings=None, sigmas=None,
                chunk_frames=0, filename_prefix="qvg/presets") -> io.NodeOutput:
        if cfg != 1 and negative is None:
            raise ValueError(f"cfg is {cfg:g}, which needs a negative prompt. Connect one, or set cfg to 1.")
        if sigmas is not None and (len(sigmas) < 2 or sigmas[-1] != 0):
            raise ValueError(f"The sigmas are {[round(float(sigma), 4) for sigma in sigmas]}; give two or more that end in 0.")
        source = Source(model, positive, negative or positive, width, height, latent_frames, chunk_frames, seed, cfg, sigmas)
        path, rows, report = _measured(source, _methods(presets, settings), filename_prefix)
        chart = np.asarray(pareto(rows, "dB of latents against the exact cache, third chunk on"), dtype=np.float32) / 255
        place = where.here()
        live.forget(place, place and place.node)
        return io.NodeOutput(torch.from_numpy(chart)[None], markdown(rows), report, ui={TEXT: [f"{summary(rows)}\n{path.name}"]})


def _methods(names: str, own) -> dict:
    """The settings to measure by name. Raises ValueError for an unknown preset."""
    return presets([name.strip() for name in names.split(",") if name.strip()]) | ({} if own is None else {OWN: own})


def _measured(source: Source, methods: dict, prefix: str) -> tuple[Path, list[dict], str]:
    """The file, the rows and the report. Raises ValueError, before anything is computed, for what cannot be measured or written."""
    loop, rows, names, place = loop_of(source), [], [EXACT, *CONTROLS, *methods], where.here()
    source = loop.source
    path = _free(prefix, source)
    check_place(path)
    passes = len(loop.lengths) * (len(source.sigmas) - 1)
    bar = comfy.utils.ProgressBar(len(names) * passes)

    def progress(name: str, done: int, of_all: int) -> None:
        bar.update_absolute(names.index(name) * passes + done)
        live.write(place, place and place.node, f"{name}, {names.index(name) + 1} of {len(names)}: step {done} of {of_all}")

    rows += measure([loop], methods, progress=progress)
    report = {
        "environment": environment(source.model.load_device, "Measure Presets (QVG)") | {"comfyui": comfyui_version},
        "checkpoint": _checkpoint(source.model), "width": source.width, "height": source.height, "frames": source.frames,
        "chunks": list(loop.lengths), "sigmas": [float(sigma) for sigma in source.sigmas], "cfg": source.cfg, "seed": source.seed,
        "rows": rows}
    text = json.dumps(report, indent=1)
    # another run may have taken the name meanwhile
    path = _free(prefix, source)
    write_atomically(path, lambda part: part.write_text(text + "\n", encoding="utf-8"))
    return path, rows, text


def _free(prefix: str, source: Source) -> Path:
    path = next(path for path, _ in places(prefix, ".json", source.width, source.height) if not path.exists())
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _checkpoint(model) -> dict:
    """What is known of the MODEL: its network, its file if the loader says which, and whether LoRAs change it."""
    network = model.get_model_object("diffusion_model")
    arguments = (model.cached_patcher_init or (None, ()))[1]
    file = next((Path(argument) for argument in arguments if isinstance(argument, str) and Path(argument).is_file()), None)
    return {"files": files_of(file) if file else [], "network": type(network).__name__, "dtype": str(model.model.get_dtype()),
            "patches": len(model.patches)}
