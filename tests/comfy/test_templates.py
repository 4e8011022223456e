"""The templates of workflows/: found by the template browser, opened in the real frontend, run where they can run."""

import json
import urllib.parse
import urllib.request

import pytest
from PIL import Image

from comfy_paths import REPOSITORY
from comfy_server import PACK
from template_graphs import FIRST, TEMPLATES

FOLDER = REPOSITORY / "workflows"
OPEN = """
async ({pack, name}) => {
  const workflow = await fetch(`/api/workflow_templates/${pack}/${name}.json`).then(answer => answer.json())
  await app.loadGraphData(workflow, true, true)
  return (await app.graphToPrompt()).output
}
"""


@pytest.fixture(scope="module", autouse=True)
def files(tiny_model, comfy_server):
    """ComfyUI's own example picture, which every installation has."""
    target = comfy_server.folder("input") / "example.png"
    target.write_bytes((comfy_server.comfyui / "input" / "example.png").read_bytes())


def workflow(name):
    return json.loads((FOLDER / f"{name}.json").read_text())


def test_the_browser_is_told_of_every_template(comfy):
    listed = comfy.get(comfy.url + "/api/workflow_templates")
    assert sorted(listed[PACK]) == sorted(TEMPLATES)


# with all that its node needs today, which may be more than when the template was written
OVERLAPS = """() => {
  const boxes = app.rootGraph.nodes.map(({title, pos: [x, y], size: [width, height]}, i) => ({
    title, left: x, right: x + width, top: y - LiteGraph.NODE_TITLE_HEIGHT,
    bottom: y + Math.max(height, app.rootGraph.nodes[i].computeSize()[1])}))
  const meet = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom
  return boxes.flatMap((a, i) => boxes.slice(i + 1).filter(b => meet(a, b)).map(b => [a.title, b.title]))
}"""


@pytest.mark.parametrize("name", TEMPLATES)
def test_files_as_the_browser_wants_them(comfy, name):
    """A picture of the same name, a known version, and the pack of each node, so that a missing one can be installed."""
    address = f"{comfy.url}/api/workflow_templates/{PACK}/{urllib.parse.quote(name)}.jpg"
    with urllib.request.urlopen(address) as answer:
        assert answer.headers["Content-Type"] == "image/jpeg"
        assert min(Image.open(answer).size) >= 300
    graph = workflow(name)
    assert graph["version"] == 0.4 and graph["groups"]
    for node in graph["nodes"]:
        if node["type"] != "MarkdownNote":
            assert node["properties"]["cnr_id"] == ("quantvideogen" if node["type"].startswith("QVG") else "comfy-core")
            assert node["properties"]["ver"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_loaders_name_where_their_files_come_from(name):
    template = TEMPLATES[name]
    found = {}
    for node in workflow(name)["nodes"]:
        for model in node["properties"].get("models", ()):
            assert model["name"] in node["widgets_values"], f"{node['type']} asks for a file that it does not load"
            found[model["name"]] = (model["name"], model["url"], model["directory"])
            assert model["url"].startswith("https://huggingface.co/")
            assert model["url"].rpartition("/")[2] == model["name"]
    assert found == {file[0]: file for file in template.downloads}
    assert bool(found) != template.runs


@pytest.mark.parametrize("name", TEMPLATES)
def test_opens_in_the_frontend_as_described(same_page, name):
    prompt = same_page.evaluate(OPEN, {"pack": PACK, "name": name})
    template = TEMPLATES[name]
    assert same_page.evaluate("app.rootGraph.nodes.filter(node => !LiteGraph.registered_node_types[node.type]).length") == 0
    if template.runs:
        assert same_page.evaluate("app.rootGraph.nodes.filter(node => node.has_errors).length") == 0
    assert same_page.evaluate(OVERLAPS) == [], "a node hides part of another"
    kinds = {key: node["class_type"] for key, node in template.graph.items()}
    assert sorted(node["class_type"] for node in prompt.values()) == sorted(kinds.values())
    # the frontend numbers nodes as they are made, in the graph's order
    numbers = {key: str(number) for number, key in enumerate(template.graph, 1)}
    for key, node in template.graph.items():
        for field, value in node["inputs"].items():
            if field == "control_after_generate":
                continue
            wanted = [numbers[value[0]], value[1]] if isinstance(value, list) else value
            assert prompt[numbers[key]]["inputs"][field] == wanted, f"{key}.{field}"


# what takes longest is to decode; the second prompt of two begins at 6 seconds
SHORTER = """() => {
  for (const node of app.graph.nodes) for (const widget of node.widgets ?? []) {
    if (widget.name === 'length') widget.value = 45
    if (widget.name === 'seconds' && node.type === 'QVGEmptyLongVideoLatent') widget.value = 7
  }
}"""


# the longest of them on one version alone: of its nodes the others and tests of their own run on every version
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.once] * ("long video" in name), id=name)
                                  for name, template in TEMPLATES.items() if template.runs and name != FIRST])
def test_runs_in_the_frontend(same_page, comfy, name):
    """Opened and started by the frontend: a video comes out, and the console is quiet about the pack. (test_first_run.py runs the first
    one, at its whole length.)"""
    same_page.evaluate(OPEN, {"pack": PACK, "name": name})
    same_page.evaluate(SHORTER)
    known = set(comfy.get(comfy.url + "/history"))
    same_page.evaluate("app.queuePrompt(0, 1)")
    # many CPUs imitate bf16, and take minutes
    (prompt,) = comfy.wait_until(lambda: set(comfy.get(comfy.url + "/history")) - known, 900, "the run to end")
    entry = comfy.history(prompt)
    assert entry["status"]["status_str"] == "success", entry["status"]
    saved = [item["filename"] for output in entry["outputs"].values() for item in output.get("images", ())]
    assert any(file.endswith(".mp4") for file in saved)
    assert [text for kind, text in same_page.console if kind in ("error", "pageerror") and "qvg" in text.lower()] == []
