"""Sessions for `fuzz`: of causal models, of `qvg generate`, of segments, of growing videos and of walks."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_world import PATH, VIEWS, made_wan, sampler_of, wan_scene
from test_world import RUN as WALK

from comfyui_qvg.benchmarks import soak
from comfyui_qvg.benchmarks.planes import PLANES
from comfyui_qvg.qvg.attention.rope import Rope
from comfyui_qvg.qvg.cache.kv_cache import KVCache
from comfyui_qvg.qvg.models.wan import CausalWan, WanSizes
from comfyui_qvg.qvg.settings import PRESETS
from comfyui_qvg.qvg.video import CachedNetwork, ChunkDone, Condition, Run, Sampler, guided, segment_file, segments, walk_session
from comfyui_qvg.qvg.video import session as storage
from comfyui_qvg.qvg.video.generate import generate
from comfyui_qvg.qvg.video.job import resumed

SHAPE = (1, 16, 2, 4)
RUN = Run(frames=12, sigmas=(1, 0.5, 0), recache_frames=3)
STRANGE = [
    *(None, True, False, -1, 0, 1, 2, 3, 7, 8, 255, 256, 10**4, 10**6, 10**9, 10**12, 2**63, 2**64, -2**63, 10**40),
    *(1.5, 3.0, 0.0, -0.5, 1e308, float("nan"), float("inf"), [], {}, [[]], [1, 2, 3], {"a": 1}),
    *("", "x", "../../etc/passwd", "\0", "torch.float64", "0s: x", "99999999999s: x")]
POISON = [float("nan"), float("inf"), float("-inf"), 3e38, -3e38, 1e30, 1e-38, 0.0, -1.0]
TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool,
         torch.complex64]


class Base:
    """A good file: its fields, its tensors and its metadata."""

    def __init__(self, path: Path, kind: str, key: str = ""):
        with safe_open(path, "pt") as file:
            self.tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
            self.header = json.loads(file.metadata()[storage.HEADER])
        self.kind, self.key = kind, key


def places(value, path=()):
    """(path, value) of every value, containers included."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    yield path, value
    for key, part in pairs:
        yield from places(part, (*path, key))


def change_fields(draw: random.Random, fields, path_of_none=("tensors",)) -> str:
    """Change one value of a tree of plain values, somewhere. Layers and settings are drawn as often as all else together."""
    found = [(path, value) for path, value in places(fields) if path and path[0] not in path_of_none]
    tops = sorted({str(path[0]) for path, _ in found})
    top = draw.choice(tops)
    path, value = draw.choice([place for place in found if str(place[0][0]) == top])
    parent = fields
    for key in path[:-1]:
        parent = parent[key]
    kind = draw.randrange(8)
    if kind == 0:
        del parent[path[-1]]
    elif kind == 1 and isinstance(parent, dict):
        parent[draw.choice(["shell", "kind", "version", "x" * 300])] = draw.choice(STRANGE)
    elif kind == 2 and type(value) in (int, float):
        parent[path[-1]] = draw.choice([value + 1, value - 1, value * 2, value * 1000, -value, float(value), value / 3])
    elif kind == 3 and isinstance(value, list) and value:
        change = draw.choice([list.reverse, list.clear, list.pop, lambda x: x.append(copy.deepcopy(x[0])), lambda x: x.extend(x[:1] * 200)])
        change(value)
    elif kind == 4 and isinstance(value, str) and value.startswith("{"):
        inner = json.loads(value)
        change_fields(draw, inner)
        parent[path[-1]] = json.dumps(inner)
    elif kind == 5:
        parent[path[-1]] = copy.deepcopy(draw.choice(found)[1])
    else:
        parent[path[-1]] = copy.deepcopy(draw.choice(STRANGE))
    return f"field {path} {kind}"


def poison(draw, dtype: torch.dtype) -> float:
    """A value of POISON in a floating-point dtype, in some of which it is infinite."""
    return torch.tensor(draw.choice(POISON), dtype=torch.float64).to(dtype).item()


def change_tensor(draw: random.Random, tensors: dict) -> str:
    name, other = draw.choice(sorted(tensors)), draw.choice(sorted(tensors))
    x, kind = tensors[name], draw.randrange(9)
    x = x if x.ndim else x[None]
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[draw.choice(["x", name + "x", other, "recent0", "extra.y", "cache9.9.random"])] = tensors.pop(name)
    elif kind == 2:
        shapes = [x[None], x.flatten()]
        if x.ndim:
            shapes += [x.transpose(0, -1), x[:0], x[..., :-1], torch.cat([x, x]), x.reshape(*x.shape, 1), x.sum()]
        tensors[name] = draw.choice(shapes).contiguous().clone()
    elif kind == 3:
        tensors[name] = x.to(draw.choice(TYPES))
    elif kind == 4 and x.is_floating_point():
        tensors[name] = torch.full_like(x, poison(draw, x.dtype))
    elif kind in (5, 6) and x.numel():
        y = tensors[name] = x.clone()
        values = [0, 1, 127, 128, 255, -128]
        at = draw.randrange(x.numel()) if kind == 5 else slice(None)
        if x.is_floating_point() or x.dtype in (torch.uint8, torch.int8):
            value = poison(draw, x.dtype) if x.is_floating_point() else draw.choice(values)
            y.view(-1)[at] = value if x.is_floating_point() else torch.tensor(value % 256, dtype=torch.uint8).view(x.dtype).item()
    elif x.numel() and x.ndim:
        data = bytearray(x.contiguous().view(torch.uint8).numpy().tobytes())
        at = draw.randrange(len(data))
        data[at:at + 64] = draw.randbytes(len(data[at:at + 64]))
        tensors[name] = torch.frombuffer(data, dtype=torch.uint8).view(x.dtype).view(x.shape).clone()
    return f"tensor {name} {kind}"


def change_bytes(draw: random.Random, data: bytearray) -> str:
    head = 8 + int.from_bytes(data[:8], "little")
    at, kind = draw.choice([draw.randrange(min(head, len(data))), draw.randrange(len(data)), draw.randrange(8)]), draw.randrange(5)
    if kind == 0:
        del data[at:]
    elif kind == 1:
        data[at] ^= 1 << draw.randrange(8)
    elif kind == 2:
        data[at:at + 8] = draw.randbytes(8)
    elif kind == 3:
        del data[at:at + draw.randrange(1, 64)]
    else:
        # other numbers in the format's own header
        text = bytes(data[8:head])
        changed = text.replace(*draw.choice([(b'"F32"', b'"I32"'), (b'"U8"', b'"I8"'), (b"[1,", b"[9,"), (b"offsets", b"0ffsets"),
                                             (b"0,", b"18446744073709551615,"), (b'"shape":[', b'"shape":[0,')]), 1)
        data[:head] = len(changed).to_bytes(8, "little") + changed
    return f"bytes {kind} at {at}"


class Sessions:
    def __init__(self, folder: Path):
        self.folder, self.path, self.story, self.seed, self.opened = folder, folder / "bad.safetensors", "", 0, False
        torch.manual_seed(0)
        self.network = CausalWan(WanSizes(dim=256, ffn_dim=32, layers=2, text_dim=8)).requires_grad_(False).eval()
        self.small = soak.small_model()
        self.scene = wan_scene(made_wan(), torch.zeros(1, 48, 1, 4, 6))
        self.bases = [*self._causal(), *self._generated(), *self._segments(), *self._walks()]

    def sampler(self, settings, run=RUN, shape=SHAPE, conditions=1) -> Sampler:
        prompts = [self.network.project_context(torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(seed))) for seed in (0, 1)]
        caches = [KVCache(settings, layers=2, heads=2, head_dim=128, grid=(1, 2), rope=Rope, dtype=torch.float32, max_frames=run.frames,
                          chunk_frames=run.chunk_frames) for _ in range(conditions)]
        parts = [Condition(prompts[0], caches[0])] if conditions == 1 else guided(prompts[0], caches[0], prompts[1], caches[1], 2.0)
        return Sampler(CachedNetwork(self.network, parts), run, shape)

    def _causal(self):
        made = {name: PRESETS[name].both(centroids=4) for name in PRESETS} | {
            "window": replace(PLANES["balanced"].both(centroids=4), window_frames=3, sink_frames=1, codebook_frames=3),
            "plain": replace(PLANES["balanced"].both(centroids=4), recent_bits=16, sink_bits=8, sink_frames=3),
            "asymmetric": PRESETS["paper"].both(centroids=4, symmetric=False)}
        for number, settings in enumerate(made.values()):
            sampler, parts = self.sampler(settings, conditions=1 + number % 2), []
            for event in sampler:
                if isinstance(event, ChunkDone):
                    parts.append(event.latents)
                    if sampler.frames_done == 6:
                        break
            storage.save(self.path, sampler, fingerprint="x", latents=torch.cat(parts, 2), extra={"fps": 16})
            yield Base(self.path, "causal")

    def _generated(self):
        for cfg in (1.0, 2.0):
            todo = replace(soak.job(self.folder, self.small[3], 3, steps=1, budget_mib=2), cfg=cfg, negative="b")
            for _ in generate(*self.small[:3], todo):
                pass
            shutil.move(todo.out, self.folder / f"{cfg}.mp4")
            yield Base(todo.session, "generated", f"{cfg}.mp4")
            todo.session.unlink()

    def _segments(self):
        for carry in ("pixels", "latents"):
            made = segments.Segments(carry, 5, "")
            for _ in range(2):
                made.add(torch.randn(1, 16, 5, 2, 4), 3, torch.randn(1, 16, 2, 2, 4))
            made.save(self.path, "x")
            yield Base(self.path, "segments", carry)
        storage.write(self.path, {"kind": "stream", "key": "k", "done": 2, "frames": 20}, {"given": torch.randn(1, 16, 2, 2, 4)})
        yield Base(self.path, "stream")

    def _walks(self):
        for memory, preset in (("bank", "balanced"), ("append", "tiny"), ("rebuild", "quality")):
            sampler = self.walk(memory, PRESETS[preset])
            for event in sampler:
                if isinstance(event, ChunkDone) and sampler.frames_done == 8:
                    break
            walk_session.save(self.path, sampler, fingerprint="x", extra={"fps": 16}, tensors={"more": torch.ones(2)})
            yield Base(self.path, "walk", memory)

    def walk(self, memory, settings, views=VIEWS, path=PATH, run=WALK, shape=(1, 48, 4, 6)) -> Sampler:
        return sampler_of([self.scene], memory, shape, settings, views, run, path=path)

    def make(self, draw: random.Random) -> Base:
        """Write a changed file to `path`."""
        base = draw.choice(self.bases)
        header, tensors, steps = copy.deepcopy(base.header), dict(base.tensors), []
        kind = draw.randrange(10)
        for _ in range(draw.choice([1, 1, 1, 2, 3])):
            if kind < 5:
                steps.append(change_fields(draw, header))
            elif kind < 9 and tensors:
                steps.append(change_tensor(draw, tensors))
        if draw.randrange(20):
            header["tensors"] = {name: [str(x.dtype), list(x.shape), hashlib.sha256(storage._bytes(x)).hexdigest()]
                                 for name, x in tensors.items()}
        else:
            steps.append(change_fields(draw, header, ()))
        if draw.random() < 0.2:
            # as the sessions of long videos are written
            if header.get("version") == storage.VERSION:
                header["version"] = storage.PACKED
            content, metadata = storage.packed(header, tensors)
            steps.append("packed")
        else:
            text = json.dumps(header)
            content, metadata = tensors, {storage.HEADER: text, storage.DIGEST: hashlib.sha256(text.encode()).hexdigest()}
        save_file(content, self.path, metadata)
        if kind == 9:
            data = bytearray(self.path.read_bytes())
            steps.append(change_bytes(draw, data))
            self.path.write_bytes(data)
        self.story = f"{base.kind} {base.key}: {'; '.join(steps)}"
        return base

    def use(self, base: Base, draw: random.Random) -> str:
        if base.kind == "stream":
            found = segment_file.read_position(self.path, "k")
            self.opened = found is not None
            return "" if found is None or found[2].isfinite().all() else "given is not finite"
        if base.kind == "walk":
            return self._walk_on()
        session = segments.load(self.path)
        if isinstance(session, segments.SegmentSession):
            return self._continue_segments(session, base)
        if base.kind == "generated":
            return self._generate(session, base, draw)
        own = draw.random() < 0.5
        run = RUN if own else replace(session.run, frames=max(session.run.frames, session.frames_done + 3))
        sampler = self.sampler(session.settings[0], run, SHAPE if own else session.shape, len(session.settings))
        session.restore(sampler, "x")
        self.opened = True
        for event in sampler:
            if isinstance(event, ChunkDone):
                shown = [event.latents] + ([] if session.latents is None else [session.latents])
                return "" if all(part.isfinite().all() for part in shown) else "a video that is not finite"
        return "" if session.frames_done == run.frames else "no chunk was made"

    def _generate(self, session, base: Base, draw: random.Random) -> str:
        out = self.folder / "video.mp4"
        shutil.copy(self.folder / base.key, out)
        todo = resumed(session, out)
        todo = replace(todo, session=self.folder / "again.safetensors")
        if draw.random() < 0.7:
            todo = replace(todo, run=replace(todo.run, frames=session.frames_done + 3))
        try:
            with closing(generate(*self.small[:3], todo, resume=session)) as events:
                for event, _ in events:
                    self.opened = True
                    if isinstance(event, ChunkDone):
                        return "" if event.latents.isfinite().all() else "a video that is not finite"
        finally:
            todo.session.unlink(missing_ok=True)
        return "" if session.frames_done == todo.run.frames else "no chunk was made"

    def _walk_on(self) -> str:
        session = walk_session.load(self.path)
        run = replace(session.run, frames=max(len(session.cameras), session.frames_done + 4))
        path = session.cameras.resized(run.frames)
        sampler = self.walk(session.memory, session.settings[0], session.views, path, run, session.shape)
        session.restore(sampler, "x")
        self.opened = True
        for event in sampler:
            if isinstance(event, ChunkDone):
                return "" if event.latents.isfinite().all() and session.latents.isfinite().all() else "a video that is not finite"
        return "no chunk was made"

    def _continue_segments(self, session, base: Base) -> str:
        made = session.resume("x", segments.Segments(base.key, 5, ""), 100, 4, 2)
        self.opened = True
        good = made.latents.isfinite().all() and made.given.isfinite().all() and made.latents.shape[2] >= made.done
        return "" if good else "a video that is not finite"
