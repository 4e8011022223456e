"""The history of one run's KV cache as a picture, drawn with Pillow.

Left: bytes over committed latent frames. The stacked areas are codebooks, frames by the bits in which they are held, and the workspace;
the line above them is the peak; the grey line is the same cache in bf16; the red one the budget; dashes continue to the forecast. Right:
bytes of each layer. Every figure is a count of real tensors, except the dashed ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from ..units import format_bytes

BACKGROUND, PANEL, GRID, INK, FAINT = "#17181c", "#1f2127", "#34363e", "#e8e8ea", "#9a9ca6"
BF16, PEAK, BUDGET = "#8b8d98", "#f2b544", "#e0483e"
# web/js/chart.js has the same: what lies lowest first; numbers are bits
KINDS = {"codebooks": "#d9609b", 1: "#2f6fd6", 2: "#4c8dff", 3: "#27a3b8", 4: "#2fa67f", 8: "#7fae3f", 16: "#c78a2c", 32: "#b8703a",
         "workspace": "#8f7bd8"}
LAYERS, PSNR, SSIM = "#4c8dff", "#4c8dff", "#37b6a5"

SCALE = 2  # drawn larger and reduced, which smooths the edges


def round_steps(most: float, count: int, base: int = 1) -> list[float]:
    """[0, step, 2 step, ...] up to `most`: about `count` steps of 1, 2 or 5 times a power of ten, in units of a power of `base`."""
    unit = 1
    while base > 1 and most / count >= unit * base:
        unit *= base
    rough = most / count / unit
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.999 * rough) * unit
    if unit == 1:
        step = max(step, 1)
    return [step * number for number in range(math.floor(most / step) + 1)]


def amount(stats, kind: str | int) -> int:
    """Bytes of one of `KINDS`."""
    if kind == "workspace":
        return stats.workspace_bytes
    return stats.by_kind.get(kind, 0) if kind == "codebooks" else stats.by_bits.get(kind, 0)


def kinds_of(history: Sequence) -> list[str | int]:
    return [kind for kind in KINDS if any(amount(stats, kind) for stats in history)]


def draw_chart(history: Sequence, *, forecast=None, total_frames: int = 0, title: str = "", notes: str = "", budget_bytes: int = 0,
               size: tuple[int, int] = (960, 540)) -> Image.Image:
    """RGB picture of a run.

    history: `CacheStats` in the order in which they were taken; may be empty. forecast: has stored_bytes, peak_bytes and
    bf16_bytes for `total_frames` latent frames, or None. notes: a line below the figures. size: pixels, width and height.
    """
    width, height = size[0] * SCALE, size[1] * SCALE
    image = Image.new("RGB", (width, height), BACKGROUND)
    canvas = _Canvas(ImageDraw.Draw(image), unit=height / 540)
    margin = 24 * canvas.unit
    canvas.text(margin, 18 * canvas.unit, title or "KV cache", 20, INK)
    if not history:
        canvas.text(margin, height / 2, "No cache yet: run the sampler that uses this model.", 16, FAINT)
        return image.resize(size, Image.Resampling.LANCZOS)

    last = history[-1]
    canvas.text(margin, 48 * canvas.unit, _summary(last), 14, FAINT)
    if notes:
        canvas.text(margin, 70 * canvas.unit, notes, 14, FAINT)
    top, bottom, split = (106 if notes else 84) * canvas.unit, height - 64 * canvas.unit, 0.68 * width
    _draw_history(canvas, (margin + 64 * canvas.unit, top, split, bottom), history, forecast, total_frames, budget_bytes)
    _draw_layers(canvas, (split + 56 * canvas.unit, top, width - margin, bottom), last)
    _draw_legend(canvas, margin + 64 * canvas.unit, height - 24 * canvas.unit, kinds_of(history), forecast, budget_bytes)
    return image.resize(size, Image.Resampling.LANCZOS)


def draw_comparison(psnr: Sequence[float], ssim: Sequence[float], *, title: str = "", size: tuple[int, int] = (960, 540)) -> Image.Image:
    """RGB picture of PSNR (dB, upper half) and SSIM (lower half) of each frame."""
    width, height = size[0] * SCALE, size[1] * SCALE
    image = Image.new("RGB", (width, height), BACKGROUND)
    canvas = _Canvas(ImageDraw.Draw(image), unit=height / 540)
    margin = 24 * canvas.unit
    canvas.text(margin, 18 * canvas.unit, title or "Comparison", 20, INK)
    left, right = margin + 64 * canvas.unit, width - margin
    middle = height / 2
    _draw_frames(canvas, (left, 56 * canvas.unit, right, middle - 16 * canvas.unit), psnr, "PSNR, dB", "{:.1f}", PSNR)
    _draw_frames(canvas, (left, middle + 30 * canvas.unit, right, height - 40 * canvas.unit), ssim, "SSIM", "{:.4f}", SSIM)
    return image.resize(size, Image.Resampling.LANCZOS)


def _draw_frames(canvas: _Canvas, box, values: Sequence[float], name: str, form: str, colour: str) -> None:
    left, top, right, bottom = box
    low, high = min(values), max(values)
    room = max(1e-3 * abs(high), (high - low) / 8, 1e-3)
    low, high = low - room, high + room

    def at(frame: float, value: float) -> tuple[float, float]:
        return left + (right - left) * frame / max(1, len(values) - 1), bottom - (bottom - top) * (value - low) / (high - low)

    canvas.draw.rectangle(box, fill=PANEL)
    for part in range(4):
        value = low + (high - low) * part / 3
        y = at(0, value)[1]
        canvas.draw.line((left, y, right, y), fill=GRID, width=round(canvas.unit))
        canvas.text(left - 8 * canvas.unit, y, form.format(value), 12, FAINT, "rm")
    canvas.line([at(frame, value) for frame, value in enumerate(values)], colour, 3)
    canvas.text(left, top - 10 * canvas.unit, f"{name}: mean {form.format(sum(values) / len(values))}", 12, FAINT)
    for frame in sorted({0, (len(values) - 1) // 2, len(values) - 1}):
        canvas.text(at(frame, low)[0], bottom + 12 * canvas.unit, str(frame) if frame else "frame 0", 12, FAINT, "mm")


def _summary(stats) -> str:
    return (f"{format_bytes(stats.stored_bytes)} instead of {format_bytes(stats.bf16_bytes)} in bf16 ({stats.ratio:.2f}x), "
            f"peak {format_bytes(stats.peak_bytes)} ({stats.peak_ratio:.2f}x), {stats.bits_per_element:.2f} bits per element"
            + (f", {format_bytes(stats.host_bytes)} in host memory" if getattr(stats, "host_bytes", 0) else ""))


class _Canvas:
    """A drawing surface in which lengths count in pixels of the reduced picture, times `unit`."""

    def __init__(self, draw: ImageDraw.ImageDraw, unit: float):
        self.draw, self.unit = draw, unit

    def text(self, x: float, y: float, text: str, points: int, fill: str, anchor: str = "lm") -> float:
        """Writes and returns the x where the text ends."""
        self.draw.text((x, y), text, font=ImageFont.load_default(points * self.unit), fill=fill, anchor=anchor)
        return x + self.width(text, points)

    def width(self, text: str, points: int) -> float:
        return self.draw.textlength(text, font=ImageFont.load_default(points * self.unit))

    def line(self, points: Sequence[tuple[float, float]], fill: str, width: float = 2) -> None:
        if len(points) > 1:
            self.draw.line(list(points), fill=fill, width=round(width * self.unit), joint="curve")
        radius = width * self.unit
        x, y = points[-1]
        self.draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)

    def dashes(self, start: tuple[float, float], end: tuple[float, float], fill: str) -> None:
        length = max(abs(end[0] - start[0]), abs(end[1] - start[1]))
        steps = max(2, round(length / (6 * self.unit)))
        points = [tuple(a + (b - a) * i / steps for a, b in zip(start, end)) for i in range(steps + 1)]
        for a, b in zip(points[::2], points[1::2]):
            self.draw.line((a, b), fill=fill, width=round(2 * self.unit))


def _draw_history(canvas: _Canvas, box, history, forecast, total_frames: int, budget_bytes: int) -> None:
    left, top, right, bottom = box
    last = history[-1]
    last_frame = max(stats.frames for stats in history)
    frames = max(last_frame, total_frames if forecast else 0, 1)
    highest = max(max(max(s.bf16_bytes, s.peak_bytes) for s in history), forecast.bf16_bytes if forecast else 0, 1)

    def at(frame: float, count: float) -> tuple[float, float]:
        return left + (right - left) * frame / frames, bottom - (bottom - top) * count / (1.04 * highest)

    canvas.draw.rectangle(box, fill=PANEL)
    for count in round_steps(highest, 5, 1024):
        x, y = at(0, count)
        canvas.draw.line((left, y, right, y), fill=GRID, width=round(canvas.unit))
        canvas.text(x - 8 * canvas.unit, y, format_bytes(count), 12, FAINT, "rm")
    end = right - canvas.width(f"{frames} latent frames", 12)
    canvas.text(right, bottom + 14 * canvas.unit, f"{frames} latent frames", 12, FAINT, "rm")
    for frame in round_steps(frames, 5):
        if at(frame, 0)[0] < end - 24 * canvas.unit:
            canvas.text(at(frame, 0)[0], bottom + 14 * canvas.unit, str(frame), 12, FAINT, "mm")

    # a run starts with nothing, and one sample alone has no area
    floor = [0] * len(history)
    for kind in kinds_of(history):
        ceiling = [low + amount(stats, kind) for low, stats in zip(floor, history)]
        outline = [at(0, 0)] + [at(stats.frames, count) for stats, count in zip(history, ceiling)]
        outline += [at(stats.frames, count) for stats, count in reversed(list(zip(history, floor)))]
        canvas.draw.polygon(outline, fill=KINDS[kind])
        floor = ceiling
    canvas.line([at(0, 0)] + [at(stats.frames, stats.bf16_bytes) for stats in history], BF16)
    canvas.line([at(0, 0)] + [at(stats.frames, stats.peak_bytes) for stats in history], PEAK)
    if forecast and total_frames > last_frame:
        for start, end, colour in ((last.bf16_bytes, forecast.bf16_bytes, BF16), (last.peak_bytes, forecast.peak_bytes, PEAK)):
            canvas.dashes(at(last.frames, start), at(total_frames, end), colour)
    if 0 < budget_bytes < highest:
        canvas.draw.line((*at(0, budget_bytes), *at(frames, budget_bytes)), fill=BUDGET, width=round(2 * canvas.unit))


def _draw_layers(canvas: _Canvas, box, stats) -> None:
    left, top, right, bottom = box
    canvas.draw.rectangle(box, fill=PANEL)
    highest = max(max(stats.by_layer, default=0), 1)
    step = (bottom - top) / max(len(stats.by_layer), 1)
    gap = min(2 * canvas.unit, step / 5)
    for layer, count in enumerate(stats.by_layer):
        y = top + layer * step
        canvas.draw.rectangle((left, y + gap, left + (right - left) * count / highest, y + step - gap), fill=LAYERS)
    every = -(-len(stats.by_layer) // 12) or 1
    for layer in range(0, len(stats.by_layer), every):
        canvas.text(left - 8 * canvas.unit, top + (layer + 0.5) * step, str(layer), 12, FAINT, "rm")
    canvas.text(left, bottom + 14 * canvas.unit, f"bytes of each layer, at most {format_bytes(highest)}", 12, FAINT)


def _draw_legend(canvas: _Canvas, x: float, y: float, kinds: list, forecast, budget_bytes: int) -> None:
    names = {kind: f"{kind} bits" if isinstance(kind, int) else kind for kind in kinds}
    entries = [(names[kind], KINDS[kind]) for kind in kinds] + [("peak", PEAK), ("bf16", BF16)]
    for name, colour in entries + ([("budget", BUDGET)] if budget_bytes else []):
        canvas.draw.rectangle((x, y - 5 * canvas.unit, x + 10 * canvas.unit, y + 5 * canvas.unit), fill=colour)
        x = canvas.text(x + 16 * canvas.unit, y, name, 12, INK) + 18 * canvas.unit
    if forecast:
        canvas.text(x, y, "dashed: forecast", 12, FAINT)
