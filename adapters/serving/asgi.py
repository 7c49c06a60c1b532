"""The ASGI application: translate scopes to Requests and Responses to ASGI messages.

`handlers.dispatch` routes and decides. This module has the body read within its limits (`bodies`), cancels the work
when the client disconnects, closes every Response and writes the access log.

The Lambda runtime passes what a scope has no place for in `scope["extensions"]["slm.request"]`, a dictionary with the
keys `deadline`, `id`, `direct` and `principal` (see `handlers.http.Request`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, quote

from adapters.serving import bodies
from core.errors import Busy, InvalidRequest
from core.service import Service
from core.settings import Settings
from handlers.dispatch import admit, dispatch, finished, refusal
from handlers.http import Request, Response, collect_log_fields, identify, request_id

if TYPE_CHECKING:
    from starlette.applications import Starlette

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

logger = logging.getLogger("slm.access")

GONE = 499  # nginx's status for "client closed request"; it appears only in the access log


def create_app(service: Service | None = None) -> Starlette:
    """Return the application. Without `service`, one is built from the environment when the application starts."""
    from starlette.applications import Starlette

    endpoint = Endpoint(service)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        endpoint.start()
        try:
            yield
        finally:
            await endpoint.close()

    app = Starlette(lifespan=lifespan)
    app.router.default = endpoint  # Starlette routes nothing: `handlers.routes` has all routes
    return app


class Endpoint:
    """The ASGI application without Starlette, whose import takes 40 ms of a cold start. The Lambda runtime calls it."""

    def __init__(self, service: Service | None) -> None:
        self._service = service
        self._bodies: bodies.Budget | None = None

    def service(self) -> Service:
        """Return the service. Without a lifespan (Mangum's `lifespan="off"`) the first request builds it."""
        if self._service is None:
            from adapters.wiring import build

            self._service = build(Settings.from_env(os.environ))
        return self._service

    def start(self) -> None:
        self.service().host.start()

    async def close(self) -> None:
        service = self.service()
        await service.close(service.settings.shutdown_grace_s)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1003})
            return
        began = time.monotonic()
        service = self.service()
        request = to_request(scope)
        request_id.set(request.id)
        facts = collect_log_fields()
        status = GONE
        self._bodies = self._bodies or bodies.Budget(service.settings.max_body_bytes)
        reservation = self._bodies.reservation()
        try:
            status = await _serve(service, request, receive, send, reservation)
        finally:
            reservation.release()
            _log(scope, request, status, time.monotonic() - began, facts)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        """Serve ASGI's lifespan protocol: start, wait for the shutdown event, close."""
        await receive()
        self.start()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.close()
        await send({"type": "lifespan.shutdown.complete"})


def to_request(scope: Scope) -> Request:
    """Return the Request of a scope. Its body is not read yet."""
    headers: dict[str, str] = {}
    for raw_name, raw_value in scope["headers"]:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    platform = (scope.get("extensions") or {}).get("slm.request") or {}
    client = scope.get("client")
    return Request(
        method=scope["method"],
        path="/" + scope["path"].lstrip("/"),  # a function URL ends in "/", and clients append "/v1"
        id=identify(headers.get("x-request-id") or platform.get("id")),
        headers=headers,
        query=dict(parse_qsl(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True)),
        client=client[0] if client else None,
        deadline=platform.get("deadline"),
        http_version=scope.get("http_version", "1.1"),
        direct=bool(platform.get("direct", False)),
        principal=platform.get("principal"),
    )


async def _serve(
    service: Service, request: Request, receive: Receive, send: Send, reservation: bodies.Reservation
) -> int:
    """Answer the request and return the status. If the client disconnects, cancel the work and return GONE."""
    # 1) Check the head, then read the body.
    try:
        admit(service, request)
        request = await bodies.read(request, receive, service.settings.max_body_bytes, reservation)
    except bodies.Gone:
        return GONE
    except (InvalidRequest, Busy) as error:
        return await _send(finished(service, request, refusal(error, request.path)), send)

    # 2) Answer while watching for a disconnect. Neither task outlives this function, even if it is cancelled.
    work = asyncio.create_task(_answer(service, request, send))
    disconnect = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({work, disconnect}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        disconnect.cancel()
        if not work.done():
            work.cancel()
        await asyncio.wait({work, disconnect})
    return GONE if work.cancelled() else work.result()


async def _answer(service: Service, request: Request, send: Send) -> int:
    response = await dispatch(service, request)
    return await _send(response, send)


async def _send(response: Response, send: Send) -> int:
    try:
        await send({"type": "http.response.start", "status": response.status, "headers": _headers(response)})
        if isinstance(response.body, bytes):
            await send({"type": "http.response.body", "body": response.body})
        else:
            async for chunk in response.body:
                if chunk:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
    except OSError:  # ASGI: `send` raises OSError after a disconnect
        return GONE
    finally:
        await response.aclose()
    return response.status


def _headers(response: Response) -> list[tuple[bytes, bytes]]:
    named = {name for name, _ in response.headers}
    extra: list[tuple[str, str]] = []
    if isinstance(response.body, bytes) and "content-length" not in named and response.status != 204:
        extra.append(("content-length", str(len(response.body))))
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in (*response.headers, *extra)]


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _log(scope: Scope, request: Request, status: int, seconds: float, facts: dict[str, object]) -> None:
    """Write one line for a request. The path is percent-encoded, so a client cannot forge a line."""
    raw = scope.get("raw_path")
    path = raw.decode("latin-1") if raw else quote(request.path)
    milliseconds = round(seconds * 1e3, 1)
    fields = {"method": request.method, "path": path[:200], "status": status, "ms": milliseconds, **facts}
    line = [request.method, path[:200], str(status), f"{milliseconds} ms"]
    line += [f"{name}={value}" for name, value in facts.items()]
    level = logging.WARNING if status >= 500 else logging.INFO
    logger.log(level, "%s", " ".join(line), extra={"fields": fields})
