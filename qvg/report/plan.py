"""What a model, a size and a length need at every preset, before anything is loaded: `qvg plan`, and Plan KV Memory (QVG)."""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace

from ..attention.ranks import Cut, Ranks
from ..cache.codebooks import shortest_life
from ..cache.context import context_settings, forecast_context
from ..cache.forecast import Forecast, forecast
from ..cache.geometry import Geometry, division, on_device, usual_limit
from ..cache.walks import MEMORIES, check_memory, forecast_caches
from ..models.catalogue import MODELS, ModelShape
from ..models.weights import weight_type
from ..settings import PRESETS, QVGSettings
from ..units import GIB

CARDS = (8, 12, 16, 24, 32, 48, 80)
# the activations of one chunk, ComfyUI's own reserve (1.2 GiB), the driver and the screen
BESIDE_GIB = 2.0


def predict(shape: ModelShape, settings: QVGSettings, geometry: Geometry, frames: int, misfit: bool = False,
            memory: str = MEMORIES[0]) -> Forecast:
    """The bytes of a video of `frames` latent frames, or of one segment's context where the model rebuilds its context. misfit: see
    `forecast`. memory: of a world model, see `cache.walks`."""
    if shape.context_frames:
        return forecast_caches(settings, geometry, memory=memory, window=shape.context_frames, frames=frames,
                               chunk_frames=shape.chunk_frames, misfit=misfit)
    if not shape.segment_frames:
        found = forecast(settings, geometry, frames, shape.chunk_frames, misfit=misfit)
        if misfit and settings.window_frames:
            # within a window, codebooks that are replaced as often as can be are evicted as early, so the usual case may hold more of them
            found = max(found, forecast(settings, geometry, frames, shape.chunk_frames), key=lambda one: one.peak_bytes)
        return found
    given = min(frames, shape.segment_frames - shape.chunk_frames)
    new = shape.segment_frames - given
    return forecast_context(context_settings(settings, geometry, given, new), geometry, given, new)


def rebuilds(shape: ModelShape, memory: str) -> bool:
    """Whether the cache holds one context at a time, however long the video is."""
    return bool(shape.segment_frames) or (bool(shape.context_frames) and memory == "rebuild")


def longest(shape: ModelShape, settings: QVGSettings, geometry: Geometry, limit_bytes: int, most: int = 8192,
            memory: str = MEMORIES[0]) -> int:
    """Most latent frames, in whole chunks, whose peak in the worst case stays within limit_bytes; 0 when one chunk exceeds it."""
    chunk, end = shape.chunk_frames, most // shape.chunk_frames

    def peak(chunks: int) -> int:
        return predict(shape, settings, geometry, chunks * chunk, misfit=True, memory=memory).peak_bytes

    # Once sinks, recent frames, window and workspace are full, the peak grows by the same bytes with every period in which codebooks and
    # spans repeat, so it need not be forecast chunk by chunk beyond that.
    period = math.lcm(*(-(-frames // chunk) for frames in (settings.codebook_frames, shortest_life(settings, chunk))))
    filling = max(settings.sink_frames + settings.recent_frames + settings.window_frames, division(geometry).frames or 0)
    full = period * (2 + -(-filling // (period * chunk)))
    start = _last_within(peak, 0, min(full, end), limit_bytes)
    if start < full:
        return chunk * start
    if rebuilds(shape, memory) or settings.budget_gib:
        return chunk * _last_within(peak, start, end, limit_bytes)
    ahead = [peak(full + number) for number in range(period + 1)]

    def extrapolated(chunks: int) -> int:
        periods, rest = divmod(chunks - full, period)
        return ahead[rest] + periods * (ahead[-1] - ahead[0])

    return chunk * _last_within(extrapolated, full, end, limit_bytes)


def _last_within(peak: Callable[[int], int], low: int, high: int, limit_bytes: int) -> int:
    """The largest of low + 1 to high whose peak is at most limit_bytes, or low. Peaks do not fall."""
    return low + bisect_right(range(low + 1, high + 1), limit_bytes, key=peak)


def plan(model: str, *, size: tuple[int, int] = (0, 0), seconds: float = 0, latent_frames: int = 0, preset: str = "",
         vram_gib: float = 0, offload: bool = False, weights: str = "", memory: str = "", gpus: int = 1) -> dict:
    """One row per preset, in bytes and ratios, of each GPU.

    worst_stored_bytes and worst_peak_bytes are for a video whose codebooks stop fitting as soon as they may; the other figures are for one
    whose codebooks fit for as long as they may serve. `fits` and `longest_latent_frames` are for the worst case.

    size: width and height in pixels; 0 is the model's usual one. vram_gib: GiB that the cache may take; 0 leaves out whether it fits.
    offload: spans are in host memory. weights: the type of the weights, where they were counted. memory: of a world model, by default the
    first of `MEMORIES`; `original_bytes` are what the original keeps of the same frames, in bf16 and for each branch of attention.
    gpus: how many make the video together, each with a share of the heads (`attention.ranks`). The workspace is that of a card on which
    the weights leave vram_gib, or where they were not counted, of the GPU here or a small one.
    Raises ValueError for an unknown model, a length that is not positive, a memory of a model that has no choice, and a number of GPUs
    among which heads or tokens cannot be divided.
    """
    if model not in MODELS:
        raise ValueError(f"There is no model {model!r}; choose one of {', '.join(MODELS)}.")
    shape: ModelShape = MODELS[model]
    if memory and not shape.context_frames:
        raise ValueError(f"{model} is no world model, so there is no memory to choose; leave {memory!r} out.")
    memory = memory or MEMORIES[0]
    check_memory(memory)
    geometry = one_of_several(shape.geometry(*size), gpus, usual_limit("cuda", _card_bytes(shape, vram_gib, weights)))
    frames = latent_frames or shape.latent_frames(seconds)
    if frames < 1 or seconds < 0 or latent_frames < 0:
        raise ValueError("Give a positive length, as seconds or as latent frames.")
    rows = {}
    for name in [preset] if preset else PRESETS:
        settings = replace(QVGSettings.preset(name), offload=offload)
        found, worst = (predict(shape, settings, geometry, frames, misfit, memory) for misfit in (False, True))
        rows[name] = {
            "bf16_bytes": found.bf16_bytes, "stored_bytes": found.stored_bytes, "peak_bytes": found.peak_bytes,
            "workspace_bytes": found.workspace_bytes, "stored_ratio": found.stored_ratio, "peak_ratio": found.peak_ratio,
            "host_bytes": found.host_bytes, "bits_per_element": found.bits_per_element,
            "worst_stored_bytes": worst.stored_bytes, "worst_peak_bytes": worst.peak_bytes}
        if vram_gib:
            limit = int(vram_gib * GIB)
            rows[name] |= {"fits": worst.peak_bytes <= limit,
                           "longest_latent_frames": longest(shape, settings, geometry, limit, memory=memory)}
    width, height = (given or usual for given, usual in zip(size, shape.size))
    head = {"model": model, "width": width, "height": height, "latent_frames": frames, "seconds": shape.seconds(frames)}
    if weights:
        head |= {"weights": weight_type(weights), "weight_bytes": shape.weight_bytes(weights)}
    if shape.note:
        head["note"] = shape.note
    if gpus > 1:
        head["gpus"] = gpus
    if shape.context_frames:
        head |= {"memory": memory, "original_bytes": 2 * next(iter(rows.values()))["bf16_bytes"]}
    return head | ({"preset": preset} | rows[preset] if preset else {"presets": rows})


def _card_bytes(shape: ModelShape, left_gib: float, weights: str) -> int:
    """Of the card on which weights of this type leave so much, see `left_for_cache`; 0 where they were not counted."""
    return shape.weight_bytes(weights) + int((left_gib + BESIDE_GIB) * GIB) if weights and left_gib else 0


def one_of_several(geometry: Geometry, gpus: int, limit: int) -> Geometry:
    """The geometry of a cache on one of several GPUs. limit: bytes of the workspace. Raises ValueError where heads or tokens cannot be
    divided among them."""
    ranks = Ranks(0, gpus)
    heads = ranks.heads(geometry.heads)
    Cut(ranks, geometry.grid)
    return on_device(replace(geometry, heads=heads), "cuda", limit)


def render(result: dict, vram_gib: float = 0) -> str:
    """`plan`'s result as a table."""
    rows = result["presets"] if "presets" in result else {result["preset"]: result}
    lines = [f"{result['model']}, {result['width']} x {result['height']}, {result['latent_frames']} latent frames "
             f"({result['seconds']:.1f} s): {next(iter(rows.values()))['bf16_bytes'] / GIB:.2f} GiB in bf16"]
    if "gpus" in result:
        lines[0] += f" on each of {result['gpus']} GPUs"
    if "memory" in result:
        lines[0] = lines[0].replace(":", f", memory {result['memory']}:", 1)
        lines[0] += f", {result['original_bytes'] / GIB:.2f} GiB with both branches of attention, as the original keeps them"
    if "weights" in result:
        lines.append(f"(beside {result['weight_bytes'] / GIB:.1f} GiB of weights in {result['weights']})")
    if "note" in result:
        lines.append(f"({result['note']})")
    offloaded = any(row["host_bytes"] for row in rows.values())
    lines.append(f"{'preset':<10}{'stored':>12}{'peak':>12}{'ratio':>8}{'at peak':>9}{'bits':>7}{'at worst':>15}"
                 + ("     on host" if offloaded else "")
                 + (f"   within {round(vram_gib, 1):g} GiB" if vram_gib else ""))
    for name, row in rows.items():
        line = (f"{name:<10}{row['stored_bytes'] / GIB:>8.2f} GiB{row['peak_bytes'] / GIB:>8.2f} GiB"
                f"{row['stored_ratio']:>7.2f}x{row['peak_ratio']:>8.2f}x{row['bits_per_element']:>7.2f}"
                f"{row['worst_peak_bytes'] / GIB:>11.2f} GiB")
        if offloaded:
            line += f"{row['host_bytes'] / GIB:>8.2f} GiB"
        if vram_gib:
            longest_frames, shape = row["longest_latent_frames"], MODELS[result["model"]]
            line += f"   {'fits' if row['fits'] else 'does not fit'}"
            if not (rebuilds(shape, result.get("memory", "")) and row["fits"]):
                line += f"; at most {longest_frames} latent frames ({max(0.0, shape.seconds(longest_frames)):.1f} s)"
        lines.append(line)
    return "\n".join(lines)


def brief(result: dict, vram_gib: float) -> str:
    """`plan`'s result as sentences, one line per preset, for ComfyUI's Nodes 2.0, which has no columns."""
    rows, shape = result["presets"], MODELS[result["model"]]
    beside = f" beside {result['weight_bytes'] / GIB:.1f} GiB of weights in {result['weights']}" if "weights" in result else ""
    lines = [f"{result['seconds']:.1f} s at {result['width']} x {result['height']}: {rows['off']['bf16_bytes'] / GIB:.1f} GiB in bf16; "
             f"{round(vram_gib, 1):g} GiB for the cache{beside}."]
    for name, row in rows.items():
        if name == "off":
            continue
        most = row["longest_latent_frames"]
        worst = f" (at worst {row['worst_peak_bytes'] / GIB:.1f})" if row["worst_peak_bytes"] > row["peak_bytes"] else ""
        lines.append(f"{name.capitalize()}: peak {row['peak_bytes'] / GIB:.1f} GiB{worst}, {row['peak_ratio']:.1f}x less, "
                     + ("fits" if row["fits"] else "does not fit")
                     + (f"; longest {shape.seconds(most):.0f} s." if most and not rebuilds(shape, result.get("memory", "")) else "."))
    return "\n".join(lines)


def left_for_cache(model: str, card_gib: float, weights: str = "bf16", *, required: bool = False) -> float:
    """GiB of a card that `model`'s weights in this type and `BESIDE_GIB` leave for the cache, at least 0.

    Text encoder and VAE are not counted: ComfyUI unloads the one before sampling, and loads the other after it.
    Raises ValueError for a model whose weights are not known and, where `required`, when nothing is left, with the weight types that would
    leave something.
    """
    shape = MODELS.get(model)
    if shape is None or not shape.parameters:
        known = ", ".join(name for name, other in MODELS.items() if other.parameters)
        raise ValueError(f"The weights of {model!r} cannot be counted, only those of {known}; give the memory that they leave instead.")
    needed = shape.weight_bytes(weights) / GIB
    left = max(0.0, card_gib - needed - BESIDE_GIB)
    if required and not left:
        smaller = {name: left_for_cache(model, card_gib, name) for name in shape.weight_types()}
        ways = "; ".join([f"{name} would leave {other:.1f} GiB" for name, other in smaller.items() if other][:3])
        raise ValueError(f"The weights of {model} in {weight_type(weights)} and {BESIDE_GIB:g} GiB beside them take "
                         f"{needed + BESIDE_GIB:.1f} GiB, which leaves nothing of a card of {card_gib:g} GiB"
                         + (f"; {ways}." if ways else ", and no smaller weights would."))
    return left


def _longest_text(shape: ModelShape, row: dict) -> str:
    """The longest video of one row of `plan`, in seconds. A cache that is rebuilt for every segment does not grow with the video."""
    if rebuilds(shape, MEMORIES[0]):
        return "any" if row["fits"] else "0 s"
    return f"{max(0.0, shape.seconds(row['longest_latent_frames'])):.0f} s"


def render_cards(model: str, seconds: float = 30, weights: str = "bf16") -> str:
    """A Markdown table of what fits on cards of `CARDS` GiB: the longest video with its whole history, and the preset for `seconds`."""
    names = ("off", "quality", "balanced", "smallest", "tiny")
    lines = [f"| card | left for the cache | bf16 | Quality | Balanced | Smallest | Tiny | {seconds:g} s fit with |", "|---" * 8 + "|"]
    for card in CARDS:
        left = left_for_cache(model, card, weights)
        rows = plan(model, seconds=seconds, vram_gib=left, weights=weights)["presets"] if left else {}
        longest_of = {name: _longest_text(MODELS[model], rows[name]) if rows else "0 s" for name in names}
        fitting = next((name for name in names if rows and rows[name]["fits"]), "a window" if left else "smaller weights")
        advice = "any" if fitting == "off" else fitting.capitalize()
        lines.append(f"| {card} GB | {left:.1f} GiB | " + " | ".join(longest_of.values()) + f" | {advice} |")
    return "\n".join(lines)


def to_json(result: dict) -> str:
    return json.dumps(result, indent=2)
