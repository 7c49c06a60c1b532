"""OpenAI's own client reads every kind of response. It raises at the slightest deviation in a stream."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2 as httpx
import openai
import pytest
from msgspec.structs import replace
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from core.engine.interface import Arguments, Call, CallEnd, Reasoning
from core.errors import ModelUnavailable
from handlers import generate
from handlers.dispatch import dispatch
from handlers.http import Request
from tests.fakes import CARD, FakeService, ScriptedEngine, fake_service
from tests.unit.test_responses import WEATHER, pieces

STRICT: Any = {
    "type": "function",
    "name": "weather",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
PATCH: Any = {"type": "custom", "name": "apply_patch"}
CALL = (Call("weather"), Arguments('{"city": '), Arguments('"Oslo"}'), CallEnd())
CUSTOM = (Call("apply_patch"), Arguments('{"input": "a"}'), CallEnd())


ROOMY = replace(CARD, n_ctx=8192)  # a token for each byte of the tools


class City(BaseModel):
    city: str


async def answer(fake: FakeService, request: httpx.Request) -> httpx.Response:
    query = dict(request.url.params)
    headers = {name.lower(): value for name, value in request.headers.items()}
    incoming = Request(request.method, request.url.path, "req_1", headers, query, body=request.content)
    response = await dispatch(fake.service, incoming)
    try:
        body = response.body
        content = body if isinstance(body, bytes) else b"".join([chunk async for chunk in body])
        return httpx.Response(response.status, headers=list(response.headers), content=content)
    finally:
        await response.aclose()


def client(engine: ScriptedEngine, **settings: Any) -> OpenAI:
    """Return a client whose requests a service with this engine answers."""
    engine.card = ROOMY
    fake = fake_service(engine, **settings)
    transport = httpx.MockTransport(lambda request: asyncio.run(answer(fake, request)))
    http = httpx.Client(transport=transport)
    return OpenAI(base_url="http://localhost/v1", api_key="none", max_retries=0, http_client=http)


@pytest.mark.parametrize(
    "script",
    [("Hi ", "there"), (Reasoning("Hm."), "Hi"), CALL, CUSTOM, (Reasoning("Hm."), "Let me see.", *CALL, *CUSTOM)],
    ids=["text", "reasoning", "call", "custom call", "all"],
)
def test_the_client_folds_a_stream_to_the_whole_response(script: Any) -> None:
    """It compares the identity of items in all events, and raises without response.created or .completed."""
    fields: Any = {"model": "fake-1b", "input": "Hello", "tools": [STRICT, PATCH]}
    with client(pieces(*script)) as openai_client, openai_client.responses.stream(**fields) as stream:
        events = list(stream)
        final = stream.get_final_response()
        whole = openai_client.responses.create(**fields)

    assert events[0].type == "response.created"
    assert [item.type for item in final.output] == [item.type for item in whole.output]
    assert final.output_text == whole.output_text
    for ours, theirs in zip(final.output, whole.output, strict=True):
        left, right = ours.model_dump(), theirs.model_dump()
        for volatile in ("id", "call_id", "parsed_arguments"):
            left.pop(volatile, None)
            right.pop(volatile, None)
        left["content"] = [part | {"parsed": None} for part in left.get("content") or ()]
        right["content"] = [part | {"parsed": None} for part in right.get("content") or ()]
        assert left == right


def test_arguments_and_texts_are_parsed() -> None:
    """With a strict tool and with a model class."""
    with client(pieces(*CALL)) as openai_client:
        called = openai_client.responses.parse(model="fake-1b", input="Hello", tools=[STRICT])
    with client(pieces('{"city": ', '"Oslo"}')) as openai_client:
        text = openai_client.responses.parse(model="fake-1b", input="Hello", text_format=City)

    assert called.output[0].type == "function_call"
    assert called.output[0].parsed_arguments == {"city": "Oslo"}
    assert text.output_parsed == City(city="Oslo")


def test_a_cut_call_does_not_break_the_client() -> None:
    """With its half arguments in the output, `parse` would raise a JSONDecodeError."""
    engine = pieces("Let me see.", *CALL)
    with client(engine) as openai_client:
        parsed = openai_client.responses.parse(model="fake-1b", input="Hi", tools=[STRICT], max_output_tokens=3)
        fields: Any = {"model": "fake-1b", "input": "Hi", "tools": [STRICT], "max_output_tokens": 3}
        with openai_client.responses.stream(**fields) as stream:
            last: Any = list(stream)[-1]

    assert parsed.status == last.response.status == "incomplete"
    assert [item.type for item in parsed.output] == [item.type for item in last.response.output] == ["message"]


def test_errors_are_exceptions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the status by its code, later by an event."""
    with client(ScriptedEngine()) as openai_client:
        with pytest.raises(openai.BadRequestError) as caught:
            openai_client.responses.create(model="fake-1b", input="Hi", previous_response_id="resp_1")
        assert caught.value.code == "previous_response_not_found"
        with pytest.raises(openai.NotFoundError):
            openai_client.responses.retrieve("resp_1")
    monkeypatch.setattr(generate, "PATIENCE_S", 0.0)
    with client(ScriptedEngine(error=ModelUnavailable("No room."), delay=0.05)) as openai_client:
        stream = openai_client.responses.create(model="fake-1b", input="Hi", stream=True)
        with pytest.raises(openai.APIError, match="No room"):
            list(stream)


def test_the_client_manages_stored_responses() -> None:
    """retrieve, input_items, delete and input_tokens."""
    with client(ScriptedEngine("Fine."), responses_store=1_000_000) as openai_client:
        first = openai_client.responses.create(model="fake-1b", input="One", tools=[WEATHER])
        second = openai_client.responses.create(model="fake-1b", input="Two", previous_response_id=first.id)
        items = openai_client.responses.input_items.list(second.id, order="asc", limit=2)
        texts = [item.content[0].text for item in items]  # type: ignore[union-attr]
        count = openai_client.responses.input_tokens.count(model="fake-1b", input="One", tools=[WEATHER])

        assert openai_client.responses.retrieve(first.id) == first
        assert texts == ["One", "Fine.", "Two"]
        assert first.usage is not None
        assert count.input_tokens == first.usage.input_tokens
        openai_client.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError):
            openai_client.responses.retrieve(first.id)


def test_the_async_client_streams() -> None:
    """It reads the same events."""
    fake = fake_service(pieces(Reasoning("Hm."), "Hi ", "there"))

    async def go() -> Any:
        transport = httpx.MockTransport(lambda request: answer(fake, request))
        http = httpx.AsyncClient(transport=transport)
        async with (
            AsyncOpenAI(base_url="http://localhost/v1", api_key="none", http_client=http) as async_client,
            async_client.responses.stream(model="fake-1b", input="Hello") as stream,
        ):
            kinds = [event.type async for event in stream]
            return kinds, await stream.get_final_response()

    kinds, final = asyncio.run(go())

    assert kinds[-1] == "response.completed"
    assert final.output_text == "Hi there"
