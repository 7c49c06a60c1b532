"""Downloads run in their own threads; they are shared, limited and cancelled with their last waiter."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from core.downloads import Downloads
from core.errors import Busy, ModelUnavailable
from core.store.reference import HuggingFace
from core.store.source import DownloadCancelled
from tests.fakes import FakeStore

A, B, C = (HuggingFace("org/repo", f"{name}.gguf", "main") for name in "abc")


class GatedStore(FakeStore):
    """A store whose downloads last until `gate` is set or they are cancelled. It records their threads."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.threads: list[str] = []
        self.stopped = 0
        self.on_fetch = self._download

    def _download(self, progress: Any, cancelled: Callable[[], bool]) -> None:
        self.threads.append(threading.current_thread().name)
        progress(1, 100)
        while not self.gate.wait(0.005):
            if cancelled():
                self.stopped += 1
                raise DownloadCancelled("given up")


async def eventually(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.005)


def test_the_same_model_is_downloaded_once() -> None:
    """Six requests for one file share a download; each gets the progress and the result."""

    async def main() -> None:
        store = GatedStore()
        downloads = Downloads(store)  # type: ignore[arg-type]
        reported: list[int] = []
        waiting = [
            asyncio.create_task(downloads.fetch(A, progress=lambda _done, _total, at=at: reported.append(at)))
            for at in range(6)
        ]
        await eventually(lambda: 0 in reported)
        store.gate.set()
        assert await asyncio.gather(*waiting) == [store.fetched] * 6
        assert store.fetches == [(A, None)]

    asyncio.run(main())


def test_downloads_do_not_block_the_default_executor() -> None:
    """Prompts are built there, whatever the number of waiting downloads."""

    async def main() -> None:
        store = GatedStore()
        downloads = Downloads(store)  # type: ignore[arg-type]
        waiting = [asyncio.create_task(downloads.fetch(A)) for _ in range(40)]
        await eventually(lambda: len(store.threads) == 1)
        assert await asyncio.wait_for(asyncio.to_thread(lambda: "built"), 10) == "built"
        store.gate.set()
        await asyncio.gather(*waiting)
        assert store.threads == ["download"]

    asyncio.run(main())


def test_a_third_download_is_refused_as_busy() -> None:
    """The error names the running downloads and has a Retry-After."""

    async def main() -> None:
        store = GatedStore()
        downloads = Downloads(store)  # type: ignore[arg-type]
        waiting = [asyncio.create_task(downloads.fetch(reference)) for reference in (A, B)]
        await eventually(lambda: len(store.threads) == 2)
        with pytest.raises(Busy, match=r"a\.gguf.*b\.gguf") as caught:
            await downloads.fetch(C)
        assert caught.value.retry_after
        store.gate.set()
        await asyncio.gather(*waiting)
        assert await downloads.fetch(C) == store.fetched

    asyncio.run(main())


def test_a_download_is_cancelled_with_its_last_waiter() -> None:
    """It continues while another request waits for it, and can be started again afterwards."""

    async def main() -> None:
        store = GatedStore()
        downloads = Downloads(store)  # type: ignore[arg-type]
        first, second = (asyncio.create_task(downloads.fetch(A)) for _ in range(2))
        await eventually(lambda: len(store.threads) == 1)
        await give_up(first)
        assert store.stopped == 0
        await give_up(second)
        await eventually(lambda: store.stopped == 1)

        store.gate.set()
        await eventually(lambda: not downloads._threads)
        assert await downloads.fetch(A) == store.fetched

    asyncio.run(main())


def test_all_waiters_get_the_error() -> None:
    """Requests that share a download share its error."""

    async def main() -> None:
        store = GatedStore()
        store.fetch_error = ModelUnavailable("The disk is full.")
        downloads = Downloads(store)  # type: ignore[arg-type]
        waiting = [asyncio.create_task(downloads.fetch(A)) for _ in range(2)]
        await eventually(lambda: len(store.threads) == 1)
        store.gate.set()
        answers = await asyncio.gather(*waiting, return_exceptions=True)
        assert [str(answer) for answer in answers] == ["The disk is full."] * 2

    asyncio.run(main())


async def give_up(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
