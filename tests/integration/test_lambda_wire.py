"""The Runtime API misbehaves, is slow or is in pieces: the runtime goes on, or ends when it must."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from handlers.http import platform
from infra.emulator.event import to_event
from infra.emulator.exchange import Behaviour, Exchange
from tests.lambda_runtime import json_app, runtime

TEXT = (b"content-type", b"text/plain")


async def endless(scope: Any, receive: Any, send: Any) -> None:
    """Streams until nobody takes it."""
    await send({"type": "http.response.start", "status": 200, "headers": [TEXT]})
    while True:
        await send({"type": "http.response.body", "body": b"x" * 1000, "more_body": True})
        await asyncio.sleep(0.001)


def answer(app: Any, behaviour: Behaviour, *, mode: str = "auto") -> Exchange:
    async def go() -> Exchange:
        async with runtime(app, mode=mode) as bench:
            exchange = await bench.get(behaviour=behaviour)
            await bench.still_serves()
            return exchange

    return asyncio.run(go())


@pytest.mark.parametrize(
    "behaviour", [Behaviour(reject_after=5000), Behaviour(hang_up_after=5)], ids=["413", "hang-up"]
)
def test_the_application_is_told_when_lambda_takes_no_more(behaviour: Behaviour) -> None:
    """A 413 or a hang-up during the stream is an OSError in send and http.disconnect in receive, then life goes on."""
    raised: list[BaseException] = []
    heard: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        try:
            await endless(scope, receive, send)
        except OSError as error:
            raised.append(error)
            heard.append(await receive())

    answer(app, behaviour)

    assert [type(error).__name__ for error in raised] == ["Disconnected"]
    assert heard == [{"type": "http.disconnect"}]


@pytest.mark.parametrize("mode", ["auto", "buffered"])
@pytest.mark.parametrize("status", [400, 403, 410, 413, 500])
def test_refused_answers_are_logged_and_the_next_event_served(
    mode: str, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    """There is nothing to mend when Lambda refuses an answer; the loop goes on."""
    answer(json_app(), Behaviour(status=status), mode=mode)

    assert str(status) in caplog.text


@pytest.mark.parametrize(
    "behaviour",
    [
        Behaviour(segment=1),
        Behaviour(split_reply=True),
        Behaviour(delay_s=0.1),
        Behaviour(close_after_next=True),
        Behaviour(close_after_reply=True),
        Behaviour(close_after_next=True, close_after_reply=True, segment=7, split_reply=True),
    ],
    ids=["bytewise next", "bytewise reply", "late reply", "next closes", "response closes", "all"],
)
@pytest.mark.parametrize("mode", ["auto", "buffered"])
def test_connections_in_any_condition(mode: str, behaviour: Behaviour) -> None:
    """Replies in pieces and connections that are closed between calls change nothing."""
    assert answer(json_app(), behaviour, mode=mode).status == 200


def test_large_events_arrive_chunked_and_whole() -> None:
    """Over 2 KiB /next is chunked; 6 MB of body arrive as they were sent."""
    received: list[bytes] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        received.append((await receive())["body"])
        await json_app()(scope, receive, send)

    body = bytes(range(256)) * (4 << 10) + "ünï".encode()

    async def go() -> None:
        async with runtime(app) as bench:
            for behaviour in (Behaviour(), Behaviour(segment=5000)):
                await bench.get("/", method="POST", body=body, behaviour=behaviour)

    asyncio.run(go())

    assert received == [body, body]


@pytest.mark.parametrize("status", [403, 500, 503])
def test_the_process_ends_when_there_are_no_more_events(status: int) -> None:
    """A 403 or 5xx to /next means that this process is not wanted any more: it exits with 1."""

    async def go() -> None:
        async with runtime(json_app()) as bench:
            await bench.still_serves()
            bench.server.invoke(to_event("GET", "/"), behaviour=Behaviour(next_status=status))
            assert await bench.ended() == 1

    asyncio.run(go())


def test_an_unreachable_runtime_api_ends_the_process() -> None:
    """No connection is an exit status, not a traceback."""
    from adapters.aws_lambda.runtime import Runtime

    assert asyncio.run(Runtime(json_app(), {"AWS_LAMBDA_RUNTIME_API": "127.0.0.1:1"}).run()) == 1


def test_a_slow_reader_slows_the_application_down() -> None:
    """Backpressure: what Lambda has not taken is not piled up in the process."""
    sent = 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal sent
        await send({"type": "http.response.start", "status": 200, "headers": [TEXT]})
        for _ in range(500):
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
            sent += 65536
        await send({"type": "http.response.body", "body": b""})

    async def go() -> None:
        async with runtime(app) as bench:
            exchange = bench.server.invoke(to_event("GET", "/"), behaviour=Behaviour(pause_s=0.002))
            ahead = 0
            while not exchange.finished.is_set():
                ahead = max(ahead, sent - len(exchange.body))
                await asyncio.sleep(0.005)
            assert len(exchange.body) == 500 * 65536
            assert ahead < 12 << 20  # the kernel's socket buffers on both sides, and asyncio's 64 KiB

    asyncio.run(go())


def test_several_loops_in_one_process_share_nothing() -> None:
    """With AWS_LAMBDA_MAX_CONCURRENCY, streams run interleaved and each event gets its own answer and state."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [TEXT]})
        for number in range(5):
            await send({"type": "http.response.body", "body": f"{scope['path']}{number} ".encode(), "more_body": True})
            together.append(scope["path"])
            await asyncio.sleep(0.01)
        await send({"type": "http.response.body", "body": b""})

    together: list[str] = []

    async def go() -> None:
        async with runtime(app, concurrency=3) as bench:
            exchanges = [bench.server.invoke(to_event("GET", f"/{name}")) for name in "abcdef"]
            for exchange, name in zip(exchanges, "abcdef", strict=True):
                await asyncio.wait_for(exchange.finished.wait(), 10)
                assert exchange.body == b"".join(f"/{name}{number} ".encode() for number in range(5))
            await bench.still_serves()

    asyncio.run(go())

    assert set(together[:3]) == {"/a", "/b", "/c"}


def test_a_trace_does_not_outlive_its_event() -> None:
    """X-Ray's trace id is in the log lines of its own invocation only."""
    traces: list[str | None] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        traces.append((platform.get() or {}).get("xray_trace_id"))
        await json_app()(scope, receive, send)

    async def go() -> None:
        async with runtime(app) as bench:
            headers = {"Lambda-Runtime-Trace-Id": "Root=1-2-3;Parent=4;Sampled=0"}
            await bench.invoke(to_event("GET", "/"), headers=headers)
            await bench.invoke(to_event("GET", "/"))

    asyncio.run(go())

    assert traces == ["1-2-3", None]


def test_a_kept_connection_that_dies_under_a_request_is_replaced() -> None:
    """A keep-alive connection may be closed in the moment it is used again: the request is sent once more, on a new
    one; a new connection that dies is the end."""
    from adapters.aws_lambda.runtime_api import RuntimeAPI, RuntimeGone

    served: list[int] = []  # requests seen, by connection

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.append(0)
        mine = len(served) - 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                served[mine] += 1
                if served[mine] == 2 or dead:
                    return
                writer.write(b"HTTP/1.1 200 OK\r\nLambda-Runtime-Aws-Request-Id: a\r\nContent-Length: 2\r\n\r\n{}")
                if head.startswith(b"POST"):
                    await reader.readexactly(2)
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()

    dead: list[bool] = []

    async def go() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            api = RuntimeAPI(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
            for _ in range(2):
                invocation = await api.next()
                assert await api.respond(invocation, b"{}") == 200
            dead.append(True)
            api.close()
            with pytest.raises(RuntimeGone):
                await api.next()

    asyncio.run(go())

    # /next and /response each: one connection that died at its second request, one that took that request's place.
    assert served == [2, 2, 1, 1, 1]


async def finish(send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"done"})


def test_an_answer_takes_its_connection_at_its_first_byte() -> None:
    """A whole completion may take minutes before it; a peer with an idle limit has hung up by then."""
    server: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await server[0].close_resting()
        await finish(send)

    async def go() -> None:
        async with runtime(app) as bench:
            server.append(bench.server)
            await bench.still_serves()  # there is a connection to hang up
            for _ in range(2):
                exchange = await bench.get("/slow")
                assert (exchange.error, exchange.kind, bytes(exchange.body)) == (None, "stream", b"done")
            await bench.still_serves()

    asyncio.run(go())


@pytest.mark.parametrize("mode", ["response_stream", "buffered"])
def test_a_reply_that_never_comes_is_not_awaited_for_ever(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lambda's reply to an answer is lost: after the deadline the next event is served."""
    from adapters.aws_lambda import runtime_api

    monkeypatch.setattr(runtime_api, "REPLY_GRACE_S", 0.0)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await finish(send)

    async def go() -> None:
        async with runtime(app, mode=mode) as bench:
            await bench.get("/lost", behaviour=Behaviour(silent=True), timeout_s=0.5)
            await bench.still_serves()

    asyncio.run(go())


def test_a_hiccup_of_next_ends_no_other_answer() -> None:
    """With several loops one failed /next is asked again; streams under way go on."""
    begun, released = asyncio.Event(), asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        begun.set()
        await released.wait()
        await finish(send)

    async def go() -> None:
        async with runtime(app, concurrency=2) as bench:
            streaming = asyncio.ensure_future(bench.get("/slow"))
            await begun.wait()
            refused = await bench.get("/", behaviour=Behaviour(next_status=500))
            assert refused.error is not None
            await bench.still_serves()  # by the loop that was refused: the other one is busy
            released.set()
            assert bytes((await streaming).body) == b"done"

    asyncio.run(go())


def test_loops_that_get_no_more_events_let_the_others_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    """After its retries a loop ends; the process ends when the last answer is out, with status 1."""
    from adapters.aws_lambda import runtime as loop

    monkeypatch.setattr(loop, "RETRIES_S", (0.0,))
    begun, released = asyncio.Event(), asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        begun.set()
        await released.wait()
        await finish(send)

    async def go() -> None:
        async with runtime(app, concurrency=2) as bench:
            streaming = asyncio.ensure_future(bench.get("/slow"))
            await begun.wait()
            for _ in range(2):
                await bench.get("/", behaviour=Behaviour(next_status=500))
            for _ in range(2):  # for the loop that is busy now
                bench.server.invoke(to_event("GET", "/"), behaviour=Behaviour(next_status=500))
            released.set()
            assert bytes((await streaming).body) == b"done"
            assert await bench.ended() == 1

    asyncio.run(go())
