"""Writes web/docs/images/run.webp, the README's moving picture of a graph that runs, from the real frontend.

    python tests/comfy/write_animation.py

The tiny template samples in chromium. One picture is taken whenever the monitor shows another chunk, so the animation tells the order of
things and not how fast this machine is; then some moments of the finished video are shown where the graph shows it. Needs what
`write_templates.py` needs.
"""

from __future__ import annotations

import io
import json
import tempfile

from PIL import Image

from comfy_browser import open_browser, open_page
from comfy_paths import REPOSITORY
from comfy_server import ComfyServer
from write_templates import FOLDER, open_template

FILE = REPOSITORY / "web" / "docs" / "images" / "run.webp"
WIDTH = 1000
MILLISECONDS, LAST_MILLISECONDS = 180, 2500
# the sampler, the video and the monitor fill the page; returns the box to cut out
FRAME = """
() => {
  const shown = app.graph.groups.filter(group => /^[456] /.test(group.title))
  const left = Math.min(...shown.map(group => group.pos[0])), right = Math.max(...shown.map(group => group.pos[0] + group.size[0]))
  const top = Math.min(...shown.map(group => group.pos[1])), bottom = Math.max(...shown.map(group => group.pos[1] + group.size[1]))
  const {ds} = app.canvas, scale = Math.min(1220 / (right - left), 720 / (bottom - top))
  app.canvas.deselectAll()
  ds.scale = scale
  ds.offset[0] = 90 / scale - left
  ds.offset[1] = 150 / scale - top
  app.canvas.setDirty(true, true)
  return {x: 82, y: 142, width: (right - left) * scale + 16, height: (bottom - top) * scale + 24}
}
"""
STORED = "document.querySelector('.qvg-monitor').dataset.stored + document.querySelector('.qvg-monitor').dataset.phase"
SEEK = """
async share => {
  const video = [...document.querySelectorAll('video')].at(-1)
  video.pause()
  await new Promise(done => { video.onseeked = done; video.currentTime = share * video.duration })
}
"""


def record(page, client) -> list[Image.Image]:
    pictures, seen = [], None

    def shoot() -> None:
        pictures.append(Image.open(io.BytesIO(page.screenshot(clip=box))).convert("RGB"))

    for name, value in (("VueNodes.Enabled", True), ("Minimap.Visible", False), ("Graph.CanvasInfo", False)):
        page.evaluate("([name, value]) => app.extensionManager.setting.set(`Comfy.${name}`, value)", [name, value])
    open_template(page, json.loads((FOLDER / "Tiny model - text to video.json").read_text()))
    box = page.evaluate(FRAME)
    page.wait_for_timeout(1500)
    shoot()
    known = set(client.get(client.url + "/history"))
    page.evaluate("app.queuePrompt(0, 1)")
    while seen is None or not seen.endswith("done"):
        page.wait_for_function(f"last => ({STORED}) !== last", arg=seen or page.evaluate(STORED), timeout=600_000)
        page.wait_for_timeout(60)
        seen = page.evaluate(STORED)
        shoot()
    client.wait_until(lambda: set(client.get(client.url + "/history")) - known, 600, "the run to end")
    page.wait_for_function("[...document.querySelectorAll('video')].at(-1)?.duration > 0", timeout=600_000)
    page.wait_for_timeout(2500)
    for number in range(12):
        page.evaluate(SEEK, number / 12)
        page.wait_for_timeout(80)
        shoot()
    return pictures


def main() -> None:
    with tempfile.TemporaryDirectory() as base, ComfyServer(base) as server, open_browser() as browser:
        with open_page(browser, server.url, viewport={"width": 1400, "height": 900}) as page:
            pictures = record(page, server.client)
    size = WIDTH, round(pictures[0].height * WIDTH / pictures[0].width)
    pictures = [picture.resize(size, Image.Resampling.LANCZOS) for picture in pictures]
    durations = [900] + [MILLISECONDS] * (len(pictures) - 2) + [LAST_MILLISECONDS]
    pictures[0].save(FILE, save_all=True, append_images=pictures[1:], duration=durations, loop=0, quality=70, method=4)
    print(f"{FILE}: {len(pictures)} pictures, {FILE.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
