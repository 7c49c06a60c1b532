"""Continue one or several prompts: OpenAI's legacy completions. A completion is folded from its stream's chunks."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator

from msgspec import UNSET

from core import session as sessions
from core.chat import fingerprint, new_id
from core.engine.grammar import json_schema
from core.engine.interface import Delta, Engine, GenerationRequest, TokenLogprob
from core.engine.prompt import infill, text
from core.errors import ContextOverflow, InvalidRequest
from core.service import Service
from core.session import Session
from core.wire import completions as wire
from core.wire import fields
from core.wire.completions import Choice, Completion, CompletionRequest, Offsets, Prompt


async def check(service: Service, request: CompletionRequest) -> None:
    """Check what needs no loaded model: its name, `n`, `best_of` and the schema. Raises InvalidRequest."""
    sessions.check_model(service, request.model)
    n_max = service.settings.n_parallel
    if request.candidates > n_max:
        name = "n" if request.best_of is None else "best_of"
        raise InvalidRequest(f"'{name}' must be from 1 to {n_max} (N_PARALLEL), got {request.candidates}.", param=name)
    if request.response_format is not None and (schema := request.response_format.answer_schema) is not None:
        await asyncio.to_thread(json_schema.grammar, schema, "response_format")


async def begin(
    service: Service, request: CompletionRequest, *, tenant: str = "", ends: float | None = None
) -> Session:
    """Start a request that has passed `check` and wait for its first delta. The caller closes the Session.

    Raises InvalidRequest, ModelNotFound, ContextOverflow, Busy, ModelUnavailable and DeadlineExceeded.
    """
    return await sessions.begin_all(
        service, request.model, lambda engine: _generation_requests(engine, request, tenant, ends), ends
    )


def _generation_requests(
    engine: Engine, request: CompletionRequest, tenant: str, ends: float | None
) -> tuple[GenerationRequest, ...]:
    """Translate each prompt for the engine. Blocks."""
    grammar = None
    if request.response_format is not None and (schema := request.response_format.answer_schema) is not None:
        grammar = json_schema.grammar(schema, "response_format")
        engine.check_grammar(grammar)
    sampling = fields.sampling(request, engine.card.n_vocab)
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    max_tokens = wire.MAX_TOKENS if request.max_tokens is None else request.max_tokens
    needs_logprobs = request.logprobs is not None or request.candidates > (request.n or 1)
    return tuple(
        GenerationRequest(
            prompt=tokens,
            sampling=sampling,
            max_tokens=max_tokens or 1,  # the engine makes at least one, which is not shown
            n=request.candidates,
            stop=tuple(stop),
            grammar=grammar,
            top_logprobs=(request.logprobs or 0) if needs_logprobs else None,
            tenant=tenant,
            deadline=ends,
            score_prompt=bool(request.echo) and request.logprobs is not None,
        )
        for tokens in [_prompt_tokens(engine, prompt, request.suffix) for prompt in request.prompts]
    )


def _prompt_tokens(engine: Engine, prompt: Prompt, suffix: str | None) -> tuple[int, ...]:
    """Return a prompt's tokens. Token ids are taken as they are: they may be control tokens, and get no BOS."""
    if suffix:
        tokens = _infill_tokens(engine, prompt, suffix)
    elif isinstance(prompt, str):
        tokens = text.bos(engine) + text.tokenize(engine, prompt, param="prompt")
    else:
        tokens = prompt
        fields.check_tokens(tokens, engine.card.n_vocab, "prompt")
    if not tokens:
        raise InvalidRequest(
            "'prompt' must not be empty: this model has no token to begin a text with.", param="prompt"
        )
    if len(tokens) + 1 > engine.card.n_ctx:
        raise ContextOverflow(len(tokens), engine.card.n_ctx, engine.card.remedy, param="prompt")
    return tuple(tokens)


def _infill_tokens(engine: Engine, prompt: Prompt, suffix: str) -> list[int]:
    """Return the prompt whose continuation belongs between `prompt` and `suffix`."""
    tokens = engine.card.infill
    if tokens is None:
        raise InvalidRequest(
            f"'suffix' needs a model with fill-in-the-middle tokens, and '{engine.card.name}' has none; leave it out.",
            param="suffix",
        )
    if isinstance(prompt, str):
        before = text.tokenize(engine, prompt, param="prompt", continued=True)
    else:
        fields.check_tokens(prompt, engine.card.n_vocab, "prompt")
        before = prompt
    after = text.tokenize(engine, suffix, param="suffix", continued=True)
    return text.bos(engine) + infill.fill(tokens, before, after)


async def complete(session: Session, request: CompletionRequest) -> Completion:
    """Return the whole completion, with the best `n` of `best_of` candidates: those of the highest mean logprob."""
    logprobs: dict[int, list[float]] = defaultdict(list)

    async def deltas() -> AsyncIterator[Delta]:
        async for delta in session:
            logprobs[delta.index] += [token.logprob for token in delta.logprobs]
            yield delta

    completion = wire.fold([chunk async for chunk in _chunks(deltas(), session, request, with_usage=True)])
    n = request.n or 1
    if request.candidates > n:
        means = {index: sum(each) / len(each) for index, each in logprobs.items() if each}
        completion.choices = wire.best(completion.choices, means, request.candidates, n)
    return completion


def stream(session: Session, request: CompletionRequest) -> AsyncIterator[Completion]:
    """Yield the completion as chunks, and its usage at the end if `stream_options.include_usage` is true."""
    options = request.stream_options
    return _chunks(session, session, request, with_usage=bool(options and options.include_usage))


async def _chunks(
    deltas: AsyncIterator[Delta], session: Session, request: CompletionRequest, *, with_usage: bool
) -> AsyncIterator[Completion]:
    """Yield for each choice the echo of its prompt, its text and its finish reason, then the usage of all choices."""
    head = wire.Head(new_id("cmpl"), int(time.time()), session.card.name, fingerprint(session))
    no_usage = None if with_usage else UNSET
    echoes = _echoes(session, request) if request.echo else [""] * len(session.requests)
    first_tokens = [_first_token(session.engine, generation.prompt) for generation in session.requests]
    prompts: dict[int, tuple[TokenLogprob, ...]] = {}  # by the place of the prompt, if it is scored
    offsets: dict[int, Offsets] = {}
    async for delta in deltas:
        # 1) The prompt, once a choice.
        place = delta.index // request.candidates
        if delta.index not in offsets:
            echo = echoes[place]
            offsets[delta.index] = Offsets(len(echo))
            if request.echo:
                logprobs = None
                if request.logprobs is not None:
                    # The first sequence of a request begins before its forks.
                    scored = prompts.setdefault(place, (first_tokens[place], *delta.prompt_logprobs))
                    logprobs = wire.echoed(scored, echo)
                yield head.chunk([Choice(delta.index, echo, logprobs)], no_usage)
        # 2) The text, with the tokens that begin in it, and why the choice ended.
        answer, tokens = ("", ()) if request.max_tokens == 0 else (delta.text, delta.logprobs)
        last = delta.finish_reason is not None
        logprobs = None if request.logprobs is None else offsets[delta.index].push(tokens, answer, last=last)
        if answer or last or (logprobs is not None and logprobs.tokens):
            cause = UNSET if delta.cause is None else delta.cause
            yield head.chunk([Choice(delta.index, answer, logprobs, delta.finish_reason, cause)], no_usage)
    # 3) The usage of all choices.
    if with_usage:
        generated = 0 if request.max_tokens == 0 else session.completion_tokens
        yield head.chunk([], fields.usage(session.prompt_tokens, generated, session.cached_tokens))


def _first_token(engine: Engine, prompt: tuple[int, ...]) -> TokenLogprob:
    """Return the first token of a prompt, which has no logprob."""
    return TokenLogprob(
        engine.token_pieces(prompt[:1], special=True)[0],
        0.0,
        control=engine.token_pieces(prompt[:1], special=False) == [b""],
    )


def _echoes(session: Session, request: CompletionRequest) -> list[str]:
    """Return the text of each prompt. Control tokens have no text."""
    return [
        prompt
        if isinstance(prompt, str)
        else b"".join(session.engine.token_pieces(prompt, special=False)).decode(errors="replace")
        for prompt in request.prompts
    ]
