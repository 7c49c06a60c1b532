"""Host: which model is served now. Loads it, swaps it, lends it out; knows no HTTP and no sources.

States: `unloaded` (nothing to serve) -> `available` (a model is configured or on disk, not in memory) -> `ready`.
`loading` and `error` are reported beside the state, never instead of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from core.engine.generation import Engine, EngineConfig

Status = Literal["unloaded", "available", "ready"]


@dataclass(frozen=True, slots=True)
class Loading:
    """A load under way: phase is "download", "load" or "swap"; `done` of `total` bytes (0 of 0: not known yet)."""

    phase: str
    model: str
    done: int = 0
    total: int = 0

    @property
    def percent(self) -> int | None:
        return None if self.total == 0 else min(100, self.done * 100 // self.total)


@dataclass(frozen=True, slots=True)
class HostState:
    """A snapshot. `model` is the name served, or the one that a first request would load; None if there is none."""

    status: Status
    model: str | None
    loading: Loading | None
    error: str | None  # of the last load that failed, in our words
    engine: Engine | None


class Lease(Protocol):
    """The right to use an engine: a swapped-out engine is freed when its last lease is released."""

    engine: Engine

    def release(self) -> None:
        """Idempotent, from any thread."""


class Host:
    """Thread-safe. The async methods may be called on any loop; loads run in threads of the host's own."""

    def state(self) -> HostState:
        raise NotImplementedError

    def start(self) -> None:
        """Begin loading the configured model in a thread, if that has not begun. Needs no event loop; returns at once."""
        raise NotImplementedError

    async def lease(self, deadline: float | None = None) -> Lease:
        """The engine, loading it first if need be. Waits at most until `deadline` (monotonic).

        Raises ModelUnavailable: nothing configured, the load failed (the reason in our words), or no time left (with
        Retry-After). A load that failed is tried again by a later call, not by every call.
        """
        raise NotImplementedError

    async def wait_ready(self, seconds: float) -> HostState:
        """Start the load if there is something to load, and return when it is ready, failed or the time is up."""
        raise NotImplementedError

    async def swap(self, reference: str, config: EngineConfig) -> HostState:
        """Load `reference` (a local model) and serve it; running answers finish on the old engine.

        Raises what the store or the engine say of the new model; the old one then still serves.
        """
        raise NotImplementedError

    async def close(self, grace: float) -> None:
        """No new leases; wait up to `grace` seconds for the running ones, then cancel and free."""
        raise NotImplementedError


LoadEngine = Callable[..., Engine]
