"""Schedule: what the engine thread does next, as pure functions of data. No threads, no llama.cpp.

A running sequence is either *reading* (its prompt, or after a pause its prompt and the answer so far, is not in the KV
cells yet) or *decoding* (one new token a step, and the tokens a grammar forced).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

PREFILL_SLICE_S = 0.2  # reading a prompt may hold the others' next token up for about this long
SMALLEST_SLICE = 16  # tokens
RESERVE = 32  # a sequence is admitted if it and those that run can each grow by 1/32 of the cells


@dataclass(frozen=True, slots=True)
class Running:
    """A sequence that has a slot."""

    pending: int  # tokens not decoded yet, at least one
    reading: bool
    repeatable: bool = False  # the same request is expected to give the same text
    growth: int = 0  # the most tokens it may still gain


@dataclass(frozen=True, slots=True)
class Waiting:
    """A sequence without a slot."""

    cells: int  # what it needs beyond the cells of the sequences that run: its tokens, less a prefix they share
    growth: int
    blocked: bool = False  # a fork whose parent still reads the prompt: it will share the parent's cells


@dataclass(frozen=True, slots=True)
class Rows:
    """A sequence's part of a batch: its next `count` tokens, and whether the last one's logits are sampled from."""

    index: int  # of the sequence among those that run
    count: int
    sample: bool


def fill(running: Sequence[Running], size: int, prefill: int) -> list[Rows]:
    """Share a batch of `size` tokens out to the sequences that run, given in the order of their admission.

    Those that decode come first, each with at least one token. Those that read share the rest, and at most `prefill`
    tokens of it while another sequence decodes: its next token waits for the whole batch.
    """
    rows: list[Rows] = []
    room = size
    # 1) One token for each sequence that decodes, and forced tokens as far as that leaves one for the others.
    decoding = [index for index, sequence in enumerate(running) if not sequence.reading]
    for place, index in enumerate(decoding):
        count = min(running[index].pending, room - (len(decoding) - 1 - place))
        if count > 0:
            rows.append(Rows(index, count, sample=count == running[index].pending))
            room -= count
    # 2) Prompts in what is left.
    if decoding:
        room = min(room, prefill)
    for index, sequence in enumerate(running):
        if sequence.reading:
            count = min(sequence.pending, room)
            if sequence.repeatable and 1 < sequence.pending <= count:
                # The last token goes alone, as it does when all before it is cached: another batch shape adds up
                # floats in another order, and a near tie could fall the other way.
                count = sequence.pending - 1
            if count > 0:
                rows.append(Rows(index, count, sample=count == sequence.pending))
                room -= count
    return rows


def admit(waiting: Iterable[Waiting], running: Sequence[Running], used: int, cells: int | None) -> int | None:
    """The place in the queue of the sequence to admit next, or None. Takes as many of `waiting` as it must look at.

    First come, first admitted: a blocked fork is passed over, but a sequence that lacks room holds up the queue, or
    small ones would keep it waiting for ever. `used` of `cells` are held by the sequences that run; None: no limit.
    A sequence that is alone is always admitted.
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


def make_room(admitted: Sequence[int], *, idle: bool) -> Literal["evict", "end"] | int:
    """What gives way when a batch finds no cells. `admitted` says when each running sequence was admitted.

    An idle prefix, if there is one; else the youngest sequence is paused (returned as its index), so that the oldest
    always comes to its end; a sequence that is alone has filled the context and ends.
    """
    if idle:
        return "evict"
    if len(admitted) == 1:
        return "end"
    return max(range(len(admitted)), key=admitted.__getitem__)


class PrefillPace:
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
