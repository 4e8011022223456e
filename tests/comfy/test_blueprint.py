"""The subgraph of subgraphs/: offered by the server, placed in a graph, wired to the tiny model and run."""

import json

import pytest

from comfy_paths import REPOSITORY
from comfy_server import PACK
from write_templates import BLUEPRINT, PROMOTED

FILE = REPOSITORY / "subgraphs" / f"{BLUEPRINT}.json"
RUN = """
async ({blueprint, template}) => {
  await app.loadGraphData(template, true, true)
  const keep = ['UNETLoader', 'VAELoader', 'QVGDemoPrompt', 'CreateVideo', 'SaveVideo']
  for (const node of [...app.graph.nodes]) if (!keep.includes(node.type)) app.graph.remove(node)
  const before = new Set(app.graph.nodes)
  app.canvas._deserializeItems({nodes: blueprint.nodes, links: [], reroutes: [], groups: [], subgraphs: blueprint.definitions.subgraphs},
    {position: [900, 0]})
  const placed = app.graph.nodes.find(node => !before.has(node))
  const find = type => app.graph.nodes.find(node => node.type === type)
  find('UNETLoader').connect(0, placed, placed.findInputSlot('model'))
  find('QVGDemoPrompt').connect(0, placed, placed.findInputSlot('conditioning'))
  find('VAELoader').connect(0, placed, placed.findInputSlot('vae'))
  placed.connect(0, find('CreateVideo'), find('CreateVideo').findInputSlot('images'))
  const set = (name, value) => { placed.widgets.find(widget => widget.name === name).value = value }
  for (const [name, value] of [['width', 192], ['height', 128], ['length', 45]]) set(name, value)
  return placed.widgets.map(widget => widget.name)
}
"""


@pytest.fixture(scope="module", autouse=True)
def files(tiny_model):
    pass


def test_the_server_offers_it(comfy):
    offered = [entry for entry in comfy.get(comfy.url + "/global_subgraphs").values() if entry["info"]["node_pack"].endswith(PACK)]
    assert [entry["name"] for entry in offered] == [path.stem for path in FILE.parent.glob("*.json")] == [BLUEPRINT]


def test_it_runs_in_a_graph(page, comfy):
    template = json.loads((REPOSITORY / "workflows" / "Tiny model - text to video.json").read_text())
    widgets = page.evaluate(RUN, {"blueprint": json.loads(FILE.read_text()), "template": template})
    assert widgets == [name for _, name in PROMOTED]
    before = set(comfy.get(comfy.url + "/history"))
    page.evaluate("app.queuePrompt(0, 1)")
    (prompt,) = comfy.wait_until(lambda: set(comfy.get(comfy.url + "/history")) - before, 300, "the run to end")
    entry = comfy.history(prompt)
    assert entry["status"]["status_str"] == "success", entry["status"]
    (report,) = (output["qvg_memory"][0] for output in entry["outputs"].values() if "qvg_memory" in output)
    assert report["preset"] == "balanced" and report["latent_frames"] == 12
