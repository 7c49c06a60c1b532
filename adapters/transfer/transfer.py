"""Transfer: a large object in parallel ranged reads, written where it belongs as the blocks arrive.

An object is cut into *blocks*: a block is received whole, compared with its sha256 where the manifest has one, and only
then written, so nothing unverified reaches the target and memory is bounded by threads x block. A *part* is what one
request asks for: several blocks, or one where it matters (the header that loading waits for, and the end, so that all
threads finish together). A failed request goes on at the first byte it still owes, and on a slow link fewer run at a
time. What one thread owes for too long another fetches too, and the first to have it whole writes it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from adapters.transfer.blocks import OVERTAKE_S, SLOW_S, Blocks, Part
from adapters.transfer.checksum import Checksum
from adapters.transfer.connection import Connection, ConnectionBroken
from adapters.transfer.errors import Refused, WrongBytes
from adapters.transfer.lane import Lane, Origin
from core.errors import ModelUnavailable
from core.store.source import Damaged, DownloadCancelled

BLOCK_BYTES = 2 << 20
MAX_BLOCK_BYTES = 16 << 20
ATTEMPTS = 8  # failures in a row, without one new block, after which a part gives up
WRONG_ATTEMPTS = 3  # the same for a block whose bytes are wrong: they did not change on their way under TLS
STALL_S = 10.0  # a read that brings nothing for so long is given up
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0

logger = logging.getLogger("slm.transfer")


class Transfer:
    """A download under way: an `Arrival` (`core.store.model_file`). Thread-safe; it begins with `start()`.

    `digests` are the blocks' sha256; without them `checksum`, if any, follows the gapless front and decides at the end.
    The first `first_bytes` are fetched before all others. The first `resume` bytes are in the target already: they are
    checked against the digests, or trusted if there are none.
    """

    def __init__(
        self,
        origin: Origin,
        fd: int,
        size: int,
        *,
        block_bytes: int = BLOCK_BYTES,
        digests: Sequence[bytes] | None = None,
        checksum: Checksum | None = None,
        first_bytes: int = 0,
        resume: int = 0,
        threads: int = 4,
        part_bytes: int = 8 << 20,
        stall: float | None = None,
        slow: float = SLOW_S,
        pause: float | None = None,
    ) -> None:
        width = max(1, min(threads, -(-size // block_bytes)))
        blocks = Blocks(
            size,
            block_bytes,
            first_bytes=first_bytes,
            part_bytes=part_bytes,
            width=width,
            slow_s=slow,
        )
        if not 0 < block_bytes <= MAX_BLOCK_BYTES or (digests is not None and len(digests) != blocks.count):
            raise ValueError("the blocks do not cover the object")
        self._origin, self._fd, self._size = origin, fd, size
        self._block_bytes, self._digests, self._checksum = block_bytes, digests, checksum
        self._resume, self._width, self._stall = resume, width, STALL_S if stall is None else stall
        self._watch_s = min(1.0, slow / 8)
        self._pause = FIRST_PAUSE_S if pause is None else pause
        self._stopped = threading.Event()
        self._changed = threading.Condition()  # guards all below
        self._blocks = blocks
        self._error: BaseException | None = None
        self._requests = 0  # that run now
        self._using = 0  # threads that read or write the target now
        self._checked = checksum is None
        self._connections: dict[Connection, float] = {}  # -> when its block began

    # What the caller sees

    def start(self) -> None:
        """Check what is there already, then begin. Returns at once otherwise."""
        self._check_present()
        if self._complete():
            self._stopped.set()
            return
        jobs: list[tuple[Callable[..., None], tuple[object, ...]]] = [(self._work, ())] * self._width
        jobs.append((self._watch, ()))
        if self._checksum is not None:
            jobs.append((self._follow, (self._checksum,)))
        for run, arguments in jobs:
            threading.Thread(target=self._guard, args=(run, *arguments), name="download", daemon=True).start()

    def front(self) -> int:
        """Bytes from the start on that are written without a gap."""
        with self._changed:
            return self._blocks.offset(self._blocks.front)

    def progress(self) -> tuple[int, int]:
        """(bytes arrived, bytes in all)."""
        with self._changed:
            return self._blocks.arrived, self._size

    def wait_for(self, offset: int, timeout: float | None = None) -> bool:
        """Block until all bytes before `offset` are written (and verified, if there are digests); False: timed out.

        Raises ModelUnavailable if the transfer failed or was cancelled.
        """
        blocks = self._blocks
        return self._await(lambda: blocks.front >= blocks.before(offset), timeout)

    def wait(self) -> None:
        """Block until every byte is written and verified. Raises ModelUnavailable if that failed."""
        self._await(self._complete, None)

    def finish(self, timeout: float) -> bool:
        """Like `wait`, for at most so many seconds; False: not yet."""
        return self._await(self._complete, timeout)

    def cancel(self) -> None:
        """Give up; waiting then raises. On return no thread touches the target any more."""
        self._fail(DownloadCancelled(f"The download of {self._origin.name} was cancelled."))
        with self._changed:
            self._changed.wait_for(lambda: self._using == 0)

    def _await(self, condition: Callable[[], bool], timeout: float | None) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or condition(), timeout)
            if self._error is not None:
                self._changed.wait_for(lambda: self._using == 0)
                raise self._error
            return condition()

    def _complete(self) -> bool:
        return self._blocks.complete() and self._checked

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            if self._error is None and not self._complete():
                self._error = error
            self._stop()

    def _stop(self) -> None:
        self._stopped.set()
        for connection in self._connections:
            connection.abort()
        self._changed.notify_all()

    def _guard(self, run: Callable[..., None], *arguments: object) -> None:
        try:
            run(*arguments)
        except BaseException as error:  # noqa: BLE001 - whatever ends a thread must end the waiting too
            self._fail(error)

    # The target

    def _check_present(self) -> None:
        blocks = self._blocks
        for block in range(blocks.count if self._resume >= self._size else self._resume // self._block_bytes):
            if self._digests is None or self._is_right(
                block, os.pread(self._fd, blocks.length(block), blocks.offset(block))
            ):
                blocks.landed(block)

    def _is_right(self, block: int, data: bytes | memoryview) -> bool:
        return self._digests is None or hashlib.sha256(data).digest() == self._digests[block]

    def _land(self, block: int, data: memoryview) -> None:
        """Verify a block and write it, unless another thread was faster."""
        if not self._is_right(block, data):
            raise WrongBytes(f"block {block} is not what the manifest says")
        with self._changed:
            if self._stopped.is_set() or not self._blocks.claim(block):
                return
            self._using += 1
        try:
            offset = self._blocks.offset(block)
            written = 0
            while written < len(data):
                written += os.pwrite(self._fd, data[written:], offset + written)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            reason = "there is no space left" if full else "the target cannot be written"
            raise ModelUnavailable(f"{self._origin.name} could not be stored: {reason}.") from error
        finally:
            with self._changed:
                self._using -= 1
                self._changed.notify_all()
        with self._changed:
            self._blocks.landed(block)
            if self._complete():
                self._stop()
            self._changed.notify_all()

    def _follow(self, checksum: Checksum) -> None:
        """Feed `checksum` behind the front: the bytes come from memory, where they were a moment ago."""
        buffer = memoryview(bytearray(1 << 20))
        position = 0
        while position < self._size:
            self.wait_for(position + 1)
            front = self.front()
            with self._changed:
                self._using += 1
            try:
                while position < front and self._error is None:
                    count = os.preadv(self._fd, [buffer[: min(len(buffer), front - position)]], position)
                    checksum.update(buffer[:count])
                    position += count
            finally:
                with self._changed:
                    self._using -= 1
                    self._changed.notify_all()
        if not checksum.matches():
            raise Damaged(f"{self._origin.name} arrived with another checksum than it should have; try again.")
        with self._changed:
            self._checked = True
            self._stop()

    # The network

    def _work(self) -> None:
        connection = Connection(self._stall)
        lane = Lane(connection, min(self._block_bytes, self._size))
        try:
            while (part := self._take()) is not None:
                self._fetch(lane, part)
                with self._changed:
                    self._connections.pop(connection, None)  # idle: not to be found slow
        finally:
            with self._changed:
                self._connections.pop(connection, None)
            connection.close()

    def _take(self) -> Part | None:
        """What to fetch next, None when there is nothing left to do."""
        with self._changed:
            while not self._stopped.is_set() and not self._blocks.complete():
                if self._requests < self._blocks.active and (part := self._blocks.take(time.monotonic())) is not None:
                    return part
                self._changed.wait(OVERTAKE_S / 4)
        return None

    def _fetch(self, lane: Lane, part: Part) -> None:
        """Bring a part's blocks, through failures."""
        failures, refused = 0, False
        lane.filled, lane.began = 0, time.monotonic()
        while part.next < part.end and not self._stopped.is_set():
            before = (part.next, lane.filled)
            try:
                with self._turn():
                    self._request(lane, part, renew=refused)
                return
            except (Refused, ConnectionBroken) as error:
                reason = error
            if self._stopped.is_set():
                return
            with self._changed:
                self._connections.pop(lane.connection, None)
                self._blocks.slowed(time.monotonic())
            moved = (part.next, lane.filled) > before
            if isinstance(reason, Refused) and refused and not moved:
                raise ModelUnavailable(
                    f"{self._origin.name} may not be read ({reason}); check the credentials and their rights."
                ) from reason
            refused = isinstance(reason, Refused)
            failures = 1 if moved else failures + 1
            if failures >= (WRONG_ATTEMPTS if isinstance(reason, WrongBytes) else ATTEMPTS):
                if isinstance(reason, WrongBytes):
                    raise Damaged(
                        f"{self._origin.name} is damaged: wrong bytes came {failures} times in a row."
                    ) from reason
                raise ModelUnavailable(
                    f"{self._origin.name} could not be downloaded: reads failed {failures} times in a row. "
                    "Try again later."
                ) from reason
            logger.warning("download of %s, block %d, try %d: %s", self._origin.name, part.next, failures, reason)
            pause = min(LONGEST_PAUSE_S, self._pause * 2 ** (failures - 1))
            self._stopped.wait(random.uniform(pause / 2, pause))  # noqa: S311 - jitter, no secret

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """One of the requests that may run at a time."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped.is_set() or self._requests < self._blocks.active)
            self._requests += 1
        try:
            yield
        finally:
            with self._changed:
                self._requests -= 1
                self._changed.notify_all()

    def _request(self, lane: Lane, part: Part, *, renew: bool) -> None:
        blocks, connection = self._blocks, lane.connection
        first, last = blocks.offset(part.next) + lane.filled, blocks.offset(part.end) - 1
        self._begin(connection)
        lane.ask(self._origin, first, last, self._size, renew=renew)
        while part.next < part.end and not self._stopped.is_set():
            data = lane.buffer[: blocks.length(part.next)]
            lane.receive(data)
            self._land(part.next, data)
            part.next += 1
            ended = self._begin(connection)
            with self._changed:
                blocks.moved(part, ended, ended - lane.began)
            lane.began = ended

    def _begin(self, connection: Connection) -> float:
        """Note that a connection begins on a block now."""
        now = time.monotonic()
        with self._changed:
            if self._stopped.is_set():  # whoever stopped has not seen this connection
                raise ConnectionBroken("stopped")
            self._connections[connection] = now
        return now

    def _watch(self) -> None:
        """Cut connections whose block takes too long: no single read of theirs need time out for that."""
        while not self._stopped.wait(self._watch_s):
            with self._changed:
                patience = self._blocks.patience()
                for connection, since in self._connections.items():
                    if time.monotonic() - since > patience:
                        connection.abort()
