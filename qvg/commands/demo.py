"""`qvg demo`: one video with several caches, side by side, and a report.

    qvg demo [--out DIR] [--latent-frames N] [--seed N] [--prompt TEXT] [--compare]
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from torch import Tensor

from ..demo import CHUNK_FRAMES, PROMPTS
from ..demo.run import COMPARED, DEFAULT, Demo, draw, figures, render, write_video
from ..files import write_atomically
from ..report.environment import hardware
from ..units import format_bytes
from ..video import Run
from .arguments import device, whole
from .progress import bar
from .results import prepare_folder

RESULTS = ("bf16.mp4", "qvg.mp4", "side_by_side.png", "report.json")


def add_arguments(command) -> None:
    command.add_argument("--out", type=Path, default=Path("qvg-demo"), help="folder for the videos, the picture and report.json")
    command.add_argument("--latent-frames", type=whole(1, 10_000), default=24, metavar="N",
                         help="length; one latent frame is four video frames (default 24)")
    command.add_argument("--seed", type=whole(0, 2**64 - 1), default=0)
    command.add_argument("--prompt", default=PROMPTS[0])
    command.add_argument("--overwrite", action="store_true", help="replace the files of an earlier demo in that folder")
    command.add_argument("--compare", action="store_true", help="also QVG as released (int2), and the presets Quality, Smallest and Tiny")
    command.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")


def main(arguments) -> None:
    """Raises ValueError for a prompt with unknown words, and for a folder that cannot be used."""
    run = Run(frames=arguments.latent_frames, chunk_frames=min(CHUNK_FRAMES, max(1, arguments.latent_frames)), seed=arguments.seed)
    demo = Demo(arguments.prompt, arguments.device)
    prepare_folder(arguments.out, RESULTS, arguments.overwrite)
    with bar("warm-up") as progress:
        demo.pictures(demo.make("balanced", Run(frames=2 * CHUNK_FRAMES)).latents[:, :, :CHUNK_FRAMES], progress.show)
    videos, runs, decode_seconds = run_all(demo, run, DEFAULT | (COMPARED if arguments.compare else {}))
    frames, height, width, _ = videos["bf16"].shape
    report = {
        "hardware": hardware(arguments.device), "torch": torch.__version__, "frames": frames, "latent_frames": run.frames,
        "size": [width, height], "prompt": arguments.prompt, "seed": run.seed, "decode_seconds": decode_seconds,
        "runs": runs}
    write_results(arguments.out, videos, report)
    print(render(report))
    print(f"\n{arguments.out}: {', '.join(RESULTS)}")


def run_all(demo: Demo, run: Run, presets: dict[str, str]) -> tuple[dict[str, Tensor], dict[str, dict], float]:
    """Make the video once per entry of presets, {name of the run: preset}; the first is the exact one.

    Returns the videos as uint8 [F, H, W, 3], the report's entries, both by name, and the seconds that decoding the first took.
    """
    videos, runs, exact, decode_seconds = {}, {}, None, 0.0
    for name, preset in presets.items():
        with bar(f"{name}: sampling") as progress:
            made = demo.make(preset, run, name == "bf16-noise", progress.show)
        if exact is not None and torch.equal(made.latents, exact):
            videos[name] = videos["bf16"]
        else:
            start = time.perf_counter()
            with bar(f"{name}: decoding") as progress:
                videos[name] = demo.pictures(made.latents, progress.show)
            decode_seconds = decode_seconds or time.perf_counter() - start
        exact = made.latents if exact is None else exact
        runs[name] = figures(name, made, videos[name], videos["bf16"], run.chunk_frames)
    return videos, runs, decode_seconds


def write_results(out: Path, videos: dict[str, Tensor], report: dict) -> None:
    """The files of `RESULTS`."""
    write_video(out / "bf16.mp4", videos["bf16"])
    write_video(out / "qvg.mp4", videos["balanced"])
    rows = {f"{name}: {run['bits_per_element']:.2f} bits per element, {format_bytes(run['stored_bytes'])}, settled "
            f"{run['psnr_settled']:.1f} dB": videos[name] for name, run in report["runs"].items() if not name.startswith("bf16-")}
    write_atomically(out / "side_by_side.png", lambda place: draw(rows).save(place, "png"))
    write_atomically(out / "report.json", lambda place: place.write_text(json.dumps(report, indent=2), encoding="utf-8"))
