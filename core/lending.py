"""Lend the loaded model to requests: leases, waiting for a load, and freeing an engine after a swap.

`Lease` is the right to use an engine, `Lender` counts leases and frees retired engines, `Served` holds the current
model and the requests that wait for one. Nothing here loads a model; `core.host` does.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar

from core.engine.interface import EngineConfig, LoadedEngine
from core.errors import ApiError, Busy, ModelUnavailable
from core.selection import Selection
from core.store.reference import Reference

logger = logging.getLogger("slm.lending")

E = TypeVar("E", bound=LoadedEngine)
T = TypeVar("T")

STOP_S = 2.0  # shutdown: how long to wait for leases after their generations are stopped
CUT_S = 10.0  # swap: the same; longer, because a worker thread may take seconds to build a prompt


@dataclass(slots=True, eq=False)
class Loaded(Generic[E]):
    """An engine, the reference and configuration it was loaded from, and its number of leases."""

    engine: E
    reference: Reference
    config: EngineConfig
    leases: int = 0
    retired: bool = False


class Lease(Generic[E]):
    """The right to use an engine. A retired engine is freed when its last lease is released."""

    __slots__ = ("_lender", "_loaded", "engine")

    def __init__(self, lender: Lender[E], loaded: Loaded[E]) -> None:
        self.engine = loaded.engine
        self._lender = lender
        self._loaded: Loaded[E] | None = loaded

    def release(self) -> None:
        """Return the engine. Idempotent and thread-safe."""
        self._lender._take_back(self)


async def in_thread(lease: Lease[E], build: Callable[[E], T]) -> T:
    """Run `build` in a worker thread and keep the lease until that thread is done.

    A cancelled caller waits for the thread too: it still uses the engine, which a swap could otherwise free.
    """
    result = asyncio.get_running_loop().run_in_executor(None, build, lease.engine)
    try:
        return await asyncio.shield(result)
    except asyncio.CancelledError:
        while not result.done():
            try:
                await asyncio.wait({result})
            except asyncio.CancelledError:
                continue
        result.exception()  # mark it as retrieved, so that asyncio does not log it
        raise


class Lender(Generic[E]):
    """Counts leases and frees retired engines. Thread-safe."""

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._retired: set[Loaded[E]] = set()
        self._lent = 0

    @property
    def lent(self) -> int:
        """Number of outstanding leases, including those of retired engines."""
        return self._lent

    def lend(self, loaded: Loaded[E]) -> Lease[E]:
        with self._change:
            loaded.leases += 1
            self._lent += 1
        return Lease(self, loaded)

    def retire(self, loaded: Loaded[E]) -> None:
        """Free the engine as soon as it has no leases. It must not be lent again. Idempotent."""
        with self._change:
            if loaded.retired:
                return
            loaded.retired = True
            self._retired.add(loaded)
            free = loaded.leases == 0
        if free:
            self._free(loaded)

    def wait_freed(self, loaded: Loaded[E], grace: float) -> bool:
        """Block until a retired engine is freed. Generations get `grace` seconds to finish, then they are stopped.

        Return False if a lease is still outstanding CUT_S after that. The engine is then freed when it is released.
        """
        with self._change:
            if self._change.wait_for(lambda: loaded not in self._retired, timeout=grace):
                return True
        logger.warning("stopping generations that still use the old model after %g s", grace)
        loaded.engine.stop()
        with self._change:
            return self._change.wait_for(lambda: loaded not in self._retired, timeout=CUT_S)

    def close(self, grace: float) -> None:
        """Wait up to `grace` seconds for the leases of retired engines, then stop their generations."""
        deadline = time.monotonic() + grace
        with self._change:
            self._change.wait_for(lambda: not self._retired, timeout=max(0.0, deadline - time.monotonic()))
            late = list(self._retired)
        for loaded in late:
            loaded.engine.stop()  # its streams fail and release their leases; the last release frees it
        with self._change:
            self._change.wait_for(lambda: not self._retired, timeout=STOP_S)

    def _take_back(self, lease: Lease[E]) -> None:
        with self._change:
            loaded, lease._loaded = lease._loaded, None
            if loaded is None:
                return
            loaded.leases -= 1
            self._lent -= 1
            free = loaded.retired and loaded.leases == 0
        if free:
            # `release` runs on an event loop, which must not block on joining the engine thread and unmapping.
            threading.Thread(target=self._free, args=(loaded,), name="free").start()

    def _free(self, loaded: Loaded[E]) -> None:
        try:
            loaded.engine.close()
        finally:
            with self._change:
                self._retired.discard(loaded)
                self._change.notify_all()


RETRY_S = 5.0  # after a failed load, requests get its error for this long before the load is retried


class Served(Generic[E]):
    """The current model, the work that will replace it, and the requests that wait. Thread-safe.

    A load or an in-place swap starts with `begin` (or `withdraw`) and ends with `settle`. In between, `publish` makes a
    model available. Until then, requests wait for the future of that work. It completes as soon as a model can be
    leased or the work has failed.
    """

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._lender: Lender[E] = Lender()
        self._current: Loaded[E] | None = None
        self._last: tuple[Selection, EngineConfig] | None = None
        self._work: Future[None] | None = None
        self._busy = False  # loading, swapping, or tensors are still being downloaded
        self._waiting = 0
        self._awaited = False
        self._error: ApiError | None = None
        self._failed_at = 0.0
        self._closed = False

    @property
    def current(self) -> Loaded[E] | None:
        return self._current

    @property
    def last(self) -> tuple[Selection, EngineConfig] | None:
        """The last served model and its configuration. After a failure the next load retries it."""
        return self._last

    @property
    def busy(self) -> bool:
        return self._busy

    @property
    def awaited(self) -> bool:
        """Whether a request has waited for the current work."""
        return self._awaited

    @property
    def waiting(self) -> int:
        """Number of requests that wait for the current work."""
        return self._waiting

    @property
    def lent(self) -> int:
        return self._lender.lent

    @property
    def error(self) -> ApiError | None:
        """Why the last load, or the last served engine, failed."""
        return self._error

    def drop_failed(self) -> None:
        """Stop serving a model whose engine has failed. The next request loads it again without delay."""
        with self._change:
            failed = self._current
            if failed is None or failed.engine.failed is None:
                return
            self._current, self._error, self._failed_at = None, failed.engine.failed, float("-inf")
            lease = self._lender.lend(failed)
        logger.error("the engine of %s has failed; it will be loaded again", failed.engine.card.name)
        # Retiring an engine without leases frees it in this thread, which may be an event loop's: use a lease instead.
        self._lender.retire(failed)
        lease.release()

    # Requests

    def lend(self) -> Lease[E] | None:
        """Return a lease of the current model, or None without one. Raises ModelUnavailable once closed."""
        self.drop_failed()
        with self._change:
            self._check_open()
            return None if self._current is None else self._lender.lend(self._current)

    async def wait(self, deadline: float | None, most: int | None) -> bool:
        """Wait until the current work has published a model or failed. Return at once without work.

        Return False if the deadline passes first. Raises Busy if `most` requests already wait.
        """
        with self._change:
            work = self._work
            if work is None:
                return True
            if most is not None and self._waiting >= most:
                raise Busy(
                    f"{most} requests are already waiting for the model to load. Try again later.", retry_after=5
                )
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
        """Raise ModelUnavailable with the last load's error if it failed less than RETRY_S ago."""
        with self._change:
            if self._error is not None and time.monotonic() - self._failed_at < RETRY_S:
                raise ModelUnavailable(self._error.message)

    # Loads and swaps

    def begin(self) -> bool:
        """Claim the load. Return False if a model is served, another thread is loading, or this is closed."""
        with self._change:
            if self._closed or self._current is not None or self._busy:
                return False
            self._busy, self._work = True, Future()
            self._error, self._awaited = None, False
            return True

    def wait_idle(self) -> Loaded[E] | None:
        """Block until no load is running and return the current model. Raises ModelUnavailable once closed."""
        with self._change:
            self._change.wait_for(lambda: not self._busy)
            self._check_open()
        self.drop_failed()
        return self._current

    def withdraw(self) -> None:
        """Take the current model out of service for an in-place swap. Requests wait for the work that starts here."""
        with self._change:
            old, self._current = self._current, None
            self._busy, self._work = True, Future()
            self._error, self._awaited = None, True
        if old is not None:
            self._lender.retire(old)

    def wait_freed(self, old: Loaded[E], grace: float) -> bool:
        """See `Lender.wait_freed`."""
        return self._lender.wait_freed(old, grace)

    def publish(self, loaded: Loaded[E], selection: Selection) -> None:
        """Make `loaded` the current model and retire the previous one. Raises ModelUnavailable once closed."""
        with self._change:
            closed, work = self._closed, self._work
            if closed:
                retired: Loaded[E] | None = loaded
            else:
                retired, self._current = self._current, loaded
                self._last, self._error = (selection, loaded.config), None
        if work is not None and not work.done():
            work.set_result(None)  # waiting requests may lease it now: templates and the tokenizer need no weights
        if retired is not None:
            self._lender.retire(retired)
        if closed:
            raise ModelUnavailable("The server is stopping.", retry_after=1)

    def hold(self, loaded: Loaded[E]) -> Lease[E]:
        """Return a lease of a model that is not published yet."""
        return self._lender.lend(loaded)

    def give_up(self, loaded: Loaded[E], error: Exception) -> None:
        """Stop serving a published model whose tensors could not be downloaded."""
        with self._change:
            if self._current is loaded:
                self._current = None
        self._lender.retire(loaded)
        self.fail(error)

    def fail(self, error: Exception) -> None:
        """Record why there is no model. The state shows it, and requests in the next RETRY_S get it."""
        if error is self._error or self._closed:
            return
        if isinstance(error, ApiError):
            logger.error("%s", error.message)
        else:
            logger.error("the load failed", exc_info=error)
            error = ModelUnavailable("The model could not be loaded. The server log has the reason.")
        with self._change:
            self._error, self._failed_at = error, time.monotonic()

    def settle(self) -> None:
        """End the current work and wake the requests that wait for it."""
        with self._change:
            work, self._work, self._busy = self._work, None, False
            self._change.notify_all()
        if work is not None and not work.done():
            work.set_result(None)

    def close(self, grace: float) -> None:
        """Stop lending, wait up to `grace` seconds for the leases, then stop their generations and free the engine."""
        with self._change:
            self._closed = True
            last, self._current = self._current, None
        if last is not None:
            self._lender.retire(last)
        self._lender.close(grace)

    def _check_open(self) -> None:
        if self._closed:
            raise ModelUnavailable("The server is stopping.", retry_after=1)
