"""Track which blocks of a large object have arrived or are outstanding, and choose what to request next. No I/O.

A *block* is the unit of verification and of writing. A *part* is what one request asks for: one or more blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

OVERTAKE_S = 1.0  # a block must be outstanding at least this long before an idle thread requests it too


@dataclass(slots=True)
class Part:
    """The outstanding blocks of one request: `next` up to but not including `end`."""

    next: int
    end: int


class Blocks:
    """The state of one download. The caller holds a lock; times are those of `time.monotonic()`."""

    def __init__(
        self,
        size: int,
        block_bytes: int,
        *,
        first_bytes: int = 0,
        part_bytes: int = 0,
        width: int = 1,
        slow_s: float = 30.0,
    ) -> None:
        self.size = size
        self.count = -(-size // block_bytes)
        self.front = 0  # blocks in the contiguous prefix
        self.arrived = 0  # bytes written
        self._block_bytes = block_bytes
        self._first = -(-first_bytes // block_bytes)
        self._part = max(1, part_bytes // block_bytes)
        self._width = width
        self.active = width  # requests that may run in parallel; fewer on a slow link
        self._slow_s = slow_s
        self._quiet_since: float | None = None  # when a block last landed, or the width was last halved
        self._claimed = bytearray(self.count)  # 1: a thread has all its bytes, or it is written
        self._written = bytearray(self.count)
        self._outstanding: dict[int, float] = {}  # block -> when its part was requested or last brought a block
        self._next = 0  # the first block that was not requested yet
        self._pace = 0.0  # seconds per block, a running mean

    def offset(self, block: int) -> int:
        """Return where a block begins. The block after the last begins at the object's size."""
        return min(block * self._block_bytes, self.size)

    def length(self, block: int) -> int:
        return self.offset(block + 1) - self.offset(block)

    def before(self, offset: int) -> int:
        """Return how many blocks hold the bytes before `offset`."""
        return -(-min(offset, self.size) // self._block_bytes)

    def complete(self) -> bool:
        return self.front == self.count

    def take(self, now: float) -> Part | None:
        """Return the part to request next, or None if everything is requested and no block is late.

        Parts are single blocks within the first bytes, so that these are complete early, and get smaller towards the
        end, so that all threads finish together.
        """
        if self._quiet_since is None:
            self._quiet_since = now
        # 1) The next blocks that were not requested yet.
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
            self._outstanding.update(dict.fromkeys(range(first, end), now))
            return Part(first, end)
        # 2) A block that is outstanding for too long, a second time.
        patience = max(OVERTAKE_S, 4 * self._pace)
        for block, since in self._outstanding.items():
            if now - since > patience:
                self._outstanding[block] = now
                return Part(block, block + 1)
        return None

    def claim(self, block: int) -> bool:
        """Return whether the thread that has all bytes of the block may write it. Only the first may."""
        if self._claimed[block]:
            return False
        self._claimed[block] = 1
        return True

    def landed(self, block: int) -> None:
        """Record that a claimed block is written."""
        self._claimed[block] = self._written[block] = 1
        self._outstanding.pop(block, None)
        self.arrived += self.length(block)
        while self.front < self.count and self._written[self.front]:
            self.front += 1

    def moved(self, part: Part, now: float, seconds: float) -> None:
        """Record that a part brought a block in `seconds`; the rest of the part is not late."""
        self._pace = 0.75 * self._pace + 0.25 * seconds if self._pace else seconds
        self._quiet_since = now
        if seconds < self._slow_s / 4:
            self.active = min(self._width, self.active + 1)
        for block in range(part.next, part.end):
            if block in self._outstanding:
                self._outstanding[block] = now

    def patience(self) -> float:
        """Return how many seconds a connection may take for a block before it is cut. It grows if all are slow."""
        return max(self._slow_s, 8 * self._pace)

    def slowed(self, now: float) -> None:
        """Record that a connection was cut or stalled. If no block has landed for `slow_s`, the link itself is slow:
        halve the number of parallel requests."""
        if self._quiet_since is not None and now - self._quiet_since >= self._slow_s:
            self.active = max(1, self.active // 2)
            self._quiet_since = now
