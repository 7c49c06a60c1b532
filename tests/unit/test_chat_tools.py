"""Tools and reasoning in chat completions: the request's checks, and the shapes of chunks and completions."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from core.engine.interface import Arguments, Call, CallEnd, Reasoning, Text
from tests.fakes import CARD, FakeService, ScriptedEngine, fake_service
from tests.unit.test_chat import events, post

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
TIME = {"type": "function", "function": {"name": "time"}}
ALLOW_NONE = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}
FUNCTION = {"name": "weather"}
CALL = (Call("weather"), Arguments('{"city": '), Arguments('"Oslo"}'), CallEnd())


def service(pieces: Any = None) -> FakeService:
    """An engine of bytes has room for the text that lists the tools."""
    return fake_service(ScriptedEngine(pieces=pieces, card=replace(CARD, n_ctx=4096)))


def tool(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "weather", **fields}}


def test_a_call_is_in_the_message() -> None:
    """The arguments are JSON text, content is null, and the finish reason says that tools are to be run."""
    status, body = post(service(CALL), tools=[WEATHER])

    choice = body["choices"][0]
    assert status == 200
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert len(call.pop("id")) > 20
    assert call == {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}


def test_a_streamed_call_has_openais_order() -> None:
    """The first delta of a call has its index, id, type and name; the next ones only index and arguments."""
    pieces = (Text("Let me look."), *CALL, Call("time"), Arguments("{}"), CallEnd())
    _, body = post(service(pieces), tools=[WEATHER, TIME], stream=True)

    chunks = [event for event in events(body) if event != "data: [DONE]"]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    calls = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    ids = [call.pop("id") for call in calls if "id" in call]
    assert deltas[0] == {"role": "assistant", "content": None, "refusal": None}
    assert deltas[1] == {"content": "Let me look."}
    assert calls == [
        {"index": 0, "type": "function", "function": {"name": "weather", "arguments": ""}},
        {"index": 0, "function": {"arguments": '{"city": '}},
        {"index": 0, "function": {"arguments": '"Oslo"}'}},
        {"index": 1, "type": "function", "function": {"name": "time", "arguments": ""}},
        {"index": 1, "function": {"arguments": "{}"}},
    ]
    assert len(set(ids)) == 2
    assert deltas[-1] == {}
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    ("choice", "single"),
    [("required", False), ({"type": "function", "function": {"name": "time"}}, True)],
)
def test_a_named_function_is_called_once(choice: Any, single: bool) -> None:
    """Clients that use it as a structured output read one call."""
    engine = ScriptedEngine(pieces=CALL, card=replace(CARD, n_ctx=4096))
    post(fake_service(engine), tools=[WEATHER, TIME], tool_choice=choice)

    output = engine.requests[0].output
    assert output is not None
    assert output.end_after_call == single


def test_a_cut_call_ends_with_length() -> None:
    """An agent must not run a call whose arguments are incomplete."""
    status, body = post(service(CALL), tools=[WEATHER], max_tokens=2)

    choice = body["choices"][0]
    assert (status, choice["finish_reason"]) == (200, "length")
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": '


def test_functions_are_answered_with_function_call() -> None:
    """A client that sends `functions` reads `function_call`."""
    _, body = post(service(CALL), functions=[FUNCTION])

    choice = body["choices"][0]
    assert choice["finish_reason"] == "function_call"
    assert choice["message"]["function_call"] == {"name": "weather", "arguments": '{"city": "Oslo"}'}
    assert "tool_calls" not in choice["message"]


def test_reasoning_has_a_field_and_a_count_of_its_own() -> None:
    """What the model thinks is not content."""
    pieces = (Reasoning("Hm, "), Reasoning("Oslo."), Text("It rains."))
    _, body = post(service(pieces))

    message = body["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm, Oslo.", "It rains.")
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": 2}
    assert body["usage"]["completion_tokens"] == 3


def test_the_roles_of_all_choices_come_first_and_in_order() -> None:
    """OpenAI's client indexes its choices by arrival."""
    _, body = post(fake_service(ScriptedEngine("a b")), n=3, stream=True)

    roles = [event["choices"][0] for event in events(body)[:3]]
    assert [(role["index"], role["delta"]["role"]) for role in roles] == [
        (0, "assistant"),
        (1, "assistant"),
        (2, "assistant"),
    ]


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": []},
        {"tools": [WEATHER], "tool_choice": "none"},
        {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "weather", "extra": 1}}},
        {
            "tools": [WEATHER, TIME],
            "tool_choice": {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "time"}}]},
            },
        },
        {"tools": [tool(parameters=None, description=None, strict=None)], "parallel_tool_calls": False},
        {"parallel_tool_calls": True},
        {"functions": [FUNCTION], "function_call": {"name": "weather"}},
        {"reasoning_effort": "none", "chat_template_kwargs": {"a": [1]}, "enable_thinking": False},
    ],
)
def test_what_clients_send_is_accepted(fields: dict[str, Any]) -> None:
    """Fields in all the forms that OpenAI's clients and agents use."""
    status, body = post(service(), **fields)

    assert status == 200, body


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "'web_search'"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "'function'"),
        ({"tools": [tool(name="a b")]}, "tools[0].function.name", "'a b'"),
        ({"tools": [tool(name="a" * 65)]}, "tools[0].function.name", "1 to 64"),
        ({"tools": [tool(parameters={"type": "array"})]}, "tools[0].function.parameters", "'array'"),
        ({"tools": [tool(parameters=5)]}, "tools[0].function.parameters", "object"),
        (
            {
                "tools": [
                    WEATHER,
                    tool(name="f", strict=True, parameters={"type": "object", "properties": {"a": {"not": {}}}}),
                ]
            },
            "tools[1].function.parameters",
            "'not'",
        ),
        (
            {
                "functions": [
                    {"name": "f", "strict": True, "parameters": {"type": "object", "properties": {"a": {"not": {}}}}}
                ]
            },
            "functions[0].parameters",
            "'not'",
        ),
        ({"tools": [WEATHER, WEATHER]}, "tools", "two tools"),
        ({"tools": [tool(name=f"t{i}") for i in range(129)]}, "tools", "at most 128"),
        ({"tools": [WEATHER], "functions": [FUNCTION]}, "functions", "not both"),
        ({"tools": [WEATHER], "tool_choice": "any"}, "tool_choice", "'required'"),
        ({"tools": [WEATHER], "tool_choice": {"type": "custom"}}, "tool_choice", "'custom'"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "time"}}},
            "tool_choice",
            "'weather'",
        ),
        ({"tool_choice": {"type": "function", "function": {"name": "time"}}}, "tool_choice", "no tools"),
        (
            {
                "tools": [WEATHER],
                "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}},
            },
            "tool_choice.allowed_tools.tools",
            "at least one",
        ),
        ({"functions": [FUNCTION], "function_call": {"name": "x"}}, "function_call", "'x'"),
        ({"messages": [{"role": "tool", "content": "5"}]}, "messages[0].tool_call_id", "missing"),
        ({"reasoning_effort": "much"}, "reasoning_effort", "'minimal'"),
    ],
)
def test_a_bad_tool_is_a_400_that_names_it(fields: dict[str, Any], param: str, words: str) -> None:
    """The message says what was given or what is allowed."""
    status, body = post(service(), **fields)

    assert status == 400
    assert body["error"]["param"] == param
    assert words in body["error"]["message"]
