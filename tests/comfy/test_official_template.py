"""ComfyUI's own template for causal models, with the pack's nodes put into its subgraph: the graph that most people will have.

It comes with ComfyUI (PyPI: comfyui-workflow-templates-json): a start image and one latent frame a chunk. Only what needs a download is
exchanged: the names of the files, and the text encoder, of which there is no tiny one.
"""

import pytest

from comfy_browser import settled
from comfyui_qvg.qvg.demo import HEIGHT, NETWORK_FILE, PROMPTS, VAE_FILE, WIDTH

NAME = "video_causal_forcing_i2v"
SECONDS, FRAME_RATE = 1.0, 16
INSERT = """
async ({name, modern, widgets, files, prompts}) => {
  await app.extensionManager.setting.set('Comfy.VueNodes.Enabled', modern)
  await app.loadGraphData(await fetch(`/templates/${name}.json`).then(answer => answer.json()), true, true)
  const placed = app.graph.nodes.find(node => node.subgraph)
  for (const [name, value] of Object.entries(widgets)) placed.widgets.find(widget => widget.name === name).value = value
  app.graph.nodes.find(node => node.type === 'LoadImage').widgets[0].value = 'example.png'

  app.canvas.openSubgraph(placed.subgraph, placed)
  const inside = app.canvas.graph
  const find = type => inside.nodes.find(node => node.type === type)
  const add = (type, beside) => {
    const node = LiteGraph.createNode(type)
    node.pos = [beside.pos[0], beside.pos[1] - 400]
    inside.add(node)
    return node
  }
  const connect = (from, to, input) => from.connect(0, to, to.findInputSlot(input))
  const loader = find('UNETLoader'), causal = find('ARVideoI2V'), guider = find('CFGGuider'), sample = find('SamplerCustomAdvanced')
  const quantize = add('QVGQuantizeKVCache', loader), monitor = add('QVGMemoryMonitor', sample)
  connect(loader, quantize, 'model')
  connect(quantize, causal, 'model')
  connect(quantize, monitor, 'model')
  connect(sample, monitor, 'samples')
  for (const [input, text] of Object.entries(prompts)) {
    const prompt = add('QVGDemoPrompt', guider)
    prompt.widgets.find(widget => widget.name === 'text').value = text
    connect(prompt, guider, input)
  }
  await new Promise(done => setTimeout(done, 500))
  app.canvas.setGraph(app.rootGraph)
  for (const [name, value] of Object.entries(files)) placed.widgets.find(widget => widget.name === name).value = value
  return {
    unknown: app.rootGraph.nodes.concat(placed.subgraph.nodes).filter(node => !LiteGraph.registered_node_types[node.type] && !node.subgraph)
      .map(node => node.type),
    prompt: (await app.graphToPrompt()).output}
}
"""


@pytest.fixture(scope="module", autouse=True)
def files(tiny_model, comfy_server):
    target = comfy_server.folder("input") / "example.png"
    target.write_bytes((comfy_server.comfyui / "input" / "example.png").read_bytes())


@pytest.mark.parametrize("modern", [False, True], ids=["classic", "nodes 2.0"])
def test_it_runs_with_the_cache_quantized(page, comfy, modern):
    seed = 50 + modern
    made = page.evaluate(INSERT, {
        "name": NAME, "modern": modern, "widgets": {"width": WIDTH, "height": HEIGHT, "value": SECONDS, "noise_seed": seed},
        "files": {"unet_name": NETWORK_FILE, "vae_name": VAE_FILE}, "prompts": {"positive": PROMPTS[0], "negative": PROMPTS[1]}})
    assert made["unknown"] == []
    nodes = {node["class_type"]: (key, node["inputs"]) for key, node in made["prompt"].items()}
    quantize, (_, causal) = nodes["QVGQuantizeKVCache"][0], nodes["ARVideoI2V"]
    assert ":" in quantize, "our node is inside the subgraph"
    assert nodes["QVGQuantizeKVCache"][1]["model"][0] == nodes["UNETLoader"][0] and causal["model"] == [quantize, 0]
    assert nodes["SamplerARVideo"][1]["num_frame_per_block"] == 1 and (causal["width"], causal["height"]) == (WIDTH, HEIGHT)

    before = set(comfy.get(comfy.url + "/history"))
    page.evaluate("app.queuePrompt(0, 1)")
    (prompt,) = comfy.wait_until(lambda: set(comfy.get(comfy.url + "/history")) - before, 300, "the run to end")
    entry = comfy.history(prompt)
    assert entry["status"]["status_str"] == "success", entry["status"]

    frames = (int(SECONDS * FRAME_RATE) + 1 + 3) // 4
    (report,) = (output["qvg_memory"][0] for output in entry["outputs"].values() if "qvg_memory" in output)
    drawn = [frame for frame, _ in report["chart"]["lines"][0]["points"]]
    assert drawn == list(range(frames + 1)), "the start image and each frame, one by one"
    assert report["forecast"]["stored_bytes"] == report["now"]["stored_bytes"] < report["now"]["bf16_bytes"]
    saved = [item["filename"] for output in entry["outputs"].values() for item in output.get("images", ())]
    assert [name for name in saved if name.endswith(".mp4")]
    shown = settled(page, """() => {
      const inside = app.rootGraph.nodes.find(node => node.subgraph).subgraph
      return inside.nodes.find(node => node.type === 'QVGMemoryMonitor').qvgMonitor.state?.now?.stored_bytes
    }""", lambda found: found == report["now"]["stored_bytes"])
    assert shown == report["now"]["stored_bytes"], "the chart inside the subgraph has the run"
    page.evaluate("app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false)")
    assert [text for kind, text in page.console if kind in ("error", "pageerror") and "qvg" in text.lower()] == []
