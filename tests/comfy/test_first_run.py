"""What a person does first: Browse Templates, the pack, a template, Run. And help, and both themes, on the way."""

import re

import pytest

from comfy_browser import settled
from comfy_server import PACK
from template_graphs import FIRST, TEMPLATES


@pytest.fixture(scope="module", autouse=True)
def files(tiny_model):
    pass


def test_from_browse_templates_to_a_video(page, comfy, tmp_path_factory):
    shots = tmp_path_factory.getbasetemp()
    page.get_by_text("Templates", exact=True).first.click()
    page.get_by_text(PACK, exact=True).first.click()
    missing = "names => names.filter(name => !document.body.innerText.includes(name))"
    assert settled(page, missing, lambda names: not names, list(TEMPLATES)) == []
    # the browser loads the pictures that are in sight
    pictures = "[...document.images].filter(image => image.naturalWidth === 480 && image.naturalHeight === 480).length"
    assert settled(page, pictures, lambda count: count >= 4) >= 4
    page.screenshot(path=shots / "templates.png")
    page.get_by_text(FIRST, exact=True).first.click()
    page.wait_for_function("app.graph.nodes.some(node => node.type === 'QVGMemoryMonitor')")
    page.wait_for_timeout(1000)
    before = set(comfy.get(comfy.url + "/history"))
    page.get_by_role("button", name=re.compile("^Run")).first.click()
    (prompt,) = comfy.wait_until(lambda: set(comfy.get(comfy.url + "/history")) - before, 900, "the run to end")
    entry = comfy.history(prompt)
    assert entry["status"]["status_str"] == "success", entry["status"]
    saved = [item["filename"] for output in entry["outputs"].values() for item in output.get("images", ())]
    assert any(file.endswith(".mp4") for file in saved)
    page.wait_for_timeout(1500)
    page.screenshot(path=shots / "first run.png")
    errors = [text for kind, text in page.console if kind in ("error", "pageerror")]
    assert [text for text in errors if PACK in text or "qvg" in text.lower()] == []


def test_help_opens_beside_the_node(page, tmp_path_factory):
    page.evaluate("""() => {
      app.graph.clear()
      const node = LiteGraph.createNode('QVGSettings')
      app.graph.add(node)
      app.canvas.selectNode(node)
    }""")
    page.wait_for_timeout(800)
    page.locator('[data-testid="info-button"]').first.click()
    page.get_by_text("Expert settings").first.wait_for()
    widths = settled(page, "[...document.images].filter(image => image.src.includes('/docs/images/')).map(image => image.naturalWidth)",
                     lambda found: found and min(found) > 300)
    assert widths and min(widths) > 300
    page.screenshot(path=tmp_path_factory.getbasetemp() / "help.png")


def test_the_widget_follows_the_theme(page, tmp_path_factory):
    page.evaluate("app.graph.clear(); void app.graph.add(LiteGraph.createNode('QVGMemoryMonitor'))")
    page.wait_for_selector(".qvg-monitor", state="attached")
    colours = {}
    for theme in ("dark", "light"):
        page.evaluate("theme => app.extensionManager.setting.set('Comfy.ColorPalette', theme)", theme)
        page.wait_for_timeout(500)
        colours[theme] = settled(page, "(() => { const s = getComputedStyle(document.querySelector('.qvg-monitor'));"
                                       " return [s.color, s.backgroundColor] })()",
                                 lambda found: all(one != other for one, other in zip(found, colours.get("dark", [None, None]))))
    page.screenshot(path=tmp_path_factory.getbasetemp() / "light.png")
    page.evaluate("app.extensionManager.setting.set('Comfy.ColorPalette', 'dark')")
    assert colours["dark"][0] != colours["light"][0] and colours["dark"][1] != colours["light"][1]


def test_a_warning_only_under_pressure(page):
    """The forecast of a run against free memory: enough brings no toast, too much brings one, and the setting turns it off."""
    said, gib = page.get_by_text("KV cache may not fit", exact=True), 2**30

    def begin(run, need):
        page.evaluate("""({run, need, free}) => app.api.dispatchCustomEvent('qvg.memory', {
          nodes: [], workflow: '', run, points: [], now: null, ended: false, free_bytes: free, forecast: {peak_bytes: need}})""",
                      {"run": run, "need": need, "free": 8 * gib})
        page.wait_for_timeout(600)

    begin("enough", 4 * gib)
    assert said.count() == 0
    page.evaluate("app.extensionManager.setting.set('QVG.Monitor.Toasts', false)")
    try:
        begin("off", 12 * gib)
        assert said.count() == 0
    finally:
        page.evaluate("app.extensionManager.setting.set('QVG.Monitor.Toasts', true)")
    begin("too much", 12 * gib)
    said.first.wait_for()
    # newer frontends say it once more, with all of its text, to screen readers
    assert said.count() == 1
    assert "12.0 GiB" in page.inner_text("body") and "8.0 GiB" in page.inner_text("body")
