"""One HTTP/1.1 keep-alive connection to a server, from the client's side. httptools parses the replies.

It is an asyncio Protocol, not a pair of streams: a reply may come before the request has ended. A 413 in the middle of
an upload is seen before the next write, without a task that reads. The module knows nothing about Lambda.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import cast

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

MAX_HEAD = 1 << 20  # bytes between two pieces of a body; the client context of an invocation travels in a header


class ConnectionLost(Exception):
    """The connection ended before its reply. Not an OSError, which an application may raise itself."""

    def __init__(self, message: str, *, untouched: bool = False) -> None:
        super().__init__(message)
        self.untouched = untouched  # no byte of the reply had arrived


@dataclass(frozen=True, slots=True)
class Reply:
    """`headers` has lower-case names and the last value of a repeated one."""

    status: int
    headers: dict[str, str]
    body: bytes


class Connection(asyncio.Protocol):
    """Carry one request at a time: call `expect`, `write` the request in any number of parts, await the reply."""

    def __init__(self) -> None:
        self.used = False  # it has carried a reply before
        self._idle_since = time.monotonic()
        self._transport: asyncio.WriteTransport | None = None
        self._writable: asyncio.Future[None] | None = None
        self._reply: asyncio.Future[Reply] | None = None
        self._parser = HttpResponseParser(self)
        self._untouched = True
        self._status = 0  # once the head is complete
        self._headers: dict[str, str] = {}
        self._body = bytearray()
        self._pending = 0  # bytes since the last piece of a body

    # Called by the owner

    @property
    def usable(self) -> bool:
        """Whether it is open and carries no request."""
        return self._transport is not None and not self._transport.is_closing() and self._reply is None

    def idle_seconds(self) -> float:
        """Seconds since it was opened or carried its last reply."""
        return time.monotonic() - self._idle_since

    def expect(self) -> asyncio.Future[Reply]:
        """Begin a request. The future ends with its Reply or ConnectionLost, perhaps before everything is written."""
        assert self.usable
        self._untouched = True
        self._reply = asyncio.get_running_loop().create_future()
        return self._reply

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send what the socket takes now and buffer the rest. Does nothing on a lost connection."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    async def drained(self) -> None:
        """Wait until the transport's buffer has room or the connection is lost."""
        if self._writable is not None:
            await asyncio.shield(self._writable)

    def close(self) -> None:
        """Abort the connection. A pending reply ends with ConnectionLost."""
        if self._transport is not None:
            self._transport.abort()

    # Called by the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.WriteTransport", transport)

    def pause_writing(self) -> None:
        self._writable = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        writable, self._writable = self._writable, None
        if writable is not None and not writable.done():
            writable.set_result(None)

    def data_received(self, data: bytes) -> None:
        if self._reply is None:  # no request is running: a server that closes an idle connection, or is out of step
            self.close()
            return
        self._untouched = False
        self._pending += len(data)
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade) as error:
            self._lose(f"not HTTP/1.1: {error}")
            return
        if self._reply is not None and self._pending > MAX_HEAD:
            self._lose("not HTTP/1.1: the head is too long")

    def eof_received(self) -> bool:
        framed = "content-length" in self._headers or "transfer-encoding" in self._headers
        if self._status and not framed:
            self.on_message_complete()  # such a body ends with the connection
        return False  # close

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._lose("the peer closed the connection" if exc is None else str(exc) or type(exc).__name__)
        self.resume_writing()

    # Called by the parser

    def on_message_begin(self) -> None:
        if self._reply is None:  # bytes after the reply: the peer is out of step
            self.close()
        self._status, self._headers, self._body = 0, {}, bytearray()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1").strip()

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        self._pending = 0
        self._body += data

    def on_message_complete(self) -> None:
        if 100 <= self._status < 200:  # an interim response; the reply follows
            return
        reply, self._reply = self._reply, None
        if not self._parser.should_keep_alive():
            self.close()
        self.used = True
        self._pending = 0
        self._idle_since = time.monotonic()
        if reply is not None and not reply.done():
            reply.set_result(Reply(self._status, self._headers, bytes(self._body)))

    def _lose(self, reason: str) -> None:
        reply, self._reply = self._reply, None
        if reply is not None and not reply.done():
            reply.set_exception(ConnectionLost(reason, untouched=self._untouched))
            reply.exception()  # mark it as retrieved: asyncio logs no warning if the owner drops the future
        self.close()
