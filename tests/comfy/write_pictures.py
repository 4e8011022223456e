"""Writes web/docs/images/NODE.png, the picture on each node's help page, from the real frontend.

    python tests/comfy/write_pictures.py [NODE ...]

The monitor's picture shows the tiny model's run. Needs what `write_templates.py` needs.
"""

from __future__ import annotations

import argparse
import json
import tempfile

from PIL import Image

from comfy_browser import open_browser, open_page
from comfy_paths import REPOSITORY
from comfy_server import ComfyServer
from write_templates import FOLDER, open_template, run_in_frontend

IMAGES = REPOSITORY / "web" / "docs" / "images"
WIDTH = 640
# the node's box on the screen: x, y, width, height
FRAME = """
type => {
  const node = app.graph.nodes.find(node => node.type === type)
  app.canvas.deselectAll()
  const canvas = app.canvas
  canvas.ds.scale = 1.4
  canvas.ds.offset[0] = 100 - node.pos[0]
  canvas.ds.offset[1] = 120 - node.pos[1]
  canvas.setDirty(true, true)
  const [x, y] = [(node.pos[0] + canvas.ds.offset[0]) * 1.4, (node.pos[1] + canvas.ds.offset[1]) * 1.4]
  return {x: x - 12, y: y - 30 * 1.4 - 34, width: node.size[0] * 1.4 + 24, height: node.size[1] * 1.4 + 30 * 1.4 + 50}
}
"""
ALONE = """
type => {
  app.graph.clear()
  const node = LiteGraph.createNode(type)
  app.graph.add(node)
  node.setSize([Math.max(node.size[0], 380), node.computeSize()[1]])
}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nodes", nargs="*")
    options = parser.parse_args()
    IMAGES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as base, ComfyServer(base) as server, open_browser() as browser:
        nodes = options.nodes or [name for name in server.client.object_info() if name.startswith("QVG")]
        with open_page(browser, server.url) as page:
            for name in nodes:
                if name == "QVGMemoryMonitor":
                    open_template(page, json.loads((FOLDER / "Tiny model - text to video.json").read_text()))
                    run_in_frontend(page, server.client)
                else:
                    page.evaluate(ALONE, name)
                box = page.evaluate(FRAME, name)
                page.wait_for_timeout(1000)
                path = IMAGES / f"{name}.png"
                page.screenshot(path=path, clip=box)
                with Image.open(path) as picture:
                    small = picture.convert("RGB").resize((WIDTH, round(picture.height * WIDTH / picture.width)), Image.Resampling.LANCZOS)
                small.quantize(128).save(path, optimize=True)


if __name__ == "__main__":
    main()
