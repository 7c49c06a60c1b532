"""The client's side of one HTTP/1.1 keep-alive connection: an asyncio Protocol that parses replies as bytes arrive.

A Protocol and not streams, because an answer may come before the question has ended: a 413 in the middle of an upload
is seen before the next write, without a task that waits for it. Knows no Lambda.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import cast

MAX_HEAD = 1 << 20  # bytes; the client context of an invocation travels in a header
_MAX_LINE = 1 << 10


class ConnectionLost(Exception):
    """The connection ended before its reply. Not an OSError, so that nobody mistakes it for the application's own."""

    def __init__(self, message: str, *, untouched: bool = False) -> None:
        super().__init__(message)
        self.untouched = untouched  # not a byte of a reply had come


@dataclass(frozen=True, slots=True)
class Reply:
    """`headers` has lower-case names; of repeated ones the last is kept."""

    status: int
    headers: dict[str, str]
    body: bytes


class Connection(asyncio.Protocol):
    """One request at a time: `expect()`, then `write()` it in as many parts as it has, then await the reply."""

    def __init__(self) -> None:
        self.used = False  # it has carried a reply before
        self._rests_since = time.monotonic()
        self._transport: asyncio.WriteTransport | None = None
        self._buffer = bytearray()
        self._reply: asyncio.Future[Reply] | None = None
        self._head: tuple[int, dict[str, str]] | None = None
        self._chunks: bytearray | None = None
        self._until_eof = False
        self._trailing = False
        self._writable: asyncio.Future[None] | None = None

    # What the owner calls

    @property
    def usable(self) -> bool:
        """Open, and nothing under way."""
        return self._transport is not None and not self._transport.is_closing() and self._reply is None

    def rested(self) -> float:
        """Seconds since it was opened or carried its last reply."""
        return time.monotonic() - self._rests_since

    def expect(self) -> asyncio.Future[Reply]:
        """Begin a request. The future ends with its Reply or ConnectionLost, perhaps before all is written."""
        assert self.usable
        self._reply = asyncio.get_running_loop().create_future()
        return self._reply

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send at once what the socket takes and buffer the rest; after a loss it is dropped silently."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    async def drained(self) -> None:
        """Return when the peer has taken enough for more to be written, or the connection is lost."""
        if self._writable is not None:
            await asyncio.shield(self._writable)

    def close(self) -> None:
        """Abandon it. A waiting reply ends with ConnectionLost."""
        if self._transport is not None:
            self._transport.abort()

    # What the event loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.WriteTransport", transport)

    def pause_writing(self) -> None:
        self._writable = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        writable, self._writable = self._writable, None
        if writable is not None and not writable.done():
            writable.set_result(None)

    def data_received(self, data: bytes) -> None:
        if self._reply is None:  # nobody asked: an idle timeout's farewell, or a peer out of step
            self.close()
            return
        self._buffer += data
        try:
            while self._reply is not None and self._step():
                pass
        except ValueError as error:
            self._fail(f"not HTTP/1.1: {error}")
            self.close()

    def eof_received(self) -> bool:
        if self._until_eof:
            self._finish(bytes(self._buffer))
        return False  # close

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._fail("the peer closed the connection" if exc is None else str(exc) or type(exc).__name__)
        self.resume_writing()

    # Parsing

    def _step(self) -> bool:
        """Take one element from the buffer; False when it is not whole yet."""
        if self._head is None:
            return self._take_head()
        if self._until_eof:
            return False
        if self._chunks is not None:
            return self._take_chunk(self._chunks)
        return self._take_body(int(self._head[1].get("content-length", "0")))

    def _take_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > MAX_HEAD:
                raise ValueError("the head is too long")
            return False
        first, *lines = self._buffer[:end].decode("latin-1").split("\r\n")
        del self._buffer[: end + 4]
        version, _, rest = first.partition(" ")
        if version not in ("HTTP/1.1", "HTTP/1.0"):
            raise ValueError("no status line")
        status = int(rest[:3])
        if 100 <= status < 200:
            return True
        headers = {}
        for line in lines:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        if version == "HTTP/1.0":
            headers.setdefault("connection", "close")
        self._head = (status, headers)
        if status in (204, 304):
            self._finish(b"")
        elif headers.get("transfer-encoding", "").lower() == "chunked":
            self._chunks = bytearray()
        elif "content-length" not in headers:
            self._until_eof = True
        return True

    def _take_body(self, length: int) -> bool:
        if len(self._buffer) < length:
            return False
        body = bytes(self._buffer[:length])
        del self._buffer[:length]
        self._finish(body)
        return True

    def _take_chunk(self, chunks: bytearray) -> bool:
        end = self._buffer.find(b"\r\n", 0, _MAX_LINE)
        if end < 0:
            if len(self._buffer) >= _MAX_LINE:
                raise ValueError("a chunk has no size")
            return False
        if self._trailing:
            line = bytes(self._buffer[:end])
            del self._buffer[: end + 2]
            if not line:
                self._finish(bytes(chunks))
            return True
        size = int(self._buffer[:end].partition(b";")[0], 16)
        if size == 0:
            del self._buffer[: end + 2]
            self._trailing = True
            return True
        if len(self._buffer) < end + 2 + size + 2:
            return False
        chunks += self._buffer[end + 2 : end + 2 + size]
        del self._buffer[: end + 2 + size + 2]
        return True

    def _finish(self, body: bytes) -> None:
        assert self._head is not None
        status, headers = self._head
        reply, self._reply = self._reply, None
        over = self._until_eof or headers.get("connection", "").lower() == "close" or bool(self._buffer)
        self._head, self._chunks, self._until_eof, self._trailing, self.used = None, None, False, False, True
        self._rests_since = time.monotonic()
        if reply is not None and not reply.done():
            reply.set_result(Reply(status, headers, body))
        if over:
            self.close()

    def _fail(self, reason: str) -> None:
        reply, self._reply = self._reply, None
        if reply is not None and not reply.done():
            untouched = self._head is None and not self._buffer
            reply.set_exception(ConnectionLost(reason, untouched=untouched))
            reply.exception()  # retrieved: whoever still awaits it sees it, nobody is warned if not
