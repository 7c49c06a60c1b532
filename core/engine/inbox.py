"""Inbox: what other threads want of the engine thread, and what it waits for when it has nothing to do."""

from __future__ import annotations

import threading
from collections.abc import Callable

from core.engine.sequence import Sequence
from core.errors import ApiError, ModelUnavailable


class Inbox:
    """`take` is the engine thread's; everything else is for any thread.

    `arrival` blocks until the weights are there, or raises ApiError: until then `arrived` is False and the engine
    thread may do nothing but look after those who wait (deadlines, cancelling).
    """

    def __init__(self, arrival: Callable[[], None] | None) -> None:
        self._change = threading.Condition()
        self._sequences: list[Sequence] = []
        self._opening: list[int] = []
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

    def prime(self, opening: list[int]) -> None:
        """Tokens to be read when nobody waits for an answer."""
        with self._change:
            self._opening = opening
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
                or (self.arrived and (busy or self._opening))
            ):
                self._change.wait()
            if self._failure is not None:
                raise self._failure
            if self._closed:
                return None
            self._interrupted = False
            return self._drain()

    def take_opening(self) -> list[int]:
        with self._change:
            opening, self._opening = self._opening, []
            return opening

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
