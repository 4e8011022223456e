"""Load AR Video Model (QVG): opens the checkpoints of autoregressive video models as their authors published them.

    QVGLoadARVideoModel  file in models/diffusion_models -> MODEL

Core builds its causal network only if the file's metadata asks for it, and published files do not. This node identifies the model family
from the weights (`qvg.models.checkpoint`) and loads it through the family's adapter (`adapters.families`).
"""

from __future__ import annotations

import logging
from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io

from ..qvg.demo import WEIGHTS
from ..qvg.files import first_line
from ..qvg.models import FAMILIES
from ..qvg.models.checkpoint import SUFFIXES, open_checkpoint
from .adapters.families import adapter_of
from .live import TEXT

FOLDER = "diffusion_models"
OWN = "These weights come with the pack, under its licence, Apache-2.0."
WEIGHT_DTYPES = {"default": None, "fp8_e4m3fn": torch.float8_e4m3fn}


def load_model(path: str, weight_dtype: str = "default", disable_dynamic: bool = False) -> tuple:
    """(ModelPatcher, Description) of a checkpoint of any registered family. Raises ValueError with a sentence for any other file."""
    state, found = open_checkpoint(path)
    adapter = adapter_of(FAMILIES[found.family])
    try:
        model = adapter.load(state, config=found.config, dtype=WEIGHT_DTYPES[weight_dtype], disable_dynamic=disable_dynamic)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    # only core can read packed, quantized weights, and it has no error class of its own for damaged ones
    except Exception as error:
        raise ValueError(f"ComfyUI could not make a model of {found.file}: {first_line(error)}. If it is quantized, get another "
                         "version of it; otherwise download it again.") from error
    # lets core load the same file again when it needs a second copy of the weights
    model.cached_patcher_init = (load_model, (path, weight_dtype), 0)
    logging.info("QVG: %s", found)
    return model, found


class QVGLoadARVideoModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        files = [name for name in folder_paths.get_filename_list(FOLDER) if name.lower().endswith(SUFFIXES)]
        return io.Schema(
            node_id="QVGLoadARVideoModel", display_name="Load AR Video Model (QVG)", category="QuantVideoGen",
            description="Loads checkpoints of Self-Forcing, Causal-Forcing, LongLive and other causal Wan 2.1 models, of LongCat-Video, "
                        "and of HY-WorldPlay, as published (.pt, or in parts) or repackaged (.safetensors), and shows on the node what it "
                        "found. HY-WorldPlay's licence excludes the European Union, the United Kingdom and South Korea.",
            search_aliases=["self forcing", "causal forcing", "longlive", "krea", "longcat", "hy-worldplay", "autoregressive",
                            "unet loader", "qvg"],
            inputs=[
                io.Combo.Input("model_name", options=files,
                               tooltip="A file in models/diffusion_models. Of training checkpoints, generator_ema is preferred to "
                                       "generator. Ordinary Wan 2.1 text-to-video files have the same layout and cannot be told apart."),
                io.Combo.Input("weight_dtype", options=list(WEIGHT_DTYPES), default="default", advanced=True,
                               tooltip="Data type of the weights in memory. default: as in the file, if the device supports it. "
                                       "fp8_e4m3fn: half the memory of bf16, slightly less exact; use it when the model does not fit."),
            ],
            outputs=[io.Model.Output(display_name="model",
                                     tooltip="A causal model for Sampler AR Video, LongCat-Video for Continue Video (LongCat, QVG), or "
                                             "HY-WorldPlay for World Walk (HY-WorldPlay, QVG).")])

    @classmethod
    def execute(cls, model_name, weight_dtype="default") -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise(FOLDER, model_name)
        model, found = load_model(path, weight_dtype)
        said = [str(found), OWN if Path(path).is_relative_to(WEIGHTS) else FAMILIES[found.family].licence]
        return io.NodeOutput(model, ui={TEXT: ["\n".join(filter(None, said))]})
