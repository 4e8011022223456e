"""Kernels of k-means and encoding compared with their references in torch: on a GPU if there is one, else in Triton's interpreter.

torch fills new tensors with NaN (integers: their maximum), so memory that a kernel fails to write shows.
"""

import pytest
import torch

from comfyui_qvg.qvg import backends
from comfyui_qvg.qvg.codec import e4m3, kmeans, smoothing
from comfyui_qvg.qvg.codec import pair as codec
from comfyui_qvg.qvg.codec.base import Tables
from comfyui_qvg.qvg.settings import TensorSettings
from kernel_cases import DEVICE, DTYPES, ON_GPU, ON_HOPPER, both, tokens

pytest.importorskip("triton", reason="kernels are written in Triton")

pytestmark = [pytest.mark.usefixtures("poison"), *([pytest.mark.gpu] if ON_GPU else [])]

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
