"""`qvg plan`: what a model, a size and a length will need, at every preset, before anything is loaded."""

from __future__ import annotations

import json
from dataclasses import replace

from .budget import GIB, Forecast, Geometry, forecast
from .context import context_settings, forecast_context
from .models.catalogue import MODELS, ModelShape
from .settings import PRESETS, QVGSettings


def predict(shape: ModelShape, settings: QVGSettings, geometry: Geometry, frames: int) -> Forecast:
    """The bytes of a video of `frames` latent frames; of a segment's context where the model rebuilds that."""
    if not shape.segment_frames:
        return forecast(settings, geometry, frames, shape.chunk_frames)
    given = min(frames, shape.segment_frames - shape.chunk_frames)
    new = shape.segment_frames - given
    return forecast_context(context_settings(settings, geometry, given, new), geometry, given, new)


def longest(shape: ModelShape, settings: QVGSettings, geometry: Geometry, limit_bytes: int, most: int = 4096) -> int:
    """Most latent frames, in whole chunks, whose peak stays within limit_bytes; 0 when not even one chunk does."""
    chunk = shape.chunk_frames
    low, high = 0, most // chunk
    while low < high:
        middle = (low + high + 1) // 2
        fits = predict(shape, settings, geometry, middle * chunk).peak_bytes <= limit_bytes
        low, high = (middle, high) if fits else (low, middle - 1)
    return low * chunk


def plan(model: str, *, width: int = 0, height: int = 0, seconds: float = 0, latent_frames: int = 0, preset: str = "",
         vram_gib: float = 0, offload: bool = False) -> dict:
    """One row per preset as whole bytes and ratios; with `offload`, of spans that wait in host memory.

    Raises ValueError with a sentence for an unknown name or an impossible length.
    """
    if model not in MODELS:
        raise ValueError(f"There is no model {model!r}; choose one of {', '.join(MODELS)}.")
    shape: ModelShape = MODELS[model]
    geometry = shape.geometry(width, height)
    frames = latent_frames or shape.latent_frames(seconds)
    if frames < 1 or seconds < 0 or latent_frames < 0:
        raise ValueError("Give a positive length, as seconds or as latent frames.")
    rows = {}
    for name in [preset] if preset else PRESETS:
        settings = replace(QVGSettings.preset(name), offload=offload)
        found = predict(shape, settings, geometry, frames)
        rows[name] = {
            "bf16_bytes": found.bf16_bytes, "stored_bytes": found.stored_bytes, "peak_bytes": found.peak_bytes,
            "workspace_bytes": found.workspace_bytes, "stored_ratio": found.stored_ratio, "peak_ratio": found.peak_ratio,
            "host_bytes": found.host_bytes, "bits_per_number": found.bits_per_number}
        if vram_gib:
            limit = int(vram_gib * GIB)
            rows[name] |= {"fits": found.peak_bytes <= limit,
                           "longest_latent_frames": longest(shape, settings, geometry, limit)}
    width, height = width or shape.size[0], height or shape.size[1]
    head = {"model": model, "width": width, "height": height, "latent_frames": frames, "seconds": shape.seconds(frames)}
    if shape.note:
        head["note"] = shape.note
    return head | ({"preset": preset} | rows[preset] if preset else {"presets": rows})


def render(result: dict, vram_gib: float = 0) -> str:
    """`plan`'s result as a table for people."""
    rows = result["presets"] if "presets" in result else {result["preset"]: result}
    lines = [f"{result['model']}, {result['width']} x {result['height']}, {result['latent_frames']} latent frames "
             f"({result['seconds']:.1f} s): {next(iter(rows.values()))['bf16_bytes'] / GIB:.2f} GiB in bf16"]
    if "note" in result:
        lines.append(f"({result['note']})")
    offloaded = any(row["host_bytes"] for row in rows.values())
    lines.append(f"{'preset':<10}{'stored':>12}{'peak':>12}{'ratio':>8}{'at peak':>9}{'bits':>7}" + ("     on host" if offloaded else "")
                 + (f"   within {vram_gib:g} GiB" if vram_gib else ""))
    for name, row in rows.items():
        line = (f"{name:<10}{row['stored_bytes'] / GIB:>8.2f} GiB{row['peak_bytes'] / GIB:>8.2f} GiB"
                f"{row['stored_ratio']:>7.2f}x{row['peak_ratio']:>8.2f}x{row['bits_per_number']:>7.2f}")
        if offloaded:
            line += f"{row['host_bytes'] / GIB:>8.2f} GiB"
        if vram_gib:
            longest_frames = row["longest_latent_frames"]
            line += f"   {'fits' if row['fits'] else 'does not fit'}; at most {longest_frames} latent frames " \
                    f"({max(0.0, MODELS[result['model']].seconds(longest_frames)):.1f} s)"
        lines.append(line)
    return "\n".join(lines)


def to_json(result: dict) -> str:
    return json.dumps(result, indent=2)
