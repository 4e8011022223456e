"""Statistics of a run's own keys and values, in one small file: what a codec can use, and what it leaves.

    recorder = Recorder(presets(), chunk_frames=3)
    loop.make(PRESETS["off"], change=recorder.watch)
    save(path, recorder.tensors(), {"model": "...", ...})
    tensors, info = load(path)

Axes: L layers, 2 (keys after their norm and before RoPE, then values), H heads, D channels of a head, P presets. x: the tokens that a run
stores, all chunks and videos together. *scale* of a head: the root mean square over tokens and channels of x minus the head's mean.

| tensor | dtype and shape | meaning |
|---|---|---|
| `energy` | float32 [L, 2, H] | mean of x squared, over tokens and channels |
| `mean_share` | float32 [L, 2, H] | share of it that the head's mean over tokens holds |
| `channel_mean` | float16 [L, 2, H, D] | the head's mean, in units of scale |
| `channel_deviation` | float16 [L, 2, H, D] | standard deviation of each channel, in units of scale |
| `spectrum` | float16 [L, 2, H, D] | eigenvalues of the head's covariance, falling, as shares |
| `component_correlation` | float16 [L, 2, D] | correlation of each component (in the order of `spectrum`) of tokens at the same place in successive latent frames, the mean over heads |
| `frame_correlation` | float32 [L, 2, H] | the same for all components together: of the energy without the mean, the share that repeats |
| `chunk_share` | float32 [L, 2, H] | share of the energy without the mean that lies between the means of chunks |
| `norm_quantiles` | float32 [L, 2, H, 5] | quantiles of a token's root mean square, mean taken off, in units of scale |
| `error` | float32 [P, L, 2] | squared error of what a preset reads back, as a share of the energy; without sinks and recent frames |
| `bits` | float32 [P] | bits per element of that: codes, scales and ids |
| `codebook_bits` | float32 [P] | bits per element of the codebooks of this run, which a longer run has fewer of |

The metadata hold JSON under "statistics": `version`, `presets` (the names of P), `quantiles` (those of `norm_quantiles`), `layers`,
`heads`, `head_dim`, `tokens`, and what the caller adds: model, chunks, hardware. `frame_correlation` and `component_correlation` are
estimated at 256 places of a frame, `norm_quantiles` chunk by chunk.
"""  # noqa: E501 (rows of a table)

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..cache.kv_cache import KVCache
from ..cache.layer import LayerCache
from ..codec import tokens_of
from ..files import read_safetensors, write_atomically
from ..settings import QVGSettings

VERSION = 1
KEY = "statistics"
QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
PLACES = 256
HALF = ("channel_mean", "channel_deviation", "spectrum", "component_correlation")
TINY = 1e-30


class Layer:
    """Sums over the tokens of one layer, in float64 on the CPU; K and V are the first axis of each, [2, H, ...]."""

    def __init__(self, presets: int):
        self.tokens = self.pairs = self.chunks = 0
        self.total = self.square = self.between = self.norms = 0.0
        self.ends = self.product = self.squares = 0.0
        self.error, self.energy = torch.zeros(presets, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)

    def add(self, x: Tensor, before: Tensor | None, frames: int) -> Tensor:
        """Count the tokens of a chunk. x: [2, B, T, H, D]. before: what the last call of this video returned."""
        flat = x.flatten(1, 2).transpose(1, 2).float()  # [2, H, T, D]
        count = flat.shape[2]
        mean = flat.mean(2)
        self.tokens, self.chunks = self.tokens + count, self.chunks + 1
        self.total = self.total + count * _exact(mean)
        self.square = self.square + _exact(flat.mT @ flat)
        self.between = self.between + count * _exact(mean).square().sum(-1)
        self.energy += _exact(flat.square().sum((1, 2, 3)))
        centred = flat - (self.total / self.tokens).to(flat)[:, :, None]
        # torch.quantile refuses long rows
        norms = centred.square().mean(-1).sqrt().sort(-1).values
        self.norms = self.norms + _exact(norms[..., [round(part * (count - 1)) for part in QUANTILES]])
        return self._add_pairs(x, before, frames)

    def _add_pairs(self, x: Tensor, before: Tensor | None, frames: int) -> Tensor:
        """Tokens at the same place in successive frames. Returns some places of the last frame."""
        places = x.unflatten(2, (frames, -1))  # [2, B, F, N, H, D]
        step = -(-places.shape[3] // PLACES)
        some = places[:, :, :, ::step].float()
        if before is not None:
            some = torch.cat([before, some], dim=2)
        if some.shape[2] > 1:
            first, second = (part.flatten(1, 3).transpose(1, 2) for part in (some[:, :, :-1], some[:, :, 1:]))
            self.pairs += first.shape[2]
            self.ends = self.ends + _exact(first.sum(2) + second.sum(2))
            self.product = self.product + _exact(first.mT @ second)
            self.squares = self.squares + _exact(first.mT @ first + second.mT @ second)
        return some[:, :, -1:].clone()

    def tensors(self) -> dict[str, Tensor]:
        """The layer's part of the file."""
        mean = self.total / self.tokens
        covariance = self.square / self.tokens - mean[..., :, None] * mean[..., None, :]
        variance = covariance.diagonal(dim1=-2, dim2=-1).clamp(min=0)
        held, energy = mean.square().mean(-1), variance.mean(-1)
        scale = energy.clamp(min=TINY).sqrt()[..., None]
        values, vectors = torch.linalg.eigh(covariance)
        values = values.flip(-1).clamp(min=0)
        repeated, whole = self._repeating(vectors.flip(-1))
        return {
            "energy": held + energy, "mean_share": held / (held + energy).clamp(min=TINY), "channel_mean": mean / scale,
            "channel_deviation": variance.sqrt() / scale, "spectrum": values / values.sum(-1, keepdim=True).clamp(min=TINY),
            "component_correlation": (repeated / whole.clamp(min=TINY)).mean(1),
            "frame_correlation": repeated.sum(-1) / whole.sum(-1).clamp(min=TINY),
            "chunk_share": (self.between / self.tokens - mean.square().sum(-1)).clamp(min=0) / variance.sum(-1).clamp(min=TINY),
            "norm_quantiles": self.norms / self.chunks / scale}

    def _repeating(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Covariance of successive frames and variance of each component [2, H, D]; both zero for a single frame."""
        if not self.pairs:
            return torch.zeros(vectors.shape[:-1], dtype=vectors.dtype), torch.zeros(vectors.shape[:-1], dtype=vectors.dtype)
        middle = self.ends / (2 * self.pairs)
        outer = middle[..., :, None] * middle[..., None, :]
        across, within = (self.product + self.product.mT) / (2 * self.pairs) - outer, self.squares / (2 * self.pairs) - outer
        return tuple((vectors * (matrix @ vectors)).sum(-2) for matrix in (across, within))


def _exact(x: Tensor) -> Tensor:
    return x.cpu().double()


class Watched(LayerCache):
    """A layer whose tokens are also given to a recorder."""

    def __init__(self, owner: KVCache, number: int, recorder: Recorder, shadows: list[KVCache]):
        super().__init__(owner, number)
        self.recorder, self.shadows, self.last = recorder, [shadow.layers[number] for shadow in shadows], None

    def append(self, key: Tensor, value: Tensor, frames: int, newest: int = 0) -> None:
        sums = self.recorder.layers.setdefault(self.number, Layer(len(self.shadows)))
        self.last = sums.add(torch.stack([key, value]), self.last, frames)
        for number, shadow in enumerate(self.shadows):
            sums.error[number] += self.recorder.errors(number, shadow, (key, value), frames)
        super().append(key, value, frames, newest)


class Recorder:
    """Statistics of everything that watched caches store.

    presets: whose errors are recorded, each from a cache of its own that holds two chunks of at most `chunk_frames`.
    """

    def __init__(self, presets: Mapping[str, QVGSettings], chunk_frames: int):
        self.presets = {name: replace(settings, sink_frames=0, recent_frames=0, window_frames=chunk_frames + 1, budget_gib=0.0,
                                      offload=False, host_gib=0.0) for name, settings in presets.items()}
        self.layers: dict[int, Layer] = {}
        self.bytes, self.book_bytes, self.elements = ([0] * len(presets) for _ in range(3))

    def watch(self, cache: KVCache) -> None:
        """Record what an empty cache will store; see `loop.Change`."""
        geometry, place = cache.geometry, cache.workspace
        shadows = [KVCache(settings, layers=geometry.layers, heads=geometry.heads, head_dim=geometry.head_dim, grid=geometry.grid,
                           batch=geometry.batch, rope=lambda head_dim, grid: cache.rope, device=place.device, dtype=place.dtype)
                   for settings in self.presets.values()]
        cache.layers = [Watched(cache, number, self, shadows) for number in range(geometry.layers)]

    def errors(self, number: int, layer: LayerCache, pair: tuple[Tensor, Tensor], frames: int) -> Tensor:
        """Store a chunk with a preset; returns the sums of squared errors of K and V, float64 [2]. pair: [B, T, H, D] each."""
        books = [side.book for side in layer.sides]
        layer.append(*pair, frames)
        entry = layer.entries[-1]
        new = [side.book for side, book in zip(layer.sides, books) if side.book is not None and side.book is not book]
        self.bytes[number] += sum(entry.counts[0].values())
        self.book_bytes[number] += sum(book.nbytes for book in new)
        self.elements[number] += 2 * pair[0].numel()
        read = tokens_of(entry.present(), layer.owner.tables, torch.float32)
        return torch.stack([_exact((found - x.transpose(0, 1).flatten(1, 2).float()).square().sum()) for found, x in zip(read, pair)])

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the file. Raises ValueError if nothing was stored, or tokens that are not finite."""
        if not self.layers:
            raise ValueError("No keys or values were stored, so there are no statistics.")
        layers = [self.layers[number] for number in sorted(self.layers)]
        if not all(bool(layer.energy.isfinite().all()) for layer in layers):
            raise ValueError("Keys or values of this run are not finite (NaN or infinite), so there are no statistics. A model that "
                             "overflows in float16 is the usual cause; use bf16 or fp32.")
        parts = [layer.tensors() for layer in layers]
        found = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
        found["error"] = torch.stack([layer.error / layer.energy.clamp(min=TINY) for layer in layers], dim=1)
        for name, counts in (("bits", self.bytes), ("codebook_bits", self.book_bytes)):
            found[name] = torch.tensor([8 * count / elements for count, elements in zip(counts, self.elements)])
        return {name: tensor.to(torch.float16 if name in HALF else torch.float32).contiguous() for name, tensor in found.items()}

    @property
    def tokens(self) -> int:
        """Tokens of a head."""
        return max((layer.tokens for layer in self.layers.values()), default=0)


def save(path: Path, recorder: Recorder, more: Mapping[str, object]) -> None:
    """Write the file. more: JSON values for its metadata. Raises as `Recorder.tensors` does."""
    tensors = recorder.tensors()
    layers, _, heads, dim = tensors["spectrum"].shape
    info = {"version": VERSION, "presets": list(recorder.presets), "quantiles": QUANTILES, "layers": layers, "heads": heads,
            "head_dim": dim, "tokens": recorder.tokens, **more}
    write_atomically(path, lambda place: save_file(tensors, place, {KEY: json.dumps(info)}))


def load(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors and metadata of such a file. Raises ValueError for another one."""
    tensors, metadata = read_safetensors(path)
    if KEY not in metadata:
        raise ValueError(f"{path.name} holds no statistics of keys and values. Give a file that `qvg bench statistics` wrote.")
    info = json.loads(metadata[KEY])
    if info.get("version") != VERSION:
        raise ValueError(f"{path.name} has version {info.get('version')!r} of the statistics; this release reads version {VERSION}.")
    return tensors, info
