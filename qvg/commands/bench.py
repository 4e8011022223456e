"""`qvg bench`: measurements by name, with options of their own.

    qvg bench quality --checkpoint self_forcing_dmd.pt --embeddings prompts.safetensors
    qvg bench statistics
    qvg bench kernels --out results

Those of one's own model and of statistics are part of the pack; the others, which measure the pack itself, only of a checkout.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util

from . import quality, statistics

BENCHMARKS = ("kernels", "generate", "quality", "statistics", "synthetic", "world")


def add_arguments(command) -> None:
    command.add_argument("name", choices=BENCHMARKS)
    command.add_argument("options", nargs=argparse.REMAINDER)


def main(arguments) -> None:
    """Raises ValueError for a benchmark that an installation does not have."""
    if arguments.name == "statistics":
        statistics.main(arguments.options)
        return
    package = f"{__package__.rpartition('.qvg.')[0]}.benchmarks"
    checkout = importlib.util.find_spec(package) is not None
    own = any(option.partition("=")[0] == "--checkpoint" for option in arguments.options)
    if arguments.name == "quality" and (own or not checkout):
        quality.main(arguments.options)
        return
    if not checkout:
        raise ValueError("This benchmark is not part of an installed pack; clone the repository and run `qvg bench` from there.")
    importlib.import_module(f"{package}.{arguments.name}").main(arguments.options)
