"""Cycle: one HTTP event through the ASGI application, into an Answer of either kind. Every way out ends the answer.

    nothing has left yet     an exception: 500; the deadline: 504; both in OpenAI's envelope
    bytes have left          an SSE `error` event if it is an event stream, and the trailers that tell Lambda
    after the last byte      the log

A client that hangs up is never heard of: Lambda goes on. `http.disconnect` comes after the last byte, or when the
Runtime API itself takes no more.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from adapters.aws_lambda.answer import Answer
from adapters.aws_lambda.failure import Failure, envelope
from adapters.aws_lambda.prelude import checked
from adapters.aws_lambda.runtime_api import Disconnected

logger = logging.getLogger(__name__)

HARD_MARGIN_S = 0.25  # before the deadline the answer is ended here, if the application has not ended it before
_CANCEL_GRACE_S = 0.1  # for an application to clean up once it is cancelled

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Any, Receive, Send], Awaitable[None]]

_JSON = [(b"content-type", b"application/json")]


class Cycle:
    """One run; make a new one for each request."""

    def __init__(self, answer: Answer, body: bytes, request_id: str) -> None:
        self._answer = answer
        self._body: bytes | None = body
        self._id = request_id
        self._started = False
        self._complete = False  # by the application
        self._over = False  # without it
        self._closed = asyncio.Event()  # the application is told http.disconnect

    async def run(self, app: App, scope: dict[str, Any], deadline: float) -> None:
        """Answer by `deadline` (monotonic), come what may. Returns when the application has returned, too."""
        allowed = deadline - HARD_MARGIN_S - time.monotonic()
        if allowed <= 0:
            await self._fail(504, None)
            return
        task = asyncio.ensure_future(self._call(app, scope))
        try:
            late = not (await asyncio.wait({task}, timeout=allowed))[0]
        except asyncio.CancelledError:
            task.cancel()
            raise
        if late:
            task.cancel()
            await asyncio.wait({task}, timeout=_CANCEL_GRACE_S)
        error = task.result() if task.done() and not task.cancelled() else None
        if late and not task.done():
            logger.error("The application does not let itself be cancelled; it is left behind.")
        await self._conclude(error, late)

    async def send(self, message: Message) -> None:
        """ASGI's send. Raises RuntimeError for messages out of order, Disconnected when nobody takes them."""
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
            raise RuntimeError(f"{kind!r} is not a message of ASGI's HTTP")

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
        except BaseException as error:  # noqa: BLE001 - SystemExit, too, ends one request and not every other's loop
            return error
        finally:
            if not self._complete and not self._answer.begun:
                self._answer.withdraw()  # now: in the next turn of the loop the prelude would leave
        return None

    async def _conclude(self, error: BaseException | None, late: bool) -> None:
        """The application has ended or was given up: see to it that the answer has, too."""
        if self._complete:
            if error is not None and not late:
                logger.error("The application failed after its answer.", exc_info=error)
        elif self._answer.broken:
            logger.warning("Lambda took no more of the answer.")
        elif late:
            logger.error("The deadline came before the answer's end.")
            await self._fail(504, None)
        else:
            if error is None:
                error = RuntimeError("the application returned without a complete answer")
            logger.error("The application failed.", exc_info=error)
            await self._fail(500, error)
        self._over = True
        self._closed.set()

    async def _fail(self, status: int, error: BaseException | None) -> None:
        if error is None:
            text = "The function's time was up before the answer was complete; raise its timeout or ask for less."
            failure, told = Failure("Function.DeadlineExceeded", text), envelope(text, "timeout")
        else:
            text = f"An internal error occurred; the log has the reason under request {self._id}."
            failure, told = Failure.of(error, text), envelope(text, "internal_error")
        try:
            if self._answer.begun:
                await self._answer.abandon(failure, told)
            else:
                self._answer.withdraw()
                await self._answer.start(status, _JSON)
                await self._answer.body(told, last=True)
        except Disconnected:
            logger.warning("Lambda took no more of the answer.")
