"""Charts as pictures, drawn with Pillow from the descriptions of `chart`."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from ..units import format_bytes
from .chart import LAYERS

BACKGROUND, PANEL, GRID, INK, FAINT = "#17181c", "#1f2127", "#34363e", "#e8e8ea", "#9a9ca6"
SCALE = 2  # drawn larger and reduced, which smooths the edges
SIZE = (960, 540)
MARGIN = 24


def draw_chart(chart: dict, *, title: str = "", notes: str = "", size: tuple[int, int] = SIZE) -> Image.Image:
    """RGB picture of a run: bytes over latent frames on the left, bytes of each layer on the right.

    chart: of `chart.describe`. notes: a line below the summary. size: width and height in pixels.
    """
    canvas = Canvas(size, title or "KV cache")
    unit, width, height = canvas.unit, *canvas.image.size
    margin = MARGIN * unit
    if not chart["summary"]:
        canvas.text(margin, height / 2, "No cache yet: run the sampler that uses this model.", 16, FAINT)
        return canvas.reduced()
    canvas.text(margin, 48 * unit, chart["summary"], 14, FAINT)
    canvas.text(margin, 70 * unit, notes, 14, FAINT)
    top, bottom, split = (106 if notes else 84) * unit, height - 64 * unit, 0.68 * width
    _draw_panel(canvas, (margin + 64 * unit, top, split, bottom), chart)
    _draw_layers(canvas, (split + 56 * unit, top, width - margin, bottom), chart["layers"])
    _draw_legend(canvas, margin + 64 * unit, height - 24 * unit, chart["areas"] + chart["lines"])
    return canvas.reduced()


def draw_comparison(charts: Sequence[dict], *, title: str = "", size: tuple[int, int] = SIZE) -> Image.Image:
    """RGB picture of the two charts of `chart.describe_comparison`, one above the other."""
    canvas = Canvas(size, title or "Comparison")
    unit, width, height = canvas.unit, *canvas.image.size
    left, right, middle = (MARGIN + 64) * unit, width - MARGIN * unit, height / 2
    for chart, top, bottom in zip(charts, (56 * unit, middle + 30 * unit), (middle - 16 * unit, height - 40 * unit)):
        _draw_panel(canvas, (left, top, right, bottom), chart, 3)
        canvas.text(left, top - 10 * unit, chart["title"], 12, FAINT)
    return canvas.reduced()


class Canvas:
    """A drawing surface whose lengths are pixels of the reduced picture times `unit`."""

    def __init__(self, size: tuple[int, int], title: str):
        self.size, self.unit = size, size[1] * SCALE / 540
        self.image = Image.new("RGB", (size[0] * SCALE, size[1] * SCALE), BACKGROUND)
        self.draw = ImageDraw.Draw(self.image)
        self.text(MARGIN * self.unit, 18 * self.unit, title, 20, INK)

    def reduced(self) -> Image.Image:
        return self.image.resize(self.size, Image.Resampling.LANCZOS)

    def text(self, x: float, y: float, text: str, points: int, fill: str, anchor: str = "lm") -> float:
        """Writes, and returns the x where the text ends."""
        self.draw.text((x, y), text, font=ImageFont.load_default(points * self.unit), fill=fill, anchor=anchor)
        return x + self.width(text, points)

    def width(self, text: str, points: int) -> float:
        return self.draw.textlength(text, font=ImageFont.load_default(points * self.unit))

    def line(self, points: Sequence[tuple[float, float]], fill: str, width: float = 2, dashed: bool = False) -> None:
        width = round(width * self.unit)
        if dashed:
            for start, end in zip(points, points[1:]):
                self._dashes(start, end, fill, width)
        elif len(points) > 1:
            self.draw.line(list(points), fill=fill, width=width, joint="curve")

    def _dashes(self, start: tuple[float, float], end: tuple[float, float], fill: str, width: int) -> None:
        length = max(abs(end[0] - start[0]), abs(end[1] - start[1]))
        steps = max(2, round(length / (6 * self.unit)))
        points = [tuple(a + (b - a) * i / steps for a, b in zip(start, end)) for i in range(steps + 1)]
        for a, b in zip(points[::2], points[1::2]):
            self.draw.line((a, b), fill=fill, width=width)

    def dot(self, point: tuple[float, float], fill: str, radius: float) -> None:
        radius, (x, y) = radius * self.unit, point
        self.draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)


def _draw_panel(canvas: Canvas, box: tuple[float, float, float, float], chart: dict, width: float = 2) -> None:
    """Axes, areas and lines of one chart. box: left, top, right, bottom; width: of the lines."""
    left, top, right, bottom = box
    across, up, unit = chart["frames"], chart["bytes"], canvas.unit

    def at(frame: float, value: float) -> tuple[float, float]:
        return (left + (right - left) * (frame - across["start"]) / (across["end"] - across["start"]),
                bottom - (bottom - top) * (value - up["start"]) / (up["end"] - up["start"]))

    canvas.draw.rectangle(box, fill=PANEL)
    for value, text in up["ticks"]["binary"]:
        y = at(0, value)[1]
        canvas.draw.line((left, y, right, y), fill=GRID, width=round(unit))
        canvas.text(left - 8 * unit, y, text, 12, FAINT, "rm")
    canvas.text(right, bottom + 14 * unit, across["label"], 12, FAINT, "rm")
    free = right - canvas.width(across["label"], 12) - 24 * unit if across["label"] else right + 1
    for frame, text in across["ticks"]:
        if at(frame, 0)[0] < free:
            canvas.text(at(frame, 0)[0], bottom + 14 * unit, text, 12, FAINT, "mm")
    for area in chart["areas"]:
        outline = [at(frame, high) for frame, _, high in area["points"]]
        outline += [at(frame, low) for frame, low, _ in reversed(area["points"])]
        canvas.draw.polygon(outline, fill=area["colour"])
    for line in chart["lines"]:
        points = [at(frame, value) for frame, value in line["points"]]
        canvas.line(points, line["colour"], width, line["dashed"])
        if not line["whole"]:
            canvas.dot(points[-1], line["colour"], width)


def _draw_layers(canvas: Canvas, box: tuple[float, float, float, float], layers: Sequence[int]) -> None:
    """A bar for the bytes of each layer."""
    left, top, right, bottom = box
    canvas.draw.rectangle(box, fill=PANEL)
    highest = max([*layers, 1])
    step = (bottom - top) / max(len(layers), 1)
    gap = min(2 * canvas.unit, step / 5)
    for layer, count in enumerate(layers):
        y = top + layer * step
        canvas.draw.rectangle((left, y + gap, left + (right - left) * count / highest, y + step - gap), fill=LAYERS)
    for layer in range(0, len(layers), -(-len(layers) // 12) or 1):
        canvas.text(left - 8 * canvas.unit, top + (layer + 0.5) * step, str(layer), 12, FAINT, "rm")
    canvas.text(left, bottom + 14 * canvas.unit, f"bytes of each layer, at most {format_bytes(highest)}", 12, FAINT)


def _draw_legend(canvas: Canvas, x: float, y: float, series: Sequence[dict]) -> None:
    unit = canvas.unit
    for entry in series:
        if not entry["name"]:
            continue
        if entry["dashed"]:
            canvas.line([(x, y), (x + 10 * unit, y)], entry["colour"], dashed=True)
        else:
            canvas.draw.rectangle((x, y - 5 * unit, x + 10 * unit, y + 5 * unit), fill=entry["colour"])
        x = canvas.text(x + 16 * unit, y, entry["name"], 12, INK) + 18 * unit
