"""Worker: continuous batching. One thread owns llama.cpp's context; requests come by queue, pieces leave by queue.

Every step decodes one batch: the next token of each running sequence, the tokens a grammar forced, and a slice of any
prompt still to be read. When cells run out, idle prefixes go first, then the youngest sequence is paused and computed
again later: a client never sees a failed decode. What a step does is decided in `core.engine.schedule`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from core.engine import native, schedule
from core.engine.batch import Batch
from core.engine.cache import Cache
from core.engine.generation import GenerationStream, Sequence, deliver
from core.engine.interface import Cause, Delta, FinishReason, TokenLogprob
from core.engine.sampling import TokenStep
from core.errors import ApiError, Busy, DeadlineExceeded, ModelUnavailable

if TYPE_CHECKING:
    from core.engine.bindings import Bindings, Context

log = logging.getLogger("slm.engine")


@dataclass(slots=True)
class Counters:
    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    decode_calls: int = 0
    preempted: int = 0  # sequences that lost their KV cells and were computed again
    aborted: int = 0  # decode calls that nobody wanted any more


class Inbox:
    """`take` is the engine thread's; everything else is for any thread.

    `arrival` blocks until the weights are there, or raises ApiError: until then `arrived` is False and the engine
    thread may do nothing but look after those who wait (deadlines, cancelling).
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
        """Raises ModelUnavailable after `close`, and after a failure that."""
        with self._change:
            if self._failure is not None:
                raise self._failure
            if self._closed:
                raise ModelUnavailable("The model is being released; try again.", retry_after=1)
            self._sequences.extend(sequences)
            self._change.notify()

    def prime(self, prefix: list[int]) -> None:
        """Tokens to be read when nobody waits for an answer."""
        with self._change:
            self._prefix = prefix
            self._change.notify()

    def interrupt(self) -> None:
        """Somebody was cancelled or is late: look."""
        with self._change:
            self._interrupted = True
            self._change.notify()

    def close(self) -> None:
        with self._change:
            self._closed = True
            self._change.notify()

    def take(self, *, busy: bool) -> list[Sequence] | None:
        """What has come; None once closed. Without `busy` (the engine has work) it waits for something to do.

        Raises the ApiError of weights that will not come.
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
        """Close, and return what nobody will take any more. Later calls of `put` raise `failure`, if there is one."""
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


class Worker:
    """The first group of methods is for any thread; the rest runs in the engine thread.

    A sequence has at most `n_limit` tokens; all of them share `n_cells` (None: recurrent models, whose states do not
    grow). `failed` is the error that ended the engine thread, if one did.
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
        self._cache = Cache(bindings, context, n_parallel, trimmable=trimmable, window=window)
        self._batch = Batch(bindings, n_batch, n_parallel + 1)
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
        """Queue the sequences of one request. Raises Busy if too many wait, ModelUnavailable after `close`."""
        queued = len(self._inbox) + sum(not sequence.begun for sequence in list(self._waiting))
        if queued >= self._max_queue + len(self._cache.free_slots()):
            raise Busy(f"{queued} sequences wait already, and at most {self._max_queue} may; try again later.")
        self._inbox.put(sequences)
        self.counters.requests += 1

    def prime(self, prefix: list[int]) -> None:
        """Read the tokens that prompts begin with into a slot of their own, if nobody waits for an answer."""
        self._inbox.prime(prefix[: self._batch.size])

    def interrupt(self, stream: GenerationStream) -> None:
        """A stream was cancelled or its deadline has passed: look now, even in the middle of its prompt."""
        self._abort.look()
        self._inbox.interrupt()

    def stats(self) -> dict[str, Any]:
        total = len(self._cache.slots)
        return asdict(self.counters) | {
            "sequences": {"running": total - len(self._cache.free_slots()), "total": total},
            "queued": len(self._inbox) + len(self._waiting),
        }

    def close(self) -> None:
        """End all that runs with ModelUnavailable and stop the thread. Blocks until it has stopped."""
        self._inbox.close()
        self._abort.stop()
        self._thread.join()

    # In the engine thread

    def _run(self) -> None:
        try:
            while self._next_work():
                self._admit()
                if self._running:
                    self._decode()
                else:
                    self._prefill_template()
                self._flush()
        except ApiError as error:  # the weights will not come
            self.failed = error
        except BaseException:
            log.exception("The engine thread failed; the model has to be loaded again.")
            self.failed = ModelUnavailable("The engine failed; the model is loaded again by the next request.")
        finally:
            self._fail_all(
                self.failed or ModelUnavailable("The model was released before the answer was finished; try again.")
            )

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
            elif sequence.stream.expired or (
                sequence.request.deadline is not None and now >= sequence.request.deadline
            ):
                self._finish_late(sequence)
        return True

    def _finish_late(self, sequence: Sequence) -> None:
        if sequence.stream.first_token_at is not None:
            self._cut(sequence, "deadline")
            return
        # An empty answer would look like one that the model gave.
        if sequence.begun:
            late = f"The deadline passed before the first token: the prompt has {sequence.n_prompt} tokens."
            self._fail(sequence, DeadlineExceeded(f"{late} Send a shorter one, or allow more time."))
        else:
            self._fail(sequence, ModelUnavailable("The deadline passed before a slot was free.", retry_after=1))

    def _admit(self) -> None:
        """Give slots to those who wait, as the schedule says."""
        while self._inbox.arrived and self._waiting and self._cache.free_slots():
            running = [self._describe(sequence) for sequence in self._running]
            place = schedule.admit(self._queue(), running, self._cache.used(), self._n_cells)
            if place is None:
                return
            sequence = self._waiting[place]
            del self._waiting[place]
            cached = self._cache.take(sequence)
            self._admissions += 1
            sequence.admitted = self._admissions
            sequence.prefill = len(sequence.tokens)
            if sequence.stream.admitted_at is None:
                sequence.stream.admitted_at = time.monotonic()
            if not sequence.begun:
                sequence.begun = True
                if sequence.parent is None:
                    sequence.stream.cached_tokens = cached
                    self.counters.prompt_tokens += sequence.n_prompt
                    self.counters.cached_tokens += cached
            self._running.append(sequence)

    def _queue(self) -> Iterator[schedule.Waiting]:
        """Those who wait, as the schedule sees them. Lazy: it looks at few, and each costs a search for a prefix."""
        for sequence in self._waiting:
            parent = sequence.parent
            if parent is not None and parent.slot is not None and parent.reading:
                yield schedule.Waiting(0, 0, blocked=True)
            else:
                yield schedule.Waiting(self._cache.needed(sequence), sequence.growth(self._n_limit))

    def _describe(self, sequence: Sequence) -> schedule.Running:
        return schedule.Running(
            sequence.pending,
            sequence.reading,
            sequence.request.sampling.repeatable,
            sequence.growth(self._n_limit),
        )

    def _decode(self) -> None:
        """One step: fill the batch, decode it, sample from every sequence whose last token was in it."""
        # 1) The batch.
        rows = self._fill()
        # 2) llama.cpp.
        started = time.monotonic()
        code = self._compute({sequence.stream for sequence, _, _ in rows})
        elapsed = time.monotonic() - started
        self.counters.decode_calls += 1
        # 3) What came of it.
        if code == 0:
            self._pace.note(self._batch.length, elapsed)
            for sequence, count, row in rows:
                slot = sequence.slot
                assert slot is not None
                done = len(slot.tokens)
                slot.tokens.extend(sequence.tokens[done : done + count])
                if row is not None:
                    self._advance(sequence, row)
        elif code == 2:  # aborted: some of the batch may be in the memory
            self.counters.aborted += 1
            self._forget(rows)
        elif code == 1:  # no cells
            self._make_room()
        else:
            self._forget(rows)
            for sequence, _, _ in rows:
                self._fail(sequence, ApiError(f"llama_decode returned {code}"))

    def _compute(self, streams: set[GenerationStream]) -> int:
        """Decode the batch, for `streams`. Returns 0, 1 (no cells), 2 (aborted) or another code: an error, logged."""
        self._abort.begin(streams)
        with native.captured_errors() as reasons:  # llama.cpp calls an abort an error, too
            code = int(self._bindings.llama_decode(self._context, self._batch.native))
        self._abort.end()
        if code not in (0, 1, 2):
            log.error("llama_decode returned %s for %s tokens: %s", code, self._batch.length, "; ".join(reasons))
        return code

    def _prefill_template(self) -> None:
        """Also brings the weights into memory before the first request needs them."""
        tokens = self._inbox.take_prefix() if self._inbox.arrived else []
        if not tokens:
            return
        prefix = self._cache.template_slot
        self._cache.clear(prefix)
        self._batch.clear()
        self._batch.add(prefix.id, tokens, 0, logits=False)
        if self._compute(set()) == 0:
            prefix.tokens = tokens
        else:
            self._cache.clear(prefix)  # a decode that was aborted or failed may have left some of it

    def _fill(self) -> list[tuple[Sequence, int, int | None]]:
        """Put tokens into the batch. Returns (sequence, how many of its tokens, index of the row to sample from)."""
        batch = self._batch
        batch.clear()
        plan = schedule.fill(
            [self._describe(sequence) for sequence in self._running], batch.size, self._pace.slice(batch.size)
        )
        rows: list[tuple[Sequence, int, int | None]] = []
        for part in plan:
            sequence = self._running[part.index]
            slot = sequence.slot
            assert slot is not None
            done = len(slot.tokens)
            row = batch.add(slot.id, sequence.tokens[done : done + part.count], done, logits=part.sample)
            rows.append((sequence, part.count, row if part.sample else None))
        return rows

    def _advance(self, sequence: Sequence, row: int) -> None:
        """Sample, turn into text, and end the sequence if it is time. An exception ends this sequence only."""
        try:
            text, tokens, logprobs, finish_reason, cause = self._step.advance(sequence, row)
        except ApiError as error:
            self._fail(sequence, error)
            return
        except Exception as error:
            log.exception("a sequence failed after %s tokens", len(sequence.tokens))
            self._fail(sequence, ApiError(f"the next token could not be made: {type(error).__name__}"))
            return
        self.counters.completion_tokens += tokens
        stream = sequence.stream
        stream.latest_token_at = time.monotonic()
        if stream.first_token_at is None:
            stream.first_token_at = stream.latest_token_at
        self._emit(sequence, text, tokens, logprobs, finish_reason, cause)
        if finish_reason is not None:
            self._retire(sequence)

    def _make_room(self) -> None:
        """No cells for the batch: forget an idle prefix, else pause the youngest, else the context is full."""
        admitted = [sequence.admitted for sequence in self._running]
        match schedule.make_room(admitted, idle=self._cache.holds_idle()):
            case "evict":
                self._cache.evict()
            case "end":
                self._cut(self._running[0], "memory")
            case index:
                paused = self._running.pop(index)
                assert paused.slot is not None
                self._cache.clear(paused.slot)
                self._cache.release(paused)
                self._waiting.appendleft(paused)
                self.counters.preempted += 1

    def _forget(self, rows: list[tuple[Sequence, int, int | None]]) -> None:
        """Remove from the memory what a decode that failed or was aborted left there."""
        for sequence, _, _ in rows:
            if sequence.slot is not None:
                self._cache.trim(sequence.slot, len(sequence.slot.tokens))

    def _cut(self, sequence: Sequence, cause: Cause) -> None:
        """End the sequence with the text that it has."""
        self._emit(sequence, sequence.text.finish(), finish_reason="length", cause=cause)
        self._retire(sequence)

    def _emit(
        self,
        sequence: Sequence,
        text: str,
        tokens: int = 0,
        logprobs: tuple[TokenLogprob, ...] = (),
        finish_reason: FinishReason | None = None,
        cause: Cause | None = None,
    ) -> None:
        self._out.append((sequence.stream, Delta(sequence.index, text, tokens, logprobs, finish_reason, cause)))

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        self._out.append((sequence.stream, error))
        self._retire(sequence)

    def _retire(self, sequence: Sequence) -> None:
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
        if self._out:
            deliver(self._out)
            self._out = []
