"""The plan's numbers against published arithmetic, and the command around it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from comfyui_qvg.qvg.cache.forecast import forecast
from comfyui_qvg.qvg.cache.geometry import Geometry
from comfyui_qvg.qvg.commands import cli
from comfyui_qvg.qvg.models import FAMILIES, Family
from comfyui_qvg.qvg.models.catalogue import MODELS
from comfyui_qvg.qvg.models.hunyuan_layers import HunyuanSizes
from comfyui_qvg.qvg.models.longcat import LongCat, LongCatSizes
from comfyui_qvg.qvg.models.wan import CausalWan, WanSizes
from comfyui_qvg.qvg.models.weights import WEIGHTS
from comfyui_qvg.qvg.models.worldplay_hunyuan import WorldPlayHunyuan
from comfyui_qvg.qvg.models.worldplay_wan import WorldWan, WorldWanSizes
from comfyui_qvg.qvg.report.plan import BESIDE_GIB, CARDS, brief, left_for_cache, longest, plan, predict, render_cards
from comfyui_qvg.qvg.settings import PRESETS
from comfyui_qvg.qvg.units import GIB
from comfyui_qvg.qvg.video.view_memory import WORLDPLAY_5B, WORLDPLAY_8B
from comfyui_qvg.qvg.video.world import MEMORIES
from comfyui_qvg.qvg.video.world_forecast import forecast_walk

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
    assert frames == 0 or forecast(settings, shape.geometry(), frames, misfit=True).peak_bytes <= limit
    assert limit < forecast(settings, shape.geometry(), frames + 3, misfit=True).peak_bytes


@pytest.mark.parametrize("model", ["self-forcing", "krea-14b", "hy-worldplay-5b"])
@pytest.mark.parametrize("preset", ["quality", "smallest"])
@pytest.mark.parametrize("gib", [0.3, 1, 4])
def test_longest_is_the_longest_in_pieces(model, preset, gib):
    """The workspace grows at first, and then no more."""
    shape, settings, limit = MODELS[model], PRESETS[preset], gib * GIB
    frames = longest(shape, settings, shape.geometry(), limit, memory="append")

    def peak(frames):
        return predict(shape, settings, shape.geometry(), frames, misfit=True, memory="append").peak_bytes

    assert frames == 0 or peak(frames) <= limit
    assert limit < peak(frames + shape.chunk_frames)


@pytest.mark.parametrize(("preset", "share"), [("balanced", 0.97), ("smallest", 0.96), ("tiny", 0.95)])
def test_in_pieces_the_peak_is_nearly_what_is_stored(preset, share):
    """At 180 frames and at any length."""
    for frames in (180, 720):
        row = plan("self-forcing", latent_frames=frames, preset=preset)
        assert row["workspace_bytes"] <= 96 * MIB
        assert row["stored_bytes"] + row["workspace_bytes"] == row["peak_bytes"]
        assert row["peak_ratio"] > share * row["stored_ratio"]
        assert row["workspace_bytes"] == plan("self-forcing", latent_frames=60, preset=preset)["workspace_bytes"]


@pytest.mark.parametrize("model", MODELS)
def test_the_workspace_of_every_model_in_pieces(model):
    """LongCat's and HY-WorldPlay's contexts are long spans, of which a few heads are decoded at a time."""
    shape = MODELS[model]
    for memory in MEMORIES if shape.context_frames else [""]:
        for frames in (shape.segment_frames or 40, 400):
            found = predict(shape, PRESETS["balanced"], shape.geometry(), frames, memory=memory or MEMORIES[0])
            assert 80 * MIB < found.workspace_bytes <= 96 * MIB


def test_with_a_window_any_length_fits():
    shape, settings = MODELS["self-forcing"], replace(PRESETS["balanced"], window_frames=12)
    assert longest(shape, settings, shape.geometry(), 2 * GIB, most=600) == 600
    assert longest(shape, settings, shape.geometry(), GIB // 8) == 0


NETWORKS = {
    "self-forcing": lambda: CausalWan(WanSizes(1536, 8960, 30, 4096)), "krea-14b": lambda: CausalWan(WanSizes(5120, 13824, 40, 4096)),
    "longcat": lambda: LongCat(LongCatSizes(dim=4096, head_dim=128, ffn_dim=11008, layers=48, text_dim=4096)),
    "hy-worldplay-5b": lambda: WorldWan(WorldWanSizes(dim=3072, ffn_dim=14336, layers=30, text_dim=4096)),
    "hy-worldplay-8b": lambda: WorldPlayHunyuan(HunyuanSizes(dim=2048, head_dim=128, ffn_dim=8192, layers=54))}


def network(model):
    with torch.device("meta"):
        return NETWORKS[model]()


@pytest.mark.parametrize("model", NETWORKS)
def test_parameters_are_those_of_the_network(model):
    assert MODELS[model].parameters == sum(tensor.numel() for tensor in network(model).parameters())
    assert left_for_cache(model, 80) == 80 - MODELS[model].weight_bytes() / GIB - BESIDE_GIB


# ggml's blocks: (numbers, bytes of the codes, bytes of the scales), as its format says
BLOCKS = {"Q8_0": (32, 32, 2), "Q6_K": (256, 192, 16 + 2), "Q5_K": (256, 160, 12 + 4), "Q4_K": (256, 128, 12 + 4),
          "Q3_K": (256, 96, 12 + 2)}
# the type of a block's matrices, of its value projections and of the feed-forward's second matrix
FILES = {"Q8_0": ("Q8_0",) * 3, "Q6_K": ("Q6_K",) * 3, "Q5_K_M": ("Q5_K", "Q6_K", "Q6_K"), "Q5_K_S": ("Q5_K",) * 3,
         "Q4_K_M": ("Q4_K", "Q6_K", "Q6_K"), "Q4_K_S": ("Q4_K", "Q4_K", "Q5_K"), "Q3_K_M": ("Q3_K", "Q4_K", "Q4_K"),
         "Q3_K_S": ("Q3_K",) * 3}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("model", NETWORKS)
def test_weights_of_every_type_counted_tensor_by_tensor(model, weights):
    """As a quantizer goes through a file: matrices of blocks in the type, everything else in 16 bits."""
    shape = MODELS[model]
    if weights in FILES and not shape.gguf:
        with pytest.raises(ValueError, match=f"cannot be {weights}; choose one of bf16, fp8"):
            shape.weight_bytes(weights)
        return
    whole = 0
    for name, tensor in network(model).named_parameters():
        matrix = tensor.ndim == 2 and name.startswith(("blocks.", "double_blocks.")) and ".modulation." not in name
        if not matrix or weights == "bf16":
            whole += 2 * tensor.numel()
        elif weights == "fp8":
            whole += tensor.numel()
        else:
            numbers, codes, scales = BLOCKS[FILES[weights][1 if ".v." in name else 2 if "ffn.2." in name else 0]]
            whole += tensor.numel() // numbers * (codes + scales)
    assert shape.weight_bytes(weights) == whole


def test_a_14b_model_on_24_gib(capsys):
    """In bf16 it is refused with what would fit; in fp8 and GGUF types it is answered; no length is needed."""
    assert cli.main(["plan", "--model", "krea-14b", "--card", "24"]) == 2
    message = capsys.readouterr().err
    left = left_for_cache("krea-14b", 24, "fp8")
    assert 8 < left < 9 and f"fp8 would leave {left:.1f} GiB" in message and "leaves nothing of a card of 24 GiB" in message
    longest_of = []
    for weights in ("fp8", "q6_k", "Q4_K_M"):
        assert cli.main(["plan", "--model", "krea-14b", "--weights", weights, "--card", "24", "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["weight_bytes"] == MODELS["krea-14b"].weight_bytes(weights) and 29 < result["seconds"] < 32
        longest_of.append(result["presets"]["balanced"]["longest_latent_frames"])
        limit = int(left_for_cache("krea-14b", 24, weights) * GIB)
        assert result["presets"]["balanced"]["fits"] == (result["presets"]["balanced"]["worst_peak_bytes"] <= limit)
    assert 0 < longest_of[0] < longest_of[1] < longest_of[2]
    assert cli.main(["plan", "--model", "krea-14b", "--weights", "fp8", "--card", "24"]) == 0
    table = capsys.readouterr().out
    assert f"within {left:.1f} GiB" in table and "of weights in fp8" in table
    assert f"({left:.1f} GiB are left for the cache" in " ".join((ROOT / "README.md").read_text().split())
    assert f"in fp8 leaves {left:.1f} GiB of 24" in (ROOT / "web" / "docs" / "QVGPlanMemory.md").read_text()


def test_cards_with_smaller_weights(capsys):
    assert cli.main(["plan", "--model", "krea-14b", "--weights", "Q4_K_M", "--cards"]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert f"| 16 GB | {left_for_cache('krea-14b', 16, 'Q4_K_M'):.1f} GiB |" in rows[2] and "Smaller weights" not in rows[2]
    assert "Smaller weights" in rows[0]


@pytest.mark.parametrize(("options", "words"), [
    (["--weights", "fp9", "--card", "24"], "There is no weight type 'fp9'; choose one of bf16, fp8, Q8_0"),
    (["--weights", "fp8"], "give --card or --cards"), (["--weights", "fp8", "--vram", "8"], "give --card or --cards"),
    (["--card", "4"], "no smaller weights would")])
def test_weights_that_cannot_be(capsys, options, words):
    assert cli.main(["plan", "--model", "krea-14b", *options]) == 2
    assert words in capsys.readouterr().err


def test_a_model_that_rebuilds_its_cache_fits_at_any_length(capsys):
    assert cli.main(["plan", "--model", "longcat", "--weights", "fp8", "--card", "24"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.endswith("fits")] and not [line for line in lines if "fits; at most" in line]
    assert cli.main(["plan", "--model", "longcat", "--weights", "fp8", "--cards"]) == 0
    rows = {row.split()[1]: row for row in capsys.readouterr().out.splitlines()[2:]}
    assert "| 0 s | any | any | any | any | Quality |" in rows["24"] and "| any | any | any | any | any | any |" in rows["80"]


def test_the_table_of_cards_is_the_plan(capsys):
    """To write it anew: qvg plan --model self-forcing --cards"""
    assert cli.main(["plan", "--model", "self-forcing", "--cards"]) == 0
    table = capsys.readouterr().out.strip()
    assert table in (ROOT / "README.md").read_text()
    beside = MODELS["self-forcing"].weight_bytes() / GIB + BESIDE_GIB
    assert f"less about {beside:.1f} GiB" in (ROOT / "web" / "docs" / "QVGPlanMemory.md").read_text()
    assert [line.split()[1] for line in table.splitlines()[2:]] == [str(card) for card in CARDS]


def test_longer_on_larger_cards():
    rows = [[cell.strip(" s") for cell in line.split("|")[3:8]] for line in render_cards("self-forcing").splitlines()[2:]]
    for column in zip(*rows):
        assert list(map(int, column)) == sorted(map(int, column))
    for row in rows:
        assert int(row[0]) < int(row[1]) < int(row[2]) < int(row[3]) < int(row[4])
    assert "smaller weights" in render_cards("krea-14b").lower()


def test_a_card_is_what_its_weights_leave(capsys):
    assert cli.main(["plan", "--model", "self-forcing", "--seconds", "30", "--card", "12"]) == 0
    assert f"within {left_for_cache('self-forcing', 12):.1f} GiB" in capsys.readouterr().out
    assert cli.main(["plan", "--model", "self-forcing", "--seconds", "30", "--card", "4"]) == 2
    assert "leaves nothing of a card of 4 GiB" in capsys.readouterr().err


def test_a_card_for_a_model_of_unknown_weights(capsys):
    FAMILIES.register(Family(name="unknown", title="Unknown", shapes={"unknown": replace(MODELS["longcat"], parameters=0)}))
    try:
        assert cli.main(["plan", "--model", "unknown", "--seconds", "30", "--card", "24"]) == 2
    finally:
        FAMILIES.remove("unknown")
    assert "The weights of 'unknown' cannot be counted" in capsys.readouterr().err


def test_offloaded(capsys):
    """The device then holds a fraction, and the table says what the host holds."""
    rows = [plan("self-forcing", latent_frames=180, preset="balanced", offload=offload) for offload in (False, True)]
    assert rows[1]["peak_bytes"] < 0.25 * rows[0]["peak_bytes"] and rows[1]["stored_bytes"] == rows[0]["stored_bytes"]
    assert rows[0]["host_bytes"] == 0 and rows[1]["host_bytes"] > 0.9 * rows[1]["stored_bytes"]
    assert cli.main(["plan", "--model", "self-forcing", "--latent-frames", "60", "--offload"]) == 0
    assert "on host" in capsys.readouterr().out


def test_brief_has_the_same_figures():
    found = plan("self-forcing", seconds=30, vram_gib=6)
    lines = brief(found, 6).splitlines()
    assert len(lines) == len(PRESETS)
    row = found["presets"]["balanced"]
    (line,) = (line for line in lines if line.startswith("Balanced"))
    seconds = MODELS["self-forcing"].seconds(row["longest_latent_frames"])
    assert row["worst_peak_bytes"] > 1.03 * row["peak_bytes"]
    assert line == (f"Balanced: peak {row['peak_bytes'] / GIB:.1f} GiB (at worst {row['worst_peak_bytes'] / GIB:.1f}), "
                    f"{row['peak_ratio']:.1f}x less, fits; longest {seconds:.0f} s.")
    assert "does not fit" in lines[1]


def test_bad_length(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", "--model", "longcat", "--latent-frames", "-3"])
    assert ended.value.code == 2 and "'-3' is not a whole number from 1" in capsys.readouterr().err


def test_info(capsys):
    assert cli.main(["info"]) == 0
    assert "torch" in capsys.readouterr().out


@pytest.mark.parametrize("preset", PRESETS)
def test_the_worst_case_is_no_better_than_the_usual_one(preset):
    """Within a window, too, from which bases are evicted with the spans that they serve."""
    geometry = Geometry(30, 12, 128, (30, 52), buffers=2)
    for window in (0, 3, 6, 9):
        settings = replace(PRESETS[preset], window_frames=window)
        usual, worst = (predict(MODELS["self-forcing"], settings, geometry, 60, misfit=misfit).peak_bytes for misfit in (False, True))
        assert usual <= worst


@pytest.mark.parametrize(("model", "views"), [("hy-worldplay-5b", WORLDPLAY_5B), ("hy-worldplay-8b", WORLDPLAY_8B)])
@pytest.mark.parametrize("memory", MEMORIES)
def test_the_table_of_walks_is_the_forecast(model, views, memory):
    found = [forecast_walk(PRESETS[name], MODELS[model].geometry(), memory=memory, views=views, frames=128)
             for name in ("off", "quality", "balanced", "smallest", "tiny")]
    cells = [found[0].bf16_bytes, *(one.peak_bytes for one in found[1:])]
    width, height = MODELS[model].size
    row = [f"{model[-2:].upper()}, {width} x {height}", memory, *(f"{cell / GIB:.1f} GiB" for cell in cells)]
    assert f"| {' | '.join(row)} |" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("model", MODELS)
def test_every_model_is_planned_for_two_gpus(model):
    one, two = (plan(model, latent_frames=60, gpus=gpus)["presets"]["balanced"] for gpus in (1, 2))
    assert two["stored_bytes"] == pytest.approx(one["stored_bytes"] / 2, rel=0.01)
    assert two["peak_bytes"] < one["peak_bytes"]


def test_several_gpus_share_the_heads(capsys):
    one, two = (plan("self-forcing", seconds=30, gpus=gpus) for gpus in (1, 2))
    for name, row in two["presets"].items():
        assert row["bf16_bytes"] * 2 == one["presets"][name]["bf16_bytes"]
        # bases and scales are of single heads, too
        assert row["stored_bytes"] == pytest.approx(one["presets"][name]["stored_bytes"] / 2, rel=1e-3)
    assert cli.main(["plan", "--model", "longcat", "--gpus", "4", "--preset", "balanced"]) == 0
    assert "on each of 4 GPUs" in capsys.readouterr().out
    for gpus, sentence in ((5, "5 ranks do not divide the 12 heads"), (12, "of 52 x 30 tokens cannot be divided evenly among 12 ranks")):
        with pytest.raises(ValueError, match=sentence):
            plan("self-forcing", seconds=30, gpus=gpus)
    assert cli.main(["plan", "--model", "self-forcing", "--cards", "--gpus", "2"]) == 2
