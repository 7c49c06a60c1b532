"""Serve a Lambda function URL on this machine: `make url`.

`python -m infra.emulator.function_url [--port 9000] [-- command ...]` runs another runtime.

SAM CLI emulates no function URL, and its API buffers. This HTTP server turns requests into function URL events (version
2.0), runs the runtime as a subprocess, forwards the stream as it arrives, and prints a report for each invocation. The
limits are Lambda's: 6 MB in, 200 MB out (6 MB buffered), the deadline, one event at a time for each process, and a
frozen process between events.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from infra.emulator.environment import Environment
from infra.emulator.event import CALLER, DOMAIN, from_buffered, to_event
from infra.emulator.exchange import Exchange

MAX_REQUEST = 6 * 1024 * 1024  # bytes of an event, its envelope included
MAX_STREAM = 200 * 1024 * 1024

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class FunctionURL:
    """The ASGI application. A request waits while every environment is busy. Lambda would start another one."""

    def __init__(
        self, environments: list[Environment], report: Callable[[str], None], *, caller: str | None = None
    ) -> None:
        self._caller = caller
        self._environments = environments
        self._free: asyncio.LifoQueue[Environment] = asyncio.LifoQueue()
        self._report = report

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await send({"type": "websocket.close"})

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        for environment in self._environments:
            self._free.put_nowait(environment)
        await send({"type": "lifespan.startup.complete"})
        await receive()
        for environment in self._environments:
            await environment.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _http(self, scope: Any, receive: Receive, send: Send) -> None:
        body = await _body(receive)
        event = None if body is None else json.dumps(_event(scope, body, self._caller)).encode()
        if event is None or len(event) > MAX_REQUEST:
            await _plain(
                send, 413, {"Message": "Request must be smaller than 6291456 bytes for the InvokeFunction operation"}
            )
            return
        environment = await self._free.get()
        try:
            exchange = await environment.invoke(event)
            # Lambda does not stop when a client disconnects. The invocation is read to its end.
            first_byte = await asyncio.shield(asyncio.ensure_future(_forward(exchange, scope["method"], send)))
            report = await environment.settle(exchange, first_byte)
            self._report(str(report))
            for violation in environment.violations:
                self._report(f"violation: {violation}")
            environment.violations = []
        finally:
            self._free.put_nowait(environment)


async def _body(receive: Receive) -> bytes | None:
    """Return the body, or None if it is larger than an event may be."""
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MAX_REQUEST:
            return None
        if not message.get("more_body", False):
            return bytes(body)


def _event(scope: Any, body: bytes, caller: str | None) -> dict[str, Any]:
    return to_event(
        scope["method"],
        scope["raw_path"].decode("latin-1"),
        query=scope["query_string"].decode("latin-1"),
        headers=[(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]],
        body=body,
        source_ip=scope["client"][0] if scope["client"] else "127.0.0.1",
        domain=DOMAIN,
        caller=caller,
    )


async def _forward(exchange: Exchange, method: str, send: Send) -> float | None:
    """Forward the answer and return when its first byte came (monotonic). A disconnected client is ignored."""
    await exchange.begun.wait()
    began = None if exchange.kind == "error" else time.monotonic()
    if exchange.kind != "stream":
        while await exchange.data.get() is not None:
            pass
        if exchange.error is not None:
            await _plain(send, 502, {"Message": "Internal Server Error"})
        else:
            await _buffered(send, bytes(exchange.body))
        return began
    prelude = exchange.prelude or {"statusCode": 502, "headers": {}}
    headers = [*prelude.get("headers", {}).items(), *(("set-cookie", cookie) for cookie in prelude.get("cookies", ()))]
    sent = 0
    await send({"type": "http.response.start", "status": prelude["statusCode"], "headers": _raw(headers)})
    while (chunk := await exchange.data.get()) is not None:
        if sent < MAX_STREAM:
            chunk = chunk[: MAX_STREAM - sent]
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        sent += len(chunk)
    await send({"type": "http.response.body", "body": b""})
    return began


async def _buffered(send: Send, raw: bytes) -> None:
    status, headers, body = from_buffered(json.loads(raw), raw)
    await send({"type": "http.response.start", "status": status, "headers": _raw(headers)})
    await send({"type": "http.response.body", "body": body})


async def _plain(send: Send, status: int, record: dict[str, str]) -> None:
    body = json.dumps(record).encode()
    headers = [("content-type", "application/json"), ("content-length", str(len(body)))]
    await send({"type": "http.response.start", "status": status, "headers": _raw(headers)})
    await send({"type": "http.response.body", "body": body})


def _raw(headers: list[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode("latin-1"), value.encode("latin-1", "replace")) for name, value in headers]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m infra.emulator.function_url", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9000)
    parser.add_argument("--memory", type=int, default=3008, help="MB, used for the report only (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds of one invocation (default: %(default)s)")
    parser.add_argument("--environments", type=int, default=1, help="processes at most (default: %(default)s)")
    parser.add_argument("--no-freeze", action="store_true", help="let processes run between invocations")
    parser.add_argument("command", nargs="*", help="the runtime (default: python -m adapters.aws_lambda)")
    options = parser.parse_args(arguments)

    import uvicorn
    from dotenv import dotenv_values

    from core.settings import Settings

    environ = {**{name: value for name, value in dotenv_values(".env").items() if value}, **os.environ}
    if not any(environ.get(name) for name in ("API_KEYS", "API_KEYS_SECRET", "IAM_AUTH")):
        environ["IAM_AUTH"] = "true"  # each request then has CALLER's identity; the address is on loopback
    environments = [
        Environment(
            options.command or [sys.executable, "-m", "adapters.aws_lambda"],
            environ,
            memory_mb=options.memory,
            timeout_s=options.timeout,
            freeze=not options.no_freeze,
        )
        for _ in range(options.environments)
    ]
    print(f"function URL: http://{options.host}:{options.port}/", flush=True)
    caller = CALLER if Settings.from_env(environ).iam_auth else None
    app = FunctionURL(environments, lambda line: print(line, flush=True), caller=caller)
    uvicorn.run(app, host=options.host, port=options.port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
