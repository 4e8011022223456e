"""Files that are written whole or not at all.

A file is written beside its place under a temporary name, synced to the disk, and renamed. A process that is killed at any moment leaves
the old file or the new one, and perhaps a temporary file, which `remove_parts` removes the next time.
"""

from __future__ import annotations

import glob
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

PART = re.compile(r"\.[0-9a-f]{8}\.part")


def part_path(path: Path) -> Path:
    """A temporary name beside `path` that nobody else uses."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")


def remove_parts(path: Path, pattern: str | None = None) -> None:
    """Remove what killed processes left of files at `path`, whose lock is held. pattern: for `glob`, several names beside it."""
    pattern = glob.escape(path.name) if pattern is None else pattern
    for found in path.parent.glob(f"{pattern}.*.part"):
        if PART.fullmatch(found.name[-len(".01234567.part"):]):
            found.unlink(missing_ok=True)


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, then move it there. Raises OSError, which names `path`, if the disk refuses."""
    path = Path(path)
    part = part_path(path)
    try:
        write(part)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
        if hasattr(os, "O_DIRECTORY"):
            # the rename survives a power cut once the folder is on the disk
            folder = os.open(path.parent, os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except (OSError, SafetensorError) as error:
        raise write_error(path, error) from error
    finally:
        part.unlink(missing_ok=True)


def write_error(path: Path, error: Exception) -> OSError:
    """What to raise if writing to `path` failed."""
    return OSError(f"{path} could not be written ({getattr(error, 'strerror', None) or error}). Free some space on the disk, or choose "
                   "another place.")
