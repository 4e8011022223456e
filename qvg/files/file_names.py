"""Names that a person gives to files of this pack, under one rule for every system, so that a graph made on one runs on another.

    relative("films/ball", ".safetensors")      # PurePosixPath("films/ball.safetensors")
"""

from __future__ import annotations

import unicodedata
from pathlib import PurePosixPath

FORBIDDEN = '\\:*?"<>|'
# names that Windows gives to devices, whatever ending follows
DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(1, 10))}
LONGEST = 255  # bytes that common file systems allow a part of a path
BESIDE = len(".01234567.part")  # what a file's name grows by while it is written


def relative(name: str, ending: str = "", existing: bool = False) -> PurePosixPath:
    """A name below a folder as a path that cannot lead out of it; `ending` (such as ".png") is added where it is missing.

    existing: the file was written before, so that what only some systems refuse is let pass.
    Raises ValueError for a name that leads elsewhere, or that some system cannot store.
    """
    parts = str(name).split("/")
    whole = parts if parts[-1].endswith(ending) else [*parts[:-1], parts[-1] + ending]
    for part, stored in zip(parts, whole):
        if reason := _leads_out(part) or ("" if existing else _not_everywhere(stored)):
            raise ValueError(f"The name {name!r} {reason}. Use a plain name, such as 'my video' or 'films/my video'.")
    parts = whole
    if any(len(part.encode()) > LONGEST - BESIDE for part in parts):
        raise ValueError(f"The name {str(name)[:40]!r}... is too long for a file. Use a shorter one.")
    return PurePosixPath(*parts)


def fault(name: str) -> str:
    """What is wrong with the name of a file, as the end of a sentence; "" where nothing is."""
    if not name.strip(" ."):
        return "has no name"
    return _control(name) or _not_everywhere(name)


def _leads_out(part: str) -> str:
    """What is wrong with a part of a path on any system, as the end of a sentence; "" where nothing is."""
    if not part.strip(" .") or part.startswith("~"):
        return "is empty, leads out of its folder, or has a part without a name"
    return _control(part)


def _control(part: str) -> str:
    return "has a control character" if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in part) else ""


def _not_everywhere(part: str) -> str:
    """The same for what some systems cannot store, or store under another name."""
    if found := next((letter for letter in part if letter in FORBIDDEN), ""):
        return f"has a {found!r}, which a file's name cannot hold on every system"
    if part != part.rstrip(" ."):
        return "ends with a space, or ends with a dot, which some systems drop"
    return f"has a part {part!r}, which Windows keeps for a device" if part.partition(".")[0].strip().lower() in DEVICES else ""
