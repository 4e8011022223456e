"""Which frames of a context that arrives whole gain most from one more bit plane: the newest, or others for the same bytes. And what
presets lose where such a context, which has no sinks and few bits throughout, is attended to in eight bits ("fast").

    python -m comfyui_qvg.benchmarks.context [--videos 6] [--out DIR]

The tiny model's own videos of 18 latent frames are stored together, as a rebuilt context is, and their next chunk is made from the same
noise. Figures are latent PSNR against the exact history (power of the exact chunk over mean squared difference), of the chunk and of its
first frame, with the standard error over videos. The tiny model keeps its history chunk by chunk: it shows the effect of distance in time,
and says nothing about any other model.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace

import torch
from torch import Tensor

from ..qvg.cache.context import context_settings
from ..qvg.cache.geometry import Geometry
from ..qvg.cache.kv_cache import KVCache
from ..qvg.demo import GRID
from ..qvg.settings import PRESETS, QVGSettings
from ..qvg.video import SELF_FORCING_SIGMAS, CachedNetwork, Condition, Run
from ..qvg.video.prepare import cache_of
from .measure import add_out, claim, environment, progress, table, write
from .quality import BARE, Loop

GIVEN, CHUNK = 18, 3
COLUMNS = ("stored", "bits per element", "chunk dB", "+-", "first frame dB", "+-")


def ways() -> list[tuple[str, QVGSettings, int]]:
    """(label, settings, newest frames that are a span of their own); neighbours have equal bytes, or differ in attention."""
    found = []
    for bits in (2, 1):
        bare = BARE.both(bits=bits)
        found.append((f"{bits} planes", bare, 0))
        for frames, more in ((3, 1), (1, 2), (1, 1)):
            wider = bits + more
            found += [(f"{bits} planes, newest {frames} at {wider}", replace(bare, recent_frames=frames, recent_bits=wider), frames),
                      (f"{bits} planes, oldest {frames} at {wider}", replace(bare, sink_frames=frames, sink_bits=wider), GIVEN - frames)]
    for name in ("quality", "balanced", "smallest", "tiny"):
        for attention in ("exact", "fast"):
            settings = context_settings(replace(PRESETS[name], attention=attention), Geometry(1, 1, 64, GRID), GIVEN, CHUNK)
            found.append((f"{name}, {attention}", settings, settings.recent_frames))
    return found


class Next:
    """The tiny model, exact keys and values of its videos, and the noise of the chunk after them."""

    def __init__(self, videos: int):
        self.loop = Loop(torch.device("cpu"), GIVEN, videos)
        self.run = Run(frames=GIVEN + CHUNK)
        exact = self.cache(PRESETS["off"])
        model = self.model(exact)
        for first in range(0, GIVEN, CHUNK):
            model.denoise(self.loop.truth[:, :, first:first + CHUNK], 0.0, first, prompt_frame=first, store=True)
        draw = torch.Generator().manual_seed(0)
        self.noises = [torch.randn(videos, 16, CHUNK, *self.loop.truth.shape[3:], generator=draw) for _ in SELF_FORCING_SIGMAS]
        self.pairs = [[torch.cat([entry.spans[side].data for entry in layer.entries]).unflatten(1, (videos, -1)).transpose(0, 1)
                       for side in range(2)] for layer in exact.layers]
        self.exact = self.chunk(exact)

    def cache(self, settings: QVGSettings) -> KVCache:
        return cache_of(self.loop.network, settings, self.run, GRID, batch=self.loop.shape[0])

    def model(self, cache: KVCache) -> CachedNetwork:
        return CachedNetwork(self.loop.network, [Condition(self.loop.prompt, cache)])

    def chunk(self, cache: KVCache) -> Tensor:
        model, x, made = self.model(cache), self.noises[0], None
        for sigma, following, noise in zip(SELF_FORCING_SIGMAS, [*SELF_FORCING_SIGMAS[1:], 0.0], [*self.noises[1:], self.noises[0]]):
            if sigma == 0:
                break
            made = model.denoise(x, sigma, GIVEN, prompt_frame=GIVEN, store=False)
            x = (1 - following) * made + following * noise
        return made

    def compare(self, settings: QVGSettings, newest: int) -> tuple:
        cache = self.cache(settings)
        for layer, (key, value) in zip(cache.layers, self.pairs):
            layer.append(key, value, GIVEN, newest)
        bits, made = cache.stats().bits_per_element, self.chunk(cache)
        figures = []
        for part in (slice(None), slice(1)):
            exact, error = self.exact[:, :, part], (made - self.exact)[:, :, part]
            ratios = (10 * (exact.square().mean((1, 2, 3, 4)) / error.square().mean((1, 2, 3, 4))).log10()).tolist()
            figures += [statistics.mean(ratios), statistics.stdev(ratios) / len(ratios) ** 0.5]
        return bits, *figures


@torch.no_grad()
def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=6)
    parser.add_argument("--only", nargs="*", default=[], help="labels; default: all")
    add_out(parser)
    options = parser.parse_args(arguments)
    claim(options, "context")
    scene, rows = Next(options.videos), []
    for label, settings, newest in ways():
        if not options.only or label in options.only:
            rows.append((label, *scene.compare(settings, newest)))
            progress(f"{label}: {rows[-1][1]:.3f} bits, {rows[-1][2]:.2f} dB, first frame {rows[-1][4]:.2f} dB")
    place = environment(torch.device("cpu"), " ".join(["python -m comfyui_qvg.benchmarks.context", *arguments]))
    write(options.out, "context", {"environment": place, "videos": options.videos, "columns": COLUMNS, "rows": rows}, table(COLUMNS, rows))


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
