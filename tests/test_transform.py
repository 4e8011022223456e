"""The transform codec: its bits, its basis, and what it leaves."""

from dataclasses import replace

import pytest
import torch

from comfyui_qvg.qvg.cache.geometry import Geometry
from comfyui_qvg.qvg.cache.sizes import span_bytes
from comfyui_qvg.qvg.codec import Tables, TensorCodec, TensorSettings, basis, e4m3, uniform
from comfyui_qvg.qvg.codec.transform import TRANSFORM, words_of
from comfyui_qvg.qvg.settings import PRESETS

WIDTHS = [width for width in TRANSFORM.widths if width <= 4]
DIM = 64


def tokens(count=600, rows=2, dim=DIM, seed=0, decay=-1.5):
    """[T, R, D] whose channels are mixtures of components of falling variance, with a mean."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(rows, dim, dim, generator=torch.Generator().manual_seed(1)) * torch.logspace(0, decay, dim)
    mean = torch.randn(rows, dim, generator=torch.Generator().manual_seed(2))
    return torch.einsum("trc,rdc->trd", torch.randn(count, rows, dim, generator=draw), mix) + mean


def codec(bits=2, dim=DIM, gain="mse", kind="transform", **options):
    return TensorCodec(kind, TensorSettings(bits=bits, stages=0, gain=gain, **options), dim, 4)


def decoded(span):
    return span.decode(slice(None), Tables("cpu"))


def share(found, x):
    """Squared error over the energy around the mean."""
    return float((found - x).square().sum() / (x - x.mean(0)).square().sum())


@pytest.fixture(scope="module")
def book():
    return codec().train(tokens(), torch.Generator())


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dim", [8, 40, 64, 128, 256])
def test_sizes_are_as_stated(bits, dim):
    x = tokens(30, 3, dim)
    of = codec(bits, dim)
    span = of.encode(x, bits, of.train(x, torch.Generator()))
    assert span.shape == (30, 3, dim) and span.bits == bits and decoded(span).shape == x.shape
    assert span.words.shape[1] == words_of(bits, dim) and 16 * words_of(bits, dim) - bits * dim < 16
    assert span.nbytes == span_bytes(Geometry(1, 3, dim, (5, 6)), "transform", of.settings, 1, bits)
    rows = decoded(span)[:, 1:2]
    assert torch.equal(span.decode(slice(1, 2), Tables("cpu")), rows)


def test_dropping_bits_is_encoding_fewer(book):
    x = tokens(seed=3)
    for wide, few in zip(WIDTHS, WIDTHS[1:]):
        span, direct = codec().encode(x, wide, book), codec().encode(x, few, book)
        span.drop(few)
        assert span.bits == few and span.words.untyped_storage().nbytes() == span.words.nbytes
        assert all(torch.equal(a, b) for a, b in zip(span.tensors().values(), direct.tensors().values()))


def test_more_bits_leave_less_and_less_than_planes(book):
    x = tokens(seed=3)
    errors = [share(decoded(codec(width).encode(x, width, codec(width).train(tokens(), torch.Generator()))), x) for width in WIDTHS]
    assert all(wide < few for wide, few in zip(errors, errors[1:]))
    planes = codec(1, kind="qvg")
    plane = share(decoded(planes.encode(x, 1, planes.train(tokens(), torch.Generator().manual_seed(0)))), x)
    assert errors[WIDTHS.index(1)] < 0.5 * plane


def test_a_large_mean_costs_nothing():
    """The mean of keys holds up to 97 % of their energy; a covariance around a mean that is rounded afterwards was wrong by the product of
    the mean and its rounding."""
    x = tokens(seed=3)
    shares = []
    for mean in (0, 30):
        first, second = x[:300] + mean, x[300:] + mean
        book = codec(4).train(second, torch.Generator(), codec(4).train(first, torch.Generator()))
        around = torch.cat([first, second]) - book.mean
        covariance = torch.einsum("trc,trd->rcd", around, around) / len(x)
        found = torch.einsum("rkc,rk,rkd->rcd", book.vectors.float(), book.deviation.float().square(), book.vectors.float())
        assert (found - covariance).norm() < 0.01 * covariance.norm()
        assert book.mean.dtype == torch.float32 and torch.allclose(book.mean, torch.cat([first, second]).mean(0), rtol=1e-5, atol=1e-5)
        shares.append(share(decoded(codec(4).encode(second, 4, book)), second))
    assert shares[1] < 1.1 * shares[0]


def test_tokens_far_out_in_one_component(book):
    """Their scale grows until the component is in its range, but not for one that has no bits."""
    x = tokens(seed=3)
    for component, grows in ((10, True), (DIM - 1, False)):
        far = x.clone()
        far[7] = book.mean + 12 * (book.deviation[:, component, None] * book.vectors[:, component]).float()
        span = codec().encode(far, 2, book)
        scale = torch.ldexp(e4m3.decode_scales(span.scales), span.exponents[:, None].int())[:, 7]
        norm = 12 * book.deviation[:, component].float() / book.deviation.float().square().sum(-1).sqrt()
        assert ((scale > 1.2 * norm) == grows).all()
        error = (decoded(span)[7] - far[7]).square().sum(-1) / (far[7] - book.mean).square().sum(-1)
        assert ((error < 0.2) == grows).all()


def test_a_token_is_its_bits_times_their_vectors(book):
    """The format, bit by bit, without the codec's own packing."""
    x = tokens(5, seed=4)
    span, row, token = codec().encode(x, 1.5, book), 1, 3
    words = [int(word) & 0xFFFF for word in span.words[row, :, token]]
    bits = [words[number // 16] >> number % 16 & 1 for number in range(96)]
    order, table = book.order[row].tolist()[:96], uniform.amplitudes("mse")
    scale = float(e4m3.decode(span.scales[row, token])) * 2.0 ** int(span.exponents[row])
    expected = torch.zeros(DIM)
    for number, (bit, component) in enumerate(zip(bits, order)):
        place = order[:number].count(component)
        amplitude = table[int(book.reach[row, component]), order.count(component), place] * book.deviation[row, component].float()
        expected += (2 * bit - 1) * scale * (amplitude * book.vectors[row, component].float()).bfloat16().float()
    torch.testing.assert_close(decoded(span)[token, row], expected + book.mean[row])


def test_a_basis_diagonalizes_and_bits_follow_variance(book):
    x = tokens().transpose(0, 1) - book.mean[:, None]
    vectors = book.vectors.float()
    torch.testing.assert_close(vectors @ vectors.mT, torch.eye(DIM).expand(2, -1, -1), atol=0.02, rtol=0)
    covariance = vectors @ (x.mT @ x / x.shape[1]) @ vectors.mT
    torch.testing.assert_close(covariance.diagonal(dim1=1, dim2=2), book.deviation.float().square(), rtol=0.05, atol=0.01)
    held = torch.nn.functional.one_hot(book.order.long(), DIM).sum(1)
    assert held.max() == uniform.DEEPEST and (held.diff(dim=1) <= 0).all()


def test_a_basis_continues_from_the_one_before():
    """A running covariance: two halves one after the other give the basis of both together."""
    x = tokens(800)
    of = codec()
    both, halves = of.train(x, torch.Generator()), of.train(x[400:], torch.Generator(), of.train(x[:400], torch.Generator()))
    assert float(halves.seen) == 800
    for name, tolerance in (("mean", 0.02), ("deviation", 0.03)):
        torch.testing.assert_close(getattr(halves, name).float(), getattr(both, name).float(), rtol=tolerance, atol=tolerance)
    for book in (both, halves):
        assert share(decoded(of.encode(x, 2, book)), x) < 1.05 * share(decoded(of.encode(x, 2, both)), x)


def test_misfit_is_one_on_the_training_and_grows_with_what_is_left(book):
    fit, broken = codec().encode(tokens(), 2, book).misfit().tolist()
    assert fit == pytest.approx(1, abs=0.02) and broken == fit
    # other tokens of the same kind, and tokens of another mixture
    assert codec().encode(tokens(seed=5), 2, book).misfit()[0] < 1.5
    other = tokens().roll(5, dims=2)
    assert codec().encode(other, 2, book).misfit()[0] > 3


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
def test_a_broken_token_stays_alone(book, bad):
    x = tokens()
    y = x.clone()
    y[7, 1, 3] = bad
    span, clean = codec().encode(y, 2, codec().train(y, torch.Generator())), codec().encode(x, 2, codec().train(x, torch.Generator()))
    found = decoded(span)
    assert found[7, 1].isnan().all() and not span.misfit()[1].isfinite() and span.misfit()[0].isfinite()
    found[7, 1] = decoded(clean)[7, 1]
    assert share(found, x) < 1.2 * share(decoded(clean), x)


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e-3, 1500.0, 1e6])
def test_any_magnitude(scale):
    x = scale * tokens()
    of = codec()
    found = decoded(of.encode(x, 2, of.train(x, torch.Generator())))
    assert found.isfinite().all()
    assert share(found, x) < 0.03 if scale else torch.equal(found, x)


def test_few_tokens_make_a_basis():
    x = tokens(3)
    of = codec(4)
    assert share(decoded(of.encode(x, 4, of.train(x, torch.Generator()))), x) < 0.01
    single = tokens(1)
    torch.testing.assert_close(decoded(of.encode(single, 4, of.train(single, torch.Generator()))), single, rtol=0.01, atol=0.05)


@pytest.mark.parametrize("reach", [8, 17, 24, 32])
@pytest.mark.parametrize("bits", range(1, 9))
def test_amplitudes_fit_a_gaussian(reach, bits):
    """The error that `distortions` states is the one that draws have; gains keep energy or the mean."""
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    codes = (x * (2 ** bits * 4 / reach)).floor().clamp(-2 ** (bits - 1), 2 ** (bits - 1) - 1).long() + 2 ** (bits - 1)
    signs = torch.stack([(codes >> (bits - 1 - place) & 1) * 2 - 1 for place in range(bits)]).double()
    found = {gain: uniform.amplitudes(gain)[reach, bits, :bits].double() @ signs for gain in ("mse", "energy", "unbiased")}
    if reach == uniform.REACH[bits]:
        assert float((found["mse"] - x).square().mean()) == pytest.approx(uniform.distortions()[bits], rel=0.05 if bits < 6 else 0.3)
    if bits <= uniform.FITTED:
        assert float(found["energy"].square().mean()) == pytest.approx(1, rel=0.02)
        assert float((found["unbiased"] * x).mean()) == pytest.approx(1, rel=0.02)


def test_places_of_bits():
    order = torch.randint(0, 9, (3, 50), generator=torch.Generator().manual_seed(0))
    place, held = basis.places(order)
    for row, (places, counts) in enumerate(zip(place.tolist(), held.tolist())):
        listed = order[row].tolist()
        assert places == [listed[:number].count(one) for number, one in enumerate(listed)]
        assert counts == [listed.count(one) for one in listed]


def test_heads_that_are_too_wide_are_refused():
    with pytest.raises(ValueError, match="up to 256 channels; this model's have 264"):
        codec(dim=264)


def test_settings_name_the_bits_that_are_held():
    with pytest.raises(ValueError, match=r"2\.25 bits, but the transform codec holds 0\.5, 0\.75, 1, 1\.25"):
        PRESETS["tiny"].both(bits=2.25)
    assert replace(PRESETS["tiny"].both(bits=2.0)).key.bits == 2 and type(PRESETS["tiny"].both(bits=2.0).key.bits) is int


def test_a_file_with_impossible_bases_is_refused(book):
    span = codec().encode(tokens(), 2, book)
    TRANSFORM.check_stored(span.tensors(), book, "here")
    with pytest.raises(ValueError, match="gives a component 256 bits"):
        TRANSFORM.check_stored(span.tensors(), replace(book, order=torch.zeros_like(book.order)), "here")
    with pytest.raises(ValueError, match="stands for are up to"):
        TRANSFORM.check_stored(span.tensors() | {"exponents": torch.full((2,), 100, dtype=torch.int8)}, book, "here")


@pytest.mark.parametrize("at_once", [1, 7, 64, 96, 97, 500])
def test_covariance_in_parts(at_once):
    """As a GPU adds it up: of tokens that are no multiple of the parts, too."""
    y = 5 + torch.randn(3, 97, 8, generator=torch.Generator().manual_seed(0))
    around = y - y.mean(1, keepdim=True)
    torch.testing.assert_close(basis._products(y, y.mean(1), at_once), torch.einsum("rti,rtj->rij", around, around), rtol=1e-5, atol=1e-4)
