"""Every kind of generating model runs two sequences at once and survives a cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from core.engine.interface import GenerationRequest, Sampling
from core.engine.llama import Llama

GENERATING = ("llama", "llama-49k", "llama-262k", "gemma", "lfm2", "mamba", "control", "spaced")


async def _tokens(engine: Llama, request: GenerationRequest) -> tuple[str, int]:
    text, tokens = "", 0
    async for piece in engine.generate(request):
        text, tokens = text + piece.text, tokens + piece.tokens
    return text, tokens


def _request(engine: Llama, text: str, max_tokens: int) -> GenerationRequest:
    prompt = tuple(engine.tokenize(text, special=False))
    is_end = engine._vocabulary.is_end
    endless = {token: -100.0 for token in range(min(engine.card.n_vocab, 300)) if is_end(token)}
    return GenerationRequest(prompt, Sampling(temperature=0, logit_bias=endless), max_tokens=max_tokens)


@pytest.mark.parametrize("kind", GENERATING)
def test_concurrent_sequences_give_the_same_answers_as_alone(kind: str, tiny_engine: Callable[..., Llama]) -> None:
    engine = tiny_engine(kind)
    requests = [_request(engine, "a first prompt", 12), _request(engine, "another one that is longer", 12)]

    async def together() -> list[tuple[str, int]]:
        return await asyncio.gather(*(_tokens(engine, request) for request in requests))

    async def alone() -> list[tuple[str, int]]:
        return [await _tokens(engine, request) for request in requests]

    answers = asyncio.run(together())
    assert [tokens for _, tokens in answers] == [12, 12]
    assert asyncio.run(alone()) == answers
    assert answers[0] != answers[1]


@pytest.mark.parametrize("kind", GENERATING)
def test_cancelling_a_sequence_does_not_change_another(kind: str, tiny_engine: Callable[..., Llama]) -> None:
    engine = tiny_engine(kind)
    continuing, cancelled = _request(engine, "a first prompt", 24), _request(engine, "to be cancelled", 500)

    async def run() -> tuple[str, int]:
        answer = asyncio.ensure_future(_tokens(engine, continuing))
        stream = engine.generate(cancelled)
        async for _ in stream:
            stream.cancel()
        return await answer

    answer = asyncio.run(run())
    assert answer[1] == 24
    assert answer == asyncio.run(_tokens(engine, continuing))
    assert engine.stats()["completion_tokens"] < 500
