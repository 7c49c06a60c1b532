"""Download models for requests. Requests for the same model share one download."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING

from core import background
from core.errors import Busy

if TYPE_CHECKING:
    from core.store.reference import S3, HuggingFace
    from core.store.source import Progress
    from core.store.store import Fetched, Store

    Key = tuple[HuggingFace | S3, str | None]

MOST = 2  # downloads at once: they share connections, memory and the disk
RETRY_S = 10


class Downloads:
    """The running downloads, each in its own thread. Thread-safe."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._running: dict[Key, _Download] = {}
        self._threads: set[Future[Fetched]] = set()  # including cancelled downloads that have not ended yet

    async def fetch(
        self, reference: HuggingFace | S3, *, sha256: str | None = None, progress: Progress | None = None
    ) -> Fetched:
        """Download a model with `Store.fetch`, or join a download of it. `progress` is called in the download's thread.

        The download stops when the last request for it is cancelled; a later one can resume it. Raises Busy if MOST
        other downloads are running, and what `Store.fetch` raises.
        """
        key, request = (reference, sha256), object()
        with self._lock:
            download = self._running.get(key)
            if download is not None:
                download.join(request, progress)
            else:
                download = _Download()
                download.join(request, progress)
                self._start(download, key)
        try:
            return await asyncio.wrap_future(download.future)
        finally:
            with self._lock:
                del download.requests[request]
                if not download.requests:
                    download.stop.set()
                    if self._running.get(key) is download:
                        del self._running[key]

    def _start(self, download: _Download, key: Key) -> None:
        if len(self._threads) >= MOST:
            names = " and ".join(str(reference) for reference, _ in self._running) or "downloads that are ending"
            raise Busy(f"At most {MOST} downloads run at once (now: {names}). Try again later.", retry_after=RETRY_S)
        reference, sha256 = key
        download.future = background.start(
            "download",
            lambda: self._store.fetch(
                reference, sha256=sha256, progress=download.report, cancelled=download.stop.is_set
            ),
        )
        self._running[key] = download
        self._threads.add(download.future)
        download.future.add_done_callback(self._threads.discard)


class _Download:
    """One download and the requests that wait for it."""

    future: Future[Fetched]

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.requests: dict[object, Progress | None] = {}
        self._reached: tuple[int, int] | None = None

    def join(self, request: object, progress: Progress | None) -> None:
        """Add a request that waits, and report the current progress to it."""
        self.requests[request] = progress
        if progress is not None and self._reached is not None:
            progress(*self._reached)

    def report(self, done: int, total: int) -> None:
        """Called in the download's thread."""
        self._reached = (done, total)
        for progress in tuple(self.requests.values()):
            if progress is not None:
                progress(done, total)
