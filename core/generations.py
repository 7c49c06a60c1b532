"""Run several generations of one client together, as one generation with one stream of deltas."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence

from msgspec.structs import replace

from core.engine.interface import Delta, Engine, Generation, GenerationRequest, Timings
from core.errors import Busy
from core.metrics import Histogram, token_intervals


class Generations:
    """Implements `core.engine.interface.Generation` for several requests, which all have the same `n`.

    The deltas of sequence `j` of request `i` have the index `i * n + j`. At most as many requests run at once as the
    engine has slots for, so one client does not fill the queue. An error of one request ends all of them. Belongs to
    one event loop.
    """

    def __init__(self, engine: Engine, requests: Sequence[GenerationRequest]) -> None:
        self._engine = engine
        self._todo = deque(enumerate(requests))
        self._started: list[Generation] = []
        self._deltas: asyncio.Queue[Delta | BaseException] = asyncio.Queue()
        self._unfinished = sum(request.n for request in requests)
        self._cancelled = False
        self._first_at: float | None = None
        self._latest_at = 0.0
        lanes = min(len(requests), max(1, engine.config.n_parallel // requests[0].n))
        self._lanes = [asyncio.ensure_future(self._run()) for _ in range(lanes)]

    @property
    def cached_tokens(self) -> int:
        return sum(generation.cached_tokens for generation in self._started)

    @property
    def token_intervals(self) -> Histogram:
        intervals = token_intervals()
        for generation in self._started:
            intervals.add(generation.token_intervals)
        return intervals

    @property
    def timings(self) -> Timings:
        """Queue and prefill are those of the first request; decode lasts until the last token of all requests."""
        if self._first_at is None:
            return Timings()
        first = self._started[0].timings
        return Timings(first.queue_ms, first.prefill_ms, (self._latest_at - self._first_at) * 1000)

    def __aiter__(self) -> Generations:
        return self

    async def __anext__(self) -> Delta:
        if self._cancelled or self._unfinished == 0:
            raise StopAsyncIteration
        delta = await self._deltas.get()
        if isinstance(delta, BaseException):
            self.cancel()
            raise delta
        self._latest_at = time.monotonic()
        if self._first_at is None:
            self._first_at = self._latest_at
        if delta.finish_reason is not None:
            self._unfinished -= 1
        return delta

    def cancel(self) -> None:
        self._todo.clear()
        for generation in self._started:
            generation.cancel()
        if not self._cancelled:
            self._cancelled = True
            self._deltas.put_nowait(StopAsyncIteration())  # wakes a reader

    async def _run(self) -> None:
        """Run one request after the other, until none is left."""
        try:
            while self._todo:
                index, request = self._todo.popleft()
                generation = await self._start(index, request)
                if generation is None:
                    return
                async for delta in generation:
                    self._deltas.put_nowait(replace(delta, index=index * request.n + delta.index))
        except BaseException as error:  # noqa: BLE001 - it is raised where the deltas are read
            self._deltas.put_nowait(error)

    async def _start(self, index: int, request: GenerationRequest) -> Generation | None:
        """Start a request. Return None if all were cancelled before there was room for it.

        The first request raises Busy at once, while the client can still get a 429. A later one waits.
        """
        while not self._cancelled:
            try:
                generation = self._engine.generate(request)
            except Busy as busy:
                if index == 0 or (request.deadline is not None and time.monotonic() >= request.deadline):
                    raise
                await asyncio.sleep(busy.retry_after or 1)
            else:
                self._started.append(generation)
                return generation
        return None
