"""The worked examples of docs/extending.md, run as they stand there, and how few places a codec of this pack touches."""

import ast
import importlib.util
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from comfyui_qvg.qvg import (
    CODECS,
    FAMILIES,
    KVCache,
    Part,
    PlainCodec,
    QVGSettings,
    Rope,
    Span,
    TensorSettings,
    attend,
    backends,
    forecast,
)
from comfyui_qvg.qvg.backends import remove
from comfyui_qvg.qvg.cache.geometry import Geometry
from comfyui_qvg.qvg.cache.limits import limits
from comfyui_qvg.qvg.codec import kmeans
from comfyui_qvg.qvg.demo import PROMPTS, load_tiny
from comfyui_qvg.qvg.demo.run import Demo
from comfyui_qvg.qvg.models import open_checkpoint
from comfyui_qvg.qvg.report.chart import describe
from comfyui_qvg.qvg.report.plan import plan
from comfyui_qvg.qvg.settings import PRESETS
from comfyui_qvg.qvg.units import GIB
from comfyui_qvg.qvg.video import CachedNetwork, ChunkDone, Condition, Run, Sampler
from comfyui_qvg.qvg.video import session as sessions

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = dict(re.findall(r"^```python (\w+\.py)\n(.*?)^```", (ROOT / "docs" / "extending.md").read_text(), re.M | re.S))


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Imports an example from a file of its own; what it registered is gone afterwards."""
    known = set(CODECS), set(FAMILIES), set(backends.names())

    def example(name):
        path = tmp_path / name
        path.write_text(EXAMPLES[name])
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, path.stem, module)
        spec.loader.exec_module(module)
        return module

    yield example
    for name in set(CODECS) - known[0]:
        CODECS.remove(name)
    for name in set(FAMILIES) - known[1]:
        FAMILIES.remove(name)
    for name in set(backends.names()) - known[2]:
        remove(name)


@pytest.fixture
def four_bit(load):
    load("four_bit.py")
    four = TensorSettings(bits=4)
    return QVGSettings(name="four-bit", codec="four-bit", key=four, value=four, sink_bits=8, recent_bits=8)


def filled(settings, frames=12, **options):
    cache = KVCache(settings, layers=2, heads=2, head_dim=32, grid=(4, 6), rope=Rope, dtype=torch.float32, max_frames=frames, **options)
    draw = torch.Generator().manual_seed(3)
    for _ in range(frames // 3):
        for layer in range(2):
            q, k, v = torch.randn(3, 1, 72, 2, 32, generator=draw)
            out = attend(cache, layer, q, k, v, frames=3, store=True)
    return cache, out


def test_a_codec_keeps_and_forecasts(four_bit):
    """Attention is close to that over exact keys and values; bytes are those that the forecast says, part by part."""
    (cache, found), (_, exact) = filled(four_bit), filled(QVGSettings.preset("off"))
    assert 0 < (found - exact).square().mean() < 0.02 * exact.square().mean()
    stats, planned = cache.stats(), forecast(four_bit, cache.geometry, 12, itemsize=4)
    assert (stats.stored_bytes, stats.peak_bytes) == (planned.stored_bytes, planned.peak_bytes)
    # frames 3 to 8 have settled, of K and V in 2 layers and heads of 32 channels
    assert stats.by_kind["codes"] == 2 * 2 * 6 * 24 * 2 * 16 and stats.by_bits[4] == 2 * 2 * 6 * 24 * 2 * (16 + 2)


def test_a_codec_obeys_a_budget(four_bit):
    """Without nested bits the oldest frames are evicted."""
    geometry = Geometry(2, 2, 32, (4, 6))
    budget = 0.8 * forecast(four_bit, geometry, 12, itemsize=4).peak_bytes / GIB
    held, _ = filled(replace(four_bit, budget_gib=budget))
    stats = held.stats()
    assert limits(replace(four_bit, budget_gib=budget), geometry, 3, 12, 4).cap_frames < 9
    assert stats.held_frames < 12 and stats.peak_bytes <= budget * GIB


def test_a_codec_offloads(four_bit):
    (cache, found), (_, resident) = filled(replace(four_bit, offload=True)), filled(four_bit)
    assert torch.equal(found, resident) and cache.stats().host_bytes > 0


def test_a_codec_is_saved_and_drawn(four_bit, tmp_path):
    """A session resumes to the same latents; the chart has an area for its bits."""
    shape, run = (1, 16, 8, 12), Run(frames=12, seed=1)

    def sampler():
        tiny = load_tiny()[0]
        cache = KVCache(four_bit, layers=tiny.sizes.layers, heads=tiny.sizes.heads, head_dim=128, grid=(4, 6), rope=Rope,
                        dtype=torch.float32, max_frames=12)
        with torch.no_grad():
            context = tiny.project_context(torch.zeros(1, 4, tiny.sizes.text_dim))
        return Sampler(CachedNetwork(tiny, [Condition(context, cache)]), run, shape)

    whole = [event.latents for event in sampler() if isinstance(event, ChunkDone)]
    first = sampler()
    for event in first:
        if isinstance(event, ChunkDone) and event.chunk == 2:
            break
    sessions.save(tmp_path / "a.safetensors", first, fingerprint="tiny")
    session, second = sessions.load(tmp_path / "a.safetensors"), sampler()
    session.restore(second, "tiny")
    rest = [event for event in second if isinstance(event, ChunkDone)]
    assert torch.equal(rest[-1].latents, whole[-1])
    assert [area["id"] for area in describe([rest[-1].stats])["areas"]] == ["4", "8", "workspace"]


def test_a_codec_runs_in_the_demo(four_bit, monkeypatch):
    monkeypatch.setitem(PRESETS, "four-bit", four_bit)
    demo = Demo(PROMPTS[0])
    exact, made = demo.make("off", Run(frames=6)), demo.make("four-bit", Run(frames=6))
    assert torch.equal(made.latents[:, :, :3], exact.latents[:, :, :3])
    assert 0 < (made.latents - exact.latents).square().mean() < 0.05 * exact.latents.square().mean()


@pytest.mark.parametrize(("changes", "words"), [
    ({"key": TensorSettings(bits=2)}, "key is to hold 2 bits, but the four-bit codec holds 4, 8, 16"),
    ({"key": TensorSettings(bits=8), "sink_bits": 4, "value": TensorSettings(bits=3)}, "value is to hold 3 bits"),
    ({"options": {"a": 1}}, "does not know the option 'a' of key; it has none of its own")])
def test_a_codec_refuses_bits_that_it_does_not_hold(four_bit, changes, words):
    """They would be encoded at others, and dropped in vain with age."""
    if options := changes.pop("options", None):
        changes["key"] = TensorSettings(bits=4, options=tuple(options.items()))
    with pytest.raises(ValueError, match=words):
        replace(four_bit, **changes)


@dataclass(frozen=True)
class Mean:
    """A codebook: mean of every channel float32 [R, D]."""

    mean: torch.Tensor

    size = 1

    @property
    def nbytes(self):
        return self.mean.nbytes


class CentredSpan(Span):
    """What is left of the mean in steps of 1 / 16, and what is left of those in steps of 1 / 2048 until bits are dropped. Each is int8, so
    that the bits only name the two states."""

    bits = property(lambda self: 2 if self.fine is None else 4)
    shape = property(lambda self: tuple(self.coarse.shape))

    def __init__(self, coarse, fine, codebook):
        self.coarse, self.fine, self.codebook = coarse, fine, codebook

    def tensors(self):
        return {"coarse": self.coarse} | ({} if self.fine is None else {"fine": self.fine})

    def with_tensors(self, tensors):
        return CentredSpan(tensors["coarse"], tensors.get("fine"), self.codebook)

    def decode(self, rows, tables):
        x = self.coarse[:, rows].float() / 16 + self.codebook.mean[rows]
        return x if self.fine is None else x + self.fine[:, rows].float() / 2048

    def drop(self, bits):
        self.fine = None


class CentredCodec(PlainCodec):
    name, widths, nested, adaptive = "centred", (16, 8, 4, 2), True, True

    def coded_parts(self, tensor, bits, shape):
        part = Part(torch.int8, tuple(shape), "steps")
        return {"coarse": part} | ({"fine": part} if bits == 4 else {})

    def make_coded(self, tensor, bits, tensors, codebook):
        return CentredSpan(tensors["coarse"], tensors.get("fine"), codebook)

    def book_size(self, tensor, tokens):
        return 1

    def book_parts(self, tensor, size, rows, dim):
        return {"mean": Part(torch.float32, (rows, dim), "codebooks")}

    def make_book(self, tensors):
        return Mean(**tensors)

    def check_stored(self, tensors, codebook, where):
        if int(tensors["coarse"].min()) == -128:
            raise ValueError(f"{where}.coarse holds -128")

    def train_one(self, x, tensor, iterations, generator, previous):
        return Mean(x.float().mean(0))

    def encode_one(self, x, tensor, bits, codebook):
        x = x.float() - codebook.mean
        coarse = (16 * x).round().clamp(-127, 127)
        fine = (2048 * (x - coarse / 16)).round().clamp(-127, 127)
        return CentredSpan(coarse.to(torch.int8), fine.to(torch.int8) if bits == 4 else None, codebook)


@pytest.fixture
def centred():
    CODECS.register(CentredCodec())
    two = TensorSettings(bits=2)
    yield QVGSettings(name="centred", codec="centred", key=two, value=two, codebook_frames=6)
    CODECS.remove("centred")


def test_a_codec_with_codebooks_and_nested_bits(centred):
    """Forecast, budget, offload and a rewound chunk, with codebooks that know nothing of centroids."""
    (cache, found), (_, exact) = filled(centred), filled(QVGSettings.preset("off"))
    assert 0 < (found - exact).square().mean() < 0.02 * exact.square().mean()
    stats, planned = cache.stats(), forecast(centred, cache.geometry, 12, itemsize=4)
    assert (stats.stored_bytes, stats.peak_bytes) == (planned.stored_bytes, planned.peak_bytes)
    assert stats.by_bits.keys() == {2, 4} and stats.by_kind["codebooks"] == 2 * 2 * 2 * 2 * 32 * 4
    assert torch.equal(filled(replace(centred, offload=True))[1], found)
    cache.rewind(9)
    q, k, v = torch.randn(3, 1, 72, 2, 32, generator=torch.Generator().manual_seed(5))
    assert all(attend(cache, layer, q, k, v, frames=3, store=True).isfinite().all() for layer in range(2)) and cache.frames == 12
    budget = 0.9 * stats.peak_bytes / GIB
    assert filled(replace(centred, budget_gib=budget))[0].stats().peak_bytes <= budget * GIB
    assert "older half" in [cache.shrink() for _ in range(2)][-1] and 4 in cache.stats().by_bits


def test_a_family_is_recognized_planned_and_run(load, tmp_path):
    toy = load("toy_family.py")
    draw = torch.Generator().manual_seed(7)
    state = {name: 0.1 * torch.randn(x.shape, generator=draw) for name, x in toy.ToyNetwork(toy.ToySizes(2, 2)).state_dict().items()}
    save_file(state, tmp_path / "pixels.safetensors")
    opened, found = open_checkpoint(tmp_path / "pixels.safetensors")
    assert found.family == "pixels" and plan("pixels-2", seconds=2)["presets"]["off"]["bf16_bytes"] > 0
    network, cache = FAMILIES["pixels"].open(opened), KVCache(
        QVGSettings.preset("balanced").both(group=16), layers=2, heads=2, head_dim=16, grid=(6, 8), rope=FAMILIES["pixels"].rope,
        dtype=torch.float32, max_frames=8, chunk_frames=2)
    sampler = Sampler(CachedNetwork(network, [Condition(0.1, cache)]), Run(frames=8, chunk_frames=2), (1, 4, 6, 8))
    done = [event for event in sampler if isinstance(event, ChunkDone)]
    assert len(done) == 4 and done[-1].latents.isfinite().all() and done[-1].stats.held_frames == 8


def test_a_backend_does_one_op(load):
    x, centroids = torch.randn(2, 40, 8), torch.randn(2, 5, 8)
    expected = kmeans.assign(x, centroids)
    load("cdist_backend.py")
    calls = {}
    with backends.recording(calls):
        assert torch.equal(kmeans.assign(x, centroids), expected)
        assert kmeans.assign(x.double(), centroids.double()).shape == (2, 40)
    assert "cdist" in backends.summary(calls)["assign"] and "not float32" in backends.summary(calls)["assign"]


def names_in(path: Path) -> set[str]:
    """Names and whole strings in a file's code, docstrings and comments not counted."""
    tree = ast.parse(path.read_text())
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docs}
    found = {text for text in texts if isinstance(text, str)}
    found |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return found | {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom | ast.Import) for alias in node.names}


def test_a_codec_of_this_pack_touches_three_places():
    """Besides its own files: the line that imports it, its preset, its kernel. `qvg demo --compare` and measurements show it, as they
    could any preset."""
    words = {"paper", "PaperSpan", "PaperCodec", "PaperCodebook", "paper_codes"}
    own = {"qvg/codec/paper.py", "qvg/codec/paper_codes.py", "qvg/demo/run.py", "qvg/measure/rows.py", "qvg/report/scatter.py"}
    files = [path for wing in ("qvg", "kernels", "nodes") for path in (ROOT / wing).rglob("*.py")]
    touched = {path.relative_to(ROOT).as_posix() for path in files if names_in(path) & words} - own
    assert touched == {"qvg/codec/__init__.py", "qvg/settings.py", "kernels/reader.py"}
