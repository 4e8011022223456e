"""Writes web/docs/images/NODE.png, the picture on each node's help page, from the real frontend.

    python tests/comfy/write_pictures.py [NODE ...]

Those that show something after a run are shown after one: the monitor, Compare and Measure Presets with the tiny
model, the plan with its table, the camera path with its picture. Needs what `write_templates.py` needs.
"""

from __future__ import annotations

import argparse
import json
import tempfile

from PIL import Image

from comfy_browser import open_browser, open_page
from comfy_client import Graph
from comfy_paths import REPOSITORY
from comfy_server import ComfyServer
from comfyui_qvg.qvg.demo import HEIGHT, NETWORK_FILE, PROMPTS, VAE_FILE, WIDTH
from write_templates import FOLDER, open_template, run_in_frontend

IMAGES = REPOSITORY / "web" / "docs" / "images"
PICTURE_WIDTH = 640
# the box of the nodes of some types on the screen: x, y, width, height
FRAME = """
({types, scale}) => {
  const nodes = app.graph.nodes.filter(node => types.includes(node.type))
  const left = Math.min(...nodes.map(node => node.pos[0])), right = Math.max(...nodes.map(node => node.pos[0] + node.size[0]))
  const top = Math.min(...nodes.map(node => node.pos[1])), bottom = Math.max(...nodes.map(node => node.pos[1] + node.size[1]))
  const canvas = app.canvas
  canvas.deselectAll()
  canvas.ds.scale = scale
  canvas.ds.offset[0] = 100 - left
  canvas.ds.offset[1] = 160 - top
  canvas.setDirty(true, true)
  return {x: 100 * scale - 12, y: 130 * scale - 34, width: (right - left) * scale + 24, height: (bottom - top + 30) * scale + 50}
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


PLACE = """
({places}) => {
  for (const [type, number, x, y, width, height] of places) {
    const node = app.graph.nodes.filter(node => node.type === type).sort((a, b) => a.id - b.id)[number]
    node.pos = [x, y]
    node.setSize([width, height])
  }
}
"""
# Compare and the three things that it makes, beside each other
PLACES = [("QVGCompare", 0, 0, 5000, 330, 190), ("PreviewImage", 0, 380, 5000, 480, 220), ("PreviewImage", 1, 380, 5260, 480, 270),
          ("PreviewImage", 2, 0, 5230, 330, 300)]


def comparison() -> Graph:
    """The tiny model's video with its own cache and with one bit, compared."""
    graph = Graph()
    model = graph.add("1", "UNETLoader", unet_name=NETWORK_FILE, weight_dtype="default")
    vae = graph.add("2", "VAELoader", vae_name=VAE_FILE)
    prompt = graph.add("3", "QVGDemoPrompt", text=PROMPTS[0], seed=18)
    latent = graph.add("4", "EmptyARVideoLatent", width=WIDTH, height=HEIGHT, length=33, batch_size=1)
    sampler = graph.add("5", "SamplerARVideo", num_frame_per_block=3)
    videos = []
    for number, preset in ((10, "Off"), (20, "Smallest")):
        settings = graph.add(f"{number}", "QVGSettings", preset=preset)
        quantized = graph.add(f"{number + 1}", "QVGQuantizeKVCache", model=model, settings=settings)
        sigmas = graph.add(f"{number + 2}", "BasicScheduler", model=quantized, scheduler="simple", steps=4, denoise=1.0)
        samples = graph.add(f"{number + 3}", "SamplerCustom", model=quantized, add_noise=True, noise_seed=0, cfg=1.0, positive=prompt,
                            negative=prompt, sampler=sampler, sigmas=sigmas, latent_image=latent)
        videos.append(graph.add(f"{number + 4}", "VAEDecode", samples=samples, vae=vae))
    graph.add("30", "QVGCompare", first=videos[0], second=videos[1], white_at=0.1)
    # one moment of the two videos, where they differ
    for number in range(2):
        moment = graph.add(f"{41 + number}", "ImageFromBatch", image=["30", number], batch_index=30, length=1)
        graph.add(f"{31 + number}", "PreviewImage", images=moment)
    graph.add("33", "PreviewImage", images=["30", 2])
    return graph


def measurement() -> Graph:
    """The presets measured on the tiny model."""
    graph = Graph()
    model = graph.add("1", "UNETLoader", unet_name=NETWORK_FILE, weight_dtype="default")
    prompt = graph.add("2", "QVGDemoPrompt", text=PROMPTS[0], seed=18)
    graph.add("3", "QVGMeasurePresets", model=model, positive=prompt, width=WIDTH, height=HEIGHT, latent_frames=15, presets="", seed=0,
              cfg=1.0)
    graph.add("4", "PreviewImage", images=["3", 0])
    return graph


def show(page, client, name: str) -> dict:
    """Puts the node on the page as its help shows it; what to frame."""
    if name == "QVGMemoryMonitor":
        open_template(page, json.loads((FOLDER / "Tiny model - text to video.json").read_text()))
        run_in_frontend(page, client)
        return {"types": [name], "scale": 1.4}
    if name in AFTER_A_RUN:
        graph, places = AFTER_A_RUN[name]
        page.evaluate("async graph => { await app.loadApiJson(graph, 'picture') }", graph())
        page.evaluate(PLACE, {"places": places})
        run_in_frontend(page, client)
        page.evaluate(PLACE, {"places": places})
        page.wait_for_timeout(1500)
        return {"types": [name, "PreviewImage"], "scale": 1.2}
    page.evaluate(ALONE, name)
    if name == "QVGPlanMemory":
        page.evaluate("""app.graph.nodes[0].widgets.find(widget => widget.name === 'memory_gib').value = 12""")
        page.evaluate("app.graph.nodes[0].setSize([560, 340])")
        run_in_frontend(page, client)
        page.wait_for_timeout(1000)
        return {"types": [name], "scale": 1.2}
    if name == "QVGCameraPath":
        page.evaluate(f"app.graph.nodes[0].widgets.find(widget => widget.name === 'moves').value = '{MOVES}'")
        page.evaluate("app.graph.nodes[0].setSize([420, 780])")
        run_in_frontend(page, client)
        page.wait_for_timeout(1500)
        return {"types": [name], "scale": 1}
    return {"types": [name], "scale": 1.4}


MOVES = "w-8, right-20, w+left-6, w-8, d-5"
# with the pictures that they make
AFTER_A_RUN = {
    "QVGCompare": (comparison, PLACES),
    "QVGMeasurePresets": (measurement, [("QVGMeasurePresets", 0, 0, 5000, 340, 420), ("PreviewImage", 0, 390, 5000, 560, 420)])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nodes", nargs="*")
    options = parser.parse_args()
    IMAGES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as base, ComfyServer(base) as server, open_browser() as browser:
        nodes = options.nodes or [name for name in server.client.object_info() if name.startswith("QVG")]
        with open_page(browser, server.url) as page:
            page.evaluate("app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false)")
            for name in nodes:
                box = page.evaluate(FRAME, show(page, server.client, name))
                page.wait_for_timeout(1000)
                path = IMAGES / f"{name}.png"
                page.screenshot(path=path, clip=box)
                with Image.open(path) as picture:
                    size = PICTURE_WIDTH, round(picture.height * PICTURE_WIDTH / picture.width)
                    small = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
                small.quantize(128).save(path, optimize=True)


if __name__ == "__main__":
    main()
