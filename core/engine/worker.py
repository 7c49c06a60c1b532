"""Run the engine thread: continuous batching over one llama.cpp context.

Each step decodes one batch. It holds the next token of each running sequence, the tokens that a grammar forced, and a
slice of the prompts that are still to be read. When KV cells run out, idle prefixes are evicted first; then the
youngest sequence is preempted and computed again later, so a client never sees a failed decode. `schedule` decides all
of this; the worker carries it out.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from msgspec.structs import replace

from core.engine import native, schedule
from core.engine.cache import Cache
from core.engine.generation import GenerationStream, Sequence, deliver
from core.engine.interface import Cause, Delta
from core.engine.sampling import TokenStep
from core.errors import ApiError, Busy, DeadlineExceeded, ModelUnavailable

if TYPE_CHECKING:
    from core.engine.bindings import Bindings, Context

logger = logging.getLogger("slm.engine")


@dataclass(slots=True)
class Counters:
    """What an engine has done since the load."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    decode_calls: int = 0
    preempted: int = 0  # sequences that lost their KV cells and were computed again
    aborted: int = 0  # decode calls whose streams had all ended


class Inbox:
    """The thread-safe mailbox of the engine thread. Only that thread calls `take` and `take_prefix`.

    `arrival` blocks until the weights are complete, or raises ApiError. Until then `arrived` is False, and the engine
    thread handles deadlines and cancellation only.
    """

    def __init__(self, arrival: Callable[[], None] | None) -> None:
        self._change = threading.Condition()
        self._sequences: list[Sequence] = []
        self._prefix: list[int] = []
        self._interrupted = False
        self._closed = False
        self._failure: ApiError | None = None
        self.arrived = arrival is None
        if arrival is not None:
            threading.Thread(target=self._await, args=(arrival,), name="arrival", daemon=True).start()

    def __len__(self) -> int:
        return len(self._sequences)

    def put(self, sequences: list[Sequence]) -> None:
        """Add the sequences of one request. Raises ModelUnavailable after `close`, or the error of the engine."""
        with self._change:
            if self._failure is not None:
                raise self._failure
            if self._closed:
                raise ModelUnavailable("The model is being released. Try again.", retry_after=1)
            self._sequences.extend(sequences)
            self._change.notify()

    def prime(self, prefix: list[int]) -> None:
        """Set the tokens to prefill while no sequence runs."""
        with self._change:
            self._prefix = prefix
            self._change.notify()

    def interrupt(self) -> None:
        """Wake the engine thread: a stream was cancelled, or its deadline has passed."""
        with self._change:
            self._interrupted = True
            self._change.notify()

    def close(self) -> None:
        with self._change:
            self._closed = True
            self._change.notify()

    def take(self, *, busy: bool) -> list[Sequence] | None:
        """Return the new sequences, or None after `close`. Unless `busy`, block until there is something to do.

        Raises the ApiError of weights that cannot be read.
        """
        with self._change:
            while not (
                self._closed
                or self._failure
                or self._interrupted
                or self._sequences
                or (self.arrived and (busy or self._prefix))
            ):
                self._change.wait()
            if self._failure is not None:
                raise self._failure
            if self._closed:
                return None
            self._interrupted = False
            return self._drain()

    def take_prefix(self) -> list[int]:
        with self._change:
            prefix, self._prefix = self._prefix, []
            return prefix

    def drain(self, failure: ApiError | None) -> list[Sequence]:
        """Close, and return the sequences that were not taken. Later calls of `put` raise `failure` if it is given."""
        with self._change:
            self._closed, self._failure = True, failure
            return self._drain()

    def _drain(self) -> list[Sequence]:
        taken, self._sequences = self._sequences, []
        return taken

    def _await(self, arrival: Callable[[], None]) -> None:
        failure: ApiError | None = None
        try:
            arrival()
        except ApiError as error:
            failure = error
        with self._change:
            self.arrived, self._failure = failure is None, failure
            self._change.notify()


class BatchRows(NamedTuple):
    """A sequence's tokens in the current batch."""

    sequence: Sequence
    n_tokens: int
    last: int  # index of the last one in the batch
    sample: bool  # draw the next token from the last one's logits; otherwise there are more tokens to decode first


class Worker:
    """Owns the context. Any thread may call the public methods; the private ones run in the engine thread.

    A sequence has at most `n_limit` tokens. All sequences share `n_cells` KV cells (None for recurrent models, whose
    states do not grow). `failed` is the error that ended the engine thread, if one did.
    """

    def __init__(
        self,
        bindings: Bindings,
        context: Context,
        step: TokenStep,
        *,
        n_batch: int,
        n_parallel: int,
        n_limit: int,
        n_cells: int | None,
        max_queue: int,
        trimmable: bool,
        window: int,
        arrival: Callable[[], None] | None = None,
    ) -> None:
        self._bindings = bindings
        self._context = context
        self._step = step
        self._n_limit = n_limit
        self._n_cells = n_cells
        self._max_queue = max_queue
        self._n_outputs = n_parallel + 1  # as the context was made with
        self._cache = Cache(bindings, context, n_parallel, trimmable=trimmable, window=window)
        self._batch = native.Batch(bindings, n_batch, n_parallel + 1)
        self._abort = native.Abort(bindings, context)
        self._inbox = Inbox(arrival)
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._out: list[tuple[GenerationStream, Delta | Exception]] = []
        self._pace = schedule.PrefillPace()
        self._admissions = 0
        self.counters = Counters()
        self.failed: ApiError | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # From any thread

    def submit(self, sequences: list[Sequence]) -> None:
        """Queue the sequences of one request. Raises Busy if the queue is full, ModelUnavailable after `close`."""
        queued = len(self._inbox) + sum(not sequence.admitted_once for sequence in list(self._waiting))
        if queued >= self._max_queue + len(self._cache.free_slots()):
            raise Busy(f"The queue is full ({queued} waiting, at most {self._max_queue} allowed). Try again later.")
        self._inbox.put(sequences)
        self.counters.requests += 1

    def prime(self, prefix: list[int]) -> None:
        """Prefill the tokens that prompts begin with into a slot of their own, as soon as no sequence runs."""
        self._inbox.prime(prefix[: self._batch.size])

    def interrupt(self, stream: GenerationStream) -> None:
        """Handle a stream that was cancelled, or whose deadline has passed, even during its prefill."""
        self._abort.look()
        self._inbox.interrupt()

    def stats(self) -> dict[str, Any]:
        total = len(self._cache.slots)
        return asdict(self.counters) | {
            "sequences": {"running": total - len(self._cache.free_slots()), "total": total},
            "queued": len(self._inbox) + len(self._waiting),
            "kv_cells": {"used": self._cache.used(), "total": self._n_cells},
        }

    def close(self) -> None:
        """End all sequences with ModelUnavailable and stop the thread. Blocks until it has stopped."""
        self._inbox.close()
        self._abort.stop()
        self._thread.join()

    # In the engine thread: the loop

    def _run(self) -> None:
        try:
            while self._next_work():
                self._admit()
                if self._running:
                    self._decode()
                else:
                    self._prefill_template()
                self._flush()
        except ApiError as error:  # the weights cannot be read
            self.failed = error
        except BaseException:
            logger.exception("The engine thread failed; the next request loads the model again.")
            self.failed = ModelUnavailable("The engine failed. The next request loads the model again.")
        finally:
            self._fail_all(
                self.failed or ModelUnavailable("The model was released before the answer was finished. Try again.")
            )

    def _next_work(self) -> bool:
        """Wait for something to do, and end the sequences that were cancelled or are late. False: the inbox closed."""
        # 1) New sequences.
        arrived = self._inbox.take(busy=bool(self._running or self._waiting))
        if arrived is None:
            return False
        self._waiting.extend(arrived)
        # 2) Cancellation and deadlines.
        now = time.monotonic()
        for sequence in [*self._running, *self._waiting]:
            deadline = sequence.request.deadline
            if sequence.stream.cancelled:
                self._retire(sequence)
            elif sequence.stream.expired or (deadline is not None and now >= deadline):
                self._end_late(sequence)
        return True

    def _admit(self) -> None:
        """Give free slots to waiting sequences, in the order that the schedule says."""
        while self._inbox.arrived and self._waiting and self._cache.free_slots():
            # 1) Which one.
            running = [self._describe(sequence) for sequence in self._running]
            place = schedule.admit(self._queue(), running, self._cache.used(), self._n_cells)
            if place is None:
                return
            sequence = self._waiting[place]
            del self._waiting[place]
            # 2) A slot, with the longest prompt prefix that the cache holds.
            cached = self._cache.take(sequence)
            sequence.n_prefill = len(sequence.tokens)
            self._admissions += 1
            sequence.admission = self._admissions
            self._running.append(sequence)
            # 3) Counted once: not for forks, nor after a preemption.
            stream = sequence.stream
            if stream.admitted_at is None:
                stream.admitted_at = time.monotonic()
            if not sequence.admitted_once:
                sequence.admitted_once = True
                if sequence.parent is None:
                    stream.cached_tokens = cached
                    self.counters.prompt_tokens += sequence.n_prompt
                    self.counters.cached_tokens += cached

    def _queue(self) -> Iterator[schedule.Waiting]:
        """Describe the waiting sequences to the schedule. Lazy: it looks at few, and each costs a prefix search."""
        for sequence in self._waiting:
            parent = sequence.parent
            if parent is not None and parent.slot is not None and parent.prefilling:
                yield schedule.Waiting(0, 0, blocked=True)
            else:
                yield schedule.Waiting(self._cache.needed(sequence), sequence.growth(self._n_limit))

    def _describe(self, sequence: Sequence) -> schedule.Running:
        return schedule.Running(
            sequence.pending,
            sequence.prefilling,
            sequence.sampler.repeatable,
            sequence.growth(self._n_limit),
            sequence.scoring,
        )

    # In the engine thread: one step

    def _decode(self) -> None:
        """Fill the batch, decode it, and sample from each sequence whose last token was in it."""
        # 1) Fill the batch.
        batch_rows = self._fill()
        # 2) Decode it.
        started = time.monotonic()
        code = self._compute({rows.sequence.stream for rows in batch_rows})
        elapsed = time.monotonic() - started
        self.counters.decode_calls += 1
        # 3) Sample, or handle what went wrong.
        if code == 0:
            self._pace.note(self._batch.length, elapsed)
            for rows in batch_rows:
                sequence, slot = rows.sequence, rows.sequence.slot
                assert slot is not None
                start = len(slot.tokens)
                slot.tokens.extend(sequence.tokens[start : start + rows.n_tokens])
                if rows.sample or sequence.scoring:
                    self._advance(rows, start)
        elif code == 2:  # aborted: part of the batch may be in the KV cells
            self.counters.aborted += 1
            self._trim(batch_rows)
        elif code == 1:  # no KV cells
            self._make_room()
        else:
            self._trim(batch_rows)
            for rows in batch_rows:
                self._fail(rows.sequence, ApiError(f"llama_decode returned {code}"))

    def _fill(self) -> list[BatchRows]:
        """Put tokens into the batch, as many of each sequence as the schedule says."""
        batch = self._batch
        batch.clear()
        running = [self._describe(sequence) for sequence in self._running]
        batch_rows: list[BatchRows] = []
        for rows in schedule.fill(running, batch.size, self._pace.slice(batch.size), self._n_outputs):
            sequence = self._running[rows.index]
            slot = sequence.slot
            assert slot is not None
            start = len(slot.tokens)
            tokens = sequence.tokens[start : start + rows.count]
            last = batch.add(slot.id, tokens, start, logits=rows.sample, every=sequence.scoring)
            batch_rows.append(BatchRows(sequence, rows.count, last, rows.sample))
        return batch_rows

    def _compute(self, streams: set[GenerationStream]) -> int:
        """Decode the batch for `streams`. Return 0, 1 (no KV cells), 2 (aborted) or an error code, which is logged."""
        self._abort.begin(streams)
        with native.captured_errors() as reasons:  # llama.cpp reports an abort as an error, too
            code = self._bindings.llama_decode(self._context, self._batch.native)
        self._abort.end()
        if code not in (0, 1, 2):
            logger.error("llama_decode returned %s for %s tokens: %s", code, self._batch.length, "; ".join(reasons))
        return code

    def _score(self, rows: BatchRows, start: int) -> None:
        """Record the logprobs of the prompt tokens that follow the rows, which begin at position `start`."""
        sequence = rows.sequence
        for index, position in enumerate(range(start + 1, start + 1 + rows.n_tokens)):
            # After a preemption, the first ones have been recorded before.
            if position == len(sequence.prompt_logprobs) + 1 and position < sequence.n_prompt:
                row = rows.last - rows.n_tokens + 1 + index
                sequence.prompt_logprobs.append(self._step.score(sequence, row, sequence.tokens[position]))

    def _advance(self, rows: BatchRows, start: int) -> None:
        """Sample the sequence's next token, and end the sequence if it is complete. An exception ends only this one.

        `rows` have been decoded and begin at position `start`.
        """
        sequence = rows.sequence
        try:
            if sequence.scoring:
                self._score(rows, start)
            if not rows.sample:
                return
            delta = self._step.advance(sequence, rows.last)
        except ApiError as error:
            self._fail(sequence, error)
            return
        except Exception as error:
            logger.exception("A sequence failed after %s tokens.", len(sequence.tokens))
            self._fail(sequence, ApiError(f"the next token could not be made: {type(error).__name__}"))
            return
        sequence.reasoning_tokens += delta.reasoning_tokens
        self.counters.completion_tokens += delta.tokens
        sequence.stream.note_step(sequence.index)
        if sequence.prompt_logprobs:
            delta = replace(delta, prompt_logprobs=tuple(sequence.prompt_logprobs))
            sequence.prompt_logprobs = []
        self._out.append((sequence.stream, delta))
        if delta.finish_reason is not None:
            self._retire(sequence)

    def _prefill_template(self) -> None:
        """Prefill the template's shared prefix while no sequence runs. This also pages in the weights."""
        tokens = self._inbox.take_prefix() if self._inbox.arrived else []
        if not tokens:
            return
        slot = self._cache.template_slot
        self._cache.clear(slot)
        self._batch.clear()
        self._batch.add(slot.id, tokens, 0, logits=False)
        if self._compute(set()) == 0:
            slot.tokens = tokens
        else:
            self._cache.clear(slot)  # an aborted or failed decode may have left part of it

    # In the engine thread: when something gives way

    def _make_room(self) -> None:
        """The batch found no KV cells: evict an idle prefix, preempt the youngest sequence, or end the only one."""
        admissions = [sequence.admission for sequence in self._running]
        match schedule.make_room(admissions, idle=self._cache.holds_idle()):
            case "evict":
                self._cache.evict()
            case "end":
                self._cut(self._running[0], "memory")
            case index:
                preempted = self._running.pop(index)
                assert preempted.slot is not None
                self._cache.clear(preempted.slot)
                self._cache.release(preempted)
                self._waiting.appendleft(preempted)
                self.counters.preempted += 1

    def _trim(self, batch_rows: list[BatchRows]) -> None:
        """Remove from the KV cells what a failed or aborted decode left there."""
        for rows in batch_rows:
            slot = rows.sequence.slot
            if slot is not None:
                self._cache.trim(slot, len(slot.tokens))

    def _end_late(self, sequence: Sequence) -> None:
        """End a sequence at its deadline."""
        if sequence.stream.first_token_at is not None:
            self._cut(sequence, "deadline")
            return
        # Without a token this is an error: an empty answer would look like the model's own.
        if sequence.admitted_once:
            late = f"The deadline passed before the first token: the prompt has {sequence.n_prompt} tokens."
            self._fail(sequence, DeadlineExceeded(f"{late} Shorten the prompt or allow more time."))
        else:
            self._fail(sequence, ModelUnavailable("The deadline passed before a slot was free.", retry_after=1))

    def _cut(self, sequence: Sequence, cause: Cause) -> None:
        """End the sequence with the text that it has."""
        events = tuple(sequence.output.finish(cut=True))
        self._out.append((sequence.stream, Delta(sequence.index, events, finish_reason="length", cause=cause)))
        self._retire(sequence)

    # In the engine thread: results

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        self._out.append((sequence.stream, error))
        self._retire(sequence)

    def _retire(self, sequence: Sequence) -> None:
        """Forget the sequence and free its slot. The slot's tokens stay as a prefix for later prompts."""
        if sequence in self._running:
            self._running.remove(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
        self._cache.release(sequence)
        sequence.sampler.free()

    def _fail_all(self, error: Exception) -> None:
        self._waiting.extend(self._inbox.drain(self.failed))
        for sequence in [*self._running, *self._waiting]:
            self._fail(sequence, error)
        self._flush()

    def _flush(self) -> None:
        """Hand the step's deltas to the event loops."""
        if self._out:
            deliver(self._out)
            self._out = []
