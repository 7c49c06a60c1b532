"""Limits of connections before any key is checked: size, time and number of heads and bodies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest

from adapters.serving import bodies
from adapters.serving.server import Limits
from core.settings import keys
from infra.bench.wire import KEY, attack
from tests.fakes import ScriptedEngine, fake_service
from tests.serving import serving

PATIENCE_S = 30.0
SHORT = Limits(head_s=0.5, body_window_s=0.5)


@contextmanager
def connected(address: str) -> Iterator[socket.socket]:
    url = urlsplit(address)
    with socket.create_connection((url.hostname, url.port), timeout=PATIENCE_S) as connection:
        yield connection


def received(connection: socket.socket) -> bytes:
    """Return all bytes until the server closes the connection."""
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def answer(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Read one answer, which has a content-length."""
    stream = connection.makefile("rb")
    status = int(stream.readline().split()[1])
    headers = {}
    while (line := stream.readline().strip()) != b"":
        name, _, value = line.decode().partition(":")
        headers[name.lower()] = value.strip()
    return status, headers, stream.read(int(headers["content-length"]))


def head(*lines: str, method: str = "GET", path: str = "/health") -> bytes:
    return "\r\n".join((f"{method} {path} HTTP/1.1", "host: localhost", *lines, "", "")).encode()


def refused(response: tuple[int, dict[str, str], bytes]) -> tuple[int, str]:
    status, headers, body = response
    assert headers["content-type"] == "application/json"
    return status, json.loads(body)["error"]["code"]


def test_the_size_of_a_head_is_limited() -> None:
    """64 KiB are accepted, one byte more is a 431. An endless head is not read to memory."""
    with serving(fake_service().service) as address:
        rest = len(head("x-a: ")) - len("GET  HTTP/1.1\r\n") - len("\r\n")
        with connected(address) as connection:
            connection.sendall(head(f"x-a: {'a' * (65536 - rest)}"))
            assert answer(connection)[0] == 200
        with connected(address) as connection:
            connection.sendall(head(f"x-a: {'a' * (65536 - rest + 1)}"))
            assert refused(answer(connection)) == (431, "request_header_fields_too_large")
            assert received(connection) == b""
        with connected(address) as connection:
            assert sent(connection, b"GET /health HTTP/1.1\r\nx-a: ", 50_000_000) < 50_000_000


def sent(connection: socket.socket, opening: bytes, most: int) -> int:
    """Return how much of an endless head the server read before it closed the connection."""
    connection.sendall(opening)
    total = 0
    try:
        while total < most:
            total += connection.send(b"a" * 100_000)
    except ConnectionError:
        pass
    return total


def test_the_number_of_headers_is_limited() -> None:
    """A hundred are accepted, one more is a 431."""
    with serving(fake_service().service) as address:
        for count, status in ((99, 200), (100, 431)):  # plus the host header
            with connected(address) as connection:
                connection.sendall(head(*(f"x-{number}: a" for number in range(count))))
                assert answer(connection)[0] == status


def test_the_time_of_a_head_is_limited() -> None:
    """An incomplete head is a 408, also the second of a connection. An idle connection is closed without an answer."""
    with serving(fake_service().service, SHORT) as address:
        with connected(address) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\n")
            assert refused(answer(connection)) == (408, "request_timeout")
            assert received(connection) == b""
        with connected(address) as connection:
            connection.sendall(head())
            assert answer(connection)[0] == 200
            connection.sendall(b"GET /hea")
            assert refused(answer(connection)) == (408, "request_timeout")
        with connected(address) as connection:
            assert received(connection) == b""
        with connected(address) as connection:
            connection.sendall(head() + b"\r\n")  # line ends before a request are allowed and are not a request
            assert answer(connection)[0] == 200
            connection.sendall(b"\r\n")
            assert received(connection) == b""


def test_the_rate_of_a_body_is_limited() -> None:
    """A slow body is a 408. A body at the minimum rate may take longer than the window."""
    with serving(
        fake_service(api_keys=keys("use")).service, Limits(body_bytes_per_s=100, body_window_s=1.5)
    ) as address:
        opening = head(
            *("content-type: application/json", "content-length: 100000", "x-api-key: use"),
            method="POST",
            path="/v1/chat/completions",
        )
        with connected(address) as connection:
            connection.sendall(opening + b" ")
            assert refused(answer(connection)) == (408, "request_timeout")
        with connected(address) as connection:
            body = b'{"messages": [{"role": "user", "content": "hi"}]}'
            connection.sendall(opening)
            rest = b" " * (100_000 - len(body)) + body
            waited = connection.gettimeout()
            for at in range(0, len(rest), 4000):  # over 2.5 s, which is more than a window
                connection.sendall(rest[at : at + 4000])
                connection.settimeout(0.1)
                with pytest.raises(TimeoutError):
                    connection.recv(1, socket.MSG_PEEK)
                connection.settimeout(waited)
                if at + 8000 >= len(rest):
                    connection.sendall(rest[at + 4000 :])
                    break
            assert answer(connection)[0] == 200


@pytest.mark.parametrize(
    ("lines", "path", "expected"),
    [
        (("content-type: application/json",), "/v1/chat/completions", (401, "invalid_api_key")),
        (("content-type: text/plain", "x-api-key: use"), "/v1/chat/completions", (415, "unsupported_media_type")),
        (("content-type: application/json", "x-api-key: use"), "/load", (403, "forbidden")),
        (("content-type: application/json", "x-api-key: use"), "/nowhere", (404, "not_found")),
        (("content-type: application/json", "x-api-key: use"), "/health", (405, "method_not_allowed")),
    ],
)
def test_refusals_by_the_head_come_before_the_body(
    lines: tuple[str, ...], path: str, expected: tuple[int, str]
) -> None:
    """The server has not received the body yet. The connection can be used for the next request."""
    with serving(fake_service(api_keys=keys("use")).service) as address, connected(address) as connection:
        connection.sendall(head("content-length: 5", *lines, method="POST", path=path))
        assert refused(answer(connection)) == expected
        connection.sendall(b"12345" + head())
        assert answer(connection)[0] == 200


def test_expect_100_continue_is_refused_without_the_body() -> None:
    """The refusal replaces "100 Continue", and the connection is closed."""
    with serving(fake_service(api_keys=keys("use")).service) as address, connected(address) as connection:
        lines = ("content-type: application/json", "content-length: 5", "expect: 100-continue")
        connection.sendall(head(*lines, method="POST", path="/v1/extract"))
        assert refused(answer(connection))[0] == 401
        assert received(connection) == b""


def test_bodies_of_all_requests_share_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond it, a large body is a 429 before it is read. Small ones are served; a finished request frees its share."""
    monkeypatch.setattr(bodies, "WAIT_S", 0.0)
    limit = 2 * bodies.UNCOUNTED_BYTES
    most = bodies.BUDGET_FACTOR * limit // (limit - bodies.UNCOUNTED_BYTES)
    large = head(
        *("content-type: application/json", f"content-length: {limit}", "expect: 100-continue"),
        method="POST",
        path="/v1/chat/completions",
    )
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}]}).encode()
    with serving(fake_service(max_body_bytes=limit).service) as address, contextlib.ExitStack() as stack:
        # 1) As many as fit are invited to send.
        holding = [stack.enter_context(connected(address)) for _ in range(most)]
        for connection in holding:
            connection.sendall(large)
            assert connection.recv(100).startswith(b"HTTP/1.1 100")
        # 2) The next one is refused, with Expect: 100-continue and without.
        with connected(address) as connection:
            connection.sendall(large)
            assert answered_busy(connection) > 0
            assert received(connection) == b""
        with connected(address) as connection:
            connection.sendall(large.replace(b"expect: 100-continue\r\n", b"") + b" " * limit)
            assert answered_busy(connection) > 0
            # 3) A small one is served, on the same connection too.
            lines = ("content-type: application/json", f"content-length: {len(body)}")
            connection.sendall(head(*lines, method="POST", path="/v1/chat/completions") + body)
            assert answer(connection)[0] == 200
        # 4) A finished request frees its share, perhaps shortly after its answer has arrived.
        monkeypatch.setattr(bodies, "WAIT_S", PATIENCE_S)
        holding[0].sendall(b" " * (limit - len(body)) + body)
        assert answer(holding[0])[0] == 200
        holding[0].sendall(large)
        assert holding[0].recv(100).startswith(b"HTTP/1.1 100")


def answered_busy(connection: socket.socket) -> int:
    """Read a 429 and return its retry-after."""
    status, headers, body = answer(connection)
    assert (status, json.loads(body)["error"]["code"]) == (429, "busy")
    return int(headers["retry-after"])


def test_the_body_of_a_refused_request_has_a_time_limit() -> None:
    """The limit applies after the 401, too."""
    with serving(fake_service(api_keys=keys("use")).service, SHORT) as address, connected(address) as connection:
        lines = ("content-type: application/json", "content-length: 5")
        connection.sendall(head(*lines, method="POST", path="/v1/extract"))
        assert answer(connection)[0] == 401
        assert received(connection) == b""
    with serving(fake_service(api_keys=keys("use")).service, SHORT) as address, connected(address) as connection:
        connection.sendall(head(*lines, method="POST", path="/v1/extract") + b"123")
        assert answer(connection)[0] == 401
        connection.sendall(b"45")  # the body is complete, and no request follows
        assert received(connection) == b""


def test_answers_have_no_time_limit() -> None:
    """The limits apply to requests only, even if a line end follows the request."""
    fake = fake_service(ScriptedEngine(pieces=("a ",) * 20, delay=0.1))
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}], "stream": True}).encode()
    with serving(fake.service, SHORT) as address, connected(address) as connection:
        lines = ("content-type: application/json", f"content-length: {len(body)}", "connection: close")
        connection.sendall(head(*lines, method="POST", path="/v1/chat/completions") + body)
        connection.sendall(b"\r\n")
        assert b"data: [DONE]" in received(connection)


def test_over_the_limit_the_oldest_idle_connection_is_closed() -> None:
    """Running answers are never closed."""
    fake = fake_service(ScriptedEngine(pieces=("a ",) * 10, delay=0.1))
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}], "stream": True}).encode()
    lines = ("content-type: application/json", f"content-length: {len(body)}", "connection: close")
    with serving(fake.service, Limits(connections=3)) as address, connected(address) as running:
        running.sendall(head(*lines, method="POST", path="/v1/chat/completions") + body)
        begun = running.recv(1)
        with connected(address) as oldest, connected(address) as newer, connected(address) as newest:
            assert ended(oldest)
            for connection in (newer, newest):
                connection.sendall(head())
                assert answer(connection)[0] == 200
            assert b"data: [DONE]" in begun + received(running)


def test_a_client_that_is_still_sending_gets_its_refusal() -> None:
    """After a 408 the server continues to read, because a reset would discard the response."""
    with serving(fake_service().service, SHORT) as address, connected(address) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        connection.recv(1, socket.MSG_PEEK)
        for _ in range(3):  # a closed socket answers the first byte with a reset, and sending the next one raises
            connection.sendall(b"x")
            connection.recv(1, socket.MSG_PEEK)
        assert refused(answer(connection)) == (408, "request_timeout")
        assert received(connection) == b""


def test_a_refused_client_cannot_keep_its_connection() -> None:
    """A client that continues to send is disconnected after a time or after 1 MiB."""
    with serving(fake_service().service, SHORT) as address:
        for size in (1, 100_000):
            with connected(address) as connection:
                connection.sendall(b"GET /health HTTP/1.1\r\n")
                assert refused(answer(connection)) == (408, "request_timeout")
                with pytest.raises(ConnectionError):
                    send_until_closed(connection, b"x" * size)


def send_until_closed(connection: socket.socket, data: bytes) -> None:
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        connection.sendall(data)
        time.sleep(0.02)


def ended(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


def test_half_open_requests_are_closed_while_others_are_served() -> None:
    """This is a small `python -m infra.bench.wire`. All of them get a 408, and a healthy client is not affected."""
    limits = Limits(head_s=1.0, body_window_s=1.0)
    with serving(fake_service(api_keys=keys(KEY)).service, limits) as address:
        result: Any = asyncio.run(attack(address, 40, 40, drip_s=0.01, limit_s=PATIENCE_S))

    assert len(result.closed_s) == 80
    assert set(result.statuses) == {b"HTTP/1.1 408 Request Timeout"}
    assert len(result.healthy_s) > 2
    assert max(result.closed_s) < PATIENCE_S
