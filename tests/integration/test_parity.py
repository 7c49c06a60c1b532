"""Requests through uvicorn, streamed Lambda and buffered Lambda get the same status and body."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from contextlib import asynccontextmanager
from http.client import HTTPConnection
from typing import Any, NamedTuple

import pytest
import uvicorn

from adapters.serving.asgi import create_app
from core.settings import keys
from infra.emulator.event import from_buffered, to_event
from tests.fakes import ScriptedEmbedder, ScriptedEngine, fake_service
from tests.lambda_runtime import runtime

MESSAGES = [{"role": "user", "content": "Hällo, 東京 🎉"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
KEY = {"authorization": "Bearer secret"}
JSON = {"content-type": "application/json"}


class Call(NamedTuple):
    method: str
    path: str
    body: bytes = b""
    headers: dict[str, str] = {**KEY, **JSON}  # noqa: RUF012 - never changed


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


def post(path: str, body: Any, **headers: str) -> Call:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Call("POST", path, content, {**KEY, **JSON, **headers})


def chat(**fields: Any) -> Call:
    return post("/v1/chat/completions", {"model": "fake-1b", "messages": MESSAGES, **fields})


def message(**fields: Any) -> Call:
    return post("/v1/messages", {"model": "fake-1b", "max_tokens": 90, "messages": MESSAGES, **fields})


def responses(**fields: Any) -> Call:
    return post("/v1/responses", {"model": "fake-1b", "input": "Hällo, 東京 🎉", **fields})


CALLS = {
    "health": Call("GET", "/health", headers={}),
    "health head": Call("HEAD", "/health"),
    "health with key": Call("GET", "/health"),
    "models": Call("GET", "/models"),
    "v1 models": Call("GET", "/v1/models"),
    "one model": Call("GET", "/v1/models/fake-1b"),
    "metrics, user key": Call("GET", "/metrics"),
    "openapi": Call("GET", "/openapi.json", headers={}),
    "docs": Call("GET", "/docs", headers={}),
    "no such model": Call("GET", "/v1/models/other%2Fmodel"),
    "no key": Call("GET", "/v1/models", headers={}),
    "wrong key": Call("GET", "/v1/models", headers={"x-api-key": "wrong"}),
    "key in x-api-key": Call("GET", "/v1/models", headers={"x-api-key": "secret"}),
    "options": Call("OPTIONS", "/v1/chat/completions"),
    "no such path": Call("GET", "/nowhere"),
    "encoded path": Call("GET", "/no%20where/%E6%9D%B1?a=%C3%A9&a=2"),
    "wrong method": Call("DELETE", "/v1/models"),
    "chat": chat(),
    "chat, cut": chat(max_tokens=2),
    "chat, two choices": chat(n=2),
    "chat, stop": chat(stop=["dear"]),
    "chat, streamed": chat(stream=True),
    "chat, streamed with usage": chat(stream=True, stream_options={"include_usage": True}),
    "chat, streamed, long": chat(stream=True, max_tokens=400),
    "chat, too long": chat(messages=[{"role": "user", "content": "x" * 600}]),
    "chat, too long, streamed": chat(messages=[{"role": "user", "content": "x" * 600}], stream=True),
    "chat, wrong model": chat(model="gpt-4o"),
    "chat, wrong type": chat(temperature="hot"),
    "chat, no messages": chat(messages=[]),
    "chat, not JSON": post("/v1/chat/completions", b"{"),
    "chat, not UTF-8": post("/v1/chat/completions", b'{"messages":"\xff"}'),
    "chat, empty": post("/v1/chat/completions", b""),
    "chat, form": post("/v1/chat/completions", b"a=b", **{"content-type": "application/x-www-form-urlencoded"}),
    "completion": post("/v1/completions", {"prompt": ["Hällo, ", "東京"], "n": 2, "echo": True}),
    "completion, cut": post("/completions", {"prompt": [72, 105], "max_tokens": 2}),
    "completion, streamed": post("/v1/completions", {"prompt": "Hällo, 東京 🎉", "stream": True, "max_tokens": 99}),
    "completion, too long": post("/v1/completions", {"prompt": "x" * 600, "stream": True}),
    "completion, no prompt": post("/v1/completions", {}),
    "infill": post("/infill", {"input_prefix": "Hällo, ", "input_suffix": "!", "response_fields": ["content", "stop"]}),
    "infill, streamed": post("/infill", {"input_prefix": "", "input_suffix": "東京", "stream": True}),
    "infill, no suffix": post("/infill", {"input_prefix": "a"}),
    "input tokens": post("/v1/chat/completions/input_tokens", {"messages": MESSAGES}),
    "input tokens, no messages": post("/chat/completions/input_tokens", {}),
    "responses": responses(),
    "responses, streamed": responses(stream=True),
    "responses, cut": responses(stream=True, max_output_tokens=2),
    "responses, empty input": responses(input=[], max_output_tokens=1),
    "responses, no input": responses(input=None),
    "responses, too long": responses(input="x" * 600, stream=True),
    "responses, no store": responses(previous_response_id="resp_1"),
    "responses input tokens": post("/v1/responses/input_tokens", {"input": "Hällo"}),
    "no such response": Call("GET", "/v1/responses/resp_1"),
    "delete no such response": Call("DELETE", "/v1/responses/resp_1"),
    "no such input items": Call("GET", "/v1/responses/resp_1/input_items?limit=2"),
    "tokenize": post("/tokenize", {"content": "Hällo, 東京 🎉", "with_pieces": True}),
    "tokenize, messages": post("/tokenize", {"messages": MESSAGES, "return_token_strs": True}),
    "tokenize, nothing": post("/tokenize", {}),
    "detokenize": post("/detokenize", {"tokens": [240, 159, 142]}),
    "detokenize, no such token": post("/detokenize", {"tokens": [256]}),
    "message": message(),
    "message, cut": message(max_tokens=2),
    "message, streamed": message(stream=True),
    "message, too long": message(messages=[{"role": "user", "content": "x" * 600}]),
    "message, wrong model, streamed": message(model="claude-9", stream=True),
    "message, no key": Call("POST", "/v1/messages", b"{}", JSON),
    "message, wrong method": Call("GET", "/v1/messages"),
    "count tokens": post("/v1/messages/count_tokens", {"messages": MESSAGES}),
    "anthropic's models": Call("GET", "/v1/models", headers={**KEY, "anthropic-version": "2023-06-01"}),
    "extract": post("/v1/extract", {"text": "a is 1", "schema": SCHEMA}),
    "extract, no schema": post("/v1/extract", {"text": "a is 1"}),
    "embeddings": post("/v1/embeddings", {"input": ["Grüße", "東京"]}),
    "embeddings, base64": post("/embeddings", {"input": "a", "encoding_format": "base64", "model": "fake-embed"}),
    "embeddings, empty": post("/v1/embeddings", {"input": ""}),
    "embeddings, too long": post("/v1/embeddings", {"input": "x" * 100}),
    "embeddings, chat model": post("/v1/embeddings", {"input": "a", "model": "fake-1b"}),
    "rerank, no reranker": post("/v1/rerank", {"query": "a", "documents": ["b"]}),
    "load, user key": post("/load", {"repo_id": "a/b", "filename": "c.gguf"}),
    "reload, user key": post("/reload", {"model_path": "a.gguf"}),
}


def application() -> Any:
    engine = ScriptedEngine("Grüße aus Zürich, dear 東京 friend. 🎉 " * 3)
    return create_app(
        fake_service(engine, embedder=ScriptedEmbedder(), api_keys=keys("secret"), admin_api_keys=keys("admin")).service
    )


@asynccontextmanager
async def by_uvicorn() -> Any:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(application(), log_level="error", http="h11"))
        serving = asyncio.ensure_future(server.serve([listener]))
        while not server.started:
            await asyncio.sleep(0.01)

        def send(call: Call) -> Answer:
            connection = HTTPConnection("127.0.0.1", port, timeout=20)
            try:
                connection.request(call.method, call.path, call.body or None, call.headers)
                response = connection.getresponse()
                headers = {name.lower(): value for name, value in response.getheaders()}
                return Answer(response.status, headers, response.read())
            finally:
                connection.close()

        async def ask(call: Call) -> Answer:
            return await asyncio.to_thread(send, call)

        yield ask
        server.should_exit = True
        await serving


@asynccontextmanager
async def by_lambda(mode: str) -> Any:
    async with runtime(application(), mode=mode) as bench:

        async def ask(call: Call) -> Answer:
            path, _, query = call.path.partition("?")
            event = to_event(call.method, path, query=query, headers=call.headers.items(), body=call.body)
            exchange = await bench.invoke(event)
            assert exchange.kind == ("buffered" if mode == "buffered" else "stream")
            if exchange.prelude is not None:
                return Answer(exchange.status, exchange.prelude["headers"], bytes(exchange.body))
            status, headers, body = from_buffered(json.loads(exchange.body), bytes(exchange.body))
            return Answer(status, dict(headers), body)

        yield ask


def comparable(answer: Answer) -> tuple[Any, ...]:
    """Return status, body and the service's own headers, without values that change each time."""
    varying = b"id|item_id|request_id|created|created_at|completed_at|uptime_s"
    body = re.sub(rb'("(?:' + varying + rb')":\s*)("[^"]*"|[\d.]+)', rb"\1null", answer.body)
    names = ("content-type", "retry-after", "allow", "www-authenticate")
    return answer.status, body.decode(), {name: answer.headers[name] for name in names if name in answer.headers}


@pytest.fixture(scope="module")
def answers() -> dict[str, dict[str, Answer]]:
    """Return the answers to every call through every entry point."""

    async def go() -> dict[str, dict[str, Answer]]:
        by_entry_point: dict[str, dict[str, Answer]] = {}
        for name, entry_point in (
            ("uvicorn", by_uvicorn()),
            ("streamed", by_lambda("auto")),
            ("buffered", by_lambda("buffered")),
        ):
            async with entry_point as ask:
                by_entry_point[name] = {call: await ask(CALLS[call]) for call in CALLS}
        return by_entry_point

    return asyncio.run(go())


@pytest.mark.parametrize("call", CALLS)
def test_every_entry_point_gives_the_same_answer(answers: dict[str, dict[str, Answer]], call: str) -> None:
    """uvicorn's answer is the expected one."""
    expected = comparable(answers["uvicorn"][call])

    assert comparable(answers["streamed"][call]) == expected
    assert comparable(answers["buffered"][call]) == expected


def test_the_calls_cover_all_statuses(answers: dict[str, dict[str, Answer]]) -> None:
    """If all answers were 404, the comparison would prove nothing."""
    statuses = {answer.status for answer in answers["uvicorn"].values()}

    assert {200, 204, 400, 401, 403, 404, 405, 415} <= statuses
    assert answers["uvicorn"]["chat, streamed"].body.endswith(b"data: [DONE]\n\n")
