"""Receive a model into a memfd, which llama.cpp maps through /proc/self/fd/N without a copy.

The weights exist once, as shared memory. They need no ephemeral storage and disappear with the process. Linux only.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

from adapters.transfer.transfer import Transfer
from core.errors import InvalidRequest
from core.store import gguf
from core.store.model_file import ModelFile
from core.store.source import Cancelled, DownloadCancelled, Progress, RemoteModel

POLL_S = 0.05  # how often progress is reported and cancellation checked


class MemoryFile:
    """A memfd of fixed size. `release` closes it; existing mappings keep its bytes."""

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


def follow(transfer: Transfer, progress: Progress, cancelled: Cancelled, offset: int | None = None) -> None:
    """Wait until all bytes before `offset` are written, or until the whole is verified, and report progress.

    Raise ModelUnavailable if the transfer fails. Cancel it and raise DownloadCancelled if `cancelled()` is true.
    """
    while True:
        complete = transfer.finish(POLL_S) if offset is None else transfer.wait_for(offset, POLL_S)
        progress(*transfer.progress())
        if complete:
            return
        if cancelled():
            transfer.cancel()
            raise DownloadCancelled


def receive(
    remote: RemoteModel,
    begin: Callable[[int], Transfer],
    name: str,
    progress: Progress,
    cancelled: Cancelled,
    *,
    whole: bool,
) -> ModelFile:
    """Receive a model of one file through the transfer that `begin` makes for a descriptor.

    With `whole`, return once every byte is verified. Otherwise return once header and vocabulary are; the rest is the
    model's `arrival`. The model's `release` stops the transfer and closes the memory; it is idempotent. Raise
    InvalidRequest if the file is not a GGUF that llama.cpp can load, ModelUnavailable or DownloadCancelled.
    """
    file = remote.files[0]
    target = MemoryFile(name, file.size_bytes)
    transfer = begin(target.fd)

    def release() -> None:
        transfer.cancel()  # no effect once complete; otherwise waits until no thread uses the descriptor
        target.release()

    def pread(offset: int, length: int) -> bytes:
        follow(transfer, progress, cancelled, offset + length)
        return os.pread(target.fd, length, offset)

    try:
        transfer.start()
        if whole:  # verify first: damaged bytes must be reported as such, not as a malformed file
            follow(transfer, progress, cancelled)
        # A file with a manifest passed this check before it was uploaded.
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
        source=remote.source,
        sha256=file.sha256,
        commit=remote.commit,
        arrival=None if whole else transfer,
        release=release,
    )
