"""Stream server-sent events: frames, comments during silences, and the protocol's end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import msgspec

from core.errors import ApiError
from handlers.dispatch import to_api_error
from handlers.http import Response

HEADERS = (
    ("content-type", "text/event-stream; charset=utf-8"),
    ("cache-control", "no-cache"),
    ("x-accel-buffering", "no"),  # keeps nginx from buffering
)
DONE = b"data: [DONE]\n\n"
SILENCE_S = 15.0  # between two comments once the first event has been sent

Send = Callable[[Any], None]
Silence = Callable[[], tuple[float, str]]

_encode = msgspec.json.Encoder().encode


def frame(event: Any) -> bytes:
    return b"data: " + _encode(event) + b"\n\n"


class Framing:
    """How events become frames: OpenAI's, with one error event at most, and [DONE] at the end."""

    end = DONE

    def frame(self, event: Any) -> bytes:
        return frame(event)

    def failure(self, error: ApiError) -> bytes:
        """Return the frames for an error after the status was sent."""
        return frame(error.body())


class TypedFraming(Framing):
    """Frames that name their event by its `type`, without [DONE].

    `failure` returns the events of an error. It gets the event before the error, or None.
    """

    end = b""

    def __init__(self, failure: Callable[[ApiError, Any], Iterable[Any]]) -> None:
        self._failure = failure
        self._latest: Any = None

    def frame(self, event: Any) -> bytes:
        self._latest = event
        kind: str = event.type
        return f"event: {kind}\n".encode() + frame(event)

    def failure(self, error: ApiError) -> bytes:
        return b"".join(map(self.frame, self._failure(error, self._latest)))


async def stream(
    produce: Callable[[Send], Awaitable[None]],
    *,
    patience_s: float | None = None,
    silence: Silence = lambda: (SILENCE_S, "ping"),
    headers: Callable[[], tuple[tuple[str, str], ...]] = tuple,
    framing: Framing | None = None,
) -> Response:
    """Return a 200 that sends the events which `produce` passes to the function it is called with.

    The first event is awaited for `patience_s` seconds (None: without a limit), so that an exception before it can
    still become a status: it is raised here. A later exception becomes an error event at the end. Closing the
    response cancels `produce`. Until the first event, `silence` returns the seconds between two comments and the text
    of the next one. `headers` is called when the status is chosen.
    """
    body = EventStream(produce, silence, framing or Framing())
    try:
        await body.wait_first(patience_s)
    except BaseException:
        await body.aclose()
        raise
    return Response(200, (*HEADERS, *headers()), body, body.aclose)


class EventStream:
    """The body of a stream: an async iterator of chunks. A slow reader gets several frames in one chunk.

    A task runs the producer, so that comments can be sent during a silence without cancelling it.
    """

    def __init__(self, produce: Callable[[Send], Awaitable[None]], silence: Silence, framing: Framing) -> None:
        self._produce = produce
        self._framing = framing
        self._silence = silence
        self._frames: list[bytes] = []
        self._reader: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._last = 0.0  # when something was last written, on the loop's clock
        self._first = asyncio.Event()  # the first event was sent, or the producer has ended
        self._status_sent = False
        self._error: Exception | None = None  # raised before the first event and before the status was chosen
        self._ended = False
        self._task = asyncio.create_task(self._run())

    async def wait_first(self, patience_s: float | None) -> None:
        """Wait for the first event, at most `patience_s` seconds. Raises what the producer raised before it."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._first.wait(), patience_s)
        if self._error is not None:
            raise self._error
        self._status_sent = True

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> bytes:
        if self._timer is None and not self._ended:
            self._last = asyncio.get_running_loop().time()
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
        """Cancel the producer and wait until it has ended. Idempotent."""
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()
        if not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _run(self) -> None:
        try:
            await self._produce(self._send)
        except Exception as error:  # noqa: BLE001 - after the status, `dispatch` can no longer report it
            if not self._first.is_set() and not self._status_sent:
                self._error = error
            else:
                self._write(self._framing.failure(to_api_error(error)))
        self._ended = True
        self._first.set()
        self._write(self._framing.end)
        if self._timer is not None:
            self._timer.cancel()

    def _send(self, event: Any) -> None:
        self._first.set()
        self._write(self._framing.frame(event))

    def _write(self, data: bytes) -> None:
        self._frames.append(data)
        self._last = asyncio.get_running_loop().time()
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _watch(self) -> None:
        """Send a comment after a silence. A stream has one timer; if it fires early, it is set again."""
        loop = asyncio.get_running_loop()
        seconds, comment = (SILENCE_S, "ping") if self._first.is_set() else self._silence()
        if loop.time() - self._last >= seconds:
            self._write(f": {comment}\n\n".encode())
        self._timer = loop.call_at(self._last + seconds, self._watch)
