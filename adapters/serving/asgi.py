"""ASGI: `create_app` for uvicorn and for the Lambda runtime. Translates scopes to Requests and Responses to messages.

It routes nothing and decides nothing: `handlers.dispatch` does. What is its own is time on the wire: bodies are bounded
while they arrive, a client that hangs up ends the work done for it, and every Response is closed.

An embedding adapter may say more than a scope can, in `scope["extensions"]["slm.request"]`:
`{"deadline": seconds on time.monotonic()'s clock or None, "id": str or None, "direct": bool, "principal": str or None}`
(see `handlers.http.Request`).
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, quote

from core.errors import InvalidRequest, TooLarge
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

access = logging.getLogger("access")

GONE = 499  # nginx's number for "the client hung up first"; only ever in the log
DRAIN_FACTOR, DRAIN_S = 4, 5.0


def create_app(service: Service | None = None) -> Starlette:
    """The application. Without a service one is built from the environment when the application starts."""
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
    app.router.default = endpoint  # no routes of Starlette's: `handlers.routes` has them all
    return app


class Endpoint:
    """The one ASGI endpoint, with a lifespan of its own: the Lambda runtime serves it without Starlette, whose import
    takes 40 ms of each cold start."""

    def __init__(self, service: Service | None) -> None:
        self._service = service

    def service(self) -> Service:
        """Built at the first call where there is no lifespan (Mangum with `lifespan="off"`)."""
        if self._service is None:
            from adapters.wiring import build

            self._service = build(Settings.from_env(os.environ))
        return self._service

    def start(self) -> None:
        self.service().host.start()

    async def close(self) -> None:
        service = self.service()
        await service.host.close(service.settings.shutdown_grace_s)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
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
        try:
            status = await _serve(service, request, receive, send)
        finally:
            _log(scope, request, status, time.monotonic() - began, facts)

    async def _live(self, receive: Receive, send: Send) -> None:
        """ASGI's lifespan: start, wait for the end, close."""
        await receive()
        self.start()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.close()
        await send({"type": "lifespan.shutdown.complete"})


def to_request(scope: Scope) -> Request:
    """The scope as a Request whose body is still to be read."""
    headers: dict[str, str] = {}
    for raw_name, raw_value in scope["headers"]:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    known = (scope.get("extensions") or {}).get("slm.request") or {}
    client = scope.get("client")
    return Request(
        method=scope["method"],
        path="/" + scope["path"].lstrip("/"),  # OpenAI(base_url=URL + "/v1") with a URL that ends in /
        id=identify(headers.get("x-request-id") or known.get("id")),
        headers=headers,
        query=dict(parse_qsl(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True)),
        client=client[0] if client else None,
        deadline=known.get("deadline"),
        http_version=scope.get("http_version", "1.1"),
        direct=bool(known.get("direct", False)),
        principal=known.get("principal"),
    )


class _Gone(Exception):
    """The client hung up."""


async def _serve(service: Service, request: Request, receive: Receive, send: Send) -> int:
    """Answer, unless the client goes first: then the work for it is cancelled at once. Returns the status."""
    try:
        admit(service, request)
        request = await _with_body(request, receive, service.settings.max_body_bytes)
    except _Gone:
        return GONE
    except InvalidRequest as error:
        return await _send(finished(service, request, refusal(error)), send)

    work = asyncio.create_task(_answer(service, request, send))
    gone = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        # Both are over when this returns, whether the answer is out, the client has gone or the server is stopping.
        gone.cancel()
        if not work.done():
            work.cancel()
        await asyncio.wait({work, gone})
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
    except OSError:  # what `send` raises, by the ASGI specification, when the client has gone
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


async def _with_body(request: Request, receive: Receive, limit: int) -> Request:
    """Raises TooLarge as soon as it is known, at best before the first byte, and _Gone."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        if "expect" not in request.headers:  # a client that asks first has sent nothing, and shall not be told to
            await _drain(receive, limit)
        raise TooLarge(f"The body has {declared[:20]} bytes; the most is {limit} (MAX_BODY_BYTES).")
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Gone
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            if message.get("more_body", False):
                await _drain(receive, limit)
            raise TooLarge(f"The body has more than {limit} bytes, which is the most (MAX_BODY_BYTES).")
        chunks.append(chunk)
        if not message.get("more_body", False):
            break
    body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
    return dataclasses.replace(request, body=body)


async def _drain(receive: Receive, limit: int) -> None:
    """Read on and forget, within reason: closing a socket with unread bytes resets it, and the client, still sending,
    would see the reset instead of the 413."""
    seen = 0
    try:
        async with asyncio.timeout(DRAIN_S):
            while seen <= limit * DRAIN_FACTOR:
                message = await receive()
                seen += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
    except TimeoutError:
        return


def _log(scope: Scope, request: Request, status: int, seconds: float, facts: dict[str, object]) -> None:
    """One line a request. The path is percent-encoded, so that no client can write a line of its own."""
    raw = scope.get("raw_path")
    path = raw.decode("latin-1") if raw else quote(request.path)
    milliseconds = round(seconds * 1e3, 1)
    fields = {"method": request.method, "path": path[:200], "status": status, "ms": milliseconds, **facts}
    told = " ".join(f"{name}={value}" for name, value in facts.items())
    level = logging.WARNING if status >= 500 else logging.INFO
    access.log(
        level, "%s %s %s %s ms %s", request.method, path[:200], status, milliseconds, told, extra={"fields": fields}
    )
