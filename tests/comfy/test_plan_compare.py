"""Plan KV Memory (QVG) and Compare (QVG) in the real ComfyUI."""

import json

import pytest
from PIL import Image

from comfy_client import ComfyError
from comfyui_qvg.qvg.report.plan import brief, left_for_cache, plan, render


def planned(comfy, **inputs):
    given = {"model": "self-forcing", "width": 0, "height": 0, "seconds": 30.0, "preset": "Balanced", "memory_gib": 24.0} | inputs
    outputs = comfy.run({
        "1": {"class_type": "QVGPlanMemory", "inputs": given},
        **{str(2 + slot): {"class_type": "PreviewAny", "inputs": {"source": ["1", slot]}} for slot in range(3)}})
    return [outputs[str(2 + slot)]["text"][0] for slot in range(3)]


def test_plan_says_what_the_command_says(comfy):
    table, report, longest = planned(comfy)
    wanted = plan("self-forcing", seconds=30.0, vram_gib=24.0)
    assert json.loads(report) == json.loads(json.dumps(wanted))
    assert int(longest) == 4 * wanted["presets"]["balanced"]["longest_latent_frames"] - 3
    assert table == render(wanted, 24.0)
    assert comfy.wait_for("executed", lambda data: data["node"] == "1")["output"]["qvg_text"] == [brief(wanted, 24.0)]


def test_plan_against_this_device(comfy):
    _, report, longest = planned(comfy, memory_gib=0.0, preset="Off")
    assert json.loads(report)["presets"]["off"]["fits"] in (True, False) and int(longest) > 0
    assert planned(comfy, memory_gib=0.01)[2] == "0"


def test_plan_counts_weights(comfy):
    """memory_gib is then a whole card; weights that leave nothing of it are refused with those that would."""
    table, report, longest = planned(comfy, model="krea-14b", weights="fp8")
    left = left_for_cache("krea-14b", 24.0, "fp8")
    wanted = plan("krea-14b", seconds=30.0, vram_gib=left, weights="fp8")
    assert json.loads(report) == json.loads(json.dumps(wanted)) and table == render(wanted, left)
    assert int(longest) == 4 * wanted["presets"]["balanced"]["longest_latent_frames"] - 3 > 0
    assert comfy.wait_for("executed", lambda data: data["node"] == "1")["output"]["qvg_text"] == [brief(wanted, left)]
    assert "of weights in fp8" in brief(wanted, left)
    with pytest.raises(ComfyError, match=r"leaves nothing of a card of 24 GiB; fp8 would leave 8\.5 GiB"):
        planned(comfy, model="krea-14b", weights="bf16")


def compared(comfy, first, second, frames=(4, 4)):
    nodes = {
        name: {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 48, "batch_size": count, "color": colour}}
        for name, colour, count in zip("ab", (first, second), frames)}
    nodes["compare"] = {"class_type": "QVGCompare", "inputs": {"first": ["a", 0], "second": ["b", 0]}}
    nodes["report"] = {"class_type": "PreviewAny", "inputs": {"source": ["compare", 3]}}
    for slot, name in enumerate(("both", "heat", "chart")):
        nodes[name] = {"class_type": "SaveImage", "inputs": {"images": ["compare", slot], "filename_prefix": name}}
    return comfy.run(nodes)


def test_compare_measures_and_shows(comfy):
    outputs = compared(comfy, 0x404040, 0x404050)
    report = json.loads(outputs["report"]["text"][0])
    # a third of the channels are 16 of 255 away
    assert report["frames"] == 4 and report["psnr"] == pytest.approx(28.82, abs=0.01)
    assert len(outputs["both"]["images"]) == 4 and len(outputs["chart"]["images"]) == 1
    sizes = [Image.open(comfy.output_path(outputs[name]["images"][0])).size for name in ("both", "heat", "chart")]
    assert sizes == [(128, 48), (64, 48), (960, 540)]
    assert "PSNR 28.82 dB" in outputs["compare"]["qvg_text"][0]


def test_equal_videos_are_equal(comfy):
    report = json.loads(compared(comfy, 0x123456, 0x123456)["report"]["text"][0])
    assert report["psnr"] == 100 and report["ssim"] == pytest.approx(1)


def test_videos_of_different_length_are_refused(comfy):
    with pytest.raises(ComfyError, match="4 frames of 64 x 48 and 3 frames of 64 x 48"):
        compared(comfy, 0, 0, frames=(4, 3))
