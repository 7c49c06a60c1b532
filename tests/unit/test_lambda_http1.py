"""The HTTP/1.1 client's parser, with replies as bytes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.aws_lambda.http1 import MAX_HEAD, Connection, ConnectionLost, Reply


class Transport(asyncio.WriteTransport):
    """A transport that records what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = False

    def write(self, data: Any) -> None:
        self.written += bytes(data)

    def is_closing(self) -> bool:
        return self.closed

    def abort(self) -> None:
        self.closed = True


def exchange(data: bytes, *, sizes: list[int] | None = None, eof: bool = False) -> tuple[Any, Connection, Transport]:
    """Feed `data` in pieces of `sizes`, then perhaps the end. Return the reply or error, connection and transport."""

    async def go() -> tuple[Any, Connection, Transport]:
        connection, transport = Connection(), Transport()
        connection.connection_made(transport)
        reply = connection.expect()
        rest = data
        for size in sizes or []:
            connection.data_received(rest[:size])
            rest = rest[size:]
        if rest:
            connection.data_received(rest)
        if eof:
            connection.eof_received()
            connection.connection_lost(None)
        if not reply.done():
            return None, connection, transport
        return reply.exception() or reply.result(), connection, transport

    return asyncio.run(go())


PLAIN = b"HTTP/1.1 202 Accepted\r\nContent-Type: a\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n3;x=y\r\n wo\r\n0\r\nA: b\r\n\r\n"


@pytest.mark.parametrize(
    ("data", "status", "body"),
    [
        (PLAIN, 202, b"hello"),
        (CHUNKED, 200, b"hello wo"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b""),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + PLAIN, 202, b"hello"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 200, b""),
    ],
    ids=["length", "chunked", "204", "continue", "empty"],
)
def test_every_framing_of_a_body_is_read(data: bytes, status: int, body: bytes) -> None:
    """The connection is reusable after each of them."""
    reply, connection, _ = exchange(data)

    assert (reply.status, reply.body) == (status, body)
    assert connection.usable
    assert connection.used


@given(st.lists(st.integers(1, 40), max_size=30), st.sampled_from([PLAIN, CHUNKED]))
def test_any_segmentation_gives_the_same_reply(sizes: list[int], data: bytes) -> None:
    """TCP may split a reply anywhere."""
    assert exchange(data, sizes=sizes)[0] == exchange(data)[0]


def test_header_names_are_lower_case() -> None:
    """Lambda does not guarantee a case."""
    assert exchange(PLAIN)[0] == Reply(202, {"content-type": "a", "content-length": "5"}, b"hello")


def test_a_body_without_a_length_ends_with_the_connection() -> None:
    """The connection is not reusable afterwards."""
    reply, connection, _ = exchange(b"HTTP/1.0 200 OK\r\n\r\nall of it", eof=True)

    assert reply.body == b"all of it"
    assert not connection.usable


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\nConnection: Close", b"HTTP/1.0 200 OK"])
def test_a_connection_is_closed_when_the_reply_says_so(head: bytes) -> None:
    """`Connection: close` and HTTP/1.0 do."""
    _, connection, transport = exchange(head + b"\r\nContent-Length: 0\r\n\r\n")

    assert transport.closed
    assert not connection.usable


@pytest.mark.parametrize(("data", "untouched"), [(b"", True), (PLAIN[:10], False), (PLAIN[:-1], False)])
def test_a_lost_connection_says_whether_bytes_arrived(data: bytes, untouched: bool) -> None:
    """A request is retried only if no byte of its reply arrived."""
    error, _, _ = exchange(data, eof=True)

    assert isinstance(error, ConnectionLost)
    assert error.untouched is untouched


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-x\r\n\r\n",
        b"HTTP/1.1 xxx\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"0" * (MAX_HEAD + 1),
        b"HTTP/1.1 200 OK\r\n" + b"A: " + b"x" * MAX_HEAD,
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
    ],
    ids=["protocol", "status", "size", "endless size", "endless head", "length"],
)
def test_an_invalid_reply_closes_the_connection(data: bytes) -> None:
    """It raises ConnectionLost and nothing else."""
    error, _, transport = exchange(data)

    assert isinstance(error, ConnectionLost)
    assert transport.closed


def test_unexpected_bytes_close_the_connection() -> None:
    """Bytes after a reply or between two mean that client and server are out of sync."""
    assert exchange(PLAIN + b"HTTP")[2].closed

    _, connection, transport = exchange(PLAIN)
    connection.data_received(b"HTTP/1.1 408 Timeout\r\n\r\n")
    assert transport.closed


def test_writing_waits_for_the_transport() -> None:
    """`drained` returns when the transport resumes writing or the connection is lost."""

    async def go() -> None:
        for release in (Connection.resume_writing, lambda connection: connection.connection_lost(None)):
            connection = Connection()
            connection.connection_made(Transport())
            await connection.drained()
            connection.pause_writing()
            waiting = asyncio.ensure_future(connection.drained())
            await asyncio.sleep(0)
            assert not waiting.done()
            release(connection)
            await waiting

    asyncio.run(go())
