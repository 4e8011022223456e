"""`qvg info`: versions, the accelerator, which backend runs each op here, and which attention reads the cache."""

from __future__ import annotations

import platform

import torch

from .. import backends
from ..attention import fast
from ..attention.choice import choose
from ..settings import PRESETS


def add_arguments(command) -> None:
    """None."""


def main(arguments) -> None:
    print(f"python {platform.python_version()}, torch {torch.__version__}, {platform.machine()} {platform.system()}")
    name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    titles = {"mps": "Apple GPU", "cpu": "none, torch on the CPU"}
    print("accelerator: " + (titles.get(name) or torch.cuda.get_device_name()))
    width = 1 + max(map(len, backends.OPS))
    for op, backend, reason in backends.report(name):
        print(f"{op:{width}}{backend:8}{backends.OPS[op]}" + (f"; not {backends.names()[0]}: {reason}" if reason else ""))
    print("attention to the cache, where the settings say auto:")
    presets: dict[str, list[str]] = {}
    for preset, settings in PRESETS.items():
        presets.setdefault(choose(settings, name).sentence, []).append(preset)
    for sentence, names in presets.items():
        print(f"{', '.join(names)}: {sentence}")
    if not backends.refusal("attend", name):
        sizes = " or ".join(map(str, fast.HEAD_DIMS))
        print(f"heads of other than {sizes} channels: exact (they have no kernel for attention in eight bits)")
