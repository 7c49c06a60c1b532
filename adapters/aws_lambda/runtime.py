"""The runtime's loop: init, then invocation after invocation, each answered exactly once.

`Runtime` serves an ASGI application; what it loads beside it, and when, is the caller's (`__main__`).
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

from adapters.aws_lambda import context, events, snapstart
from adapters.aws_lambda import operations as direct
from adapters.aws_lambda.answer import BufferedAnswer, StreamedAnswer
from adapters.aws_lambda.cycle import App, Cycle, Receive, Send
from adapters.aws_lambda.failure import Failure, envelope
from adapters.aws_lambda.lifespan import Lifespan, StartupFailed
from adapters.aws_lambda.runtime_api import Invocation, RuntimeAPI, RuntimeGone
from handlers.http import platform, request_id

logger = logging.getLogger(__name__)

# With several loops a failed /next is tried again after so many seconds each time: streams of the others are under way.
RETRIES_S = (0.1, 0.2, 0.5, 1.0, 2.0)
INIT_S = 9.0  # of the 10 that Lambda gives; over them it starts the process again inside the first invocation
LONG_INIT_S = 130.0  # or the function's timeout, if that is longer: init where no request waits for it
MARGIN_S = 10.0  # before the end of a long init
MAX_BUFFERED = 6 * 1024 * 1024  # bytes of a buffered answer, its JSON envelope included

_JSON_HEADERS = [(b"content-type", b"application/json")]


_LONG = ("provisioned-concurrency", "snap-start", "lambda-managed-instances")


def init_seconds(environ: Mapping[str, str], timeout: float = 0) -> float:
    """How long the init phase may last, from the process's start; `timeout` is the function's (0: unknown)."""
    if environ.get("AWS_LAMBDA_INITIALIZATION_TYPE") in _LONG:
        return max(LONG_INIT_S, timeout) - MARGIN_S
    return INIT_S


class Runtime:
    """`ready` ends when everything is loaded, and never raises: init waits for it until `init_ends` (monotonic).

    `concurrency` loops share the process (Managed Instances); `hooks` is for SnapStart. `app` may be replaced by a
    hook; the lifespan stays the first one's. `afterwards` is called in a thread, with the invocation's deadline, after
    an answer's last byte and before the next event: the only time in which work runs on Lambda that nobody waits for.
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
        self._lifespan = Lifespan(app)
        self._startup: asyncio.Task[None] | None = None
        self._idle: set[asyncio.Task[None]] = set()
        self._stopping = False

    async def run(self) -> int:
        """Serve until the Runtime API is gone (1), the start fails (1, 64, 65) or SIGTERM (0): the exit status."""
        # On demand Lambda sends SIGTERM only where an extension is registered; Managed Instances always do.
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self.stop)
        apis = [RuntimeAPI(self._environ["AWS_LAMBDA_RUNTIME_API"]) for _ in range(self._concurrency)]
        readying = asyncio.ensure_future(self._when_ready())
        self._startup = asyncio.ensure_future(self._lifespan.startup())
        try:
            status = await self._init(apis[0], readying)
            if status == 0:
                status = await self._serve(apis)
            await self._lifespan.shutdown()
        except (RuntimeGone, StartupFailed) as error:
            logger.error("The runtime ends: %s.", error)
            status = 1
        finally:
            readying.cancel()
            self._startup.cancel()
            for api in apis:
                api.close()
        return status

    def stop(self) -> None:
        """End without a further event; running invocations are finished."""
        self._stopping = True
        for worker in self._idle:
            worker.cancel()

    async def _init(self, api: RuntimeAPI, readying: asyncio.Future[None]) -> int:
        assert self._startup is not None
        left = self._init_ends - time.monotonic()
        done, _ = await asyncio.wait({self._startup, readying}, timeout=max(0.0, left))
        if self._startup in done and (error := self._startup.exception()) is not None:
            logger.error("The application did not start.", exc_info=error)
            await api.init_error(Failure("Runtime.StartupFailed", "The application did not start; see the log."))
            return 1
        if len(done) < 2:
            logger.info("Init hands over after %.1f s; loading goes on.", time.monotonic() - self._began)
        if self._hooks is not None and snapstart.wanted(self._environ):
            return await snapstart.take(api, self._hooks)
        return 0

    async def _when_ready(self) -> None:
        if self._ready is not None:
            await self._ready()

    async def _serve(self, apis: list[RuntimeAPI]) -> int:
        """Return when every loop has ended. One that gets no more events does not stop the others' answers."""
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
        return 0

    async def _work(self, api: RuntimeAPI) -> None:
        me = asyncio.current_task()
        assert me is not None
        while not self._stopping:
            self._idle.add(me)
            try:
                invocation = await self._next(api)
            finally:
                self._idle.discard(me)
            try:
                await self._handle(api, invocation)
            except StartupFailed:
                raise
            except RuntimeGone as error:
                if self._concurrency == 1:
                    raise
                logger.error("The answer to %s could not be sent: %s.", invocation.id, error)
            except Exception as error:  # a fault of this runtime: the event must be answered all the same
                logger.error("The runtime failed.", exc_info=error)
                text = f"An internal error occurred; the log has the reason under request {invocation.id}."
                await api.error(invocation, Failure("Runtime.InternalError", text))
            if self._afterwards is not None:
                await asyncio.to_thread(self._afterwards, invocation.deadline)
            if self._startup is not None and self._startup.done() and self._startup.exception() is not None:
                raise StartupFailed("the application did not start")

    async def _next(self, api: RuntimeAPI) -> Invocation:
        """The next event. Raises RuntimeGone: at once with one loop, because Lambda then starts another process."""
        for delay in RETRIES_S if self._concurrency > 1 else ():
            try:
                return await api.next()
            except RuntimeGone as error:
                logger.warning("No event: %s; asking again in %.1f s.", error, delay)
                await asyncio.sleep(delay)
        return await api.next()

    async def _handle(self, api: RuntimeAPI, invocation: Invocation) -> None:
        request_id.set(invocation.id)
        platform.set(_names(invocation))
        aws = context.of(invocation, self._environ)
        try:
            event = json.loads(invocation.event)
        except (ValueError, RecursionError):
            await api.error(invocation, Failure("Function.UnknownEvent", "The event is not JSON that can be read."))
            return
        try:
            request = events.HTTPEvent.recognise(event, aws)
        except events.BadEvent as error:
            logger.warning("An HTTP event could not be read: %s", error)
            await self._refuse(api, invocation, event)
            return
        if request is not None:
            by = events.answer_by(event, invocation.deadline, self._environ)
            invocation = dataclasses.replace(invocation, deadline=by)
        if request is None:
            await self._direct(api, invocation, event, aws)
        elif events.streamed(event, self._mode, self._environ):
            stream = api.stream(invocation)
            answer = StreamedAnswer(stream, request.method)
            await self._cycle(invocation, answer, request.scope, request.body, principal=request.principal)
            await stream.confirmed()
        else:
            kept = BufferedAnswer()
            await self._cycle(invocation, kept, request.scope, request.body, principal=request.principal)
            payload = _dump(request.format(kept.status, kept.headers, bytes(kept.content)))
            if len(payload) > MAX_BUFFERED:
                body = envelope(_too_large(len(payload)), "response_too_large")
                payload = _dump(request.format(500, _JSON_HEADERS, body))
            await api.respond(invocation, payload)

    async def _direct(self, api: RuntimeAPI, invocation: Invocation, event: Any, aws: context.LambdaContext) -> None:
        try:
            scope, body = direct.to_request(event)
        except direct.UnknownEvent as error:
            await api.error(invocation, Failure("Function.UnknownEvent", str(error)))
            return
        scope["aws.event"], scope["aws.context"] = event, aws
        kept = BufferedAnswer()
        await self._cycle(invocation, kept, scope, body, direct=True)
        if kept.status >= 400:
            await api.error(invocation, direct.failure(kept.status, bytes(kept.content)))
        elif len(kept.content) > MAX_BUFFERED:
            await api.error(invocation, Failure("Function.ResponseTooLarge", _too_large(len(kept.content))))
        else:
            await api.respond(invocation, bytes(kept.content) or b"null")

    async def _refuse(self, api: RuntimeAPI, invocation: Invocation, event: dict[str, Any]) -> None:
        body = envelope("The event holds no HTTP request that can be read.", "bad_request", status=400)
        if events.streamed(event, self._mode, self._environ):
            stream = api.stream(invocation)
            answer = StreamedAnswer(stream, "GET")
            await answer.start(400, _JSON_HEADERS)
            await answer.body(body, last=True)
            await stream.confirmed()
        else:
            headers = {"content-type": "application/json"}
            record = {"statusCode": 400, "headers": headers, "body": body.decode(), "isBase64Encoded": False}
            await api.respond(invocation, _dump(record))

    async def _cycle(
        self,
        invocation: Invocation,
        answer: StreamedAnswer | BufferedAnswer,
        scope: dict[str, Any],
        body: bytes,
        *,
        direct: bool = False,
        principal: str | None = None,
    ) -> None:
        known = {"deadline": invocation.deadline, "id": invocation.id, "direct": direct, "principal": principal}
        scope["extensions"] = {"slm.request": known}
        await Cycle(answer, body, invocation.id).run(self._started_app, scope, invocation.deadline)

    async def _started_app(self, scope: Any, receive: Receive, send: Send) -> None:
        """The application, once it has started: init may have handed over before."""
        assert self._startup is not None
        if not self._startup.done():
            await asyncio.wait({self._startup})
        self._startup.result()
        scope["state"] = dict(self._lifespan.state)
        await self.app(scope, receive, send)


def _names(invocation: Invocation) -> dict[str, str]:
    """What Lambda and X-Ray call this invocation. A context variable holds it: with several loops in one process the
    variable _X_AMZN_TRACE_ID could be right for one of them only."""
    names = {"requestId": invocation.id}
    root = next((part for part in (invocation.trace_id or "").split(";") if part.startswith("Root=")), "")
    if root:
        names["xray_trace_id"] = root.removeprefix("Root=")
    return names


def _dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _too_large(size: int) -> str:
    return f"The answer has {size} bytes; a buffered one may have {MAX_BUFFERED}. Ask for less, or for a stream."
