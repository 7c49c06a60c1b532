"""POST /load"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

from core.load import LoadRequest, load
from core.service import Service
from handlers import sse
from handlers.body import decode, json_response
from handlers.http import Request, Response

PROGRESS_EVERY_S = 1.0


async def post_load(service: Service, request: Request) -> Response:
    wanted = decode(request, LoadRequest)
    if wanted.stream:
        return await _streamed(service, wanted)
    return json_response(await load(service, wanted))


async def _streamed(service: Service, wanted: LoadRequest) -> Response:
    """Events `{"status": "downloading", done_bytes, total_bytes}`, then the answer or an `error`, then [DONE].

    The status waits for the first bytes, so that a repository that does not exist is still a 4xx.
    """
    loop = asyncio.get_running_loop()
    begun = asyncio.Event()
    reached = (0, 0)
    told = 0.0

    def progress(done: int, total: int) -> None:  # in the thread that downloads
        nonlocal reached, told
        reached = (done, total)
        if time.monotonic() - told > 0.1:
            told = time.monotonic()
            with contextlib.suppress(RuntimeError):  # the loop is closed; another request may share the download
                loop.call_soon_threadsafe(begun.set)

    task = asyncio.create_task(load(service, wanted, progress))
    waiter = asyncio.create_task(begun.wait())
    try:
        await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()  # raises what went wrong before the first byte
    except BaseException:
        task.cancel()
        raise
    finally:
        waiter.cancel()

    async def events() -> AsyncIterator[dict[str, Any]]:
        while not task.done():
            done, total = reached
            yield {"status": "downloading", "done_bytes": done, "total_bytes": total}
            await asyncio.wait({task}, timeout=PROGRESS_EVERY_S)
        yield task.result()

    async def close() -> None:
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # taken note of: an event told it, or nobody is there to be told

    return sse.stream(events(), close=close)
