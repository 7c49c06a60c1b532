"""Record the phases of a start, on a clock that begins with the process."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


def process_started() -> float:
    """Return when the kernel started this process, on `time.monotonic()`'s clock. Outside Linux: now."""
    try:
        with open("/proc/self/stat", "rb") as file:  # noqa: PTH123 - pathlib costs an import on the cold path
            ticks = int(file.read().rsplit(b")", 1)[1].split()[19])
    except OSError:
        return time.monotonic()
    return time.monotonic() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


@dataclass(frozen=True, slots=True)
class Phase:
    """A named part of the start, in seconds since the process began. `end` is None while it runs."""

    name: str
    start: float
    end: float | None = None


class Timeline:
    """The phases by name. They may overlap and be recorded from any thread."""

    def __init__(self, origin: float | None = None) -> None:
        self._origin = process_started() if origin is None else origin
        self._lock = threading.Lock()
        self._phases: dict[str, Phase] = {}

    def restart(self) -> None:
        """Restart the clock and forget all phases, after the process was restored from a snapshot."""
        with self._lock:
            self._origin = time.monotonic()
            self._phases.clear()

    def now(self) -> float:
        """Return the seconds since the process began."""
        return time.monotonic() - self._origin

    def mark(self, name: str, start: float, end: float | None = None) -> None:
        """Record a phase with times that were measured with `now()`."""
        with self._lock:
            self._phases[name] = Phase(name, start, end)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record the duration of a `with` block."""
        start = self.now()
        self.mark(name, start)
        try:
            yield
        finally:
            self.mark(name, start, self.now())

    def phases(self) -> tuple[Phase, ...]:
        with self._lock:
            return tuple(sorted(self._phases.values(), key=lambda phase: phase.start))

    def report(self) -> dict[str, dict[str, float | None]]:
        """Return `{name: {start_ms, duration_ms}}`. The duration is None while the phase runs."""
        return {
            phase.name: {
                "start_ms": round(phase.start * 1e3, 1),
                "duration_ms": None if phase.end is None else round((phase.end - phase.start) * 1e3, 1),
            }
            for phase in self.phases()
        }
