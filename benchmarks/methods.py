"""Methods of storing and reading a KV cache, behind one interface, for `qvg bench generate`.

A method is filled with `frames` latent frames of given keys and values, has an `attend` for a pass (see `qvg.models.wan`), and frees its
memory. All use the same functions for RoPE, attention and copies; they differ in what they store and how they read it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..qvg import backends
from ..qvg.attention.cached import CachedAttention
from ..qvg.attention.choice import packs
from ..qvg.attention.functions import Attention, sdpa
from ..qvg.attention.rope import Rope, rotate
from ..qvg.cache.geometry import Geometry
from ..qvg.cache.kv_cache import KVCache
from ..qvg.codec.base import Tables
from ..qvg.settings import PRESETS, QVGSettings
from . import peers

# the released scripts for Self-Forcing encode eight chunks of three frames together and keep newer ones in bf16
RELEASED_FRAMES = 24


class Method:
    """frames: stored so far. pair: keys and values [1, T, H, D] of a chunk that fills it, before RoPE."""

    def __init__(self, geometry: Geometry, pair: tuple[Tensor, Tensor], chunk: int, max_frames: int):
        self.geometry, self.pair, self.chunk, self.max_frames, self.frames = geometry, pair, chunk, max_frames, 0
        self.device, self.dtype = pair[0].device, pair[0].dtype

        self.rope = Rope(geometry.head_dim, geometry.grid)

    def fill(self, frames: int) -> None:
        while self.frames < frames:
            pair = self.prepared()
            for layer in range(self.geometry.layers):
                self.store(layer, *pair)
            self.frames += self.chunk

    def prepared(self) -> tuple[Tensor, Tensor]:
        """The pair as it is stored at the current position."""
        return self.pair

    def turn(self) -> None:
        self.angles = tuple(x[:, None] for x in self.rope.tables(self.frames, self.chunk, self.device))

    def begin(self, clean: bool):
        """An `attend` for the next chunk."""
        self.clean = clean
        self.turn()
        return self.attend

    def end(self) -> None:
        self.frames += self.chunk

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        raise NotImplementedError

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError

    def state_bytes(self) -> int:
        """On the device."""
        raise NotImplementedError

    def host_bytes(self) -> int:
        return 0


class Core(Method):
    """ComfyUI's own cache: bf16, keys after RoPE, allocated for the whole video from the start."""

    name = "bf16"
    attention: Attention = staticmethod(sdpa)

    def __init__(self, *arguments):
        super().__init__(*arguments)
        geometry = self.geometry
        shape = 2, 1, self.max_frames * geometry.frame_tokens, geometry.heads, geometry.head_dim
        self.kept = [torch.empty(shape, dtype=self.dtype, device=self.device) for _ in range(geometry.layers)]

    def prepared(self) -> tuple[Tensor, Tensor]:
        self.turn()
        return rotate(self.pair[0], *self.angles), self.pair[1]

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        start = self.frames * self.geometry.frame_tokens
        self.kept[layer][0, :, start:start + k.shape[1]] = k
        self.kept[layer][1, :, start:start + k.shape[1]] = v

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.store(layer, rotate(k, *self.angles), v)
        end = self.frames * self.geometry.frame_tokens + k.shape[1]
        return self.attention(rotate(q, *self.angles), self.kept[layer][0, :, :end], self.kept[layer][1, :, :end])

    def state_bytes(self) -> int:
        return sum(x.nbytes for x in self.kept)


class SageCore(Core):
    """The same, attended to by SageAttention."""

    name = "bf16, sageattention"

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.attention = _sage()


class Ours(Method):
    """This pack with one of its presets."""

    settings = PRESETS["balanced"]
    overlap = True
    attention: Attention | None = None

    def __init__(self, *arguments):
        super().__init__(*arguments)
        geometry = self.geometry
        self.cache = KVCache(self.settings, layers=geometry.layers, heads=geometry.heads, head_dim=geometry.head_dim, grid=geometry.grid,
                             rope=Rope, device=self.device, dtype=self.dtype, max_frames=self.max_frames, chunk_frames=self.chunk,
                             packs=packs(self.settings, self.device))
        if not self.overlap:
            self.cache.workspace.side = None

    @property
    def name(self) -> str:
        said = {", fast": self.settings.attention == "fast", ", one stream": not self.overlap, ", offloaded": self.settings.offload}
        return f"qvg {self.settings.name}" + "".join(word for word, holds in said.items() if holds)

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        self.cache.layers[layer].append(k, v, self.chunk)

    def begin(self, clean: bool):
        return CachedAttention(self.cache, start_frame=self.frames, frames=self.chunk, store=clean, attention=self.attention)

    def state_bytes(self) -> int:
        stats = self.cache.stats()
        visiting = self.cache.host.device_bytes if self.cache.host else 0
        return stats.stored_bytes - stats.host_bytes + stats.workspace_bytes + visiting

    def host_bytes(self) -> int:
        return self.cache.stats().host_bytes


def ours(settings: QVGSettings, overlap: bool = True, attention: str = "exact") -> type[Ours]:
    return type("Ours", (Ours,), {"settings": replace(settings, attention=attention), "overlap": overlap})


class SageOurs(Ours):
    """The preset Balanced, attended to by SageAttention."""

    name = "qvg balanced, sageattention"

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.attention = _sage()


def _sage() -> Attention:
    """Raises ValueError where SageAttention is missing."""
    found = peers.sage_attention()
    if isinstance(found, str):
        raise ValueError(found)
    return found


class Released(Method):
    """The released package's method: QVG of 24 frames at a time, bf16 until then; every read decodes the whole history to bf16 and applies
    RoPE.

    The codec is this pack's paper mode, whose kernel decodes faster than the released one.
    """

    name = "released method"

    def __init__(self, *arguments):
        super().__init__(*arguments)
        geometry = self.geometry
        shape = 2, 1, RELEASED_FRAMES * geometry.frame_tokens, geometry.heads, geometry.head_dim
        self.tail = [torch.empty(shape, dtype=self.dtype, device=self.device) for _ in range(geometry.layers)]
        self.spans = [[] for _ in range(geometry.layers)]
        self.tail_frames = [0] * geometry.layers
        self.tables = Tables(self.device)
        self.open()

    def open(self) -> None:
        settings, geometry = PRESETS["paper"], self.geometry
        self.codec = KVCache(settings, layers=1, heads=geometry.heads, head_dim=geometry.head_dim, grid=geometry.grid, rope=Rope,
                             device=self.device, dtype=self.dtype).layers[0].sides[0].codec
        self.generator = torch.Generator().manual_seed(0)
        self.readers = [None] * geometry.layers

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        start = self.tail_frames[layer] * self.geometry.frame_tokens
        for side, x in enumerate((k, v)):
            self.tail[layer][side, :, start:start + x.shape[1]] = x
        self.tail_frames[layer] += self.chunk
        if self.tail_frames[layer] == RELEASED_FRAMES:
            self.spans[layer].append(tuple(self.encode(x) for x in self.tail[layer]))
            self.tail_frames[layer] = 0

    def encode(self, x: Tensor):
        """[1, T, H, D] -> a span."""
        return self.codec.encode(x[0], 2, self.codec.train(x[0], self.generator))

    def decode(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Fill keys and values [1, T, H, D] with all spans, keys before RoPE."""
        spans, heads = self.spans[layer], slice(0, self.geometry.heads)
        if backends.refusal("decode", self.device):
            tokens = RELEASED_FRAMES * self.geometry.frame_tokens
            for number, pair in enumerate(spans):
                for span, out in zip(pair, (keys, values)):
                    out[0, number * tokens:(number + 1) * tokens] = span.decode(heads, self.tables)
            return
        if self.readers[layer] is None:
            self.readers[layer] = _unturned_reader(self)
        self.readers[layer].update([(*pair, RELEASED_FRAMES, number * RELEASED_FRAMES) for number, pair in enumerate(spans)])
        self.readers[layer](heads, self.geometry.heads, keys, values)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        packed = len(self.spans[layer]) * RELEASED_FRAMES * self.geometry.frame_tokens
        tail = self.tail_frames[layer] * self.geometry.frame_tokens
        keys, values = (x.new_empty(1, packed + tail + x.shape[1], *x.shape[2:]) for x in (k, v))
        if packed:
            self.decode(layer, keys[:, :packed], values[:, :packed])
        for out, kept, own in zip((keys, values), self.tail[layer], (k, v)):
            out[:, packed:packed + tail] = kept[:, :tail]
            out[:, packed + tail:] = own
        if self.clean:
            self.store(layer, k, v)
        keys = rotate(keys, *self.all_angles)
        return sdpa(rotate(q, *self.angles), keys, values)

    def begin(self, clean: bool):
        self.all_angles = tuple(x[:, None] for x in self.rope.tables(0, self.frames + self.chunk, self.device))
        return super().begin(clean)

    def state_bytes(self) -> int:
        spans = [span for layer in self.spans for pair in layer for span in pair]
        return sum(x.nbytes for x in self.tail) + sum(s.nbytes + s.codebook.nbytes for s in spans)


def _unturned_reader(method: Released):
    from ..kernels.reader import Angles, Reader

    class Still(Angles):
        """RoPE tables that change nothing: every cosine is 1."""

        def reach(self, first: int, last: int, device) -> None:
            super().reach(first, last, device)
            pairs = torch.zeros(*self.table.shape, 2, device=device)
            pairs[..., 0] = 1
            self.table = pairs.view(torch.int64)[..., 0]

    geometry = method.geometry
    return Reader(method.rope, geometry.head_dim, method.dtype, method.device, Still(method.rope))


class Package(Released):
    """The same with quant-videogen's own codec."""

    name = "quant-videogen 0.1.0"

    def open(self) -> None:
        self.package = peers.quant_videogen()
        if isinstance(self.package, str):
            raise ValueError(self.package)

    def encode(self, x: Tensor):
        return self.package.encode(x.transpose(1, 2).contiguous())

    def decode(self, layer: int, keys: Tensor, values: Tensor) -> None:
        tokens = RELEASED_FRAMES * self.geometry.frame_tokens
        for number, pair in enumerate(self.spans[layer]):
            for packed, out in zip(pair, (keys, values)):
                out[:, number * tokens:(number + 1) * tokens] = self.package.decode(packed).transpose(1, 2)

    def state_bytes(self) -> int:
        spans = [packed for layer in self.spans for pair in layer for packed in pair]
        return sum(x.nbytes for x in self.tail) + sum(map(peers.packed_bytes, spans))
