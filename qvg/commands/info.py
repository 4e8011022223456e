"""`qvg info`: versions, the accelerator, and which backend runs each op here."""

from __future__ import annotations

import platform

import torch

from .. import backends


def add_arguments(command) -> None:
    """None."""


def main(arguments) -> None:
    print(f"python {platform.python_version()}, torch {torch.__version__}, {platform.machine()} {platform.system()}")
    name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    names = {"mps": "Apple GPU", "cpu": "none, torch on the CPU"}
    print("accelerator: " + (names.get(name) or torch.cuda.get_device_name()))
    width = 1 + max(map(len, backends.OPS))
    for op, backend, reason in backends.report(name):
        print(f"{op:{width}}{backend:8}{backends.OPS[op]}" + (f"; not {backends.names()[0]}: {reason}" if reason else ""))
