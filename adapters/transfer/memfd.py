"""Memory: a model received into a memfd, which llama.cpp maps through /proc/self/fd/N without a copy.

The weights then exist once, as shared memory, need no ephemeral storage, and are gone with the process. Linux only.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from adapters.transfer.transfer import Transfer
from core.errors import InvalidRequest
from core.store import gguf
from core.store.model_file import ModelFile
from core.store.source import Cancelled, DownloadCancelled, Progress, RemoteModel

POLL_S = 0.05  # how often progress is told and a cancellation noticed


class MemoryFile:
    """A memfd of fixed size. `release` closes it; what has mapped it keeps its bytes."""

    def __init__(self, name: str, size: int) -> None:
        self.fd = os.memfd_create(name[:200], os.MFD_CLOEXEC)
        self.path = Path(f"/proc/self/fd/{self.fd}")
        self._lock = threading.Lock()
        self._open = True
        os.ftruncate(self.fd, size)

    def release(self) -> None:
        """Idempotent."""
        with self._lock:
            if self._open:
                self._open = False
                os.close(self.fd)


def is_supported() -> bool:
    return sys.platform.startswith("linux") and hasattr(os, "memfd_create")


def follow(transfer: Transfer, progress: Progress, cancelled: Cancelled, offset: int | None = None) -> None:
    """Wait for the bytes before `offset`, or for all of them verified, telling progress meanwhile.

    Raises ModelUnavailable if the transfer fails, DownloadCancelled if `cancelled()` says so; the latter ends it.
    """
    while True:
        there = transfer.finish(POLL_S) if offset is None else transfer.wait_for(offset, POLL_S)
        progress(*transfer.progress())
        if there:
            return
        if cancelled():
            transfer.cancel()
            raise DownloadCancelled


def receive(
    found: RemoteModel,
    begin: Callable[[int], Transfer],
    name: str,
    progress: Progress,
    cancelled: Cancelled,
    *,
    whole: bool,
) -> ModelFile:
    """Receive a model of one file through the transfer that `begin` makes for a descriptor.

    Returns when all is there and verified, or unless `whole` when header and vocabulary are: the rest is then its
    `arrival`. Its `release` ends what still arrives and closes the memory; idempotent. Raises InvalidRequest if
    it is no GGUF that llama.cpp may see, ModelUnavailable, DownloadCancelled.
    """
    file = found.files[0]
    target = MemoryFile(name, file.size_bytes)
    transfer = begin(target.fd)

    def release() -> None:
        transfer.cancel()  # a no-op when it is complete; else nothing writes to the descriptor any more
        target.release()

    def pread(offset: int, length: int) -> bytes:
        follow(transfer, progress, cancelled, offset + length)
        return os.pread(target.fd, length, offset)

    try:
        transfer.start()
        if whole:  # first: bytes that arrived damaged are to be called that, not the file malformed
            follow(transfer, progress, cancelled)
        # What has a manifest came through a store, which checked it before.
        header = gguf.parse_header(pread, file.size_bytes, checked=not whole)
        follow(transfer, progress, cancelled, header.data_offset)
    except gguf.MalformedGGUF as error:
        release()
        raise InvalidRequest(f"{file.path!r} {error}. It cannot be served.", param="filename") from error
    except BaseException:
        release()
        raise
    return ModelFile(
        name=name,
        path=target.path,
        size_bytes=file.size_bytes,
        reference=str(found.reference),
        source=found.source,
        sha256=file.sha256,
        commit=found.commit,
        arrival=None if whole else transfer,
        release=release,
    )
