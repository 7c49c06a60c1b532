"""Downloads: threads of their own, shared and bounded, and what remains of one when nobody waits for it."""

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
    """Downloads until `gate` is set or it is told to stop; keeps which threads it ran in."""

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
    """Six machines that deploy at once ask for the same file; each is told the progress and the result."""

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


def test_downloads_leave_the_executor_to_the_prompts() -> None:
    """However many wait, a prompt is built at once."""

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


def test_a_third_download_is_told_to_come_back() -> None:
    """With what is running, and Retry-After."""

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


def test_a_download_goes_on_while_somebody_waits_for_it() -> None:
    """The first request gives up, the second gets the model; when the last one gives up, the thread is told."""

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


def test_a_failure_is_everyones() -> None:
    """Those that share a download share its error."""

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
