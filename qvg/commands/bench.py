"""`qvg bench`: the benchmarks of a checkout, by name, with options of their own.

    qvg bench kernels --out results
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util

BENCHMARKS = ("kernels", "generate", "quality")


def add_arguments(command) -> None:
    command.add_argument("name", choices=BENCHMARKS)
    command.add_argument("options", nargs=argparse.REMAINDER)


def main(arguments) -> None:
    """Raises ValueError in an installation, which has no benchmarks."""
    package = f"{__package__.rpartition('.qvg.')[0]}.benchmarks"
    if importlib.util.find_spec(package) is None:
        raise ValueError("The benchmarks are not part of an installed pack; clone the repository and run `qvg bench` from there.")
    importlib.import_module(f"{package}.{arguments.name}").main(arguments.options)
