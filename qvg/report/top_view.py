"""A camera path seen from above, drawn with Pillow: where the camera goes, where it looks, and which frames a chunk reads.

Ahead of a camera that has not turned is up, its right is right. Every frame has a ray in its view direction. While the camera turns on the
spot, rays grow a little from frame to frame, so that their tips draw a spiral: a look to the right and back is two arcs, not one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image
from torch import Tensor

from .chart import LAYERS, PEAK, SSIM
from .draw import FAINT, GRID, INK, MARGIN, PANEL, Canvas

SIZE = (640, 640)
LEAST_SPAN = 0.5  # world units that the picture shows at least
STILL = 1e-4  # a shorter step is none, in world units
RAY, LONG_RAY, GROWTH = 16.0, 110.0, 44.0  # of a path, of one that only turns, and how much they grow on a spot; in units of the canvas
RAYS = 48  # drawn at most, besides those of marked frames
NUMBERS = 14  # of frames, about
LONGEST_TITLE = 52
SECTOR = "#263450"  # the colour of `LAYERS` over the panel

Point = tuple[float, float]


@dataclass
class _Plan:
    """What is drawn where, in pixels of the canvas: the place and the ray's tip of every frame, and the runs of frames on one spot."""

    box: tuple[float, float, float, float]
    places: list[Point]
    tips: list[Point]
    spots: list[range]
    scale: float  # pixels of a world unit
    corner: Point  # world coordinates of the left and bottom edges
    taken: list[tuple[float, float, float, float]] = field(default_factory=list)  # by numbers


def draw_top_view(centres: Tensor, directions: Tensor, *, read: Sequence[int] = (), chunk: Sequence[int] = (), field_of_view: float = 0,
                  title: str = "Camera path", size: tuple[int, int] = SIZE) -> Image.Image:
    """RGB picture of a path.

    centres, directions: of the cameras of F latent frames, [F, 3] each, x to the right, y down and z ahead. chunk: frames that are made.
    read: frames that are read for it. field_of_view: horizontal, in degrees, drawn for the first frame of `chunk`; 0 draws none.
    Raises ValueError for shapes that are not those of a path, and for frames that are not on it.
    """
    if centres.ndim != 2 or centres.shape != directions.shape or centres.shape[1] != 3 or not len(centres):
        raise ValueError(f"Centres have the shape {list(centres.shape)} and directions {list(directions.shape)}; give [frames, 3] of both.")
    for frame in (*read, *chunk):
        if not 0 <= frame < len(centres):
            raise ValueError(f"Frame {frame} was to be marked, and the path has {len(centres)} frames.")
    canvas = Canvas(size, title if len(title) <= LONGEST_TITLE else f"{title[:LONGEST_TITLE - 3]}...")
    unit, width, height = canvas.unit, *canvas.image.size
    canvas.text(MARGIN * unit, 42 * unit, summary(centres, directions), 12, FAINT)
    plan = _plan(canvas, (MARGIN * unit, 60 * unit, width - MARGIN * unit, height - 50 * unit), centres, directions)
    _draw_grid(canvas, plan)
    if field_of_view and chunk:
        _draw_field_of_view(canvas, plan, chunk[0], field_of_view)
    _draw_path(canvas, plan, set(read), set(chunk))
    _draw_numbers(canvas, plan)
    marks = [(SSIM, "start"), (INK, "end")]
    marks += [(PEAK, "frames read")] if read else []
    marks += [(LAYERS, "this chunk")] if chunk else []
    x, y = MARGIN * unit, height - 20 * unit
    for colour, name in marks:
        canvas.dot((x + 5 * unit, y), colour, 5)
        x = canvas.text(x + 16 * unit, y, name, 12, INK) + 18 * unit
    return canvas.reduced()


def summary(centres: Tensor, directions: Tensor) -> str:
    """In words: frames, the way, the turns and the climb."""
    steps = (centres[1:] - centres[:-1]).norm(dim=-1)
    cosines = (directions[1:] * directions[:-1]).sum(-1)
    sines = directions[1:].cross(directions[:-1], dim=-1).norm(dim=-1)
    turned = math.degrees(float(sines.atan2(cosines).sum()))
    climb = float((centres[:, 1] - centres[0, 1]).abs().max())
    parts = [f"{len(centres)} latent frames", f"{float(steps.sum()):.3g} units of way", f"{turned:.0f} degrees turned"]
    return ", ".join(parts + ([f"height by {climb:.2g}"] if climb > STILL else []))


def _plan(canvas: Canvas, box: tuple[float, float, float, float], centres: Tensor, directions: Tensor) -> _Plan:
    """Places and rays, with the path in the middle of the box and as large as fits."""
    unit, (left, top, right, bottom) = canvas.unit, box
    across, ahead = centres[:, 0].tolist(), centres[:, 2].tolist()
    spans = [max(values) - min(values) for values in (across, ahead)]
    turns_only = max(spans) < STILL
    spots = _spots(centres)
    # room for rays and numbers at the edge
    room = 2 * unit * (RAY + 20 + (GROWTH if any(len(spot) > 2 for spot in spots) else 0))
    scale = min((right - left - room) / max(spans[0], LEAST_SPAN), (bottom - top - room) / max(spans[1], LEAST_SPAN))
    middle = [(max(values) + min(values)) / 2 for values in (across, ahead)]
    corner = (middle[0] - (right - left) / 2 / scale, middle[1] - (bottom - top) / 2 / scale)
    places = [(left + (x - corner[0]) * scale, bottom - (z - corner[1]) * scale) for x, z in zip(across, ahead)]
    lengths = [(LONG_RAY if turns_only else RAY) * unit] * len(places)
    for spot in spots:
        step = min(0.6, GROWTH / len(spot)) * unit * (2 if turns_only else 1)
        for number, frame in enumerate(spot):
            lengths[frame] += number * step
    tips = [(x + length * dx, y - length * dz)
            for (x, y), length, dx, dz in zip(places, lengths, directions[:, 0].tolist(), directions[:, 2].tolist())]
    return _Plan(box, places, tips, spots, scale, corner)


def _spots(centres: Tensor) -> list[range]:
    """Runs of two and more frames on one spot."""
    moves = ((centres[1:] - centres[:-1]).norm(dim=-1) > STILL).tolist()
    starts = [0, *(frame + 1 for frame, moved in enumerate(moves) if moved)]
    runs = [range(start, end) for start, end in zip(starts, [*starts[1:], len(centres)])]
    return [run for run in runs if len(run) > 1]


def _draw_grid(canvas: Canvas, plan: _Plan) -> None:
    unit, (left, top, right, bottom) = canvas.unit, plan.box
    canvas.draw.rectangle(plan.box, fill=PANEL)
    step = round_step((right - left) / plan.scale / 5)
    for axis, (start, end) in enumerate(((left, right), (top, bottom))):
        first = math.ceil(plan.corner[axis] / step)
        for number in range(first, first + math.ceil((end - start) / plan.scale / step) + 1):
            offset = (number * step - plan.corner[axis]) * plan.scale
            value = f"{number * step:g}"
            if axis == 0 and left + offset < right - 1:
                canvas.draw.line((left + offset, top, left + offset, bottom), fill=GRID, width=round(unit))
                canvas.text(left + offset, bottom + 12 * unit, value, 11, FAINT, "mm")
            elif axis == 1 and bottom - offset > top + 1:
                canvas.draw.line((left, bottom - offset, right, bottom - offset), fill=GRID, width=round(unit))
                canvas.text(left + 4 * unit, bottom - offset - 7 * unit, value, 11, FAINT)


def round_step(rough: float) -> float:
    """1, 2 or 5 times a power of ten, not below `rough`."""
    power = 10 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.999 * rough)


def _draw_field_of_view(canvas: Canvas, plan: _Plan, frame: int, degrees: float) -> None:
    """What a frame sees, as a sector."""
    (x, y), (tip_x, tip_y) = plan.places[frame], plan.tips[frame]
    if math.hypot(tip_x - x, tip_y - y) < 1:
        return  # it looks straight up or down
    left, top, right, bottom = plan.box
    middle = math.degrees(math.atan2(tip_y - y, tip_x - x))
    radius = min(max(90 * canvas.unit, 1.2 * math.hypot(tip_x - x, tip_y - y)), x - left, right - x, y - top, bottom - y)
    canvas.draw.pieslice((x - radius, y - radius, x + radius, y + radius), middle - degrees / 2, middle + degrees / 2, fill=SECTOR)


def _draw_path(canvas: Canvas, plan: _Plan, read: set[int], chunk: set[int]) -> None:
    frames = len(plan.places)
    every = -(-frames // RAYS)
    for frame in range(0, frames, every):
        canvas.line([plan.places[frame], plan.tips[frame]], FAINT, 0.75)
    for spot in plan.spots:
        canvas.line([plan.tips[frame] for frame in spot], FAINT, 1.5)
    canvas.line(plan.places, FAINT, 2)
    for marked, colour in ((read, PEAK), (chunk, LAYERS)):
        for frame in sorted(marked):
            canvas.line([plan.places[frame], plan.tips[frame]], colour, 1.5)
            canvas.dot(plan.tips[frame] if any(frame in spot for spot in plan.spots) else plan.places[frame], colour, 3.5)
    canvas.dot(plan.places[-1], INK, 5)
    canvas.dot(plan.places[0], SSIM, 5 if plan.places[0] != plan.places[-1] else 3)


def _draw_numbers(canvas: Canvas, plan: _Plan) -> None:
    """Numbers of frames: the first and the last, then round ones where there is room."""
    last = len(plan.places) - 1
    every = max(1, int(round_step(max(1, last / NUMBERS))))
    on_spot = {frame for spot in plan.spots for frame in spot}
    for frame in dict.fromkeys((0, last, *range(0, last, every))):
        (x, y), (tip_x, tip_y) = plan.places[frame], plan.tips[frame]
        if frame in on_spot:
            length = math.hypot(tip_x - x, tip_y - y) or 1
            target, away = (tip_x, tip_y), ((tip_x - x) / length, (tip_y - y) / length)
        else:
            target, away = (x, y), _left_of_way(plan.places, frame)
            if away[0] * (tip_x - x) + away[1] * (tip_y - y) > 0.3 * RAY * canvas.unit:
                away = (-away[0], -away[1])  # the ray is there
        _place_number(canvas, plan, str(frame), target, away)


def _left_of_way(places: Sequence[Point], frame: int) -> Point:
    """Unit vector to the left of the movement, so that the way there and the way back have their numbers on different sides."""
    (x0, y0), (x1, y1) = places[max(frame - 1, 0)], places[min(frame + 1, len(places) - 1)]
    length = math.hypot(x1 - x0, y1 - y0)
    return ((y1 - y0) / length, (x0 - x1) / length) if length else (0.0, -1.0)


def _place_number(canvas: Canvas, plan: _Plan, text: str, target: Point, away: Point) -> None:
    """Beside its frame, or not at all if another number is there."""
    unit, half = canvas.unit, canvas.width(text, 11) / 2
    x, y = (target[axis] + away[axis] * (11 * unit + (half if axis == 0 else 0)) for axis in (0, 1))
    box = (x - half, y - 6 * unit, x + half, y + 6 * unit)
    if all(box[2] < other[0] or other[2] < box[0] or box[3] < other[1] or other[3] < box[1] for other in plan.taken):
        plan.taken.append(box)
        canvas.text(x, y, text, 11, INK, "mm")
