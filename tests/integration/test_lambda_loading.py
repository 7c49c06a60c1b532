"""Events that arrive after init, while the model is still loading, are answered by the real application."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

from adapters.serving.asgi import create_app
from core.errors import ModelUnavailable
from core.host import Loading
from core.settings import keys
from infra.emulator.event import to_event
from infra.emulator.exchange import Exchange
from tests.fakes import FakeHost, FakeLease, ScriptedEngine, fake_service
from tests.lambda_runtime import PATIENCE_S, Bench, runtime

HEADERS = [("authorization", "Bearer secret"), ("content-type", "application/json")]


class SlowHost(FakeHost):
    """A host that loads until `loaded` is set."""

    def __init__(self) -> None:
        super().__init__(ScriptedEngine(), status="available")
        self.loading = Loading("download", "fake-1b", 42, 100)
        self.loaded = asyncio.Event()

    async def lease(self, deadline: float | None = None) -> FakeLease:
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        try:
            await asyncio.wait_for(self.loaded.wait(), timeout)
        except TimeoutError:
            raise ModelUnavailable("The model is loading.", retry_after=5) from None
        self.loading = None
        return await super().lease(deadline)


def chat(bench: Bench, *, key: str = "secret", timeout_s: float = 30.0, **fields: Any) -> Exchange:
    body = {"messages": [{"role": "user", "content": "Hello"}], **fields}
    headers = [("authorization", f"Bearer {key}"), ("content-type", "application/json")]
    event = to_event("POST", "/v1/chat/completions", headers=headers, body=json.dumps(body).encode())
    return bench.server.invoke(event, timeout_s=timeout_s)


async def finished(exchange: Exchange) -> Exchange:
    await asyncio.wait_for(exchange.finished.wait(), PATIENCE_S)
    return exchange


def loading(act: Any) -> None:
    async def go() -> None:
        host = SlowHost()
        app = create_app(fake_service(host.engine, host=host, api_keys=keys("secret")).service)
        async with runtime(app, ready=host.loaded.wait, init_ends=time.monotonic()) as bench:
            await act(bench, host)
            host.loaded.set()
            await bench.still_serves()

    asyncio.run(go())


def test_a_stream_reports_the_progress_of_the_load() -> None:
    """It gets the 200 and SSE comments at once, and its tokens when the model is loaded."""

    async def act(bench: Bench, host: SlowHost) -> None:
        exchange = chat(bench, stream=True)
        for _ in range(1000):
            if b": loading" in exchange.body:
                break
            await asyncio.sleep(0.01)
        assert exchange.status == 200
        assert b": loading 42%" in exchange.body
        assert b"data:" not in exchange.body
        host.loaded.set()
        await finished(exchange)
        assert exchange.body.endswith(b"data: [DONE]\n\n")
        assert exchange.trailers == {}

    loading(act)


def test_requests_are_checked_before_the_model_is_loaded() -> None:
    """A wrong key and a wrong body are refused at once."""

    async def act(bench: Bench, host: SlowHost) -> None:
        assert (await finished(chat(bench, stream=True, key="wrong"))).status == 401
        assert (await finished(chat(bench, stream=True, temperature="hot"))).status == 400

    loading(act)


def test_a_request_without_stream_is_a_503_before_the_deadline() -> None:
    """The answer has a Retry-After."""

    async def act(bench: Bench, host: SlowHost) -> None:
        exchange = await finished(chat(bench, timeout_s=3.0))
        assert exchange.status == 503
        assert exchange.prelude is not None
        assert int(exchange.prelude["headers"]["retry-after"]) > 0
        assert json.loads(exchange.body)["error"]["code"] == "model_unavailable"
        assert time.monotonic() < exchange.deadline

    loading(act)


def test_health_and_models_answer_at_once() -> None:
    """They do not need the model."""

    async def act(bench: Bench, host: SlowHost) -> None:
        for path in ("/health", "/models"):
            exchange = await bench.get(path, headers=HEADERS)
            assert exchange.status == 200
            assert b"42" in exchange.body

    loading(act)
