"""Lock: one process at a time fills a file. A `flock` on `.<file>.lock`, whose text says how much has arrived.

The kernel releases it however its holder ends. Where the file system has no flock, a lock is held without being
exclusive, and says so: its holders share no file then (`core.store.partial`). Where flock works within one host only
(NFS with `nolock`), two holders may both believe to be alone. They share a partial file only if they write the same
version into it, and none publishes a file that another one has replaced.
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
    """Held. `note` survives the holder: the next one reads where to go on. Not `exclusive`: there is no flock here."""

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
        """Take the lock file away: nothing is left to resume. Others that wait for it see that and lock anew."""
        self._path.unlink(missing_ok=True)


@contextmanager
def hold(file: Path, cancelled: Cancelled, waiting: Callable[[str], None]) -> Iterator[Lock]:
    """Wait for the lock of `file`; `waiting(note)` is called meanwhile. Raises DownloadCancelled, OSError."""
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
    """True: locked. False: there are no locks here. None: another holds it."""
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
    """Whether the lock file is still there: its last holder may have removed it while we waited."""
    try:
        return os.fstat(descriptor).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


def _read_note(descriptor: int) -> str:
    return os.pread(descriptor, 256, 0).decode("ascii", "replace").strip()
