"""The Lambda Runtime API's client: next, response (whole or streamed), error, init/error, restore.

Two keep-alive connections, one that waits for events and one that answers them. Contract:
https://docs.aws.amazon.com/lambda/latest/dg/runtimes-api.html and runtimes-custom.html. Knows no HTTP events, no ASGI.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from adapters.aws_lambda.failure import Failure
from adapters.aws_lambda.http1 import Connection, ConnectionLost, Reply
from adapters.aws_lambda.prelude import CONTENT_TYPE
from core.version import VERSION

logger = logging.getLogger(__name__)

_VERSION = "/2018-06-01/runtime"
_USER_AGENT = f"slm-api-server/{VERSION} python/{sys.version_info[0]}.{sys.version_info[1]}"
_REST_S = 1.0  # a connection that has rested longer is not used for an answer: the peer may be about to close it
REPLY_GRACE_S = 5.0  # after the deadline, for Lambda's reply: a reader that is slow is still reading
_PIECE = 256 * 1024  # most bytes of one chunk: bounds what is copied and buffered of a large body


class RuntimeGone(Exception):
    """The Runtime API gives no more events: end the process, Lambda starts another."""


class Disconnected(OSError):
    """Lambda takes no more of this answer. An OSError, as ASGI has it for a client that has gone."""


@dataclass(frozen=True, slots=True)
class Invocation:
    """One event. `deadline` is on `time.monotonic()`'s clock."""

    id: str
    event: bytes
    deadline: float
    arn: str = ""
    trace_id: str | None = None
    client_context: Any = None
    identity: Any = None
    tenant_id: str | None = None
    invocation_id: str | None = None

    @classmethod
    def of(cls, reply: Reply) -> Invocation:
        headers = reply.headers
        deadline_ms = float(headers.get("lambda-runtime-deadline-ms", "0") or 0)
        # Without a deadline (no Lambda does that): Lambda's longest timeout.
        remaining = deadline_ms / 1000 - time.time() if deadline_ms else 900.0
        return cls(
            headers["lambda-runtime-aws-request-id"],
            reply.body,
            time.monotonic() + remaining,
            headers.get("lambda-runtime-invoked-function-arn", ""),
            headers.get("lambda-runtime-trace-id") or None,
            _json(headers.get("lambda-runtime-client-context")),
            _json(headers.get("lambda-runtime-cognito-identity")),
            headers.get("lambda-runtime-aws-tenant-id") or None,
            headers.get("lambda-runtime-invocation-id") or None,
        )


def _json(text: str | None) -> Any:
    try:
        return json.loads(text) if text else None
    except ValueError:
        return None


class RuntimeAPI:
    """`address` is host:port, as in AWS_LAMBDA_RUNTIME_API. One per loop: it serves one invocation at a time."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._host, self._port = (host, int(port)) if host else (address, 80)
        self._address = address
        self._polling: Connection | None = None
        self._answering: Connection | None = None

    async def next(self) -> Invocation:
        """The next event; waits as long as it takes, frozen or not. Raises RuntimeGone."""
        reply = await self._get("invocation/next")
        if reply.status != 200:
            raise RuntimeGone(f"the Runtime API answered {reply.status} to /next")
        try:
            return Invocation.of(reply)
        except (KeyError, ValueError) as error:
            raise RuntimeGone(f"the Runtime API's answer to /next cannot be read: {error!r}") from error

    async def respond(self, invocation: Invocation, body: bytes, content_type: str = "application/json") -> int:
        """A whole answer; its status: 202, or what is logged, for there is nothing else to do about it."""
        head = self._head(f"invocation/{invocation.id}/response", content_type, invocation)
        return await self._post(head + f"Content-Length: {len(body)}\r\n\r\n", body, invocation)

    def stream(self, invocation: Invocation) -> ResponseStream:
        """An answer to be streamed. It takes its connection when it is opened, for minutes may pass until then."""
        head = self._head(f"invocation/{invocation.id}/response", CONTENT_TYPE, invocation) + (
            "Lambda-Runtime-Function-Response-Mode: streaming\r\n"
            "Transfer-Encoding: chunked\r\n"
            # Trailers that are not declared here are dropped silently.
            "Trailer: Lambda-Runtime-Function-Error-Type, Lambda-Runtime-Function-Error-Body\r\n\r\n"
        )
        return ResponseStream(self._to_answer, head.encode(), invocation)

    async def error(self, invocation: Invocation, failure: Failure) -> int:
        """The event failed. For events that are not HTTP: a function URL makes a bare 502 of it."""
        head = self._head(f"invocation/{invocation.id}/error", "application/json", invocation)
        return await self._failed(head, failure, invocation)

    async def init_error(self, failure: Failure) -> None:
        """The start failed; the process must end now."""
        await self._failed(self._head("init/error", "application/json"), failure)

    async def restore_next(self) -> None:
        """SnapStart: returns in the process that was restored from the snapshot. Raises RuntimeGone."""
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
            kept = connection.used
            reply = connection.expect()
            connection.write(request)
            try:
                return await reply
            except ConnectionLost as error:
                # A kept connection may have been closed while the process was frozen; a new one has no excuse.
                if not (kept and error.untouched):
                    raise RuntimeGone(f"the Runtime API is gone: {error}") from error

    async def _failed(self, head: str, failure: Failure, invocation: Invocation | None = None) -> int:
        body = failure.body()
        head += f"Lambda-Runtime-Function-Error-Type: {failure.type}\r\nContent-Length: {len(body)}\r\n\r\n"
        return await self._post(head, body, invocation)

    async def _post(self, head: str, body: bytes, invocation: Invocation | None) -> int:
        """Send it and return the reply's status; 0, and a line in the log, where none comes by the deadline."""
        of = invocation.id if invocation is not None else "init or restore"
        while True:
            connection = await self._to_answer()
            kept = connection.used
            reply = connection.expect()
            connection.write(head.encode() + body)
            try:
                return _judged(await _reply_by_deadline(connection, reply, invocation), of)
            except ConnectionLost as error:
                if not (kept and error.untouched):
                    logger.warning("The Runtime API did not confirm the answer to %s: %s", of, error)
                    return 0

    async def _to_answer(self) -> Connection:
        connection = self._answering
        if connection is None or not connection.usable or connection.rested() > _REST_S:
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
    """A streamed answer: `open`, then a chunk for each `write`, out at once, then `end`, then `confirmed`."""

    def __init__(self, connect: Callable[[], Awaitable[Connection]], head: bytes, invocation: Invocation) -> None:
        self.begun = False
        self.ended = False
        self._connect = connect
        self._connection: Connection | None = None
        self._head = head
        self._invocation = invocation
        self._reply: asyncio.Future[Reply] | None = None

    async def open(self) -> None:
        """Take a connection that works; call it when the first byte is there, not before. Raises RuntimeGone."""
        if not self.begun:
            self._connection = await self._connect()

    @property
    def broken(self) -> bool:
        """Lambda has answered or hung up before the end: nothing more of it will be read."""
        return self._reply is not None and self._reply.done() and not self.ended

    async def write(self, data: bytes | bytearray | memoryview, *, last: bool = False) -> None:
        """Send `data` as one chunk (large data as several) and with `last` the end. Raises Disconnected."""
        if self.broken:
            raise Disconnected("Lambda takes no more of this answer")
        size = len(data)
        if size > _PIECE:
            view = memoryview(data)
            for start in range(0, size - _PIECE, _PIECE):
                await self._chunk(view[start : start + _PIECE], b"")
            data = view[start + _PIECE :]
        await self._chunk(data, b"0\r\n\r\n" if last else b"")

    def write_now(self, data: bytes) -> None:
        """`write` for those who cannot wait; dropped after the end and once Lambda takes no more."""
        if not self.ended and not self.broken:
            self._send(b"%x\r\n%b\r\n" % (len(data), data))

    async def end(self, failure: Failure | None = None) -> None:
        """The last chunk; with a failure, the trailers that tell of it."""
        if not self.ended and not self.broken:
            self._send(b"0\r\n" + (failure.trailers() if failure else b"") + b"\r\n")
            self.ended = True

    async def confirmed(self) -> int:
        """Wait for Lambda's reply; its status, 0 for none. A reply before the end leaves the connection unusable."""
        assert self._reply is not None
        assert self._connection is not None
        if not self.ended:
            # Between chunks, so an end is due first: the emulator panics at a body that is cut inside.
            self._connection.write(b"0\r\n\r\n")
            self._connection.close()
        of = self._invocation.id
        try:
            return _judged(await _reply_by_deadline(self._connection, self._reply, self._invocation), of)
        except ConnectionLost as error:
            logger.warning("The Runtime API did not take the whole answer to %s: %s", of, error)
            return 0

    async def _chunk(self, data: bytes | bytearray | memoryview, end: bytes) -> None:
        # An empty chunk would be the end.
        chunk = b"".join((b"%x\r\n" % len(data), data, b"\r\n")) if len(data) else b""
        self.ended = bool(end)
        if chunk or end:
            self._send(chunk + end)
        assert self._connection is not None
        await self._connection.drained()
        if self.broken:
            raise Disconnected("Lambda takes no more of this answer")

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
    """Raises ConnectionLost also when the reply does not come: nothing may wait for it beyond the invocation's end."""
    if invocation is None:
        return await reply
    left = max(0.0, invocation.deadline - time.monotonic()) + REPLY_GRACE_S
    try:
        return await asyncio.wait_for(asyncio.shield(reply), left)
    except TimeoutError:
        connection.close()
        raise ConnectionLost("no reply came before the deadline") from None


def _judged(reply: Reply, of: str) -> int:
    """413: the answer was too large; 410: too late (the invocation was ended without us). Nothing can be mended."""
    if reply.status == 410:
        logger.warning("The answer to %s came after its invocation had ended (410).", of)
    elif reply.status >= 300:
        logger.error("The Runtime API answered %d to the answer to %s: %s", reply.status, of, reply.body[:300])
    return reply.status
