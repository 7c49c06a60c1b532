"""A running generation: the asyncio stream of its deltas, and the n sequences that the engine thread works on."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from core.engine.interface import Delta, GenerationRequest, Timings, TokenLogprob
from core.metrics import token_intervals

if TYPE_CHECKING:
    from core.engine.cache import Slot
    from core.engine.grammar.compiler import Matcher
    from core.engine.output.reader import OutputReader
    from core.engine.sampling import Sampler


class GenerationStream:
    """Implements `core.engine.interface.Generation`. The engine thread fills it, one event loop reads it.

    All methods but `cancel` belong to that loop. The engine thread uses `deliver`.
    """

    def __init__(self, request: GenerationRequest, interrupt: Callable[[GenerationStream], None]) -> None:
        self.loop = asyncio.get_running_loop()
        self.cached_tokens = 0
        self.cancelled = False
        self.expired = False  # the deadline has passed
        # Times on `time.monotonic()`'s clock, set by the engine thread. They are those of the first of n sequences,
        # except for `latest_token_at`.
        self.submitted_at = time.monotonic()
        self.admitted_at: float | None = None
        self.first_token_at: float | None = None
        self.latest_token_at: float | None = None
        self.token_intervals = token_intervals()
        self._steps_at: dict[int, float] = {}  # the latest step of each sequence
        self._interrupt = interrupt
        self._items: deque[Delta | Exception] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._unfinished = request.n
        self._timer: asyncio.TimerHandle | None = None
        if request.deadline is not None:
            # Interrupts a long prefill. Between two steps the worker compares the deadline with the clock itself.
            self._timer = self.loop.call_later(max(0.0, request.deadline - self.submitted_at), self._expire)

    @property
    def ended(self) -> bool:
        """Whether the stream needs no more deltas."""
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
            except RuntimeError:  # the loop is closed, and the reader with it
                return

    def note_step(self, index: int) -> None:
        """Note the time of a step of sequence `index`, which made a token. For the engine thread."""
        now = time.monotonic()
        if (previous := self._steps_at.get(index)) is not None:
            self.token_intervals.observe(now - previous)
        self._steps_at[index] = self.latest_token_at = now
        if self.first_token_at is None:
            self.first_token_at = now

    def put(self, item: Delta | Exception) -> None:
        """Add an item and wake the reader."""
        self._items.append(item)
        self._wake()

    def _expire(self) -> None:
        self.expired = True
        self._interrupt(self)

    def _end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def deliver(items: Iterable[tuple[GenerationStream, Delta | Exception]]) -> None:
    """Hand a step's items from the engine thread to the streams' event loops, with one wake-up for each loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[GenerationStream, Delta | Exception]]] = {}
    for stream, item in items:
        by_loop.setdefault(stream.loop, []).append((stream, item))
    for loop, group in by_loop.items():
        try:
            loop.call_soon_threadsafe(_put_all, group)
        except RuntimeError:  # the loop is closed, and its readers with it
            for stream, _ in group:
                stream.cancelled = True


def _put_all(items: list[tuple[GenerationStream, Delta | Exception]]) -> None:
    for stream, item in items:
        stream.put(item)


class Sequence:
    """One of a request's n answers. Belongs to the engine thread once submitted.

    `tokens` holds the prompt and the answer so far. Those from `len(slot.tokens)` on are not decoded yet. `parent` is
    the first sequence of the request: the others are forks that share its prompt.
    """

    __slots__ = (
        "admission",
        "admitted_once",
        "call_matcher",
        "index",
        "matcher",
        "n_prefill",
        "n_prompt",
        "output",
        "parent",
        "prompt_logprobs",
        "reasoning_tokens",
        "request",
        "sampler",
        "slot",
        "stream",
        "tokens",
        "whole_calls",
    )

    def __init__(
        self,
        request: GenerationRequest,
        index: int,
        stream: GenerationStream,
        sampler: Sampler,
        output: OutputReader,
        parent: Sequence | None,
        *,
        matcher: Matcher | None = None,
        call_matcher: Matcher | None = None,
    ) -> None:
        self.request = request
        self.index = index
        self.stream = stream
        self.sampler = sampler
        self.output = output
        self.matcher = matcher  # of the request's grammar, then of each call's; None: no constraint
        self.call_matcher = call_matcher  # copied for each call that the model opens
        self.parent = parent
        # One for each token but the first, until they are sent with the first delta. The forks share their parent's.
        self.prompt_logprobs: list[TokenLogprob] = []
        self.reasoning_tokens = 0
        self.whole_calls = 0
        self.tokens = list(request.prompt)
        self.n_prompt = len(request.prompt)
        self.n_prefill = self.n_prompt  # tokens to prefill: the prompt, and after a preemption the answer so far
        self.slot: Slot | None = None
        self.admission = 0  # its number among all admissions; the highest is the youngest
        self.admitted_once = False  # also while preempted: it does not count as queued

    @property
    def scoring(self) -> bool:
        """Whether logits of the prompt's tokens are still to be computed, which takes a prefill without a cache."""
        return (
            self.request.score_prompt
            and self.parent is None
            and self.produced == 0
            and len(self.prompt_logprobs) < self.n_prompt - 1
        )

    @property
    def produced(self) -> int:
        """The number of tokens in the answer so far."""
        return len(self.tokens) - self.n_prompt

    @property
    def decoded(self) -> int:
        """The number of tokens whose keys and values are in the KV cache."""
        return len(self.slot.tokens) if self.slot else 0

    @property
    def pending(self) -> int:
        """The number of tokens not decoded yet. One while decoding, more for a prefill or forced tokens."""
        return len(self.tokens) - self.decoded

    @property
    def prefilling(self) -> bool:
        return self.decoded < self.n_prefill

    def growth(self, n_limit: int) -> int:
        """Return the most tokens that it may still gain, when no sequence has more than `n_limit`."""
        room = n_limit - len(self.tokens)
        return room if self.request.max_tokens is None else min(room, self.request.max_tokens - self.produced)
