"""The kernels of attention in eight bits compared with their reference: on a GPU if there is one, else in Triton's interpreter."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from comfyui_qvg.qvg import backends
from comfyui_qvg.qvg.attention import CachedAttention, Rope, choice, fast
from comfyui_qvg.qvg.attention.functions import eight_bits
from comfyui_qvg.qvg.cache import codebook_lifetime
from comfyui_qvg.qvg.cache.forecast import forecast
from comfyui_qvg.qvg.cache.geometry import Geometry, on_device, packed_bytes
from comfyui_qvg.qvg.cache.kv_cache import KVCache
from comfyui_qvg.qvg.settings import PRESETS
from comfyui_qvg.qvg.units import GIB
from kernel_cases import DEVICE, DTYPES, ON_GPU, both

pytest.importorskip("triton", reason="kernels are written in Triton")

from comfyui_qvg.kernels.attend import Tiling, attend_packed
from comfyui_qvg.kernels.attend_pack import PADDED, _placed, pack
from comfyui_qvg.kernels.tiles import converts_e4m3

pytestmark = [pytest.mark.usefixtures("poison"), *([pytest.mark.gpu] if ON_GPU else [])]

# with values in E4M3 and as they came; the interpreter runs both
KINDS = [True, False] if not ON_GPU or converts_e4m3(DEVICE) else [False]
TILINGS = [Tiling(64, 128, 4), Tiling(128, 64, 8)]
# conditions, batch, queries, tokens, heads, head dim
SHAPES = [(1, 1, 1, 1, 1, 64), (3, 2, 33, 63, 1, 64), (1, 1, 70, 200, 2, 64), (2, 1, 20, 129, 1, 128)]
# a step of an output at the size of 1
STEP = {torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def name_of(value):
    return f"{value.rows}x{value.keys}" if isinstance(value, Tiling) else "x".join(map(str, value)) if isinstance(value, tuple) else None


def drawn(conditions, batch, queries, tokens, heads, dim, dtype=torch.float32, seed=0):
    """Queries, keys and values, heads between others; peaky, with keys that share a direction and channels of unequal size."""
    draw = torch.Generator().manual_seed(seed)
    q = 2 * torch.randn(conditions * batch, queries, heads + 2, dim, generator=draw)
    k = torch.randn(batch, tokens, heads + 2, dim, generator=draw) + 3 * torch.randn(dim, generator=draw)
    v = torch.randn(batch, tokens, heads + 2, dim, generator=draw) * torch.logspace(-1, 1, dim)
    return [x.to(DEVICE, dtype)[:, :, 1:-1] for x in (q, k, v)]


def expected(q, v, packed):
    """Attention to the packed keys without another rounding, float64: logits, their log-sum-exp, outputs, and outputs of |v|."""
    repeats, scale = (len(q) // len(v), 1, 1, 1), q.shape[-1] ** -0.5
    rows, row_scale = fast._whole_numbers(q.transpose(1, 2).float(), (-1,))
    if ON_GPU:
        # one instruction multiplies and adds, and so rounds the product itself
        most = q.transpose(1, 2).float().abs().amax(-1, keepdim=True).clamp(min=fast.TINY)
        rows = (q.transpose(1, 2).double() * fast._divided(fast.INT8, most).double()).round()
    keys = packed.keys[:, :, :v.shape[1]].double() * packed.key_scales.repeat_interleave(fast.TILE, 2)[:, :, :v.shape[1], None]
    logits = rows.double() * row_scale @ keys.mT.repeat(repeats) * scale
    of_mean = q.transpose(1, 2).double() @ packed.key_mean.double()[..., None].repeat(repeats) * scale
    v = v.transpose(1, 2).double().repeat(repeats)
    return SimpleNamespace(logits=logits, lse=(logits.logsumexp(-1) + of_mean[..., 0]).transpose(1, 2),
                           out=(logits.softmax(-1) @ v).transpose(1, 2), size=(logits.softmax(-1) @ v.abs()).transpose(1, 2))


def error(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_packed(shape, dtype):
    """Codes bit for bit; an instruction that multiplies and adds may round a key's tie to the other side."""
    _, k, v = drawn(*shape, dtype)
    tokens = k.shape[1]
    for kind in KINDS:
        packed = pack(k, v, kind)
        assert packed.keys.shape[2] == -(-tokens // PADDED) * PADDED
        torch.testing.assert_close(packed.key_mean, k.float().mean(1), rtol=1e-5, atol=1e-5)
        centred = k.float().transpose(1, 2) - packed.key_mean[:, :, None]
        codes, scales = (x.flatten(2, 3) for x in fast._whole_numbers(fast._tiles(centred), (-2, -1)))
        torch.testing.assert_close(packed.key_scales[:, :, :scales.shape[2]], scales[..., 0], rtol=1e-6, atol=0)
        off = (packed.keys[:, :, :codes.shape[2]].float() - codes).abs()
        assert off.max() <= 1 and off.sum() <= (off.numel() / 1000 if ON_GPU else 0)
        assert not packed.keys[:, :, tokens:].any()
        if not kind:
            assert packed.values is v and packed.value_scales is None
            continue
        most = v.float().abs().amax(1)
        torch.testing.assert_close(packed.value_scales, most / fast.E4M3, rtol=1e-6, atol=0)
        codes = (v.float() * fast._divided(fast.E4M3, most)[:, None]).to(torch.float8_e4m3fn).view(torch.uint8).permute(0, 2, 3, 1)
        assert torch.equal(packed.values.view(torch.uint8)[..., :tokens], codes)
        assert not packed.values.view(torch.uint8)[..., tokens:].any()


@pytest.mark.parametrize("tile", TILINGS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_values_as_they_came(shape, dtype, tile):
    """The same attention with exponentials and values in 16 bits, or in float32 in the interpreter."""
    q, k, v = drawn(*shape, dtype)
    if ON_GPU and dtype == torch.float32:
        v = v.half()
    packed = pack(k, v, False)
    (out, lse), wanted = attend_packed(q, packed, tile), expected(q, v, packed)
    # a step of each exponential and of the output, and in float32 of sums
    assert ((out.double() - wanted.out).abs() <= (STEP[v.dtype] + STEP[q.dtype] + 1e-5) * wanted.size).all()
    torch.testing.assert_close(lse.double(), wanted.lse, rtol=0, atol=1e-4)


@pytest.mark.skipif(True not in KINDS, reason="this GPU has no products in E4M3")
@pytest.mark.parametrize("tile", TILINGS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_values_in_e4m3(shape, dtype, tile):
    """E4M3 rounds an exponential by a sixteenth of it at most, in the reference relative to the largest of the row and here to the largest
    so far. So the two differ by an eighth of the products at most, and the kernel is as far from the exact result as the reference."""
    q, k, v = drawn(*shape, dtype)
    packed = pack(k, v, True)
    (out, lse), (reference, sums), wanted = attend_packed(q, packed, tile), fast.fast(q, k, v), expected(q, v, packed)
    assert ((out.double() - reference.double()).abs() <= (2**-3 + STEP[dtype]) * wanted.size + 1e-5 * wanted.size.amax()).all()
    assert error(out, wanted.out) <= 1.2 * error(reference, wanted.out) + STEP[dtype]
    torch.testing.assert_close(lse.double(), wanted.lse, rtol=0, atol=1e-4)
    # a mean summed in another order rounds a key or two to the other side
    torch.testing.assert_close(sums.double(), wanted.lse, rtol=0, atol=1e-2)
    assert out.dtype == q.dtype and lse.dtype == torch.float32 and out.shape == q.shape


@pytest.mark.skipif(True not in KINDS, reason="this GPU has no products in E4M3")
@pytest.mark.parametrize("tile", TILINGS, ids=name_of)
@pytest.mark.parametrize("tokens", [64, 300])
def test_the_largest_logit_first(tokens, tile):
    """Where the first tile holds the largest logit of every row, the kernel rounds what the reference rounds."""
    draw = torch.Generator().manual_seed(0)
    shared = torch.randn(64, generator=draw)
    q = (shared + torch.randn(1, 70, 2, 64, generator=draw) / 2).to(DEVICE)
    k, v = (torch.randn(1, tokens, 2, 64, generator=draw).to(DEVICE) for _ in range(2))
    k[:, 5] = 0.8 * shared.to(DEVICE)
    packed = pack(k, v, True)
    assert (expected(q, v, packed).logits.argmax(-1) < 64).all()
    out, _ = attend_packed(q, packed, tile)
    # a few exponentials in a thousand lie so near to the middle of two codes that float32 rounds them to the other side
    assert error(out, fast.fast(q, k, v)[0].double()) < 2e-3


@pytest.mark.parametrize("kind", KINDS)
def test_extremes(kind):
    q, k, v = drawn(1, 1, 20, 150, 2, 64)
    zeros = torch.zeros_like(k)
    if ON_GPU and not kind:
        v = v.half()

    def attended(q, k, v):
        return attend_packed(q, pack(k, v, kind))

    # equal keys, or queries of nothing: every token counts the same
    for keys, queries in ((zeros, q), (k[:, :1].expand_as(k).contiguous(), q), (k, torch.zeros_like(q))):
        out, lse = attended(queries, keys, v)
        mean = v.float().mean(1, keepdim=True).expand_as(out)
        assert error(out, mean.double()) < (0.05 if kind else 1e-3)
        product = torch.einsum("bqhd,bhd->bqh", queries, keys.float().mean(1)) / 8
        torch.testing.assert_close(lse, product + torch.tensor(150.0).log().to(DEVICE), rtol=1e-5, atol=1e-4)
    assert not attended(q, k, torch.zeros_like(v))[0].any()
    # large beside small: a scale of its own each
    near, far = attended(q, k, v), attended(q * 1e-15, k * 1e15, v)
    torch.testing.assert_close(far[0], near[0], rtol=0, atol=0.15)
    torch.testing.assert_close(far[1], near[1], rtol=1e-4, atol=1e-2)
    if kind:
        assert error(attended(q, k, v * 1e30)[0] / 1e30, near[0].double()) < 1e-4
    # logits of thousands
    packed = pack(k, v, kind)
    (out, lse), wanted = attend_packed(q * 1000, packed), expected(q * 1000, v, packed)
    assert error(out, wanted.out) < 0.05
    torch.testing.assert_close(lse.double(), wanted.lse, rtol=1e-5, atol=0)


@pytest.mark.parametrize("tile", TILINGS, ids=name_of)
@pytest.mark.parametrize("kind", KINDS)
def test_padding_counts_for_nothing(kind, tile):
    """Even where every logit lies far below zero, as with keys that keep a mean."""
    q, k, v = (x.abs() for x in drawn(1, 1, 20, 150, 2, 64))
    if ON_GPU and not kind:
        v = v.half()
    packed = pack(k, v, kind)
    keys = packed.keys.clone()
    keys[:, :, :150] = -100 + keys[:, :, :150] // 8
    packed = replace(packed, keys=keys, key_scales=packed.key_scales + 1)
    (out, lse), wanted = attend_packed(q, packed, tile), expected(q, v, packed)
    assert wanted.logits.max() < -500
    assert error(out, wanted.out) < (0.05 if kind else 1e-3)
    torch.testing.assert_close(lse.double(), wanted.lse, rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_not_finite(kind, value):
    """As in the reference: a key spoils its head, a value its channel, a query its row."""
    for which, where in ((0, (0, 7, 1, 3)), (1, (0, 140, 1, 3)), (2, (0, 140, 1, 3))):
        q, k, v = (x.clone() for x in drawn(2, 1, 20, 150, 2, 64))
        if ON_GPU and not kind:
            v = v.half()
        (q, k, v)[which][where] = value
        out, lse = attend_packed(q, pack(k, v, kind))
        reference, sums = fast.fast(q, k, v)
        # softmax gives an infinite value a weight, which may be zero
        infinite = which == 2 and not kind and value == value
        assert torch.equal(~out.isfinite() if infinite else out.isnan(), reference.isnan())
        assert torch.equal(lse.isnan(), sums.isnan())
        assert reference.isnan().any() and not reference.isnan().all()


def test_what_has_no_kernel_is_refused():
    q, k, v = drawn(1, 2, 5, 70, 2, 64)
    wide = torch.zeros(1, 5, 2, 256, device=DEVICE)
    with backends.force("triton"):
        for wrong, words in (((wide, wide, wide), "heads of 256 channels have no kernel"), ((q[:1], k, v), "are not .C . B, T"),
                             ((q, k[:, :, :1], v), "queries"), ((q, k[:, :0], v[:, :0]), "some tokens"), ((q, k, v[:, 1:]), "and values"),
                             ((q, k.transpose(1, 3).contiguous().transpose(1, 3), v), "contiguous")):
            with pytest.raises(backends.Unsupported, match=words):
                fast.attend(*wrong)


def room(packs, heads=8, **more):
    return Geometry(2, heads, 64, (3, 4), packs=packs, **more)


@pytest.mark.parametrize("packs", [1, 2])
@pytest.mark.parametrize(("heads", "tokens"), [(1, 1), (1, 127), (2, 128), (2, 129), (3, 1000), (1, 3000)])
def test_what_is_packed_lies_within_what_is_reserved(heads, tokens, packs):
    """In whatever pieces and groups of up to three heads."""
    asked = []

    def space(size):
        asked.append(size)
        return torch.full((size,), 255, dtype=torch.uint8, device=DEVICE)

    _, k, v = drawn(1, 2, 1, tokens, heads, 64)
    packed, alone = (pack(k, v, packs == 2, place) for place in (space, None))
    for name in ("keys", "key_scales", "key_mean", *(("values", "value_scales") if packs == 2 else ())):
        placed = getattr(packed, name)
        assert torch.equal(placed.view(torch.uint8), getattr(alone, name).view(torch.uint8)) and placed.data_ptr() % 16 == 0
    reserved = packed_bytes(room(packs, batch=2), heads * tokens, 3)
    assert len(asked) == 1 and asked[0] <= reserved < 1.1 * asked[0] + 3 * 2 * PADDED * (64 * packs + 10) * 2


@pytest.mark.parametrize(("capability", "hip", "packs"), [((8, 0), None, 1), ((8, 9), None, 2), ((9, 0), None, 2), ((9, 4), "7.0", 1)])
def test_what_is_packed_where(monkeypatch, capability, hip, packs):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cuda")
    assert fast.packs(device) == packs == 1 + converts_e4m3.__wrapped__(device)
    fitting = replace(PRESETS["balanced"], attention="fast")
    if not backends.refusal("attend", device):
        assert (choice.packs(fitting, device), choice.packs(fitting, device, head_dim=32)) == (packs, 0)
    assert choice.packs(PRESETS["balanced"], device) == choice.packs(fitting, "cpu") == 0


@pytest.mark.parametrize("packs", [1, 2])
@pytest.mark.parametrize(("changes", "limit", "first_frames"), [
    ({}, 0, 0), ({}, 60_000, 0), ({}, 200_000, 13), ({"window_frames": 9}, 0, 0), ({"offload": True}, 100_000, 0),
    ({"budget_gib": 2_700_000 / GIB}, 100_000, 0)])
def test_what_is_packed_counts(monkeypatch, changes, limit, first_frames, packs):
    """In the workspace of a run and of its forecast, and within the limit. The reference computes, so that it takes no minutes."""
    monkeypatch.setattr(codebook_lifetime, "LARGEST_MISFIT", math.inf)
    settings, total = replace(PRESETS["balanced"], attention="fast", **changes), first_frames + 21

    def attend(q, k, v, space):
        _placed(k, -(-k.shape[1] // PADDED) * PADDED, packs == 2, space)
        return fast.fast(q, k, v)

    geometry = on_device(room(packs), "cpu", limit)
    planned, without = (forecast(settings, shape, total, 3, first_frames, itemsize=4) for shape in (geometry, replace(geometry, packs=0)))
    cache = KVCache(settings, layers=2, heads=8, head_dim=64, grid=(3, 4), rope=Rope, dtype=torch.float32, max_frames=total,
                    chunk_frames=3, workspace_limit=limit, packs=packs)
    backends.register(backends.Backend("packing", devices=("cpu",), ops={"attend": attend}))
    try:
        starts = ([0] if first_frames else []) + list(range(first_frames, total, 3))
        for start, stop in zip(starts, [*starts[1:], total]):
            one = CachedAttention(cache, start_frame=start, frames=stop - start, store=True)
            for layer in range(2):
                one(layer, *(x[:, :, 1:-1].cpu() for x in drawn(1, 1, 12 * (stop - start), 12 * (stop - start), 10, 64, seed=start)))
    finally:
        backends.remove("packing")
    stats = cache.stats()
    assert (stats.stored_bytes, stats.workspace_bytes) == (planned.stored_bytes, planned.workspace_bytes)
    assert stats.peak_bytes == planned.peak_bytes
    if limit:
        assert stats.workspace_bytes <= max(limit, 2 * 64 * 4 * 12 * first_frames + packed_bytes(geometry, 12 * first_frames, 1))
    else:
        assert stats.workspace_bytes - without.workspace_bytes > packs * without.workspace_bytes / 8
    cache.workspace.free()
    assert not cache.stats().workspace_bytes


@pytest.mark.skipif(not ON_GPU or converts_e4m3(DEVICE), reason="for GPUs without products in E4M3")
def test_values_in_float32_are_refused():
    with backends.force("triton"), pytest.raises(backends.Unsupported, match="not float32"):
        fast.attend(*drawn(1, 1, 5, 70, 1, 64))


@pytest.mark.skipif(not ON_GPU, reason="the interpreter takes half a minute")
@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_in_a_pass(dtype):
    """A pass of two conditions over a history in pieces: the sink is attended to exactly, settled spans in eight bits."""
    outs, heads, dim, grid = [], 2, 64, (4, 6)
    chunks = [torch.randn(2, 72, heads, dim, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype) for seed in range(8)]
    for backend in ("triton", "torch"):
        cache = KVCache(PRESETS["balanced"], layers=1, heads=heads, head_dim=dim, grid=grid, rope=Rope, dtype=dtype, device=DEVICE,
                        max_frames=18, chunk_frames=3)
        with backends.force("torch"):
            for k, v in zip(chunks[:5], chunks[1:6]):
                cache.layers[0].append(k[:1], v[:1], 3)
        with backends.force(backend):
            outs.append(CachedAttention(cache, start_frame=15, frames=3, store=False, attention=eight_bits)(0, *chunks[5:]))
        assert any(op == "attend" and ran == backend for op, ran, _ in cache.calls)
    assert error(outs[0], outs[1].double()) < 0.04


@pytest.mark.skipif(not ON_GPU, reason="the interpreter would take hours")
@pytest.mark.parametrize("frames", [1, 60])
def test_a_long_history(frames):
    """Errors of thousands of tiles do not add up: one running sum of E4M3 products would be wrong by a third."""
    q, k, v = drawn(1, 1, 1560, 1560 * frames, 3, 128, torch.bfloat16)
    out, _ = fast.attend(q, k, v)
    exact = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    assert error(out, exact.double()) < 0.04


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_and_reference_are_one_op(dtype):
    (out, lse), (reference, sums) = both(fast.attend, *drawn(2, 1, 50, 100, 2, 64, dtype if not ON_GPU else torch.bfloat16))
    assert out.dtype == reference.dtype and out.shape == reference.shape and lse.shape == sums.shape
    assert error(out, reference.double()) < 0.06
