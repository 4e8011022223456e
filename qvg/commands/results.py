"""The folder that a command writes its results into."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..files import PlaceError, Taken, check_place


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
