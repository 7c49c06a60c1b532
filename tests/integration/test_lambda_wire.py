"""The runtime with a Runtime API that fails, is slow or closes connections."""

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
    """Stream until sending fails."""
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
def test_the_application_gets_an_error_when_lambda_stops_reading(behaviour: Behaviour) -> None:
    """A 413 or a closed connection raises OSError in send and gives http.disconnect in receive."""
    raised: list[BaseException] = []
    received_messages: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        try:
            await endless(scope, receive, send)
        except OSError as error:
            raised.append(error)
            received_messages.append(await receive())

    answer(app, behaviour)

    assert [type(error).__name__ for error in raised] == ["Disconnected"]
    assert received_messages == [{"type": "http.disconnect"}]


@pytest.mark.parametrize("mode", ["auto", "buffered"])
@pytest.mark.parametrize("status", [400, 403, 410, 413, 500])
def test_refused_answers_are_logged(mode: str, status: int, caplog: pytest.LogCaptureFixture) -> None:
    """The runtime cannot fix an answer that Lambda refuses. It serves the next event."""
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
def test_split_replies_and_closed_connections_are_handled(mode: str, behaviour: Behaviour) -> None:
    """Replies may arrive in pieces, and connections may close between calls."""
    assert answer(json_app(), behaviour, mode=mode).status == 200


def test_large_events_arrive_complete() -> None:
    """/next sends events over 2 KiB chunked."""
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
def test_a_refused_next_ends_the_process(status: int) -> None:
    """After a 403 or 5xx of /next it exits with status 1."""

    async def go() -> None:
        async with runtime(json_app()) as bench:
            await bench.still_serves()
            bench.server.invoke(to_event("GET", "/"), behaviour=Behaviour(next_status=status))
            assert await bench.ended() == 1

    asyncio.run(go())


def test_an_unreachable_runtime_api_ends_the_process() -> None:
    """It exits with status 1 and no traceback."""
    from adapters.aws_lambda.runtime import Runtime

    assert asyncio.run(Runtime(json_app(), {"AWS_LAMBDA_RUNTIME_API": "127.0.0.1:1"}).run()) == 1


def test_a_slow_reader_slows_down_the_application() -> None:
    """Data that Lambda has not read does not pile up in the process."""
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


def test_several_loops_run_in_one_process() -> None:
    """With AWS_LAMBDA_MAX_CONCURRENCY streams run interleaved, and each event gets its own answer."""

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


def test_a_trace_id_belongs_to_one_event() -> None:
    """X-Ray's trace id is only in the log lines of its invocation."""
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


def test_a_closed_keep_alive_connection_is_replaced() -> None:
    """The peer may close a connection just when it is used again. The request is then retried once on a new
    connection; if that closes, too, RuntimeGone is raised."""
    from adapters.aws_lambda.runtime_api import RuntimeAPI, RuntimeGone

    served: list[int] = []  # requests seen, by connection

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.append(0)
        index = len(served) - 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                served[index] += 1
                if served[index] == 2 or dead:
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

    # /next and /response each have one connection that closed at its second request, and one that repeated it.
    assert served == [2, 2, 1, 1, 1]


async def finish(send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"done"})


def test_an_answer_connects_at_its_first_byte() -> None:
    """A completion may take minutes until then, and the peer may have closed an idle connection."""
    server: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await server[0].close_resting()
        await finish(send)

    async def go() -> None:
        async with runtime(app) as bench:
            server.append(bench.server)
            await bench.still_serves()  # leaves an idle connection to close
            for _ in range(2):
                exchange = await bench.get("/slow")
                assert (exchange.error, exchange.kind, bytes(exchange.body)) == (None, "stream", b"done")
            await bench.still_serves()

    asyncio.run(go())


@pytest.mark.parametrize("mode", ["response_stream", "buffered"])
def test_waiting_for_a_lost_reply_has_a_limit(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """If Lambda's reply to an answer is lost, the next event is served after the deadline."""
    from adapters.aws_lambda import runtime_api

    monkeypatch.setattr(runtime_api, "REPLY_GRACE_S", 0.0)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await finish(send)

    async def go() -> None:
        async with runtime(app, mode=mode) as bench:
            await bench.get("/lost", behaviour=Behaviour(silent=True), timeout_s=0.5)
            await bench.still_serves()

    asyncio.run(go())


@pytest.mark.parametrize("persists", [False, True])
def test_a_failing_next_ends_no_running_answer(monkeypatch: pytest.MonkeyPatch, persists: bool) -> None:
    """One loop retries /next while another streams. If /next keeps failing, the process ends after the answer."""
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
            for _ in range(2 if persists else 1):
                refused = await bench.get("/", behaviour=Behaviour(next_status=500))
                assert refused.error is not None
            if persists:
                for _ in range(2):  # for the loop that is still streaming
                    bench.server.invoke(to_event("GET", "/"), behaviour=Behaviour(next_status=500))
            else:
                await bench.still_serves()  # the loop that was refused, because the other one is streaming
            released.set()
            assert bytes((await streaming).body) == b"done"
            if persists:
                assert await bench.ended() == 1

    asyncio.run(go())
