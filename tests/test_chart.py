"""The chart draws every history that a run can leave, and shows what it should."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from comfyui_qvg.qvg.report.chart import BACKGROUND, BF16, BUDGET, KINDS, PEAK, PSNR, SSIM, draw_chart, draw_comparison, round_steps
from comfyui_qvg.qvg.units import format_bytes


def stats(frames, layers=4, codebooks=500, workspace=3000, bits=None):
    by_bits = {2: frames * 800, 4: frames * 300} if bits is None else bits
    stored = sum(by_bits.values()) + codebooks
    return SimpleNamespace(
        frames=frames, stored_bytes=stored, workspace_bytes=workspace, peak_bytes=stored + workspace, bf16_bytes=frames * 8000,
        by_bits=by_bits, by_kind={"codebooks": codebooks},
        by_layer=(stored // layers,) * layers, ratio=7.0, peak_ratio=6.0, bits_per_element=2.3)


def has(image, colour):
    """Whether some pixel is exactly of this colour; reducing leaves the inside of areas and thick lines as drawn."""
    wanted = tuple(int(colour[i:i + 2], 16) for i in (1, 3, 5))
    return any(found == wanted for _, found in image.getcolors(1 << 20))


@pytest.mark.parametrize(("count", "text"), [
    (0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (48.2 * 2**30, "48.2 GiB"), (5 * 2**50, "5120.0 TiB")])
def test_bytes_are_named(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize(("most", "count", "base", "steps"), [
    (48.2 * 2**30, 5, 1024, [0, 10 * 2**30, 20 * 2**30, 30 * 2**30, 40 * 2**30]), (900, 3, 1024, [0, 500]), (45, 5, 1, [0, 10, 20, 30, 40]),
    (1, 5, 1, [0, 1]), (3 * 1024, 3, 1024, [0, 1024, 2048, 3072])])
def test_axes_have_round_steps(most, count, base, steps):
    assert round_steps(most, count, base) == steps


def test_precisions_peak_and_bf16_are_drawn():
    image = draw_chart([stats(frames) for frames in range(3, 31, 3)])
    assert image.size == (960, 540) and image.mode == "RGB"
    for colour in (BACKGROUND, KINDS[2], KINDS[4], KINDS["workspace"], BF16, PEAK):
        assert has(image, colour)
    assert not has(image, KINDS[16]) and not has(image, BUDGET)
    assert has(draw_chart([stats(9)], budget_bytes=20_000, notes="9 frames"), BUDGET)


def test_the_widget_has_the_same_colours():
    script = (Path(__file__).resolve().parents[1] / "web" / "js" / "chart.js").read_text().partition("COLOURS = {")[2].partition("}")[0]
    assert {int(name) if name.isdigit() else name: colour for name, colour in re.findall(r'(\w+): "(#\w+)"', script)} == KINDS


def test_forecast_changes_the_picture():
    history = [stats(3), stats(6)]
    forecast = SimpleNamespace(stored_bytes=20_000, peak_bytes=24_000, bf16_bytes=160_000)
    assert draw_chart(history, forecast=forecast, total_frames=20).tobytes() != draw_chart(history).tobytes()


@pytest.mark.parametrize("history", [
    [], [stats(0, bits={})], [stats(1)], [stats(3), stats(3)], [stats(9), stats(12, bits={1: 10})], [stats(5, layers=48, bits={32: 9})]])
@pytest.mark.parametrize("size", [(960, 540), (320, 180)])
def test_odd_histories(history, size):
    assert draw_chart(history, size=size).size == size


@pytest.mark.parametrize("values", [[100.0], [30.0, 30.0], [30.0, 28.0, 31.0, 12.0]])
def test_comparison_draws_both_lines(values):
    image = draw_comparison(values, [1 - 0.01 * number for number in range(len(values))], title="two")
    flat = draw_comparison([values[0]] * len(values), [1.0] * len(values), title="two")
    assert image.size == (960, 540) and has(flat, PSNR) and has(flat, SSIM)
    assert len(values) == 1 or image.tobytes() != flat.tobytes()
