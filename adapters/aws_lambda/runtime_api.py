"""A client for the Lambda Runtime API: next, response (whole or streamed), error, init/error, restore.

It uses two keep-alive connections, one that waits for events and one that answers them. The contract:
https://docs.aws.amazon.com/lambda/latest/dg/runtimes-api.html and runtimes-custom.html. The module knows neither HTTP
events nor ASGI.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from adapters.aws_lambda.answer import CONTENT_TYPE, Failure
from adapters.aws_lambda.http1 import Connection, ConnectionLost, Reply
from core.version import VERSION

logger = logging.getLogger("slm.lambda")

_VERSION = "/2018-06-01/runtime"
_USER_AGENT = f"slm-api-server/{VERSION} python/{sys.version_info[0]}.{sys.version_info[1]}"
_MAX_IDLE_S = 1.0  # a connection that was idle for longer carries no answer: the peer may be about to close it
REPLY_GRACE_S = 5.0  # wait for Lambda's reply this long after the deadline: a slow client may still be reading
_MAX_CHUNK = 256 * 1024  # bytes; bounds what is copied and buffered of a large body


class RuntimeGone(Exception):
    """The Runtime API gives no more events. End the process, and Lambda starts another."""


class Disconnected(OSError):
    """Lambda has stopped reading this answer. An OSError, which ASGI uses for a client that has disconnected."""


@dataclass(frozen=True, slots=True)
class Invocation:
    """One event. `deadline` is on `time.monotonic()`'s clock."""

    id: str
    event: bytes
    deadline: float
    trace_id: str | None = None
    invocation_id: str | None = None

    @classmethod
    def of(cls, reply: Reply) -> Invocation:
        headers = reply.headers
        deadline_ms = float(headers.get("lambda-runtime-deadline-ms", "0") or 0)
        # Lambda always sends a deadline. Without one, assume its longest timeout.
        remaining = deadline_ms / 1000 - time.time() if deadline_ms else 900.0
        return cls(
            headers["lambda-runtime-aws-request-id"],
            reply.body,
            time.monotonic() + remaining,
            headers.get("lambda-runtime-trace-id") or None,
            headers.get("lambda-runtime-invocation-id") or None,
        )

    def log_fields(self) -> dict[str, str]:
        """Return the names that Lambda and X-Ray use for this invocation.

        They are kept in a context variable. The environment variable _X_AMZN_TRACE_ID would be right for one only of
        several loops in a process.
        """
        fields = {"requestId": self.id}
        root = next((part for part in (self.trace_id or "").split(";") if part.startswith("Root=")), "")
        if root:
            fields["xray_trace_id"] = root.removeprefix("Root=")
        return fields


class RuntimeAPI:
    """A client for `address` (host:port). Make one for each loop: it serves one invocation at a time."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._host, self._port = (host, int(port)) if host else (address, 80)
        self._address = address
        self._polling: Connection | None = None
        self._answering: Connection | None = None

    async def next(self) -> Invocation:
        """Wait for the next event without a time limit; Lambda may freeze the process meanwhile. Raises RuntimeGone."""
        reply = await self._get("invocation/next")
        if reply.status != 200:
            raise RuntimeGone(f"the Runtime API answered {reply.status} to /next")
        try:
            return Invocation.of(reply)
        except (KeyError, ValueError) as error:
            raise RuntimeGone(f"the Runtime API's answer to /next cannot be read: {error!r}") from error

    async def respond(self, invocation: Invocation, body: bytes, content_type: str = "application/json") -> int:
        """Send a whole answer and return the status of Lambda's reply: 202, or an error, which is logged."""
        head = self._head(f"invocation/{invocation.id}/response", content_type, invocation)
        return await self._post(head + f"Content-Length: {len(body)}\r\n\r\n", body, invocation)

    def stream(self, invocation: Invocation) -> ResponseStream:
        """Return a streamed answer. It takes its connection when it is opened, because minutes may pass until then."""
        head = self._head(f"invocation/{invocation.id}/response", CONTENT_TYPE, invocation) + (
            "Lambda-Runtime-Function-Response-Mode: streaming\r\n"
            "Transfer-Encoding: chunked\r\n"
            # Lambda drops trailers that are not declared here.
            "Trailer: Lambda-Runtime-Function-Error-Type, Lambda-Runtime-Function-Error-Body\r\n\r\n"
        )
        return ResponseStream(self._answering_connection, head.encode(), invocation)

    async def error(self, invocation: Invocation, failure: Failure) -> int:
        """Report that the event failed. Not for HTTP events: a function URL turns it into a bare 502."""
        head = self._head(f"invocation/{invocation.id}/error", "application/json", invocation)
        return await self._failed(head, failure, invocation)

    async def init_error(self, failure: Failure) -> None:
        """Report that the start failed. The process must end after it."""
        await self._failed(self._head("init/error", "application/json"), failure)

    async def restore_next(self) -> None:
        """SnapStart: wait for the snapshot and return in a process that was restored from it. Raises RuntimeGone."""
        reply = await self._get("restore/next")
        if reply.status != 200:
            raise RuntimeGone(f"the Runtime API answered {reply.status} to /restore/next")

    async def restore_error(self, failure: Failure) -> None:
        await self._failed(self._head("restore/error", "application/json"), failure)

    def close(self) -> None:
        for connection in (self._polling, self._answering):
            if connection is not None:
                connection.close()
        self._polling = self._answering = None

    def _head(self, path: str, content_type: str, invocation: Invocation | None = None) -> str:
        head = (
            f"POST {_VERSION}/{path} HTTP/1.1\r\nHost: {self._address}\r\n"
            f"User-Agent: {_USER_AGENT}\r\nContent-Type: {content_type}\r\n"
        )
        if invocation is not None and invocation.invocation_id:
            head += f"Lambda-Runtime-Invocation-Id: {invocation.invocation_id}\r\n"
        return head

    async def _get(self, path: str) -> Reply:
        request = (
            f"GET {_VERSION}/{path} HTTP/1.1\r\nHost: {self._address}\r\nUser-Agent: {_USER_AGENT}\r\n\r\n"
        ).encode()
        while True:
            if self._polling is None or not self._polling.usable:
                self._polling = await self._open()
            connection = self._polling
            reused = connection.used
            reply = connection.expect()
            connection.write(request)
            try:
                return await reply
            except ConnectionLost as error:
                # The peer may have closed a reused connection while the process was frozen. Retry once on a new one.
                if not (reused and error.untouched):
                    raise RuntimeGone(f"the Runtime API is gone: {error}") from error

    async def _failed(self, head: str, failure: Failure, invocation: Invocation | None = None) -> int:
        body = failure.body()
        head += f"Lambda-Runtime-Function-Error-Type: {failure.type}\r\nContent-Length: {len(body)}\r\n\r\n"
        return await self._post(head, body, invocation)

    async def _post(self, head: str, body: bytes, invocation: Invocation | None) -> int:
        """Send the request and return the status of the reply, or 0 if none comes by the deadline, which is logged."""
        subject = invocation.id if invocation is not None else "init or restore"
        while True:
            connection = await self._answering_connection()
            reused = connection.used
            reply = connection.expect()
            connection.write(head.encode() + body)
            try:
                return _status(await _reply_by_deadline(connection, reply, invocation), subject)
            except ConnectionLost as error:
                if not (reused and error.untouched):
                    logger.warning("The Runtime API did not confirm the answer to %s: %s", subject, error)
                    return 0

    async def _answering_connection(self) -> Connection:
        connection = self._answering
        if connection is None or not connection.usable or connection.idle_seconds() > _MAX_IDLE_S:
            if connection is not None:
                connection.close()
            self._answering = connection = await self._open()
        return connection

    async def _open(self) -> Connection:
        try:
            _, connection = await asyncio.get_running_loop().create_connection(Connection, self._host, self._port)
        except OSError as error:
            raise RuntimeGone(f"no connection to the Runtime API at {self._address}: {error}") from error
        return connection


class ResponseStream:
    """A streamed answer. Call `open`, then `write` for each chunk, then `end`, then `confirmed`."""

    def __init__(self, connect: Callable[[], Awaitable[Connection]], head: bytes, invocation: Invocation) -> None:
        self.begun = False
        self.ended = False
        self._connect = connect
        self._connection: Connection | None = None
        self._head = head
        self._invocation = invocation
        self._reply: asyncio.Future[Reply] | None = None

    async def open(self) -> None:
        """Take a working connection. Call it when the first byte is ready. Raises RuntimeGone."""
        if not self.begun:
            self._connection = await self._connect()

    @property
    def broken(self) -> bool:
        """Whether Lambda has replied or hung up before the end. It reads no more of the answer then."""
        return self._reply is not None and self._reply.done() and not self.ended

    async def write(self, data: bytes | bytearray | memoryview, *, last: bool = False) -> None:
        """Send `data` as one chunk, large data as several, and with `last` the end. Raises Disconnected."""
        if self.broken:
            raise Disconnected("Lambda has stopped reading this answer")
        size = len(data)
        if size > _MAX_CHUNK:
            view = memoryview(data)
            for start in range(0, size - _MAX_CHUNK, _MAX_CHUNK):
                await self._chunk(view[start : start + _MAX_CHUNK], b"")
            data = view[start + _MAX_CHUNK :]
        await self._chunk(data, b"0\r\n\r\n" if last else b"")

    def write_now(self, data: bytes) -> None:
        """Like `write`, without waiting. Does nothing after the end or once Lambda has stopped reading."""
        if not self.ended and not self.broken:
            self._send(b"%x\r\n%b\r\n" % (len(data), data))

    async def end(self, failure: Failure | None = None) -> None:
        """Send the last chunk, and the trailers of a failure."""
        if not self.ended and not self.broken:
            self._send(b"0\r\n" + (failure.trailers() if failure else b"") + b"\r\n")
            self.ended = True

    async def confirmed(self) -> int:
        """Wait for Lambda's reply and return its status, or 0 if none comes. Ends the answer if it has not ended."""
        assert self._reply is not None
        assert self._connection is not None
        if not self.ended:
            # Send the last chunk first: Amazon's emulator panics at a body that is cut off.
            self._connection.write(b"0\r\n\r\n")
            self._connection.close()
        try:
            reply = await _reply_by_deadline(self._connection, self._reply, self._invocation)
            return _status(reply, self._invocation.id)
        except ConnectionLost as error:
            logger.warning("The Runtime API did not accept the whole answer to %s: %s", self._invocation.id, error)
            return 0

    async def _chunk(self, data: bytes | bytearray | memoryview, end: bytes) -> None:
        # An empty chunk would mark the end.
        chunk = b"".join((b"%x\r\n" % len(data), data, b"\r\n")) if len(data) else b""
        self.ended = bool(end)
        if chunk or end:
            self._send(chunk + end)
        assert self._connection is not None
        await self._connection.drained()
        if self.broken:
            raise Disconnected("Lambda has stopped reading this answer")

    def _send(self, data: bytes) -> None:
        assert self._connection is not None
        if not self.begun:
            self.begun = True
            self._reply = self._connection.expect()
            data = self._head + data
        self._connection.write(data)


async def _reply_by_deadline(
    connection: Connection, reply: asyncio.Future[Reply], invocation: Invocation | None
) -> Reply:
    """Wait for the reply. Raises ConnectionLost, also if none has come shortly after the invocation's deadline."""
    if invocation is None:
        return await reply
    remaining = max(0.0, invocation.deadline - time.monotonic()) + REPLY_GRACE_S
    try:
        return await asyncio.wait_for(asyncio.shield(reply), remaining)
    except TimeoutError:
        connection.close()
        raise ConnectionLost("no reply came before the deadline") from None


def _status(reply: Reply, subject: str) -> int:
    """Return the reply's status and log an error: 410 (the invocation has ended), 413 (too large) or another."""
    if reply.status == 410:
        logger.warning("The answer to %s came after its invocation had ended (410).", subject)
    elif reply.status >= 300:
        logger.error("The Runtime API replied %d to the answer to %s: %s", reply.status, subject, reply.body[:300])
    return reply.status
