"""Answers: where the ASGI cycle puts what the application sends. One streams at once, one collects.

Both know when a failure can still become a status: nothing has left the process. Know no application.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from adapters.aws_lambda.failure import Failure, event
from adapters.aws_lambda.prelude import RawHeaders, has_body, prelude
from adapters.aws_lambda.runtime_api import ResponseStream


class Answer(Protocol):
    """Called in this order: `start` once, `body` until `last`; or `abandon`, whatever came before."""

    @property
    def begun(self) -> bool:
        """Bytes have left: the status can no longer be changed."""

    @property
    def broken(self) -> bool:
        """Lambda takes no more."""

    async def start(self, status: int, headers: RawHeaders) -> None: ...

    async def body(self, data: bytes, *, last: bool) -> None: ...

    def withdraw(self) -> None:
        """Forget a start of which nothing has left: another one follows."""

    async def abandon(self, failure: Failure, envelope: bytes) -> None:
        """End a begun answer that cannot be completed."""


class StreamedAnswer:
    """Sends each body message as one chunk, at once. The prelude travels with the first one if that follows without
    the application having waited in between, else alone."""

    def __init__(self, stream: ResponseStream, method: str) -> None:
        self._stream = stream
        self._method = method
        self._prelude: bytes | None = None
        self._with_body = True
        self._is_events = False
        self._empty = True

    @property
    def begun(self) -> bool:
        return self._stream.begun

    @property
    def broken(self) -> bool:
        return self._stream.broken

    async def start(self, status: int, headers: RawHeaders) -> None:
        await self._stream.open()
        self._with_body = has_body(self._method, status)
        self._is_events = any(
            name == b"content-type" and value.startswith(b"text/event-stream") for name, value in headers
        )
        self._prelude = prelude(status, headers, body=self._with_body)
        asyncio.get_running_loop().call_soon(self._flush)

    async def body(self, data: bytes, *, last: bool) -> None:
        if not self._with_body:
            data = b""
        self._empty = self._empty and not data
        if last and self._empty and self._with_body:
            # Function URLs have held empty streamed answers open until the timeout (nodejs RIC#95, LWA#499).
            data = b"\n"
        opening, self._prelude = self._prelude, None
        if opening is not None:
            data = opening + data
        if data or last:
            await self._stream.write(data, last=last)

    async def abandon(self, failure: Failure, envelope: bytes) -> None:
        # A function URL's client sees no trailers, so that an event stream says it in band, too.
        # Without waiting: the reason may be that nobody reads.
        if self._is_events:
            self._stream.write_now(event(envelope))
        await self._stream.end(failure)

    def withdraw(self) -> None:
        self._prelude = None

    def _flush(self) -> None:
        opening, self._prelude = self._prelude, None
        if opening is not None:
            self._stream.write_now(opening)


class BufferedAnswer:
    """Keeps everything until the application is done; nothing ever leaves early."""

    begun = False
    broken = False

    def __init__(self) -> None:
        self.status = 0
        self.headers: RawHeaders = []
        self.content = bytearray()

    async def start(self, status: int, headers: RawHeaders) -> None:
        self.status, self.headers = status, headers
        self.content.clear()

    async def body(self, data: bytes, *, last: bool) -> None:
        self.content += data

    async def abandon(self, failure: Failure, envelope: bytes) -> None:
        raise AssertionError("a buffered answer is replaced, never abandoned")

    def withdraw(self) -> None:
        self.headers = []
        self.content.clear()
