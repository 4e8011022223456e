"""The closed loop on a released checkpoint: how far each preset's video drifts from the one with an exact cache.

    qvg bench quality --checkpoint self_forcing_dmd.pt --embeddings prompts.safetensors [--vae wan_2.1_vae.safetensors] [--out DIR]

Every preset makes the same videos from the same noise. Figures are dB of latents against the exact cache, in the first chunk that reads a
history, from the third chunk on, and in the last quarter; with --vae also PSNR and SSIM of decoded frames. Two controls come first: the
exact cache once more, and one that is off by 1e-3. Bits count codes, scales, ids, codebooks and bases as they are held when the video
ends.

Writes quality-checkpoint.md, a picture (.png), and one .json to share: hardware, versions, the checkpoint's name and SHA-256, settings and
all rows. Stop it at any time; the rows that are done are kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..files import write_atomically
from ..measure.inputs import files_of, open_vae
from ..measure.rows import CONTROLS, Pictures, markdown, measure, pareto, presets
from ..report.environment import environment
from . import own_model, results
from .progress import bar

NAME = "quality-checkpoint"


def main(arguments: Sequence[str]) -> None:
    """Raises ValueError for what cannot be measured, before the first pass."""
    parser = argparse.ArgumentParser(prog="qvg bench quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    own_model.add_arguments(parser, required=True)
    parser.add_argument("--vae", type=Path, help="the VAE of Wan 2.1, for PSNR and SSIM of decoded frames")
    parser.add_argument("--only", nargs="+", metavar="PRESET", default=(), help="presets to measure (default: all)")
    options = parser.parse_args(arguments)
    methods = presets(options.only)
    results.claim(options, NAME, f"{NAME}.png")
    model = own_model.open_model(options)
    pictures = Pictures(open_vae(options.vae, options.device), options.device) if options.vae else None
    report = {"environment": environment(options.device, " ".join(["qvg bench quality", *arguments])), **model.report,
              "vae": files_of(options.vae) if options.vae else None, "rows": []}
    rows, names = report["rows"], ["exact", *CONTROLS, *methods]

    def write(show: bool = False) -> None:
        results.write(options.out, NAME, report, markdown(rows), show=show)
        picture = pareto(rows, f"{model.found.file}: dB of latents against the exact cache, third chunk on")
        write_atomically(options.out / f"{NAME}.png", lambda place: picture.save(place, "png"))

    with bar(model.found.file) as shown:
        for row in measure(model.loops, methods, pictures=pictures, progress=lambda name, done, of_all: shown.show(
                names.index(name) * of_all + done, len(names) * of_all, name)):
            rows.append(row)
            write()
    write(show=True)
