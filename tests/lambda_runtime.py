"""Run the Lambda runtime in the test's event loop against the strict Runtime API double. A violation fails the test."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from adapters.aws_lambda.runtime import Runtime
from infra.emulator.event import to_event
from infra.emulator.exchange import Behaviour, Exchange
from infra.emulator.runtime_api import RuntimeAPIServer

PATIENCE_S = 20.0


class Bench:
    """The Runtime API double (`server`), the runtime under test and its task."""

    def __init__(self, server: RuntimeAPIServer, runtime: Runtime, running: asyncio.Task[int]) -> None:
        self.server = server
        self.runtime = runtime
        self.running = running

    async def ended(self) -> int:
        """Wait until the runtime ends by itself and return its exit status."""
        return await asyncio.wait_for(asyncio.shield(self.running), PATIENCE_S)

    async def invoke(self, event: Any, **options: Any) -> Exchange:
        """Invoke the function and wait for the complete answer."""
        exchange = self.server.invoke(event, **options)
        await asyncio.wait_for(exchange.finished.wait(), PATIENCE_S)
        return exchange

    async def get(
        self, path: str = "/", *, method: str = "GET", behaviour: Behaviour | None = None, **event: Any
    ) -> Exchange:
        """Send a function URL event and wait for the complete answer."""
        timeout_s = event.pop("timeout_s", 30.0)
        return await self.invoke(to_event(method, path, **event), timeout_s=timeout_s, behaviour=behaviour)

    async def still_serves(self) -> None:
        """Check that two further invocations succeed. Every test of a failure ends with this check."""
        for _ in range(2):
            exchange = await self.get("/ping")
            assert exchange.error is None
            assert exchange.status == 200


@asynccontextmanager
async def runtime(app: Any, *, environ: dict[str, str] | None = None, **options: Any) -> AsyncIterator[Bench]:
    """Run a runtime that serves `app`. `/ping` always answers 200."""

    async def with_ping(scope: Any, receive: Any, send: Any) -> None:
        await (ping if scope.get("path") == "/ping" else app)(scope, receive, send)

    ping = json_app()
    concurrency = options.get("concurrency", 1)
    options.setdefault("init_ends", time.monotonic() + 5)
    async with RuntimeAPIServer(concurrency=concurrency) as server:
        under_test = Runtime(with_ping, {"AWS_LAMBDA_RUNTIME_API": server.address, **(environ or {})}, **options)
        running = asyncio.ensure_future(under_test.run())
        bench = Bench(server, under_test, running)
        try:
            yield bench
        finally:
            under_test.stop()
            done, _ = await asyncio.wait({running}, timeout=PATIENCE_S)
            if not done:
                running.cancel()
        assert server.violations == []
        assert [exchange.id for exchange in server.unanswered()] == []
        assert running.done()


def json_app(body: bytes = b'{"ok":true}', *, status: int = 200, headers: Any = None) -> Any:
    """Return an ASGI application that gives the same answer to every request."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [(b"content-type", b"application/json")] if headers is None else headers,
            }
        )
        await send({"type": "http.response.body", "body": body})

    return app
