"""Whether a file can be written at a place, checked before hours of work go into it."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from ..units import format_bytes
from .atomic import part_path
from .file_names import name_problem


class PlaceError(ValueError):
    """A place that cannot be written to, as a sentence that names it."""


class Taken(PlaceError):
    """A place where a file already exists."""


class InUse(PlaceError):
    """A place that another process is writing to."""


def check_place(path: str | Path, needed_bytes: int = 0) -> None:
    """Raises PlaceError if a file could not be written at `path`: its name, folder, permissions, or space for `needed_bytes` more."""
    path = Path(path)
    if problem := name_problem(path.name):
        raise PlaceError(f"{str(path)!r} {problem}. Choose another name.")
    try:
        if path.is_dir():
            raise PlaceError(f"{path} is a folder. Give the name of a file.")
        if not path.parent.is_dir():
            raise PlaceError(f"{path} cannot be written, because there is no folder {path.parent}. Make it, or choose another place.")
        trial = part_path(path)
        try:
            open(trial, "xb").close()
        finally:
            trial.unlink(missing_ok=True)
        if path.exists() and not os.access(path, os.W_OK):
            raise PlaceError(f"{path} is read-only. Choose another place.")
        free = shutil.disk_usage(path.parent).free
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise PlaceError(f"{path} has too long a name, because it gets a suffix while it is written. Choose a shorter one.") from None
        raise PlaceError(f"{path} cannot be written ({error.strerror or error}). Choose another place.") from None
    if free < needed_bytes:
        raise PlaceError(f"{path} will take up to {format_bytes(needed_bytes)}, but its disk has {format_bytes(free)} left. Free some "
                         "space, or choose another place.")


def same_place(one: Path, two: Path) -> bool:
    """Whether two paths are one file, also on a disk that ignores case."""
    one, two = one.resolve(), two.resolve()
    if one.exists() and two.exists():
        return one.samefile(two)
    return str(one).casefold() == str(two).casefold()
