"""Protocol: uvicorn's HTTP/1.1 with limits on what a client may cost before it has asked for anything.

uvicorn bounds neither a request's head nor the time that it takes. Here a head has a size and a time, a body a least
rate, and the connections have a number. A client over a limit gets OpenAI's envelope where an answer can still be sent,
and the connection is closed.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState


@dataclass(frozen=True, slots=True)
class Limits:
    """`connections` None: as many as the settings' queue needs, at least 2,048."""

    head_bytes: int = 64 << 10
    headers: int = 100
    head_s: float = 10.0
    body_bytes_per_s: int = 16_000
    body_window_s: float = 10.0  # the rate is that of each such time; a body that is whole within the first is free
    connections: int | None = None


class Connections:
    """The open connections of one server. `waiting` holds those without a request, the longest waiting first."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.open: set[BoundedProtocol] = set()
        self.waiting: dict[BoundedProtocol, None] = {}

    def add(self, connection: BoundedProtocol) -> None:
        """Take a new connection, in place of the one that has waited longest if there are too many."""
        if len(self.open) >= self.most:
            oldest = next(iter(self.waiting), connection)
            self.remove(oldest)
            oldest.transport.abort()
            if oldest is connection:
                return
        self.open.add(connection)
        self.waiting[connection] = None

    def remove(self, connection: BoundedProtocol) -> None:
        self.open.discard(connection)
        self.waiting.pop(connection, None)


class _Refused(Exception):
    """Raised in a parser's callback: the rest of the data is not read."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection. It reads a head, then a body, then the next head; `_timer` bounds the part that it reads."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        limits: Limits,
        connections: Connections,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._limits = limits
        self._all = connections
        self._timer: asyncio.TimerHandle | None = None
        self._in_head = True
        self._begun = False  # the head's first byte has come
        self._heads = 0  # complete ones
        self._head_bytes = 0  # of the incomplete one, without what came together with the end of a request
        self._window_bytes = 0  # of the body, in this window

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._all.add(self)
        self._bound(self._limits.head_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._all.remove(self)
        self._unbound()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        heads, was_in_head = self._heads, self._in_head
        if self._in_head and self._timer is None:
            self._bound(self._limits.head_s)
        super().data_received(data)
        if was_in_head and self._in_head and heads == self._heads:
            self._head_bytes += len(data)
            if self._head_bytes > self._limits.head_bytes and not self.transport.is_closing():
                self._refuse_head()
        else:
            self._head_bytes = 0

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._begun = True
        if self._timer is None:
            self._bound(self._limits.head_s)

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(self.headers) >= self._limits.headers:
            self._refuse_head()
            raise _Refused
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self._limits.head_bytes:
            self._refuse_head()
            raise _Refused
        self._heads += 1
        self._in_head = False
        self._window_bytes = 0
        self._all.waiting.pop(self, None)
        self._bound(self._limits.body_window_s)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._window_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_head, self._begun = True, False
        self._unbound()
        super().on_message_complete()
        if self.cycle.response_complete:  # refused before its body had come: uvicorn sets no timer after that
            self._all.waiting[self] = None
            self._bound(self._limits.head_s)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            return
        if self._in_head and not self.pipeline:
            self._all.waiting[self] = None
        elif self.expect_100_continue and not self._in_head:
            self.transport.close()  # refused before it sent the body: what comes next may be the body or a request

    def send_400_response(self, msg: str) -> None:
        if not self.transport.is_closing():  # a refusal of ours has closed it
            self._refuse(400, "The request is no HTTP/1.1 that can be read.", "bad_request")

    def _bound(self, seconds: float) -> None:
        self._unbound()
        self._timer = self.loop.call_later(seconds, self._expired)

    def _unbound(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expired(self) -> None:
        """The head took too long, or the body came too slowly; unless it is this server that does not read."""
        limits = self._limits
        self._timer = None
        if self.transport.is_closing():
            return
        window = limits.head_s if self._in_head else limits.body_window_s
        if self.flow.read_paused:
            self._bound(window)
        elif self._in_head and not self._begun:
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()  # nothing was asked, so there is no answer; while one runs, it goes on
        elif self._in_head:
            self._refuse(408, f"The request's head was not complete after {window:g} s.", "request_timeout")
        elif self._window_bytes < limits.body_bytes_per_s * window:
            words = f"The body came at less than {limits.body_bytes_per_s} bytes/s in {window:g} s."
            self._refuse(408, words, "request_timeout")
        else:
            self._window_bytes = 0
            self._bound(window)

    def _refuse_head(self) -> None:
        limits = self._limits
        words = f"The request's head may have at most {limits.head_bytes} bytes and {limits.headers} headers."
        self._refuse(431, words, "request_header_fields_too_large")

    def _refuse(self, status: int, message: str, code: str) -> None:
        """Answer if nothing of another answer is on its way, and close."""
        current = None if self.cycle is None or self.cycle.response_complete else self.cycle
        between = current is None or (not self._in_head and not current.response_started)
        if self.pipeline or not between:
            self.transport.abort()
            return
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
        body = json.dumps({"error": error}).encode()
        answered = not self._in_head and current is None  # the answer is out, and this was the rest of its request
        if not answered:
            head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
            self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()
