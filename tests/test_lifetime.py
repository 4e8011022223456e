"""When a codebook is trained anew, as tables written by hand from what `codebook_lifetime` promises, and what that is worth."""

import math
from dataclasses import replace

import pytest
import torch

from comfyui_qvg.qvg.attention.rope import Rope
from comfyui_qvg.qvg.cache import codebook_lifetime
from comfyui_qvg.qvg.cache.ageing import Limits
from comfyui_qvg.qvg.cache.forecast import PlannedLayer, PlannedSpan, forecast
from comfyui_qvg.qvg.cache.geometry import Geometry
from comfyui_qvg.qvg.cache.kv_cache import KVCache
from comfyui_qvg.qvg.codec import smoothing
from comfyui_qvg.qvg.settings import PRESETS, QVGSettings, TensorSettings
from comfyui_qvg.qvg.video.session import _layer_state, _restore_layer

# 256 tokens a frame: 7 centroids of 36 tokens each, 21 of three frames
GEOMETRY = Geometry(layers=1, heads=1, head_dim=8, grid=(16, 16))
ENOUGH = TensorSettings(stages=1, centroids=4)  # a frame has tokens enough for these
LARGE = TensorSettings(stages=1, centroids=256)  # and never for these
FIT, POOR = 0, 1


def settings(tensor=ENOUGH, **changes):
    return QVGSettings(key=tensor, value=tensor, iterations=1, **changes)


def planned(chosen, chunks, fits):
    """`first frame + frames = bits : number of the codebook` of every span after each chunk, `-` where there is none."""
    layer, lines, first = PlannedLayer(chosen, GEOMETRY, Limits(), itemsize=4), [], 0
    for frames, poor in zip(chunks, fits):
        # what is asked of a span when a later one comes
        layer.append(first, frames)
        for span in layer.spans:
            if span.first >= first:
                span.poor = poor
        first += frames
        lines.append(" ".join(f"{span.first}+{span.frames}={span.key_bits}:{'-' if span.book is None else span.book}"
                              for span in layer.spans))
    return lines


@pytest.fixture
def told(monkeypatch):
    """A span fits as poorly as the table says."""
    untold = PlannedSpan.misfit.fget
    monkeypatch.setattr(PlannedSpan, "misfit", property(lambda span: bool(getattr(span, "poor", False)) or untold(span)))


TABLE = {
    "codebooks that fit serve on": (settings(), [3, 3, 3, 3], [FIT] * 4, [
        "0+3=4:0",
        "0+3=4:0 3+3=4:0",
        "0+3=4:0 3+3=2:0 6+3=4:0",
        "0+3=4:0 3+3=2:0 6+3=2:0 9+3=4:0"]),
    "but not longer than they may": (settings(codebook_frames=6), [3, 3, 3, 3], [FIT] * 4, [
        "0+3=4:0",
        "0+3=4:0 3+3=4:0",
        "0+3=4:0 3+3=2:0 6+3=4:1",
        "0+3=4:0 3+3=2:0 6+3=2:1 9+3=4:1"]),
    # the second chunk fits poorly, which is known when it settles: then it and the third are trained on, and it moves to the new codebook
    "a poor fit is mended when it settles": (settings(), [3, 3, 3, 3, 3], [FIT, POOR, FIT, FIT, FIT], [
        "0+3=4:0",
        "0+3=4:0 3+3=4:0",
        "0+3=4:0 3+3=2:1 6+3=4:1",
        "0+3=4:0 3+3=2:1 6+3=2:1 9+3=4:1",
        "0+3=4:0 3+3=2:1 6+3=2:1 9+3=2:1 12+3=4:1"]),
    "at most one codebook for two chunks": (settings(), [3, 3, 3, 3, 3, 3], [POOR] * 6, [
        "0+3=4:0",
        "0+3=4:0 3+3=4:0",
        "0+3=4:0 3+3=2:1 6+3=4:1",
        "0+3=4:0 3+3=2:1 6+3=2:1 9+3=4:1",
        "0+3=4:0 3+3=2:1 6+3=2:1 9+3=2:2 12+3=4:2",
        "0+3=4:0 3+3=2:1 6+3=2:1 9+3=2:2 12+3=2:2 15+3=4:2"]),
    "frame by frame, at most one for four": (settings(sink_frames=1), [1] * 9, [POOR] * 9, [
        "0+1=4:0",
        "0+1=4:0 1+1=4:0",
        "0+1=4:0 1+1=4:0 2+1=4:0",
        "0+1=4:0 1+1=4:0 2+1=4:0 3+1=4:0",
        "0+1=4:0 1+1=2:1 2+1=4:0 3+1=4:0 4+1=4:1",
        "0+1=4:0 1+1=2:1 2+1=2:1 3+1=4:0 4+1=4:1 5+1=4:1",
        "0+1=4:0 1+1=2:1 2+1=2:1 3+1=2:1 4+1=4:1 5+1=4:1 6+1=4:1",
        "0+1=4:0 1+1=2:1 2+1=2:1 3+1=2:1 4+1=2:1 5+1=4:1 6+1=4:1 7+1=4:1",
        "0+1=4:0 1+1=2:1 2+1=2:1 3+1=2:1 4+1=2:1 5+1=2:2 6+1=4:1 7+1=4:1 8+1=4:2"]),
    # nothing is kept wider, so the chunk behind a poor one is served better
    "without recent frames": (settings(sink_frames=0, recent_frames=0), [3, 3, 3, 3], [FIT, POOR, FIT, FIT], [
        "0+3=2:0",
        "0+3=2:0 3+3=2:0",
        "0+3=2:0 3+3=2:0 6+3=2:1",
        "0+3=2:0 3+3=2:0 6+3=2:1 9+3=2:1"]),
    "what is held plainly is trained on when it settles": (settings(sink_frames=0, recent_bits=16), [3, 3, 3, 3], [FIT] * 4, [
        "0+3=16:-",
        "0+3=2:0 3+3=16:-",
        "0+3=2:0 3+3=2:1 6+3=16:-",
        "0+3=2:0 3+3=2:1 6+3=2:1 9+3=16:-"]),
    "sinks wait for each other": (settings(LARGE), [1, 1, 1, 1], [FIT] * 4, [
        "0+1=8:-",
        "0+1=8:- 1+1=8:-",
        "0+1=4:0 1+1=4:0 2+1=4:0",
        "0+1=4:0 1+1=4:0 2+1=4:0 3+1=4:0"]),
    "a start image waits for the chunk behind it": (settings(LARGE), [1, 3, 3], [FIT] * 3, [
        "0+1=8:-",
        "0+1=4:0 1+2=4:0 3+1=4:0",
        "0+1=4:0 1+2=4:0 3+1=2:0 4+3=4:0"]),
    "recent frames wait until one must settle": (settings(LARGE, sink_frames=0), [1, 1, 1, 1, 1], [FIT] * 5, [
        "0+1=8:-",
        "0+1=8:- 1+1=8:-",
        "0+1=8:- 1+1=8:- 2+1=8:-",
        "0+1=2:0 1+1=4:0 2+1=4:0 3+1=4:0",
        "0+1=2:0 1+1=2:0 2+1=4:0 3+1=4:0 4+1=4:0"]),
    "nothing waits without something wider": (settings(LARGE, sink_frames=0, recent_frames=0), [1, 1], [FIT] * 2, [
        "0+1=2:0",
        "0+1=2:0 1+1=2:0"]),
    # 7 centroids, then 14 from the tokens of two frames; three frames are no twice as many
    "more tokens are worth a larger codebook": (settings(LARGE, sink_frames=1), [1, 1, 1], [FIT] * 3, [
        "0+1=4:0",
        "0+1=4:0 1+1=4:1",
        "0+1=4:0 1+1=4:1 2+1=4:1"]),
    "the released codec trains for every span": (replace(PRESETS["paper"].both(centroids=4)), [3, 3], [FIT] * 2, [
        "0+3=2:0",
        "0+3=2:0 3+3=2:1"]),
}


@pytest.mark.parametrize("name", TABLE)
def test_when_codebooks_are_trained(name, told):
    chosen, chunks, fits, expected = TABLE[name]
    assert planned(chosen, chunks, fits) == expected


@pytest.mark.parametrize("name", TABLE)
def test_the_cache_trains_as_the_forecast_says(name, told, monkeypatch):
    """Real spans with tensors, told how poorly they fit: the same spans in the same bits under the same codebooks, and the same bytes."""
    chosen, chunks, fits, expected = TABLE[name]
    cache = KVCache(chosen, layers=1, heads=1, head_dim=8, grid=(16, 16), rope=Rope, dtype=torch.float32)
    layer, told_of, order = cache.layers[0], {}, []
    monkeypatch.setattr("comfyui_qvg.qvg.codec.misfit.Misfit.value", property(lambda self: math.inf if told_of.get(id(self)) else 1.0))
    for number, (frames, poor) in enumerate(zip(chunks, fits)):
        first = layer.next_frame
        layer.append(*torch.randn(2, 1, frames * 256, 1, 8, generator=torch.Generator().manual_seed(number)), frames)
        for entry in layer.spans:
            for book in entry.books[:1]:
                if book is not None and id(book) not in order:
                    order.append(id(book))
            if entry.first >= first:
                told_of[id(entry._misfit)] = poor
        words = [word.split(":") for word in expected[number].split()]
        assert [f"{entry.first}+{entry.frames}={entry.key_bits}" for entry in layer.spans] == [word[0] for word in words]
        # numbers of codebooks differ where one was trained that no span uses; which spans share one does not
        groups = [[entry.first for entry in layer.spans if entry.books[0] is book] for book in {id(e.books[0]): e.books[0]
                  for e in layer.spans if e.books[0] is not None}.values()]
        numbers = sorted({word[1] for word in words} - {"-"})
        assert sorted(groups) == sorted([entry.first for entry, word in zip(layer.spans, words) if word[1] == number] for number in numbers)
    forecaster = PlannedLayer(chosen, GEOMETRY, Limits(), itemsize=4)
    for first, frames, poor in zip([0, *torch.tensor(chunks).cumsum(0).tolist()], chunks, fits):
        forecaster.append(first, frames)
        for span in forecaster.spans:
            if span.first >= first:
                span.poor = poor
    assert layer.nbytes == forecaster.nbytes()


def scene(frames, seed):
    """Tokens [2, 1, T, 1, 8] around 16 places that a scene keeps."""
    places = 4 * torch.randn(16, 8, generator=torch.Generator().manual_seed(seed))
    draw = torch.Generator().manual_seed(100 + seed)
    tokens = places[torch.randint(16, (2 * frames * 256,), generator=draw)] + 0.3 * torch.randn(2 * frames * 256, 8, generator=draw)
    return tokens.view(2, 1, frames * 256, 1, 8)


def error_of(chosen, pieces):
    """Relative squared error of every piece's keys as they are read at the end."""
    cache = KVCache(chosen, layers=1, heads=1, head_dim=8, grid=(16, 16), rope=Rope, dtype=torch.float32)
    layer = cache.layers[0]
    for piece in pieces:
        layer.append(*piece, piece.shape[2] // 256)
    values = torch.cat([span.decode(slice(None), cache.tables) for span in (entry.spans[1] for entry in layer.spans)])[:, 0]
    truth = torch.cat([piece[1, 0, :, 0] for piece in pieces])
    frames = (values - truth).square().sum(1).view(-1, 256).sum(1) / truth.square().sum(1).view(-1, 256).sum(1)
    return frames, layer


SHARED = replace(settings(TensorSettings(stages=1, centroids=16)), iterations=8)


@pytest.mark.parametrize(("name", "chunks"), [("a cut", (3, 3, 3, 3, 3, 3)), ("a cut, frame by frame", (1,) * 18)])
def test_what_follows_a_cut_is_coded_as_well_as_what_came_before(name, chunks, monkeypatch):
    """A codebook that is kept over a cut leaves many times the error; see also what a misfit is."""
    before, after = scene(9, seed=0), scene(9, seed=1)
    whole = torch.cat([before, after], dim=2)
    pieces = list(whole.split([256 * frames for frames in chunks], dim=2))
    mended, layer = error_of(SHARED, pieces)
    settled = slice(9, 15)
    assert layer.spans[-1]._misfit.value < codebook_lifetime.LARGEST_MISFIT
    monkeypatch.setattr(codebook_lifetime, "LARGEST_MISFIT", math.inf)
    kept, _ = error_of(replace(SHARED, codebook_frames=1000), pieces)
    assert mended[settled].mean() < 0.4 * kept[settled].mean()
    # what settled before the cut; a codebook that starts from one of another scene takes fewer steps than it needs
    assert mended[settled].mean() < 2.5 * mended[3:6].mean()


def test_a_misfit_is_one_on_the_tokens_of_the_training_and_grows_with_what_is_left():
    cache = KVCache(SHARED, layers=1, heads=1, head_dim=8, grid=(16, 16), rope=Rope, dtype=torch.float32)
    layer = cache.layers[0]
    layer.append(*scene(3, seed=0), 3)
    assert layer.spans[0]._misfit.value == pytest.approx(1.0, abs=0.05)
    layer.append(*scene(3, seed=1), 3)
    book, tokens = layer.spans[1].books[0], scene(3, seed=1)[0, 0]
    nearest = torch.cdist(tokens[:, 0], book.values(0)[0]).argmin(1)
    left = (tokens[:, 0] - book.values(0)[0][nearest]) / book.channel_scale[0].float()
    assert layer.spans[1]._misfit.value >= 0.9 * float(left.square().mean()) > 10


def test_the_worst_case_bounds_what_happens():
    """Random tokens, on which nothing fits well and nothing poorly."""
    for chunk, name in ((1, "balanced"), (3, "smallest"), (2, "quality")):
        chosen = replace(PRESETS[name], codebook_frames=1000)
        cache = KVCache(chosen, layers=1, heads=1, head_dim=8, grid=(16, 16), rope=Rope, dtype=torch.float32)
        for number in range(24 // chunk):
            cache.layers[0].append(*torch.randn(2, 1, chunk * 256, 1, 8, generator=torch.Generator().manual_seed(number)), chunk)
        usual, worst = (forecast(chosen, GEOMETRY, 24, chunk, itemsize=4, misfit=misfit) for misfit in (False, True))
        assert usual.stored_bytes <= cache.stats().stored_bytes <= worst.stored_bytes


def test_a_poor_fit_is_found_after_a_resume_too():
    """What decides is computed from stored bytes: a layer that was saved between a cut and the chunk behind it goes on alike."""
    pieces = [scene(3, seed=0), scene(3, seed=1), scene(3, seed=2), scene(3, seed=3)]
    whole = KVCache(SHARED, layers=1, heads=1, head_dim=8, grid=(16, 16), rope=Rope, dtype=torch.float32)
    for piece in pieces:
        whole.layers[0].append(*piece, 3)
    first, second = (KVCache(SHARED, layers=1, heads=1, head_dim=8, grid=(16, 16), rope=Rope, dtype=torch.float32) for _ in range(2))
    for piece in pieces[:2]:
        first.layers[0].append(*piece, 3)
    tensors = {}
    state = _layer_state(first.layers[0], "x", tensors)
    second.layers[0] = _restore_layer(second, 0, state, "x", {name: tensor.clone() for name, tensor in tensors.items()})
    for piece in pieces[2:]:
        second.layers[0].append(*piece, 3)
    assert len({id(entry.books[0]) for entry in second.layers[0].spans}) == 2
    for mine, theirs in zip(second.layers[0].spans, whole.layers[0].spans):
        assert (mine.first, mine.key_bits) == (theirs.first, theirs.key_bits)
        for a, b in zip(mine.spans, theirs.spans):
            assert torch.equal(a.decode(slice(None), whole.tables), b.decode(slice(None), whole.tables))


@pytest.mark.parametrize("misfit", [0.0, math.inf], ids=["none fits", "all fit"])
def test_a_pass_that_failed_leaves_no_codebook_behind(misfit, monkeypatch):
    """A chunk that is stored, taken back and stored again gives the spans, the bits and the codebooks that it gives at once.

    What older spans lost meanwhile does not come back, so codebooks that are trained on them may differ in their numbers.
    """
    monkeypatch.setattr(codebook_lifetime, "LARGEST_MISFIT", misfit)
    once, twice = (KVCache(replace(SHARED, codebook_frames=3), layers=1, heads=1, head_dim=8, grid=(16, 16), rope=Rope,
                           dtype=torch.float32).layers[0]
                   for _ in range(2))
    for number in range(5):
        piece = scene(3, seed=number)
        once.append(*piece, 3)
        twice.append(*piece, 3)
        twice.rewind(3 * number)
        assert twice.life.trained == (number > 0)
        twice.append(*piece, 3)
        assert torch.equal(once.generator.get_state(), twice.generator.get_state())
        if number < 2:
            assert all(torch.equal(a.spans[0].scales, b.spans[0].scales) for a, b in zip(once.spans, twice.spans))
        shared = [[[a.books[0] is b.books[0] for a in layer.spans] for b in layer.spans] for layer in (once, twice)]
        assert shared[0] == shared[1] and once.nbytes == twice.nbytes
        assert [(a.first, a.key_bits) for a in once.spans] == [(b.first, b.key_bits) for b in twice.spans]


def test_what_is_taken_back_further_goes_on_with_a_codebook_that_is_in_use():
    chosen = replace(SHARED, codebook_frames=3)
    layer = KVCache(chosen, layers=1, heads=1, head_dim=8, grid=(16, 16), rope=Rope, dtype=torch.float32).layers[0]
    for seed in range(4):
        layer.append(*scene(3, seed=seed), 3)
    layer.rewind(3)
    assert layer.life.trained and layer.sides[0].book is layer.spans[0].books[0] and layer.life.size == 16
    layer.rewind(0)
    assert not layer.life.trained and layer.sides[0].book is None and layer.nbytes == 0


def test_training_without_room_takes_fewer_rows_at_a_time(monkeypatch):
    """And finds the same; with no room for one row it says so."""
    x, room = torch.randn(80, 5, 16, generator=torch.Generator().manual_seed(1)), {}
    real = smoothing.kmeans

    def cramped(rows, *more):
        if len(rows) > room["rows"]:
            raise torch.OutOfMemoryError("no room")
        return real(rows, *more)

    def trained(rows):
        room["rows"] = rows
        return smoothing.train([x, 2 * x], 2, 2, 3, torch.Generator().manual_seed(0), [None, None])

    monkeypatch.setattr(smoothing, "kmeans", cramped)
    found = [trained(rows) for rows in (10, 4, 2)]
    for others in found[1:]:
        for mine, theirs in zip(found[0], others):
            assert all(torch.equal(getattr(mine, name), part) for name, part in vars(theirs).items())
    with pytest.raises(torch.OutOfMemoryError):
        trained(1)
