"""What the runtime makes of an application's answer, streamed and buffered, on the wire of the Runtime API."""

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
    """One request, then two that show that all is well."""

    async def go() -> Exchange:
        async with runtime(app, mode=mode) as bench:
            exchange = await bench.get(**event)
            await bench.still_serves()
            return exchange

    return asyncio.run(go())


def record(exchange: Exchange) -> dict[str, Any]:
    assert exchange.kind == "buffered"
    found: dict[str, Any] = json.loads(exchange.body)
    return found


def chunked_app(*bodies: Any, headers: tuple[tuple[bytes, bytes], ...] = (TEXT,), pause: float | None = None) -> Any:
    """Sends each body as a message of its own, after a pause if there is one, and an empty last one."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for body in bodies:
            if pause is not None:
                await asyncio.sleep(pause)
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    return app


def test_prelude_and_first_body_message_share_a_chunk() -> None:
    """An application that does not wait between start and body costs one chunk, prelude included."""
    exchange = answer(json_app())

    assert [chunk.endswith(b'\0\0\0\0\0\0\0\0{"ok":true}') for _, chunk in exchange.chunks] == [True]
    assert exchange.prelude == {"statusCode": 200, "headers": {"content-type": "application/json"}}


def test_prelude_leaves_at_once_when_the_body_is_late() -> None:
    """A client sees status and headers while the application still works on the body."""

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
    """SSE events are neither split nor merged on their way."""
    bodies = [b"data: %d\n\n" % number for number in range(50)]

    exchange = answer(chunked_app(*bodies, pause=0))

    assert bodies == [chunk for _, chunk in exchange.chunks[1:]]


def test_a_chunk_is_out_before_the_application_goes_on() -> None:
    """Work for the next token never delays the last one: the chunk arrives while the application is held up."""

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
def test_cookies_go_where_lambda_wants_them(mode: str) -> None:
    """Several Set-Cookie headers become the cookies list, never a joined header."""
    headers = [TEXT, (b"set-cookie", b"a=1; Path=/"), (b"Set-Cookie", b"b=2, c")]

    exchange = answer(json_app(b"x", headers=headers), mode=mode)

    told = exchange.prelude if mode == "auto" else record(exchange)
    assert told is not None
    assert told["cookies"] == ["a=1; Path=/", "b=2, c"]
    assert "set-cookie" not in told["headers"]


def test_header_shapes() -> None:
    """Names are lower-case, repeated headers joined, latin-1 kept, hop-by-hop and content-length dropped."""
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
    """A header that is not UTF-8 does not break a buffered answer."""
    exchange = answer(json_app(b"x", headers=[TEXT, (b"x-latin", b"caf\xe9")]), mode="buffered")

    assert record(exchange)["headers"]["x-latin"] == "café"


@pytest.mark.parametrize("mode", ["auto", "buffered"])
@pytest.mark.parametrize("value", [b"a\r\nx-evil: 1", b"a\nb", b"a\0b"])
def test_line_breaks_in_headers_are_refused(mode: str, value: bytes) -> None:
    """A header value with a line break or NUL is a 500 of ours, never a header of its own."""
    exchange = answer(json_app(headers=[(b"x-a", value)], body=b"x"), mode=mode)

    assert exchange.status == 500
    assert b"evil" not in bytes(exchange.body)


@pytest.mark.parametrize("body", [b"\0" * 8, b"a\0b", b'{"statusCode":500}' + b"\0" * 8 + b"x", bytes(range(256))])
@pytest.mark.parametrize("mode", ["auto", "buffered"])
def test_binary_bodies_arrive_whole(mode: str, body: bytes) -> None:
    """NULs and JSON in a body are body."""
    exchange = answer(json_app(body, headers=[(b"content-type", b"application/octet-stream")]), mode=mode)

    if mode == "auto":
        assert exchange.body == body
    else:
        assert record(exchange)["isBase64Encoded"] is True
        assert base64.b64decode(record(exchange)["body"]) == body


@pytest.mark.parametrize("status", [204, 304])
@pytest.mark.parametrize("mode", ["auto", "buffered"])
def test_statuses_without_a_body(mode: str, status: int) -> None:
    """204 and 304 carry neither body nor a content type that nobody set."""
    exchange = answer(json_app(b"ignored", status=status, headers=[]), mode=mode)

    told = exchange.prelude if mode == "auto" else record(exchange)
    assert told is not None
    assert told["statusCode"] == status
    assert "content-type" not in (told.get("headers") or {})
    assert (exchange.body == b"") if mode == "auto" else (told["body"] == "")


@pytest.mark.parametrize("mode", ["auto", "buffered"])
def test_head_has_no_body(mode: str) -> None:
    """HEAD keeps the headers and loses the body."""
    exchange = answer(json_app(), mode=mode, method="HEAD")

    told = exchange.prelude if mode == "auto" else record(exchange)
    assert told is not None
    assert told["headers"]["content-type"] == "application/json"
    assert (exchange.body == b"") if mode == "auto" else (told["body"] == "")


def test_empty_streamed_answer_gets_a_newline() -> None:
    """Function URLs hold empty streamed answers open; a 200 without a body carries one line feed."""
    exchange = answer(json_app(b"", headers=[TEXT]))

    assert exchange.body == b"\n"


def test_redirect_passes() -> None:
    """A redirect is an answer like any other."""
    exchange = answer(json_app(b"see there", status=302, headers=[TEXT, (b"location", b"/there")]))

    assert exchange.prelude is not None
    assert exchange.prelude["headers"]["location"] == "/there"


def test_empty_messages_do_not_end_the_stream() -> None:
    """A body message without bytes is not a chunk, for an empty chunk is the end."""
    exchange = answer(chunked_app(b"a", b"", b"", b"b"))

    assert exchange.body == b"ab"


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
@pytest.mark.parametrize("mode", ["auto", "buffered"])
def test_bodies_of_any_buffer_type(mode: str, kind: Any) -> None:
    """bytes, bytearray and memoryview are all bytes."""
    exchange = answer(chunked_app(kind(b"abc"), kind(b"def")), mode=mode)

    assert (exchange.body == b"abcdef") if mode == "auto" else (record(exchange)["body"] == "abcdef")


def test_a_large_chunk_and_many_small_ones() -> None:
    """16 MB in one message and two thousand tiny ones arrive whole and in order."""
    large = bytes(range(256)) * (16 << 12)
    small = [b"%04d" % number for number in range(2000)]

    exchange = answer(chunked_app(large, *small))

    assert exchange.body == large + b"".join(small)


def test_a_buffered_answer_that_is_too_large_is_our_own_500() -> None:
    """Over 6 MiB Lambda would answer for us; we say what the limit is."""
    exchange = answer(json_app(b"x" * (6 << 20), headers=[TEXT]), mode="buffered")

    assert exchange.status == 500
    assert json.loads(record(exchange)["body"])["error"]["code"] == "response_too_large"


@pytest.mark.parametrize("mode", ["auto", "buffered"])
def test_unicode_text_is_text(mode: str) -> None:
    """UTF-8 passes as it is, unescaped in a buffered answer."""
    text = "Zürich 東京 🎉"
    exchange = answer(json_app(text.encode(), headers=[TEXT]), mode=mode)

    assert (exchange.body.decode() == text) if mode == "auto" else (record(exchange)["body"] == text)
    assert "東京".encode() in exchange.body


def test_work_after_the_last_byte_is_finished_before_the_next_event() -> None:
    """Background tasks run after the stream has ended and before /next is called."""
    done: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await json_app()(scope, receive, send)
        await asyncio.sleep(0.05)
        done.append(scope["path"])

    async def go() -> None:
        async with runtime(app) as bench:
            first = await bench.get("/first")
            assert done == []
            assert first.body == b'{"ok":true}'
            await bench.get("/second")
            assert done[0] == "/first"

    asyncio.run(go())


def test_the_application_hears_of_the_end_only_after_it() -> None:
    """receive() gives the body once, and http.disconnect not before the last byte is out."""
    heard: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        heard.append(await receive())
        later = asyncio.ensure_future(receive())
        await asyncio.sleep(0.02)
        heard.append(later.done())
        await json_app()(scope, receive, send)
        heard.append(await later)

    answer(app, method="POST", body=b"hello", headers=[("content-type", "text/plain")])

    assert heard == [
        {"type": "http.request", "body": b"hello", "more_body": False},
        False,
        {"type": "http.disconnect"},
    ]


def test_streaming_under_starlette() -> None:
    """Starlette's own responses, background tasks and disconnect handling work with the cycle."""
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
