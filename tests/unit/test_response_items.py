"""Responses: what items, tools and choices become for the model, and the requests that are refused."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from core.conversation import Conversation, ToolChoice
from core.engine.interface import Arguments, Call, CallEnd
from core.wire.responses import translation
from core.wire.responses.request import ResponsesRequest
from core.wire.responses.tools import qualified
from tests.fakes import ScriptedEngine
from tests.unit.test_responses import WEATHER, kinds, pieces, respond, streamed

USER = {"role": "user", "content": "Hi"}
PATCH = {"type": "custom", "name": "apply_patch", "description": "Edit files."}
GITHUB = {"type": "namespace", "name": "mcp__github", "tools": [{"type": "function", "name": "search"}]}
HOSTED = [{"type": kind} for kind in ("web_search", "image_generation", "local_shell", "something_new")] + [
    {"type": "mcp", "server_label": "a", "server_url": "https://a.example", "tools": None}
]


def call(call_id: str, **fields: Any) -> dict[str, Any]:
    return {"type": "function_call", "call_id": call_id, "name": "f", "arguments": '{"a": 1}', **fields}


def output(call_id: str, text: Any = "42") -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call_id, "output": text}


def reasoning(text: str) -> dict[str, Any]:
    return {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": text}]}


def neutral(**fields: Any) -> Conversation:
    request = msgspec.convert({"input": "Hi", **fields}, ResponsesRequest)
    return translation.conversation(request, request.items)


def messages(*items: Any, **fields: Any) -> list[dict[str, Any]]:
    return neutral(input=list(items), **fields).messages


def tool_call(call_id: str, name: str = "f", arguments: Any = None) -> dict[str, Any]:
    arguments = {"a": 1} if arguments is None else arguments
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def test_a_string_is_a_user_message() -> None:
    """Instructions come first."""
    assert neutral(instructions="Be kind.").messages == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
    ]


def test_leading_system_messages_are_one() -> None:
    """Many templates accept no second one. Later ones stay where they are."""
    system, developer = {"role": "system", "content": "a"}, {"role": "developer", "content": "b"}

    assert messages(system, developer, USER, developer, instructions="0") == [
        {"role": "system", "content": "0\n\na\n\nb"},
        {"role": "user", "content": "Hi"},
        {"role": "developer", "content": "b"},
    ]
    assert messages(developer, USER)[0]["role"] == "developer"


def test_calls_reasoning_and_text_in_a_row_are_one_turn() -> None:
    """Templates have no other form for several calls."""
    history = [USER, reasoning("Hm."), {"role": "assistant", "content": "Wait."}, call("1"), call("2")]

    assert messages(*history, output("1"), output("2", [{"type": "input_text", "text": "43"}])) == [
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": "Wait.",
            "reasoning_content": "Hm.",
            "tool_calls": [tool_call("1"), tool_call("2")],
        },
        {"role": "tool", "content": "42", "tool_call_id": "1"},
        {"role": "tool", "content": "43", "tool_call_id": "2"},
    ]


def test_calls_after_results_are_another_turn() -> None:
    """So are calls one after the other."""
    roles = [message["role"] for message in messages(USER, call("1"), output("1"), call("2"), output("2"))]

    assert roles == ["user", "assistant", "tool", "assistant", "tool"]


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ({"role": "assistant", "content": "a"}, {"role": "assistant", "content": "a"}),
        (
            {"type": "message", "role": "assistant", "id": None, "status": None, "content": [
                {"type": "output_text", "text": "a"}, {"type": "refusal", "refusal": "b"}], "phase": "commentary"},
            {"role": "assistant", "content": "a\nb"},
        ),
        ({"type": "message", "role": "user", "content": None}, {"role": "user", "content": ""}),
        (call("1", arguments="{not json"), {"role": "assistant", "content": "", "tool_calls": [
            tool_call("1", arguments="{not json")]}),
        (call("1", arguments="", id="fc_1", status="completed"), {"role": "assistant", "content": "", "tool_calls": [
            tool_call("1", arguments={})]}),
        (
            {"type": "custom_tool_call", "call_id": "1", "name": "apply_patch", "input": "*** Begin"},
            {"role": "assistant", "content": "", "tool_calls": [
                tool_call("1", "apply_patch", {"input": "*** Begin"})]},
        ),
        (call("1", namespace="mcp__github", name="search"), {"role": "assistant", "content": "", "tool_calls": [
            tool_call("1", "mcp__github__search")]}),
    ],
)  # fmt: skip
def test_replayed_items_may_lack_fields(item: dict[str, Any], expected: dict[str, Any]) -> None:
    """Agents send them back without ids, statuses, annotations or content."""
    assert messages(USER, item)[1] == expected


def test_items_without_text_leave_no_turn() -> None:
    """Reasoning alone, and items of hosted tools."""
    hosted = {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"type": "search"}}
    shell = {"type": "shell_call_output", "call_id": "1", "output": [{"stdout": "a", "outcome": {"type": "exit"}}]}

    assert messages(reasoning("Hm."), {"type": "reasoning", "content": None}, hosted, shell, USER) == [USER]


def test_an_empty_input_has_a_user_message() -> None:
    """Codex probes a server with an empty input and one token."""
    for fields in ({"input": []}, {"input": ""}, {"input": [], "instructions": "Be kind."}):
        assert neutral(**fields).messages[-1] == {"role": "user", "content": ""}
    status, body = respond(ScriptedEngine(), input=[], max_output_tokens=1)
    assert (status, body["status"]) == (200, "incomplete")


def test_the_answer_has_only_tools_in_effect() -> None:
    """Hosted tools are accepted. The model does not see them."""
    tools = [*HOSTED, WEATHER, PATCH, GITHUB]
    _, body = respond(pieces("Fine."), tools=tools)

    assert [each.name for each in neutral(tools=tools).tools] == ["weather", "apply_patch", "mcp__github__search"]
    assert body["tools"] == [
        {
            "type": "function",
            "name": "weather",
            "description": None,
            "parameters": {"type": "object", "properties": {}},
            "strict": True,
        },
        {**PATCH, "format": {"type": "text", "syntax": None, "definition": None}},
        {
            "type": "namespace",
            "name": "mcp__github",
            "description": "",
            "tools": [{"type": "function", "name": "search", "description": None, "parameters": None, "strict": True}],
        },
    ]


def test_strict_is_a_promise_only_if_the_client_asks() -> None:
    """Without it in the request, a keyword that cannot be enforced is left out of the grammar."""
    tools = [{**WEATHER, "name": name, "strict": strict} for name, strict in (("a", True), ("b", None), ("c", False))]

    assert [each.strict for each in neutral(tools=tools).tools] == [True, False, False]


def test_a_custom_tool_is_a_function_with_one_string() -> None:
    """The model reads the grammar of its input."""
    grammar = {"type": "grammar", "syntax": "lark", "definition": "start: /a+/"}
    (tool,) = neutral(tools=[{**PATCH, "format": grammar}]).tools

    assert tool.description == "Edit files.\nThe input follows this lark grammar:\nstart: /a+/"
    assert list(tool.parameters["properties"]) == tool.parameters["required"] == ["input"]


def test_a_custom_call_is_mapped_back() -> None:
    """Items and events have the input as text."""
    engine = pieces(Call("apply_patch"), Arguments('{"input": "*** Be'), Arguments('gin\\n"}'), CallEnd())
    data = streamed(engine, tools=[PATCH])

    (item,) = data[-1]["response"]["output"]
    assert kinds(data)[2:-1] == [
        "output_item.added",
        "custom_tool_call_input.delta",
        "custom_tool_call_input.done",
        "output_item.done",
    ]
    assert item.pop("id").startswith("ctc_")
    assert item.pop("call_id").startswith("call_")
    assert item == {
        "type": "custom_tool_call",
        "name": "apply_patch",
        "input": "*** Begin\n",
        "status": "completed",
    }
    assert data[-4]["delta"] == data[-3]["input"] == "*** Begin\n"


def test_a_cut_custom_call_is_not_in_the_output() -> None:
    """It ends as incomplete."""
    engine = pieces(Call("apply_patch"), Arguments('{"input": "*** Be'), Arguments('gin\\n"}'), CallEnd())
    data = streamed(engine, tools=[PATCH], max_output_tokens=2)

    assert kinds(data)[2:] == ["output_item.added", "output_item.done", "incomplete"]
    assert data[-1]["response"]["output"] == []


def test_a_namespace_is_mapped_back() -> None:
    """A call has the tool's own name and its namespace."""
    _, body = respond(pieces(Call("mcp__github__search"), Arguments("{}"), CallEnd()), tools=[GITHUB])

    (item,) = body["output"]
    assert (item["name"], item["namespace"]) == ("search", "mcp__github")


def test_long_names_of_namespaces_stay_different() -> None:
    """The model's names have at most 64 characters."""
    names = [qualified("n" * 60, f"tool_{number}") for number in range(3)]

    assert len(set(names)) == 3
    assert all(len(name) == 64 for name in names)
    assert qualified("a.b__", "c") == "a_b__c"


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ToolChoice("auto")),
        ("none", ToolChoice("none")),
        ("required", ToolChoice("required")),
        ({"type": "function", "name": "weather", "strict": True}, ToolChoice("required", ("weather",))),
        ({"type": "custom", "name": "apply_patch"}, ToolChoice("required", ("apply_patch",))),
        ({"type": "function", "name": "search"}, ToolChoice("required", ("mcp__github__search",))),
        ({"type": "function", "name": "mcp__github__search"}, ToolChoice("required", ("mcp__github__search",))),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [
                {"type": "function", "name": "weather"}, {"type": "web_search"}]},
            ToolChoice("auto", ("weather",)),
        ),
        ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "web_search"}]}, ToolChoice("none")),
    ],
)  # fmt: skip
def test_choices(choice: Any, expected: ToolChoice) -> None:
    """The response echoes the choice."""
    fields = {"tools": [WEATHER, PATCH, GITHUB, *HOSTED], "tool_choice": choice}
    _, body = respond(pieces("Fine."), **fields)

    assert neutral(**fields).tool_choice == expected
    if isinstance(choice, dict):
        assert body["tool_choice"]["type"] == choice["type"]
    else:
        assert body["tool_choice"] == (choice or "auto")


def test_the_other_fields_reach_the_engine() -> None:
    """Under the names that chat has for them."""
    conversation = neutral(
        reasoning={"effort": "low", "summary": "auto"},
        chat_template_kwargs={"a": 1},
        max_output_tokens=7,
        temperature=0,
        seed=3,
        truncation="auto",
        parallel_tool_calls=False,
        text={"format": {"type": "json_schema", "name": "a", "schema": {"type": "object"}}, "verbosity": "low"},
    )

    assert (conversation.reasoning.effort, conversation.reasoning.enabled) == ("low", True)
    assert conversation.reasoning.variables == {"a": 1}
    assert (conversation.max_tokens, conversation.sampling.temperature, conversation.sampling.seed) == (7, 0, 3)
    assert (conversation.truncate, conversation.parallel, conversation.schema) == (True, False, {"type": "object"})
    assert neutral(reasoning={"effort": "none"}).reasoning.enabled is False
    assert neutral(text={"format": {"type": "json_object"}}).schema == {"type": "object"}


def test_formats_are_echoed() -> None:
    """With the name that Open Responses demands."""
    schema = {"type": "object", "properties": {}}
    _, body = respond(ScriptedEngine("{}"), text={"format": {"type": "json_schema", "schema": schema}})

    assert body["text"] == {
        "format": {
            "type": "json_schema",
            "name": "response",
            "description": None,
            "schema": schema,
            "strict": True,
        },
        "verbosity": "medium",
    }


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"role": "robot", "content": "a"}]}, "input[0].role"),
        ({"input": [{"content": "a"}]}, "input[0].type"),
        ({"input": [{"type": "message", "content": "a"}]}, "input[0].role"),
        ({"input": [{"type": "poem", "content": "a"}]}, "input[0].type"),
        ({"input": [{"type": "compaction", "encrypted_content": "a"}]}, "input[0].type"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id"),
        ({"input": [USER, output("7")]}, "input"),
        ({"input": [output("1"), call("1")]}, "input"),
        ({"input": [call("1"), output("1", None)]}, "input[1].output"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]}]},
         "input[0].content[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"messages": [USER]}, "messages"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"truncation": "always"}, "truncation"),
        ({"metadata": {"a": 1}}, "metadata[...]"),
        ({"reasoning": {"effort": "heroic"}}, "reasoning.effort"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "nothing"}}}},
         "text.format.schema"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "name": "a", "parameters": {"type": "string"}}]}, "tools[0].parameters"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [{"type": "namespace", "name": "a", "tools": [GITHUB]}]}, "tools[0].tools[0].type"),
        ({"tools": HOSTED, "tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"tools": HOSTED, "tool_choice": "required"}, "tool_choice"),
        ({"tools": HOSTED, "tool_choice": {"type": "allowed_tools", "mode": "required", "tools": HOSTED}},
         "tool_choice.tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "time"}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function"}}, "tool_choice.name"),
        ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice"),
        ({"model": "gpt-4o"}, "model"),
        ({"input": "x" * 600}, "input"),
    ],
)  # fmt: skip
def test_mistakes_are_4xx_that_name_the_field(fields: dict[str, Any], param: str) -> None:
    """Streamed or not, before the first event."""
    for stream in (False, True):
        status, body = respond(ScriptedEngine(), stream=stream, **fields)

        assert status == (404 if "model" in fields else 400), body
        assert body["error"]["param"] == param, body
        assert body["error"]["type"] == "invalid_request_error"


def test_a_previous_response_without_a_store_says_what_to_do() -> None:
    """Agents know the code; operators need the setting."""
    _, body = respond(ScriptedEngine(), previous_response_id="resp_1")

    assert body["error"]["code"] == "previous_response_not_found"
    assert "RESPONSES_STORE" in body["error"]["message"]
