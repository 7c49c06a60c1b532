"""Blocks: which parts of a large object are here, which are asked for, and what to ask for next. No input, no output.

A *block* is the unit of verification and of writing; a *part* is what one request asks for, one or more blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

OVERTAKE_S = 1.0  # the least time after which an idle thread also fetches what another owes
SLOW_S = 30.0  # the least time after which a connection that still owes its block is cut: it drips


@dataclass(slots=True)
class Part:
    """What one request still owes: blocks `next` to `end`, the latter not counted."""

    next: int
    end: int


class Blocks:
    """The state of one download. The caller guards it with a lock; times are `time.monotonic()`'s."""

    def __init__(
        self,
        size: int,
        block_bytes: int,
        *,
        first_bytes: int = 0,
        part_bytes: int = 0,
        width: int = 1,
        slow_s: float = SLOW_S,
    ) -> None:
        self.size = size
        self.count = -(-size // block_bytes)
        self.front = 0  # blocks written without a gap
        self.arrived = 0  # bytes written
        self._block_bytes = block_bytes
        self._first = -(-first_bytes // block_bytes)
        self._part = max(1, part_bytes // block_bytes)
        self._width = width
        self.active = width  # how many requests may run at a time: fewer on a slow link
        self._slow_s = slow_s
        self._quiet_since: float | None = None  # when a block last landed, or the link was last found slow
        self._claimed = bytearray(self.count)  # 1: whole in some thread's hands, or written
        self._written = bytearray(self.count)
        self._owed: dict[int, float] = {}  # block -> when its part was asked for or last moved on
        self._next = 0  # the first block that nobody has asked for
        self._pace = 0.0  # seconds a block takes, a running mean

    def offset(self, block: int) -> int:
        """Where a block begins; that of the one after the last is the size."""
        return min(block * self._block_bytes, self.size)

    def length(self, block: int) -> int:
        return self.offset(block + 1) - self.offset(block)

    def before(self, offset: int) -> int:
        """How many blocks hold the bytes before `offset`."""
        return -(-min(offset, self.size) // self._block_bytes)

    def complete(self) -> bool:
        return self.front == self.count

    def take(self, now: float) -> Part | None:
        """What to ask for next; None: nothing now, as all is asked for and none of it is late.

        Parts are single blocks in the first bytes, so that they are soon complete, and get smaller towards the end, so
        that all threads finish together.
        """
        if self._quiet_since is None:
            self._quiet_since = now
        while self._next < self.count and self._claimed[self._next]:
            self._next += 1
        if self._next < self.count:
            first = self._next
            share = (self.count - first) // (2 * self._width)
            most = 1 if first < self._first else max(1, min(self._part, share))
            end = first + 1
            while end < min(first + most, self.count) and not self._claimed[end]:
                end += 1
            self._next = end
            self._owed.update(dict.fromkeys(range(first, end), now))
            return Part(first, end)
        patience = max(OVERTAKE_S, 4 * self._pace)
        for block, since in self._owed.items():
            if now - since > patience:
                self._owed[block] = now
                return Part(block, block + 1)
        return None

    def claim(self, block: int) -> bool:
        """A thread has the block whole: may it write it? Only one may."""
        if self._claimed[block]:
            return False
        self._claimed[block] = 1
        return True

    def landed(self, block: int) -> None:
        """A claimed block is written."""
        self._claimed[block] = self._written[block] = 1
        self._owed.pop(block, None)
        self.arrived += self.length(block)
        while self.front < self.count and self._written[self.front]:
            self.front += 1

    def moved(self, part: Part, now: float, seconds: float) -> None:
        """A part has brought a block in so many seconds: the rest of it is not late."""
        self._pace = 0.75 * self._pace + 0.25 * seconds if self._pace else seconds
        self._quiet_since = now
        if seconds < self._slow_s / 4:
            self.active = min(self._width, self.active + 1)
        for block in range(part.next, part.end):
            if block in self._owed:
                self._owed[block] = now

    def patience(self) -> float:
        """Seconds that a connection may take for a block before it is cut. Where all are slow, none is."""
        return max(self._slow_s, 8 * self._pace)

    def slowed(self, now: float) -> None:
        """A connection was cut or fell silent. If no block has landed for long, it is the link that is slow, and half
        as many requests share it from now on."""
        if self._quiet_since is not None and now - self._quiet_since >= self._slow_s:
            self.active = max(1, self.active // 2)
            self._quiet_since = now
