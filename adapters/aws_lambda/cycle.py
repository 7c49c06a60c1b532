"""Run one event through the ASGI application and write its answer. Every way out ends the answer.

    before the first byte    an exception is a 500, the deadline a 504, both as OpenAI's error envelope
    after the first byte     an error event if the answer is an event stream, and Lambda's error trailers
    after the last byte      a line in the log

Lambda does not report a client that disconnects. The application receives `http.disconnect` after its last byte, or
when the Runtime API stops reading.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from adapters.aws_lambda.answer import JSON_HEADERS, Answer, Failure, checked, envelope
from adapters.aws_lambda.runtime_api import Disconnected
from core.errors import ApiError, DeadlineExceeded

logger = logging.getLogger("slm.lambda")

HARD_MARGIN_S = 0.25  # the answer ends this long before the deadline, if the application has not ended it earlier
_CANCEL_GRACE_S = 0.1  # for a cancelled application to clean up

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Any, Receive, Send], Awaitable[None]]


class Cycle:
    """The run of one request. Make a new one for each."""

    def __init__(self, answer: Answer, body: bytes, request_id: str) -> None:
        self._answer = answer
        self._body: bytes | None = body
        self._id = request_id
        self._started = False
        self._complete = False  # the application has sent its last byte
        self._over = False  # this class has ended the answer
        self._closed = asyncio.Event()  # the application receives http.disconnect

    async def run(self, app: App, scope: dict[str, Any], deadline: float) -> None:
        """Answer by `deadline` (monotonic), whatever the application does. Return when the application has returned."""
        # 1) Run the application until it returns or its time is up.
        allowed = deadline - HARD_MARGIN_S - time.monotonic()
        if allowed <= 0:
            await self._fail(_timeout(), None)
            return
        task = asyncio.ensure_future(self._call(app, scope))
        try:
            late = not (await asyncio.wait({task}, timeout=allowed))[0]
        except asyncio.CancelledError:
            task.cancel()
            raise
        # 2) Cancel it if it is late.
        if late:
            task.cancel()
            await asyncio.wait({task}, timeout=_CANCEL_GRACE_S)
            if not task.done():
                logger.error("The application ignored its cancellation and is still running.")
        # 3) End the answer if the application has not.
        error = task.result() if task.done() and not task.cancelled() else None
        await self._conclude(error, late)

    async def send(self, message: Message) -> None:
        """ASGI's send. Raises RuntimeError for messages out of order, Disconnected once Lambda has stopped reading."""
        kind = message["type"]
        if self._over:
            raise Disconnected("this answer has been ended")
        if kind == "http.response.start":
            if self._started:
                raise RuntimeError("http.response.start was sent twice")
            headers = checked(message.get("headers", ()))
            await self._answer.start(int(message["status"]), headers)
            self._started = True
        elif kind == "http.response.body":
            if not self._started or self._complete:
                raise RuntimeError(f"http.response.body was sent {'after the last' if self._complete else 'first'}")
            last = not message.get("more_body", False)
            try:
                await self._answer.body(bytes(message.get("body", b"")), last=last)
            except Disconnected:
                self._over = True
                self._closed.set()
                raise
            if last:
                self._complete = True
                self._closed.set()
        elif kind not in ("http.response.trailers", "http.response.debug"):
            raise RuntimeError(f"{kind!r} is not an ASGI message of type http")

    async def receive(self) -> Message:
        """ASGI's receive: the whole body, then http.disconnect once the answer has ended."""
        body, self._body = self._body, None
        if body is not None:
            return {"type": "http.request", "body": body, "more_body": False}
        await self._closed.wait()
        return {"type": "http.disconnect"}

    async def _call(self, app: App, scope: dict[str, Any]) -> BaseException | None:
        try:
            await app(scope, self.receive, self.send)
        except BaseException as error:  # noqa: BLE001 - SystemExit ends one request, not the loop of every request
            return error
        finally:
            if not self._complete and not self._answer.begun:
                self._answer.withdraw()  # must happen before the loop's next iteration, which would flush the prelude
        return None

    async def _conclude(self, error: BaseException | None, late: bool) -> None:
        """The application has returned or was cancelled: make sure that the answer has ended, too."""
        if self._complete:
            if error is not None and not late:
                logger.error("The application failed after its answer.", exc_info=error)
        elif self._answer.broken:
            logger.warning("Lambda stopped reading the answer.")
        elif late:
            logger.error("The deadline came before the end of the answer.")
            await self._fail(_timeout(), None)
        else:
            if error is None:
                error = RuntimeError("the application returned without a complete answer")
            logger.error("The application failed.", exc_info=error)
            text = f"Internal server error. Details are in the log under request {self._id}."
            await self._fail(ApiError(text), error)
        self._over = True
        self._closed.set()

    async def _fail(self, error: ApiError, cause: BaseException | None) -> None:
        """End the answer with `error`. Without a `cause` it was the deadline."""
        if cause is None:
            failure = Failure("Function.DeadlineExceeded", error.message)
        else:
            failure = Failure.of(cause, error.message)
        try:
            if self._answer.begun:
                await self._answer.abandon(failure, error)
            else:
                self._answer.withdraw()
                await self._answer.start(error.status, JSON_HEADERS)
                await self._answer.body(envelope(error), last=True)
        except Disconnected:
            logger.warning("Lambda stopped reading the answer.")


def _timeout() -> DeadlineExceeded:
    return DeadlineExceeded(
        "The Lambda timeout was reached before the response was complete. Increase Timeout or lower max_tokens."
    )
