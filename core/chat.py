"""Answer a chat with a completion or a stream of chunks. A completion is folded from the chunks of a stream."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from hashlib import sha256

from msgspec import UNSET

from core import conversation
from core.engine.interface import Text
from core.service import Service
from core.session import Session
from core.wire import chat as wire
from core.wire import fields
from core.wire.chat import ChatRequest, Chunk, Completion


async def check(service: Service, request: ChatRequest) -> None:
    """Check what needs no loaded model. Raises InvalidRequest or ModelNotFound."""
    await conversation.check(service, request.model, wire.conversation(request))


async def begin(service: Service, request: ChatRequest, *, tenant: str = "", ends: float | None = None) -> Session:
    """Start a request that has passed `check` and wait for its first delta. The caller closes the Session.

    Raises InvalidRequest, ModelNotFound, ContextOverflow, Busy, ModelUnavailable and DeadlineExceeded.
    """
    return await conversation.begin(service, request.model, wire.conversation(request), tenant=tenant, ends=ends)


async def complete(session: Session, request: ChatRequest) -> Completion:
    """Return the whole completion."""
    chunks = [chunk async for chunk in _chunks(session, request, with_usage=True)]
    return wire.fold(chunks, logprobs=bool(request.logprobs))


def stream(session: Session, request: ChatRequest) -> AsyncIterator[Chunk]:
    """Yield the completion as chunks, and its usage at the end if `stream_options.include_usage` is true."""
    options = request.stream_options
    return _chunks(session, request, with_usage=bool(options and options.include_usage))


async def _chunks(session: Session, request: ChatRequest, *, with_usage: bool) -> AsyncIterator[Chunk]:
    """Yield for each choice its role, its deltas and its finish reason, then the usage of all choices."""
    head = wire.ChunkHead(new_id("chatcmpl"), int(time.time()), session.card.name, fingerprint(session))
    no_usage = None if with_usage else UNSET  # OpenAI sends "usage": null in every chunk before the last
    started: set[int] = set()

    async for delta in session:
        # 1) The role, once a choice.
        if delta.index not in started:
            started.add(delta.index)
            yield head.chunk(wire.ChunkChoice(delta.index, wire.ChunkDelta("assistant", "", None)), no_usage)
        # 2) The text.
        text = "".join([event.text for event in delta.events if isinstance(event, Text)])
        if text or delta.logprobs:
            logprobs = wire.logprobs(delta.logprobs) if request.logprobs else None
            yield head.chunk(wire.ChunkChoice(delta.index, wire.ChunkDelta(content=text), logprobs), no_usage)
        # 3) Why the choice ended.
        if delta.finish_reason is not None:
            cause = UNSET if delta.cause is None else delta.cause
            end = wire.ChunkChoice(delta.index, wire.ChunkDelta(), None, delta.finish_reason, cause)
            yield head.chunk(end, no_usage)
    # 4) The usage of all choices.
    if with_usage:
        yield head.chunk(None, usage(session))


def usage(session: Session) -> fields.Usage:
    return fields.usage(session.prompt_tokens, session.completion_tokens, session.cached_tokens)


def new_id(kind: str) -> str:
    return f"{kind}-{os.urandom(12).hex()}"


def fingerprint(session: Session) -> str:
    """Identify the model file and its configuration. If the fingerprint changes, a seed may give another text."""
    card = session.card
    identity = f"{card.path} {card.size_bytes} {card.description} {session.config}"
    return "fp_" + sha256(identity.encode()).hexdigest()[:10]
