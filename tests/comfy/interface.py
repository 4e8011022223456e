"""What graphs and scripts rely on: ids, inputs and outputs of every node, taken from /object_info.

    python tests/comfy/interface.py        writes tests/data/interface.json anew; the difference belongs into CHANGELOG.md
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from comfy_client import ComfyClient

FILE = Path(__file__).resolve().parents[1] / "data" / "interface.json"
# lists of files and words for people are not part of it
CHANGING = {("QVGCameraPath", "file"), ("QVGLoadARVideoModel", "model_name"), ("QVGLoadVideoSession", "name")}
WORDS = {"tooltip", "advanced", "display_name"}


def interface(client: ComfyClient) -> dict:
    """{node id: {"inputs": {name: [required or optional, type, limits and default]}, "outputs": [[name, type]]}}"""
    nodes = {}
    for node, info in sorted(client.object_info().items()):
        if not node.startswith("QVG"):
            continue
        inputs = {}
        for part in ("required", "optional"):
            for name, (kind, *options) in info["input"].get(part, {}).items():
                options = {key: value for key, value in (options[0] if options else {}).items() if key not in WORDS}
                if (node, name) in CHANGING:
                    options.pop("options", None)
                inputs[name] = [part, kind, options]
        nodes[node] = {"inputs": inputs, "outputs": [list(pair) for pair in zip(info["output_name"], info["output"])],
                       "output_node": info["output_node"]}
    return nodes


if __name__ == "__main__":
    from comfy_server import ComfyServer

    with tempfile.TemporaryDirectory() as base, ComfyServer(base) as server:
        FILE.write_text(json.dumps(interface(server.client), indent=1) + "\n")
