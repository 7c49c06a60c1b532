"""Write a model file that is being downloaded: `.<file>.<version>.part` next to its target, renamed once verified."""

from __future__ import annotations

import glob
import hashlib
import os
from pathlib import Path

from core.errors import ModelUnavailable
from core.store import gguf
from core.store.lock import Lock
from core.store.source import Cancelled, DownloadCancelled, RemoteFile
from core.store.versions import sync_folder

_CHUNK = 4 << 20
_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW


class PartialFile:
    """Implements `core.store.source.Partial`. Open it with the model's lock held.

    The lock's note is "<version> <bytes>", counted over all files of the model. Only a later try of the same version
    resumes. `start` is where this file begins in that count. Without an exclusive lock the file has a unique name and
    is never resumed.
    """

    def __init__(self, target: Path, file: RemoteFile, version: str, lock: Lock, start: int = 0) -> None:
        unique = "" if lock.exclusive else f"-{os.urandom(4).hex()}"
        self.path = target.with_name(f".{target.name}.{version}{unique}.part")
        self.size = file.size_bytes
        self.done = 0
        self._target = target
        self._lock = lock
        self._version = version
        self._start = start
        if lock.exclusive:
            self._remove_strays()
            self.done = self._arrived()
        if self.done == 0:
            # A new inode: a process that still writes to the old file, or has verified it, does not touch this one.
            self.path.unlink(missing_ok=True)
        self.fd = os.open(self.path, _FLAGS if self.done else _FLAGS | os.O_CREAT | os.O_EXCL, 0o644)

    def _remove_strays(self) -> None:
        """Remove the partial files of other versions."""
        for stray in self.path.parent.glob(f".{glob.escape(self._target.name)}.*.part"):
            if stray != self.path:
                stray.unlink(missing_ok=True)

    def _arrived(self) -> int:
        version, noted = read_note(self._lock.note)
        arrived = min(max(noted - self._start, 0), self.size)
        try:
            length = self.path.lstat().st_size
        except FileNotFoundError:
            return 0
        return arrived if version == self._version and arrived <= length <= self.size else 0

    def landed(self, offset: int) -> None:
        self.done = offset
        if self._lock.exclusive:
            self._lock.note = f"{self._version} {self._start + offset}"

    def sha256(self, cancelled: Cancelled) -> str:
        """Return the sha256 of the file on the disk. Raise DownloadCancelled."""
        return sha256_of(self.fd, cancelled)

    def check(self) -> gguf.Header:
        """Return the GGUF header. Raise MalformedGGUF."""
        return gguf.parse_header(lambda offset, length: os.pread(self.fd, length, offset), os.fstat(self.fd).st_size)

    def check_size(self) -> None:
        """Raise ModelUnavailable unless the file has its full size."""
        size = os.fstat(self.fd).st_size
        if size != self.size:
            raise ModelUnavailable(f"{size} bytes of {self._target.name!r} arrived, expected {self.size}. Try again.")

    def sync(self) -> os.stat_result:
        """Flush the file to the disk. Its modification time does not change afterwards."""
        os.fsync(self.fd)
        return os.fstat(self.fd)

    def publish(self) -> None:
        """Rename to the target, durably. Raise ModelUnavailable if the path no longer names the verified file."""
        try:
            named = self.path.lstat()
        except FileNotFoundError:
            named = None
        if named is None or not os.path.samestat(named, os.fstat(self.fd)):
            raise ModelUnavailable(f"Another process replaced what arrived of {self._target.name!r}. Try again.")
        self.path.replace(self._target)
        sync_folder(self._target.parent)

    def discard(self) -> None:
        """Remove this file. Files before it can still be resumed."""
        self.path.unlink(missing_ok=True)
        self.landed(0)

    def close(self) -> None:
        """Close the file, and remove it if it is empty or cannot be resumed."""
        os.close(self.fd)
        if (self.done == 0 and self.size) or not self._lock.exclusive:
            self.path.unlink(missing_ok=True)


def read_note(note: str) -> tuple[str, int]:
    """Return (version, bytes received) of a lock's note."""
    version, _, received = note.partition(" ")
    return (version, int(received)) if received.isascii() and received.isdigit() else ("", 0)


def sha256_of(descriptor: int, cancelled: Cancelled) -> str:
    """Return the sha256 of an open file in lower-case hex, read in pieces of 4 MiB. Raise DownloadCancelled."""
    digest = hashlib.sha256()
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    offset = 0
    while count := os.preadv(descriptor, [buffer], offset):
        if cancelled():
            raise DownloadCancelled
        digest.update(view[:count])
        offset += count
    return digest.hexdigest()
