"""The runtime ends an answer before Lambda's deadline ends the process."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest

from adapters.aws_lambda.cycle import HARD_MARGIN_S
from infra.emulator.exchange import Exchange
from tests.lambda_runtime import json_app, runtime

EVENTS = (b"content-type", b"text/event-stream")
SHORT = HARD_MARGIN_S + 0.3


def answer(app: Any, *, mode: str = "auto", timeout_s: float = SHORT) -> Exchange:
    async def go() -> Exchange:
        async with runtime(app, mode=mode) as bench:
            exchange = await bench.get(timeout_s=timeout_s)
            await bench.still_serves()
            return exchange

    return asyncio.run(go())


@pytest.mark.parametrize("mode", ["auto", "buffered"])
def test_no_answer_by_the_deadline_is_a_504(mode: str) -> None:
    """The application is cancelled and its client gets the 504 in time."""
    cleaned: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            cleaned.append("up")

    exchange = answer(app, mode=mode)

    assert exchange.status == 504
    assert b"timeout" in exchange.body
    assert cleaned == ["up"]
    assert time.monotonic() > exchange.deadline - HARD_MARGIN_S - 0.05


def test_a_running_stream_is_ended_with_trailers() -> None:
    """It ends between chunks, with an error event."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [EVENTS]})
        while True:
            await send({"type": "http.response.body", "body": b"data: x\n\n", "more_body": True})
            await asyncio.sleep(0.02)

    exchange = answer(app)

    assert exchange.trailers["lambda-runtime-function-error-type"] == "Function.DeadlineExceeded"
    assert exchange.body.endswith(b'"code":"timeout"}}\n\ndata: [DONE]\n\n')


def test_an_application_may_finish_when_it_is_cancelled() -> None:
    """Messages that it sends in its `except CancelledError` complete the answer."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [EVENTS]})
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    exchange = answer(app)

    assert exchange.body == b"data: [DONE]\n\n"
    assert exchange.trailers == {}


def test_an_application_that_ignores_cancellation_is_abandoned() -> None:
    """It can neither delay the next event nor write into another answer."""
    raised: list[BaseException] = []
    release = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [EVENTS]})
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue
        try:
            await send({"type": "http.response.body", "body": b"too late"})
        except OSError as error:
            raised.append(error)

    async def go() -> None:
        async with runtime(app) as bench:
            exchange = await bench.get(timeout_s=SHORT)
            assert exchange.trailers["lambda-runtime-function-error-type"] == "Function.DeadlineExceeded"
            await bench.still_serves()
            release.set()
            await asyncio.sleep(0.02)
            assert len(raised) == 1
            await bench.still_serves()

    asyncio.run(go())


@pytest.mark.parametrize("timeout_s", [0.0, -5.0, HARD_MARGIN_S / 2])
def test_a_deadline_already_past_is_a_504_at_once(timeout_s: float) -> None:
    """The application is not called."""
    called: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        called.append(scope)

    exchange = answer(app, timeout_s=timeout_s)

    assert exchange.status == 504
    assert called == []


def test_a_blocked_event_loop_is_answered_late() -> None:
    """Synchronous code that blocks past the deadline cannot be interrupted. Its event gets the 504 afterwards."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        time.sleep(SHORT + 0.1)
        await json_app()(scope, receive, send)

    exchange = answer(app)

    assert exchange.status == 504
    assert json.loads(exchange.body)["error"]["code"] == "timeout"
    assert time.monotonic() > exchange.deadline  # late, which cannot be avoided


def test_a_stalled_reader_does_not_delay_the_deadline() -> None:
    """The application waits in `send`; at the deadline the stream ends anyway."""
    from infra.emulator.exchange import Behaviour

    waited: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [EVENTS]})
        for number in range(4000):
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
            waited.append(number)

    async def go() -> None:
        async with runtime(app) as bench:
            exchange = await bench.get(timeout_s=SHORT + 0.3, behaviour=Behaviour(pause_s=0.03))
            assert exchange.trailers["lambda-runtime-function-error-type"] == "Function.DeadlineExceeded"
            assert len(waited) < 1000  # the application did not run ahead of the reader
            await bench.still_serves()

    asyncio.run(go())


def test_the_scope_has_the_deadline() -> None:
    """Generation can thus end before it."""
    scopes: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scopes.append(scope)
        await json_app()(scope, receive, send)

    exchange = answer(app, timeout_s=20)

    fields = scopes[0]["extensions"]["slm.request"]
    assert abs(fields["deadline"] - exchange.deadline) < 0.1
    assert fields["id"] == exchange.id
    assert fields["direct"] is False
