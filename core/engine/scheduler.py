"""Scheduler: continuous batching. One thread owns llama.cpp's context; requests come by queue, pieces leave by queue.

Every step decodes one batch: the next token of each running sequence, the tokens a grammar forced, and a slice of any
prompt still to be read. When cells run out, idle prefixes go first, then the youngest sequence is paused and computed
again later: a client never sees a failed decode.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from core.engine.abort import Abort
from core.engine.batch import Batch
from core.engine.cache import Cache
from core.engine.generation import Piece
from core.engine.inbox import Inbox
from core.engine.pace import Pace
from core.engine.sequence import Sequence
from core.engine.steps import Step
from core.engine.stream import PieceStream, deliver
from core.errors import ApiError, Busy, ModelUnavailable

log = logging.getLogger("slm.engine")


@dataclass(slots=True)
class Counters:
    """Since the load."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    decode_calls: int = 0
    paused: int = 0


class Scheduler:
    """`submit`, `interrupt`, `stats` and `close` are called from any thread; the rest runs in the engine thread."""

    def __init__(
        self,
        bindings: Any,
        context: Any,
        step: Step,
        *,
        n_batch: int,
        n_parallel: int,
        max_queue: int,
        trimmable: bool,
        arrival: Callable[[], None] | None = None,
    ) -> None:
        self._bindings = bindings
        self._context = context
        self._step = step
        self._max_queue = max_queue
        self._cache = Cache(bindings, context, n_parallel, trimmable=trimmable)
        self._batch = Batch(bindings, n_batch, n_parallel + 1)
        self._abort = Abort(bindings, context)
        self._inbox = Inbox(arrival)
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._reading: set[PieceStream] = set()  # streams whose prompts the current decode call reads
        self._out: list[tuple[PieceStream, Piece | Exception]] = []
        self._crowded = False  # one was paused for want of cells: nobody is admitted until another has ended
        self._pace = Pace()
        self._admissions = 0
        self.counters = Counters()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # From any thread

    def submit(self, sequences: list[Sequence]) -> None:
        """Queue the sequences of one request. Raises Busy if too many wait, ModelUnavailable after `close`."""
        queued = len(self._inbox) + sum(not sequence.begun for sequence in list(self._waiting))
        if queued >= self._max_queue + len(self._cache.free_slots()):
            raise Busy(f"{queued} sequences wait already, and at most {self._max_queue} may; try again later.")
        self._inbox.put(sequences)
        self.counters.requests += 1

    def prime(self, opening: list[int]) -> None:
        """Read the tokens that prompts begin with into a slot of their own, if nobody waits for an answer."""
        self._inbox.prime(opening[: self._batch.size])

    def interrupt(self, stream: PieceStream) -> None:
        """A stream was cancelled or ran out of time: look now, even in the middle of its prompt."""
        if stream in self._reading:
            self._abort.set()
        self._inbox.interrupt()

    def stats(self) -> dict[str, Any]:
        total = len(self._cache.slots)
        return {field.name: getattr(self.counters, field.name) for field in fields(Counters)} | {
            "sequences": {"running": total - len(self._cache.free_slots()), "total": total},
            "queued": len(self._inbox) + len(self._waiting),
        }

    def close(self) -> None:
        """End all that runs with ModelUnavailable and stop the thread. Blocks until it has stopped."""
        self._inbox.close()
        self._abort.set()
        self._thread.join()

    # In the engine thread

    def _run(self) -> None:
        try:
            while self._next_work():
                self._admit()
                if self._running:
                    self._decode()
                else:
                    self._read_opening()
                self._flush()
        except ApiError as error:  # the weights will not come
            self._fail_all(error)
        except BaseException:
            log.exception("the engine thread failed")
            self._fail_all(ModelUnavailable("The engine failed; the model has to be loaded again."))
            raise
        finally:
            self._fail_all(ModelUnavailable("The model was released before the answer was finished; try again."))

    def _next_work(self) -> bool:
        """Wait for something to do, take in what came, drop what was cancelled or is late. False: closed."""
        come = self._inbox.take(busy=bool(self._running or self._waiting))
        if come is None:
            return False
        self._waiting.extend(come)
        now = time.monotonic()
        for sequence in [*self._running, *self._waiting]:
            if sequence.stream.cancelled:
                self._retire(sequence)
            elif sequence.request.deadline is not None and now >= sequence.request.deadline:
                self._finish_late(sequence)
        return True

    def _finish_late(self, sequence: Sequence) -> None:
        if sequence.begun:
            self._emit(sequence, sequence.text.finish(), finish="length")
        else:
            self._out.append(
                (sequence.stream, ModelUnavailable("No slot was free before the deadline.", retry_after=1))
            )
        self._retire(sequence)

    def _admit(self) -> None:
        """Give free slots to those who wait, oldest first. A follower waits until its leader has read their prompt."""
        if not (self._inbox.arrived and self._waiting) or (self._crowded and self._running):
            return
        for sequence in list(self._waiting):
            if not self._cache.free_slots():
                return
            leader = sequence.leader
            if leader is not None and leader.slot is not None and not leader.prompt_read:
                continue
            self._waiting.remove(sequence)
            cached = self._cache.take(sequence)
            self._admissions += 1
            sequence.admitted = self._admissions
            if not sequence.begun:
                sequence.begun = True
                if leader is None:
                    sequence.stream.cached_tokens = cached
                    self.counters.prompt_tokens += sequence.n_prompt
                    self.counters.cached_tokens += cached
            self._running.append(sequence)

    def _decode(self) -> None:
        """One step: fill the batch, decode it, sample from every sequence whose last token was in it."""
        rows = self._fill()
        started = time.monotonic()
        code = self._bindings.llama_decode(self._context, self._batch.native)
        self.counters.decode_calls += 1
        self._reading = set()
        self._abort.clear()
        if code == 0:
            self._pace.note(self._batch.length, time.monotonic() - started)
            for sequence, count, row in rows:
                slot = sequence.slot
                assert slot is not None
                done = len(slot.tokens)
                slot.tokens.extend(sequence.tokens[done : done + count])
                if row is not None:
                    self._advance(sequence, row)
        elif code == 2:  # aborted: some of the batch may be in the memory
            self._forget(rows)
        elif code == 1:  # no cells
            self._make_room()
        else:
            self._forget(rows)
            log.error("llama_decode returned %s for %s tokens of %s sequences", code, self._batch.length, len(rows))
            for sequence, _, _ in rows:
                self._fail(sequence, ApiError(f"llama_decode returned {code}"))

    def _read_opening(self) -> None:
        """Also brings the weights into memory before the first request needs them."""
        tokens = self._inbox.take_opening() if self._inbox.arrived else []
        if not tokens:
            return
        self._batch.clear()
        self._batch.add(self._cache.opening.id, tokens, 0, logits=False)
        code = self._bindings.llama_decode(self._context, self._batch.native)
        self._cache.opening.tokens = tokens if code == 0 else []

    def _fill(self) -> list[tuple[Sequence, int, int | None]]:
        """Put tokens into the batch. Returns (sequence, how many of its tokens, index of the row to sample from)."""
        batch = self._batch
        batch.clear()
        rows: list[tuple[Sequence, int, int | None]] = []
        decoding = [sequence for sequence in self._running if sequence.produced]
        reading = [sequence for sequence in self._running if not sequence.produced]
        budget = batch.size if not decoding else self._pace.slice(batch.size)
        streams = set()
        for sequence in (*decoding, *reading):
            count = min(sequence.pending, batch.room)
            if not sequence.produced:
                count = min(count, budget)
                if sequence.request.sampling.repeatable and 1 < sequence.pending <= count:
                    # The prompt's last token goes alone, as it does when all before it is cached: another batch shape
                    # adds up floats in another order, and the same request would give another text.
                    count = sequence.pending - 1
                budget -= count
                streams.add(sequence.stream)
            if count <= 0:
                continue
            slot = sequence.slot
            assert slot is not None
            done = len(slot.tokens)
            last = count == sequence.pending
            row = batch.add(slot.id, sequence.tokens[done : done + count], done, logits=last)
            rows.append((sequence, count, row if last else None))
        self._reading = streams
        if any(stream.cancelled for stream in streams):  # `interrupt` came before it could see them here
            self._abort.set()
        return rows

    def _advance(self, sequence: Sequence, row: int) -> None:
        """Sample, turn into text, and end the sequence if it is time."""
        try:
            text, tokens, logprobs, finish = self._step.advance(sequence, row)
        except ApiError as error:
            self._fail(sequence, error)
            return
        self.counters.completion_tokens += tokens
        self._emit(sequence, text, tokens, logprobs, finish)
        if finish is not None:
            self._retire(sequence)

    def _make_room(self) -> None:
        """No cells for the batch: forget an idle prefix, else pause the youngest, else the context is full."""
        if self._cache.evict():
            return
        youngest = max(self._running, key=lambda sequence: sequence.admitted)
        if len(self._running) > 1:
            assert youngest.slot is not None
            self._cache.clear(youngest.slot)
            self._cache.release(youngest)
            self._running.remove(youngest)
            self._waiting.appendleft(youngest)
            self._crowded = True
            self.counters.paused += 1
        else:
            self._emit(youngest, youngest.text.finish(), finish="length")
            self._retire(youngest)

    def _forget(self, rows: list[tuple[Sequence, int, int | None]]) -> None:
        """Take back what a decode that failed or was aborted left in the memory."""
        for sequence, _, _ in rows:
            if sequence.slot is not None:
                self._cache.trim(sequence.slot, len(sequence.slot.tokens))

    def _emit(self, sequence: Sequence, text: str, tokens: int = 0, logprobs: Any = (), finish: Any = None) -> None:
        self._out.append((sequence.stream, Piece(sequence.index, text, tokens, logprobs, finish)))

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        self._out.append((sequence.stream, error))
        self._retire(sequence)

    def _retire(self, sequence: Sequence) -> None:
        if sequence in self._running:
            self._running.remove(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
        self._crowded = False
        self._cache.release(sequence)
        sequence.sampler.free()

    def _fail_all(self, error: Exception) -> None:
        self._waiting.extend(self._inbox.drain())
        for sequence in [*self._running, *self._waiting]:
            self._fail(sequence, error)
        self._flush()

    def _flush(self) -> None:
        if self._out:
            deliver(self._out)
            self._out = []
