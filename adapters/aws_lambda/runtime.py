"""The runtime's loop: init, then one invocation after another, each answered exactly once.

`Runtime` serves an ASGI application. `__main__` decides what is loaded and when. An event passes through `_work`,
`_handle`, then one of `_stream`, `_buffer` and `_direct`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from adapters.aws_lambda import events, operations, snapstart
from adapters.aws_lambda.answer import JSON_HEADERS, Answer, BufferedAnswer, Failure, StreamedAnswer, envelope
from adapters.aws_lambda.cycle import App, Cycle
from adapters.aws_lambda.runtime_api import Invocation, RuntimeAPI, RuntimeGone
from core.errors import ApiError, InvalidRequest
from handlers.http import platform, request_id

logger = logging.getLogger("slm.lambda")

# With several loops a failed /next is retried after these pauses, because other loops may be streaming.
RETRIES_S = (0.1, 0.2, 0.5, 1.0, 2.0)
INIT_S = 9.0  # of the 10 that Lambda allows; after them it starts the process again within the first invocation
LONG_INIT_S = 130.0  # or the function's timeout if that is longer: init where no request waits for it
MARGIN_S = 10.0  # before the end of a long init
MAX_BUFFERED = 6 * 1024 * 1024  # bytes of a buffered answer with its JSON envelope

_LONG = ("provisioned-concurrency", "snap-start", "lambda-managed-instances")


def init_seconds(environ: Mapping[str, str], timeout: float = 0) -> float:
    """Return how long init may last from the process's start. `timeout` is the function's (0: unknown)."""
    if environ.get("AWS_LAMBDA_INITIALIZATION_TYPE") in _LONG:
        return max(LONG_INIT_S, timeout) - MARGIN_S
    return INIT_S


class Runtime:
    """Serve `app` until the Runtime API is gone or SIGTERM arrives.

    Init waits for `ready`, which must not raise, until `init_ends` (monotonic). `concurrency` loops share the process
    (Managed Instances). `hooks` is for SnapStart; a hook may replace `app`. `afterwards` is called in a thread with the
    invocation's deadline, after the last byte of an answer and before the next event: only then can work run on Lambda
    while no client waits. `close` is called after the last answer.
    """

    def __init__(
        self,
        app: App,
        environ: Mapping[str, str],
        *,
        mode: events.ResponseMode = "auto",
        ready: Callable[[], Awaitable[object]] | None = None,
        init_ends: float | None = None,
        concurrency: int = 1,
        hooks: snapstart.Hooks | None = None,
        afterwards: Callable[[float], object] | None = None,
        close: Callable[[], Awaitable[object]] | None = None,
    ) -> None:
        self.app = app
        self._environ = environ
        self._mode = mode
        self._ready = ready
        self._began = time.monotonic()
        self._init_ends = self._began + INIT_S if init_ends is None else init_ends
        self._concurrency = concurrency
        self._hooks = hooks
        self._afterwards = afterwards
        self._close = close
        self._polling: set[asyncio.Task[None]] = set()
        self._stopping = False

    async def run(self) -> int:
        """Return the exit status: 0 after SIGTERM, 1 without the Runtime API, 64 or 65 if a SnapStart hook failed."""
        # On demand Lambda sends SIGTERM only if an extension is registered. Managed Instances always send it.
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self.stop)
        apis = [RuntimeAPI(self._environ["AWS_LAMBDA_RUNTIME_API"]) for _ in range(self._concurrency)]
        readying = asyncio.ensure_future(self._when_ready())
        try:
            status = await self._init(apis[0], readying)
            if status == 0:
                await self._serve(apis)
            if self._close is not None:
                await self._close()
        except RuntimeGone as error:
            logger.error("The runtime ends: %s.", error)
            status = 1
        finally:
            readying.cancel()
            for api in apis:
                api.close()
        return status

    def stop(self) -> None:
        """Take no further event. Running invocations finish."""
        self._stopping = True
        for worker in self._polling:
            worker.cancel()

    async def _init(self, api: RuntimeAPI, readying: asyncio.Future[None]) -> int:
        remaining = self._init_ends - time.monotonic()
        done, _ = await asyncio.wait({readying}, timeout=max(0.0, remaining))
        if not done:
            logger.info("Init ends after %.1f s while the model is loading.", time.monotonic() - self._began)
        if self._hooks is not None and snapstart.enabled(self._environ):
            return await snapstart.take(api, self._hooks)
        return 0

    async def _when_ready(self) -> None:
        if self._ready is not None:
            await self._ready()

    async def _serve(self, apis: list[RuntimeAPI]) -> None:
        """Return when every loop has ended. A loop that gets no more events leaves the others running."""
        workers = {asyncio.ensure_future(self._work(api)) for api in apis}
        running, gone = workers, None
        try:
            while running:
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for worker in done:
                    try:
                        if not worker.cancelled():
                            worker.result()
                    except RuntimeGone as error:
                        logger.error("A loop ends: %s.", error)
                        gone = error
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.wait(workers)
        if gone is not None:
            raise gone

    async def _work(self, api: RuntimeAPI) -> None:
        worker = asyncio.current_task()
        assert worker is not None
        while not self._stopping:
            # 1) Wait for an event. `stop` cancels only this.
            self._polling.add(worker)
            try:
                invocation = await self._next(api)
            finally:
                self._polling.discard(worker)
            # 2) Answer it.
            try:
                await self._handle(api, invocation)
            except RuntimeGone as error:
                if self._concurrency == 1:
                    raise
                logger.error("The answer to %s could not be sent: %s.", invocation.id, error)
            except Exception as error:  # a fault of this runtime: the event still needs an answer
                logger.error("The runtime failed.", exc_info=error)
                text = f"Internal server error. Details are in the log under request {invocation.id}."
                await api.error(invocation, Failure("Runtime.InternalError", text))
            # 3) Do the work that must not delay an answer.
            if self._afterwards is not None:
                await asyncio.to_thread(self._afterwards, invocation.deadline)

    async def _next(self, api: RuntimeAPI) -> Invocation:
        """Return the next event. Raises RuntimeGone: at once with one loop, because Lambda starts another process."""
        for delay in RETRIES_S if self._concurrency > 1 else ():
            try:
                return await api.next()
            except RuntimeGone as error:
                logger.warning("No event: %s. Retry in %.1f s.", error, delay)
                await asyncio.sleep(delay)
        return await api.next()

    async def _handle(self, api: RuntimeAPI, invocation: Invocation) -> None:
        request_id.set(invocation.id)
        platform.set(invocation.log_fields())
        # 1) Decode the event.
        try:
            event = json.loads(invocation.event)
        except (ValueError, RecursionError):
            await api.error(invocation, Failure("Function.UnknownEvent", "The event is not valid JSON."))
            return
        # 2) Read the HTTP request in it. An event without one is a direct invoke.
        try:
            request = events.HTTPEvent.read(event)
        except events.BadEvent as error:
            logger.warning("An HTTP event could not be read: %s", error)
            await self._refuse(api, invocation, event)
            return
        if request is None:
            await self._direct(api, invocation, event)
            return
        # 3) Run the application and send its answer.
        deadline = events.answer_by(event, invocation.deadline, self._environ)
        invocation = dataclasses.replace(invocation, deadline=deadline)
        if events.streamed(event, self._mode, self._environ):
            await self._stream(api, invocation, request)
        else:
            await self._buffer(api, invocation, request)

    async def _stream(self, api: RuntimeAPI, invocation: Invocation, request: events.HTTPEvent) -> None:
        stream = api.stream(invocation)
        answer = StreamedAnswer(stream, request.method)
        await self._cycle(invocation, answer, request.scope, request.body, principal=request.principal)
        await stream.confirmed()

    async def _buffer(self, api: RuntimeAPI, invocation: Invocation, request: events.HTTPEvent) -> None:
        answer = BufferedAnswer()
        await self._cycle(invocation, answer, request.scope, request.body, principal=request.principal)
        payload = _dump(request.format(answer.status, answer.headers, bytes(answer.content)))
        if len(payload) > MAX_BUFFERED:
            body = envelope(ApiError(_too_large(len(payload)), code="response_too_large"))
            payload = _dump(request.format(500, JSON_HEADERS, body))
        await api.respond(invocation, payload)

    async def _direct(self, api: RuntimeAPI, invocation: Invocation, event: Any) -> None:
        try:
            scope, body = operations.to_request(event)
        except operations.UnknownEvent as error:
            await api.error(invocation, Failure("Function.UnknownEvent", str(error)))
            return
        answer = BufferedAnswer()
        await self._cycle(invocation, answer, scope, body, direct=True)
        if answer.status >= 400:
            await api.error(invocation, operations.failure(answer.status, bytes(answer.content)))
        elif len(answer.content) > MAX_BUFFERED:
            await api.error(invocation, Failure("Function.ResponseTooLarge", _too_large(len(answer.content))))
        else:
            await api.respond(invocation, bytes(answer.content) or b"null")

    async def _refuse(self, api: RuntimeAPI, invocation: Invocation, event: dict[str, Any]) -> None:
        """Answer 400 to an HTTP event that cannot be read."""
        body = envelope(InvalidRequest("The event contains no readable HTTP request.", code="bad_request"))
        if events.streamed(event, self._mode, self._environ):
            stream = api.stream(invocation)
            answer = StreamedAnswer(stream, "GET")
            await answer.start(400, JSON_HEADERS)
            await answer.body(body, last=True)
            await stream.confirmed()
        else:
            headers = {"content-type": "application/json"}
            record = {"statusCode": 400, "headers": headers, "body": body.decode(), "isBase64Encoded": False}
            await api.respond(invocation, _dump(record))

    async def _cycle(
        self,
        invocation: Invocation,
        answer: Answer,
        scope: dict[str, Any],
        body: bytes,
        *,
        direct: bool = False,
        principal: str | None = None,
    ) -> None:
        extension = {"deadline": invocation.deadline, "id": invocation.id, "direct": direct, "principal": principal}
        scope["extensions"] = {"slm.request": extension}
        await Cycle(answer, body, invocation.id).run(self.app, scope, invocation.deadline)


def _dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _too_large(size: int) -> str:
    return f"The answer has {size} bytes. A buffered answer may have {MAX_BUFFERED}: request less, or stream it."
