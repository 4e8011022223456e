"""The chart draws every history that a run can leave, and shows what it should."""

import json
from types import SimpleNamespace

import pytest

from comfyui_qvg.qvg.report.chart import BF16, COLOURS, LIMIT, PALETTE, PEAK, PSNR, SSIM, Chart, describe, describe_comparison, round_steps
from comfyui_qvg.qvg.report.draw import BACKGROUND, draw_chart, draw_comparison
from comfyui_qvg.qvg.settings import CODECS
from comfyui_qvg.qvg.units import format_bytes


def stats(frames, layers=4, codebooks=500, workspace=3000, bits=None):
    by_bits = {2: frames * 800, 4: frames * 300} if bits is None else bits
    stored = sum(by_bits.values()) + codebooks
    return SimpleNamespace(
        frames=frames, stored_bytes=stored, workspace_bytes=workspace, peak_bytes=stored + workspace, bf16_bytes=frames * 8000,
        by_bits=by_bits, by_kind={"codebooks": codebooks},
        by_layer=(stored // layers,) * layers, stored_ratio=7.0, peak_ratio=6.0, bits_per_element=2.3)


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
    image = draw_chart(describe([stats(frames) for frames in range(3, 31, 3)]))
    assert image.size == (960, 540) and image.mode == "RGB"
    for colour in (BACKGROUND, COLOURS["2"], COLOURS["4"], COLOURS["workspace"], BF16, PEAK):
        assert has(image, colour)
    assert not has(image, COLOURS["16"]) and not has(image, LIMIT)
    assert has(draw_chart(describe([stats(9)], budget_bytes=20_000), notes="9 frames"), LIMIT)


def test_areas_are_stacked_from_codebooks_to_workspace():
    chart = describe([stats(3), stats(6, bits={2: 900, 16: 60})], total_frames=12)
    assert [(area["id"], area["name"]) for area in chart["areas"]] == [
        ("codebooks", "codebooks and bases"), ("2", "2-bit elements"), ("4", "4-bit elements"), ("16", "16-bit elements"),
        ("workspace", "workspace")]
    assert [area["points"] for area in chart["areas"]] == [
        [[0, 0, 0], [3, 0, 500], [6, 0, 500]], [[0, 0, 0], [3, 500, 2900], [6, 500, 1400]], [[0, 0, 0], [3, 2900, 3800], [6, 1400, 1400]],
        [[3, 3800, 3800], [6, 1400, 1460]], [[0, 0, 0], [3, 3800, 6800], [6, 1460, 4460]]]
    assert chart["frames"]["end"] == 12 and chart["bytes"]["ticks"]["decimal"][1] == [10_000, "10 kB"]


def test_parts_with_names_of_their_own():
    """A codec whose spans share something else than codebooks, and hold bits that no colour is listed for."""
    part = stats(3, codebooks=0, bits={5: 700})
    part.by_kind, part.stored_bytes = {"codes": 700, "basis": 100}, 800
    chart = describe([part])
    names = [(area["name"], area["key"]) for area in chart["areas"]]
    assert names == [("basis", ""), ("5-bit elements", "elements"), ("workspace", "workspace")]
    assert {area["colour"] for area in chart["areas"][:2]} <= set(PALETTE) and has(draw_chart(chart), chart["areas"][0]["colour"])


def test_fractions_of_a_bit():
    """Areas by rising bits, not by their texts, each with its own colour, in the browser's JSON as well."""
    chart = json.loads(json.dumps(describe([stats(3, bits={16: 60, 1: 700, 0.75: 500, 2.5: 80, 1.25: 10, 0.5: 900, 10: 5})])))
    bits = ["0.5", "0.75", "1", "1.25", "2.5", "10", "16"]
    assert [area["id"] for area in chart["areas"]] == ["codebooks", *bits, "workspace"]
    assert [(area["name"], area["key"], area["values"]) for area in chart["areas"][1:-1]] == [
        (f"{count}-bit elements", "elements", {"bits": count}) for count in bits]
    colours = [area["colour"] for area in chart["areas"]]
    assert len(set(colours)) == len(colours) and all(has(draw_chart(chart | {"summary": "x", "layers": []}), colours[at]) for at in (1, 2))


def test_every_width_of_the_codecs_has_a_colour():
    assert {f"{width:g}" for name in ("transform", "qvg", "paper", "plain") for width in CODECS[name].widths} <= COLOURS.keys()
    assert len(set(COLOURS.values())) == len(COLOURS)


def test_codebooks_keep_their_name():
    """Also where scales have as many bytes by coincidence."""
    part = stats(3)
    part.by_kind = {"planes": 2800, "scales": 500, "codebooks": 500}
    assert [area["id"] for area in describe([part])["areas"]] == ["codebooks", "2", "4", "workspace"]


@pytest.mark.parametrize("step", [1, 2, 5])
def test_a_chart_in_pieces_is_the_whole_chart(step):
    """As the browser joins them: web/js/chart.js, continued()."""
    history = [stats(frames, bits={2: frames * 100} | ({16: 40} if frames > 12 else {})) for frames in range(3, 31, 3)]
    forecast = SimpleNamespace(stored_bytes=20_000, peak_bytes=24_000, bf16_bytes=300_000)
    chart, joined, sent = Chart(36, forecast, 20_000), {}, 0
    for number, moment in enumerate(history, 1):
        chart.add(moment)
        if number % step == 0:
            piece = json.loads(json.dumps(chart.describe(sent)))
            assert piece["since"] == sent
            sent = number
            for series in piece["areas"] + piece["lines"]:
                before = [] if series["whole"] else joined.get(series["id"], [])
                joined[series["id"]] = before + series["points"]
    whole = describe(history, forecast=forecast, total_frames=36, budget_bytes=20_000)
    assert joined == {series["id"]: series["points"] for series in whole["areas"] + whole["lines"]}


def test_forecast_changes_the_picture():
    history = [stats(3), stats(6)]
    forecast = SimpleNamespace(stored_bytes=20_000, peak_bytes=24_000, bf16_bytes=160_000)
    drawn = [draw_chart(describe(history, forecast=ahead, total_frames=20)).tobytes() for ahead in (None, forecast)]
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("history", [
    [], [stats(0, bits={})], [stats(1)], [stats(3), stats(3)], [stats(9), stats(12, bits={1: 10})], [stats(5, layers=48, bits={32: 9})]])
@pytest.mark.parametrize("size", [(960, 540), (320, 180)])
def test_odd_histories(history, size):
    assert draw_chart(describe(history), size=size).size == size


def compared(psnr, ssim):
    return draw_comparison(describe_comparison(psnr, ssim), title="two")


@pytest.mark.parametrize("values", [[100.0], [30.0, 30.0], [30.0, 28.0, 31.0, 12.0]])
def test_comparison_draws_both_lines(values):
    image = compared(values, [1 - 0.01 * number for number in range(len(values))])
    flat = compared([values[0]] * len(values), [1.0] * len(values))
    assert image.size == (960, 540) and has(flat, PSNR) and has(flat, SSIM)
    assert len(values) == 1 or image.tobytes() != flat.tobytes()
