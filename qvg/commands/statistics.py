"""Statistics of the keys and values of a run: spectra, means, what repeats from frame to frame, and what each preset leaves.

    qvg bench statistics [--out DIR]                                                        the tiny model
    qvg bench statistics --checkpoint self_forcing_dmd.pt --embeddings prompts.safetensors [--frames N]

The run has an exact cache, without history of its own errors. Writes statistics.safetensors, below 1 MB for a model of 30 layers and 12
heads, whose content is described in `qvg/measure/statistics.py`, and a table of layers, statistics.md. No key, value or picture is in them,
and no prompt.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from ..demo import LATENT, NETWORK_FILE, PROMPTS, embed_prompt, load_tiny
from ..files import write_atomically
from ..measure import statistics
from ..measure.loop import CausalLoop
from ..measure.rows import presets
from ..report.environment import environment
from ..report.table import table
from ..settings import PRESETS
from ..video import Run
from . import own_model, results
from .progress import bar

NAME = "statistics"
TINY_FRAMES = 24
FIRST = (1, 4, 16, 32)


def main(arguments: Sequence[str]) -> None:
    """Raises ValueError for what cannot be run, before the first pass."""
    parser = argparse.ArgumentParser(prog="qvg bench statistics", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    own_model.add_arguments(parser, required=False)
    parser.add_argument("--only", nargs="+", metavar="PRESET", default=(), help="presets whose errors are recorded (default: all)")
    options = parser.parse_args(arguments)
    if (options.checkpoint is None) != (options.embeddings is None):
        raise ValueError("--checkpoint and --embeddings belong together; give both, or none for the tiny model.")
    chosen = presets(options.only)
    results.prepare_folder(options.out, (f"{NAME}.safetensors", f"{NAME}.md"), options.overwrite)
    if options.checkpoint is None:
        title, loops = NETWORK_FILE, [_tiny(options)]
        report = {"model": "the pack's tiny model", "chunks": loops[0].lengths}
    else:
        model = own_model.open_model(options)
        title, loops, report = model.found.file, model.loops, model.report
    recorder = statistics.Recorder(chosen, max(loops[0].lengths))
    with bar(title) as progress:
        for number, loop in enumerate(loops):
            loop.make(PRESETS["off"], lambda done, of_all, number=number: progress.show(number * of_all + done, len(loops) * of_all),
                      recorder.watch)
    where = environment(options.device, " ".join(["qvg bench statistics", *arguments]))
    path = options.out / f"{NAME}.safetensors"
    statistics.save(path, recorder, {"environment": where} | report)
    shown = layers_table(*statistics.load(path))
    text = f"## qvg bench {NAME}\n\n{where['device']}, {where['date']}\n\n    {where['command']}\n\n{shown}\n"
    write_atomically(options.out / f"{NAME}.md", lambda part: part.write_text(text))
    print(text)


def _tiny(options: argparse.Namespace) -> CausalLoop:
    network = load_tiny()[0].to(options.device)
    with torch.no_grad():
        prompt = network.project_context(embed_prompt(PROMPTS[0]).to(options.device))
    run = Run(frames=options.frames or TINY_FRAMES, chunk_frames=options.chunk_frames or 3, seed=options.seed)
    return CausalLoop(network, prompt, run, (1, network.sizes.channels, *LATENT), device=options.device)


def layers_table(tensors: dict[str, torch.Tensor], info: dict) -> str:
    """A row for K and for V of every layer, means over heads."""
    spectra, rows = tensors["spectrum"].float(), []
    for layer in range(info["layers"]):
        for side, name in enumerate("KV"):
            def mean(key: str, layer: int = layer, side: int = side) -> float:
                return float(tensors[key][layer, side].float().mean())

            shares = [float(spectra[layer, side, :, :count].sum(-1).mean()) for count in FIRST]
            errors = tensors["error"][:, layer, side].tolist()
            rows.append((f"{name} {layer}", mean("mean_share"), *shares, mean("frame_correlation"), mean("chunk_share"), *errors))
    bits = [f"{name} ({float(own):.2f} + {float(books):.2f} bits)" for name, own, books in zip(
        info["presets"], tensors["bits"], tensors["codebook_bits"])]
    columns = ("layer", "mean share", *(f"first {count}" for count in FIRST), "repeats", "between chunks", *bits)
    return table(columns, rows)
