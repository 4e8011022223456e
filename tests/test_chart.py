"""The chart draws every history that a run can leave, and shows what it should."""

from types import SimpleNamespace

import pytest

from comfyui_qvg.qvg.chart import BACKGROUND, BF16, KINDS, PEAK, draw_chart, draw_comparison, format_bytes


def stats(frames, layers=4, **kinds):
    kinds = kinds or {"planes": frames * 1000, "scales": frames * 60, "codebooks": 500}
    stored = sum(kinds.values())
    return SimpleNamespace(
        frames=frames, stored_bytes=stored, workspace_bytes=300, peak_bytes=stored + 300, bf16_bytes=frames * 8000, by_kind=kinds,
        by_layer=(stored // layers,) * layers, ratio=7.0, peak_ratio=6.0, bits_per_number=2.3)


def has(image, colour):
    """Whether some pixel is exactly of this colour; reducing leaves the inside of areas and thick lines as drawn."""
    wanted = tuple(int(colour[i:i + 2], 16) for i in (1, 3, 5))
    return any(found == wanted for _, found in image.getcolors(1 << 20))


@pytest.mark.parametrize(("count", "text"), [
    (0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (48.2 * 2**30, "48.2 GiB"), (5 * 2**50, "5120.0 TiB")])
def test_bytes_are_named(count, text):
    assert format_bytes(count) == text


def test_kinds_peak_and_bf16_are_drawn():
    image = draw_chart([stats(frames) for frames in range(3, 31, 3)])
    assert image.size == (960, 540) and image.mode == "RGB"
    for colour in (BACKGROUND, KINDS["planes"], BF16, PEAK):
        assert has(image, colour)
    assert not has(image, KINDS["plain"])


def test_forecast_changes_the_picture():
    history = [stats(3), stats(6)]
    forecast = SimpleNamespace(stored_bytes=20_000, peak_bytes=24_000, bf16_bytes=160_000)
    assert draw_chart(history, forecast=forecast, total_frames=20).tobytes() != draw_chart(history).tobytes()


@pytest.mark.parametrize("history", [
    [], [stats(0, planes=0)], [stats(1)], [stats(3), stats(3)], [stats(9), stats(12, planes=10)], [stats(5, layers=48, plain=9)]])
@pytest.mark.parametrize("size", [(960, 540), (320, 180)])
def test_odd_histories(history, size):
    assert draw_chart(history, size=size).size == size


@pytest.mark.parametrize("values", [[100.0], [30.0, 30.0], [30.0, 28.0, 31.0, 12.0]])
def test_comparison_draws_both_lines(values):
    image = draw_comparison(values, [1 - 0.01 * number for number in range(len(values))], title="two")
    flat = draw_comparison([values[0]] * len(values), [1.0] * len(values), title="two")
    assert image.size == (960, 540) and has(flat, KINDS["planes"]) and has(flat, KINDS["scales"])
    assert len(values) == 1 or image.tobytes() != flat.tobytes()
