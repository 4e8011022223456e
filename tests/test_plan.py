"""The plan's numbers against published arithmetic, and the command around it."""

import json

import pytest

from comfyui_qvg.qvg import cli
from comfyui_qvg.qvg.budget import GIB, forecast
from comfyui_qvg.qvg.models.catalogue import MODELS
from comfyui_qvg.qvg.plan import longest, plan
from comfyui_qvg.qvg.settings import PRESETS

MIB = 1 << 20


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


def test_longest_is_the_longest():
    shape, settings, limit = MODELS["self-forcing"], PRESETS["balanced"], 4 * GIB
    frames = longest(shape, settings, shape.geometry(), limit)
    assert forecast(settings, shape.geometry(), frames).peak_bytes <= limit < forecast(settings, shape.geometry(), frames + 3).peak_bytes


def test_offloaded(capsys):
    """The device then holds a fraction, and the table says what the host holds."""
    rows = [plan("self-forcing", latent_frames=180, preset="balanced", offload=offload) for offload in (False, True)]
    assert rows[1]["peak_bytes"] < 0.25 * rows[0]["peak_bytes"] and rows[1]["stored_bytes"] == rows[0]["stored_bytes"]
    assert rows[0]["host_bytes"] == 0 and rows[1]["host_bytes"] > 0.9 * rows[1]["stored_bytes"]
    assert cli.main(["plan", "--model", "self-forcing", "--latent-frames", "60", "--offload"]) == 0
    assert "on host" in capsys.readouterr().out


def test_bad_length(capsys):
    assert cli.main(["plan", "--model", "longcat", "--latent-frames", "-3"]) == 2
    assert "positive length" in capsys.readouterr().err


def test_info(capsys):
    assert cli.main(["info"]) == 0
    assert "torch" in capsys.readouterr().out
