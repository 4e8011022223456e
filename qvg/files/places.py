"""Places on disk: tried before hours of work go into them, one writer at a time, and every file whole or not there.

    check_place(path, needed_bytes)             # a sentence now instead of a failure at the first checkpoint
    lock = Lock(path)                           # refused while another process writes there
    write_atomically(path, write)
    lock.release()

A file is written beside its place under a name that no other process uses, flushed to the disk, and renamed: whoever is killed at any
moment leaves the old file or the new one, and a part that `remove_parts` takes away the next time.
"""

from __future__ import annotations

import errno
import glob
import os
import re
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from ..units import format_bytes
from .file_names import fault

try:
    import fcntl
except ImportError:
    # Windows
    fcntl = None
    import msvcrt

PART = re.compile(r"\.[0-9a-f]{8}\.part")
LOCK = ".lock"
UNSUPPORTED = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}


class PlaceError(ValueError):
    """A place that cannot be written to, as a sentence that names it."""


class Taken(PlaceError):
    """A place where something is already."""


class InUse(PlaceError):
    """A place that another process is writing to."""


def check_place(path: str | Path, needed_bytes: int = 0) -> None:
    """Raises PlaceError where a file could not be put at `path`: name, folder, permission, or room for `needed_bytes` more."""
    path = Path(path)
    if wrong := fault(path.name):
        raise PlaceError(f"{str(path)!r} {wrong}. Choose another name.")
    try:
        if path.is_dir():
            raise PlaceError(f"{path} is a folder. Give the name of a file.")
        if not path.parent.is_dir():
            raise PlaceError(f"{path} cannot be written, because there is no folder {path.parent}. Make it, or choose another place.")
        trial = part_of(path)
        try:
            open(trial, "xb").close()
        finally:
            trial.unlink(missing_ok=True)
        if path.exists() and not os.access(path, os.W_OK):
            raise PlaceError(f"{path} may not be written to. Choose another place.")
        free = shutil.disk_usage(path.parent).free
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise PlaceError(f"{path} has too long a name, for it needs an ending while it is written. Choose a shorter one.") from None
        raise PlaceError(f"{path} cannot be written ({error.strerror or error}). Choose another place.") from None
    if free < needed_bytes:
        raise PlaceError(f"{path} will take up to {format_bytes(needed_bytes)}, but its disk has {format_bytes(free)} left. Make room, or "
                         "choose another place.")


def part_of(path: Path) -> Path:
    """A name beside `path` that nobody else uses, to write it under."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")


def remove_parts(path: Path, pattern: str | None = None) -> None:
    """Take away what killed processes left of files at `path`, whose lock is held; pattern: for `glob`, of several names beside it."""
    pattern = glob.escape(path.name) if pattern is None else pattern
    for found in path.parent.glob(f"{pattern}.*.part"):
        if PART.fullmatch(found.name[-len(".01234567.part"):]):
            found.unlink(missing_ok=True)


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, then put it there whole. Raises OSError, which names `path`, where the disk refuses."""
    path = Path(path)
    part = part_of(path)
    try:
        write(part)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
        if hasattr(os, "O_DIRECTORY"):
            # the rename itself is safe from a power cut once the folder is on the disk
            folder = os.open(path.parent, os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except (OSError, SafetensorError) as error:
        raise failed(path, error) from error
    finally:
        part.unlink(missing_ok=True)


def failed(path: Path, error: Exception) -> OSError:
    """What to raise where writing to `path` failed."""
    return OSError(f"{path} could not be written ({getattr(error, 'strerror', None) or error}). Make room on the disk or choose another "
                   "place.")


class Lock:
    """One writer of `path` at a time, in this process or another. Held until `release`, or until the process ends, however it ends.

    Raises InUse where another holds it. A file system that knows no locks is trusted to have one writer.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.place = self.path.with_name(self.path.name + LOCK)
        self._file = None
        while self._file is None:
            try:
                file = open(self.place, "ab")
            except OSError as error:
                raise PlaceError(f"{self.path} cannot be written ({error.strerror}). Choose another place.") from None
            try:
                _hold(file)
                self._file = file if _is_at(file, self.place) else None
            except BlockingIOError:
                raise InUse(f"{self.path} is being written by another run. Wait until it has ended, or choose another place.") from None
            finally:
                if self._file is None:
                    file.close()

    @property
    def held(self) -> bool:
        return self._file is not None

    def release(self) -> None:
        """Let others write. Does nothing the second time."""
        file, self._file = self._file, None
        if file is None:
            return
        if fcntl is not None:
            # while it is held, so that nobody takes a lock on a file that is about to go
            self.place.unlink(missing_ok=True)
        file.close()
        if fcntl is None:
            with suppress(OSError):
                # Windows removes no open file; where another process holds it by now, it stays
                self.place.unlink(missing_ok=True)


def _hold(file) -> None:
    """Raises BlockingIOError where another has the lock."""
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise BlockingIOError(error.errno, error.strerror) from None


def _is_at(file, place: Path) -> bool:
    """Whether an open file is still the one of its name: who held the lock before may have removed it in between."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(place))
    except FileNotFoundError:
        return False


def same_place(one: Path, two: Path) -> bool:
    """Whether two paths are one file, also on a disk that ignores case."""
    one, two = one.resolve(), two.resolve()
    if one.exists() and two.exists():
        return one.samefile(two)
    return str(one).casefold() == str(two).casefold()
