"""Run uvicorn with limits on what a client may cost before it has sent a request.

uvicorn limits neither the size of a request's head nor the time it takes. `BoundedProtocol` limits the size and time of
a head, the rate of a body and the number of connections. A client over a limit gets an OpenAI error if a response can
still be sent, and its connection is closed. `Server` lets running answers finish on shutdown.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import math
import resource
import socket
from dataclasses import dataclass
from typing import Any

import uvicorn
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from adapters.serving.asgi import create_app
from core.service import Service

logger = logging.getLogger("slm.server")

SLOW_READER_S = 5  # time for clients to read the rest of their answers after the last one has ended
LINGER_S = 2.0  # how long a refused client may still send before its connection is closed
LINGER_BYTES = 1 << 20  # how much of that is read and discarded


@dataclass(frozen=True, slots=True)
class Limits:
    """What a connection may use. `connections` None means as many as the queue needs, and at least 2,048."""

    head_bytes: int = 64 << 10
    headers: int = 100
    head_s: float = 10.0
    body_bytes_per_s: int = 16_000
    body_window_s: float = 10.0  # the rate is measured per window; a body that is complete within the first may be slow
    connections: int | None = None


class Server(uvicorn.Server):
    """A uvicorn server with one worker. The first SIGTERM or Ctrl-C drains it; a second Ctrl-C exits at once."""

    def __init__(self, service: Service, limits: Limits | None = None) -> None:
        settings = service.settings
        limits = limits or Limits()
        self._service = service
        most = limits.connections or max(2048, settings.n_parallel + settings.max_queue + 64)
        connections = Connections(_raise_open_files(most))
        protocol: Any = functools.partial(BoundedProtocol, limits=limits, connections=connections)
        config = uvicorn.Config(
            lambda: create_app(service),
            factory=True,
            host=settings.host,
            port=settings.port,
            http=protocol,
            lifespan="on",
            ws="none",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,  # with it, any client could claim to be on loopback
            timeout_graceful_shutdown=math.ceil(settings.shutdown_grace_s) + SLOW_READER_S,
        )
        super().__init__(config)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let running answers finish within SHUTDOWN_GRACE_S. Later ones end with an error event, not a reset."""
        running = len(self.server_state.tasks)
        if running:
            grace_s = self._service.settings.shutdown_grace_s
            logger.info("Shutting down. %d running requests have %g s to finish. Ctrl-C ends now.", running, grace_s)
        else:
            logger.info("Shutting down.")
        closing = asyncio.create_task(self._close_host())
        await super().shutdown(sockets)
        await closing
        if self.force_exit:
            # uvicorn does not wait for its tasks now. The engine is closed, so they end within moments.
            if self.server_state.tasks:
                await asyncio.wait(self.server_state.tasks, timeout=1)
            await self.lifespan.shutdown()

    async def _close_host(self) -> None:
        closing = asyncio.create_task(self._service.close(self._service.settings.shutdown_grace_s))
        while not closing.done() and not self.force_exit:
            await asyncio.wait({closing}, timeout=0.1)
        if self.force_exit:
            await self._service.close(0)
        await closing


class Connections:
    """The open connections of one server. `idle` has those without a running request, longest idle first."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.open: set[BoundedProtocol] = set()
        self.idle: dict[BoundedProtocol, None] = {}

    def add(self, connection: BoundedProtocol) -> None:
        """Add a new connection. At the limit it replaces the longest idle one, or is closed if none is idle."""
        if len(self.open) >= self.most:
            evicted = next(iter(self.idle), connection)
            self.remove(evicted)
            evicted.transport.abort()
            if evicted is connection:
                return
        self.open.add(connection)
        self.idle[connection] = None

    def remove(self, connection: BoundedProtocol) -> None:
        self.open.discard(connection)
        self.idle.pop(connection, None)


class _Refused(Exception):
    """Raised in a callback of the parser to stop it from reading the rest of the data."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection. It reads a head, then a body, then the next head; `_timer` limits the part it is reading."""

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
        self._begun = False  # the head's first byte has arrived
        self._heads = 0  # complete heads
        self._head_bytes = 0  # bytes of the incomplete head, except those that arrived with the end of a request
        self._window_bytes = 0  # bytes of the body in the current window
        self._lingering = False  # the client was refused; what it still sends is discarded
        self._discarded = 0

    # --- asyncio's callbacks ---

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._all.add(self)
        self._start_timer(self._limits.head_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._all.remove(self)
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._lingering:
            self._discarded += len(data)
            if self._discarded > LINGER_BYTES:
                self.transport.abort()
            return
        heads, was_in_head = self._heads, self._in_head
        if self._in_head and self._timer is None:
            self._start_timer(self._limits.head_s)
        super().data_received(data)
        if was_in_head and self._in_head and heads == self._heads:
            self._head_bytes += len(data)
            if self._head_bytes > self._limits.head_bytes and not self._closing():
                self._refuse_head()
        else:
            self._head_bytes = 0

    def shutdown(self) -> None:
        """Called by the server when it drains."""
        if self._lingering:
            self.transport.close()
        else:
            super().shutdown()

    # --- the parser's callbacks ---

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._begun = True
        if self._timer is None:
            self._start_timer(self._limits.head_s)

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
        self._all.idle.pop(self, None)
        self._start_timer(self._limits.body_window_s)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._window_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_head, self._begun = True, False
        self._stop_timer()
        super().on_message_complete()
        if self.cycle.response_complete:  # answered before the body was complete: uvicorn starts no keep-alive timer
            self._all.idle[self] = None
            self._start_timer(self._limits.head_s)

    # --- uvicorn's callbacks ---

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._closing():
            return
        if self._in_head and not self.pipeline:
            self._all.idle[self] = None
        elif self.expect_100_continue and not self._in_head:
            self.transport.close()  # refused before the body: the client may send it, or a new request, and both fit

    def send_400_response(self, msg: str) -> None:
        if not self._closing():  # a callback that raised _Refused has sent its response
            self._refuse(400, "The request is not valid HTTP/1.1.", "bad_request")

    # --- limits ---

    def _start_timer(self, seconds: float) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, self._expired)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _closing(self) -> bool:
        return self._lingering or self.transport.is_closing()

    def _expired(self) -> None:
        """Refuse a head that took too long or a body that arrived too slowly."""
        limits = self._limits
        self._timer = None
        if self._closing():
            self.transport.close()
            return
        window = limits.head_s if self._in_head else limits.body_window_s
        # 1) uvicorn has paused reading, so the client is not to blame.
        if self.flow.read_paused:
            self._start_timer(window)
        # 2) No request has begun. A response may still be running; otherwise close without one.
        elif self._in_head and not self._begun:
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()
        # 3) The head is incomplete.
        elif self._in_head:
            self._refuse(408, f"The request's head was not complete after {window:g} s.", "request_timeout")
        # 4) The body is incomplete: the client must keep the rate in each window.
        elif self._window_bytes < limits.body_bytes_per_s * window:
            message = f"The request's body arrived at less than {limits.body_bytes_per_s} bytes/s for {window:g} s."
            self._refuse(408, message, "request_timeout")
        else:
            self._window_bytes = 0
            self._start_timer(window)

    def _refuse_head(self) -> None:
        limits = self._limits
        message = f"A request's head may have at most {limits.head_bytes} bytes and {limits.headers} headers."
        self._refuse(431, message, "request_header_fields_too_large")

    def _refuse(self, status: int, message: str, code: str) -> None:
        """Send an error unless it would mix with another response, and close the connection."""
        running = None if self.cycle is None or self.cycle.response_complete else self.cycle
        may_answer = running is None or (not self._in_head and not running.response_started)
        if self.pipeline or not may_answer:
            self.transport.abort()
            return
        answered = not self._in_head and running is None  # this is the rest of a request whose response was sent
        if not answered:
            error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
            body = json.dumps({"error": error}).encode()
            head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
            self.transport.write(STATUS_LINE[status] + head + body)
        self._linger()

    def _linger(self) -> None:
        """Close the sending side and discard what the client still sends, until it closes or LINGER_S have passed.

        A socket that is closed with unread bytes sends a reset, and the client loses the response that precedes it
        (RFC 9112, section 9.6).
        """
        self._lingering = True
        self._all.idle[self] = None
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.flow.resume_reading()
        self.transport.write_eof()
        self._start_timer(LINGER_S)


def _raise_open_files(connections: int) -> int:
    """Raise the limit on open files for `connections` where that is allowed. Return how many connections fit."""
    spare = 256  # for the model's files, downloads and pipes
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return connections
    if soft < connections + spare:
        soft = connections + spare if hard == resource.RLIM_INFINITY else min(hard, connections + spare)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return min(connections, max(16, soft - spare))


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raise OSError if the address cannot be used.

    The banner is printed after this, when the address is bound and port 0 has become a number.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def address_of(listener: socket.socket) -> str:
    """Return the URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
