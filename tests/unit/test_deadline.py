"""A deadline before the first token is an error; after it, the answer ends early."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from core.engine.llama import Llama
from handlers.dispatch import dispatch
from tests.fakes import FakeHost, fake_service
from tests.unit.test_chat import chat_request, events, read


def _chat(engine: Llama, words: str, seconds: float, **fields: Any) -> tuple[int, Any]:
    host = FakeHost(engine)  # type: ignore[arg-type]
    fake = fake_service(host=host, deadline_margin_s=0.0, max_tokens=0)
    bias = {"1": -100, "2": -100}
    request = chat_request(messages=[{"role": "user", "content": words}], logit_bias=bias, **fields)

    async def call() -> tuple[int, Any]:
        return await read(await dispatch(fake.service, replace(request, deadline=time.monotonic() + seconds)))

    answer = asyncio.run(call())
    assert host.leases == 0
    return answer


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_during_prefill_is_a_504(stream: bool, tiny_engine: Callable[..., Llama]) -> None:
    """An empty 200 would look like an answer. Prefill takes a thousand decode calls here, which is many seconds."""
    engine = tiny_engine("llama", n_ctx=8192, n_batch=8)

    status, body = _chat(engine, "x" * 8000, 1.0, stream=stream)

    assert (status, body["error"]["code"]) == (504, "timeout")
    assert "before the first token: the prompt has 80" in body["error"]["message"]
    assert engine.stats()["completion_tokens"] == 0


def test_an_answer_cut_by_the_deadline_ends_with_length(tiny_engine: Callable[..., Llama]) -> None:
    engine = tiny_engine("llama", n_ctx=8192)

    status, body = _chat(engine, "x", 1.0)

    assert status == 200
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] > 0


def test_a_stream_cut_by_the_deadline_ends_with_length(tiny_engine: Callable[..., Llama]) -> None:
    engine = tiny_engine("llama", n_ctx=8192)

    status, stream = _chat(engine, "x", 1.0, stream=True)

    assert status == 200
    *_, last, done = events(stream)
    assert last["choices"][0]["finish_reason"] == "length"
    assert done == "data: [DONE]"
