"""Answer Anthropic's messages with a message or its events. A message is folded from the events of a stream."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterable
from typing import Any

from core import conversation, tokens
from core.errors import ApiError
from core.service import Service
from core.session import Session
from core.wire import messages as wire
from core.wire.messages import AnswerMessage, CountRequest, MessagesRequest, StreamEvent


async def check(service: Service, request: MessagesRequest) -> None:
    """Check what needs no loaded model. Raises InvalidRequest or ModelNotFound."""
    await conversation.check(service, request.model, wire.conversation(request))


async def begin(service: Service, request: MessagesRequest, *, tenant: str = "", ends: float | None = None) -> Session:
    """Start a request that has passed `check` and wait for its first delta. The caller closes the Session."""
    return await conversation.begin(service, request.model, wire.conversation(request), tenant=tenant, ends=ends)


async def complete(session: Session, request: MessagesRequest) -> AnswerMessage:
    """Return the whole message."""
    return wire.fold([event async for event in stream(session, request)])


async def stream(session: Session, request: MessagesRequest) -> AsyncIterator[StreamEvent]:
    """Yield the start of the message, its content blocks, why it ended, and its stop."""
    # 1) The start, with the tokens of the prompt.
    yield wire.MessageStart(AnswerMessage(new_id("msg"), request.model or session.card.name, [], _usage(session)))
    blocks = wire.BlockWriter(new_id)
    async for delta in session:
        # 2) The content blocks.
        for event in blocks.write(delta.events):
            yield event
        # 3) Why the message ended, and all its tokens.
        if delta.finish_reason is not None:
            for event in blocks.close():
                yield event
            end = wire.stop_reason(delta, tuple(request.stop_sequences or ()))
            yield wire.MessageDelta(end, _usage(session))
    yield wire.MessageStop()


def failure(error: ApiError, latest: StreamEvent | None) -> Iterable[wire.ErrorEvent]:
    """Yield the event of an error after the status was sent."""
    body: dict[str, Any] = error.anthropic_body("")["error"]
    yield wire.ErrorEvent(wire.ErrorBody(body["type"], body["message"]))


async def count(service: Service, request: CountRequest, ends: float | None = None) -> wire.TokenCount:
    """Return the number of the prompt's tokens, as the real request would have it."""
    prompt = await tokens.prompt(service, request.model, wire.conversation(request), ends)
    return wire.TokenCount(len(prompt.tokens))


def new_id(kind: str) -> str:
    return f"{kind}_{os.urandom(12).hex()}"


def _usage(session: Session) -> wire.Usage:
    cached = session.cached_tokens
    return wire.Usage(session.prompt_tokens - cached, session.completion_tokens, cached)
