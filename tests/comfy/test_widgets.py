"""What the pack's widgets show in the real frontend, on the classic canvas and in Nodes 2.0: texts, the preset's numbers, Stop."""

import json
import uuid

import pytest

from comfy_browser import settled, wait_until_ready
from comfy_paths import REPOSITORY

TEMPLATES = REPOSITORY / "workflows"
MODERN = "on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)"
LOAD = "async workflow => { await app.loadGraphData(workflow, true, true) }"
FIT = "app.extensionManager.command.execute('Comfy.Canvas.FitView')"
# what stands on the first node of a type, and whether all of it can be seen
TEXT = """type => {
  const node = app.rootGraph.nodes.find(node => node.type === type), root = node.qvgText?.root
  return root && {text: root.innerText, breaks: getComputedStyle(root.firstChild).wordBreak,
                  hidden: root.firstChild.offsetHeight - root.clientHeight, shown: root.isConnected && root.firstChild.offsetHeight > 0}
}"""


@pytest.fixture(scope="module", autouse=True)
def files(tiny_model):
    pass


@pytest.fixture(params=[False, True], ids=["classic", "nodes 2.0"])
def canvas(page, request):
    page.evaluate(MODERN, request.param)
    page.wait_for_function("on => LiteGraph.vueNodesMode === on", arg=request.param)
    page.wait_for_timeout(500)
    yield page
    page.evaluate(MODERN, False)
    page.wait_for_timeout(300)


def empty(identity):
    return {"id": identity, "nodes": [], "links": [], "groups": [], "config": {}, "extra": {}, "version": 0.4}


ADD = """type => {
  const node = LiteGraph.createNode(type)
  node.pos = [100, 200]
  app.rootGraph.add(node)
}"""


def test_a_plan_stays_on_its_node(canvas, comfy, tmp_path_factory):
    """All of its lines, whole words, after the run has ended and after the page was loaded again."""
    page = canvas
    page.evaluate(LOAD, empty(str(uuid.uuid4())))
    page.evaluate(ADD, "QVGPlanMemory")
    page.evaluate(FIT)
    page.evaluate("app.queuePrompt(0, 1)")
    page.wait_for_function("app.rootGraph.nodes[0].qvgText?.root?.innerText.includes('Balanced: peak')")
    first = settled(page, TEXT, lambda found: found["shown"] and found["hidden"] <= 0, "QVGPlanMemory")
    assert first["shown"] and first["hidden"] <= 0 and first["breaks"] == "normal" and len(first["text"].splitlines()) >= 5
    page.screenshot(path=tmp_path_factory.getbasetemp() / f"plan {page.evaluate('LiteGraph.vueNodesMode')}.png")
    page.reload(wait_until="domcontentloaded")
    wait_until_ready(page)
    page.wait_for_function("app.rootGraph.nodes[0]?.qvgText?.root?.innerText.includes('Balanced: peak')")
    assert page.evaluate(TEXT, "QVGPlanMemory")["text"] == first["text"]


def knobs(page):
    return page.evaluate("""async () => {
      const node = app.rootGraph.nodes.find(node => node.type === 'QVGSettings')
      const shown = Object.fromEntries(node.widgets.map(widget => [widget.name, widget.value]))
      const {output} = await app.graphToPrompt()
      return {shown, sent: output[node.id].inputs, kept: node.serialize().widgets_values, text: node.qvgText.root?.innerText ?? ''}
    }""")


SET = """([name, value]) => {
  const widget = app.rootGraph.nodes.find(node => node.type === 'QVGSettings').widgets.find(widget => widget.name === name)
  widget.value = value
  widget.callback?.(value)
}"""


def test_settings_show_the_presets_numbers(canvas, comfy, tmp_path_factory):
    page = canvas
    numbers = comfy.get(comfy.url + "/qvg/presets")["presets"]
    page.evaluate(LOAD, empty("00000000-0000-4000-8000-00000000000a"))
    page.evaluate(ADD, "QVGSettings")
    default = knobs(page)["kept"]
    assert default[1:11] == ["preset", "preset", -1, -1, "preset", -1, "preset", -1, "preset", -1]
    for preset in numbers:
        page.evaluate(SET, ["preset", preset])
        now = knobs(page)
        assert {name: now["shown"][name] for name in numbers[preset]} == numbers[preset]
        # a graph keeps what it kept before there was anything to see
        assert now["kept"] == [preset, *default[1:]] and {now["sent"][name] for name in numbers[preset]} == {"preset", -1}
        if preset != "Off" and page.evaluate("LiteGraph.vueNodesMode"):
            assert f"keys in {numbers[preset]['key_bits']} bits" in now["text"]
            codec = numbers[preset]["codec"]
            assert ("stages of" if codec in ("qvg", "paper") else f"codec {codec}.") in now["text"]
    page.evaluate(SET, ["preset", "Balanced"])
    page.evaluate(SET, ["window_frames", 21])
    page.evaluate(SET, ["sink_bits", "8"])
    page.evaluate(SET, ["preset", "Smallest"])
    now = knobs(page)
    assert (now["sent"]["window_frames"], now["sent"]["sink_bits"], now["sent"]["key_bits"]) == (21, "8", "preset")
    assert now["shown"]["key_bits"] == numbers["Smallest"]["key_bits"]
    # the graph comes back as it was, and a knob can be given back to the preset
    page.evaluate(LOAD, json.loads(page.evaluate("JSON.stringify(app.rootGraph.serialize())")))
    assert knobs(page) == now
    page.evaluate(SET, ["window_frames", -1])
    page.evaluate(SET, ["sink_bits", "preset"])
    back = knobs(page)
    assert back["kept"] == ["Smallest", *default[1:]] and back["shown"]["sink_bits"] == numbers["Smallest"]["sink_bits"]
    # codebooks of another codec are those that it gets
    page.evaluate(SET, ["preset", "Tiny"])
    page.evaluate(SET, ["codec", "qvg"])
    other = knobs(page)
    assert [other["shown"][name] for name in ("codec", "stages", "centroids", "group_size")] == ["qvg", 1, 256, "64"]
    assert [other["sent"][name] for name in ("codec", "stages", "centroids", "group_size")] == ["qvg", -1, -1, "preset"]
    page.evaluate(SET, ["codec", "preset"])
    assert knobs(page)["shown"]["stages"] == numbers["Tiny"]["stages"]
    page.evaluate(FIT)
    page.wait_for_timeout(1000)
    page.screenshot(path=tmp_path_factory.getbasetemp() / f"settings {page.evaluate('LiteGraph.vueNodesMode')}.png")


def test_graphs_that_people_have_open_as_they_were(page):
    """Widgets of the templates, which were saved with "preset" and -1, and of graphs from before there were codec and attention."""
    saved = json.loads((TEMPLATES / "Self-Forcing - prompt schedule.json").read_text())
    (values,) = (node["widgets_values"] for node in saved["nodes"] if node["type"] == "QVGSettings")
    del values[15:]
    for preset, newer in (("Balanced", []), ("Tiny", []), ("Tiny", ["preset"]), ("Quality", ["qvg"]), ("Tiny", ["qvg", "fast"])):
        values[:] = [preset, *values[1:15], *newer]
        page.evaluate(LOAD, saved)
        now = knobs(page)
        assert now["kept"] == [*values[:15], *newer, *["preset", "auto"][len(newer):]] and now["shown"]["window_frames"] == 12
        assert [now["sent"][name] for name in ("codec", "attention")] == now["kept"][15:]


def test_the_panel_beside_the_graph_leaves_the_chart_on_its_node(canvas, tmp_path_factory):
    """The chart is as wide as its node while the panel shows the node, and the panel names no widget by its type."""
    page = canvas
    page.evaluate(LOAD, json.loads((TEMPLATES / "Tiny model - text to video.json").read_text()))
    page.evaluate(FIT)
    width = "document.querySelector('.qvg-monitor')?.offsetWidth ?? 0"
    before = settled(page, width, lambda found: found > 400)
    page.get_by_label("Toggle properties panel").first.click()
    page.evaluate("app.canvas.selectNode(app.rootGraph.nodes.find(node => node.type === 'QVGMemoryMonitor'))")
    page.wait_for_timeout(1500)
    page.screenshot(path=tmp_path_factory.getbasetemp() / f"panel {page.evaluate('LiteGraph.vueNodesMode')}.png")
    assert settled(page, width, lambda found: found > 0) == pytest.approx(before, abs=2) and before > 400
    shown = page.evaluate("document.body.innerText")
    assert "qvg_memory" not in shown and "qvg_text" not in shown


# nodes of the screen that lie over each other, in the graph's units
MEET = """() => {
  const scale = app.canvas.ds.scale
  const boxes = [...document.querySelectorAll('[data-node-id]')].map(
    element => [element.innerText.split('\\n')[0], element.getBoundingClientRect()])
  return [boxes.length, boxes.flatMap(([name, a], i) => boxes.slice(i + 1).filter(([, b]) =>
    Math.min(a.right, b.right) - Math.max(a.left, b.left) > scale && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > scale)
    .map(([other]) => [name, other]))]
}"""


def test_no_node_of_a_template_hides_another_in_nodes_2(page):
    page.evaluate(MODERN, True)
    page.wait_for_function("LiteGraph.vueNodesMode")
    try:
        for path in sorted(TEMPLATES.glob("*.json")):
            workflow = json.loads(path.read_text())
            page.evaluate(LOAD, workflow)
            page.evaluate(FIT)
            page.wait_for_timeout(700)
            nodes = len(workflow["nodes"])
            assert settled(page, MEET, lambda found: found == [nodes, []]) == [nodes, []], path.stem  # noqa: B023
    finally:
        page.evaluate(MODERN, False)


# another seed for all nodes that draw noise; returns how many there are
RESEED = """seed => {
  const seeds = app.graph.nodes.flatMap(node => (node.widgets ?? []).filter(({ name }) => ['noise_seed', 'seed'].includes(name)))
  seeds.forEach(widget => { widget.value = seed })
  return seeds.length
}"""


def test_stop_says_what_goes_on(page, comfy):
    """A message on the screen, a line on the sampler, and a chart that says where the run stopped."""
    graph = json.loads((TEMPLATES / "Tiny model - long video with two prompts.json").read_text())
    page.evaluate(LOAD, graph)
    page.evaluate(FIT)
    # another test may have run this template on the same server, which would then run nothing
    assert page.evaluate(RESEED, 987_654)
    known = set(comfy.get(comfy.url + "/history"))
    page.evaluate("app.queuePrompt(0, 1)")
    page.wait_for_function("""() => { const shown = document.querySelector('.qvg-monitor')?.dataset
                                      return shown?.phase === 'sampling' && Number(shown.stored) > 0 }""")
    comfy.interrupt()
    page.get_by_text("Press Stop again to end immediately", exact=False).first.wait_for()
    page.wait_for_function("document.querySelector('.qvg-monitor').dataset.phase === 'stopped'")
    page.wait_for_function(f"({TEXT})('QVGARVideoSampler')?.text.startsWith('Stopped. The ')")
    comfy.interrupt()
    (prompt,) = comfy.wait_until(lambda: set(comfy.get(comfy.url + "/history")) - known, 300, "the run to end")
    assert "execution_interrupted" in [kind for kind, _ in comfy.history(prompt)["status"]["messages"]]
