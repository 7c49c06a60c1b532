"""A local server for the Lambda Runtime API: strict, and able to inject faults.

The tests and the local function URL (`infra.emulator.function_url`) use it. It checks everything that a runtime sends
(`infra.emulator.checks`) and collects the violations. The tests fail if there are any.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from infra.emulator import checks, wire
from infra.emulator.exchange import Behaviour, Exchange

_VERSION = "/2018-06-01/runtime/"
_CHUNKED_OVER = 2048  # as on Lambda: Go's net/http writes larger bodies chunked


class RuntimeAPIServer:
    """Serve one runtime process. `async with RuntimeAPIServer() as server`, then `server.address`."""

    def __init__(self, *, concurrency: int = 1) -> None:
        self.violations: list[str] = []
        self.init_errors: list[dict[str, Any]] = []
        self.restore_errors: list[dict[str, Any]] = []
        self.polled = asyncio.Event()  # the first /next has come: init is over
        self.idle = asyncio.Event()  # /next waits for an event
        self.snapshot = asyncio.Event()  # /restore/next has come
        self.restored = asyncio.Event()  # set it to let /restore/next return
        self.address = ""
        self._concurrency = concurrency
        self._waiting: asyncio.Queue[Exchange] = asyncio.Queue()
        self._open: dict[str, Exchange] = {}
        self._closed: set[str] = set()
        self._connections: set[asyncio.Task[None]] = set()
        self._resting: dict[asyncio.Task[None], asyncio.StreamWriter] = {}  # connections between two requests
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> RuntimeAPIServer:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=1 << 20)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._connections:
            task.cancel()
        if self._connections:
            await asyncio.wait(self._connections)
        await self._server.wait_closed()

    def invoke(
        self,
        event: Any,
        *,
        timeout_s: float = 30.0,
        headers: Mapping[str, str] | None = None,
        behaviour: Behaviour | None = None,
        keep: bool = True,
    ) -> Exchange:
        """Queue an event: bytes unchanged, anything else as JSON."""
        body = event if isinstance(event, bytes) else json.dumps(event).encode()
        deadline = time.monotonic() + timeout_s
        exchange = Exchange(
            id=str(uuid.uuid4()),
            event=body,
            headers={
                "Lambda-Runtime-Deadline-Ms": str(round((time.time() + timeout_s) * 1000)),
                "Lambda-Runtime-Invoked-Function-Arn": "arn:aws:lambda:eu-central-1:123456789012:function:slm",
                **(headers or {}),
            },
            deadline=deadline,
            behaviour=behaviour or Behaviour(),
            keep=keep,
            invocation_id=uuid.uuid4().hex,
        )
        self._waiting.put_nowait(exchange)
        return exchange

    def unanswered(self) -> list[Exchange]:
        """Return the events that were handed out and not answered."""
        return [exchange for exchange in self._open.values() if not exchange.finished.is_set()]

    async def close_resting(self) -> None:
        """Close every idle connection, as a server with an idle limit does. Return when the runtime has noticed."""
        resting = dict(self._resting)
        for writer in resting.values():
            writer.write_eof()
        if resting:
            await asyncio.wait(set(resting))

    # Connections

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            open_connection = True
            while open_connection:
                self._resting[task] = writer
                try:
                    head = await reader.readuntil(b"\r\n\r\n")
                finally:
                    del self._resting[task]
                open_connection = await self._request(head, reader, writer)
        except wire.Malformed as error:
            self._blame([str(error)], "response")
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        except asyncio.CancelledError:
            pass  # the server is closing; asyncio would log the cancellation of a handler
        finally:
            self._connections.discard(task)
            writer.transport.abort()

    async def _request(self, raw: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Serve the request with head `raw` and return whether the connection stays open."""
        first, *lines = raw[:-4].decode("latin-1").split("\r\n")
        method, path, version = [*first.split(" "), "", ""][:3]
        headers: dict[str, str] = {}
        for line in lines:
            name, _, value = line.partition(":")
            if name.lower() in headers:
                self._blame([f"the header {name!r} is there twice"], path)
            headers[name.lower()] = value.strip()
        self._blame(checks.request_head(version, headers), path)
        route = path.removeprefix(_VERSION)
        if (method, route) == ("GET", "invocation/next"):
            return await self._next(reader, writer)
        if (method, route) == ("GET", "restore/next"):
            self.snapshot.set()
            await self.restored.wait()
            return await wire.reply(writer, 200, b"")
        if method == "POST" and route in ("init/error", "restore/error"):
            body = await reader.readexactly(int(headers["content-length"]))
            self._blame(checks.failure(headers, body), path)
            (self.init_errors if route == "init/error" else self.restore_errors).append(json.loads(body))
            return await wire.reply(writer, 202, b'{"status":"OK"}')
        kind, _, rest = route.partition("/")
        identity, _, outcome = rest.partition("/")
        if method == "POST" and kind == "invocation" and outcome in ("response", "error"):
            return await self._answer(identity, outcome, headers, reader, writer)
        self._blame([f"{method} {path} is not in the Runtime API"], path)
        return await wire.reply(writer, 404, b"")

    async def _next(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        self.polled.set()
        self.idle.set()
        if len(self.unanswered()) >= self._concurrency:
            self._blame(["/next was called while an event was unanswered"], "/next")
        waiting = asyncio.ensure_future(self._waiting.get())
        leaving = asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait({waiting, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if leaving.done():
                if leaving.exception() is None and leaving.result():
                    self._blame(["bytes came after GET /next"], "/next")
                return False
        finally:
            if not leaving.done():
                leaving.cancel()
                await asyncio.wait({leaving})
            if leaving.done() and not waiting.done():
                waiting.cancel()
        exchange = waiting.result()
        self.idle.clear()
        behaviour = exchange.behaviour
        if behaviour.next_status != 200:
            exchange.fail("Runtime.Refused", "by the test")
            return await wire.reply(writer, behaviour.next_status, b"{}")
        self._open[exchange.id] = exchange
        exchange.handed_out = time.monotonic()
        await self._hand_out(exchange, writer)
        return not behaviour.close_after_next

    async def _hand_out(self, exchange: Exchange, writer: asyncio.StreamWriter) -> None:
        headers = {
            "Lambda-Runtime-Aws-Request-Id": exchange.id,
            "Lambda-Runtime-Invocation-Id": exchange.invocation_id,
            "Content-Type": "application/json",
            **exchange.headers,
        }
        head = "HTTP/1.1 200 OK\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        event = exchange.event
        if len(event) > _CHUNKED_OVER:
            pieces = [event[start : start + 4096] for start in range(0, len(event), 4096)]
            framed = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
            whole = f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + framed
        else:
            whole = f"{head}Content-Length: {len(event)}\r\n\r\n".encode() + event
        await wire.write(writer, whole, exchange.behaviour.segment)

    async def _answer(
        self,
        identity: str,
        outcome: str,
        headers: dict[str, str],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> bool:
        exchange = self._open.get(identity)
        if exchange is None or exchange.kind is not None or exchange.finished.is_set():
            late = exchange is not None and exchange.error is not None
            if not late:
                history = "answered twice" if exchange else "never handed out"
                self._blame([f"the id {identity!r} was {history}"], outcome)
            await wire.discard(headers, reader)
            return await wire.reply(writer, 410 if late else 403, b"{}")
        self._blame(checks.answer_head(headers, exchange.invocation_id), outcome)
        if "lambda-runtime-function-response-mode" in headers:
            return await self._stream(exchange, headers, reader, writer)
        if outcome == "response" and "transfer-encoding" in headers:
            self._blame(["a chunked answer without the response mode"], outcome)
        body = await reader.readexactly(int(headers["content-length"]))
        if outcome == "error":
            self._blame(checks.failure(headers, body), outcome)
            exchange.kind, exchange.error = "error", json.loads(body)
        else:
            self._blame(checks.buffered(body), outcome)
            exchange.kind = "buffered"
            exchange.body += body
        return await self._finish(exchange, writer)

    async def _stream(
        self,
        exchange: Exchange,
        headers: dict[str, str],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> bool:
        self._blame(checks.stream_head(headers), "response")
        exchange.kind = "stream"
        behaviour, size, count, first = exchange.behaviour, 0, 0, b""
        while True:
            if behaviour.pause_s:
                await asyncio.sleep(behaviour.pause_s)
            chunk = await wire.read_chunk(reader)
            if not chunk:
                break
            size, count = size + len(chunk), count + 1
            if exchange.keep:
                exchange.chunks.append((time.monotonic(), chunk))
            if exchange.prelude is None:
                first += chunk
                chunk = self._opening(exchange, first)
            if chunk and exchange.prelude is not None:
                await self._take(exchange, chunk)
            if behaviour.reject_after is not None and size >= behaviour.reject_after:
                await wire.reply(writer, 413, b'{"errorType":"RequestEntityTooLarge"}', close=True)
                exchange.fail("Function.ResponseSizeTooLarge", "by the test")
                return False
            if behaviour.hang_up_after is not None and count >= behaviour.hang_up_after:
                exchange.fail("Runtime.HungUp", "by the test")
                return False
        exchange.trailers = await wire.read_trailers(reader)
        self._blame(checks.trailers(exchange.trailers, headers.get("trailer", "")), "response")
        if exchange.prelude is None:
            self._blame(["the stream ended before its prelude did"], "response")
        return await self._finish(exchange, writer)

    def _opening(self, exchange: Exchange, first: bytes) -> bytes:
        """Remove the prelude from the first chunk and return the rest, which is body."""
        raw, separator, rest = first.partition(checks.SEPARATOR)
        if not separator:
            self._blame(["the first chunk does not hold the whole prelude"], "response")
            return b""
        self._blame(checks.prelude(raw), "response")
        if b"\0" in raw:
            self._blame(["a NUL before the separator"], "response")
        exchange.prelude = json.loads(raw)
        exchange.begun.set()
        return rest

    async def _take(self, exchange: Exchange, chunk: bytes) -> None:
        if checks.has_no_body(exchange.status):
            self._blame([f"a body with status {exchange.status}"], "response")
        if exchange.keep:
            exchange.body += chunk
        else:
            await exchange.data.put(chunk)

    async def _finish(self, exchange: Exchange, writer: asyncio.StreamWriter) -> bool:
        behaviour = exchange.behaviour
        exchange.begun.set()
        if behaviour.delay_s:
            await asyncio.sleep(behaviour.delay_s)
        exchange.finished.set()
        if not exchange.keep:
            await exchange.data.put(None)
        if behaviour.silent:
            await asyncio.get_running_loop().create_future()
        return (
            await wire.reply(writer, behaviour.status, b'{"status":"OK"}\n', segment=1 if behaviour.split_reply else 0)
            and not behaviour.close_after_reply
        )

    def _blame(self, violations: Iterable[str], where: str) -> None:
        self.violations += [f"{where}: {violation}" for violation in violations]
