"""Chat: messages in, a completion or its chunks out. There is one path: a completion is a folded stream."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from hashlib import sha256

from msgspec import UNSET

from core import session as turns
from core.engine.grammar import json_schema as constraints
from core.engine.interface import Engine, FinishReason, GenerationRequest, Sampling, TokenLogprob
from core.engine.prompt import templates
from core.errors import InvalidRequest
from core.service import Service
from core.session import Session
from core.wire import chat as wire
from core.wire.chat import ChatRequest, plain
from core.wire.fields import sampler_seed, sampler_temperature, token_bias


async def check(service: Service, request: ChatRequest) -> None:
    """What can be told without the model: its name, `n`, the schema. Raises InvalidRequest or ModelNotFound."""
    turns.check_model(service, request.model)
    most = service.settings.n_parallel
    if (request.n or 1) > most:
        raise InvalidRequest(f"'n' must be from 1 to {most} (N_PARALLEL), got {request.n}.", param="n")
    if request.response_format is not None and (schema := request.response_format.wanted) is not None:
        await asyncio.to_thread(constraints.grammar, schema, "response_format")


async def begin(service: Service, request: ChatRequest, *, tenant: str = "", ends: float | None = None) -> Session:
    """Start to answer what `check` has let pass; returns when the first piece is there. The caller closes the Session.

    Raises InvalidRequest, ModelNotFound, ContextOverflow, Busy, ModelUnavailable and DeadlineExceeded.
    """
    # A small model that repeats itself would go on until the context is full: minutes of everybody's time.
    most = request.max_completion_tokens or request.max_tokens or service.settings.max_tokens or None
    return await turns.begin(
        service, request.model, lambda engine: _generation_request(engine, request, most, tenant, ends), ends
    )


def _generation_request(
    engine: Engine, request: ChatRequest, max_tokens: int | None, tenant: str, ends: float | None
) -> GenerationRequest:
    grammar = None
    if request.response_format is not None and (schema := request.response_format.wanted) is not None:
        grammar = constraints.grammar(schema, "response_format")
        engine.check_grammar(grammar)
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    return GenerationRequest(
        prompt=templates.prompt(engine, plain(request.messages)),
        sampling=_sampling(request, engine.card.n_vocab),
        max_tokens=max_tokens,
        n=request.n or 1,
        stop=(*stop, *templates.stops(engine.card)),
        grammar=grammar,
        top_logprobs=logprobs,
        tenant=tenant,
        deadline=ends,
    )


def _sampling(request: ChatRequest, n_vocab: int) -> Sampling:
    return Sampling(
        temperature=1.0 if request.temperature is None else sampler_temperature(request.temperature),
        top_p=1.0 if request.top_p is None else request.top_p,
        top_k=max(0, request.top_k or 0),
        min_p=request.min_p or 0.0,
        repeat_penalty=request.repeat_penalty or 1.0,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        seed=sampler_seed(request.seed),
        logit_bias=token_bias(request.logit_bias, n_vocab),
    )


async def complete(turn: Session, request: ChatRequest) -> wire.Completion:
    """The whole wire."""
    n = request.n or 1
    texts: list[list[str]] = [[] for _ in range(n)]
    tokens: list[list[TokenLogprob]] = [[] for _ in range(n)]
    finishes: list[FinishReason] = ["stop"] * n
    async for piece in turn.pieces():
        texts[piece.index].append(piece.text)
        tokens[piece.index].extend(piece.logprobs)
        if piece.finish_reason is not None:
            finishes[piece.index] = piece.finish_reason
    return wire.Completion(
        id=new_id("chatcmpl"),
        created=int(time.time()),
        model=turn.card.name,
        choices=[
            wire.Choice(
                index=index,
                message=wire.AssistantMessage("".join(texts[index])),
                finish_reason=finishes[index],
                logprobs=wire.logprobs(tokens[index]) if request.logprobs else None,
            )
            for index in range(n)
        ],
        usage=usage(turn),
        system_fingerprint=fingerprint(turn),
    )


async def chunks(turn: Session, request: ChatRequest) -> AsyncIterator[wire.Chunk]:
    """The answer as it comes: role, text, finish of each choice, and usage at the end if it was asked for."""
    counted = bool(request.stream_options and request.stream_options.include_usage)
    chunk_id, created, model, print_ = new_id("chatcmpl"), int(time.time()), turn.card.name, fingerprint(turn)
    between = None if counted else UNSET
    opened: set[int] = set()

    def chunk(choice: wire.ChunkChoice) -> wire.Chunk:
        return wire.Chunk(chunk_id, created, model, print_, (choice,), between)

    async for piece in turn.pieces():
        if piece.index not in opened:
            opened.add(piece.index)
            yield chunk(wire.ChunkChoice(piece.index, wire.Delta("assistant", "", None)))
        if piece.text or piece.logprobs:
            logprobs = wire.logprobs(piece.logprobs) if request.logprobs else None
            yield chunk(wire.ChunkChoice(piece.index, wire.Delta(content=piece.text), logprobs))
        if piece.finish_reason is not None:
            yield chunk(wire.ChunkChoice(piece.index, wire.Delta(), None, piece.finish_reason))
    if counted:
        yield wire.Chunk(chunk_id, created, model, print_, (), usage(turn))


def usage(turn: Session) -> wire.Usage:
    return wire.usage(turn.prompt_tokens, turn.completion_tokens, turn.cached_tokens)


def new_id(kind: str) -> str:
    return f"{kind}-{os.urandom(12).hex()}"


def fingerprint(turn: Session) -> str:
    """Changes when the model file or how it is loaded changes: the same seed may then give another text."""
    card = turn.card
    known = f"{card.path} {card.size_bytes} {card.description} {turn.config}"
    return "fp_" + sha256(known.encode()).hexdigest()[:10]
