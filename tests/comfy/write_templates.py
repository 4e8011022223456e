"""Writes workflows/*.json, built and laid out by the real frontend, and their thumbnails.

    python tests/comfy/write_templates.py                  the graphs
    python tests/comfy/write_templates.py --thumbnails     runs those that can run, and draws the pictures beside them
    python tests/comfy/write_templates.py --screens DIR    and a screenshot of each
    python tests/comfy/write_templates.py --only LongCat   some of them
    python tests/comfy/write_templates.py --blueprint      the subgraph of subgraphs/, made from the Self-Forcing template

Needs what the tests of this folder need: a ComfyUI, its requirements in this Python, playwright and chromium.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
import uuid
from pathlib import Path

import av
from PIL import Image, ImageDraw, ImageFont

from comfy_browser import open_browser, open_page
from comfy_paths import REPOSITORY
from comfy_server import ComfyServer
from comfyui_qvg.qvg.report.plan import plan
from comfyui_qvg.qvg.units import GIB
from template_graphs import TEMPLATES, Template

FOLDER = REPOSITORY / "workflows"
# the template browser shows squares
SIZE = (480, 480)
PACK_ID = "quantvideogen"

BUILD = """
async ({graph, columns, files, heights, modern, core, pack}) => {
  // SAYS: room for what a node says while it runs
  const GAP = 30, TITLE = 30, HEAD = 60, MARGIN = 20, SAYS = 60
  const speaking = ['QVGARVideoSampler', 'QVGLongCatContinue', 'QVGWorldWalk', 'QVGLoadARVideoModel']
  await app.loadGraphData({nodes: [], links: [], groups: [], config: {}, extra: {}, version: 0.4}, true, false)
  const nodes = {}
  const make = (name, type) => {
    const node = LiteGraph.createNode(type)
    app.graph.add(node)
    if (name) nodes[name] = node
    return node
  }
  for (const [name, {class_type, inputs}] of Object.entries(graph)) {
    const node = make(name, class_type)
    const ours = class_type.startsWith('QVG')
    Object.assign(node.properties, {cnr_id: ours ? pack.id : 'comfy-core', ver: ours ? pack.version : core})
    for (const [key, value] of Object.entries(inputs)) {
      const widget = node.widgets?.find(widget => widget.name === key)
      if (widget && !Array.isArray(value)) { widget.value = value; widget.callback?.(value) }
    }
    if (files[name]) node.properties.models = files[name].map(([file, url, directory]) => ({name: file, url, directory}))
  }
  for (const [name, {inputs}] of Object.entries(graph))
    for (const [key, value] of Object.entries(inputs))
      if (Array.isArray(value)) nodes[value[0]].connect(value[1], nodes[name], nodes[name].findInputSlot(key))
  // pictures and widgets settle before anything is measured
  await new Promise(done => setTimeout(done, 800))
  let x = 0
  for (const column of columns) {
    let y = 0
    const width = Math.max(...column.map(group => group.width))
    for (const group of column) {
      const top = y
      y += HEAD
      for (const item of group.nodes) {
        const isNote = Array.isArray(item)
        const node = isNote ? make(null, 'MarkdownNote') : nodes[item]
        if (isNote) {
          node.title = item[0]
          node.widgets[0].value = item[1]
        }
        const height = isNote ? item[2] : heights[item] ?? 0
        node.pos = [x + MARGIN, y + TITLE]
        node.setSize([width, Math.max(height, height ? 0 : node.computeSize()[1])])
        y += 10 * Math.ceil(Math.max(TITLE + node.size[1], modern[item] ?? 0) / 10) + GAP + (speaking.includes(node.type) ? SAYS : 0)
      }
      const box = new LiteGraph.LGraphGroup(group.title)
      box.pos = [x, top]
      box.size = [width + 2 * MARGIN, y - top + 24]
      box.color = '#3f789e'
      app.graph.add(box)
      y += GAP
    }
    x += width + 2 * MARGIN + GAP
  }
  // a round trip drops what is undefined
  return JSON.stringify(app.graph.serialize())
}
"""
# heights on the screen, titles included, in the graph's units, by id
MODERN = """
() => Object.fromEntries([...document.querySelectorAll('[data-node-id]')].map(
  element => [element.dataset.nodeId, element.getBoundingClientRect().height / app.canvas.ds.scale]))
"""


def build(page, template: Template, core_version: str) -> dict:
    """The template as a workflow file's content, with room for what Nodes 2.0 draws higher than the classic canvas."""
    setting = "on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)"
    first = _arrange(page, template, core_version, {})
    page.evaluate(setting, True)
    open_template(page, first)
    # the frontend numbers nodes as they are made, in the graph's order
    heights = page.evaluate(MODERN)
    modern = {name: heights[str(number)] for number, name in enumerate(template.graph, 1)}
    page.evaluate(setting, False)
    page.wait_for_timeout(500)
    return _arrange(page, template, core_version, modern)


def _arrange(page, template: Template, core_version: str, modern: dict[str, float]) -> dict:
    """modern: heights of nodes in Nodes 2.0."""
    columns = [[{"title": group.title, "width": group.width, "nodes": [_note(item) for item in group.nodes]} for group in column]
               for column in template.columns]
    files = {node: template.files_of(node) for node in template.files}
    workflow = json.loads(page.evaluate(BUILD, {
        "graph": template.graph, "columns": columns, "files": files, "heights": template.heights, "modern": modern,
        "core": core_version, "pack": {"id": PACK_ID, "version": _version()}}))
    workflow["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, f"{PACK_ID}/{template.name}"))
    workflow["extra"] = {"ds": {"scale": 0.6, "offset": [60, 120]}}
    return workflow


BLUEPRINT = "Long AR video (2-bit KV)"
INSIDE = {"QVGSettings", "QVGQuantizeKVCache", "EmptyARVideoLatent", "RandomNoise", "BasicGuider", "SamplerARVideo", "BasicScheduler",
          "SamplerCustomAdvanced", "VAEDecode", "QVGMemoryMonitor"}
# widgets that the subgraph shows, in its order
PROMOTED = [("EmptyARVideoLatent", "width"), ("EmptyARVideoLatent", "height"), ("EmptyARVideoLatent", "length"), ("QVGSettings", "preset"),
            ("SamplerARVideo", "num_frame_per_block"), ("BasicScheduler", "steps"), ("RandomNoise", "noise_seed")]
FOLD = """
({name, inside}) => {
  const chosen = app.graph.nodes.filter(node => inside.includes(node.type))
  const {node} = app.graph.convertToSubgraph(new Set(chosen))
  node.title = name
  node.subgraph.name = name
  for (const other of [...app.graph.nodes]) if (other !== node) app.graph.remove(other)
  for (const group of [...app.graph.groups]) app.graph.remove(group)
  node.pos = [0, 0]
  return JSON.stringify(app.graph.serialize())
}
"""


def build_blueprint(page) -> dict:
    """The middle of the Self-Forcing template as one node: model, prompt and VAE in, frames out."""
    open_template(page, json.loads((FOLDER / "Self-Forcing - text to video.json").read_text()))
    folded = json.loads(page.evaluate(FOLD, {"name": BLUEPRINT, "inside": sorted(INSIDE)}))
    numbers = {node["type"]: str(node["id"]) for node in folded["definitions"]["subgraphs"][0]["nodes"]}
    folded["nodes"][0]["properties"]["proxyWidgets"] = [[numbers[kind], widget] for kind, widget in PROMOTED]
    return folded | {"id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{PACK_ID}/{BLUEPRINT}")), "extra": {}}


def _note(item):
    if isinstance(item, str):
        return item
    title, text = item
    # a line of markdown at the note's width holds about 46 letters, and a row of a table takes more room
    shown = re.sub(r"\]\([^)]*\)", "", text)
    lines = sum(2 if line.startswith("|") else 1 + len(line) // 46 for line in shown.splitlines() if line)
    return [title, text, 60 + 17 * lines]


def _version() -> str:
    line = next(line for line in (REPOSITORY / "pyproject.toml").read_text().splitlines() if line.startswith("version"))
    return line.split('"')[1]


def open_template(page, workflow: dict) -> None:
    page.evaluate("async workflow => { await app.loadGraphData(workflow, true, true) }", workflow)
    page.wait_for_timeout(500)
    page.evaluate("app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.wait_for_timeout(1000)


def run_in_frontend(page, client) -> dict:
    """Presses Run; the history's outputs of the run."""
    known = set(client.get(client.url + "/history"))
    page.evaluate("app.queuePrompt(0, 1)")
    (prompt,) = client.wait_until(lambda: set(client.get(client.url + "/history")) - known, 500, "the run to end")
    entry = client.history(prompt)
    if entry["status"]["status_str"] != "success":
        raise RuntimeError(entry["status"])
    return entry["outputs"]


def draw_run(video: Path) -> Image.Image:
    """Moments of a generated video: six, or four where two videos lie side by side."""
    with av.open(str(video)) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    columns, rows = (1, 4) if frames[0].width > 3 * frames[0].height else (2, 3)
    picture, last = Image.new("RGB", SIZE), columns * rows - 1
    tile = SIZE[0] // columns, SIZE[1] // rows
    for number in range(last + 1):
        frame = frames[number * (len(frames) - 1) // last].resize(tile, Image.Resampling.LANCZOS)
        picture.paste(frame, (tile[0] * (number % columns), tile[1] * (number // columns)))
    return picture


def draw_memory(template: Template) -> Image.Image:
    """Bytes of a cache as bars; for models that are too large to run here."""
    title, use = template.name.split(" - ")
    caption, asked = template.bars
    presets = plan(**asked)["presets"]
    rows = [("bf16", presets["off"]["bf16_bytes"], "#8b8d98"), ("Quality", presets["quality"]["peak_bytes"], "#9b7bff"),
            ("Balanced", presets["balanced"]["peak_bytes"], "#4c8dff"), ("Smallest", presets["smallest"]["peak_bytes"], "#37b6a5"),
            ("Tiny", presets["tiny"]["peak_bytes"], "#7fae3f")]
    picture = Image.new("RGB", (2 * SIZE[0], 2 * SIZE[1]), "#17181c")
    draw = ImageDraw.Draw(picture)
    # the template browser lays a badge over the upper left corner
    draw.text((48, 130), title, font=ImageFont.load_default(76), fill="#e8e8ea")
    draw.text((48, 232), f"{use}\n{caption}", font=ImageFont.load_default(40), fill="#9a9ca6")
    for number, (name, count, colour) in enumerate(rows):
        y = 372 + 112 * number
        draw.text((48, y + 32), name, font=ImageFont.load_default(36), fill="#e8e8ea", anchor="lm")
        length = 480 * count / rows[0][1]
        draw.rounded_rectangle((230, y, 230 + length, y + 64), 8, fill=colour)
        digits = 1 if count < 5 * GIB else 0
        draw.text((246 + length, y + 32), f"{count / GIB:.{digits}f} GiB", font=ImageFont.load_default(36), fill="#e8e8ea", anchor="lm")
    return picture.resize(SIZE, Image.Resampling.LANCZOS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--thumbnails", action="store_true")
    parser.add_argument("--screens", type=Path)
    parser.add_argument("--blueprint", action="store_true")
    parser.add_argument("--only", default="", help="templates whose names contain this")
    parser.add_argument("--weights", type=Path, help="a models folder with the tiny model, instead of the one that ships")
    options = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as base, ComfyServer(base) as server, open_browser() as browser:
        if options.weights:
            for folder in ("diffusion_models", "vae"):
                for file in (options.weights / folder).iterdir():
                    (server.folder("models", folder) / file.name).symlink_to(file.resolve())
        shutil.copy(server.comfyui / "input" / "example.png", server.folder("input"))
        with open_page(browser, server.url, viewport={"width": 2600, "height": 1300}) as page:
            core = page.evaluate("fetch('/system_stats').then(r => r.json())")["system"]["comfyui_version"]
            if options.blueprint:
                FOLDER.with_name("subgraphs").mkdir(exist_ok=True)
                file = FOLDER.with_name("subgraphs") / f"{BLUEPRINT}.json"
                file.write_text(json.dumps(build_blueprint(page), indent=1, ensure_ascii=False) + "\n")
                return
            for template in (template for name, template in TEMPLATES.items() if options.only in name):
                workflow = build(page, template, core)
                (FOLDER / f"{template.name}.json").write_text(json.dumps(workflow, indent=1, ensure_ascii=False) + "\n")
                open_template(page, workflow)
                if options.thumbnails:
                    if template.runs:
                        outputs = run_in_frontend(page, server.client)
                        (saved,) = (item for output in outputs.values() for item in output.get("images", ())
                                    if item["filename"].endswith(".mp4"))
                        picture = draw_run(server.client.output_path(saved))
                    else:
                        picture = draw_memory(template)
                    picture.save(FOLDER / f"{template.name}.jpg", quality=88)
                if options.screens:
                    options.screens.mkdir(parents=True, exist_ok=True)
                    page.screenshot(path=options.screens / f"{template.name}.png")


if __name__ == "__main__":
    main()
