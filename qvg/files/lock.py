"""One writer of a file at a time, across processes."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from .places import InUse, PlaceError

try:
    import fcntl
except ImportError:
    # Windows
    fcntl = None
    import msvcrt

SUFFIX = ".lock"
UNSUPPORTED = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}


class Lock:
    """Held from construction until `release`, or until the process ends, however it ends.

    Raises InUse if another process or run holds it, and PlaceError if no file can be made beside `path`. On a file system without
    locks, nothing is refused.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.place = self.path.with_name(self.path.name + SUFFIX)
        self._file = None
        while self._file is None:
            try:
                file = open(self.place, "ab")
            except OSError as error:
                raise PlaceError(f"{self.path} cannot be written ({error.strerror}). Choose another place.") from None
            try:
                _acquire(file)
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
            # while it is held, so that nobody locks a file that is about to be removed
            self.place.unlink(missing_ok=True)
        file.close()
        if fcntl is None:
            with suppress(OSError):
                # Windows cannot remove an open file; if another process holds the lock by now, it stays
                self.place.unlink(missing_ok=True)


def _acquire(file) -> None:
    """Raises BlockingIOError if another holds the lock."""
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
    """Whether an open file is still the one at `place`: the previous holder may have removed it in between."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(place))
    except FileNotFoundError:
        return False
