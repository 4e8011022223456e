"""`qvg demo`: the same seeded video with a bf16 cache and with quantized ones, measured, and drawn side by side.

All runs make the video from the same noise with the tiny model and differ only in the cache, so all differences between the videos come
from the cache. Two controls give the scale: `bf16-repeat` repeats the bf16 run, and in `bf16-noise` every element of the cache has an error
of 1e-3 of its tensor's standard deviation. Videos of an autoregressive model diverge however small the first difference is, so early
windows say the most about a cache, late windows the least. The first chunk that reads the cache reads only the first frames, which most
presets keep with more bits; *settled* is the mean of the windows that read frames at the preset's own bits.

The figures are of one tiny model and one video. For many seeds and methods: `qvg bench quality`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import mean

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..measure.loop import CausalLoop, Made, Progress, silent
from ..measure.noise import NOISY
from ..report import metrics
from ..settings import PRESETS
from ..units import format_bytes
from ..video import Run
from ..video.decode import ChunkDecoder, to_bytes
from ..video.writer import VideoWriter
from . import CHUNK_FRAMES, LATENT, embed_prompt, load_tiny

FRAME_RATE = 16
SETTLED = 2  # windows before the first one that reads settled frames: they read only sinks and recent frames
MOMENTS = 6  # columns of the picture
CAPTION = 22  # pixels above each of its rows
# name of a run -> preset
DEFAULT = {"bf16": "off", "bf16-repeat": "off", "bf16-noise": "off", "balanced": "balanced"}
COMPARED = {"paper-int2": "paper", "quality": "quality", "smallest": "smallest", "tiny": "tiny"}


class Demo:
    """The tiny model with one prompt. progress(done, of_all) is called after every pass of the network."""

    def __init__(self, prompt: str, device: str = "cpu"):
        network, vae = load_tiny()
        # many CPUs have no bf16 arithmetic; emulating it takes four times as long
        self.network, self.vae = network.to(device, torch.float32 if device == "cpu" else torch.bfloat16), vae.to(device)
        self.device = device
        with torch.no_grad():
            self.context = self.network.project_context(embed_prompt(prompt).to(device))

    def make(self, preset: str, run: Run, noise: bool = False, progress: Progress = silent) -> Made:
        """The video with the preset's cache. noise: with the exact cache that is off by 1e-3 (`measure.noise`)."""
        # bf16 as with the released models
        loop = CausalLoop(self.network, self.context, run, (1, 16, *LATENT), dtype=torch.bfloat16, device=self.device)
        return loop.make(NOISY if noise else PRESETS[preset], progress)

    def pictures(self, latents: Tensor, progress: Callable[[int, int], None] = lambda done, of_all: None) -> Tensor:
        """Decode latents [1, 16, F, h, w] to uint8 [F, H, W, 3]."""
        decode, frames = ChunkDecoder(self.vae), []
        pieces = latents.to(self.device).split(CHUNK_FRAMES, dim=2)
        for number, piece in enumerate(pieces):
            frames.append(to_bytes(decode(piece)[0]))
            progress(number + 1, len(pieces))
        return torch.cat(frames)


def windows(frames: int, chunk_frames: int) -> list[tuple[int, int]]:
    """First and last video frame of each chunk that reads a cache. A latent frame is four video frames, the very first is one."""
    size = 4 * chunk_frames
    return [(start, min(start + size, frames) - 1) for start in range(size - 3, frames, size)]


def figures(name: str, made: Made, pictures: Tensor, exact: Tensor, chunk_frames: int) -> dict:
    """The report's entry of a run."""
    stats = made.stats
    pair = pictures / 255, exact / 255
    db, index = metrics.psnr(*pair), metrics.ssim(*pair)
    parts = [{"frames": [first, last], "psnr": float(db[first:last + 1].mean()), "ssim": float(index[first:last + 1].mean())}
             for first, last in windows(len(db), chunk_frames)]
    # attention reads a bf16 cache in place, so the workspace is not counted for it
    peak = stats.stored_bytes if name.startswith("bf16") else stats.peak_bytes
    whole = {"psnr": float(db.mean()), "ssim": float(index.mean())}
    begun, settled = (parts[:1] or [whole])[0], parts[SETTLED:] or [whole]
    return {
        "stored_bytes": stats.stored_bytes, "peak_bytes": peak,
        "stored_ratio": stats.bf16_bytes / stats.stored_bytes, "peak_ratio": stats.bf16_bytes / peak,
        "bits_per_element": stats.bits_per_element, "seconds": sum(made.seconds),
        "psnr_first_chunk": begun["psnr"], "ssim_first_chunk": begun["ssim"],
        "psnr_settled": mean(part["psnr"] for part in settled), "ssim_settled": mean(part["ssim"] for part in settled),
        "psnr": float(db.mean()), "ssim": float(index.mean()), "windows": parts}


def draw(rows: dict[str, Tensor]) -> Image.Image:
    """One row per run: a caption, and some frames of its video, uint8 [F, H, W, 3]."""
    font = ImageFont.load_default(13)
    frames, height, width, _ = next(iter(rows.values())).shape
    moments = torch.linspace(0, frames - 1, MOMENTS).round().long()
    picture = Image.new("RGB", (MOMENTS * width, len(rows) * (height + CAPTION)), "white")
    pen = ImageDraw.Draw(picture)
    for row, (caption, video) in enumerate(rows.items()):
        top = row * (height + CAPTION)
        pen.text((4, top + 3), caption, "black", font)
        strip = video[moments].permute(1, 0, 2, 3).reshape(height, MOMENTS * width, 3)
        picture.paste(Image.fromarray(strip.numpy()), (0, top + CAPTION))
    return picture


def write_video(path: Path, pictures: Tensor) -> None:
    writer = VideoWriter(path, FRAME_RATE, overwrite=True)
    try:
        writer.write(pictures)
    finally:
        writer.close()


def render(report: dict) -> str:
    """The report as text: a table of runs, and a table of PSNR and SSIM by chunk."""
    runs = report["runs"]
    lines = [f"{report['frames']} frames ({report['latent_frames']} latent) of {report['size'][0]} x {report['size'][1]}, seed "
             f"{report['seed']}: {report['prompt']}", f"{report['hardware']}, torch {report['torch']}", "",
             f"{'cache':<12}{'stored':>10}{'peak':>10}{'ratio':>7}{'at peak':>8}{'bits':>7}{'seconds':>9}"
             f"{'settled':>17}{'whole clip':>17}"]
    for name, run in runs.items():
        lines.append(
            f"{name:<12}{format_bytes(run['stored_bytes']):>10}{format_bytes(run['peak_bytes']):>10}{run['stored_ratio']:>6.2f}x"
            f"{run['peak_ratio']:>7.2f}x{run['bits_per_element']:>7.2f}{run['seconds']:>9.1f}"
            f"{run['psnr_settled']:>8.1f} dB {run['ssim_settled']:.3f}{run['psnr']:>8.1f} dB {run['ssim']:.3f}")
    lines += ["", "PSNR and SSIM against bf16, chunk by chunk", f"{'frames':<10}" + "".join(f"{name:>16}" for name in runs)]
    for number, part in enumerate(runs["bf16"]["windows"]):
        span = "-".join(map(str, part["frames"]))
        cells = (run["windows"][number] for run in runs.values())
        lines.append(f"{span:<10}" + "".join(f"{cell['psnr']:>10.1f} {cell['ssim']:.3f}" for cell in cells))
    more = runs["balanced"]["seconds"] - runs["bf16"]["seconds"]
    whole = runs["bf16"]["seconds"] + report["decode_seconds"]
    return "\n".join([*lines, "", f"Balanced took {more:+.1f} s, {more / whole:+.0%} of the {whole:.1f} s that sampling and decoding the "
                                  f"video took with bf16. {metrics.MOST_DB:g} dB means equal. Figures of one tiny model, made for tests."])
