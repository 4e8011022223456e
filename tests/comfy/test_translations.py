"""Every word that a person reads is there in every language, and the frontend shows it."""

import json
import re
import uuid

import pytest

from comfy_browser import wait_until_ready
from comfy_paths import REPOSITORY

LANGUAGES = ("zh", "ja", "ko", "ru", "de", "fr", "es")
LOCALES = REPOSITORY / "locales"


def read(language, name):
    return json.loads((LOCALES / language / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def english(comfy_server):
    """{node id: its /object_info} of the pack's nodes."""
    return {name: info for name, info in comfy_server.client.object_info().items() if name.startswith("QVG")}


# how a tooltip names the default of a switch
DEFAULT = {"en": "Default: ", "de": "Standard: ", "fr": "Par défaut : ", "es": "Por defecto: ", "ru": "По умолчанию: ",
           "zh": "默认值", "ja": "既定値", "ko": "기본값"}


def names_default(tooltip, value, language="en"):
    """Whether a tooltip says what an input is set to. A text of several sentences is seen in its box, and an empty one has no name."""
    if isinstance(value, bool):
        return DEFAULT[language] in tooltip
    if value in (None, "") or (isinstance(value, str) and ("\n" in value or len(value) > 40)):
        return True
    word = f"{value:g}" if isinstance(value, float) else str(value)
    return re.search(rf"(?<![\w.]){re.escape(word)}(?![\d]|\.\d)", tooltip) is not None


def inputs_of(info):
    return {key: spec for part in ("required", "optional") for key, spec in info["input"].get(part, {}).items()}


def test_there_is_no_language_without_a_test():
    assert {path.name for path in LOCALES.iterdir()} == set(LANGUAGES)


def test_english_is_complete(english):
    """Description and search words of every node, a tooltip of every input (with its default) and output, a help page with its picture."""
    for node, info in english.items():
        assert info["description"] and len(info["search_aliases"]) >= 3, node
        for key, spec in inputs_of(info).items():
            assert names_default(spec[1]["tooltip"], spec[1].get("default")), f"{node}.{key}"
        assert info["output_tooltips"] and all(info["output_tooltips"]), node
        page = (REPOSITORY / "web" / "docs" / f"{node}.md").read_text()
        assert page.startswith(f"# {info['display_name']}\n")
        for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page):
            assert (REPOSITORY / "web" / "docs" / picture).is_file()
        assert f"images/{node}.png" in page


def test_all_nodes_are_in_one_menu_folder(english):
    assert {info["category"] for info in english.values()} == {"QuantVideoGen"}


def test_expert_knobs_are_folded(english):
    shown = [key for key, spec in inputs_of(english["QVGSettings"]).items() if not spec[1].get("advanced")]
    assert shown == ["preset"]
    assert sum(bool(spec[1].get("advanced")) for info in english.values() for spec in inputs_of(info).values()) > 20


@pytest.mark.parametrize("language", LANGUAGES)
def test_nodes_are_translated(english, language):
    found = read(language, "nodeDefs")
    assert set(found) == set(english)
    for node, info in english.items():
        words = found[node]
        assert words["display_name"] and words["description"] != info["description"], node
        assert set(words["inputs"]) == set(inputs_of(info)), node
        for key, spec in inputs_of(info).items():
            assert words["inputs"][key]["tooltip"] != spec[1]["tooltip"] and words["inputs"][key]["name"], f"{node}.{key}"
            assert names_default(words["inputs"][key]["tooltip"], spec[1].get("default"), language), f"{node}.{key}"
        assert list(words["outputs"]) == [str(number) for number in range(len(info["output"]))], node
        for number, tooltip in enumerate(info["output_tooltips"]):
            assert words["outputs"][str(number)]["tooltip"] != tooltip and words["outputs"][str(number)]["name"], f"{node} {number}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_messages_and_settings_are_translated(language):
    """The same keys, and in each message the same places for values."""
    script = (REPOSITORY / "web" / "js" / "strings.js").read_text()
    english = dict(re.findall(r'^  (\w+): "(.*)",$', script, re.M))
    assert len(english) == script.partition("ENGLISH = {")[2].partition("\n}")[0].count("\n") > 20
    found = read(language, "main")["qvg"]
    assert set(found) == set(english)
    for key, text in english.items():
        assert sorted(re.findall(r"\{\w+\}", found[key])) == sorted(re.findall(r"\{\w+\}", text)), key
    settings = set(re.findall(r'id: "(QVG\.[\w.]+)"', (REPOSITORY / "web" / "js" / "monitor.js").read_text()))
    shown = read(language, "settings")
    assert set(shown) == {name.replace(".", "_") for name in settings} and len(settings) == 3
    assert all(entry["name"] and entry["tooltip"] for entry in shown.values())


def test_a_translated_page_shows_translated_labels(page, tiny_model, tmp_path_factory):
    # under an id of its own: the server remembers runs of the template
    template = json.loads((REPOSITORY / "workflows" / "Tiny model - text to video.json").read_text()) | {"id": str(uuid.uuid4())}
    page.evaluate("app.extensionManager.setting.set('Comfy.Locale', 'ja')")
    page.wait_for_timeout(1000)
    page.reload(wait_until="domcontentloaded")
    wait_until_ready(page)
    try:
        page.evaluate("async workflow => { await app.loadGraphData(workflow, true, true) }", template)
        page.wait_for_timeout(1500)
        words = read("ja", "nodeDefs")
        titles = page.evaluate("app.graph.nodes.filter(node => node.type.startsWith('QVG')).map(node => [node.type, node.title])")
        assert titles
        for node, title in titles:
            assert title == words[node]["display_name"]
        labels = page.evaluate("app.graph.nodes.find(node => node.type === 'QVGSettings').widgets.map(widget => widget.label)")
        assert words["QVGSettings"]["inputs"]["budget_gib"]["name"] in labels
        assert page.evaluate("document.querySelector('.qvg-monitor').innerText") == read("ja", "main")["qvg"]["idle"]
        page.screenshot(path=tmp_path_factory.getbasetemp() / "japanese.png")
    finally:
        page.evaluate("app.extensionManager.setting.set('Comfy.Locale', 'en')")
        page.wait_for_timeout(500)
