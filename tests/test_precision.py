"""Numbers of the codec, each against what they must be: scales, levels, spans, and what a cache reads back of K and of V."""

import math
from dataclasses import replace

import pytest
import torch

from comfyui_qvg.qvg.codec import e4m3, planes, smoothing
from comfyui_qvg.qvg.codec.base import Tables
from comfyui_qvg.qvg.codec.misfit import Misfit
from comfyui_qvg.qvg.codec.pair import TensorCodec
from comfyui_qvg.qvg.codec.plain import PlainSpan
from comfyui_qvg.qvg.codec.qvg import PlaneSpan
from comfyui_qvg.qvg.registry import CODECS
from comfyui_qvg.qvg.settings import TensorSettings
from precision_cases import ALL, clustered, generator, noise, relative


def left_by(bits, tensor, x, seen=None):
    """The share of each row's energy that a span with `bits` leaves."""
    one = TensorCodec("qvg", tensor, x.shape[-1], 4)
    book = one.train(x if seen is None else seen, generator())
    return relative(one.encode(x, bits, book).decode(ALL, Tables("cpu")), x)


# K and V together


@pytest.mark.parametrize("bits", [[(4, 4)], [(4, 4), (4, 4)], [(4, 4), (3, 3), (2, 2)], [(4, 2)], [(4, 4), (2, 4)]])
def test_k_and_v_decoded_at_once_are_those_decoded_alone(bits):
    """K large and V small, and rows that differ: what takes its scales, ids, exponents or centroids from another is not near."""
    rows, tables, sides, kept = 4, Tables("cpu"), [], []
    one = TensorCodec("qvg", TensorSettings(stages=2, centroids=4, group=16), 32, 3)
    for side, factor in enumerate((300.0, 0.02)):
        xs = [factor * (1 + torch.arange(rows)[:, None]) * noise(40, rows, 32, seed=10 * side + number) for number in range(len(bits))]
        book = one.train(torch.cat(xs), generator())
        sides.append([one.encode(x, 4, book) for x in xs])
        for span, held in zip(sides[-1], bits):
            span.drop(held[side])
        kept.append(torch.cat(xs))
    most = {4: 0.02, 3: 0.06, 2: 0.2}[min(min(held) for held in bits)]
    for part in (ALL, slice(1, 3), slice(3, 4)):
        for found, spans, x in zip(CODECS["qvg"].decode(sides, part, tables), sides, kept):
            assert torch.equal(found, torch.cat([span.decode(part, tables) for span in spans]))
            assert max(relative(found, x[:, part])) < most


def test_k_and_v_that_differ_are_decoded_each_by_itself():
    x, tables = noise(40, 2, 32), Tables("cpu")
    key = TensorCodec("qvg", TensorSettings(stages=1, centroids=4), 32, 2)
    value = TensorCodec("qvg", TensorSettings(gain="unbiased"), 32, 2)
    spans = [key.encode(x, 4, key.train(x, generator())), value.encode(2 * x, 3, value.train(2 * x, generator()))]
    for sides in ([[spans[0]], [spans[1]]], [[PlainSpan(x)], [spans[1]]], [[PlainSpan(x), PlainSpan(3 * x)], [spans[1]]]):
        for found, side in zip(CODECS["qvg"].decode(sides, ALL, tables), sides):
            assert torch.equal(found, torch.cat([span.decode(ALL, tables) for span in side]))


def test_what_can_be_decoded_in_one_go():
    joins = CODECS["qvg"].joins
    x = noise(40, 2, 32)
    one = TensorCodec("qvg", TensorSettings(stages=1, centroids=4, gain="mse"), 32, 2)
    book, other = one.train(x, generator()), one.train(x, generator())
    span = one.encode(x, 4, book)
    assert joins(span, one.encode(x + 1, 2, book))
    assert not joins(span, one.encode(x, 4, other))
    assert not joins(span, one.encode(x[:30], 4, book))
    assert not joins(span, replace(span, gain="energy"))
    assert not joins(span, PlainSpan(x)) and not joins(PlainSpan(x), span)
    assert joins(PlainSpan(x), PlainSpan(x[:3]))
    eight = one.encode(x, 8)
    assert not joins(eight, PlainSpan(x)) and not joins(PlainSpan(x), eight) and not joins(eight, eight)


# scales


@pytest.mark.parametrize("factor", [1.0, 1.001, 1.3, 1.5, 1.75, 1.99, 2.0, 1e-15, 3e-5, 0.7, 65504.0, 1e15])
def test_scales_never_saturate(factor):
    """However large a row is, its largest scale lies in [128, 256] of 448, and what is read back is as near as anywhere else."""
    x = factor * noise(60, 2, 32)
    x[:, 1] /= 1024
    one = TensorCodec("qvg", TensorSettings(stages=0, group=16), 32, 1)
    unit = smoothing.Codebook(torch.empty(0, 2, 0, 32, dtype=torch.uint8), torch.empty(0, 2, 1, 32, dtype=torch.bfloat16),
                              torch.ones(2, 32, dtype=torch.bfloat16))
    span = one.encode(x, 4, unit)
    largest = e4m3.decode(span.scales).amax((0, 2))
    assert (largest >= 128).all() and (largest <= 256).all()
    assert max(relative(span.decode(ALL, Tables("cpu")), x)) < 0.02
    # the root mean square of every group, to the three bits that E4M3 keeps
    stored = e4m3.decode(span.scales) * 2.0 ** span.exponents.float()[:, None]
    torch.testing.assert_close(stored, x.unflatten(-1, (2, 16)).square().mean(-1).sqrt(), rtol=2**-4, atol=0)


def test_each_group_of_channels_has_its_scale():
    x = noise(100, 3, 64) * torch.tensor([1.0, 30.0, 0.05, 4.0]).repeat_interleave(16)
    whole, grouped = ([max(left_by(bits, TensorSettings(stages=0, group=group, gain="mse"), x)) for bits in (1, 4)] for group in (64, 16))
    # channel scales alone even out channels that differ for good
    assert whole[1] < 0.02 and grouped[1] < 0.02
    loud = torch.where(torch.arange(100)[:, None, None] % 2 > 0, 50.0, 1.0) * noise(100, 3, 64)
    loud[:, :, :16] = noise(100, 3, 16, seed=1)
    one = TensorCodec("qvg", TensorSettings(stages=0, group=16, gain="mse"), 64, 1)
    found = one.encode(loud, 4, one.train(loud, generator())).decode(ALL, Tables("cpu"))
    assert max(relative(found[:, :, :16], loud[:, :, :16])) < 0.02 and max(relative(found[::2, :, 16:], loud[::2, :, 16:])) < 0.02


def test_a_channel_that_was_silent_may_speak():
    """It gets a thousandth of its row's scale. A later span, in which it is as loud as the others, is read back as finite numbers, and
    what lies in other groups is as near as ever."""
    seen = noise(200, 2, 32)
    seen[:, :, 3] = 0
    one = TensorCodec("qvg", TensorSettings(stages=0, group=16), 32, 1)
    book = one.train(seen, generator())
    scale = book.channel_scale.float()
    assert scale[:, 3].tolist() == pytest.approx((1e-3 * seen.square().mean((0, 2)).sqrt()).tolist(), rel=0.01)
    torch.testing.assert_close(scale[:, 4:], seen.square().mean(0).sqrt()[:, 4:], rtol=2**-8, atol=0)
    spoken = noise(200, 2, 32, seed=1)
    found = one.encode(spoken, 4, book).decode(ALL, Tables("cpu"))
    assert found.isfinite().all()
    assert max(relative(found[..., 3:4], spoken[..., 3:4])) < 0.7
    assert max(relative(found[..., 16:], spoken[..., 16:])) < 0.02


def test_a_row_that_was_silent_may_speak():
    one = TensorCodec("qvg", TensorSettings(stages=1, centroids=2, group=16), 32, 1)
    book = one.train(torch.zeros(60, 2, 32), generator())
    assert (book.channel_scale == 1).all() and (book.centroid_scale == 1).all()
    x = noise(60, 2, 32)
    assert max(relative(one.encode(x, 4, book).decode(ALL, Tables("cpu")), x)) < 0.02


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e4])
def test_eight_bits(factor):
    """127 steps to each side of zero, a group at a time; silence stays silence."""
    x = factor * noise(50, 2, 32)
    x[5:9, :, :16] = 0
    x[7, 1, 20] = 100 * factor
    span = TensorCodec("qvg", TensorSettings(group=16), 32, 1).encode(x, 8)
    found = span.decode(ALL, Tables("cpu"))
    step = x.unflatten(-1, (2, 16)).abs().amax(-1) / 127
    assert ((found - x).unflatten(-1, (2, 16)).abs() <= 0.5 * step[..., None] + 0.5 * x.unflatten(-1, (2, 16)).abs() * 2**-7).all()
    assert not found[5:9, :, :16].any()
    assert span.data.dtype == torch.int8 and span.data.amax() == 127 and span.scales.shape == (50, 2, 2)
    assert torch.equal(span.decode(slice(1, 2), Tables("cpu")), found[:, 1:])


def test_sixteen_bits_are_a_copy():
    x = noise(10, 2, 32).bfloat16()
    span = TensorCodec("plain", TensorSettings(stages=0), 32, 1).encode(x[::2], 16)
    kept = x[::2].clone()
    x.zero_()
    first = span.decode(ALL, Tables("cpu"))
    assert first.dtype == torch.float32 and torch.equal(first, kept.float())
    # what is read may be overwritten
    first.zero_()
    assert torch.equal(span.decode(slice(1, 2), Tables("cpu")), kept[:, 1:].float())


def test_float32_of_sixteen_bits_is_a_copy_too():
    span = PlainSpan(noise(4, 2, 8))
    kept = span.data.clone()
    span.decode(ALL, Tables("cpu")).zero_()
    assert torch.equal(span.data, kept)


# levels


@pytest.mark.parametrize(("bits", "borders", "levels"), [
    # Max (1960), table I: the best quantizers of 2 and of 4 levels for a Gaussian
    (1, [], [0.7980]), (2, [0.9816], [0.4528, 1.510])])
def test_levels_are_those_of_the_literature(bits, borders, levels):
    assert planes.thresholds(bits) == pytest.approx(borders, abs=1e-3)
    assert planes.levels(bits) == pytest.approx(levels, abs=1e-3)
    kept = 1 - planes.distortion(bits)
    assert planes.distortion(bits) == pytest.approx({1: 0.3634, 2: 0.1175}[bits], abs=1e-4)
    assert planes.levels(bits, "energy") == pytest.approx([level / math.sqrt(kept) for level in levels], rel=2e-3)
    assert planes.levels(bits, "unbiased") == pytest.approx([level / kept for level in levels], rel=2e-3)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_planes_say_which_cell_a_number_lies_in(bits):
    """Just above each border, just below the next, and far out, on both sides of zero."""
    cells, levels = planes.cells(bits), planes.levels(bits, "energy")
    wanted = [(sign * x, sign * level) for (low, high), level in zip(cells, levels) for x in (low + 1e-4, min(high - 1e-4, 30.0))
              for sign in (1, -1)]
    wanted = (wanted * 8)[:len(wanted) * 8]
    z = torch.tensor([x for x, _ in wanted])
    codes = planes.encode(z[None], bits)
    assert len(codes) == bits and all(code.shape == (1, len(z) // 8) and code.dtype == torch.uint8 for code in codes)
    found = planes.LevelTable("energy", "cpu")(torch.stack(codes)[:, None], [(bits, 1)])[0, 0]
    torch.testing.assert_close(found, torch.tensor([level for _, level in wanted]))


def test_zero_is_read_as_positive():
    codes = planes.encode(torch.zeros(1, 8), 2)
    assert torch.equal(planes.LevelTable("mse", "cpu")(torch.stack(codes)[:, None], [(2, 1)])[0], torch.full((1, 8), planes.levels(2)[0]))


def test_channel_i_is_bit_i_of_its_byte():
    z = torch.full((1, 16), -1.0)
    z[0, [0, 3, 9, 15]] = 1.0
    assert planes.encode(z, 1)[0].tolist() == [[0b1001, 0b10000010]]
    # the second plane: far from zero or near
    assert planes.encode(torch.where(z > 0, 1.5, 0.1), 2)[1].tolist() == [[0b1001, 0b10000010]]


def test_tokens_of_different_widths_are_read_together():
    z, table = noise(30, 16), planes.LevelTable("mse", "cpu")
    codes = torch.stack(planes.encode(z, 4))
    mixed = codes.clone()
    mixed[2:, :10], mixed[1:, 10:14] = 0, 0
    found = table(mixed[:, None], [(2, 10), (1, 4), (4, 16)])[0]
    alone = [table(codes[:bits, None, part], [(bits, part.stop - part.start)])[0]
             for bits, part in ((2, slice(0, 10)), (1, slice(10, 14)), (4, slice(14, 30)))]
    assert torch.equal(found, torch.cat(alone))


# spans


def test_a_span_that_lost_planes_reads_what_is_left():
    x, tables = noise(40, 2, 32), Tables("cpu")
    one = TensorCodec("qvg", TensorSettings(stages=1, centroids=2, gain="mse"), 32, 2)
    span = one.encode(x, 4, one.train(x, generator()))
    errors = [max(relative(span.decode(ALL, tables), x))]
    for bits in (3, 2, 1):
        span.drop(bits)
        assert span.bits == bits == len(span.planes)
        errors.append(max(relative(span.decode(ALL, tables), x)))
    assert errors == sorted(errors) and errors[0] < 0.015 and 0.2 < errors[-1] < 0.4


def test_a_span_that_lies_otherwise_reads_the_same():
    x, tables = noise(40, 3, 32), Tables("cpu")
    one = TensorCodec("qvg", TensorSettings(stages=2, centroids=2, group=16), 32, 2)
    span = one.encode(x, 3, one.train(x, generator()))
    by_token = replace(span, planes=[plane.contiguous() for plane in span.planes], scales=span.scales.contiguous(),
                       ids=span.ids.contiguous())
    gathered = by_token.gather_rows()
    for name in ("scales", "ids"):
        assert getattr(gathered, name).stride() == getattr(span, name).stride()
        assert torch.equal(getattr(gathered, name), getattr(span, name))
    assert all(a.stride() == b.stride() and torch.equal(a, b) for a, b in zip(gathered.planes, span.planes))
    assert torch.equal(gathered.decode(ALL, tables), span.decode(ALL, tables)) and gathered.bits == 3
    assert isinstance(gathered, PlaneSpan) and span.planes[0].stride() == (4, 160, 1)


def test_a_span_with_other_parts_reads_those():
    """What was made to read the one is not taken over by the other."""
    x, tables = noise(40, 2, 32), Tables("cpu")
    one = TensorCodec("qvg", TensorSettings(stages=0, group=16), 32, 1)
    span = one.encode(x, 3, one.train(x, generator()))
    before = span.decode(ALL, tables)
    other = replace(span, exponents=span.exponents + 1)
    assert torch.equal(other.decode(ALL, tables), 2 * before) and torch.equal(span.decode(ALL, tables), before)
    span.drop(1)
    assert not torch.equal(span.decode(ALL, tables), before)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("stages", [0, 1, 2])
def test_the_released_codec(stages, bits, symmetric):
    """With and without centroids, of which a codebook has as many as its tokens are enough for; any rows of it are read alone."""
    x, tables = clustered(90, rows=3, dim=32, spread=1.0)[0].bfloat16(), Tables("cpu")
    one = TensorCodec("paper", TensorSettings(stages=stages, centroids=4, group=16, symmetric=symmetric), 32, 4)
    book = one.train(x, generator())
    assert book.centroids.shape == ((stages, 3, 4, 32) if stages else (0, 3, 0, 32)) and book.centroids.dtype == torch.bfloat16
    span = one.encode(x, bits, book)
    assert span.bits == bits and span.ids.shape == (stages, 90, 3)
    found = span.decode(ALL, tables)
    most = {2: 0.5, 4: 0.02}[bits] * (0.05 if stages else 1)
    assert max(relative(found, x.float())) < most
    assert torch.equal(span.decode(slice(1, 3), tables), found[:, 1:])


@pytest.mark.parametrize("kind", CODECS)
def test_heads_that_cannot_be_packed_are_refused(kind):
    with pytest.raises(ValueError, match="head dim of 12 cannot be packed"):
        TensorCodec(kind, TensorSettings(), 12, 1)


@pytest.mark.parametrize(("kind", "bits"), [("qvg", 1), ("qvg", 3), ("qvg", 8), ("qvg", 16), ("paper", 2), ("paper", 4)])
def test_a_span_knows_its_shape(kind, bits):
    """Tokens, rows and channels, however they are packed."""
    one = TensorCodec(kind, TensorSettings(stages=1, centroids=2, bits=bits), 64, 1)
    x = torch.randn(40, 3, 64, generator=generator())
    assert one.encode(x, bits, one.train(x, generator()) if bits < 8 else None).shape == (40, 3, 64)


def test_a_misfit_is_the_larger_of_k_and_v():
    """Scales of one half and of two in units of the training's: 4 for both orders, and a NaN in one of them is seen."""
    one = TensorCodec("qvg", TensorSettings(stages=0, group=64), 64, 1)
    x = torch.randn(400, 3, 64, generator=generator())
    book = one.train(x, generator())
    seventh = torch.arange(400)[:, None, None] == 7
    small, large, spoilt = (one.encode(y, 2, book) for y in (x / 2, 2 * x, torch.where(seventh, torch.nan, x)))
    for pair, value, broken in (([small, large], 4, False), ([large, small], 4, False), ([small, small], 0.25, False),
                                ([small, spoilt], 1, True), ([spoilt, small], 1, True)):
        found = Misfit(pair)
        assert found.value == pytest.approx(value, rel=0.02) and found.broken == broken
