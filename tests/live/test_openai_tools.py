"""Tools with the stock `openai` client, the real server and a real model that was never trained on them."""

from __future__ import annotations

import json
from typing import Any, Literal

import jsonschema_rs
import openai
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletionMessageToolCall
from pydantic import BaseModel

MODEL = "SmolLM2-135M-Instruct.Q4_1"
ASK: Any = [{"role": "user", "content": "What is the weather in Oslo, in celsius?"}]
CITY = {"type": "string", "maxLength": 12}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Report the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": CITY, "unit": {"enum": ["celsius", "fahrenheit"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
TIME: Any = {"type": "function", "function": {"name": "get_time", "description": "Tell the time."}}
GREEDY: Any = {"model": MODEL, "temperature": 0, "max_tokens": 120}


def valid(call: Any) -> bool:
    """Return whether the arguments of a call are what its tool's schema allows."""
    assert isinstance(call, ChatCompletionMessageToolCall)
    schemas = {"get_weather": WEATHER["function"]["parameters"], "get_time": {"type": "object", "maxProperties": 0}}
    arguments = json.loads(call.function.arguments)
    return bool(jsonschema_rs.is_valid(schemas[call.function.name], arguments))


def test_required_always_calls(client: OpenAI) -> None:
    """The grammar holds from the first token, at any temperature."""
    for seed in range(2):
        answer = client.chat.completions.create(
            messages=ASK,
            tools=[WEATHER, TIME],
            tool_choice="required",
            parallel_tool_calls=False,
            **(GREEDY | {"temperature": 1.5, "seed": seed}),
        )
        choice = answer.choices[0]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        (call,) = choice.message.tool_calls or []
        assert valid(call)
        assert len(call.id) > 20


def test_a_named_tool_is_called(client: OpenAI) -> None:
    """It is the one that was named, though the question asks for another."""
    answer = client.chat.completions.create(
        messages=ASK,
        tools=[WEATHER, TIME],
        tool_choice={"type": "function", "function": {"name": "get_time"}},
        parallel_tool_calls=False,
        **GREEDY,
    )

    (call,) = answer.choices[0].message.tool_calls or []
    assert isinstance(call, ChatCompletionMessageToolCall)
    assert (call.function.name, call.function.arguments) == ("get_time", "{}")


def test_allowed_tools_narrow_the_choice(client: OpenAI) -> None:
    """All tools stay in the prompt, so that its prefix is reused; the grammar allows some of them."""
    allowed: Any = {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "get_time"}}]},
    }
    first = client.chat.completions.create(messages=ASK, tools=[WEATHER, TIME], tool_choice="required", **GREEDY)
    second = client.chat.completions.create(messages=ASK, tools=[WEATHER, TIME], tool_choice=allowed, **GREEDY)

    calls = second.choices[0].message.tool_calls or []
    names = {call.function.name for call in calls if isinstance(call, ChatCompletionMessageToolCall)}
    assert names == {"get_time"}
    assert first.usage is not None
    assert second.usage is not None
    assert first.usage.prompt_tokens == second.usage.prompt_tokens
    assert second.usage.prompt_tokens_details is not None
    assert second.usage.prompt_tokens_details.cached_tokens == second.usage.prompt_tokens - 1


def test_a_streamed_call_adds_up_to_the_whole_one(client: OpenAI) -> None:
    """The client accumulates the deltas itself, and raises if their order is wrong."""
    fields: Any = {"messages": ASK, "tools": [WEATHER], "tool_choice": "required", **GREEDY}
    whole = client.chat.completions.create(**fields).choices[0]
    with client.chat.completions.stream(**fields) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion().choices[0]

    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    assert final.finish_reason == whole.finish_reason == "tool_calls"
    streamed = [call.function for call in final.message.tool_calls or []]
    expected = [
        call.function for call in whole.message.tool_calls or [] if isinstance(call, ChatCompletionMessageToolCall)
    ]
    assert [(call.name, call.arguments) for call in streamed] == [(call.name, call.arguments) for call in expected]


def test_parse_validates_the_arguments(client: OpenAI) -> None:
    """A pydantic tool is strict, and its arguments come back as its object."""

    class Forecast(BaseModel):
        """Ask for a forecast."""

        place: Literal["Oslo", "Bergen"]
        days: Literal[1, 2, 3]

    answer = client.chat.completions.parse(
        messages=ASK, tools=[openai.pydantic_function_tool(Forecast)], tool_choice="required", **GREEDY
    )

    calls = answer.choices[0].message.tool_calls or []
    assert calls
    assert isinstance(calls[0].function.parsed_arguments, Forecast)


def test_auto_answers_or_calls(client: OpenAI) -> None:
    """Whatever the model does: text without markup, or whole and valid calls."""
    for seed in range(2):
        answer = client.chat.completions.create(
            messages=ASK, tools=[WEATHER, TIME], **(GREEDY | {"temperature": 1, "seed": seed, "max_tokens": 40})
        )
        choice = answer.choices[0]
        if choice.message.tool_calls:
            assert choice.finish_reason in ("tool_calls", "length")
            whole = choice.message.tool_calls[: None if choice.finish_reason == "tool_calls" else -1]
            assert all(map(valid, whole))
        else:
            assert choice.finish_reason in ("stop", "length")
            assert choice.message.content


def test_a_repeated_call_ends_the_answer(client: OpenAI) -> None:
    """Several calls are allowed, and this model would make the same one until the limit."""
    choice = client.chat.completions.create(
        messages=ASK, tools=[TIME], tool_choice="required", **(GREEDY | {"max_tokens": 200})
    ).choices[0]

    assert choice.finish_reason == "tool_calls"
    assert len(choice.message.tool_calls or []) <= 2


def test_none_does_not_call(client: OpenAI) -> None:
    """The tools stay out of the prompt."""
    bare = client.chat.completions.create(messages=ASK, **(GREEDY | {"max_tokens": 8}))
    none = client.chat.completions.create(
        messages=ASK, tools=[WEATHER], tool_choice="none", **(GREEDY | {"max_tokens": 8})
    )

    assert none.choices[0].message.tool_calls is None
    assert none.choices[0].message.content == bare.choices[0].message.content


def test_a_result_is_read(client: OpenAI) -> None:
    """The model answers in words after a call and its result, which are in its prompt."""
    first = client.chat.completions.create(messages=ASK, tools=[WEATHER], tool_choice="required", **GREEDY)
    message = first.choices[0].message
    history: Any = [*ASK, message.model_dump(exclude_none=True)]
    history += [
        {"role": "tool", "tool_call_id": call.id, "content": '{"temperature": 7, "sky": "rain"}'}
        for call in message.tool_calls or []
    ]
    second = client.chat.completions.create(
        messages=history, tools=[WEATHER], tool_choice="none", **(GREEDY | {"max_tokens": 24})
    )
    longer = client.chat.completions.create(messages=history, tools=[WEATHER], **(GREEDY | {"max_tokens": 24}))

    assert second.choices[0].message.content
    assert first.usage is not None
    assert longer.usage is not None
    assert longer.usage.prompt_tokens > first.usage.prompt_tokens


def test_a_cut_call_ends_with_length(client: OpenAI) -> None:
    """The client raises instead of running half a call."""
    tool = {**WEATHER, "function": {**WEATHER["function"], "strict": True}}
    fields: Any = {"messages": ASK, "tools": [tool], "tool_choice": "required", **(GREEDY | {"max_tokens": 12})}
    assert client.chat.completions.create(**fields).choices[0].finish_reason == "length"
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(**fields)


def test_tools_and_a_schema_go_together(client: OpenAI) -> None:
    """With auto, the answer is a call or JSON that follows the schema."""
    schema: Any = {
        "type": "object",
        "properties": {"answer": {"enum": ["yes", "no"]}},
        "required": ["answer"],
        "additionalProperties": False,
    }
    for seed in range(2):
        choice = client.chat.completions.create(
            messages=ASK,
            tools=[WEATHER],
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
            **(GREEDY | {"temperature": 1.5, "seed": seed}),
        ).choices[0]
        if choice.message.tool_calls:
            assert all(map(valid, choice.message.tool_calls))
        else:
            assert jsonschema_rs.is_valid(schema, json.loads(choice.message.content or ""))


def test_functions_still_work(client: OpenAI) -> None:
    """The legacy fields, as older agents send them."""
    answer = client.chat.completions.create(
        messages=ASK, functions=[WEATHER["function"]], function_call={"name": "get_weather"}, **GREEDY
    )

    choice = answer.choices[0]
    assert choice.finish_reason == "function_call"
    assert choice.message.function_call is not None
    assert choice.message.function_call.name == "get_weather"
    assert json.loads(choice.message.function_call.arguments)["unit"] in ("celsius", "fahrenheit")
