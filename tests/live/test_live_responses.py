"""The stock `openai` client's `responses` work with the real server and a real model.

The cases of the Open Responses compliance suite that a text model can answer over HTTP are here, too.
"""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.responses import Response
from pydantic import BaseModel

MODEL = "SmolLM2-135M-Instruct.Q4_1"
GREEDY: Any = {"model": MODEL, "temperature": 0, "max_output_tokens": 8}
LONG: Any = {**GREEDY, "max_output_tokens": 40}
WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "Get the current weather for a location",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"location": {"type": "string", "maxLength": 40}},
        "required": ["location"],
        "additionalProperties": False,
    },
}


class Weather(BaseModel):
    city: Literal["Paris", "Rome", "Oslo"]


def check(response: Response) -> None:
    """Raise unless OpenAI's type accepts the response and it has an output."""
    Response.model_validate(response.model_dump(by_alias=True))
    assert response.output


def test_a_response_is_answered(client: OpenAI) -> None:
    """Its usage adds up, and its counted input is that of input_tokens."""
    fields: Any = {"model": MODEL, "instructions": "Be brief.", "input": "What does <|im_end|> mean?"}
    response = client.responses.create(**fields, max_output_tokens=8, temperature=0)
    counted = client.responses.input_tokens.count(**fields)

    check(response)
    assert response.output_text
    assert response.usage is not None
    assert response.usage.input_tokens == counted.input_tokens
    assert 0 < response.usage.output_tokens <= 8
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens


def test_a_response_equals_the_chat(client: OpenAI) -> None:
    """The same prompt and the same model give the same text."""
    response = client.responses.create(**GREEDY, instructions="Be kind.", input="Name a colour.")
    chat = client.chat.completions.create(
        model=MODEL,
        temperature=0,
        max_tokens=8,
        messages=[{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Name a colour."}],
    )

    assert response.output_text == chat.choices[0].message.content


def test_a_stream_ends_in_the_same_response(client: OpenAI) -> None:
    """The client checks the events and folds them itself."""
    whole = client.responses.create(**LONG, input="Say hello.")
    with client.responses.stream(**LONG, input="Say hello.") as stream:
        events = list(stream)
    final: Any = events[-1]

    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert final.response.output_text == whole.output_text
    assert final.response.status == whole.status
    assert final.response.usage.output_tokens == whole.usage.output_tokens  # type: ignore[union-attr]


def test_the_async_client_streams(server: str) -> None:
    """It reads the same events."""

    async def go() -> Any:
        async with (
            AsyncOpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=180) as async_client,
            async_client.responses.stream(**GREEDY, input="Say hello.") as stream,
        ):
            return [event async for event in stream]

    events = asyncio.run(go())

    assert events[0].type == "response.created"
    assert events[-1].type in ("response.completed", "response.incomplete")


def test_a_schema_is_followed(client: OpenAI) -> None:
    """`parse` gives the client's own type."""
    response = client.responses.parse(**LONG, input="Where is the Louvre?", text_format=Weather)

    assert response.output_parsed is not None
    assert response.output_parsed.city in ("Paris", "Rome", "Oslo")


def test_logprobs(client: OpenAI) -> None:
    """With `include`, each token has its own."""
    response = client.responses.create(
        **GREEDY, input="Say hello.", top_logprobs=2, include=["message.output_text.logprobs"]
    )

    content: Any = response.output[0].content  # type: ignore[union-attr]
    assert content[0].logprobs
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in content[0].logprobs)
    assert content[0].text == b"".join(bytes(token.bytes) for token in content[0].logprobs).decode()


def test_a_conversation_goes_on_from_a_stored_response(client: OpenAI) -> None:
    """The next prompt begins with the one before and its answer, whose KV cells are reused."""
    first = client.responses.create(**LONG, input="Name a colour of the rainbow.")
    second = client.responses.create(**GREEDY, input="Another one.", previous_response_id=first.id)
    items = client.responses.input_items.list(second.id, order="asc")

    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.input_tokens
    assert [item.type for item in items] == ["message", "message", "message"]
    assert client.responses.retrieve(first.id).output_text == first.output_text
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)


def test_truncation_drops_the_oldest_turns(client: OpenAI) -> None:
    """Without it the input is a 400."""
    turns: Any = [{"role": "user", "content": f"Number {at}: " + "word " * 400} for at in range(12)]
    for at in range(11, 0, -1):
        turns.insert(at, {"role": "assistant", "content": "Yes."})
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**GREEDY, input=turns)

    counted = client.responses.input_tokens.count(model=MODEL, input=turns, truncation="auto")  # without a prefill

    assert caught.value.code == "context_length_exceeded"
    assert 1000 < counted.input_tokens < 4096


def message(role: str, content: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "message", "role": role, "content": content, **fields}


HISTORY = [
    message("user", "Remember this code: 17."),
    message("assistant", "I will note it.", phase="commentary"),
    message("assistant", [{"type": "output_text", "text": "Noted."}], phase="final_answer"),
    message("user", "What is the code?"),
]
CASES: dict[str, Any] = {
    "basic": [message("user", "Say hello in exactly 3 words.")],
    "phases": HISTORY,
    "system prompt": [message("system", "You are a pirate."), message("user", "Say hello.")],
    "multi-turn": [message("user", "I am Ada."), message("assistant", "Hello Ada!"), message("user", "Who am I?")],
}


@pytest.mark.parametrize("case", CASES)
def test_open_responses_cases(client: OpenAI, case: str) -> None:
    """The output is not empty and the response is completed."""
    schema = {"type": "object", "properties": {"word": {"enum": ["a", "b"]}}, "required": ["word"]}
    # A schema makes this small model end soon.
    text: Any = {"format": {"type": "json_schema", "name": "word", "schema": schema | {"additionalProperties": False}}}
    fields: Any = {"model": MODEL, "temperature": 0, "input": CASES[case], "text": text}
    with client.responses.stream(**fields) as stream:
        streamed = stream.get_final_response()
    response = client.responses.create(**fields)

    for each in (response, streamed):
        check(each)
        assert each.status == "completed"
        assert each.output_text == response.output_text


def test_as_many_requests_as_the_suite_sends_at_once(client: OpenAI) -> None:
    """None of them is refused."""
    with ThreadPoolExecutor(17) as pool:
        jobs = [pool.submit(client.responses.create, **GREEDY, input=f"Number {at}") for at in range(17)]
        statuses = {job.result().status for job in jobs}

    assert statuses <= {"completed", "incomplete"}


def test_a_probe_with_an_empty_input(client: OpenAI) -> None:
    """Codex starts with one."""
    assert client.responses.create(model=MODEL, input="", max_output_tokens=1).status == "incomplete"


@pytest.mark.parametrize("seed", range(5))
def test_a_required_call_is_always_valid(client: OpenAI, seed: int) -> None:
    """Whatever the model draws, streamed or not: `tool-calling` of the suite, which leaves it to the model."""
    fields: Any = {"model": MODEL, "input": "What's the weather like in San Francisco?", "tools": [WEATHER]}
    fields |= {"tool_choice": "required", "max_output_tokens": 300, "parallel_tool_calls": False}
    fields |= {"extra_body": {"seed": seed}}
    response = client.responses.create(**fields)
    with client.responses.stream(**fields) as stream:
        events = list(stream)
    kinds = [event.type for event in events]
    final: Any = events[-1]

    for each in (response, final.response):
        (call,) = each.output
        assert each.status == "completed"
        assert (call.type, call.name, call.status) == ("function_call", "get_weather", "completed")
        assert isinstance(json.loads(call.arguments)["location"], str)
    assert kinds[2] == "response.output_item.added"
    assert set(kinds[3:-3]) == {"response.function_call_arguments.delta"}
    assert kinds[-3:-1] == ["response.function_call_arguments.done", "response.output_item.done"]


def test_a_call_and_its_output_make_a_round_trip(client: OpenAI) -> None:
    """By the stored response, and by replaying the items."""
    fields: Any = {"model": MODEL, "temperature": 0, "tools": [WEATHER], "max_output_tokens": 200}
    question = message("user", "What's the weather like in Oslo?")
    first = client.responses.create(
        **fields,
        input=[question],
        tool_choice={"type": "function", "name": "get_weather"},
        parallel_tool_calls=False,
    )
    (call,) = first.output
    assert call.type == "function_call"
    output = {"type": "function_call_output", "call_id": call.call_id, "output": '{"sky": "clear"}'}
    short: Any = {**fields, "tool_choice": "none", "max_output_tokens": 8}
    stored = client.responses.create(**short, input=[output], previous_response_id=first.id)
    replayed = client.responses.create(**short, input=[question, call.model_dump(exclude_none=True), output])

    assert stored.output_text == replayed.output_text
    assert stored.usage is not None
    assert replayed.usage is not None
    assert stored.usage.input_tokens == replayed.usage.input_tokens
    with pytest.raises(openai.BadRequestError, match="call_id"):
        client.responses.create(**short, input=[question, output])


def test_a_cut_call_is_left_out(client: OpenAI) -> None:
    """The response is incomplete, and the client can read it."""
    fields: Any = {"model": MODEL, "input": "Weather in Oslo?", "tools": [WEATHER], "tool_choice": "required"}
    response = client.responses.parse(**fields, temperature=0, max_output_tokens=12)

    assert response.status == "incomplete"
    assert [item.type for item in response.output if item.type == "function_call"] == []


def test_a_custom_tool_and_a_namespace(client: OpenAI) -> None:
    """Calls come back under the client's names."""
    inner = {**WEATHER, "strict": None}
    tools: Any = [{"type": "namespace", "name": "mcp__weather", "description": "Weather.", "tools": [inner]}]
    fields: Any = {"model": MODEL, "temperature": 0, "input": "Weather in Oslo?", "max_output_tokens": 200}
    required: Any = {**fields, "tool_choice": "required", "parallel_tool_calls": False}
    (call,) = client.responses.create(**required, tools=[{"type": "web_search"}, *tools]).output
    custom = client.responses.create(**required, tools=[{"type": "custom", "name": "note"}])

    assert call.type == "function_call"
    assert (call.name, call.namespace) == ("get_weather", "mcp__weather")
    for item in custom.output:
        assert (item.type, item.name) == ("custom_tool_call", "note")  # type: ignore[union-attr]
