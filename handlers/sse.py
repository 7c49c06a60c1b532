"""Server-sent events: structs in, frames out, a comment in every silence, one [DONE] at the end.

The events are consumed by a task of the stream's own, so that silence can be noticed without cancelling what is
awaited, and so that a slow reader gets several frames in one chunk.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Awaitable, Callable
from typing import Any

import msgspec

from handlers.dispatch import to_api_error
from handlers.http import Response

HEADERS = (
    ("content-type", "text/event-stream; charset=utf-8"),
    ("cache-control", "no-cache"),
    ("x-accel-buffering", "no"),  # nginx would hold frames back
)
DONE = b"data: [DONE]\n\n"
SILENCE_S = 15.0

_encode = msgspec.json.Encoder().encode


def frame(event: Any) -> bytes:
    return b"data: " + _encode(event) + b"\n\n"


def stream(
    events: AsyncIterable[Any],
    *,
    close: Callable[[], Awaitable[None]],
    silence: Callable[[], tuple[float, str]] = lambda: (SILENCE_S, "ping"),
) -> Response:
    """A 200 that sends `events`; what they raise is told in a last event before [DONE]. `close` frees what they hold.
    `silence` says how long one may last (seconds) and which comment ends it."""
    body = Frames(events, silence)

    async def aclose() -> None:
        await body.aclose()
        await close()

    return Response(200, HEADERS, body, aclose)


class Frames:
    """The body of a stream: an async iterator of chunks. Nothing starts before the first one is asked for."""

    def __init__(self, events: AsyncIterable[Any], silence: Callable[[], tuple[float, str]]) -> None:
        self._events = events
        self._silence = silence
        self._frames: list[bytes] = []
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._reader: asyncio.Future[None] | None = None
        self._last = 0.0  # when something was last written, on the loop's clock
        self._ended = False

    def __aiter__(self) -> Frames:
        return self

    async def __anext__(self) -> bytes:
        if self._task is None and not self._ended:
            loop = asyncio.get_running_loop()
            self._task = loop.create_task(self._run())
            self._last = loop.time()
            self._watch()
        while not self._frames:
            if self._ended:
                raise StopAsyncIteration
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        chunk = b"".join(self._frames)
        self._frames.clear()
        return chunk

    async def aclose(self) -> None:
        """Stop consuming; idempotent, also before the first chunk and after the last."""
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _run(self) -> None:
        try:
            async for event in self._events:
                self._write(frame(event))
        except Exception as error:  # noqa: BLE001 - the status is out: dispatch cannot tell the client any more
            self._write(frame(to_api_error(error).body()))
        self._ended = True
        self._write(DONE)
        if self._timer is not None:
            self._timer.cancel()

    def _write(self, data: bytes) -> None:
        self._frames.append(data)
        self._last = asyncio.get_running_loop().time()
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _watch(self) -> None:
        """One timer a stream, not one a frame: when it rings too early it is set again for the rest."""
        loop = asyncio.get_running_loop()
        seconds, comment = self._silence()
        if loop.time() - self._last >= seconds:
            self._write(f": {comment}\n\n".encode())
        self._timer = loop.call_at(self._last + seconds, self._watch)
