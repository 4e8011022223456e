"""The plan's numbers against published arithmetic, and the command around it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from comfyui_qvg.qvg import cli
from comfyui_qvg.qvg.budget import GIB, forecast
from comfyui_qvg.qvg.models.catalogue import MODELS
from comfyui_qvg.qvg.models.wan import CausalWan, WanSizes
from comfyui_qvg.qvg.plan import BESIDE_GIB, CARDS, brief, longest, plan, render_cards, room_on
from comfyui_qvg.qvg.settings import PRESETS

MIB = 1 << 20
ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(("model", "frames", "mib"), [
    ("self-forcing", 180, 49359.375), ("longcat", 19, 22230.0), ("hy-worldplay-5b", 48, 14850.0), ("hy-worldplay-8b", 20, 13162.5),
    ("krea-14b", 21, 25593.75)])
def test_bf16_bytes(model, frames, mib):
    assert MODELS[model].geometry().bf16_bytes(frames) == mib * MIB


def test_json(capsys):
    assert cli.main(["plan", "--model", "self-forcing", "--seconds", "30", "--preset", "balanced", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    for name in ("bf16_bytes", "stored_bytes", "peak_bytes"):
        assert isinstance(result[name], int)
    assert result["peak_ratio"] == pytest.approx(result["bf16_bytes"] / result["peak_bytes"])


def test_table_names_every_preset(capsys):
    assert cli.main(["plan", "--model", "longcat", "--latent-frames", "19", "--vram", "12"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in PRESETS)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("gib", [0.1, 1, 4, 11.4])
def test_longest_is_the_longest(preset, gib):
    shape, settings, limit = MODELS["self-forcing"], PRESETS[preset], gib * GIB
    frames = longest(shape, settings, shape.geometry(), limit)
    assert frames == 0 or forecast(settings, shape.geometry(), frames).peak_bytes <= limit
    assert limit < forecast(settings, shape.geometry(), frames + 3).peak_bytes


def test_with_a_window_any_length_fits():
    shape, settings = MODELS["self-forcing"], replace(PRESETS["balanced"], window_frames=12)
    assert longest(shape, settings, shape.geometry(), 2 * GIB, most=600) == 600
    assert longest(shape, settings, shape.geometry(), GIB // 8) == 0


@pytest.mark.parametrize(("model", "sizes"), [
    ("self-forcing", WanSizes(1536, 8960, 30, 4096)), ("krea-14b", WanSizes(5120, 13824, 40, 4096))])
def test_parameters_are_those_of_the_network(model, sizes):
    with torch.device("meta"):
        network = CausalWan(sizes)
    assert MODELS[model].parameters == sum(tensor.numel() for tensor in network.parameters())
    assert room_on(model, 80) == 80 - MODELS[model].weight_bytes / GIB - BESIDE_GIB


def test_the_table_of_cards_is_the_plan(capsys):
    """To write it anew: qvg plan --model self-forcing --cards"""
    assert cli.main(["plan", "--model", "self-forcing", "--cards"]) == 0
    table = capsys.readouterr().out.strip()
    assert table in (ROOT / "README.md").read_text()
    beside = MODELS["self-forcing"].weight_bytes / GIB + BESIDE_GIB
    assert f"less about {beside:.1f} GiB" in (ROOT / "web" / "docs" / "QVGPlanMemory.md").read_text()
    assert [line.split()[1] for line in table.splitlines()[2:]] == [str(card) for card in CARDS]


def test_longer_on_larger_cards():
    rows = [[cell.strip(" s") for cell in line.split("|")[3:7]] for line in render_cards("self-forcing").splitlines()[2:]]
    for column in zip(*rows):
        assert list(map(int, column)) == sorted(map(int, column))
    for row in rows:
        assert int(row[0]) < int(row[1]) < int(row[2]) < int(row[3])
    assert "smaller weights" in render_cards("krea-14b").lower()


def test_a_card_is_what_its_weights_leave(capsys):
    assert cli.main(["plan", "--model", "self-forcing", "--seconds", "30", "--card", "12"]) == 0
    assert f"within {room_on('self-forcing', 12):.1f} GiB" in capsys.readouterr().out
    assert cli.main(["plan", "--model", "self-forcing", "--seconds", "30", "--card", "4"]) == 2
    assert "leave nothing of a card of 4 GiB" in capsys.readouterr().err
    assert cli.main(["plan", "--model", "longcat", "--seconds", "30", "--card", "24"]) == 2
    assert "cannot be counted" in capsys.readouterr().err


def test_offloaded(capsys):
    """The device then holds a fraction, and the table says what the host holds."""
    rows = [plan("self-forcing", latent_frames=180, preset="balanced", offload=offload) for offload in (False, True)]
    assert rows[1]["peak_bytes"] < 0.25 * rows[0]["peak_bytes"] and rows[1]["stored_bytes"] == rows[0]["stored_bytes"]
    assert rows[0]["host_bytes"] == 0 and rows[1]["host_bytes"] > 0.9 * rows[1]["stored_bytes"]
    assert cli.main(["plan", "--model", "self-forcing", "--latent-frames", "60", "--offload"]) == 0
    assert "on host" in capsys.readouterr().out


def test_brief_has_the_same_figures():
    found = plan("self-forcing", seconds=30, vram_gib=7)
    lines = brief(found, 7).splitlines()
    assert len(lines) == len(PRESETS)
    row = found["presets"]["balanced"]
    (line,) = (line for line in lines if line.startswith("Balanced"))
    seconds = MODELS["self-forcing"].seconds(row["longest_latent_frames"])
    assert line == (f"Balanced: peak {row['peak_bytes'] / GIB:.1f} GiB, {row['peak_ratio']:.1f}x less, fits; "
                    f"longest {seconds:.0f} s.")
    assert "does not fit" in lines[1]


def test_bad_length(capsys):
    assert cli.main(["plan", "--model", "longcat", "--latent-frames", "-3"]) == 2
    assert "positive length" in capsys.readouterr().err


def test_info(capsys):
    assert cli.main(["info"]) == 0
    assert "torch" in capsys.readouterr().out
