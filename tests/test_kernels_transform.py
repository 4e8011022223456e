"""Kernels of the transform codec compared with their references: on a GPU if there is one, else in Triton's interpreter.

That these spans are read as others are is tested with the others (`test_kernels_decode`).
"""

import pytest
import torch

from comfyui_qvg.qvg import backends
from comfyui_qvg.qvg.attention.rope import Rope
from comfyui_qvg.qvg.cache.read import Held, History, read
from comfyui_qvg.qvg.codec import Tables, TensorCodec, TensorSettings, e4m3, pair
from comfyui_qvg.qvg.codec.transform import TRANSFORM
from kernel_cases import DEVICE, DTYPES, ON_GPU, ON_HOPPER, both, tokens

pytest.importorskip("triton", reason="kernels are written in Triton")

pytestmark = [pytest.mark.usefixtures("poison"), *([pytest.mark.gpu] if ON_GPU else [])]


def coder(bits, dim, gain="mse"):
    return TensorCodec("transform", TensorSettings(bits=bits, stages=0, gain=gain), dim, 4)


def book_of(x, bits=2):
    with backends.force("torch"):
        return coder(bits, x.shape[-1]).train(x, torch.Generator())


def codes_of(span):
    """Codes of the components from a span's bits, [R, D, T]; missing bits are 0."""
    order = span.codebook.order[:, :16 * span.words.shape[1]].long()
    bits = ((span.words.int()[:, :, None] >> torch.arange(16, device=DEVICE)[:, None]) & 1).flatten(1, 2)
    place = (order[:, :, None] == order[:, None]).tril(-1).sum(-1)
    codes = torch.zeros(len(order), span.shape[2], span.shape[0], dtype=torch.int32, device=DEVICE)
    return codes.scatter_add_(1, order[..., None].expand_as(bits), (bits << (7 - place)[..., None]).int())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "rows", "dim", "bits", "other"), [
    (1, 1, 64, 0.5, 0.5), (63, 3, 64, 1.25, 2), (130, 2, 128, 4, 4), (97, 2, 256, 0.75, 1), (1100, 1, 64, 2.5, 1.25)])
def test_encode(count, rows, dim, bits, other, dtype):
    """The same scales and, up to rounding of the operands, the same codes; K and V with widths of their own."""
    xs = [tokens(count, rows, dim, dtype=dtype, seed=seed) for seed in (0, 1)]
    of, books = coder(bits, dim), [book_of(x) for x in xs]
    ours, reference = both(TRANSFORM.encode, xs, [of.settings] * 2, [bits, other], books)
    for mine, theirs, x in zip(ours, reference, xs):
        assert {name: part.shape for name, part in mine.tensors().items()} == {name: part.shape for name, part in theirs.tensors().items()}
        assert (mine.bits, mine.gain, mine.codebook) == (theirs.bits, theirs.gain, theirs.codebook)
        assert (mine.exponents.int() - theirs.exponents.int()).abs().max() <= (1 if ON_GPU else 0)
        same = mine.exponents == theirs.exponents
        steps = (mine.scales.int() - theirs.scales.int()).abs()[same]
        assert steps.max() <= 1 and (count == 1 or (steps > 0).float().mean() <= (0.1 if ON_GPU else 0.01))
        assert torch.allclose(mine.fit, theirs.fit, rtol=1e-2 if ON_GPU else 1e-4)
        # a code that rounding moves across a border is one step away, unless the token's scale is
        equal = (mine.scales == theirs.scales) & same[:, None]
        away = (codes_of(mine) - codes_of(theirs)).abs().transpose(1, 2)[equal]
        assert count == 1 or (away > 0).float().mean() <= (0.05 if ON_GPU else 1e-3)
        errors = [(span.decode(slice(None), Tables(DEVICE)) - x.float()).square().mean() for span in (mine, theirs)]
        # with four bits, rounding the operands to bf16 counts
        assert errors[0] <= errors[1] * (1.05 if ON_GPU else 1.001) + 1e-9


def test_encode_is_deterministic():
    x = tokens(700, 2, 128)
    book, of = book_of(x), coder(1.25, 128)
    with backends.force("triton"):
        spans = [of.encode(x, 1.25, book) for _ in range(2)]
    assert all(map(torch.equal, *(span.tensors().values() for span in spans)))


def test_encode_bad_silent_and_huge_tokens():
    """A token that is not finite is marked, and changes nothing else; what is silent stays so."""
    x = tokens(80, 3, 64)
    x[:, 0], x[7, 1, 5] = 0, 60000.0
    book, of = book_of(x), coder(4, 64)
    bad = x.clone()
    bad[3, 1, 2], bad[9, 2, 0] = torch.nan, torch.inf
    with backends.force("triton"):
        clean, marked = of.encode(x, 4, book), of.encode(bad, 4, book)
    with backends.force("torch"):
        reference = of.encode(bad, 4, book)
    assert torch.equal(marked.scales == e4m3.NAN, reference.scales == e4m3.NAN) and (marked.scales == e4m3.NAN).sum() == 2
    assert torch.equal(marked.exponents, clean.exponents) and torch.allclose(marked.fit, reference.fit, rtol=1e-2)
    good = marked.scales != e4m3.NAN
    assert torch.equal(marked.scales[good], clean.scales[good])
    assert torch.equal(marked.words.transpose(1, 2)[good], clean.words.transpose(1, 2)[good])
    assert not clean.decode(slice(None), Tables(DEVICE))[:, 0].any()


def test_encode_views():
    """Heads of a wider tensor, and K and V with strides of their own."""
    x = tokens(90, 6, 64)
    views = [x[:, 1:4], tokens(3, 90, 64).transpose(0, 1)]
    books, of = [book_of(view) for view in views], coder(2, 64)
    with backends.force("triton"):
        ours = TRANSFORM.encode(views, [of.settings] * 2, [2, 2], books)
        for mine, view, book in zip(ours, views, books):
            alone = of.encode(view.contiguous(), 2, book)
            assert torch.equal(mine.words, alone.words) and torch.equal(mine.scales, alone.scales)


def history(dim, grid, batch, heads, widths, dtype=torch.float32):
    """Spans of several widths under two bases of K and of V; (latent frames, bits of K, bits of V) each."""
    held, position, books = [], 3, []
    with backends.force("torch"):
        for number, (frames, *bits) in enumerate(widths):
            xs = [tokens(frames * grid[0] * grid[1], batch * heads, dim, seed=10 * number + side) for side in (0, 1)]
            if number in (0, 2):
                books = [book_of(x) for x in xs]
            gains = "energy", "unbiased"
            spans = [coder(width, dim, gain).encode(x, width, book) for width, x, book, gain in zip(bits, xs, books, gains)]
            held.append(Held(*spans, frames, position))
            position += frames
    return History(held, TRANSFORM, heads, Rope(dim, grid), Tables(DEVICE), {}, {})


def read_by(backend, of, heads, dtype, batch):
    count = sum(held.frames for held in of.held) * of.frame_tokens
    found = [torch.full((batch, count, heads.stop - heads.start, of.held[0].key.shape[2]), torch.nan, dtype=dtype, device=DEVICE)
             for _ in range(2)]
    with backends.force(backend):
        read(of, heads, *found)
    return found


# as a share of the pair's size: one rounding of the workspace's type, and float16 angles on Hopper
STEPS = {torch.float32: 2e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}


def assert_close(ours, theirs):
    """Up to a step of the dtype at the size of a pair, and what sums lose that cancel: matrix units round every partial sum down."""
    size = theirs.float().unflatten(-1, (-1, 2)).norm(dim=-1, keepdim=True).expand(*theirs.shape[:-1], -1, 2).flatten(-2)
    slack = (1e-5 if ON_GPU else 1e-6) * theirs.float().norm(dim=-1, keepdim=True)
    assert ours.isfinite().all() and ((ours.float() - theirs.float()).abs() <= STEPS[theirs.dtype] * size + slack).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("dim", "grid", "batch", "heads"), [
    (64, (1, 1), 1, slice(0, 4)), (128, (3, 11), 2, slice(2, 4)), (256, (4, 5), 1, slice(3, 4)), (64, (13, 9), 1, slice(0, 1))])
def test_decode(dim, grid, batch, heads, dtype):
    """Widths of K and V apart, odd grids, batches, one head and all, several bases, and spans longer than a tile."""
    of = history(dim, grid, batch, 4, [(2, 4, 0.5), (1, 1.25, 1.75), (2, 2.5, 1.25), (1, 1.25, 1.25)])
    for ours, theirs in zip(read_by("triton", of, heads, dtype, batch), read_by("torch", of, heads, dtype, batch)):
        assert_close(ours, theirs)


def test_decode_marks_bad_tokens():
    of = history(64, (5, 7), 1, 2, [(1, 1.25, 1.25)])
    of.held[0].key.scales[1, 9] = e4m3.NAN
    keys, values = read_by("triton", of, slice(0, 2), torch.float32, 1)
    assert keys[0, 9, 1].isnan().all() and keys.isnan().sum() == 64 and not values.isnan().any()


def test_recover_is_what_a_span_decodes_to():
    of = history(128, (5, 7), 1, 3, [(2, 1.25, 3)])
    spans = list(of.held[0][:2])
    ours, reference = both(lambda: pair.tokens_of(spans, of.tables, torch.float32))
    for mine, theirs in zip(ours, reference):
        assert_close(mine, theirs)


@pytest.mark.skipif(not ON_HOPPER, reason="needs a GPU of compute capability 9, because the interpreter does not know Gluon")
@pytest.mark.parametrize(("dim", "grid", "widths"), [
    (128, (30, 52), [(3, 4, 4), (3, 1.25, 1.25), (1, 0.5, 2)]), (64, (7, 9), [(2, 0.75, 1.25), (1, 1.75, 4)]),
    (128, (9, 9), [(1, 1, 1.5), (1, 2.5, 3), (1, 0.25, 1.125)])])
def test_decode_on_hopper(dim, grid, widths, monkeypatch):
    """Hopper's kernel agrees with the one for any GPU up to rounding, and is the one that runs."""
    from comfyui_qvg.kernels import decode_transform, hopper_decode

    launched = []
    whole = hopper_decode.Cut.of
    monkeypatch.setattr(hopper_decode.Cut, "of", staticmethod(lambda words: launched.append(words) or whole(words)))
    of = history(dim, grid, 1, 4, widths)
    ours = read_by("triton", of, slice(1, 4), torch.bfloat16, 1)
    assert set(launched) == {-(-int(bits * dim) // 16) for _, *both in widths for bits in both}
    assert not list(decode_transform._hopper_failures.items())
    of.memo.clear()
    monkeypatch.setattr(decode_transform, "on_hopper", lambda *_: False)
    for mine, theirs in zip(ours, read_by("triton", of, slice(1, 4), torch.bfloat16, 1)):
        assert_close(mine, theirs)


@pytest.mark.parametrize(("rows", "dim", "decay"), [(2, 64, -1), (1, 128, -2), pytest.param(24, 128, -3, marks=pytest.mark.skipif(
    not ON_GPU, reason="takes the interpreter minutes")), pytest.param(3, 256, -2, marks=pytest.mark.skipif(
        not ON_GPU, reason="takes the interpreter minutes"))])
def test_eigh(rows, dim, decay):
    """Orthonormal vectors, values in order, and covariances between components that cost no bits."""
    x = torch.randn(rows, 4 * dim, dim, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, decay, dim)
    turn = torch.linalg.qr(torch.randn(rows, dim, dim, generator=torch.Generator().manual_seed(1)))[0]
    covariance = (turn @ (x.mT @ x) @ turn.mT / (4 * dim)).to(DEVICE)
    with backends.force("triton"):
        values, vectors = backends.run("eigh", None, covariance)
    true = torch.linalg.eigvalsh(covariance.double())
    assert (values.diff() >= 0).all()
    assert (vectors.mT @ vectors - torch.eye(dim, device=DEVICE)).abs().max() < 2e-4
    found = vectors.double().mT @ covariance.double() @ vectors.double()
    variances = found.diagonal(dim1=1, dim2=2)
    assert (values - variances).abs().max() < 1e-5 * true.max()
    assert (found - torch.diag_embed(variances)).abs().max() < 1e-2 * true.max()
    # bits per element that the product of variances is worth, above what is worth a bit
    least = true[:, dim // 2, None]
    lost = (torch.maximum(variances.sort(-1).values, least).log2() - torch.maximum(true, least).log2()).mean(-1) / 2
    assert lost.abs().max() < 5e-3
