"""What a closed loop measures: a row for every method, with the dB of its videos against those of the exact cache.

    for row in measure([loop], {"balanced": PRESETS["balanced"]}):
        ...                                     # "exact again", "1e-3 noise", "balanced"

Of the exact run only its latents are kept. The first two rows are controls: an exact cache once more, and one with noise (`noise`).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from ..report import metrics, scatter
from ..report.table import table
from ..settings import PRESETS, QVGSettings
from ..units import format_bytes
from ..video.decode import ChunkDecoder, to_bytes
from .loop import Made, Progress, Windows, closeness
from .noise import NOISY

EXACT = "exact"
CONTROLS = {"exact again": PRESETS["off"], "1e-3 noise": NOISY}
COLUMNS = ("method", "bits per element", "of these, codebooks", "stored", "peak", "seconds a chunk", "first dB", "later dB", "+-",
           "last quarter dB")


class Loop(Protocol):
    """See `loop`. lengths: latent frames of each chunk."""

    @property
    def lengths(self) -> Sequence[int]: ...

    def make(self, settings: QVGSettings, progress: Progress = ...) -> Made: ...


def presets(names: Sequence[str] = ()) -> dict[str, QVGSettings]:
    """The presets to measure: those named, or all but Off. Raises ValueError for a name that is not a preset."""
    chosen = {name: QVGSettings.preset(name.lower()) for name in names or PRESETS}
    return {name.lower(): settings for name, settings in chosen.items() if not settings.changes_nothing}


class Pictures:
    """PSNR and SSIM of decoded frames, decoded with `vae` a latent frame at a time and not kept."""

    def __init__(self, vae, device):
        self.vae, self.device = vae, device

    def compare(self, latents: Tensor, exact: Tensor) -> dict[str, Tensor]:
        """{"psnr": [B, F], "ssim": [B, F]}: the mean over the pictures of each latent frame; latents [B, C, F, h, w]."""
        found = {"psnr": [], "ssim": []}
        for pair in zip(latents.split(1), exact.split(1)):
            decoders, rows = [ChunkDecoder(self.vae) for _ in pair], {name: [] for name in found}
            for pieces in zip(*(video.split(1, dim=2) for video in pair)):
                pictures = [to_bytes(decode(piece.to(self.device))[0]).to(self.device) / 255 for decode, piece in zip(decoders, pieces)]
                for name, values in rows.items():
                    values.append(getattr(metrics, name)(*pictures).mean().cpu())
            for name, values in rows.items():
                found[name].append(torch.stack(values))
        return {name: torch.stack(values) for name, values in found.items()}


def measure(loops: Sequence[Loop], methods: Mapping[str, QVGSettings], *, pictures: Pictures | None = None,
            progress: Callable[[str, int, int], None] = lambda name, done, of_all: None) -> Iterator[dict]:
    """A row for each control and method, as it is done. loops: one for every video. progress: gets the row's name and the passes of its
    videos; what it raises ends the measurement. A method for which memory does not suffice has "error" and no figures.

    Raises ValueError for videos of fewer than three chunks, before anything is computed, and for exact videos that are not finite.
    """
    windows = Windows.of(loops[0].lengths)

    def made(name: str, number: int, settings: QVGSettings) -> Made:
        return loops[number].make(settings, lambda done, of_all: progress(name, number * of_all + done, len(loops) * of_all))

    exact = [made(EXACT, number, PRESETS["off"]).latents for number in range(len(loops))]
    if not all(bool(latents.isfinite().all()) for latents in exact):
        raise ValueError("The video with an exact cache is not finite (NaN or infinite), so nothing can be compared with it. A model that "
                         "overflows in float16 is the usual cause; use bf16 or fp32, and see whether the embeddings are the model's own.")
    for name, settings in (CONTROLS | dict(methods)).items():
        row = {"method": name, "settings": json.loads(settings.to_json())}
        try:
            yield row | _figures([made(name, number, settings) for number in range(len(loops))], exact, windows, pictures)
        except (MemoryError, torch.OutOfMemoryError) as error:
            yield row | {"error": f"not enough memory ({str(error).splitlines()[0] if str(error) else type(error).__name__})"}


def _figures(videos: Sequence[Made], exact: Sequence[Tensor], windows: Windows, pictures: Pictures | None) -> dict:
    found = {"latent_db": torch.cat([closeness(video.latents, truth) for video, truth in zip(videos, exact)])}
    if pictures is not None:
        compared = [pictures.compare(video.latents, truth) for video, truth in zip(videos, exact)]
        found |= {name: torch.cat([one[name] for one in compared]) for name in compared[0]}
    means = {name: windows.means(values) | {"frames": values.tolist()} for name, values in found.items()}
    stats, seconds = [video.stats for video in videos], [second for video in videos for second in video.seconds[1:]]
    return {
        "attention": stats[0].attention, "bits_per_element": statistics.mean(one.bits_per_element for one in stats),
        "codebook_bits": statistics.mean(8 * one.by_kind.get("codebooks", 0) / max(1, one.elements) for one in stats),
        "stored_bytes": round(statistics.mean(one.stored_bytes for one in stats)), "peak_bytes": max(one.peak_bytes for one in stats),
        "seconds_a_chunk": statistics.median(seconds), "seconds": sum(sum(video.seconds) for video in videos)} | means


def error_of_mean(values: Sequence[float]) -> float:
    """The standard error; 0 for a single value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def markdown(rows: Sequence[dict]) -> str:
    """The rows as a table."""
    shown = any("psnr" in row for row in rows)
    lines = []
    for row in rows:
        if "error" in row:
            lines.append((row["method"], row["error"], *[None] * (len(COLUMNS) - 2 + 2 * shown)))
            continue
        decibels = row["latent_db"]
        lines.append((
            row["method"], row["bits_per_element"], row["codebook_bits"],
            *(format_bytes(row[name]) for name in ("stored_bytes", "peak_bytes")),
            row["seconds_a_chunk"], statistics.mean(decibels["first"]), statistics.mean(decibels["later"]),
            error_of_mean(decibels["later"]), statistics.mean(decibels["last_quarter"]),
            *((statistics.mean(row["psnr"]["later"]), f"{statistics.mean(row['ssim']['later']):.4f}") if shown else ())))
    return table(COLUMNS + (("later PSNR", "later SSIM") if shown else ()), lines)


def pareto(rows: Sequence[dict], title: str) -> Image.Image:
    """The methods without the controls: bits per element against dB of latents from the third chunk on."""
    points = [("paper" if row["settings"]["codec"] == "paper" else "preset", row["method"], row["bits_per_element"],
               statistics.mean(row["latent_db"]["later"])) for row in rows if "error" not in row and row["method"] not in CONTROLS]
    return scatter.draw(title, ("bits per element", "dB"), points)


def summary(rows: Sequence[dict]) -> str:
    """One line for each method that is not a control."""
    return "\n".join(
        f"{row['method']}: {row['error']}" if "error" in row else
        f"{row['method']}: {row['bits_per_element']:.2f} bits, {statistics.mean(row['latent_db']['later']):.1f} dB, "
        f"{row['seconds_a_chunk']:.3g} s a chunk" for row in rows if row["method"] not in CONTROLS)
