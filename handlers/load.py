"""POST /load"""

from __future__ import annotations

import asyncio
import contextlib
import time

from core.load import LoadProgress, LoadRequest, load
from core.service import Service
from handlers import sse
from handlers.http import Request, Response, decode, json_response

PROGRESS_EVERY_S = 1.0
WAKE_EVERY_S = 0.1  # the download reports every block; the event loop is not woken up more often than this


async def post_load(service: Service, request: Request) -> Response:
    body = decode(request, LoadRequest)
    if body.stream:
        return await sse.stream(lambda send: _stream(service, body, send))
    return json_response(await load(service, body))


async def _stream(service: Service, body: LoadRequest, send: sse.Send) -> None:
    """Send progress events, then the result.

    The first event waits for the first bytes, so that a repository that does not exist gets a 4xx.
    """
    loop = asyncio.get_running_loop()
    started = asyncio.Event()
    progress = LoadProgress(0, 0)
    last_wake = 0.0

    def report(done: int, total: int) -> None:  # in the download's thread
        nonlocal progress, last_wake
        progress = LoadProgress(done, total)
        if time.monotonic() - last_wake > WAKE_EVERY_S:
            last_wake = time.monotonic()
            with contextlib.suppress(RuntimeError):  # the loop is closed; another request may share the download
                loop.call_soon_threadsafe(started.set)

    task = asyncio.create_task(load(service, body, report))
    task.add_done_callback(lambda _: started.set())
    try:
        # 1) Wait for the first bytes, or for the result of a model that is already here.
        await started.wait()
        # 2) Report progress until the download ends.
        while not task.done():
            send(progress)
            await asyncio.wait({task}, timeout=PROGRESS_EVERY_S)
        # 3) Send the result, or raise what went wrong.
        send(task.result())
    finally:
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # mark it as retrieved, so that asyncio does not log it
