"""Anthropic's messages: translation, blocks, events, errors, and the reuse of prompt prefixes."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgspec
import pytest

from core.engine.interface import Arguments, Call, CallEnd, Reasoning, Text
from core.errors import ModelUnavailable
from core.wire import messages as wire
from core.wire.messages import MessagesRequest
from handlers.dispatch import dispatch
from handlers.http import Request
from tests.fakes import ScriptedEngine, fake_service
from tests.unit.test_chat import read

HELLO = [{"role": "user", "content": "Hello"}]
WEATHER = {"name": "weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}
CALL = (Call("weather"), Arguments('{"city": '), Arguments('"Oslo"}'), CallEnd())


def post(engine: ScriptedEngine, path: str = "/v1/messages", **fields: Any) -> tuple[int, Any]:
    body = json.dumps({"max_tokens": 50, "messages": HELLO, **fields}).encode()
    request = Request("POST", path, "req_1", {"content-type": "application/json"}, body=body)
    fake = fake_service(engine)

    async def call() -> tuple[int, Any]:
        response = await dispatch(fake.service, request)
        assert ("request-id", "req_1") in response.headers
        return await read(response)

    status, answer = asyncio.run(call())
    assert fake.host.leases == 0
    assert fake.engine.running == 0
    return status, answer


def events(stream: str) -> list[Any]:
    """Return the data of each frame, which names its type in its event line."""
    data = []
    for frame in stream.split("\n\n"):
        if not frame or frame.startswith(":"):
            continue
        name, _, rest = frame.partition("\n")
        event = json.loads(rest.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        data.append(event)
    return data


def translated(**fields: Any) -> list[dict[str, Any]]:
    request = msgspec.convert({"max_tokens": 1, "messages": HELLO, **fields}, MessagesRequest)
    return wire.conversation(request).messages


def test_a_message_has_anthropics_shape() -> None:
    """Input tokens leave out cached ones, which have a count of their own."""
    engine = ScriptedEngine("Good day.", cached_tokens=3)
    status, body = post(engine)

    prompt = len(engine.requests[0].prompt)
    assert status == 200
    assert body.pop("id").startswith("msg_")
    assert body == {
        "type": "message",
        "role": "assistant",
        "model": "fake-1b",
        "content": [{"type": "text", "text": "Good day."}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": prompt - 3,
            "output_tokens": 2,
            "cache_read_input_tokens": 3,
            "cache_creation_input_tokens": 0,
        },
    }


def test_blocks_are_in_order_and_closed() -> None:
    """Thinking, text and a call are blocks 0, 1 and 2; each is closed before the next begins."""
    pieces = (Reasoning("Hm"), Reasoning("m."), Text("Let me look."), *CALL)
    _, body = post(ScriptedEngine(pieces=pieces), tools=[WEATHER], stream=True)

    stream = events(body)
    assert [(event["type"], event.get("index")) for event in stream] == [
        ("message_start", None),
        ("content_block_start", 0),
        ("content_block_delta", 0),
        ("content_block_delta", 0),
        ("content_block_delta", 0),
        ("content_block_stop", 0),
        ("content_block_start", 1),
        ("content_block_delta", 1),
        ("content_block_stop", 1),
        ("content_block_start", 2),
        ("content_block_delta", 2),
        ("content_block_delta", 2),
        ("content_block_stop", 2),
        ("message_delta", None),
        ("message_stop", None),
    ]
    assert stream[0]["message"]["content"] == []
    assert stream[0]["message"]["stop_reason"] is None
    assert stream[4]["delta"]["type"] == "signature_delta"
    assert stream[9]["content_block"]["input"] == {}
    assert stream[9]["content_block"]["id"].startswith("toolu_")
    assert stream[10]["delta"] == {"type": "input_json_delta", "partial_json": '{"city": '}
    assert stream[13]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert "[DONE]" not in body


def test_the_message_is_the_fold_of_its_stream() -> None:
    """Thinking, text and calls are the same, streamed or not."""
    pieces = (Reasoning("Hmm."), Text("Let me look."), *CALL, Call("weather"), Arguments("{}"), CallEnd())
    _, body = post(ScriptedEngine(pieces=pieces), tools=[WEATHER])

    thinking, text, first, second = body["content"]
    assert (thinking["thinking"], bool(thinking["signature"])) == ("Hmm.", True)
    assert text == {"type": "text", "text": "Let me look."}
    assert (first["name"], first["input"], second["input"]) == ("weather", {"city": "Oslo"}, {})
    assert first["id"] != second["id"]
    assert body["stop_reason"] == "tool_use"


def test_an_empty_answer_has_no_block() -> None:
    """Anthropic's API refuses empty text blocks when they are sent back."""
    _, body = post(ScriptedEngine(pieces=("",)))

    assert body["content"] == []


@pytest.mark.parametrize(
    ("pieces", "fields", "reason"),
    [
        (("a ", "b "), {"max_tokens": 1}, "max_tokens"),
        (CALL, {"max_tokens": 2, "tools": [WEATHER]}, "max_tokens"),
        (("a ",), {"stop_sequences": ["x"]}, "end_turn"),
    ],
)
def test_the_reason_says_why_it_ended(pieces: tuple[Any, ...], fields: dict[str, Any], reason: str) -> None:
    """A cut call does not ask for its tool to be run."""
    _, body = post(ScriptedEngine(pieces=pieces), **fields)

    assert body["stop_reason"] == reason


def test_results_come_before_text_and_errors_are_named() -> None:
    """Templates expect the results of calls directly after them."""
    messages = [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Call it.", "signature": "x"},
                {"type": "text", "text": "Looking."},
                {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Oslo"}},
                {"type": "tool_use", "id": "toolu_2", "name": "weather", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Here."},
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "Rain"}]},
                {"type": "tool_result", "tool_use_id": "toolu_2", "content": "no city", "is_error": True},
            ],
        },
    ]

    _, assistant, first, second, user = translated(messages=messages)

    assert (assistant["reasoning_content"], assistant["content"]) == ("Call it.", "Looking.")
    assert [call["function"]["arguments"] for call in assistant["tool_calls"]] == [{"city": "Oslo"}, {}]
    assert first == {"role": "tool", "content": "Rain", "tool_call_id": "toolu_1"}
    assert second["content"] == "Error: no city"
    assert user == {"role": "user", "content": "Here."}


def test_claude_codes_habits_keep_the_prefix() -> None:
    """The billing line differs in each request, and later system messages must not move to the front."""

    def turn(stamp: str, *more: dict[str, Any]) -> list[dict[str, Any]]:
        system = [
            {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2; cch={stamp};"},
            {"type": "text", "text": "You are an agent.", "cache_control": {"type": "ephemeral"}},
        ]
        return translated(system=system, messages=[{"role": "system", "content": "Be brief."}, *HELLO, *more])

    first = turn("aaaaa")
    second = turn("bbbbb", {"role": "assistant", "content": "Hi."}, {"role": "system", "content": "Time: 9."}, *HELLO)

    assert first[0] == {"role": "system", "content": "You are an agent.\n\nBe brief."}
    assert second[: len(first)] == first
    assert second[3]["role"] == "user"
    assert second[3]["content"] == "<system-reminder>\nTime: 9.\n</system-reminder>\nHello"


def test_server_tools_are_accepted_and_not_shown() -> None:
    """Claude Code sends them next to its own tools."""
    request = {"tools": [{"type": "web_search_20250305", "name": "web_search"}, WEATHER], "max_tokens": 1}
    neutral = wire.conversation(msgspec.convert({"messages": HELLO, **request}, MessagesRequest))

    assert [tool.name for tool in neutral.tools] == ["weather"]


def test_counting_gives_the_input_tokens() -> None:
    """The count equals the tokens of the real request; it needs no max_tokens."""
    engine = ScriptedEngine()
    _, message = post(engine, system="Be brief.")
    status, count = post(ScriptedEngine(), "/v1/messages/count_tokens", system="Be brief.")

    assert (status, count) == (200, {"input_tokens": message["usage"]["input_tokens"]})


def test_an_error_after_the_status_is_an_event() -> None:
    """Anthropic's clients raise it."""
    engine = ScriptedEngine("a b", endless=True, delay=0.01)
    fake = fake_service(engine)
    body = json.dumps({"max_tokens": 5000, "messages": HELLO, "stream": True}).encode()

    async def call() -> str:
        request = Request("POST", "/v1/messages", "req_1", {"content-type": "application/json"}, body=body)
        response = await dispatch(fake.service, request)
        engine.error = ModelUnavailable("The model went away.", retry_after=1)
        _, text = await read(response)
        return str(text)

    *_, last = events(asyncio.run(call()))
    assert last == {"type": "error", "error": {"type": "overloaded_error", "message": "The model went away."}}


@pytest.mark.parametrize(
    ("fields", "status", "kind", "words"),
    [
        ({"max_tokens": 0}, 400, "invalid_request_error", "'max_tokens'"),
        ({"messages": []}, 400, "invalid_request_error", "'messages'"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "invalid_request_error", "'assistant'"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "I"}]}, 400, "invalid_request_error", "not supported"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            400,
            "invalid_request_error",
            "only reads text",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": "x"}]}]},
            400,
            "invalid_request_error",
            "tool_use_id",
        ),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool"}}, 400, "invalid_request_error", "'tool_choice.name'"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "x"}}, 400, "invalid_request_error", "'weather'"),
        (
            {
                "tools": [
                    {"name": "f", "strict": True, "input_schema": {"type": "object", "properties": {"a": {"not": {}}}}}
                ]
            },
            400,
            "invalid_request_error",
            "'not'",
        ),
        ({"thread": {"type": "create"}}, 400, "invalid_request_error", "all messages"),
        ({"tool_choice": {"type": "any"}}, 400, "invalid_request_error", "no tools"),
        ({"temperature": 1.5}, 400, "invalid_request_error", "from 0 to 1"),
        ({"model": "claude-9"}, 404, "not_found_error", "'claude-9'"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, 400, "invalid_request_error", "tokens"),
    ],
)
def test_an_error_has_anthropics_envelope(fields: dict[str, Any], status: int, kind: str, words: str) -> None:
    """Status, type and message are what Anthropic's clients expect."""
    code, body = post(ScriptedEngine(), **fields)

    assert code == status
    assert set(body) == {"type", "error", "request_id"}
    assert (body["type"], body["error"]["type"], body["request_id"]) == ("error", kind, "req_1")
    assert words in body["error"]["message"]
