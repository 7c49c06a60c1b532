"""Lifespan: ASGI's startup and shutdown, once in the life of the process."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from adapters.aws_lambda.cycle import App, Message

logger = logging.getLogger(__name__)


class StartupFailed(Exception):
    """The application says that it cannot serve."""


class Lifespan:
    """`state` is what the application put there at startup; each request gets a copy."""

    def __init__(self, app: App) -> None:
        self.state: dict[str, Any] = {}
        self._app = app
        self._messages: asyncio.Queue[Message] = asyncio.Queue()
        self._started: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None

    async def startup(self) -> None:
        """Return when the application has started or knows no lifespan. Raises StartupFailed."""
        self._started = asyncio.get_running_loop().create_future()
        self._messages.put_nowait({"type": "lifespan.startup"})
        self._task = asyncio.ensure_future(self._run())
        await asyncio.wait({self._task, self._started}, return_when=asyncio.FIRST_COMPLETED)
        if self._started.done():
            self._started.result()

    async def shutdown(self) -> None:
        """Let the application clean up; returns when it has."""
        if self._task is not None and not self._task.done():
            self._messages.put_nowait({"type": "lifespan.shutdown"})
            await asyncio.wait({self._task})

    async def _run(self) -> None:
        scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": self.state}
        try:
            await self._app(scope, self._messages.get, self._send)
        except Exception as error:  # ASGI: an exception here means that lifespan is not supported
            if self._started is not None and self._started.done():
                logger.error("The application's lifespan failed.", exc_info=error)
            else:
                logger.info("The application has no lifespan (%s).", type(error).__name__)

    async def _send(self, message: Message) -> None:
        kind = message["type"]
        if kind == "lifespan.shutdown.failed":
            logger.error("The application failed to shut down: %s", message.get("message", ""))
        if self._started is None or self._started.done():
            return
        if kind == "lifespan.startup.complete":
            self._started.set_result(None)
        elif kind == "lifespan.startup.failed":
            self._started.set_exception(StartupFailed(message.get("message", "")))
