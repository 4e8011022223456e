"""The registry's archive, unpacked under another folder name, works in ComfyUI as the checkout does."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from comfy_paths import REPOSITORY
from comfy_server import ComfyServer
from test_packaging import archive

# beside this Python, or wherever it was installed without touching this environment
COMFY = shutil.which("comfy", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archive") / "pack"
    # what is not committed yet is taken along, so that the archive is of the tree that the other tests see
    for path in archive("--others", "--exclude-standard"):
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / path, target)
    return folder


@pytest.fixture(scope="module")
def server(unpacked, tmp_path_factory):
    with ComfyServer(tmp_path_factory.mktemp("comfyui"), pack=unpacked, name="quantvideogen") as server:
        yield server


def test_it_loads_and_serves_what_belongs_to_it(server, unpacked):
    client = server.client
    assert server.complaints_at_start == []
    assert {"QVGQuantizeKVCache", "QVGSettings"} <= set(client.object_info())
    listed = client.get(client.url + "/api/workflow_templates")
    assert sorted(listed["quantvideogen"]) == sorted(path.stem for path in (unpacked / "workflows").glob("*.json"))
    extensions = client.get(client.url + "/extensions")
    assert "/extensions/quantvideogen/js/monitor.js" in extensions
    assert client.get(client.url + "/api/i18n")["de"]["qvg"]


def test_a_node_runs(server):
    outputs = server.client.run({
        "1": {"class_type": "QVGPlanMemory", "inputs": {
            "model": "self-forcing", "width": 0, "height": 0, "seconds": 30.0, "preset": "Balanced", "memory_gib": 24.0}},
        "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}})
    assert "balanced" in outputs["2"]["text"][0]


def test_the_page_loads_without_an_error_of_ours(server, browser):
    from comfy_browser import open_page

    with open_page(browser, server.url) as page:
        assert page.evaluate("app.extensions.some(extension => extension.name === 'QuantVideoGen.Monitor')")
        page.evaluate("void app.graph.add(LiteGraph.createNode('QVGMemoryMonitor'))")
        page.wait_for_selector(".qvg-monitor", state="attached")
        assert [text for kind, text in page.console if kind in ("error", "pageerror") and "quantvideogen" in text.lower()] == []


@pytest.mark.skipif(not COMFY, reason="comfy-cli is not installed: pip install comfy-cli")
def test_comfy_cli_accepts_and_packs_the_same_files(tmp_path):
    """In a clone, because `comfy node pack` writes beside what it packs."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(REPOSITORY), str(clone)], check=True)
    valid = subprocess.run([COMFY, "--skip-prompt", "node", "validate"], cwd=clone, capture_output=True, text=True, timeout=600)
    assert valid.returncode == 0 and "warning" not in (valid.stdout + valid.stderr).lower(), valid.stdout + valid.stderr
    packed = subprocess.run([COMFY, "--skip-prompt", "node", "pack"], cwd=clone, capture_output=True, text=True, timeout=600)
    assert packed.returncode == 0, packed.stdout + packed.stderr
    with zipfile.ZipFile(clone / "node.zip") as file:
        names = {name for name in file.namelist() if not name.endswith("/")}
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=clone, capture_output=True, text=True, check=True).stdout.split("\0")
    left_out = subprocess.run(["git", "ls-files", "-z", "--cached", "--ignored", "--exclude-from=.comfyignore"], cwd=clone,
                              capture_output=True, text=True, check=True).stdout.split("\0")
    assert names == set(listing) - set(left_out)
