"""PieceStream: the asyncio end of a generation. The engine thread fills it, one event loop empties it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable

from core.engine.interface import Delta, GenerationRequest, Timings


class PieceStream:
    """Implements `core.engine.interface.Generation`. Everything but `cancel` and `deliver` belongs to its loop."""

    def __init__(self, request: GenerationRequest, interrupt: Callable[[PieceStream], None]) -> None:
        self.loop = asyncio.get_running_loop()
        self.cached_tokens = 0
        self.cancelled = False
        self.expired = False  # the deadline has passed
        # Times on `time.monotonic()`'s clock, set by the engine thread. They are those of the first of n sequences,
        # but for `latest_token_at`.
        self.submitted_at = time.monotonic()
        self.admitted_at: float | None = None
        self.first_token_at: float | None = None
        self.latest_token_at: float | None = None
        self._interrupt = interrupt
        self._items: deque[Delta | Exception] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._unfinished = request.n
        self._timer: asyncio.TimerHandle | None = None
        if request.deadline is not None:
            # Wakes a scheduler that is deep in a long prefill; between steps it looks at the clock itself.
            self._timer = self.loop.call_later(max(0.0, request.deadline - self.submitted_at), self._expire)

    @property
    def ended(self) -> bool:
        """Whether nobody wants more of it."""
        return self.cancelled or self.expired

    @property
    def timings(self) -> Timings:
        now = time.monotonic()
        admitted = now if self.admitted_at is None else self.admitted_at
        first = now if self.first_token_at is None else self.first_token_at
        latest = first if self.latest_token_at is None else self.latest_token_at
        return Timings(
            queue_ms=(admitted - self.submitted_at) * 1000,
            prefill_ms=max(0.0, first - admitted) * 1000,
            decode_ms=(latest - first) * 1000,
        )

    def __aiter__(self) -> PieceStream:
        return self

    async def __anext__(self) -> Delta:
        while not self._items:
            if self.cancelled or self._unfinished == 0:
                raise StopAsyncIteration
            self._waiter = self.loop.create_future()
            await self._waiter
        item = self._items.popleft()
        if isinstance(item, Exception):
            self._end()
            raise item
        if item.finish_reason is not None:
            self._unfinished -= 1
            if self._unfinished == 0:
                self._end()
        return item

    def cancel(self) -> None:
        if not self.cancelled:
            self.cancelled = True
            self._interrupt(self)
            try:
                self.loop.call_soon_threadsafe(self._end)
            except RuntimeError:  # the loop is closed: nobody waits any more
                return

    def put(self, item: Delta | Exception) -> None:
        """On the loop: hand an item to the reader."""
        self._items.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _expire(self) -> None:
        self.expired = True
        self._interrupt(self)

    def _end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def deliver(items: Iterable[tuple[PieceStream, Delta | Exception]]) -> None:
    """From the engine thread: give a step's items to their loops, one wake-up a loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[PieceStream, Delta | Exception]]] = {}
    for stream, item in items:
        by_loop.setdefault(stream.loop, []).append((stream, item))
    for loop, group in by_loop.items():
        try:
            loop.call_soon_threadsafe(_put_all, group)
        except RuntimeError:  # the loop is closed: its readers are gone
            for stream, _ in group:
                stream.cancelled = True


def _put_all(items: list[tuple[PieceStream, Delta | Exception]]) -> None:
    for stream, item in items:
        stream.put(item)
