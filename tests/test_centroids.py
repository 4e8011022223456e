"""Centroids against what they must be: k-means, codebooks that follow one another, and the rounding of E4M3."""

import pytest
import torch

from comfyui_qvg.qvg.attention.rope import Rope
from comfyui_qvg.qvg.cache.kv_cache import KVCache
from comfyui_qvg.qvg.codec import e4m3, kmeans, smoothing
from comfyui_qvg.qvg.codec.base import Tables
from comfyui_qvg.qvg.codec.pair import TensorCodec
from comfyui_qvg.qvg.settings import QVGSettings, TensorSettings
from precision_cases import ALL, clustered, generator, noise


def test_a_codebook_begins_with_the_one_before():
    """Centroids stay in the order of those before, fewer steps suffice, and no random number is drawn."""
    x, _ = clustered(144)
    draw = generator(3)
    first = smoothing.train([x], 2, 4, 8, draw, [None])[0]
    state = draw.get_state()
    moved = x + 0.5
    second = smoothing.train([moved], 2, 4, 8, draw, [first])[0]
    assert torch.equal(draw.get_state(), state)
    # the first stage has moved with the tokens, each centroid with its own; E4M3 rounds to a sixteenth
    torch.testing.assert_close(second.values(0), first.values(0) + 0.5, atol=0.7, rtol=0.13)
    cold = smoothing.train([moved], 2, 4, 8, generator(4), [None])[0]
    assert not torch.allclose(cold.values(0), first.values(0) + 0.5, atol=0.7, rtol=0.13)


def test_codebooks_of_a_cache_begin_with_those_before():
    """K and V of frames that hold the same clusters keep the numbers of their centroids, whenever new ones are trained."""
    tensor = TensorSettings(stages=1, centroids=4)
    settings = QVGSettings(key=tensor, value=tensor, sink_frames=0, recent_frames=0, codebook_frames=1, iterations=8)
    cache = KVCache(settings, layers=1, heads=2, head_dim=16, grid=(12, 12), rope=Rope, dtype=torch.float32)
    x = torch.stack([clustered(144, seed=seed)[0] for seed in (0, 7)])[:, None]
    for number in range(4):
        cache.layers[0].append(*(x + 0.02 * noise(*x.shape, seed=20 + number)), 1)
    first, *others = {id(entry.books[0]): entry.books for entry in cache.layers[0].entries}.values()
    assert others
    for books in others:
        for old, new in zip(first, books):
            torch.testing.assert_close(new.values(0), old.values(0), atol=1.0, rtol=0.13)


def test_a_codebook_of_another_size_begins_anew():
    x, _ = clustered(144)
    small = smoothing.train([x], 1, 2, 8, generator(3), [None])[0]
    draw, same = generator(5), generator(5)
    found = smoothing.train([x], 1, 4, 8, draw, [small])[0]
    assert torch.equal(found.centroids, smoothing.train([x], 1, 4, 8, same, [None])[0].centroids)
    assert torch.equal(draw.get_state(), same.get_state()) and not torch.equal(draw.get_state(), generator(5).get_state())


def test_a_later_codebook_takes_a_quarter_of_the_steps(monkeypatch):
    x, _ = clustered(144)
    steps, real = [], smoothing.kmeans
    monkeypatch.setattr(smoothing, "kmeans", lambda x, start, iterations: steps.append(iterations) or real(x, start, iterations))
    book = smoothing.train([x], 2, 4, 12, generator(), [None])[0]
    smoothing.train([x], 2, 4, 12, generator(), [book])
    smoothing.train([x], 2, 4, 3, generator(), [book])
    assert steps == [12, 12, 3, 3, 1, 1]


def test_clusters_are_found():
    """Of well separated clusters nothing is left but their spread and the rounding of E4M3, which the residual sees."""
    x, places = clustered(400)
    found = kmeans.kmeans(x.transpose(0, 1), places + 0.5, 3)
    torch.testing.assert_close(found, torch.stack([x[number::4].mean(0) for number in range(4)], dim=1), rtol=1e-4, atol=1e-4)
    book = smoothing.train([x], 2, 4, 8, generator(), [None])[0]
    residual, ids = smoothing.subtract(x, book, ALL)
    assert residual.square().mean() < 0.01 * x.square().mean() and ids.shape == (2, 2, 400) and ids.dtype == torch.uint8
    assert ids.amax() <= 3
    torch.testing.assert_close(book.channel_scale.float(), residual.square().mean(1).sqrt(), rtol=2**-7, atol=1e-4)
    # what was subtracted is what is stored
    again = residual + sum(book.values(stage)[torch.arange(2)[:, None], ids[stage].long()] for stage in range(2))
    torch.testing.assert_close(again, x.transpose(0, 1))


def test_the_nearest_centroid_is_taken():
    x, centroids = noise(2, 50, 16), noise(2, 7, 16, seed=1)
    expected = (x[:, :, None] - centroids[:, None]).square().sum(-1).argmin(-1)
    assert torch.equal(kmeans.assign(x, centroids), expected)
    references = centroids[:, [0, 0, 1]]
    assert kmeans.assign(x, references).unique().tolist() == [0, 2]
    assert torch.equal(kmeans.gather_centroids(centroids, expected), centroids[torch.arange(2)[:, None], expected])


def test_a_step_takes_means_and_moves_what_nothing_chose():
    """An empty centroid moves to a token: of as many neighbours as there are tokens to a centroid, the one farthest from its choice."""
    x = torch.zeros(1, 9, 8)
    x[0, :, 0] = torch.tensor([0.0, 1, 2, 10, 11, 15, 20, 22, 27])
    centroids = torch.zeros(1, 3, 8)
    centroids[0, :, 0] = torch.tensor([1.0, 21, 500])
    ids = kmeans.assign(x, centroids)
    assert ids[0].tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1]
    moved = kmeans.update(x, ids, centroids)[0, :, 0].tolist()
    assert moved == pytest.approx([24 / 5, 21, 27])
    # no token of the second third chose the second; the one farthest from the centroid that it chose is 11
    centroids[0, :, 0] = torch.tensor([1.0, 500, 21])
    moved = kmeans.update(x, kmeans.assign(x, centroids), centroids)[0, :, 0].tolist()
    assert moved == pytest.approx([24 / 5, 11, 21])


def test_tokens_to_begin_with_are_distinct():
    for count in (1, 5, 20):
        drawn = kmeans.draw(20, count, 3, generator(), torch.device("cpu"))
        assert drawn.shape == (3, count) and all(len(set(row.tolist())) == count for row in drawn)
        assert 0 <= drawn.min() and drawn.max() < 20
    assert drawn[0].tolist() != drawn[1].tolist()


@pytest.mark.parametrize(("rows", "each", "limit", "slices"), [
    (4, 10, 100, [(0, 4)]), (4, 10, 20, [(0, 2), (2, 4)]), (5, 10, 29, [(0, 2), (2, 4), (4, 5)]), (3, 10, 5, [(0, 1), (1, 2), (2, 3)]),
    (2, 0, 5, [(0, 2)])])
def test_slices_of_rows(rows, each, limit, slices):
    assert [(part.start, part.stop) for part in smoothing.row_slices(rows, each, limit)] == slices


def test_slices_of_rows_change_nothing(monkeypatch):
    x = noise(100, 5, 16)
    one = TensorCodec("qvg", TensorSettings(stages=2, centroids=4, group=16), 16, 2)
    whole = one.train(x, generator())
    span = one.encode(x, 3, whole)
    monkeypatch.setattr(smoothing, "SCRATCH_BYTES", 1)
    monkeypatch.setattr(smoothing, "row_slices", lambda rows, *_: [slice(row, row + 1) for row in range(rows)])
    parts = one.train(x, generator())
    assert all(torch.equal(a, b) for a, b in zip(vars(whole).values(), vars(parts).values()))
    again = one.encode(x, 3, whole)
    assert torch.equal(again.decode(ALL, Tables("cpu")), span.decode(ALL, Tables("cpu")))


def test_centroids_are_kept_to_three_bits():
    """E4M3 under a power of two a channel, the largest between a half and the whole of what E4M3 holds."""
    found = noise(2, 6, 16) * torch.logspace(-5, 5, 16)
    codes, scale, residual = smoothing.store(noise(2, 40, 16), found)
    assert scale.shape == (2, 1, 16) and (torch.frexp(scale.float()).mantissa == 0.5).all()
    torch.testing.assert_close(e4m3.decode(codes) * scale.float(), found, rtol=2**-4, atol=0.5 * 2**-9 * scale.float().max())
    largest = e4m3.decode(codes).abs().amax(1)
    assert (largest > 223).all() and (largest <= 448).all()
    assert residual.shape == (2, 40, 16)


def test_without_stages_there_are_channel_scales_alone():
    x = noise(50, 2, 16) * torch.logspace(-1, 1, 16)
    book = smoothing.train([x], 0, 1, 2, generator(), [None])[0]
    assert book.stages == 0 and book.centroids.numel() == 0
    torch.testing.assert_close(book.channel_scale.float(), x.square().mean(0).sqrt(), rtol=2**-8, atol=0)
    assert torch.equal(smoothing.subtract(x, book, ALL)[0], x.transpose(0, 1))
