"""Decide what the engine thread does next, as pure functions of data. No threads, no llama.cpp.

A running sequence is either *prefilling* (its prompt is not in the KV cells yet, nor after a preemption its answer so
far) or *decoding* (one new token a step, and the tokens that a grammar forced).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

RESERVE = 32  # a sequence is admitted if it and all running ones can each grow by 1/32 of the KV cells
PREFILL_SLICE_S = 0.2  # how long a prefill may delay the next token of other sequences
SMALLEST_SLICE = 16  # tokens


@dataclass(frozen=True, slots=True)
class Running:
    """A sequence that has a slot."""

    pending: int  # tokens not decoded yet, at least one
    prefilling: bool
    repeatable: bool = False  # the same request should give the same text
    growth: int = 0  # the most tokens it may still gain
    scoring: bool = False  # the logits of all its tokens are needed


@dataclass(frozen=True, slots=True)
class Waiting:
    """A sequence without a slot."""

    cells: int  # KV cells it needs beyond those in use: its tokens, less a prefix that it shares with a running one
    growth: int
    blocked: bool = False  # a fork whose parent is still prefilling; it will share the parent's cells


@dataclass(frozen=True, slots=True)
class Rows:
    """A sequence's part of a batch: its next `count` tokens. `sample` says whether the last one's logits are needed."""

    index: int  # of the running sequence
    count: int
    sample: bool


def fill(running: Sequence[Running], size: int, prefill: int, outputs: int) -> list[Rows]:
    """Distribute a batch of `size` tokens over the running sequences, which are in the order of their admission.

    Decoding sequences come first, each with at least one token. Prefilling sequences share the rest. While another
    sequence decodes they get at most `prefill` tokens, because its next token waits for the whole batch. At most
    `outputs` tokens have logits: one of each sequence, and more of the prompts that are scored.
    """
    rows: list[Rows] = []
    room = size
    # 1) One token for each decoding sequence. Forced tokens go along as long as one is left for each of the others.
    decoding = [index for index, sequence in enumerate(running) if not sequence.prefilling]
    for place, index in enumerate(decoding):
        count = min(running[index].pending, room - (len(decoding) - 1 - place))
        if count > 0:
            rows.append(Rows(index, count, sample=count == running[index].pending))
            room -= count
    # 2) Prefill in the remaining room.
    if decoding:
        room = min(room, prefill)
    spare = outputs - len(running)
    for index, sequence in enumerate(running):
        if sequence.prefilling:
            count = min(sequence.pending, room)
            if sequence.scoring:
                count = min(count, 1 + spare)
                spare -= max(0, count - 1)
            if sequence.repeatable and 1 < sequence.pending <= count:
                # Decode the last token alone, as happens when all tokens before it are cached. Another batch shape
                # adds up floats in another order, and a near tie could fall the other way.
                count = sequence.pending - 1
            if count > 0:
                rows.append(Rows(index, count, sample=count == sequence.pending))
                room -= count
    return rows


def admit(waiting: Iterable[Waiting], running: Sequence[Running], used: int, cells: int | None) -> int | None:
    """Return the queue position of the sequence to admit next, or None. Reads `waiting` only as far as needed.

    The order is first come, first served. A blocked fork is skipped, but a sequence that lacks room holds up the
    queue: otherwise small ones could keep it waiting for ever. The running sequences hold `used` of `cells` (None: no
    limit). A sequence that would run alone is always admitted.
    """
    for place, sequence in enumerate(waiting):
        if sequence.blocked:
            continue
        if not running or cells is None:
            return place
        reserve = cells // RESERVE
        growth = sum(min(other.growth, reserve) + other.pending for other in running)
        needed = used + growth + sequence.cells + min(sequence.growth, reserve)
        return place if needed <= cells else None
    return None


def make_room(admissions: Sequence[int], *, idle: bool) -> Literal["evict", "end"] | int:
    """Decide what gives way when a batch finds no KV cells.

    "evict" an idle prefix if there is one (`idle`). Otherwise return the index of the running sequence to preempt: the
    youngest, by its admission number, so that the oldest always finishes. "end" a sequence that runs alone: it has
    filled the context.
    """
    if idle:
        return "evict"
    if len(admissions) == 1:
        return "end"
    return max(range(len(admissions)), key=admissions.__getitem__)


class PrefillPace:
    """Measures the speed of prefill, to say how many prompt tokens fit into PREFILL_SLICE_S."""

    def __init__(self) -> None:
        self._rate = 0.0  # tokens a second, smoothed

    def note(self, tokens: int, seconds: float) -> None:
        """Record a decode call. Calls with few tokens do not show the speed of prefill."""
        if tokens >= SMALLEST_SLICE:
            rate = tokens / max(seconds, 1e-6)
            self._rate = rate if not self._rate else 0.7 * self._rate + 0.3 * rate

    def slice(self, most: int) -> int:
        """Return the number of prompt tokens for the next step, at most `most`."""
        return max(SMALLEST_SLICE, min(most, int(self._rate * PREFILL_SLICE_S)))
