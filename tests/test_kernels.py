"""Kernels compared with their references in torch: on a GPU if there is one, else in Triton's interpreter.

torch fills new tensors with NaN (integers: their maximum), so memory that a kernel fails to write shows.
"""

import math
import weakref
from dataclasses import replace

import pytest
import torch

from comfyui_qvg.qvg import backends
from comfyui_qvg.qvg.attention.cached import CachedAttention
from comfyui_qvg.qvg.attention.functions import sdpa
from comfyui_qvg.qvg.attention.rope import Rope, rotate, rotate_chunk
from comfyui_qvg.qvg.cache import lifetime
from comfyui_qvg.qvg.cache.forecast import forecast
from comfyui_qvg.qvg.cache.kv_cache import KVCache
from comfyui_qvg.qvg.cache.layer import LayerCache
from comfyui_qvg.qvg.codec import e4m3, kmeans, smoothing
from comfyui_qvg.qvg.codec import pair as codec
from comfyui_qvg.qvg.codec.base import Tables
from comfyui_qvg.qvg.codec.qvg import PlaneSpan
from comfyui_qvg.qvg.settings import PRESETS, QVGSettings, TensorSettings

pytest.importorskip("triton", reason="kernels are written in Triton")

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
ON_HOPPER = ON_GPU and torch.cuda.get_device_capability()[0] == 9
# products of bf16 are wrong in the interpreter
DTYPES = [torch.float32, torch.bfloat16] if ON_GPU else [torch.float32, torch.float16]

pytestmark = [pytest.mark.usefixtures("poison"), *([pytest.mark.gpu] if ON_GPU else [])]


def tokens(*shape, seed=0, dtype=torch.float32, clusters=6):
    """Tokens in clusters, with channels of unequal size, as in keys."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=draw) + 3 * torch.randn(clusters, shape[-1], generator=draw)[torch.randint(
        clusters, shape[:-1], generator=draw)]
    return (x * torch.logspace(-1, 1, shape[-1])).to(dtype).to(DEVICE)


def both(op, *arguments):
    """The results of the kernel and of the reference."""
    with backends.force("triton"):
        ours = op(*arguments)
    with backends.force("torch"):
        return ours, op(*arguments)


SHAPES = [(1, 1, 64, 1), (3, 63, 64, 5), (2, 130, 128, 33), (5, 200, 128, 100), (2, 97, 256, 40)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "count", "dim", "centroids"), SHAPES)
def test_assign(rows, count, dim, centroids, dtype):
    x = tokens(rows, count, dim, dtype=dtype)
    table = tokens(rows, centroids, dim, seed=1)
    with backends.force("triton"):
        ids = kmeans.assign(x, table)
    assert ids.shape == (rows, count) and ids.min() >= 0 and ids.max() < centroids
    distance = torch.cdist(x.double(), table.double())
    chosen, best = distance.gather(-1, ids[..., None])[..., 0], distance.amin(-1)
    # operands of the distance product are rounded to bf16 on a GPU: half a step of its 8 bits in each
    slack = (x.double().norm(dim=-1) * table.double().norm(dim=-1).amax(-1, keepdim=True) * 2**-7) if ON_GPU else 1e-4 * best.square()
    assert (chosen.square() <= best.square() + slack + 1e-9).all()


@pytest.mark.parametrize(("sign", "expected"), [(1, 0), (-1, 69)])
def test_assign_among_equals(sign, expected):
    """Of equal positive scores the lower id wins, of negative ones the higher; within blocks and across them."""
    # integers, because the interpreter's matrix product may round equal columns differently
    table = tokens(2, 1, 64).round().abs()
    with backends.force("triton"):
        assert (kmeans.assign(sign * table.expand(2, 40, 64), table.expand(2, 70, 64)) == expected).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "count", "dim", "centroids"), SHAPES)
def test_update(rows, count, dim, centroids, dtype):
    """Means, and for centroids without tokens the token with the largest error in their share. Two runs give the same bits."""
    x = tokens(rows, count, dim, dtype=dtype)
    table = tokens(rows, centroids, dim, seed=1)
    ids = torch.randint(max(1, centroids // 2), (rows, count), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    ours, reference = both(kmeans.update, x.float() if ON_GPU else x, ids, table)
    again, _ = both(kmeans.update, x.float() if ON_GPU else x, ids, table)
    assert torch.equal(ours, again)
    # tf32 keeps 10 bits of a token on a GPU; the reference sums in the dtype of x
    scale = x.float().abs().amax()
    assert (ours - reference.float()).abs().max() <= scale * (1e-3 if ON_GPU else 1e-5 if dtype == torch.float32 else 1e-2)


def test_update_of_a_view():
    """Rows of a wider tensor, as in a slice of heads."""
    x = tokens(50, 6, 64)[:, 1:4].transpose(0, 1)
    ids = torch.arange(50, device=DEVICE).expand(3, 50) % 7
    ours, reference = both(kmeans.update, x, ids, x[:, :7])
    assert (ours - reference).abs().max() < (1e-1 if ON_GPU else 1e-4)


def step(x, table):
    """Centroids after one iteration of the reference, with the kernel's ids, because operands of distances are rounded on a GPU."""
    with backends.force("triton"):
        ids = kmeans.assign(x, table)
    return kmeans._update(x.float(), ids, table)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "count", "dim", "centroids"), [*SHAPES[:3], (1, 200, 128, 70), (1, 97, 256, 40)])
def test_kmeans(rows, count, dim, centroids, dtype):
    """Means, and for centroids without tokens the token with the largest error in their share. Two runs give the same bits."""
    # exact in bf16
    x = tokens(rows, count, dim, dtype=dtype).bfloat16().to(dtype)
    table = tokens(rows, centroids, dim, seed=1)
    table[:, (centroids + 1) // 2:] += 1e4
    expected = step(x, table)
    with backends.force("triton"):
        one, two, again = (kmeans.kmeans(x, table, steps) for steps in (1, 2, 2))
    assert torch.equal(two, again)
    close = x.float().abs().amax() * 1e-5
    assert (one - expected).abs().max() <= close
    # centroids that differ slightly by the order of additions may be nearest to other tokens
    assert ON_GPU or (two - step(x, expected)).abs().max() <= close


def test_kmeans_of_a_view():
    """Rows of a wider tensor, as in a slice of heads."""
    x = tokens(50, 6, 64)[:, 1:4].transpose(0, 1).bfloat16().float()
    expected = step(x, x[:, :7])
    with backends.force("triton"):
        assert (kmeans.kmeans(x, x[:, :7], 1) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "count", "dim", "centroids"), SHAPES)
def test_store(rows, count, dim, centroids, dtype):
    """The bytes of the reference, and the residual for the ids of `assign`. With a channel of zeros, and bytes of every sign and size."""
    x, found = tokens(rows, count, dim, dtype=dtype), tokens(rows, centroids, dim, seed=1)
    found[:, :, 3] = 0
    found[:, 0] *= 2.0 ** -torch.arange(dim, device=DEVICE)
    (codes, scale, residual), (other_codes, other_scale, _) = both(smoothing.store, x, found)
    assert torch.equal(scale, other_scale)
    assert torch.equal(codes, other_codes)
    stored = e4m3.decode(codes) * scale.float()
    # powers of two, with which centroids are exact in bf16
    assert (torch.frexp(scale.float())[0] == 0.5).all() and torch.equal(stored, stored.bfloat16().float())
    with backends.force("triton"):
        ids = kmeans.assign(x, stored)
    assert (residual - (x.float() - kmeans.gather_centroids(stored, ids))).abs().max() <= 1e-5 * x.float().abs().amax()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "rows", "dim", "stages", "bits", "group"), [
    (1, 1, 64, 1, 1, 64), (63, 3, 64, 2, 2, 64), (130, 2, 128, 0, 3, 64), (111, 2, 128, 2, 4, 128), (97, 2, 256, 4, 2, 64),
    (40, 3, 256, 1, 4, 128)])
def test_encode(count, rows, dim, stages, bits, group, dtype):
    """The same span up to the order of additions, and an error no larger than that of the reference."""
    x = tokens(count, rows, dim, dtype=dtype)
    coder = codec.TensorCodec("qvg", TensorSettings(bits=bits, stages=stages, centroids=40, group=group), dim, 2)
    with backends.force("torch"):
        book = coder.train(x, torch.Generator().manual_seed(0))
    ours, reference = both(coder.encode, x, bits, book)
    assert [p.shape for p in ours.planes] == [p.shape for p in reference.planes]
    assert ours.ids.numel() == 0 or ours.ids.max() < book.centroids.shape[2]
    tables = Tables(DEVICE)
    errors = [(span.decode(slice(None), tables) - x.float()).square().mean() for span in (ours, reference)]
    assert errors[0] <= errors[1] * (1.03 if ON_GPU else 1.01)
    # a row's exponent depends on its largest residual, which depends on the assigned centroids
    same = (ours.ids == reference.ids).all(0) & (ours.exponents == reference.exponents)
    assert same.float().mean() > (0.5 if ON_GPU else 0.99)
    assert ((ours.scales.int() - reference.scales.int()).abs()[same] <= 1).all()
    for mine, theirs in zip(ours.planes, reference.planes):
        if ON_HOPPER and dtype == torch.bfloat16 and stages > 1:
            # residuals are rounded to 8 bits there, which moves values across a cell border that are close to it
            assert different_bits(mine, theirs)[same].mean() < 0.01
        else:
            assert (mine != theirs)[same].float().mean() < 0.01


def different_bits(a, b):
    """Share of differing bits of every byte, float32."""
    return (((a ^ b)[..., None] >> torch.arange(8, device=a.device)) & 1).float().mean(-1)


@pytest.mark.skipif(not ON_HOPPER, reason="needs a GPU of compute capability 9, because the interpreter does not know Gluon")
@pytest.mark.parametrize(("count", "rows", "dim", "stages", "bits", "group", "centroids"), [
    (1, 1, 64, 1, 1, 64, 5), (300, 3, 128, 2, 2, 128, 128), (5000, 2, 128, 2, 4, 64, 256), (700, 40, 128, 4, 3, 128, 40),
    (4681, 12, 128, 2, 1, 128, 256), (513, 1, 64, 3, 2, 64, 100), (257, 2, 256, 2, 2, 64, 40), (257, 2, 256, 2, 2, 64, 100),
    (600, 2, 128, 4, 4, 128, 128)])
def test_encode_on_hopper(count, rows, dim, stages, bits, group, centroids, monkeypatch):
    """Hopper's kernel agrees with the one for any GPU up to rounding, writes all outputs, and is deterministic."""
    from comfyui_qvg.kernels import encode

    x = tokens(count, rows, dim, dtype=torch.bfloat16, clusters=centroids)
    coder = codec.TensorCodec("qvg", TensorSettings(bits=bits, stages=stages, centroids=centroids, group=group), dim, 2)
    book = coder.train(x, torch.Generator().manual_seed(0))
    other = torch.zeros_like(x)
    taken = []

    def encoded(on_hopper):
        monkeypatch.setattr(encode, "_on_hopper", lambda *arguments: taken.append(on_hopper(*arguments)) or taken[-1])
        with backends.force("triton"):
            return codec.encode([coder, coder], [x, other], [bits, bits], [book, book])

    whole = encode._on_hopper
    ours, again, general = encoded(whole), encoded(whole), encoded(lambda *_: False)
    assert taken == [True, True, False]
    for mine, repeated, theirs in zip(ours, again, general):
        for part in ("ids", "scales", "exponents"):
            assert torch.equal(getattr(mine, part), getattr(repeated, part))
        assert all(torch.equal(a, b) for a, b in zip(mine.planes, repeated.planes))
        same = (mine.ids == theirs.ids).all(0) & (mine.exponents == theirs.exponents)
        assert same.float().mean() > 0.9
        assert ((mine.scales.int() - theirs.scales.int()).abs()[same] <= 1).all()
        for a, b in zip(mine.planes, theirs.planes):
            assert different_bits(a, b)[same].mean() < 0.01
    tables = Tables(DEVICE)
    errors = [(spans[0].decode(slice(None), tables) - x.float()).square().mean() for spans in (ours, general)]
    assert errors[0] <= 1.005 * errors[1]


@pytest.mark.parametrize(("count", "rows", "places", "programs"), [
    (1, 1, 132, 1), (4680, 24, 132, 5), (3520, 48, 132, 2), (7800, 64, 132, 2), (7800, 64, 114, 3), (300, 1000, 132, 1)])
def test_share_of_hopper(count, rows, places, programs):
    """Programs of a row cover all of its tokens, none is empty, and there are as many as keep a GPU with `places` busy."""
    pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper", reason="this Triton has no Gluon for Hopper")
    from comfyui_qvg.kernels.hopper import share_of

    share = share_of(count, rows, 256, places)
    assert -(-count // share) == programs and 0 <= programs * share - count < share


def test_encode_odd_strides():
    """Tokens at odd offsets, which Hopper's kernel does not encode."""
    x = torch.zeros(70, 2 * 64 + 1, dtype=torch.bfloat16, device=DEVICE)[:, 1:].unflatten(1, (2, 64))
    x.copy_(tokens(70, 2, 64, dtype=torch.bfloat16))
    coder = codec.TensorCodec("qvg", TensorSettings(bits=2, stages=2, centroids=16), 64, 2)
    book = coder.train(x, torch.Generator().manual_seed(0))
    with backends.force("triton"):
        odd = coder.encode(x, 2, book)
    tables = Tables(DEVICE)
    errors = [(span.decode(slice(None), tables) - x.float()).square().mean() for span in (odd, coder.encode(x.contiguous(), 2, book))]
    assert x.stride(0) % 2 and errors[0] <= 1.03 * errors[1]


def test_encode_silent_and_huge_tokens():
    x = tokens(80, 3, 64)
    x[:, 0], x[7, 1, 5] = 0, 60000.0
    coder = codec.TensorCodec("qvg", TensorSettings(bits=4, stages=1, centroids=4), 64, 2)
    with backends.force("torch"):
        book = coder.train(x, torch.Generator().manual_seed(0))
    ours, reference = (span.decode(slice(None), Tables(DEVICE)) for span in both(coder.encode, x, 4, book))
    assert ours.isfinite().all() and not ours[:, 0].any()
    assert (ours - x).square().mean() <= (reference - x).square().mean() * 1.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 5, 3, 64), (2, 33, 2, 128), (19, 4, 256), (1, 1, 1, 64)])
def test_rotate(shape, dtype):
    x = tokens(*shape, dtype=dtype)
    angles = torch.randn(shape[-3], 1, shape[-1] // 2, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    ours, reference = both(rotate, x, angles.cos(), angles.sin())
    assert ours.shape == x.shape and ours.is_contiguous()
    assert_close([[ours], [reference]], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "workspace_batches", "count", "heads", "placed", "dim"), [
    (1, 1, 5, 3, 3, 64), (2, 1, 33, 4, 1, 128), (2, 2, 9, 3, 2, 256)])
def test_rotate_chunk(batch, workspace_batches, count, heads, placed, dim, dtype):
    """Both are rotated, and the first heads of the first conditions are written to the workspace, and nothing else of it."""
    q, k, v = (tokens(batch, count, heads, dim, seed=seed, dtype=dtype) for seed in range(3))
    angles = torch.randn(count, 1, dim // 2, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    found = []
    for backend in ("triton", "torch"):
        workspace = torch.full((2, workspace_batches, count + 7, placed, dim), 7.0, device=DEVICE, dtype=dtype)
        with backends.force(backend):
            rotated = rotate_chunk(q, k, v, angles.cos(), angles.sin(), (workspace[0, :, 5:-2], workspace[1, :, 5:-2]))
        assert (workspace[:, :, :5] == 7).all() and (workspace[:, :, -2:] == 7).all()
        keys, values = (x[:workspace_batches, :, :placed] for x in (rotated[1], v))
        assert torch.equal(workspace[0, :, 5:-2], keys) and torch.equal(workspace[1, :, 5:-2], values)
        found.append(rotated)
    assert_close(found, dtype)
    with backends.force("triton"):
        assert all(map(torch.equal, rotate_chunk(q, k, v, angles.cos(), angles.sin()), found[0]))


def test_rotate_some_heads():
    x = tokens(2, 40, 6, 64)[:, :, 1:3]
    angles = torch.randn(40, 1, 32).to(DEVICE)
    assert_close([[found] for found in both(rotate, x, angles.cos(), angles.sin())], torch.float32)


QVG = PRESETS["balanced"]
BARE = replace(QVG, sink_frames=0, recent_frames=0)
PAPER = PRESETS["paper"]
CASES = {name: PRESETS[name] for name in PRESETS} | {
    **{f"{bits} planes, {stages} stages": BARE.both(bits=bits, stages=stages) for bits, stages in ((1, 0), (2, 1), (3, 4), (4, 2))},
    "two groups": BARE.both(group=32), "gains": BARE.both(gain="unbiased"),
    "paper int4": PAPER.both(bits=4, stages=2), "paper asymmetric": PAPER.both(symmetric=False, bits=2, stages=4),
    "paper sink": replace(PAPER, sink_frames=1, sink_bits=16),
    "value plain": replace(QVG, value=TensorSettings(bits=8)), "sink inside a chunk": replace(QVG, sink_frames=1, sink_bits=16),
    "recent plain": replace(QVG, recent_bits=16), "window": replace(QVG, window_frames=3),
    "new codebooks": replace(BARE, codebook_frames=2),
}


def filled(settings: QVGSettings, dim=64, grid=(5, 7), batch=1, heads=4, dtype=DTYPES[0], chunks=(2, 2, 1)) -> KVCache:
    with backends.force("torch"):
        cache = KVCache(settings, layers=1, heads=heads, head_dim=dim, grid=grid, rope=Rope, batch=batch, device=DEVICE, dtype=dtype)
        for number, frames in enumerate(chunks):
            key, value = (tokens(batch, frames * grid[0] * grid[1], heads, dim, seed=10 * number + part, dtype=dtype) for part in (0, 1))
            cache.layers[0].append(key, value, frames)
    return cache


def read(cache: KVCache, heads: slice, *more):
    layer = cache.layers[0]
    found = []
    for backend in ("triton", "torch"):
        shape = cache.geometry.batch, layer.tokens, heads.stop - heads.start, cache.geometry.head_dim
        keys, values = (torch.full(shape, float("nan"), dtype=cache.workspace.dtype, device=DEVICE) for _ in range(2))
        with backends.force(backend):
            layer.read(heads, keys, values, *more)
        found.append((keys, values))
    return found


def assert_close(found, dtype, in_halves=False):
    """Elementwise equality up to rounding. in_halves: planes were decoded in float16."""
    for ours, reference in zip(*found):
        assert reference.isfinite().all() and ours.isfinite().all()
        # one step of the dtype at the size of the value, since both round once; a rotated pair rounds at the size of the pair
        step = {torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-7}[dtype]
        pairs = reference.float().unflatten(-1, (-1, 2)).norm(dim=-1, keepdim=True)
        allowed = step * pairs + 1e-5
        if in_halves:
            # float16 rounds a few times at the size of the summands, by 2^-12 of it each
            allowed = allowed + 2**-9 * pairs.flatten(0, -3).amax(0)
        assert ((ours.float() - reference.float()).abs() <= allowed.expand(*reference.shape[:-1], -1, 2).flatten(-2)).all()


# planes are decoded in float16 for bf16, in float32 for the others
WORKSPACES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", WORKSPACES[::2])
@pytest.mark.parametrize("name", CASES)
def test_decode(name, dtype):
    cache = filled(CASES[name], dtype=dtype)
    planes = CASES[name].codec == "qvg"
    assert_close(read(cache, slice(1, 3)), dtype, planes and dtype == torch.bfloat16)


@pytest.mark.parametrize("dtype", WORKSPACES[::2])
@pytest.mark.parametrize("name", CASES)
def test_recover(name, dtype):
    """Codebooks are trained again on decoded tokens: keys before RoPE, of every row and any batch."""
    cache = filled(CASES[name], dtype=dtype, batch=2, heads=1, chunks=(2, 1))
    planes = CASES[name].codec == "qvg"
    for entry in cache.layers[0].spans:
        found = both(lambda spans: codec.tokens_of(spans, cache.tables, dtype), entry.spans)
        assert [tuple(x.shape) for x in found[0]] == [(35 * entry.frames, 2, 64)] * 2
        assert_close(found, dtype, planes and dtype == torch.bfloat16)


@pytest.mark.parametrize("power", [-40, -14, 14, 40])
def test_decode_of_any_size(power):
    """Values out of float16's range beside others, which bf16 can hold."""
    with backends.force("torch"):
        pair = [tokens(1, 70, 4, 64, seed=part) * torch.tensor([1.0, 2.0 ** power] * 2, device=DEVICE)[:, None] for part in (0, 1)]
        cache = KVCache(BARE.both(bits=4), layers=1, heads=4, head_dim=64, grid=(5, 7), rope=Rope, device=DEVICE, dtype=torch.bfloat16)
        cache.layers[0].append(*(x.bfloat16() for x in pair), 2)
    ours, reference = read(cache, slice(0, 4))
    for head in range(4):
        size = 2.0 ** (power * (head % 2))
        assert_close([[x[:, :, head:head + 1] / size for x in found] for found in (ours, reference)], torch.bfloat16, True)


@pytest.mark.parametrize("dtype", WORKSPACES)
@pytest.mark.parametrize(("dim", "grid", "batch", "heads"), [
    (64, (1, 1), 1, slice(0, 4)), (128, (3, 11), 2, slice(2, 4)), (256, (4, 5), 1, slice(3, 4)), (128, (13, 9), 1, slice(0, 1))])
def test_decode_shapes(dim, grid, batch, heads, dtype):
    """Odd grids, batches, one head and all, and spans longer than a program's share."""
    settings = replace(QVG, sink_frames=1, sink_bits=16, recent_bits=4)
    assert_close(read(filled(settings, dim, grid, batch, dtype=dtype), heads), dtype, dtype == torch.bfloat16)


@pytest.mark.parametrize("share", [1, 2, 7])
def test_decode_in_programs_of_any_length(share, monkeypatch):
    """The number of tiles in a program does not change the result, even if there are fewer."""
    from comfyui_qvg.kernels.decode import Tiling

    cache = filled(BARE, 64, (13, 9), chunks=(2,))
    expected = read(cache, slice(0, 2))
    monkeypatch.setattr(Tiling, "share", lambda self, frames: share)
    assert all(map(torch.equal, read(cache, slice(0, 2))[0], expected[0]))


def test_length_of_a_program():
    """About as many tokens for any number of frames, and at least one tile."""
    from comfyui_qvg.kernels.decode import Tiling

    tile = Tiling(tokens=16, warps=4)
    assert [tile.share(frames) for frames in (1, 3, 19, 60)] == [9, 3, 1, 1]


def test_decode_follows_what_the_cache_does():
    """The reader keeps addresses between reads; dropped planes, evicted spans and new chunks change them."""
    cache = filled(BARE.both(bits=4), chunks=(2, 2, 1))
    layer = cache.layers[0]
    assert_close(read(cache, slice(0, 2)), DTYPES[0])
    layer.entries[0].set_bits(1, 3)
    assert_close(read(cache, slice(0, 2)), DTYPES[0])
    del layer.entries[0]
    assert_close(read(cache, slice(0, 2)), DTYPES[0])
    with backends.force("torch"):
        layer.append(*(tokens(1, 35, 4, 64, seed=90 + part) for part in (0, 1)), 1)
    assert_close(read(cache, slice(2, 4)), DTYPES[0])


def test_decode_keeps_no_span_alive():
    cache = filled(BARE)
    read(cache, slice(0, 1))
    span = weakref.ref(cache.layers[0].entries[0].spans[0])
    del cache.layers[0].entries[0]
    assert span() is None


def test_decode_writes_its_heads_alone():
    """A strided workspace: memory between and after the tokens is unchanged."""
    cache = filled(BARE)
    layer = cache.layers[0]
    workspace = torch.full((2, 1, layer.tokens + 3, 2, 64), 7.0, device=DEVICE)
    with backends.force("triton"):
        layer.read(slice(0, 1), workspace[0, :, :-3, :1], workspace[1, :, :-3, :1])
    assert (workspace[:, :, -3:] == 7).all() and (workspace[:, :, :, 1] == 7).all()
    assert (workspace[:, :, :-3, 0] != 7).any(-1).all()


def test_decode_unforced():
    """Without a forced backend the result is the same, whichever backend runs."""
    cache = filled(QVG)
    layer = cache.layers[0]
    keys, values = torch.empty(2, 1, layer.tokens, 4, 64, device=DEVICE)
    layer.read(slice(0, 4), keys, values)
    other = torch.empty_like(keys), torch.empty_like(values)
    with backends.force("torch"):
        layer.read(slice(0, 4), *other)
    assert_close([(keys, values), other], DTYPES[0])


@pytest.mark.skipif(not ON_GPU, reason="streams need a GPU")
@pytest.mark.parametrize("slow", ["decode", "attention", ""])
def test_overlap_changes_nothing(slow, monkeypatch):
    """Overlapping decoding and attention gives the same bits as one after the other, whichever of the two is late."""
    # random tokens fit each other's codebooks neither well nor badly, so that no forecast would be exact
    monkeypatch.setattr(lifetime, "LARGEST_MISFIT", math.inf)
    def late(function, name):
        def call(*arguments):
            if name == slow:
                torch.cuda._sleep(20_000_000)
            return function(*arguments)
        return call

    monkeypatch.setattr(LayerCache, "read", late(LayerCache.read, "decode"))
    outs = []
    for overlapped in (True, False):
        cache = KVCache(QVG, layers=2, heads=12, head_dim=64, grid=(8, 9), rope=Rope, device=DEVICE, dtype=torch.bfloat16, max_frames=12)
        assert cache.workspace.side is not None
        if not overlapped:
            cache.workspace.side = None
        found = []
        for start in range(0, 12, 3):
            q, k, v = (tokens(1, 216, 12, 64, seed=start + part, dtype=torch.bfloat16) for part in range(3))
            for clean in (False, True):
                attend = CachedAttention(cache, start_frame=start, frames=3, store=clean, attention=late(sdpa, "attention"))
                found += [attend(layer, q, k, v) for layer in range(2)]
        outs.append(torch.stack(found))
        stats, planned = cache.stats(), forecast(QVG, cache.geometry, 12)
        assert (stats.stored_bytes, stats.peak_bytes) == (planned.stored_bytes, planned.peak_bytes)
    assert torch.equal(*outs)


MEMORY = torch.cuda.get_device_properties(0).total_memory if ON_GPU else 0


@pytest.mark.skipif(MEMORY < 36 << 30, reason="more than 2 ** 31 elements need a GPU of 40 GB")
def test_addresses_beyond_32_bits():
    """A span, and a tensor to rotate, of more than 2 ** 31 elements: the end of each is right."""
    grid, heads, dim = (1024, 1024), 9, 256
    count = grid[0] * grid[1]
    x = torch.randn(1, count, heads, dim, device=DEVICE, dtype=torch.bfloat16)
    assert x.numel() > 2**31
    torch.utils.deterministic.fill_uninitialized_memory = False
    cache = KVCache(PRESETS["off"], layers=1, heads=heads, head_dim=dim, grid=grid, rope=Rope, device=DEVICE, dtype=x.dtype)
    with backends.force("triton"):
        cache.layers[0].append(x, x, 1)
        keys, values = torch.full((2, 1, count, 1, dim), float("nan"), device=DEVICE, dtype=x.dtype)
        cache.layers[0].read(slice(8, 9), keys, values)
        cos, sin = (part[:, None] for part in cache.rope.tables(0, 1, DEVICE))
        rotated = rotate(x, cos, sin)
        assert torch.equal(values, x[:, :, 8:])
        assert_close([[rotated[:, -99:, 8:]], [keys[:, -99:]]], x.dtype)
        del rotated, keys, values, cache
        coder = codec.TensorCodec("qvg", TensorSettings(bits=4, stages=1, centroids=4), dim, 1)
        book = coder.train(x[0, -2000:], torch.Generator().manual_seed(0))
        span = coder.encode(x[0], 4, book)
    last = PlaneSpan([plane[-99:] for plane in span.planes], span.scales[-99:], span.exponents, span.ids[:, -99:], book, "mse")
    error = last.decode(slice(8, 9), Tables(DEVICE)) - x[0, -99:, 8:].float()
    assert error.square().mean() < 0.03
