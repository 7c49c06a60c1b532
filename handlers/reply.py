"""Answers of the model as Responses: whole, or streamed, also while the model is still being loaded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

from core.service import Service
from core.session import Session
from handlers import sse
from handlers.body import json_response
from handlers.http import Response, add_log_fields

GRACE_S = 0.5  # a load that fails this fast still becomes a status
PATIENCE_S = 3.0  # for the first piece of a model that is ready: proxies and clients give up on a silent server
WAITING_S = 1.0  # between two comments until the first piece


async def whole(beginning: Awaitable[Session], fold: Callable[[Session], Awaitable[Any]]) -> Response:
    """One JSON body."""
    turn = await beginning
    try:
        return json_response(await fold(turn))
    finally:
        _close(turn)


async def streamed(
    service: Service,
    beginning: Coroutine[Any, Any, Session],
    events: Callable[[Session], AsyncIterator[Any]],
) -> Response:
    """Server-sent events. The status waits for the first piece, so that a request that cannot be answered gets a 4xx.

    It does not wait for long. While the model loads, while the request is queued or its prompt is read, the 200 goes
    out early and comments follow: a client or a proxy would give up otherwise. What goes wrong after that is an
    `error` event.
    """
    task = asyncio.ensure_future(beginning)
    patience = PATIENCE_S if service.host.state().status == "ready" else GRACE_S
    try:
        await asyncio.wait({task}, timeout=patience)
    except asyncio.CancelledError:
        await _abandon(task)
        raise
    if task.done():
        task.result()  # raises what is wrong

    async def all_events() -> AsyncIterator[Any]:
        turn = await task
        async for event in events(turn):
            yield event

    def silence() -> tuple[float, str]:
        if task.done():
            return sse.SILENCE_S, "ping"
        state = service.host.state()
        if state.status == "ready":
            return WAITING_S, "waiting"
        percent = state.loading.percent if state.loading else None
        return WAITING_S, "loading" if percent is None else f"loading {percent}%"

    return sse.stream(all_events(), close=lambda: _abandon(task), silence=silence)


async def _abandon(task: asyncio.Future[Session]) -> None:
    """Free what a beginning has taken, wherever it stands."""
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
    if not task.cancelled() and task.exception() is None:
        _close(task.result())


def _close(turn: Session) -> None:
    turn.close()
    add_log_fields(model=turn.card.name, prompt_tokens=turn.prompt_tokens, completion_tokens=turn.completion_tokens)
