"""The folder that a command writes its results into, and the results of a measurement: NAME.json and NAME.md."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from ..files import PlaceError, Taken, check_place, write_atomically
from . import arguments


def prepare_folder(out: Path, names: Sequence[str], overwrite: bool) -> None:
    """Make the folder, before anything is computed. names: of the files that will be written into it.

    Raises PlaceError (a ValueError) where they could not be written, and Taken where one exists and `overwrite` is not set.
    """
    for name in names:
        if (out / name).exists() and not overwrite:
            raise Taken(f"{out / name} already exists. Choose another --out, or --overwrite to replace it.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlaceError(f"{out} cannot become a folder ({error.strerror}). Choose another --out.") from None
    for name in names:
        check_place(out / name)


def add_places(parser: argparse.ArgumentParser) -> None:
    """--out, --overwrite and --device."""
    add_out(parser)
    parser.add_argument("--device", type=arguments.device, default="cuda" if torch.cuda.is_available() else "cpu")


def add_out(parser: argparse.ArgumentParser) -> None:
    """--out and --overwrite."""
    parser.add_argument("--out", type=Path, default=Path("qvg-bench"))
    parser.add_argument("--overwrite", action="store_true", help="replace the results of an earlier run in that folder")


def claim(options: argparse.Namespace, name: str, *more: str) -> None:
    """Raises ValueError, before anything is measured, where the results could not be written or would replace others. more: names of
    further files."""
    prepare_folder(options.out, (f"{name}.json", f"{name}.md", *more), options.overwrite)


def write(out: Path, name: str, result: dict, markdown: str, show: bool = True) -> None:
    """NAME.json and NAME.md under `out`. show: print the markdown, too."""
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / f"{name}.json", lambda part: part.write_text(json.dumps(result, indent=1) + "\n"))
    place = result["environment"]
    head = ", ".join(f"{key} {place[key]}" for key in ("device", "torch", "triton", "python", "date"))
    text = f"## qvg bench {name}\n\n{head}\n\n    {place['command']}\n\n{markdown}\n"
    write_atomically(out / f"{name}.md", lambda part: part.write_text(text))
    if show:
        print(text, flush=True)
