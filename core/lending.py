"""Lease: the right to use an engine. Lender: who has one, and when an engine that was swapped out may be freed."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

from core.engine.interface import Engine, EngineConfig
from core.store.reference import Reference

log = logging.getLogger("slm.lease")

STOP_S = 2.0  # what leases get to come back at the end, once their answers are cut
CUT_S = 10.0  # the same for a swap: a prompt that is being built in a worker thread may take seconds


@dataclass(slots=True, eq=False)
class Loaded:
    """An engine, how it came to be, and how many use it."""

    engine: Engine
    reference: Reference
    config: EngineConfig
    leases: int = 0
    retired: bool = False


class Lease:
    """The right to use an engine: one that is retired is freed when its last lease is released."""

    __slots__ = ("_lender", "_loaded", "engine")

    def __init__(self, lender: Lender, loaded: Loaded) -> None:
        self.engine = loaded.engine
        self._lender = lender
        self._loaded: Loaded | None = loaded

    def release(self) -> None:
        """Give the engine back. Idempotent, from any thread."""
        self._lender._take_back(self)


class Lender:
    """Thread-safe. Knows engines only while they are lent or waiting to be freed."""

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._retired: set[Loaded] = set()
        self._lent = 0

    @property
    def lent(self) -> int:
        """How many leases are not given back yet, retired engines' included."""
        return self._lent

    def lend(self, loaded: Loaded) -> Lease:
        with self._change:
            loaded.leases += 1
            self._lent += 1
        return Lease(self, loaded)

    def retire(self, loaded: Loaded) -> None:
        """Free the engine now, or when its last lease is back. Lend it no more. Idempotent."""
        with self._change:
            if loaded.retired:
                return
            loaded.retired = True
            self._retired.add(loaded)
            free = loaded.leases == 0
        if free:
            self._free(loaded)

    def wait_freed(self, loaded: Loaded, grace: float) -> bool:
        """Block until a retired engine is freed: its answers get `grace` seconds to finish and are cut then.

        Return False if a lease is still out CUT_S after that; the engine is freed when it comes back.
        """
        with self._change:
            if self._change.wait_for(lambda: loaded not in self._retired, timeout=grace):
                return True
        log.warning("answers are cut: they held the old model for more than %g s", grace)
        loaded.engine.stop()
        with self._change:
            return self._change.wait_for(lambda: loaded not in self._retired, timeout=CUT_S)

    def close(self, grace: float) -> None:
        """Wait up to `grace` seconds for the leases of retired engines, then cut their answers."""
        deadline = time.monotonic() + grace
        with self._change:
            self._change.wait_for(lambda: not self._retired, timeout=max(0.0, deadline - time.monotonic()))
            late = list(self._retired)
        for loaded in late:
            loaded.engine.stop()  # its streams fail, their leases come back, the last one frees it
        with self._change:
            self._change.wait_for(lambda: not self._retired, timeout=STOP_S)

    def _take_back(self, lease: Lease) -> None:
        with self._change:
            loaded, lease._loaded = lease._loaded, None
            if loaded is None:
                return
            loaded.leases -= 1
            self._lent -= 1
            free = loaded.retired and loaded.leases == 0
        if free:
            # A release comes from an event loop; joining the engine's thread and unmapping do not belong there.
            threading.Thread(target=self._free, args=(loaded,), name="free").start()

    def _free(self, loaded: Loaded) -> None:
        try:
            loaded.engine.close()
        finally:
            with self._change:
                self._retired.discard(loaded)
                self._change.notify_all()
