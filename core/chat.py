"""Answer a chat with a completion or a stream of chunks. A completion is folded from the chunks of a stream."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from hashlib import sha256

from msgspec import UNSET

from core import conversation
from core.engine.interface import Delta
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
    calls = [wire.CallWriter(legacy=request.legacy) for _ in range(request.n or 1)]

    # 1) The role of each choice, in order: a client may index its choices by arrival.
    opening = None if request.tools or request.functions else ""
    for index in range(len(calls)):
        yield head.chunk(wire.ChunkChoice(index, wire.ChunkDelta("assistant", opening, None)), no_usage)
    async for delta in session:
        # 2) Text, reasoning and calls.
        logprobs = fields.logprobs(delta.logprobs) if request.logprobs and delta.logprobs else None
        parts = wire.deltas(delta.events, calls[delta.index])
        if logprobs is not None and not parts:
            parts = [wire.ChunkDelta(content="")]
        for part in parts:
            yield head.chunk(wire.ChunkChoice(delta.index, part, logprobs), no_usage)
            logprobs = None
        # 3) Why the choice ended.
        if delta.finish_reason is not None:
            cause = UNSET if delta.cause is None else delta.cause
            end = wire.ChunkChoice(delta.index, wire.ChunkDelta(), None, finish_reason(delta, request), cause)
            yield head.chunk(end, no_usage)
    # 4) The usage of all choices.
    if with_usage:
        yield head.chunk(None, usage(session))


def finish_reason(delta: Delta, request: ChatRequest) -> wire.ChatFinishReason | None:
    if delta.finish_reason == "tool_calls" and request.legacy:
        return "function_call"
    return delta.finish_reason


def usage(session: Session) -> fields.Usage:
    return fields.usage(
        session.prompt_tokens, session.completion_tokens, session.cached_tokens, session.reasoning_tokens
    )


def new_id(kind: str) -> str:
    return f"{kind}-{os.urandom(12).hex()}"


def fingerprint(session: Session) -> str:
    """Identify the model file and its configuration. If the fingerprint changes, a seed may give another text."""
    card = session.card
    identity = f"{card.path} {card.size_bytes} {card.description} {session.config}"
    return "fp_" + sha256(identity.encode()).hexdigest()[:10]
