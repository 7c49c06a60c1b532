"""Pace: how much of a prompt a step may read while other sequences decode."""

from __future__ import annotations

PREFILL_SLICE_S = 0.2  # reading a prompt may hold the others' next token up for about this long
SMALLEST_SLICE = 16  # tokens


class Pace:
    """Learns the speed of prefill from the steps it is told of."""

    def __init__(self) -> None:
        self._rate = 0.0  # tokens a second, smoothed

    def note(self, tokens: int, seconds: float) -> None:
        """A decode call of `tokens` took `seconds`; small ones say nothing of prefill."""
        if tokens >= SMALLEST_SLICE:
            rate = tokens / max(seconds, 1e-6)
            self._rate = rate if not self._rate else 0.7 * self._rate + 0.3 * rate

    def slice(self, most: int) -> int:
        """Prompt tokens for the next step, at most `most`."""
        return max(SMALLEST_SLICE, min(most, int(self._rate * PREFILL_SLICE_S)))
