"""Options of measurements on a released checkpoint, and the closed loops that they describe."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..measure.inputs import Embeddings, described, files_of, open_network, read_embeddings
from ..measure.loop import CausalLoop, SegmentLoop
from ..models import Description, Family, ModelShape
from ..models.longcat_schedule import DISTILLED_STEPS, GUIDANCE, STEPS, noise_levels
from ..models.wan import PATCH
from ..video import MAX_FRAMES, SELF_FORCING_SIGMAS, Run
from .arguments import number, whole
from .results import add_places

CHECKPOINT = "Self-Forcing, Causal-Forcing, LongLive, LongCat-Video and their like, as published: .safetensors or .pt"
EMBEDDINGS = ("text embeddings: safetensors with the tensor 'positive' [prompts, tokens, channels] and, for guidance, 'negative' "
              "[1, tokens, channels]")
GIVEN = 4
CHUNKS, SEGMENTS = 10, 3


def add_arguments(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument("--checkpoint", type=Path, required=required, help=CHECKPOINT)
    parser.add_argument("--embeddings", type=Path, required=required, metavar="FILE", help=f"{EMBEDDINGS}; one video for each prompt")
    parser.add_argument("--frames", type=whole(1, MAX_FRAMES),
                        help=f"latent frames of a video (default: {CHUNKS} chunks, or {SEGMENTS} segments)")
    add_sampling(parser)
    parser.add_argument("--cfg", type=number(0, 100),
                        help=f"guidance scale, with a negative prompt (default 1; LongCat-Video {GUIDANCE:g})")
    parser.add_argument("--seed", type=whole(0, 2**64 - 1), default=0)
    add_places(parser)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """How a model is sampled that is not the tiny one."""
    parser.add_argument("--chunk-frames", type=whole(1, 256), metavar="N",
                        help="latent frames of a chunk, or new ones of a segment (default: the model's usual)")
    parser.add_argument("--given", type=whole(1, 256), metavar="N",
                        help=f"LongCat-Video: latent frames that a segment continues (default {GIVEN})")
    parser.add_argument("--width", type=whole(16, 16384), help="pixels (default: the model's usual size)")
    parser.add_argument("--height", type=whole(16, 16384))
    parser.add_argument("--sigmas", type=number(most=1), nargs="+", metavar="S",
                        help="noise levels that fall from 1 to 0 (default: those of Self-Forcing; of LongCat-Video, with a negative "
                             "prompt the base model's 50 steps, else the distilled 16)")


@dataclass
class OwnModel:
    """A person's own model, ready to run."""

    network: nn.Module
    family: Family
    found: Description
    loops: list[CausalLoop | SegmentLoop]
    report: dict


def open_model(options: argparse.Namespace) -> OwnModel:
    """Everything that the options name. Raises ValueError for files and sizes that cannot be measured."""
    network, family, found = open_network(options.checkpoint, options.device)
    embeddings = read_embeddings(options.embeddings, network.sizes.text_dim)
    usual = usual_of(family, network)
    run, cfg, given = run_of(options, usual, family, embeddings)
    width, height, latent = size_of(options, usual)
    shape = 1, network.sizes.channels, *latent
    loops = _loops(network, family, embeddings, run, shape, given, cfg, options.device)
    report = {
        "checkpoint": {"files": files_of(options.checkpoint), **described(found)}, "embeddings": files_of(options.embeddings),
        "videos": len(loops), "width": width, "height": height, "frames": run.frames, "chunks": loops[0].lengths, "given": given,
        "sigmas": run.sigmas, "cfg": cfg, "seed": run.seed}
    return OwnModel(network, family, found, loops, report)


def usual_of(family: Family, network: nn.Module) -> ModelShape:
    """The family's model with as many layers and heads, or its first."""
    shapes, sizes = list(family.shapes.values()), network.sizes
    return next((shape for shape in shapes if (shape.layers, shape.heads) == (sizes.layers, sizes.heads)), shapes[0])


def size_of(options: argparse.Namespace, usual: ModelShape) -> tuple[int, int, tuple[int, int]]:
    """Width and height in pixels, and (height, width) of latents. Raises ValueError for a size that does not divide into tokens."""
    width, height = options.width or usual.size[0], options.height or usual.size[1]
    if width % usual.stride or height % usual.stride:
        raise ValueError(f"{width} x {height} pixels do not divide into tokens of {usual.stride} x {usual.stride}. Make --width and "
                         f"--height multiples of {usual.stride}.")
    return width, height, (PATCH[1] * height // usual.stride, PATCH[2] * width // usual.stride)


def run_of(options: argparse.Namespace, usual: ModelShape, family: Family, embeddings: Embeddings) -> tuple[Run, float, int]:
    """The run, the guidance scale (1: none), and the latent frames that a segment continues (0: there are no segments).

    Raises ValueError for options that do not fit the model.
    """
    segments, guides = usual.segment_frames, embeddings.negative is not None
    given = (options.given or GIVEN) if segments else 0
    if options.given and not segments:
        raise ValueError(f"--given is for models that make segments; {family.title} goes on chunk by chunk. Leave it out.")
    if options.cfg not in (None, 1) and not guides:
        raise ValueError(f"--cfg {options.cfg:g} needs a negative prompt: save one as 'negative' in {options.embeddings.name}, or leave "
                         "out --cfg.")
    cfg = (GUIDANCE if segments and guides else 1.0) if options.cfg is None else options.cfg
    chunk = options.chunk_frames or (max(1, segments - given) if segments else usual.chunk_frames)
    frames = options.frames or (given + SEGMENTS * chunk if segments else CHUNKS * chunk)
    levels = noise_levels(STEPS).tolist() if cfg != 1 else noise_levels(DISTILLED_STEPS, distilled=True).tolist()
    sigmas = tuple(options.sigmas or (levels if segments else SELF_FORCING_SIGMAS))
    if sigmas[-1] != 0:
        raise ValueError(f"--sigmas end at {sigmas[-1]:g}; a chunk is finished at 0.")
    # a first segment, which continues nothing, has as many frames as the others with those that they continue
    how = {"first_frames": given + chunk, "solver": "euler"} if segments else {}
    return Run(frames=frames, chunk_frames=chunk, sigmas=sigmas, seed=options.seed, **how), cfg, given


@torch.no_grad()
def _loops(network: nn.Module, family: Family, embeddings: Embeddings, run: Run, shape: tuple[int, ...], given: int, cfg: float,
           device: str) -> list[CausalLoop | SegmentLoop]:
    """A closed loop for every prompt."""
    dtype = next(network.parameters()).dtype
    positive = [one.to(device, dtype) for one in embeddings.positive]
    negative = embeddings.negative.to(device, dtype) if cfg != 1 else None
    if given:
        return [SegmentLoop(network, one, run, shape, given=given, negative=negative, cfg=cfg, family=family, device=device)
                for one in positive]
    if negative is not None:
        negative = network.project_context(negative)
    return [CausalLoop(network, network.project_context(one), run, shape, negative=negative, cfg=cfg, family=family, device=device)
            for one in positive]
