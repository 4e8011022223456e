"""A scatter plot, drawn with Pillow: bits per element against dB, with the Pareto frontier."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

SIZE, MARGIN = (1100, 720), (80, 50, 40, 70)  # left, top, right, bottom
COLOURS = {"qvg": (31, 111, 180), "preset": (20, 150, 90), "paper": (205, 90, 30), "baseline": (130, 130, 130)}


def frontier(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points whose y exceeds that of all points with smaller x."""
    best, kept = float("-inf"), []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if y > best:
            best = y
            kept.append((x, y))
    return kept


def draw(title: str, axes: tuple[str, str], points: Sequence[tuple[str, str, float, float]]) -> Image.Image:
    """points: (family, label, x, y); a family is a key of `COLOURS`. Without points, only the axes."""
    image = Image.new("RGB", SIZE, "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size=13)
    left, top, right, bottom = MARGIN[0], MARGIN[1], SIZE[0] - MARGIN[2], SIZE[1] - MARGIN[3]
    xs, ys = [point[2] for point in points] or [0.0], [point[3] for point in points] or [0.0]
    spans = [(low - 0.06 * (high - low or 1), high + 0.12 * (high - low or 1)) for low, high in ((min(xs), max(xs)), (min(ys), max(ys)))]

    def place(x: float, y: float) -> tuple[float, float]:
        (x0, x1), (y0, y1) = spans
        return left + (right - left) * (x - x0) / (x1 - x0), bottom - (bottom - top) * (y - y0) / (y1 - y0)

    pen.text((left, 16), title, "black", ImageFont.load_default(size=17))
    for number in range(6):
        (x0, x1), (y0, y1) = spans
        x, y = x0 + number * (x1 - x0) / 5, y0 + number * (y1 - y0) / 5
        pen.line([place(x, y0), place(x, y1)], (232, 232, 232))
        pen.line([place(x0, y), place(x1, y)], (232, 232, 232))
        pen.text((place(x, y0)[0] - 12, bottom + 8), f"{x:.2f}", "black", font)
        pen.text((left - 48, place(x0, y)[1] - 8), f"{y:.1f}", "black", font)
    pen.text(((left + right) / 2 - 60, bottom + 34), axes[0], "black", font)
    pen.text((8, top - 26), axes[1], "black", font)
    pen.line([place(*point) for point in frontier([point[2:] for point in points])], (190, 190, 190), 2)
    for family, label, x, y in points:
        px, py = place(x, y)
        pen.ellipse([px - 5, py - 5, px + 5, py + 5], COLOURS[family])
        pen.text((px + 8, py - 8), label, COLOURS[family], font)
    return image
