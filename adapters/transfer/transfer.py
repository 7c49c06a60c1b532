"""Download a large object with parallel ranged reads and write each block to its offset.

An object is divided into *blocks*. A block is received completely, compared with its sha256 if the manifest has one,
and only then written. So no unverified byte reaches the target, and memory is bounded by threads x block size.

A *part* is what one request asks for: several blocks, or a single block in the header (which loading waits for) and
near the end (so that all threads finish together). A failed request resumes at the first missing byte. On a slow link
fewer requests run in parallel. A block that is outstanding for too long is requested by a second thread; the first
complete copy wins.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from adapters.transfer.blocks import OVERTAKE_S, Blocks, Part
from adapters.transfer.checksum import Checksum
from adapters.transfer.connection import Connection, ConnectionBroken
from adapters.transfer.errors import Refused, WrongBytes
from adapters.transfer.lane import Lane, Origin
from adapters.transfer.retry import DEFAULT_POLICY, RetryPolicy
from core.errors import ModelUnavailable
from core.store.source import Damaged, DownloadCancelled

BLOCK_BYTES = 2 << 20
MAX_BLOCK_BYTES = 16 << 20
PART_BYTES = 8 << 20  # large enough to amortise a request's latency, small enough to share out evenly
WRONG_ATTEMPTS = 3  # for a block with wrong bytes: under TLS they were not damaged on their way
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

logger = logging.getLogger("slm.transfer")


class Transfer:
    """A running download. Implements `core.store.model_file.Arrival`. Thread-safe; `start()` begins it.

    `digests` are the sha256 of the blocks. `checksum` covers the whole object: it is fed as the contiguous prefix
    grows and decides at the end. The first `first_bytes` are downloaded before all others. The first `resume` bytes
    are in the target already: they are checked against the digests, or trusted if there are none.
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
        part_bytes: int = PART_BYTES,
        policy: RetryPolicy = DEFAULT_POLICY,
    ) -> None:
        width = max(1, min(threads, -(-size // block_bytes)))
        blocks = Blocks(
            size,
            block_bytes,
            first_bytes=first_bytes,
            part_bytes=part_bytes,
            width=width,
            slow_s=policy.slow_s,
        )
        if not 0 < block_bytes <= MAX_BLOCK_BYTES or (digests is not None and len(digests) != blocks.count):
            raise ValueError("the blocks do not cover the object")
        self._origin, self._fd, self._size = origin, fd, size
        self._block_bytes, self._digests, self._checksum = block_bytes, digests, checksum
        self._resume, self._width, self._policy = resume, width, policy
        self._stopped = threading.Event()
        self._changed = threading.Condition()  # guards all fields below
        self._blocks = blocks
        self._error: BaseException | None = None
        self._requests = 0  # running now
        self._using = 0  # threads that read or write the target now
        self._checked = checksum is None
        self._connections: dict[Connection, float] = {}  # -> when its block began

    # The caller's side

    def start(self) -> None:
        """Verify the resumed bytes, start the threads and return."""
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
        """Return the length of the contiguous prefix that is written."""
        with self._changed:
            return self._blocks.offset(self._blocks.front)

    def progress(self) -> tuple[int, int]:
        """Return (bytes received, bytes in total)."""
        with self._changed:
            return self._blocks.arrived, self._size

    def wait_for(self, offset: int, timeout: float | None = None) -> bool:
        """Block until all bytes before `offset` are written, and verified if there are digests.

        Return False after `timeout` seconds. Raise ModelUnavailable if the transfer failed or was cancelled.
        """
        blocks = self._blocks
        return self._await(lambda: blocks.front >= blocks.before(offset), timeout)

    def wait(self) -> None:
        """Block until every byte is written and verified. Raise ModelUnavailable if that failed."""
        self._await(self._complete, None)

    def finish(self, timeout: float) -> bool:
        """Like `wait`, but return False after `timeout` seconds."""
        return self._await(self._complete, timeout)

    def cancel(self) -> None:
        """Stop the download; waiting callers raise. Once this returns, no thread uses the target any more."""
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
        except BaseException as error:  # noqa: BLE001 - an error that ends a thread must end the waiting too
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
        """Verify a block and write it, unless another thread has."""
        if not self._is_right(block, data):
            raise WrongBytes(f"block {block} does not match the manifest")
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
            reason = "there is no space left" if error.errno in NO_SPACE else "the target cannot be written"
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
        """Feed `checksum` from the contiguous prefix. The bytes were written a moment ago and are read from memory."""
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
            raise Damaged(f"{self._origin.name} arrived with a wrong checksum. Try again.")
        with self._changed:
            self._checked = True
            self._stop()

    # The network

    def _work(self) -> None:
        connection = Connection(self._policy.stall_s)
        lane = Lane(connection, min(self._block_bytes, self._size))
        try:
            while (part := self._take()) is not None:
                self._fetch(lane, part)
                with self._changed:
                    self._connections.pop(connection, None)  # idle connections are not slow
        finally:
            with self._changed:
                self._connections.pop(connection, None)
            connection.close()

    def _take(self) -> Part | None:
        """Return the part to request next, or None when nothing is left to do."""
        with self._changed:
            while not self._stopped.is_set() and not self._blocks.complete():
                if self._requests < self._blocks.active and (part := self._blocks.take(time.monotonic())) is not None:
                    return part
                self._changed.wait(OVERTAKE_S / 4)
        return None

    def _fetch(self, lane: Lane, part: Part) -> None:
        """Download a part's blocks, with retries."""
        failures, refused = 0, False
        lane.filled, lane.began = 0, time.monotonic()
        while part.next < part.end and not self._stopped.is_set():
            # 1) Request what is missing. Most parts end here.
            before = (part.next, lane.filled)
            try:
                with self._turn():
                    self._request(lane, part, renew=refused)
                return
            except (Refused, ConnectionBroken) as error:
                failure = error
            if self._stopped.is_set():
                return
            with self._changed:
                self._connections.pop(lane.connection, None)
                self._blocks.slowed(time.monotonic())
            # 2) Count failures in a row; a new byte starts the count again. A second refusal is final.
            moved = (part.next, lane.filled) > before
            if isinstance(failure, Refused) and refused and not moved:
                raise ModelUnavailable(
                    f"{self._origin.name} may not be read ({failure}); check the credentials and their permissions."
                ) from failure
            refused = isinstance(failure, Refused)
            failures = 1 if moved else failures + 1
            wrong = isinstance(failure, WrongBytes)
            if failures >= (min(WRONG_ATTEMPTS, self._policy.attempts) if wrong else self._policy.attempts):
                raise self._give_up(failures, wrong) from failure
            # 3) Pause, then request the rest.
            logger.warning("download of %s, block %d, try %d: %s", self._origin.name, part.next, failures, failure)
            self._stopped.wait(self._policy.backoff.pause(failures))

    def _give_up(self, failures: int, wrong: bool) -> ModelUnavailable:
        if wrong:
            return Damaged(f"{self._origin.name} is damaged: wrong bytes came {failures} times in a row.")
        return ModelUnavailable(
            f"{self._origin.name} could not be downloaded: reads failed {failures} times in a row. Try again later."
        )

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Wait until one more request may run, and count it while it does."""
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
        """Record that a connection starts on a block now."""
        now = time.monotonic()
        with self._changed:
            if self._stopped.is_set():  # `_stop` did not see this connection
                raise ConnectionBroken("stopped")
            self._connections[connection] = now
        return now

    def _watch(self) -> None:
        """Cut connections whose block takes too long, even though none of their reads times out."""
        while not self._stopped.wait(min(1.0, self._policy.slow_s / 8)):
            with self._changed:
                patience = self._blocks.patience()
                for connection, since in self._connections.items():
                    if time.monotonic() - since > patience:
                        connection.abort()
