"""Whatever an application does wrong, its event is answered exactly once and the next events are served."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import pytest

from infra.emulator.exchange import Exchange
from tests.lambda_runtime import json_app, runtime

EVENTS = (b"content-type", b"text/event-stream; charset=utf-8")
SECRET = "password=hunter2 at /srv/app.py"


class Odd_Näme(Exception):
    """An exception whose name Lambda would not accept as an error type."""


def answer(app: Any, *, mode: str = "auto", event: Any = None, **request: Any) -> Exchange:
    async def go() -> Exchange:
        async with runtime(app, mode=mode) as bench:
            exchange = await (bench.invoke(event) if event is not None else bench.get(**request))
            await bench.still_serves()
            return exchange

    return asyncio.run(go())


def envelope(exchange: Exchange) -> dict[str, Any]:
    content = json.loads(exchange.body)
    error: dict[str, Any] = (json.loads(content["body"]) if exchange.kind == "buffered" else content)["error"]
    return error


def trailer_error(exchange: Exchange) -> dict[str, Any]:
    """Return the error in the trailers."""
    record = json.loads(base64.b64decode(exchange.trailers["lambda-runtime-function-error-body"]))
    assert record["errorType"] == exchange.trailers["lambda-runtime-function-error-type"]
    error: dict[str, Any] = record
    return error


async def start(send: Any, *, headers: Any = (EVENTS,)) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def fails_before(scope: Any, receive: Any, send: Any) -> None:
    raise ValueError(SECRET)


async def fails_after_start(scope: Any, receive: Any, send: Any) -> None:
    await start(send)
    raise ValueError(SECRET)


async def never_answers(scope: Any, receive: Any, send: Any) -> None:
    return


async def starts_only(scope: Any, receive: Any, send: Any) -> None:
    await start(send)


async def sends_body_first(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.body", "body": b"x"})


async def sends_nonsense(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.nonsense"})


async def starts_twice(scope: Any, receive: Any, send: Any) -> None:
    await start(send)
    await start(send)


async def exits(scope: Any, receive: Any, send: Any) -> None:
    raise SystemExit(3)


async def interrupts(scope: Any, receive: Any, send: Any) -> None:
    raise KeyboardInterrupt


async def cancels_itself(scope: Any, receive: Any, send: Any) -> None:
    raise asyncio.CancelledError


async def odd_name(scope: Any, receive: Any, send: Any) -> None:
    raise Odd_Näme("ünïcode 東京")


BEFORE = [
    fails_before,
    fails_after_start,
    never_answers,
    starts_only,
    sends_body_first,
    sends_nonsense,
    starts_twice,
    exits,
    interrupts,
    cancels_itself,
    odd_name,
]


@pytest.mark.parametrize("app", BEFORE, ids=lambda app: app.__name__)
@pytest.mark.parametrize("mode", ["auto", "buffered"])
def test_failure_before_the_first_byte_is_a_500(mode: str, app: Any) -> None:
    """The body is OpenAI's envelope without the exception's text."""
    exchange = answer(app, mode=mode)

    assert exchange.status == 500
    assert envelope(exchange)["type"] == "server_error"
    assert exchange.id in envelope(exchange)["message"]
    assert b"hunter2" not in bytes(exchange.body)
    assert exchange.trailers == {}


def broken_stream(error: BaseException, headers: Any = (EVENTS,)) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await start(send, headers=headers)
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        await asyncio.sleep(0)
        raise error

    return app


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError(SECRET), "Function.ValueError"),
        (Odd_Näme("ünïcode 東京"), "Function.OddNme"),
        (SystemExit(1), "Function.SystemExit"),
        (asyncio.CancelledError(), "Function.CancelledError"),
        (OSError("of the application"), "Function.OSError"),
        (TimeoutError(), "Function.TimeoutError"),
        (RuntimeError("x" * 100_000), "Function.RuntimeError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_failure_after_the_first_byte_is_an_event_and_trailers(error: BaseException, kind: str) -> None:
    """The client gets an SSE error event, and Lambda gets trailers with the error type."""
    exchange = answer(broken_stream(error))

    first, failure, done, end = bytes(exchange.body).split(b"\n\n")
    assert (first, done, end) == (b"data: 1", b"data: [DONE]", b"")
    assert json.loads(failure.removeprefix(b"data: "))["error"]["code"] == "internal_error"
    assert trailer_error(exchange)["errorType"] == kind
    assert len(exchange.trailers["lambda-runtime-function-error-body"]) < 8000
    assert "hunter2" not in json.dumps(trailer_error(exchange))


def test_other_streams_get_trailers_only() -> None:
    """A body that is not an event stream is cut without an error event."""
    exchange = answer(broken_stream(ValueError("x"), headers=((b"content-type", b"text/plain"),)))

    assert exchange.body == b"data: 1\n\n"
    assert trailer_error(exchange)["errorType"] == "Function.ValueError"


def test_a_broken_buffered_answer_is_a_500() -> None:
    """The failure replaces the part of the body that was sent before."""
    exchange = answer(broken_stream(ValueError("x")), mode="buffered")

    assert exchange.status == 500
    assert json.loads(exchange.body)["headers"] == {"content-type": "application/json"}


def test_a_missing_last_body_message_is_a_failure() -> None:
    """The stream ends with trailers."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await start(send)
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})

    exchange = answer(app)

    assert trailer_error(exchange)["errorType"] == "Function.RuntimeError"


@pytest.mark.parametrize("mode", ["auto", "buffered"])
def test_failure_after_the_answer_is_only_logged(mode: str, caplog: pytest.LogCaptureFixture) -> None:
    """It does not change the answer. Starlette, for example, raises again after its own 500."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await json_app()(scope, receive, send)
        raise ValueError("afterwards")

    exchange = answer(app, mode=mode)

    assert exchange.status == 200
    assert exchange.trailers == {}
    assert "failed after its answer" in caplog.text


def test_sending_after_the_end_is_an_error_of_the_application() -> None:
    """A message after the last one raises in the application and is not sent."""
    raised: list[Exception] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await json_app()(scope, receive, send)
        try:
            await send({"type": "http.response.body", "body": b"more"})
        except RuntimeError as error:
            raised.append(error)

    exchange = answer(app)

    assert exchange.body == b'{"ok":true}'
    assert len(raised) == 1


def test_optional_messages_are_ignored() -> None:
    """These are trailers and debug messages of ASGI extensions that are not offered."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await start(send)
        await send({"type": "http.response.debug", "info": {}})
        await send({"type": "http.response.body", "body": b"x"})
        await send({"type": "http.response.trailers", "headers": []})

    assert answer(app).body == b"x"


def test_the_application_is_finalised_before_the_next_event() -> None:
    """Its `finally` block runs when the stream breaks."""
    closed: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await broken_stream(ValueError("x"))(scope, receive, send)
        finally:
            closed.append("closed")

    answer(app)

    assert closed == ["closed"]


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (b"not json", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        ([], "a JSON list"),
        (None, "a JSON NoneType"),
        ({}, "an empty object"),
        ({"Records": [{"eventSource": "aws:sqs", "body": "x"}]}, "records of aws:sqs"),
        ({"source": "serverless-plugin-warmup"}, "an object with source"),
        ({"requestContext": {"connectionId": "x"}}, "an object with requestContext"),
        ({"operation": "drop"}, "Unknown operation 'drop'"),
    ],
    ids=["text", "empty", "deep", "list", "null", "object", "sqs", "warmer", "websocket", "operation"],
)
def test_unknown_events_are_function_errors(event: Any, words: str) -> None:
    """The message describes the event."""
    exchange = answer(json_app(), event=b"null" if event is None else event)

    assert exchange.kind == "error"
    assert exchange.error is not None
    assert exchange.error["errorType"] == "Function.UnknownEvent"
    assert words in exchange.error["errorMessage"]


@pytest.mark.parametrize("mode", ["response_stream", "buffered"])
@pytest.mark.parametrize(
    "event",
    [
        {"version": "2.0", "requestContext": {"http": {}}},
        {"version": "2.0", "requestContext": {}},
        {"version": "2.0", "requestContext": {"http": {"method": "GET", "path": "/"}}, "headers": [1]},
        {
            "version": "2.0",
            "requestContext": {"http": {"method": "POST", "path": "/"}},
            "body": "abc",
            "isBase64Encoded": True,
        },
        {"version": "1.0", "requestContext": {}, "resource": "/"},
        {"requestContext": {"elb": {}}},
    ],
    ids=["no method", "no http", "headers", "base64", "rest", "alb"],
)
def test_unreadable_http_events_are_400(event: dict[str, Any], mode: str) -> None:
    """In both modes a malformed HTTP event is a 400 and not a function error."""
    exchange = answer(json_app(), event=event, mode=mode)

    assert exchange.status == 400
    assert envelope(exchange)["type"] == "invalid_request_error"
