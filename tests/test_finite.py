"""Tokens that are no numbers stay where they came from, numbers beyond float16 saturate, and few tokens do not explode.

Every test runs with the reference, and with the kernels on a GPU or in Triton's interpreter.
"""

from dataclasses import replace
from itertools import product

import pytest
import torch

from comfyui_qvg.benchmarks.planes import PLANES
from comfyui_qvg.qvg import backends
from comfyui_qvg.qvg.attention.rope import Rope
from comfyui_qvg.qvg.cache.kv_cache import KVCache
from comfyui_qvg.qvg.codec import e4m3, kmeans
from comfyui_qvg.qvg.codec.base import Tables
from comfyui_qvg.qvg.codec.finite import LARGEST, saturated, zero_nonfinite
from comfyui_qvg.qvg.codec.pair import TensorCodec
from comfyui_qvg.qvg.codec.qvg import PlaneSpan
from comfyui_qvg.qvg.settings import PRESETS, TensorSettings
from comfyui_qvg.qvg.video import CachedNetwork, guided

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
BACKENDS = ["torch", "triton"]
# the interpreter multiplies bf16 wrongly; on a Hopper bf16 tokens have a kernel of their own
DTYPES = [torch.float32, torch.bfloat16] if ON_GPU else [torch.float32]
BROKEN = {"nan": float("nan"), "inf": float("inf"), "minus inf": -float("inf"), "too large": 3e38}
GRID, HEADS, DIM = (4, 5), 3, 64
FRAME = GRID[0] * GRID[1]

pytestmark = [pytest.mark.usefixtures("poison"), *([pytest.mark.gpu] if ON_GPU else [])]


@pytest.fixture(params=BACKENDS)
def backend(request):
    yield from forced(request.param)


@pytest.fixture(params=BACKENDS if ON_GPU else BACKENDS[:1])
def fast_backend(request):
    """Without the interpreter, which takes a minute for what changes little between backends."""
    yield from forced(request.param)


def forced(name: str):
    if name == "triton":
        pytest.importorskip("triton")
    with backends.force(name):
        yield name


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("value", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("count", [1, 5, 67])
def test_ids_are_of_the_codebook(backend, value, count):
    """Whatever a token holds; the kernels' tables have room for more centroids than there are."""
    x, table = draw(1, 2, 90, DIM), draw(2, 2, count, DIM)
    x[:, 3, 7], x[:, 40] = value, value
    x[:, 41] = -table[:, 0] * (LARGEST if value == value else value)
    ids = kmeans.assign(x, table)
    assert ids.min() >= 0 and ids.max() < count


BARE, BARE_PLANES = (
    {name: replace(settings.both(centroids=8), sink_frames=0, recent_frames=0, iterations=1) for name, settings in of.items()}
    for of in (PRESETS, PLANES))
CASES = {
    "balanced": BARE["balanced"], "smallest": BARE["smallest"], "planes": BARE_PLANES["balanced"],
    "two groups": BARE_PLANES["quality"].both(group=32), "no stage": BARE_PLANES["balanced"].both(stages=0),
    "int8": BARE["balanced"].both(bits=8, group=64), "paper": BARE["paper"],
    "paper asymmetric": BARE["paper"].both(symmetric=False, bits=4), "off": PRESETS["off"]}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "value"), [
    *product(CASES, ["nan", "inf"]),
    # only planes take squares; int8 has a scale for it, and the released codec saturates
    *product(["balanced", "two groups", "smallest", "planes", "no stage"], ["too large"])])
def test_a_broken_token_spoils_no_other(fast_backend, name, value, dtype):
    """In the span that trains the codebook and in a later one: everything else reads back as well as without it, and it as NaN."""
    settings, tokens = CASES[name], 2 * FRAME
    whole = [draw(seed, 1, 4 * FRAME, HEADS, DIM) + 3 * draw(9, HEADS, DIM) for seed in (1, 2)]
    places = [(5, 1, 3), (tokens + 8, 2, 40)]  # token, head, channel
    errors, found = [], []
    for broken in (False, True):
        cache = KVCache(settings, layers=1, heads=HEADS, head_dim=DIM, grid=GRID, rope=Rope, device=DEVICE, dtype=dtype)
        pair = [x.to(dtype) for x in whole]
        for token, head, channel in places if broken else ():
            for x in pair:
                x[0, token, head, channel] = BROKEN[value]
        for start in range(0, 4 * FRAME, tokens):
            cache.layers[0].append(*(x[:, start:start + tokens] for x in pair), 2)
        for entry in cache.layers[0].entries:
            for span in entry.spans:
                if settings.key.stages and span.codebook is not None:
                    assert int(span.ids.max()) < span.codebook.centroids.shape[-2]
        keys, values = torch.empty(2, 1, 4 * FRAME, HEADS, DIM, device=DEVICE, dtype=dtype)
        cache.layers[0].read(slice(0, HEADS), keys, values)
        found = [x.float() for x in (keys, values)]
        good = torch.ones(4 * FRAME, HEADS, dtype=torch.bool, device=DEVICE)
        for token, head, _ in places:
            good[token, head] = False
        exact = cache.rope.apply(whole[0], 0, 4), whole[1]
        errors.append([(a - b)[0][good].square().mean() for a, b in zip(found, exact)])
        groups = settings.key.groups(DIM) if settings.codec != "plain" else DIM
        for x in found if broken else ():
            assert x[0][good].isfinite().all()
            for token, head, channel in places:
                at = slice(channel // (DIM // groups) * (DIM // groups), (channel // (DIM // groups) + 1) * (DIM // groups))
                assert not x[0, token, head, at].isfinite().any() or name == "off"
                assert not x[0, token, head, channel].isfinite()
                others = torch.ones(DIM, dtype=torch.bool)
                others[at], others[channel ^ 1] = False, False  # a pair turns together
                assert x[0, token, head][others].isfinite().all()
    for clean, spoilt in zip(*errors):
        assert spoilt <= 1.1 * clean + 1e-9


@pytest.mark.parametrize("name", ["two groups", "int8", "paper asymmetric"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernels_read_nan_where_it_came_from(name, dtype):
    """The kernel that decodes and its reference, from the same spans: the same numbers are none."""
    pytest.importorskip("triton")
    cache = KVCache(CASES[name], layers=1, heads=2, head_dim=DIM, grid=(2, 3), rope=Rope, device=DEVICE, dtype=dtype)
    x = draw(8, 1, 12, 2, DIM).to(dtype)
    x[0, 4, 1, 40], x[0, 9, 0, 3] = float("nan"), float("inf")
    with backends.force("torch"):
        cache.layers[0].append(x, x, 2)
    found = []
    for backend in BACKENDS:
        keys, values = torch.empty(2, *x.shape, device=DEVICE, dtype=dtype)
        with backends.force(backend):
            cache.layers[0].read(slice(0, 2), keys, values)
        found.append(torch.stack([keys, values]).isfinite())
    assert torch.equal(*found)
    assert not found[0][:, 0, 4, 1, 40].any() and found[0].float().mean() > 0.9


@pytest.mark.parametrize("kind", ["qvg", "paper"])
def test_codebooks_see_no_broken_token(fast_backend, kind):
    """Trained on tokens of which some are no numbers, and from a codebook before: all of it finite, and as good as without them."""
    coder = TensorCodec(kind, TensorSettings(stages=2, centroids=8), DIM, 4)
    x = draw(3, 200, 2, DIM) + 4 * draw(4, 2, DIM)
    spoilt = x.clone()
    for number, value in enumerate(BROKEN.values()):
        spoilt[7 * number, 0], spoilt[3 + number, 1, number] = value, value
    book = None
    for _ in range(2):
        book = coder.train(spoilt, torch.Generator().manual_seed(0), book)
        assert all(part.float().isfinite().all() for part in vars(book).values() if isinstance(part, torch.Tensor))
    tables, errors = Tables(DEVICE), []
    for tokens in (x, spoilt):
        span = coder.encode(x, 2, coder.train(tokens, torch.Generator().manual_seed(0)))
        errors.append((span.decode(slice(None), tables) - x).square().mean())
    assert errors[1] <= 1.1 * errors[0]


def test_the_power_of_two_of_a_row_is_of_its_numbers(backend):
    x = draw(5, 120, 2, DIM)
    coder = TensorCodec("qvg", TensorSettings(stages=1, centroids=4), DIM, 2)
    book = coder.train(x, torch.Generator().manual_seed(0))
    clean = coder.encode(x, 2, book)
    for value in BROKEN.values():
        spoilt = x.clone()
        spoilt[9, 1, 5] = value
        span: PlaneSpan = coder.encode(spoilt, 2, book)
        assert torch.equal(span.exponents, clean.exponents)
        assert (span.scales == e4m3.NAN).nonzero().tolist() == [[9, 1, 0]]


@pytest.mark.parametrize("native", [1, e4m3.MANY])
def test_scales_keep_nan(native):
    x = torch.rand(native, device=DEVICE) * 448
    x[0] = float("inf")
    codes = e4m3.encode_scales(x)
    back = e4m3.decode_scales(codes)
    assert codes[0] == e4m3.NAN and back[0].isnan() and back[1:].isfinite().all()
    assert torch.equal(back[1:], e4m3.decode(codes[1:]))


def test_tame_keeps_numbers():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.tensor([1.5, -60000.0, float("nan"), float("inf"), -float("inf"), 0.0], dtype=dtype)
        assert torch.equal(zero_nonfinite(x), torch.tensor([1.5, -60000.0, 0, 0, 0, 0], dtype=dtype))
    assert zero_nonfinite(torch.tensor([LARGEST, 2 * LARGEST])).tolist() == [LARGEST, 0]


@pytest.mark.parametrize("name", ["balanced", "off"])
def test_float16_saturates(backend, name):
    """Keys and values near 65504: what decoding or turning carries beyond it becomes the largest number, not infinite."""
    settings = CASES.get(name, BARE.get(name))
    x = 64000.0 * (1 + 0.02 * draw(6, 1, 4 * FRAME, HEADS, DIM)).clamp(max=65504 / 64000) * draw(7, 1, 4 * FRAME, HEADS, DIM).sign()
    cache = KVCache(settings, layers=1, heads=HEADS, head_dim=DIM, grid=GRID, rope=Rope, device=DEVICE, dtype=torch.float16)
    cache.layers[0].append(x.half(), x.half(), 4)
    keys, values = torch.empty(2, 1, 4 * FRAME, HEADS, DIM, device=DEVICE, dtype=torch.float16)
    cache.layers[0].read(slice(0, HEADS), keys, values)
    assert keys.isfinite().all() and values.isfinite().all()
    assert keys.abs().max() == 65504, "some pairs turn beyond it"


def test_a_wider_network_saturates_a_float16_cache(backend):
    cache = KVCache(PRESETS["off"], layers=1, heads=1, head_dim=DIM, grid=(1, 2), rope=Rope, device=DEVICE, dtype=torch.float16)
    x = torch.zeros(1, 2, 1, DIM, device=DEVICE)
    x[0, 0, 0, :3] = torch.tensor([70000.0, -1e30, float("inf")])
    cache.layers[0].append(x, x, 1)
    keys, values = torch.empty(2, 1, 2, 1, DIM, device=DEVICE, dtype=torch.float16)
    cache.layers[0].read(slice(0, 1), keys, values)
    assert values[0, 0, 0, :3].tolist() == [65504, -65504, float("inf")]
    x = torch.tensor([70000.0, -float("inf"), float("nan"), 3.0])
    assert saturated(x, torch.bfloat16) is x
    assert saturated(x, torch.float16)[[0, 1, 3]].tolist() == [65504, -float("inf"), 3] and saturated(x, torch.float16)[2].isnan()


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (1, 3), (2, 2)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("name", ["quality", "balanced", "smallest"])
def test_few_tokens_do_not_explode(fast_backend, name, grid):
    """Chunks of one to four tokens. What is left of them is as large as what comes later, and not the size of a codebook that learned
    the first ones by heart: as near as with many tokens, or nearly."""
    errors = []
    for size in (grid, (4, 5)):
        tokens, parts = size[0] * size[1], []
        for seed in range(4):
            cache = KVCache(BARE[name], layers=1, heads=HEADS, head_dim=DIM, grid=size, rope=Rope, device=DEVICE, dtype=torch.float32)
            centre = 2 * draw(100 + seed, 1, 1, HEADS, DIM)
            x = centre + draw(seed, 1, 8 * tokens, HEADS, DIM)
            for chunk in x.split(tokens, dim=1):
                cache.layers[0].append(chunk, chunk, 1)
            keys, values = torch.empty(2, *x.shape, device=DEVICE)
            cache.layers[0].read(slice(0, HEADS), keys, values)
            parts.append((values - x).square().mean() / (x - centre).square().mean())
        errors.append(torch.stack(parts).mean())
    assert errors[0] <= 2.5 * errors[1]


@pytest.mark.parametrize("name", ["balanced", "int8", "paper", "off"])
def test_one_warning_a_run(fast_backend, name, caplog):
    """Of the conditions of a run together, at the chunk or, on a GPU, the one after, for which nothing waits; and anew in another run."""
    caches = [KVCache(CASES[name], layers=2, heads=HEADS, head_dim=DIM, grid=GRID, rope=Rope, device=DEVICE,
                      dtype=torch.float32) for _ in range(2)]
    CachedNetwork(torch.nn.Identity(), guided(None, caches[0], None, caches[1], 2.0))
    for _ in range(2):
        caplog.clear()
        for frame in range(4):
            for cache in caches:
                for layer in cache.layers:
                    x = draw(frame, 1, FRAME, HEADS, DIM)
                    x[0, 3, 1, 5] = float("nan") if frame in (1, 2) and layer.number == 1 else 0
                    layer.append(x, x, 1)
                if ON_GPU:
                    torch.cuda.synchronize()
                cache.stats()
            assert len(caplog.records) == (frame > 0 and name != "off")
        assert name == "off" or "when latent frame 1 was stored" in caplog.text
        for cache in caches:
            cache.free()


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no GPU")
def test_nobody_waits_for_the_warning():
    """A chunk is stored and counted while the device still has to compute it."""
    cache = KVCache(CASES["balanced"], layers=1, heads=HEADS, head_dim=DIM, grid=GRID, rope=Rope, device=DEVICE, dtype=torch.bfloat16)
    x = draw(1, 1, FRAME, HEADS, DIM).bfloat16()
    cache.layers[0].append(x, x, 1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        cache.layers[0].append(x, x, 1)
        cache.stats()
    finally:
        torch.cuda.set_sync_debug_mode("default")
