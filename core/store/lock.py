"""Let one process at a time download a file: a `flock` on `.<file>.lock`, whose text records the progress.

The kernel releases the lock however its holder ends. On a file system without flock the lock is not exclusive, and
its holders use separate partial files (`core.store.partial`). Where flock works within one host only (NFS with
`nolock`), two hosts may hold it at once. They share a partial file only for the same version, and neither publishes a
file that the other has replaced.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from core.store.source import Cancelled, DownloadCancelled

POLL_S = 0.1


def path_of(file: Path) -> Path:
    return file.with_name(f".{file.name}.lock")


class Lock:
    """A lock that is held. `note` survives its holder: the next one resumes from it. Without flock, not `exclusive`."""

    def __init__(self, descriptor: int, path: Path, *, exclusive: bool) -> None:
        self._descriptor = descriptor
        self._path = path
        self.exclusive = exclusive

    @property
    def note(self) -> str:
        return _read_note(self._descriptor)

    @note.setter
    def note(self, text: str) -> None:
        os.pwrite(self._descriptor, text.ljust(120).encode() + b"\n", 0)

    def remove(self) -> None:
        """Remove the lock file, because nothing is left to resume. Waiting processes notice and create a new one."""
        self._path.unlink(missing_ok=True)


@contextmanager
def hold(file: Path, cancelled: Cancelled, waiting: Callable[[str], None]) -> Iterator[Lock]:
    """Wait for the lock of `file`, and call `waiting(note)` meanwhile. Raise DownloadCancelled or OSError."""
    path = path_of(file)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            while (exclusive := _try_lock(descriptor)) is None:
                if cancelled():
                    raise DownloadCancelled
                waiting(_read_note(descriptor))
                time.sleep(POLL_S)
            if _is_current(descriptor, path):
                yield Lock(descriptor, path, exclusive=exclusive)
                return
        finally:
            os.close(descriptor)


def _try_lock(descriptor: int) -> bool | None:
    """Return True if locked, False if the file system has no locks, None if another process holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EINTR):
            return None
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        return False
    return True


def _is_current(descriptor: int, path: Path) -> bool:
    """Return whether the lock file still exists: its last holder may have removed it."""
    try:
        return os.fstat(descriptor).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


def _read_note(descriptor: int) -> str:
    return os.pread(descriptor, 256, 0).decode("ascii", "replace").strip()
