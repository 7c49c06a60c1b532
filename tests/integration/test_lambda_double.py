"""The Runtime API double reports every violation of a runtime."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable

import pytest

from infra.emulator import checks
from infra.emulator.exchange import Exchange
from infra.emulator.runtime_api import RuntimeAPIServer

PRELUDE = b'{"statusCode":200,"headers":{}}' + b"\0" * 8
STREAM = (
    "Content-Type: application/vnd.awslambda.http-integration-response\r\n"
    "Lambda-Runtime-Function-Response-Mode: streaming\r\nTransfer-Encoding: chunked\r\n"
)
AGENT = "User-Agent: slm-api-server/1.2.3 python/3.13\r\n"
BUFFERED = b'{"statusCode":200,"body":""}'


class Peer:
    """A runtime that the test drives step by step."""

    def __init__(self, server: RuntimeAPIServer) -> None:
        self.server = server

    async def call(self, method: str, path: str, headers: str = "", body: bytes = b"") -> bytes:
        """Send one request on its own connection. Return the status line of the reply, or b""."""
        host, _, port = self.server.address.partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        head = f"{method} /2018-06-01/runtime/{path} HTTP/1.1\r\nHost: x\r\n{AGENT}{headers}\r\n"
        writer.write(head.encode() + body)
        line = await reader.readline()
        writer.close()
        await writer.wait_closed()
        return line

    async def event(self) -> Exchange:
        exchange = self.server.invoke({"a": 1})
        assert b"200" in await self.call("GET", "invocation/next")
        return exchange

    async def respond(self, exchange: Exchange, headers: str, body: bytes, *, what: str = "response") -> bytes:
        own = f"Lambda-Runtime-Invocation-Id: {exchange.invocation_id}\r\n"
        return await self.call("POST", f"invocation/{exchange.id}/{what}", own + headers, body)

    async def buffered(self, exchange: Exchange, body: bytes = BUFFERED) -> bytes:
        headers = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        return await self.respond(exchange, headers, body)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


END = b"0\r\n\r\n"


def violations(act: Callable[[Peer], Awaitable[object]]) -> list[str]:
    async def go() -> list[str]:
        async with RuntimeAPIServer() as server:
            await act(Peer(server))
            return server.violations

    return asyncio.run(go())


async def good(peer: Peer) -> None:
    await peer.respond(await peer.event(), STREAM, chunk(PRELUDE + b"x") + END)
    await peer.buffered(await peer.event())


async def twice(peer: Peer) -> None:
    exchange = await peer.event()
    await peer.buffered(exchange)
    assert b"403" in await peer.buffered(exchange)


async def unknown_id(peer: Peer) -> None:
    await peer.call("POST", "invocation/x/response", "Content-Length: 0\r\n")


async def unanswered(peer: Peer) -> None:
    await peer.event()
    peer.server.invoke({})
    await peer.call("GET", "invocation/next")


async def no_echo(peer: Peer) -> None:
    exchange = await peer.event()
    headers = f"Content-Type: a\r\nContent-Length: {len(BUFFERED)}\r\n"
    await peer.call("POST", f"invocation/{exchange.id}/response", headers, BUFFERED)


async def wrong_mode(peer: Peer) -> None:
    await peer.respond(await peer.event(), STREAM.replace(": streaming", ": Streaming"), chunk(PRELUDE) + END)


async def wrong_type(peer: Peer) -> None:
    await peer.respond(await peer.event(), STREAM.replace("vnd.awslambda.", ""), chunk(PRELUDE) + END)


async def split_prelude(peer: Peer) -> None:
    await peer.respond(await peer.event(), STREAM, chunk(PRELUDE[:10]) + chunk(PRELUDE[10:]) + END)


async def no_prelude(peer: Peer) -> None:
    await peer.respond(await peer.event(), STREAM, END)


async def undeclared_trailers(peer: Peer) -> None:
    trailers = b"Lambda-Runtime-Function-Error-Type: Function.Bad\r\nLambda-Runtime-Function-Error-Body: e30=\r\n\r\n"
    await peer.respond(await peer.event(), STREAM, chunk(PRELUDE) + b"0\r\n" + trailers)


async def raw_json_trailer(peer: Peer) -> None:
    declared = "Trailer: Lambda-Runtime-Function-Error-Type, Lambda-Runtime-Function-Error-Body\r\n"
    trailers = b"Lambda-Runtime-Function-Error-Type: Function.Bad\r\nLambda-Runtime-Function-Error-Body: {}\r\n\r\n"
    await peer.respond(await peer.event(), STREAM + declared, chunk(PRELUDE) + b"0\r\n" + trailers)


async def body_with_204(peer: Peer) -> None:
    await peer.respond(await peer.event(), STREAM, chunk(PRELUDE.replace(b"200", b"204") + b"x") + END)


async def bad_chunk(peer: Peer) -> None:
    await peer.respond(await peer.event(), STREAM, b"zz\r\n")


async def bad_error(peer: Peer) -> None:
    headers = "Content-Type: a\r\nLambda-Runtime-Function-Error-Type: ValueError\r\nContent-Length: 2\r\n"
    await peer.respond(await peer.event(), headers, b"{}", what="error")


async def no_such_route(peer: Peer) -> None:
    await peer.call("GET", "invocation/previous")


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (twice, "answered twice"),
        (unknown_id, "never handed out"),
        (unanswered, "while an event was unanswered"),
        (no_echo, "Lambda-Runtime-Invocation-Id"),
        (wrong_mode, "the only one is 'streaming'"),
        (wrong_type, "content type"),
        (split_prelude, "whole prelude"),
        (no_prelude, "before its prelude"),
        (undeclared_trailers, "not declared"),
        (raw_json_trailer, "base64"),
        (body_with_204, "a body with status 204"),
        (bad_chunk, "size of a chunk"),
        (bad_error, "error type"),
        (no_such_route, "not in the Runtime API"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_violations_are_reported(act: Callable[[Peer], Awaitable[object]], words: str) -> None:
    """The message names the violation."""
    assert any(words in violation for violation in violations(act))


def test_a_correct_runtime_has_no_violations() -> None:
    """The runtime answers one event streamed and one buffered."""
    assert violations(good) == []


@pytest.mark.parametrize(
    "record",
    [
        {"statusCode": "200"},
        {"statusCode": 99},
        {"statusCode": 200, "body": "x"},
        {"statusCode": 200, "headers": {"set-cookie": "a"}},
        {"statusCode": 200, "headers": {"Upper": "a"}},
        {"statusCode": 200, "headers": {"connection": "close"}},
        {"statusCode": 200, "headers": {"a": 1}},
        {"statusCode": 200, "headers": {"a": "b\r\nc"}},
        {"statusCode": 200, "headers": {"a": "x" * 20_000}},
        {"statusCode": 200, "cookies": "a=1"},
    ],
    ids=str,
)
def test_invalid_preludes_are_reported(record: object) -> None:
    """Lambda's front end would refuse or drop them."""
    assert list(checks.prelude(json.dumps(record).encode())) != []


@pytest.mark.parametrize(
    "body",
    [
        b"not json",
        b'{"statusCode":"200"}',
        b'{"statusCode":200,"body":5}',
        b'{"statusCode":200,"body":"\\u00e9","isBase64Encoded":true}',
        b'{"statusCode":200,"headers":{"a":1}}',
        b'"' + b"x" * (6 << 20) + b'"',
    ],
    ids=["json", "status", "body", "base64", "header", "size"],
)
def test_invalid_buffered_answers_are_reported(body: bytes) -> None:
    """The envelope is invalid or too large."""
    assert list(checks.buffered(body)) != []
