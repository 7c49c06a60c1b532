"""How the runtime sends an application's answer to the Runtime API, streamed and buffered."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import pytest

from infra.emulator.event import to_event
from infra.emulator.exchange import Exchange
from tests.lambda_runtime import json_app, runtime

TEXT = (b"content-type", b"text/plain")


def answer(app: Any, *, mode: str = "auto", **event: Any) -> Exchange:
    """Send one request and check that the next ones are served."""

    async def go() -> Exchange:
        async with runtime(app, mode=mode) as bench:
            exchange = await bench.get(**event)
            await bench.still_serves()
            return exchange

    return asyncio.run(go())


def record(exchange: Exchange) -> dict[str, Any]:
    assert exchange.kind == "buffered"
    envelope: dict[str, Any] = json.loads(exchange.body)
    return envelope


def chunked_app(*bodies: Any, headers: tuple[tuple[bytes, bytes], ...] = (TEXT,), pause: float | None = None) -> Any:
    """Return an application that sends each body as a message, after a pause if set, and an empty last message."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for body in bodies:
            if pause is not None:
                await asyncio.sleep(pause)
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    return app


def test_the_prelude_and_the_first_body_message_share_a_chunk() -> None:
    """This applies if the application does not wait between start and body."""
    exchange = answer(json_app())

    assert [chunk.endswith(b'\0\0\0\0\0\0\0\0{"ok":true}') for _, chunk in exchange.chunks] == [True]
    assert exchange.prelude == {"statusCode": 200, "headers": {"content-type": "application/json"}}


def test_the_prelude_is_sent_at_once_if_the_body_is_late() -> None:
    """A client gets status and headers while the application is still preparing the body."""

    async def go() -> None:
        release = asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": [TEXT]})
            await release.wait()
            await send({"type": "http.response.body", "body": b"late"})

        async with runtime(app) as bench:
            exchange = bench.server.invoke(to_event("GET", "/"))
            await asyncio.wait_for(exchange.begun.wait(), 10)
            assert not exchange.finished.is_set()
            release.set()
            await asyncio.wait_for(exchange.finished.wait(), 10)
            assert exchange.body == b"late"
            assert len(exchange.chunks) == 2

    asyncio.run(go())


def test_each_body_message_is_one_chunk() -> None:
    """SSE events are neither split nor merged."""
    bodies = [b"data: %d\n\n" % number for number in range(50)]

    exchange = answer(chunked_app(*bodies, pause=0))

    assert bodies == [chunk for _, chunk in exchange.chunks[1:]]


def test_a_chunk_is_sent_before_the_application_continues() -> None:
    """The chunk arrives while the application waits, so the next token never delays the last one."""

    async def go() -> None:
        gate = asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": [TEXT]})
            await send({"type": "http.response.body", "body": b"one", "more_body": True})
            await gate.wait()
            await send({"type": "http.response.body", "body": b"two"})

        async with runtime(app) as bench:
            exchange = bench.server.invoke(to_event("GET", "/"))
            await asyncio.wait_for(exchange.begun.wait(), 10)
            assert exchange.body == b"one" or await _eventually(lambda: exchange.body == b"one")
            gate.set()
            await asyncio.wait_for(exchange.finished.wait(), 10)

    asyncio.run(go())


async def _eventually(true: Any) -> bool:
    for _ in range(500):
        if true():
            return True
        await asyncio.sleep(0.01)
    return False


@pytest.mark.parametrize("mode", ["auto", "buffered"])
def test_cookies_become_a_list(mode: str) -> None:
    """Set-Cookie headers are never joined."""
    headers = [TEXT, (b"set-cookie", b"a=1; Path=/"), (b"Set-Cookie", b"b=2, c")]

    exchange = answer(json_app(b"x", headers=headers), mode=mode)

    envelope = exchange.prelude if mode == "auto" else record(exchange)
    assert envelope is not None
    assert envelope["cookies"] == ["a=1; Path=/", "b=2, c"]
    assert "set-cookie" not in envelope["headers"]


def test_headers_are_normalised() -> None:
    """Names become lower-case, repeated headers are joined, hop-by-hop headers and content-length are dropped."""
    headers = [
        (b"X-Mixed", b"a"),
        (b"x-mixed", b"b"),
        (b"x-latin", b"caf\xe9"),
        (b"Connection", b"close"),
        (b"Transfer-Encoding", b"chunked"),
        (b"content-length", b"1"),
    ]

    exchange = answer(json_app(b"x", headers=headers))

    assert exchange.prelude == {
        "statusCode": 200,
        "headers": {"x-mixed": "a, b", "x-latin": "café", "content-type": "application/octet-stream"},
    }


def test_latin_1_header_survives_buffering() -> None:
    """Such a header need not be valid UTF-8."""
    exchange = answer(json_app(b"x", headers=[TEXT, (b"x-latin", b"caf\xe9")]), mode="buffered")

    assert record(exchange)["headers"]["x-latin"] == "café"


@pytest.mark.parametrize("mode", ["auto", "buffered"])
@pytest.mark.parametrize("value", [b"a\r\nx-evil: 1", b"a\nb", b"a\0b"])
def test_line_breaks_in_headers_are_refused(mode: str, value: bytes) -> None:
    """A value with a line break or NUL is a 500 and cannot add a header."""
    exchange = answer(json_app(headers=[(b"x-a", value)], body=b"x"), mode=mode)

    assert exchange.status == 500
    assert b"evil" not in bytes(exchange.body)


@pytest.mark.parametrize("body", [b"\0" * 8, b"a\0b", b'{"statusCode":500}' + b"\0" * 8 + b"x", bytes(range(256))])
@pytest.mark.parametrize("mode", ["auto", "buffered"])
def test_binary_bodies_are_not_changed(mode: str, body: bytes) -> None:
    """NULs and JSON in a body are not taken for a prelude."""
    exchange = answer(json_app(body, headers=[(b"content-type", b"application/octet-stream")]), mode=mode)

    if mode == "auto":
        assert exchange.body == body
    else:
        assert record(exchange)["isBase64Encoded"] is True
        assert base64.b64decode(record(exchange)["body"]) == body


@pytest.mark.parametrize("status", [204, 304])
@pytest.mark.parametrize("mode", ["auto", "buffered"])
def test_204_and_304_have_no_body(mode: str, status: int) -> None:
    """They have no default content type either."""
    exchange = answer(json_app(b"ignored", status=status, headers=[]), mode=mode)

    envelope = exchange.prelude if mode == "auto" else record(exchange)
    assert envelope is not None
    assert envelope["statusCode"] == status
    assert "content-type" not in (envelope.get("headers") or {})
    assert (exchange.body == b"") if mode == "auto" else (envelope["body"] == "")


@pytest.mark.parametrize("mode", ["auto", "buffered"])
def test_head_has_no_body(mode: str) -> None:
    """The headers are those of GET."""
    exchange = answer(json_app(), mode=mode, method="HEAD")

    envelope = exchange.prelude if mode == "auto" else record(exchange)
    assert envelope is not None
    assert envelope["headers"]["content-type"] == "application/json"
    assert (exchange.body == b"") if mode == "auto" else (envelope["body"] == "")


def test_an_empty_streamed_answer_gets_a_newline() -> None:
    """Function URLs keep an empty streamed answer open, so a 200 without a body gets one line feed."""
    exchange = answer(json_app(b"", headers=[TEXT]))

    assert exchange.body == b"\n"


def test_redirects_are_passed_through() -> None:
    """The location header is not changed."""
    exchange = answer(json_app(b"see there", status=302, headers=[TEXT, (b"location", b"/there")]))

    assert exchange.prelude is not None
    assert exchange.prelude["headers"]["location"] == "/there"


def test_empty_messages_do_not_end_the_stream() -> None:
    """They are not sent, because an empty chunk ends the stream."""
    exchange = answer(chunked_app(b"a", b"", b"", b"b"))

    assert exchange.body == b"ab"


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
@pytest.mark.parametrize("mode", ["auto", "buffered"])
def test_bodies_may_be_any_buffer_type(mode: str, kind: Any) -> None:
    """The types are bytes, bytearray and memoryview."""
    exchange = answer(chunked_app(kind(b"abc"), kind(b"def")), mode=mode)

    assert (exchange.body == b"abcdef") if mode == "auto" else (record(exchange)["body"] == "abcdef")


def test_large_and_many_small_chunks_arrive_in_order() -> None:
    """The application sends 16 MB in one message and then two thousand small ones."""
    large = bytes(range(256)) * (16 << 12)
    small = [b"%04d" % number for number in range(2000)]

    exchange = answer(chunked_app(large, *small))

    assert exchange.body == large + b"".join(small)


def test_a_buffered_answer_that_is_too_large_is_a_500() -> None:
    """Lambda would replace answers over 6 MiB; the runtime's own error names the limit."""
    exchange = answer(json_app(b"x" * (6 << 20), headers=[TEXT]), mode="buffered")

    assert exchange.status == 500
    assert json.loads(record(exchange)["body"])["error"]["code"] == "response_too_large"


@pytest.mark.parametrize("mode", ["auto", "buffered"])
def test_utf_8_text_is_not_escaped(mode: str) -> None:
    """This includes the JSON of a buffered answer."""
    text = "Zürich 東京 🎉"
    exchange = answer(json_app(text.encode(), headers=[TEXT]), mode=mode)

    assert (exchange.body.decode() == text) if mode == "auto" else (record(exchange)["body"] == text)
    assert "東京".encode() in exchange.body


def test_background_tasks_end_before_the_next_event() -> None:
    """They run after the stream has ended and before /next is called."""
    finished: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await json_app()(scope, receive, send)
        await asyncio.sleep(0.05)
        finished.append(scope["path"])

    async def go() -> None:
        async with runtime(app) as bench:
            first = await bench.get("/first")
            assert finished == []
            assert first.body == b'{"ok":true}'
            await bench.get("/second")
            assert finished[0] == "/first"

    asyncio.run(go())


def test_disconnect_is_received_after_the_last_byte() -> None:
    """receive() returns the body once, then http.disconnect after the answer was sent."""
    received: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        received.append(await receive())
        later = asyncio.ensure_future(receive())
        await asyncio.sleep(0.02)
        received.append(later.done())
        await json_app()(scope, receive, send)
        received.append(await later)

    answer(app, method="POST", body=b"hello", headers=[("content-type", "text/plain")])

    assert received == [
        {"type": "http.request", "body": b"hello", "more_body": False},
        False,
        {"type": "http.disconnect"},
    ]


def test_starlette_applications_are_streamed() -> None:
    """Starlette's responses, background tasks and disconnect handling work with the runtime."""
    from starlette.applications import Starlette
    from starlette.background import BackgroundTask
    from starlette.responses import StreamingResponse
    from starlette.routing import Route

    ran: list[str] = []

    async def endpoint(request: Any) -> StreamingResponse:
        async def bodies() -> Any:
            for number in range(3):
                yield f"data: {number}\n\n"
                await asyncio.sleep(0)

        task = BackgroundTask(lambda: ran.append(request.url.path))
        return StreamingResponse(bodies(), media_type="text/event-stream", background=task)

    exchange = answer(Starlette(routes=[Route("/{name:path}", endpoint)]), path="/events")

    assert exchange.body == b"data: 0\n\ndata: 1\n\ndata: 2\n\n"
    assert ran[0] == "/events"
