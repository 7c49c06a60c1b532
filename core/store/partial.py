"""Partial: a model file on its way in, `.<file>.part` beside its target. Verified as a whole, then renamed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from core.errors import ModelUnavailable
from core.store import gguf
from core.store.lock import Lock
from core.store.source import Cancelled, DownloadCancelled, RemoteFile

_CHUNK = 4 << 20


class PartialFile:
    """Implements `core.store.source.Partial`. Open it with the target's lock held.

    The lock's note is "<version> <bytes>": what arrived counts for a later try of the same version only.
    """

    def __init__(self, target: Path, file: RemoteFile, version: str, lock: Lock) -> None:
        self.path = target.with_name(f".{target.name}.part")
        self.size = file.size_bytes
        self._target = target
        self._lock = lock
        self._version = hashlib.sha256(f"{version} {file.size_bytes}".encode()).hexdigest()[:32]
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        self.done = self._arrived()
        if self.done == 0:
            os.ftruncate(self.fd, 0)

    def _arrived(self) -> int:
        version, done = read_note(self._lock.note)
        # After a crash of the machine the note may be ahead of the data; the whole sha256 is what counts in the end.
        return done if version == self._version and done <= min(self.size, os.fstat(self.fd).st_size) else 0

    def landed(self, offset: int) -> None:
        self.done = offset
        self._lock.note = f"{self._version} {offset}"

    def sha256(self, cancelled: Cancelled) -> str:
        """Of what is on the disk. Raises DownloadCancelled."""
        return sha256_of(self.fd, cancelled)

    def check(self) -> gguf.Header:
        """The GGUF header. Raises MalformedGGUF."""
        return gguf.parse_header(lambda offset, length: os.pread(self.fd, length, offset), os.fstat(self.fd).st_size)

    def check_size(self) -> None:
        """Raises ModelUnavailable unless all bytes are there."""
        found = os.fstat(self.fd).st_size
        if found != self.size:
            raise ModelUnavailable(f"{found} bytes of {self._target.name!r} arrived, expected {self.size}. Try again.")

    def sync(self) -> os.stat_result:
        """Have it on the disk; its time no longer changes after that."""
        os.fsync(self.fd)
        return os.fstat(self.fd)

    def publish(self) -> None:
        """Give it its name, durably: from now on it is a model."""
        self.path.replace(self._target)
        folder = os.open(self._target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def discard(self) -> None:
        """Nothing of it is of use: leave no file behind."""
        self.path.unlink(missing_ok=True)
        self._lock.remove()

    def close(self) -> None:
        """Ends the try. What has not begun to arrive leaves no file."""
        os.close(self.fd)
        if self.done == 0 and self.size:
            self.discard()


def read_note(note: str) -> tuple[str, int]:
    """(version, bytes that arrived) of a lock's note."""
    version, _, done = note.partition(" ")
    return (version, int(done)) if done.isascii() and done.isdigit() else ("", 0)


def sha256_of(descriptor: int, cancelled: Cancelled) -> str:
    """Of the whole open file, in lower-case hex; at most some MiB in memory. Raises DownloadCancelled."""
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
