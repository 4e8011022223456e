"""The monitor's widget in the real frontend: classic canvas and Nodes 2.0, live, after a refresh, interrupted, in a subgraph."""

import json
from types import SimpleNamespace

import pytest

from comfy_browser import settled, wait_until_ready
from comfy_paths import REPOSITORY
from comfyui_qvg.qvg.report.chart import Chart
from comfyui_qvg.qvg.units import GIB

FORECAST = SimpleNamespace(stored_bytes=8 * GIB, peak_bytes=8.5 * GIB, bf16_bytes=48.2 * GIB)
TEMPLATE = REPOSITORY / "workflows" / "Tiny model - text to video.json"
LOAD = "async workflow => { await app.loadGraphData(workflow, true, true) }"
# (phase, stored bytes, number of areas) of the one monitor on the page
READ = """() => {
  const root = document.querySelector('.qvg-monitor')
  return root && {phase: root.dataset.phase, stored: Number(root.dataset.stored), text: root.innerText,
                  areas: [...root.querySelectorAll('path[data-part]')].map(path => path.dataset.part)}
}"""
# from here on, the page remembers the stored bytes that the monitor has shown
WATCH = """() => {
  const root = document.querySelector('.qvg-monitor')
  window.qvgSeen = new Set()
  new MutationObserver(() => window.qvgSeen.add(root.dataset.stored)).observe(root, {attributeFilter: ['data-stored']})
}"""
PHASE = "phase => document.querySelector('.qvg-monitor')?.dataset.phase === phase"
STATUS = "document.querySelector('.qvg-monitor [role=status]').textContent"


@pytest.fixture(scope="module", autouse=True)
def files(tiny_model):
    pass


def workflow(seed, length=45, block=3, preset="Balanced"):
    """The tiny template with another seed, so that nothing is cached; without its video, which takes several times as long to decode."""
    graph = json.loads(TEMPLATE.read_text())
    for node in graph["nodes"]:
        if node["type"] in ("VAEDecode", "CreateVideo", "SaveVideo"):
            node["mode"] = 2  # LiteGraph's "never"
        if node["type"] == "RandomNoise":
            node["widgets_values"] = [seed, "fixed"]
        if node["type"] == "EmptyARVideoLatent":
            node["widgets_values"][2] = length
        if node["type"] == "SamplerARVideo":
            node["widgets_values"] = [block]
        if node["type"] == "QVGSettings":
            node["widgets_values"][0] = preset
    return graph


def start(page, comfy, graph):
    page.evaluate(LOAD, graph)
    page.evaluate("app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    known = {message.data["prompt_id"] for message in comfy.messages if message.type == "execution_start"}
    queued = set(comfy.get(comfy.url + "/history"))
    page.evaluate("app.queuePrompt(0, 1)")
    return known | queued


def finish(comfy, before):
    (prompt,) = comfy.wait_until(lambda: set(comfy.get(comfy.url + "/history")) - before, 300, "the run to end")
    return comfy.history(prompt)


def report_of(entry):
    (report,) = (output["qvg_memory"][0] for output in entry["outputs"].values() if "qvg_memory" in output)
    return report


@pytest.mark.parametrize(("modern", "preset"), [(False, "Balanced"), (True, "Tiny")], ids=["classic", "nodes 2.0"])
def test_chart_moves_and_ends_at_the_servers_bytes(same_page, comfy, tmp_path_factory, modern, preset):
    """Also with fractions of a bit, whose areas have their names and order."""
    page = same_page
    page.evaluate("on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", modern)
    page.wait_for_timeout(500)
    before = start(page, comfy, workflow(100 + modern, length=93, preset=preset))
    page.wait_for_function(PHASE, arg="sampling")
    page.evaluate(WATCH)
    now = report_of(finish(comfy, before))["now"]
    page.wait_for_function(PHASE, arg="done")
    shown, seen = page.evaluate(READ), page.evaluate("[...window.qvgSeen]")
    page.evaluate("""() => {
      app.canvas.selectNode(app.graph.nodes.find(node => node.type === 'QVGMemoryMonitor'))
      app.extensionManager.command.execute('Comfy.Canvas.FitView')
    }""")
    page.wait_for_timeout(1500)
    page.screenshot(path=tmp_path_factory.getbasetemp() / f"monitor {'modern' if modern else 'classic'}.png")
    assert len(seen) > 3, "the chart stood still while the model sampled"
    assert shown["phase"] == "done" and shown["stored"] == now["stored_bytes"]
    assert shown["areas"] == ["codebooks", *sorted(now["by_bits"], key=float), "workspace"]
    assert all(f"{bits}-bit elements" in shown["text"] for bits in now["by_bits"]) and "codebooks and bases" in shown["text"]
    assert f"{now['ratio']:.1f}x" in shown["text"]
    assert now["attention"].startswith("exact (") and f"Attention to the cache: {now['attention']}" in shown["text"]

    page.reload(wait_until="domcontentloaded")
    wait_until_ready(page)
    page.wait_for_function(PHASE, arg="done")
    assert page.evaluate(READ)["stored"] == now["stored_bytes"]
    assert [text for kind, text in page.console if kind in ("error", "pageerror") and "qvg" in text.lower()] == []
    page.evaluate("app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false)")


def test_an_interrupted_run_says_so(same_page, comfy):
    page = same_page
    before = start(page, comfy, workflow(200, length=957, block=1))
    page.wait_for_function("Number(document.querySelector('.qvg-monitor')?.dataset.stored) > 0")
    comfy.interrupt()
    page.wait_for_function(PHASE, arg="stopped")
    # the next test takes the first run that ends for its own
    finish(comfy, before)


def test_updates_are_few_and_small(same_page, comfy):
    """Every client hears them, at most about four a second and under 20 kB a second."""
    page = same_page
    before = start(page, comfy, workflow(300, length=93, block=1))
    entry = finish(comfy, before)
    comfy.wait_for("qvg.memory", lambda data: data["ended"])
    moments = [message for message in comfy.messages if message.type == "qvg.memory"]
    # by the clock of the server: what arrives here late would have been sent in less time
    at = {kind: details["timestamp"] / 1000 for kind, details in entry["status"]["messages"] if "timestamp" in details}
    span = at["execution_success"] - at["execution_start"]
    assert len(moments) <= 3 + 4 * span
    assert sum(len(json.dumps(message.data)) for message in moments) < 20_000 * max(1, span)
    points = [frame for message in moments for frame, _ in message.data["chart"]["lines"][0]["points"]]
    assert points == list(range(25)), "each chunk is sent once"


SEND = "message => app.api.dispatchCustomEvent('qvg.memory', {...message, nodes: app.graph.nodes.filter(node => " \
       "node.type === 'QVGMemoryMonitor').map(node => String(node.id))})"


def send(page, chart, frames, run):
    """A moment of a run of another machine: of 180 latent frames of Self-Forcing, on a card with 9 GiB free."""
    bf16, since = 0.268 * GIB * frames, chart.moments
    now = {"frames": frames, "stored_bytes": bf16 / 6, "workspace_bytes": GIB / 4, "peak_bytes": bf16 / 6 + GIB / 4, "bf16_bytes": bf16}
    chart.add(SimpleNamespace(**now, by_kind={"codebooks": bf16 / 60}, by_bits={2: bf16 / 6 - bf16 / 60}))
    page.evaluate(SEND, {
        "workflow": "", "run": run, "preset": "balanced", "latent_frames": 180, "ended": frames == 180, "budget_bytes": 12 * GIB,
        "device": "cuda:0", "free_bytes": 9 * GIB, "free_host_bytes": 40 * GIB, "forecast": vars(FORECAST),
        "chart": chart.describe(since, 9 * GIB + bf16 / 6 + GIB / 4, "cuda:0"),
        "now": now | {"held_frames": frames, "tokens": 1560 * frames, "ratio": 6, "peak_ratio": 5, "bits_per_element": 2.7,
                      "by_layer": [1, 2, 3]}})


def test_keyboard_screen_reader_and_limits(same_page):
    """What has the focus keeps it while values change; a run's begin and end are read aloud; budget and the card's end are drawn."""
    page = same_page
    chart = Chart(180, FORECAST, 12 * GIB)
    page.evaluate(LOAD, workflow(1))
    page.wait_for_selector(".qvg-monitor", state="attached")
    send(page, chart, 30, "a")
    settled(page, READ, lambda shown: "Sampling: 30 of 180" in shown["text"])
    page.evaluate("document.querySelector('.qvg-monitor summary').focus()")
    page.keyboard.press("Enter")
    assert page.evaluate(STATUS) == "Sampling: 30 of 180 latent frames"
    send(page, chart, 60, "a")
    text = settled(page, READ, lambda shown: "Sampling: 60 of 180" in shown["text"])["text"]
    assert page.evaluate("document.activeElement.matches('.qvg-monitor summary') && document.querySelector('.qvg-monitor details').open")
    layers = "[...document.querySelectorAll('.qvg-monitor details dd')].map(item => item.textContent)"
    assert settled(page, layers) == ["1 B", "2 B", "3 B"]
    assert page.evaluate(STATUS) == "Sampling: 30 of 180 latent frames"
    for words in ("Sampling: 60 of 180", "8.0 GiB held, 8.5 GiB peak", "60 frames, 93600 tokens", "Free on cuda:0", "40.0 GiB", "12.0 GiB",
                  "Available on cuda:0"):
        assert words in text
    lines = page.evaluate("[...document.querySelectorAll('.qvg-chart [data-line]')].map(line => line.dataset.line)")
    assert lines == ["peak", "bf16", "peak-forecast", "bf16-forecast", "budget", "available"]
    assert "at the peak" in page.evaluate("document.querySelector('.qvg-chart').getAttribute('aria-label')")
    assert page.evaluate("document.querySelector('.qvg-monitor').getAttribute('aria-label')") == "KV Memory Monitor (QVG)"
    send(page, chart, 180, "a")
    assert "finished" in page.evaluate(STATUS)
    # a smaller node makes a smaller chart
    page.evaluate("app.graph.nodes.find(node => node.type === 'QVGMemoryMonitor').setSize([340, 480])")
    page.evaluate("app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    assert settled(page, "Number(document.querySelector('.qvg-chart').getAttribute('width'))", lambda width: width < 330) < 330


def test_settings_and_badge(page, tmp_path_factory):
    shots = tmp_path_factory.getbasetemp()
    page.evaluate(LOAD, workflow(2))
    page.evaluate("app.extensionManager.setting.set('QVG.Monitor.Units', 'decimal')")
    send(page, Chart(180, FORECAST, 12 * GIB), 180, "b")
    assert "9.7 GB" in page.evaluate(READ)["text"]
    page.evaluate("app.extensionManager.setting.set('QVG.Monitor.Units', 'binary')")
    assert page.evaluate("['Rate', 'Toasts'].map(name => app.extensionManager.setting.get(`QVG.Monitor.${name}`))") == [4, True]
    page.evaluate("app.extensionManager.command.execute('Comfy.ShowSettingsDialog')")
    page.get_by_text("QuantVideoGen", exact=True).last.click()
    for words in ("Updates per second", "Units of memory", "Warn when the cache may not fit"):
        page.get_by_text(words, exact=True).wait_for()
    page.screenshot(path=shots / "settings.png")
    page.get_by_text("About", exact=True).last.click()
    page.get_by_text("ComfyUI-QuantVideoGen", exact=True).last.wait_for()
    page.screenshot(path=shots / "about.png")


def test_works_inside_a_subgraph(same_page, comfy):
    page = same_page
    page.evaluate(LOAD, workflow(400))
    page.evaluate("""() => {
      const inside = app.graph.nodes.filter(node => ['QVGMemoryMonitor', 'QVGQuantizeKVCache', 'QVGSettings'].includes(node.type))
      app.graph.convertToSubgraph(new Set(inside))
    }""")
    before = set(comfy.get(comfy.url + "/history"))
    page.evaluate("app.queuePrompt(0, 1)")
    now = report_of(finish(comfy, before))["now"]
    stored = """() => {
      const outer = app.rootGraph.nodes.find(node => node.subgraph)
      return outer.subgraph.nodes.find(node => node.type === 'QVGMemoryMonitor').qvgMonitor.state?.now?.stored_bytes
    }"""
    assert settled(page, stored, lambda found: found == now["stored_bytes"]) == now["stored_bytes"]


def test_an_error_is_a_sentence_on_the_page(page, comfy):
    graph = workflow(500)
    for node in graph["nodes"]:
        if node["type"] == "QVGSettings":
            node["widgets_values"][11] = 0.0001
    before = start(page, comfy, graph)
    entry = finish(comfy, before)
    (message,) = (details["exception_message"] for kind, details in entry["status"]["messages"] if kind == "execution_error")
    assert "memory budget" in message and "Raise the budget" in message
    # newer frontends name the node and show its sentence after a click
    page.wait_for_function("/memory budget|View details/.test(document.body.innerText)")
    details = page.get_by_text("View details", exact=True)
    if details.count():
        details.first.click()
    page.wait_for_function("document.body.innerText.includes('memory budget')")
