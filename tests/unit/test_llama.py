"""Llama on tiny models: limits, penalties, and requests that fail half-way."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest

from core.engine import llama
from core.engine.generation import GenerationStream
from core.engine.grammar.compiler import GrammarCompiler
from core.engine.interface import GenerationRequest, Sampling
from core.engine.llama import Llama
from core.errors import ContextOverflow

LoadTiny = Callable[..., Llama]


def _generate(engine: Llama, request: GenerationRequest) -> list[bytes]:
    """Return the tokens of the answer."""

    async def run() -> list[bytes]:
        return [entry.token async for piece in engine.generate(request) for entry in piece.logprobs]

    return asyncio.run(run())


def test_a_context_beyond_the_training_is_reduced(tiny_engine: LoadTiny, caplog: pytest.LogCaptureFixture) -> None:
    """A warning is logged, and the error does not advise to raise N_CTX."""
    with caplog.at_level(logging.WARNING, logger="slm.engine"):
        engine = tiny_engine("llama", n_ctx=16384)
    assert "was trained on 8192 tokens" in caplog.text

    async def ask() -> None:
        engine.generate(GenerationRequest((3,) * 8192))

    assert engine.card.n_ctx == 8192
    with pytest.raises(ContextOverflow, match=r"holds 8192.*N_CTX cannot raise it: shorten the prompt"):
        asyncio.run(ask())


def test_a_context_below_the_training_may_be_raised(tiny_engine: LoadTiny, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="slm.engine"):
        engine = tiny_engine("llama", n_ctx=256)
    assert "was trained on" not in caplog.text

    async def ask() -> None:
        engine.generate(GenerationRequest((3,) * 256))

    with pytest.raises(ContextOverflow, match="Shorten the prompt or raise N_CTX"):
        asyncio.run(ask())


def test_only_repeat_penalty_counts_the_prompt(tiny_engine: LoadTiny) -> None:
    """For some of 60 prompts the first token is one of the prompt's. Only `repeat_penalty` changes it."""
    engine = tiny_engine("llama")
    repeated = changed = 0
    for code in range(33, 93):
        words = f"{chr(code)} and {chr(code + 1)}".encode() + bytes(range(128, 250))
        prompt = tuple(3 + byte for byte in words)

        def first(prompt: tuple[int, ...] = prompt, **penalty: float) -> bytes:
            sampling = Sampling(temperature=0, logit_bias={1: -100.0, 2: -100.0}, **penalty)
            return _generate(engine, GenerationRequest(prompt, sampling, max_tokens=1, top_logprobs=0))[0]

        plain = first()
        if plain not in words:
            continue
        repeated += 1
        changed += first(repeat_penalty=2.0) != plain
        assert first(presence_penalty=2.0, frequency_penalty=2.0) == plain
    assert repeated > 10
    assert changed > repeated // 2


def test_a_request_that_cannot_be_built_frees_its_samplers(
    tiny_engine: LoadTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samplers are C memory. The stream is cancelled, so its timer does not wake the engine."""
    freed: list[int] = []
    streams: list[GenerationStream] = []

    class Sampler(llama.Sampler):
        def __init__(self, *args: Any, index: int, **kwargs: Any) -> None:
            if index == 2:
                raise MemoryError
            super().__init__(*args, index=index, **kwargs)
            self.index = index

        def free(self) -> None:
            freed.append(self.index)
            super().free()

    class Stream(GenerationStream):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            streams.append(self)

    monkeypatch.setattr(llama, "Sampler", Sampler)
    monkeypatch.setattr(llama, "GenerationStream", Stream)
    engine = tiny_engine("llama")

    async def ask() -> None:
        with pytest.raises(MemoryError):
            engine.generate(GenerationRequest((3, 4, 5), n=3, deadline=1e12))

    asyncio.run(ask())
    assert freed == [0, 1]
    assert [stream.cancelled for stream in streams] == [True]


def test_a_request_takes_over_a_tokenizer_that_is_being_prepared(tiny_engine: LoadTiny) -> None:
    """It does not wait for the preparing thread, which is paused here until the request is done."""
    engine = tiny_engine("llama-49k")
    compiler = GrammarCompiler(engine._bindings, engine._model)
    built: list[Any] = []

    def pause() -> None:
        if not built:
            thread = threading.Thread(target=lambda: built.append(compiler.tokenizer()))
            thread.start()
            thread.join(60)
            assert built

    compiler.prepare(pause)
    assert compiler.tokenizer() is built[0]
    assert built[0].vocab_size == 49152
