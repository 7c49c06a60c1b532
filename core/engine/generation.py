"""A running generation: the asyncio stream that a client reads, and its n sequences in the engine thread."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from core.engine.detokenizer import TextStream
from core.engine.interface import Delta, GenerationRequest, Timings

if TYPE_CHECKING:
    from core.engine.cache import Slot
    from core.engine.sampling import Sampler


class GenerationStream:
    """Implements `core.engine.interface.Generation`. Everything but `cancel` and `deliver` belongs to its loop."""

    def __init__(self, request: GenerationRequest, interrupt: Callable[[GenerationStream], None]) -> None:
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

    def __aiter__(self) -> GenerationStream:
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


def deliver(items: Iterable[tuple[GenerationStream, Delta | Exception]]) -> None:
    """From the engine thread: give a step's items to their loops, one wake-up a loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[GenerationStream, Delta | Exception]]] = {}
    for stream, item in items:
        by_loop.setdefault(stream.loop, []).append((stream, item))
    for loop, group in by_loop.items():
        try:
            loop.call_soon_threadsafe(_put_all, group)
        except RuntimeError:  # the loop is closed: its readers are gone
            for stream, _ in group:
                stream.cancelled = True


def _put_all(items: list[tuple[GenerationStream, Delta | Exception]]) -> None:
    for stream, item in items:
        stream.put(item)


class Sequence:
    """`tokens` holds prompt and answer; those from `slot.tokens` on are still to be decoded."""

    __slots__ = (
        "admitted",
        "begun",
        "index",
        "matcher",
        "n_prompt",
        "parent",
        "prefill",
        "request",
        "sampler",
        "slot",
        "stream",
        "text",
        "tokens",
    )

    def __init__(
        self,
        request: GenerationRequest,
        index: int,
        stream: GenerationStream,
        sampler: Sampler,
        matcher: Any,
        parent: Sequence | None,
    ) -> None:
        self.request = request
        self.index = index
        self.stream = stream
        self.sampler = sampler
        self.matcher = matcher
        self.parent = parent  # the sequence that reads the shared prompt; None for that one itself
        self.tokens = list(request.prompt)
        self.n_prompt = len(self.tokens)
        self.text = TextStream(request.stop)
        self.slot: Slot | None = None
        self.admitted = 0
        self.prefill = self.n_prompt  # its first tokens, which are read before it decodes; after a pause all it had
        self.begun = False  # has been admitted once: a paused sequence is not a new one

    @property
    def produced(self) -> int:
        return len(self.tokens) - self.n_prompt

    @property
    def decoded(self) -> int:
        """Tokens whose keys and values are in the cache."""
        return len(self.slot.tokens) if self.slot else 0

    @property
    def pending(self) -> int:
        """Tokens not decoded yet. One: decoding; more: prefill, or forced tokens."""
        return len(self.tokens) - self.decoded

    @property
    def reading(self) -> bool:
        return self.decoded < self.prefill

    def growth(self, n_limit: int) -> int:
        """The most tokens it may still gain; no sequence has more than `n_limit`."""
        room = n_limit - len(self.tokens)
        return room if self.request.max_tokens is None else min(room, self.request.max_tokens - self.produced)
