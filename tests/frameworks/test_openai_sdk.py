"""OpenAI's own client: `parse`, `stream` and its tool runner."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from openai import OpenAI, pydantic_function_tool
from pydantic import BaseModel
from weather import MODEL, QUESTION, REPORT, Calls, City, Weather


class GetWeather(BaseModel):
    """Get the weather in a city."""

    city: City


TOOL = pydantic_function_tool(GetWeather, name="get_weather")


@pytest.fixture
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def user(content: str) -> list[Any]:
    return [{"role": "user", "content": content}]


def test_parse_returns_the_structured_output(client: OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=MODEL, messages=user(REPORT), response_format=Weather, temperature=0, max_tokens=100
    )

    assert isinstance(answer.choices[0].message.parsed, Weather)


def test_stream_returns_the_structured_output(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=user(REPORT), response_format=Weather, temperature=0, max_tokens=100
    ) as stream:
        events = [event.type for event in stream]
        answer = stream.get_final_completion()

    assert isinstance(answer.choices[0].message.parsed, Weather)
    assert events.count("content.done") == 1
    assert events.count("content.delta") > 1


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_parse_returns_a_call(client: OpenAI, calls: Calls, choice: Any) -> None:
    """The client parses the arguments of a strict tool, and sends its own message back with the result."""
    messages = user(QUESTION)
    answer = client.chat.completions.parse(
        model=MODEL, messages=messages, tools=[TOOL], tool_choice=choice, parallel_tool_calls=False, temperature=0
    )

    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls"
    assert message.tool_calls is not None
    (call,) = message.tool_calls
    assert isinstance(call.function.parsed_arguments, GetWeather)

    result = calls.get_weather(call.function.parsed_arguments.city)
    messages += [message, {"role": "tool", "tool_call_id": call.id, "content": result}]
    answer = client.chat.completions.parse(
        model=MODEL, messages=messages, tools=[TOOL], tool_choice="none", temperature=0, max_tokens=32
    )
    assert answer.choices[0].message.content
    assert not answer.choices[0].message.tool_calls


def test_stream_returns_a_call(client: OpenAI) -> None:
    """The client accumulates the pieces of the arguments and reports when they are complete."""
    with client.chat.completions.stream(
        model=MODEL,
        messages=user(QUESTION),
        tools=[TOOL],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
        stream_options={"include_usage": True},
    ) as stream:
        events = list(stream)
        answer = stream.get_final_completion()

    (done,) = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    pieces = [event for event in events if event.type == "tool_calls.function.arguments.delta"]
    assert done.name == "get_weather"
    assert isinstance(done.parsed_arguments, GetWeather)
    assert "".join(piece.arguments_delta for piece in pieces) == done.arguments
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.usage is not None


def test_legacy_functions_are_called(client: OpenAI) -> None:
    """A client from before tools gets `function_call`, and answers with the role `function`."""
    function = {"name": "get_weather", "parameters": GetWeather.model_json_schema()}
    messages = user(QUESTION)
    answer = client.chat.completions.create(
        model=MODEL, messages=messages, functions=[function], function_call={"name": "get_weather"}, temperature=0
    )

    call = answer.choices[0].message.function_call
    assert answer.choices[0].finish_reason == "function_call"
    assert call is not None
    GetWeather(**json.loads(call.arguments))

    messages += [answer.choices[0].message, {"role": "function", "name": call.name, "content": "Sunny."}]
    answer = client.chat.completions.create(
        model=MODEL, messages=messages, functions=[function], function_call="none", max_tokens=32
    )
    assert answer.choices[0].message.content
