"""What a chart shows, as plain data: areas, lines, axes, names and colours, in bytes and frames, never in pixels.

`draw` (Pillow) and web/js/chart.js map it to pixels and add nothing. All values are JSON.

    {"frames": AXIS, "bytes": AXIS, "areas": [SERIES], "lines": [SERIES], "since": 0}
    AXIS    {"start", "end", "ticks", "label"}; ticks: [[value, text]], for bytes one list for "binary" and one for "decimal" units
    SERIES  {"id", "name", "key", "values", "colour", "dashed", "whole", "points"}

An area's points are [frame, bottom, top], lowest area first; a line's are [frame, value]. A series without a name is not in the legend.
key and values: the name's entry in web/js/strings.js, for translation; "" where only the name itself can be shown. since: how many moments
were described before; points then continue those, except in a series that is `whole`. The browser gets a run's chart in this way while it
grows.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

from ..units import format_bytes

BF16, PEAK, LIMIT = "#8b8d98", "#e5a52e", "#e0483e"
LAYERS, PSNR, SSIM = "#4c8dff", "#4c8dff", "#37b6a5"
# readable on dark and on light; numbers are bits per element
COLOURS = {
    "codebooks": "#d9609b", "0.5": "#6a4fc9", "0.75": "#4148a8", "1": "#2f6fd6", "1.25": "#6aa0f5", "1.5": "#2c79b8", "1.75": "#58bde0",
    "2": "#4c8dff", "2.5": "#1d7f96", "3": "#27a3b8", "4": "#2fa67f", "8": "#7fae3f", "16": "#c78a2c", "32": "#b8703a",
    "workspace": "#8f7bd8"}
# parts that are shown under another name than their own
NAMES = {"codebooks": "codebooks and bases"}
# for parts of codecs that are not listed above
PALETTE = ("#c2557a", "#a08f3c", "#4fa3a5", "#7d86c9", "#b0764a", "#6d9e5b")
# how far the axis of bytes goes beyond the highest value
HEADROOM = 1.04
TICKS = 5
UNITS = {"binary": (1024, ("B", "KiB", "MiB", "GiB", "TiB")), "decimal": (1000, ("B", "kB", "MB", "GB", "TB"))}


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


def parts_of(stats) -> dict[str, int]:
    """Bytes of each part of a `CacheStats`: what spans share, the spans by bits per element, the workspace."""
    shared = stats.stored_bytes - sum(stats.by_bits.values())
    # the codec's own name for it; another kind may have as many bytes by coincidence
    names = [kind for kind, count in stats.by_kind.items() if count == shared]
    name = "codebooks" if "codebooks" in names or not names else names[0]
    parts = {name: shared, **{f"{bits:g}": count for bits, count in stats.by_bits.items()}, "workspace": stats.workspace_bytes}
    return {name: count for name, count in parts.items() if count}


def name_of(part: str) -> dict:
    """Name, translation key and colour of a part of a cache; a codec's own part has the name it came with and a colour of `PALETTE`."""
    colour = COLOURS.get(part) or PALETTE[zlib.crc32(part.encode()) % len(PALETTE)]
    if _is_number(part):
        return {"name": f"{part}-bit elements", "key": "elements", "values": {"bits": part}, "colour": colour}
    return {"name": NAMES.get(part, part), "key": part if part in COLOURS else "", "values": {}, "colour": colour}


def _is_number(part: str) -> bool:
    """Whether a part is the elements of so many bits, of which any fraction is possible."""
    return part.replace(".", "", 1).isdecimal()


def series(id: str, points: list, colour: str, name: str = "", key: str = "", *, values: dict | None = None, dashed: bool = False,
           whole: bool = False) -> dict:
    return {"id": id, "name": name, "key": key, "values": values or {}, "colour": colour, "dashed": dashed, "whole": whole,
            "points": points}


class _Growing:
    """The points of one series. first: the moment at which it begins, one point after the first of `points`."""

    def __init__(self, first: int, point: list):
        self.first, self.points = first, [point]

    def since(self, moment: int) -> list:
        # before the first moment there is only the point from which it starts
        if len(self.points) == 1:
            return []
        return self.points[1 + moment - self.first if moment > self.first else 0:]


class Chart:
    """The chart of one run's KV cache, which grows with each `CacheStats`; `describe` gives it, or what is new in it.

    history: what it begins with.
    """

    def __init__(self, total_frames: int = 0, forecast=None, budget_bytes: int = 0, history: Sequence = ()):
        self.total_frames, self.forecast, self.budget_bytes = total_frames, forecast, budget_bytes
        self.moments = 0
        self._frame = self._last_frame = self._highest = 0
        self._areas: dict[str, _Growing] = {}
        self._peak, self._bf16 = _Growing(0, [0, 0]), _Growing(0, [0, 0])
        for stats in history:
            self.add(stats)

    def add(self, stats) -> None:
        amounts = parts_of(stats)
        floor = before = 0
        for part in sorted({*amounts, *self._areas}, key=_order):
            area = self._areas.get(part)
            if area is None:
                # it rises from the top of the area below it, as that was one moment earlier
                area = self._areas[part] = _Growing(self.moments, [self._frame, before, before])
            before, top = area.points[-1][2], floor + amounts.get(part, 0)
            area.points.append([stats.frames, floor, top])
            floor = top
        self._peak.points.append([stats.frames, stats.peak_bytes])
        self._bf16.points.append([stats.frames, stats.bf16_bytes])
        self._frame, self._last_frame = stats.frames, max(self._last_frame, stats.frames)
        self._highest = max(self._highest, stats.bf16_bytes, stats.peak_bytes)
        self.moments += 1

    def describe(self, since: int = 0, free_bytes: int = 0, device: str = "") -> dict:
        """The chart, with the points of the moments from `since` on. free_bytes: the most that the cache could take on `device`; 0 draws
        no line."""
        frames = max(self._last_frame, self.total_frames, 1)
        forecast = self.forecast
        highest = max(self._highest, *((forecast.peak_bytes, forecast.bf16_bytes) if forecast else ()), 1)
        lines = [series("peak", self._peak.since(since), PEAK, "peak", "peak"), series("bf16", self._bf16.since(since), BF16, "bf16")]
        if forecast and self.moments and self._last_frame < frames:
            for line, count, name in ((self._peak, forecast.peak_bytes, "forecast"), (self._bf16, forecast.bf16_bytes, "")):
                id, colour = ("peak-forecast", PEAK) if name else ("bf16-forecast", BF16)
                lines.append(series(id, [line.points[-1], [frames, count]], colour, name, name, dashed=True, whole=True))
        if 0 < self.budget_bytes < HEADROOM * highest:
            lines.append(series("budget", _level(self.budget_bytes, frames), LIMIT, "budget", "budget", whole=True))
        if 0 < free_bytes < HEADROOM * highest:
            lines.append(series("available", _level(free_bytes, frames), LIMIT, f"available on {device}", "available",
                                values={"device": device}, dashed=True, whole=True))
        areas = [series(part, self._areas[part].since(since), **name_of(part)) for part in sorted(self._areas, key=_order)]
        return {"frames": frame_axis(frames), "bytes": byte_axis(highest), "since": since, "areas": areas, "lines": lines}


def _level(count: int, frames: int) -> list:
    return [[0, count], [frames, count]]


def _order(part: str) -> tuple:
    """Lowest area first: what spans share, bits rising, the workspace."""
    number = _is_number(part)
    return part == "workspace", number, float(part) if number else 0, part


def frame_axis(frames: int) -> dict:
    return {"start": 0, "end": frames, "ticks": [[frame, str(frame)] for frame in round_steps(frames, TICKS)],
            "label": f"{frames} latent frames"}


def byte_axis(highest: int) -> dict:
    ticks = {system: [[count, tick_text(count, system)] for count in round_steps(highest, TICKS, base)]
             for system, (base, _) in UNITS.items()}
    return {"start": 0, "end": HEADROOM * highest, "ticks": ticks, "label": ""}


def tick_text(count: float, system: str) -> str:
    """5 * 2**20 -> "5 MiB", 1.5e9 -> "1.5 GB"."""
    base, names = UNITS[system]
    unit = 0
    while count >= base and unit < len(names) - 1:
        count, unit = count / base, unit + 1
    return f"{count:.0f} {names[unit]}" if abs(count - round(count)) < 1e-9 else f"{count:.1f} {names[unit]}"


def describe(history: Sequence, *, forecast=None, total_frames: int = 0, budget_bytes: int = 0) -> dict:
    """The whole chart of a run, with a summary in words and the bytes of each layer.

    history: `CacheStats` in the order in which they were taken; may be empty. forecast: has peak_bytes and bf16_bytes for `total_frames`
    latent frames, or None.
    """
    whole = Chart(total_frames, forecast, budget_bytes, history).describe() | {"summary": "", "layers": []}
    return whole | {"summary": summary(history[-1]), "layers": list(history[-1].by_layer)} if history else whole


def summary(stats) -> str:
    return (f"{format_bytes(stats.stored_bytes)} instead of {format_bytes(stats.bf16_bytes)} in bf16 ({stats.stored_ratio:.2f}x), "
            f"peak {format_bytes(stats.peak_bytes)} ({stats.peak_ratio:.2f}x), {stats.bits_per_element:.2f} bits per element"
            + (f", {format_bytes(stats.host_bytes)} in host memory" if getattr(stats, "host_bytes", 0) else ""))


def describe_frames(values: Sequence[float], name: str, form: str, colour: str) -> dict:
    """A chart of one figure per frame, such as PSNR. form: how its values are written, such as "{:.1f}"."""
    low, high = min(values), max(values)
    margin = max(1e-3 * abs(high), (high - low) / 8, 1e-3)
    low, high, last = low - margin, high + margin, len(values) - 1
    ticks = [low + (high - low) * part / 3 for part in range(4)]
    return {"title": f"{name}: mean {form.format(sum(values) / len(values))}", "areas": [],
            "frames": {"start": 0, "end": max(1, last), "label": "",
                       "ticks": [[frame, str(frame) if frame else "frame 0"] for frame in sorted({0, last // 2, last})]},
            "bytes": {"start": low, "end": high, "ticks": {"binary": [[value, form.format(value)] for value in ticks]}, "label": ""},
            "lines": [series(name, [[frame, value] for frame, value in enumerate(values)], colour)]}


def describe_comparison(psnr: Sequence[float], ssim: Sequence[float]) -> list[dict]:
    """Charts of PSNR (dB) and SSIM, one value per frame."""
    return [describe_frames(psnr, "PSNR, dB", "{:.1f}", PSNR), describe_frames(ssim, "SSIM", "{:.4f}", SSIM)]
