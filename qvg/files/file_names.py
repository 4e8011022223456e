"""File names that users give, under one rule for every system, so that a graph made on one runs on another.

    relative_path("films/ball", ".safetensors")      # PurePosixPath("films/ball.safetensors")
"""

from __future__ import annotations

import unicodedata
from pathlib import PurePosixPath

FORBIDDEN = '\\:*?"<>|'
# Windows reserves these names for devices, whatever suffix follows
DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(1, 10))}
# bytes in one part of a path on common file systems, and those that a name grows by while its file is written
LONGEST, TEMPORARY = 255, len(".01234567.part")


def relative_path(name: str, suffix: str = "", existing: bool = False) -> PurePosixPath:
    """A name below a folder as a path that cannot leave it. `suffix` (such as ".png") is added if it is missing.

    existing: the file was written before, so names that only some systems refuse are allowed.
    Raises ValueError for a name that leads elsewhere, or that some system cannot store.
    """
    parts = str(name).split("/")
    whole = parts if parts[-1].endswith(suffix) else [*parts[:-1], parts[-1] + suffix]
    for part, stored in zip(parts, whole):
        if reason := _leaves_folder(part) or ("" if existing else _not_portable(stored)):
            raise ValueError(f"The name {name!r} {reason}. Use a plain name, such as 'my video' or 'films/my video'.")
    if any(len(part.encode()) > LONGEST - TEMPORARY for part in whole):
        raise ValueError(f"The name {str(name)[:40]!r}... is too long for a file. Use a shorter one.")
    return PurePosixPath(*whole)


def name_problem(name: str) -> str:
    """What is wrong with the name of a file, as the end of a sentence; "" if nothing is."""
    if not name.strip(" ."):
        return "has no name"
    return _control_character(name) or _not_portable(name)


def _leaves_folder(part: str) -> str:
    """What is wrong with a part of a path on any system, as the end of a sentence; "" if nothing is."""
    if not part.strip(" .") or part.startswith("~"):
        return "is empty, leads out of its folder, or has a part without a name"
    return _control_character(part)


def _control_character(part: str) -> str:
    return "has a control character" if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in part) else ""


def _not_portable(part: str) -> str:
    """What some systems cannot store, or store under another name, as the end of a sentence; "" if nothing is."""
    if found := next((letter for letter in part if letter in FORBIDDEN), ""):
        return f"has a {found!r}, which not every system allows in a file name"
    if part != part.rstrip(" ."):
        return f"ends with a {'dot' if part.endswith('.') else 'space'}, which some systems drop"
    return f"has a part {part!r}, which Windows reserves for a device" if part.partition(".")[0].strip().lower() in DEVICES else ""
