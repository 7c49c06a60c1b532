"""Served: the model that is served now, who holds it, who waits for one, why there is none. Loads nothing itself."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from concurrent.futures import Future

from core.engine.interface import EngineConfig
from core.errors import ApiError, Busy, ModelUnavailable
from core.lending import Lease, Lender, Loaded
from core.selection import Choice

log = logging.getLogger("slm.host")

RETRY_S = 5.0  # a load that failed is not tried again sooner


class Served:
    """Thread-safe.

    A load or a swap in place is bracketed by `begin` (or `withdraw`) and `settle`; between them `publish` may put a
    model into service. Requests that find no model wait for the future of that work, which is done as soon as a model
    can be leased or the work has failed.
    """

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._lender = Lender()
        self._held: Loaded | None = None
        self._last: tuple[Choice, EngineConfig] | None = None
        self._work: Future[None] | None = None
        self._busy = False  # work is under way, perhaps on tensors that still arrive
        self._waiting = 0
        self._awaited = False
        self._error: ApiError | None = None
        self._failed_at = 0.0
        self._closed = False

    @property
    def held(self) -> Loaded | None:
        return self._held

    @property
    def last(self) -> tuple[Choice, EngineConfig] | None:
        """What was served last and how it was loaded; after a failure it is tried again."""
        return self._last

    @property
    def busy(self) -> bool:
        return self._busy

    @property
    def awaited(self) -> bool:
        """Whether a request has waited for the work under way."""
        return self._awaited

    @property
    def waiting(self) -> int:
        """How many requests wait for the work under way."""
        return self._waiting

    @property
    def lent(self) -> int:
        return self._lender.lent

    @property
    def error(self) -> ApiError | None:
        """Why the last load failed, or the engine that was served."""
        return self._error

    def drop_failed(self) -> None:
        """Serve a model no more whose engine has failed; the next request loads it again, without delay."""
        with self._change:
            held = self._held
            if held is None or held.engine.failed is None:
                return
            self._held, self._error, self._failed_at = None, held.engine.failed, float("-inf")
            lease = self._lender.lend(held)
        log.error("%s is dropped: its engine has failed", held.engine.card.name)
        self._lender.retire(held)
        lease.release()  # an engine without leases would be freed in this thread, perhaps an event loop's

    # Requests

    def lend(self) -> Lease | None:
        """A lease of the served model; None if there is none. Raises ModelUnavailable once closed."""
        self.drop_failed()
        with self._change:
            self._check_open()
            return None if self._held is None else self._lender.lend(self._held)

    async def wait(self, deadline: float | None, most: int | None) -> bool:
        """Wait until the work under way has published a model or has failed; at once if there is none. Return False if
        the deadline comes first. Raises Busy if `most` requests wait already."""
        with self._change:
            work = self._work
            if work is None:
                return True
            if most is not None and self._waiting >= most:
                raise Busy(f"{most} requests wait for the model to be loaded already; try again.", retry_after=5)
            self._awaited = True
            self._waiting += 1
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        try:
            await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(work)), timeout)
        except TimeoutError:
            return False
        finally:
            with self._change:
                self._waiting -= 1
        return True

    def check_retry(self) -> None:
        """Raise ModelUnavailable with the last load's reason if it failed a moment ago."""
        with self._change:
            if self._error is not None and time.monotonic() - self._failed_at < RETRY_S:
                raise ModelUnavailable(self._error.message)

    # Loads and swaps

    def begin(self) -> bool:
        """Claim the work of loading a model. False if one is served, another thread is at it, or all is closed."""
        with self._change:
            if self._closed or self._held is not None or self._busy:
                return False
            self._busy, self._work = True, Future()
            self._error, self._awaited = None, False
            return True

    def wait_idle(self) -> Loaded | None:
        """Block until no load is under way; return what is served. Raises ModelUnavailable once closed."""
        with self._change:
            self._change.wait_for(lambda: not self._busy)
            self._check_open()
        self.drop_failed()
        return self._held

    def withdraw(self) -> None:
        """Take the served model out of service for a swap in place: requests wait for the work that begins here."""
        with self._change:
            old, self._held = self._held, None
            self._busy, self._work = True, Future()
            self._error, self._awaited = None, True
        if old is not None:
            self._lender.retire(old)

    def wait_freed(self, old: Loaded, grace: float) -> bool:
        """As `Lender.wait_freed`."""
        return self._lender.wait_freed(old, grace)

    def publish(self, held: Loaded, choice: Choice) -> None:
        """Serve a loaded model from now on and retire the one served before. Raises ModelUnavailable once closed."""
        with self._change:
            closed, work = self._closed, self._work
            if closed:
                retired: Loaded | None = held
            else:
                retired, self._held = self._held, held
                self._last, self._error = (choice, held.config), None
        if work is not None and not work.done():
            work.set_result(None)  # whoever waits may lease it now: templates and tokens need no weights
        if retired is not None:
            self._lender.retire(retired)
        if closed:
            raise ModelUnavailable("The server is stopping.", retry_after=1)

    def hold(self, loaded: Loaded) -> Lease:
        """A lease of a model that is not published yet."""
        return self._lender.lend(loaded)

    def give_up(self, held: Loaded, error: Exception) -> None:
        """Serve a published model no more: its tensors did not come."""
        with self._change:
            if self._held is held:
                self._held = None
        self._lender.retire(held)
        self.fail(error)

    def fail(self, error: Exception) -> None:
        """Keep why there is no model, for the state and for requests within the next RETRY_S."""
        if error is self._error or self._closed:
            return
        if isinstance(error, ApiError):
            log.error("%s", error.message)
        else:
            log.error("the load failed", exc_info=error)
            error = ModelUnavailable("The model could not be loaded; the log has the reason.")
        with self._change:
            self._error, self._failed_at = error, time.monotonic()

    def settle(self) -> None:
        """The work is over: wake whoever waits for it."""
        with self._change:
            work, self._work, self._busy = self._work, None, False
            self._change.notify_all()
        if work is not None and not work.done():
            work.set_result(None)

    def close(self, grace: float) -> None:
        """Lend no more; wait up to `grace` seconds for the leases, then cut their answers and free."""
        with self._change:
            self._closed = True
            held, self._held = self._held, None
        if held is not None:
            self._lender.retire(held)
        self._lender.close(grace)

    def _check_open(self) -> None:
        if self._closed:
            raise ModelUnavailable("The server is stopping.", retry_after=1)
