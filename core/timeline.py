"""Timeline: the phases of one start, on one clock that begins with the process."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


def process_started() -> float:
    """When the kernel started this process, on `time.monotonic()`'s clock (Linux; elsewhere: now)."""
    try:
        with open("/proc/self/stat", "rb") as file:  # noqa: PTH123 - pathlib costs an import on the cold path
            ticks = int(file.read().rsplit(b")", 1)[1].split()[19])
    except OSError:
        return time.monotonic()
    return time.monotonic() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


@dataclass(frozen=True, slots=True)
class Phase:
    """A named stretch of the start, in seconds since the process began. `end` is None while it runs."""

    name: str
    start: float
    end: float | None = None


class Timeline:
    """Phases may overlap and come from any thread; each name is kept once, in order of its start."""

    def __init__(self, origin: float | None = None) -> None:
        self._origin = process_started() if origin is None else origin
        self._lock = threading.Lock()
        self._phases: dict[str, Phase] = {}

    def restart(self) -> None:
        """Begin anew, now: for a process restored from a snapshot, whose start was another machine's."""
        with self._lock:
            self._origin = time.monotonic()
            self._phases.clear()

    def now(self) -> float:
        """Seconds since the process began."""
        return time.monotonic() - self._origin

    def mark(self, name: str, start: float, end: float | None = None) -> None:
        """Record a phase by times already taken with `now()`."""
        with self._lock:
            self._phases[name] = Phase(name, start, end)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the block."""
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
        """`{name: {start_ms, duration_ms}}`; duration is null while the phase runs."""
        return {
            phase.name: {
                "start_ms": round(phase.start * 1e3, 1),
                "duration_ms": None if phase.end is None else round((phase.end - phase.start) * 1e3, 1),
            }
            for phase in self.phases()
        }
