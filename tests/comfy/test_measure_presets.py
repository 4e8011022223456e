"""Measure Presets (QVG) in the real ComfyUI, on the tiny model and on a tiny random LongCat-Video."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import longcat_graphs
from comfy_client import ComfyError, Graph
from comfyui_qvg.qvg.commands.cli import main
from comfyui_qvg.qvg.demo import NETWORK_FILE, NETWORK_PATH, PROMPTS, embed_prompt
from comfyui_qvg.qvg.settings import PRESETS

SIZE = {"width": 96, "height": 64}


@pytest.fixture(scope="module", autouse=True)
def files(comfy_server, tiny_model):
    longcat_graphs.write_files(comfy_server)


def build(loader="UNETLoader", file=NETWORK_FILE, own=None, negative=False, sigmas=None, **inputs):
    graph = Graph()
    name = "unet_name" if loader == "UNETLoader" else "model_name"
    model = graph.add("load", loader, **{name: file, "weight_dtype": "default"})
    values = SIZE | {"latent_frames": 9, "presets": "Balanced, smallest", "seed": 0, "cfg": 1.0} | inputs
    if own:
        values["settings"] = graph.add("settings", "QVGSettings", preset="Balanced", **own)
    if negative:
        values["negative"] = graph.add("negative", "QVGDemoPrompt", text=PROMPTS[5])
    if sigmas:
        values["sigmas"] = graph.add("sigmas", "ManualSigmas", sigmas=sigmas)
    graph.add("measure", "QVGMeasurePresets", model=model, positive=graph.add("prompt", "QVGDemoPrompt", text=PROMPTS[0]), **values)
    graph.add("chart", "SaveImage", images=["measure", 0], filename_prefix="chart")
    for slot, output in enumerate(("table", "report"), 1):
        graph.add(output, "PreviewAny", source=["measure", slot])
    return graph


def measured(comfy, **inputs):
    """The report and all outputs."""
    outputs = comfy.run(build(**inputs))
    return json.loads(outputs["report"]["text"][0]), outputs


def test_presets_of_a_causal_model(comfy, tmp_path):
    """Chart, table, JSON and its file, as `qvg bench quality --checkpoint` measures on the same file with the same noise."""
    report, outputs = measured(comfy, own={"key_bits": "1"}, filename_prefix="measured/causal")
    rows = {row["method"]: row for row in report["rows"]}
    assert list(rows) == ["exact again", "1e-3 noise", "balanced", "smallest", "settings"]
    assert rows["settings"]["settings"]["key"]["bits"] == 1 and report["chunks"] == [3, 3, 3]
    assert {"device", "torch", "comfyui"} <= set(report["environment"])
    (file,) = report["checkpoint"]["files"]
    assert file["file"] == NETWORK_FILE and len(file["sha256"]) == 64
    assert Image.open(comfy.output_path(outputs["chart"]["images"][0])).size == (1100, 720)
    assert outputs["table"]["text"][0].count("\n") == 6 and "| smallest |" in outputs["table"]["text"][0]
    assert json.loads((comfy.output / "measured" / "causal_00001_.json").read_text()) == report
    text = comfy.wait_for("executed", lambda data: data["node"] == "measure")["output"]["qvg_text"][0]
    assert text.startswith("balanced: ") and text.endswith("causal_00001_.json")
    order = [rows[name]["latent_db"]["later"][0] for name in ("exact again", "1e-3 noise", "balanced", "smallest")]
    assert order == sorted(order, reverse=True) and rows["balanced"]["seconds_a_chunk"] > 0

    if not NETWORK_PATH.is_file():
        return
    save_file({"positive": embed_prompt(PROMPTS[0])}, tmp_path / "prompt.safetensors")
    places = ["--checkpoint", str(NETWORK_PATH), "--embeddings", str(tmp_path / "prompt.safetensors"), "--out", str(tmp_path / "out")]
    assert main(["bench", "quality", *places, "--width", "96", "--height", "64", "--frames", "9", "--only", "balanced", "--device",
                 "cpu"]) == 0
    other = {row["method"]: row for row in json.loads((tmp_path / "out" / "quality-checkpoint.json").read_text())["rows"]}
    # rounding in another process moves 70 dB by half of one, on Intel's processors
    for name in ("first", "later", "last_quarter"):
        assert other["balanced"]["latent_db"][name] == pytest.approx(rows["balanced"]["latent_db"][name], abs=0.9)
    assert abs(rows["smallest"]["latent_db"]["later"][0] - rows["balanced"]["latent_db"]["later"][0]) > 1.5
    assert other["balanced"]["bits_per_element"] == rows["balanced"]["bits_per_element"]


def test_nothing_is_replaced(comfy):
    first, _ = measured(comfy, presets="smallest", filename_prefix="measured/again")
    second, _ = measured(comfy, presets="smallest", filename_prefix="measured/again", seed=1)
    for number, report in enumerate((first, second), 1):
        assert json.loads((comfy.output / "measured" / f"again_0000{number}_.json").read_text()) == report


def test_all_presets_and_guidance(comfy):
    """Without names every preset but Off, of this release or a later one."""
    report, _ = measured(comfy, presets="", cfg=2.0, negative=True, latent_frames=3, chunk_frames=1)
    assert [row["method"] for row in report["rows"]][2:] == [name for name in PRESETS if name != "off"]
    # K and V of 6 layers, 3 frames of 24 tokens, in a cache for each prompt
    exact = report["rows"][0]
    assert 8 * exact["stored_bytes"] == exact["bits_per_element"] * 2 * 2 * 6 * 3 * 24 * 256 and report["cfg"] == 2


def test_longcat(comfy):
    report, _ = measured(comfy, loader="QVGLoadARVideoModel", file="longcat.safetensors", chunk_frames=2, latent_frames=10, width=64,
                         height=48, sigmas="1.0, 0.8, 0.5, 0.0", filename_prefix="measured/longcat")
    rows = {row["method"]: row for row in report["rows"]}
    assert report["chunks"] == [6, 2, 2] and list(rows) == ["exact again", "1e-3 noise", "balanced", "smallest"]
    assert all(min(row["latent_db"]["frames"][0][:6]) > 100 for row in rows.values()), "the first segment has no history"
    assert rows["1e-3 noise"]["latent_db"]["first"][0] > rows["balanced"]["latent_db"]["first"][0]
    # frames of 12 tokens, for which a basis takes nearly as much as the spans
    assert rows["exact again"]["stored_bytes"] > 2 * rows["balanced"]["stored_bytes"]


@pytest.mark.parametrize(("inputs", "sentence"), [
    ({"latent_frames": 5}, "are chunks of 3, 2: too few"),
    ({"presets": "Balanced, Teeny"}, "There is no preset 'teeny'; choose one of off"),
    ({"cfg": 3.0}, "cfg is 3, which needs a negative prompt"),
    ({"sigmas": "1.0, 0.5"}, "give two or more that end in 0"),
    ({"filename_prefix": "../../up"}, "leads out of"),
])
def test_what_cannot_be_measured(comfy, inputs, sentence):
    with pytest.raises(ComfyError, match=sentence):
        comfy.run(build(**inputs))


def test_a_model_without_a_cache(comfy, comfy_server):
    torch.manual_seed(0)
    with pytest.raises(ComfyError, match="is not an autoregressive video model: it has no KV cache to measure"):
        comfy.run(build(loader="UNETLoader", file=plain(comfy_server)))


def plain(comfy_server):
    """The tiny model's file without the mark of a causal network."""
    from safetensors.torch import load_file

    path = comfy_server.folder("models", "diffusion_models")
    source = NETWORK_PATH if NETWORK_PATH.is_file() else path / NETWORK_FILE
    save_file(load_file(source), path / "plain_wan.safetensors", metadata={"config": json.dumps({"transformer": {"text_dim": 64}})})
    return "plain_wan.safetensors"


def test_it_stops_when_asked(comfy):
    prompt = comfy.submit(build(latent_frames=60, filename_prefix="measured/stopped"))
    comfy.wait_for("qvg.text", lambda data: data["node"] == "measure" and "step" in data["text"])
    comfy.interrupt()
    comfy.wait_for("execution_interrupted", lambda data: data["prompt_id"] == prompt)
    assert not list((comfy.output / "measured").glob("stopped*"))
