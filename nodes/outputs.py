"""Names of files below ComfyUI's output folder: numbered, with the tokens of ComfyUI's save nodes, and never those of existing files.

ComfyUI's page replaces tokens such as %date:yyyy-MM-dd% and %KSampler.seed% before a graph is sent (`web/js/file_names.js` requests this
for the nodes of this pack); the others (%width%, %year% and so on) are replaced here. Unknown tokens are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import folder_paths

from ..qvg.files import PlaceError, name_problem

TOKEN = re.compile(r"%[^%]+%")
SIZES = ("%width%", "%height%")
KNOWN = (*SIZES, "%year%", "%month%", "%day%", "%hour%", "%minute%", "%second%")


def check_prefix(prefix: str) -> None:
    """Raises ValueError for a prefix with unknown tokens, one that some operating system cannot store, or one without a name."""
    left = [token for token in TOKEN.findall(prefix) if token not in KNOWN]
    if left:
        raise ValueError(f"The file name {prefix!r} contains {left[0]}, which is not known. ComfyUI's page replaces %date:yyyy-MM-dd% and "
                         f"%Node name.widget%; in a graph that is sent without the page, use {', '.join(KNOWN)}.")
    for part in re.split(r"[/\\]", prefix):
        if part.strip(" .") and (wrong := name_problem(part)):
            raise ValueError(f"The file name {prefix!r} {wrong}. Use a plain name, such as video/qvg.")
    if not Path(prefix).name:
        raise ValueError(f"The file name {prefix!r} has no name in it. Write one such as video/qvg.")


def places(prefix: str, ending: str, width: int = 0, height: int = 0) -> Iterator[tuple[Path, str]]:
    """Yields numbered paths below the output folder, each with its subfolder; the first number is above all existing ones.

    width, height: pixels, for the tokens. Raises ValueError for a prefix outside the folder or one that cannot be used.
    """
    check_prefix(prefix)
    output = folder_paths.get_output_directory()
    if not (Path(output) / prefix).resolve().is_relative_to(Path(output).resolve()):
        raise ValueError(f"The file name {prefix!r} leads out of {output}. Use a name below it.")
    try:
        folder, name, number, subfolder, _ = folder_paths.get_save_image_path(prefix, output, width, height)
    except (OSError, ValueError) as error:
        raise PlaceError(f"{Path(output) / prefix} cannot be written ({error}). Choose another name.") from None
    return ((Path(folder) / f"{name}_{index:05}_{ending}", subfolder) for index in count(number))
