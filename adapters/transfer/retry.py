"""Decide whether and when a failed request is tried again."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

from core.store.source import Cancelled, DownloadCancelled

POLL_S = 0.1  # how soon a cancellation ends a pause


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponential backoff with jitter, in seconds."""

    first_s: float
    longest_s: float

    def pause(self, failures: int) -> float:
        """Return the pause after this many failures in a row: between half of the full pause and all of it."""
        full = min(self.longest_s, self.first_s * 2.0 ** (failures - 1))
        return random.uniform(full / 2, full)  # noqa: S311 - jitter, no secret


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Limits of one download. Tests pass shorter ones."""

    stall_s: float = 10.0  # a read that brings no byte for this long fails
    slow_s: float = 30.0  # a block may take this long before its connection is cut
    attempts: int = 8  # failures in a row without a new byte, after which the download fails
    backoff: Backoff = Backoff(0.1, 5.0)


DEFAULT_POLICY = RetryPolicy()


def is_transient(status: int) -> bool:
    """Return whether the same request may succeed later, by its HTTP status."""
    return status in (408, 425, 429) or status >= 500


def sleep(seconds: float, cancelled: Cancelled) -> None:
    """Sleep. Raise DownloadCancelled as soon as `cancelled()` is true."""
    end = time.monotonic() + seconds
    while True:
        if cancelled():
            raise DownloadCancelled
        if (left := end - time.monotonic()) <= 0:
            return
        time.sleep(min(left, POLL_S))
