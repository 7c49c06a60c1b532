"""Responses: the events of every kind of answer, and the response that they add up to."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from msgspec.structs import replace
from openai.types.responses import Response as OpenAIResponse

from core.engine.interface import Arguments, Call, CallEnd, Event, Reasoning
from core.errors import ModelUnavailable
from handlers import generate
from handlers.dispatch import dispatch
from handlers.http import Request
from tests.fakes import CARD, FakeService, ScriptedEngine, fake_service
from tests.unit.test_chat import read

WEATHER = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}}
CALL = (Call("weather"), Arguments('{"city": '), Arguments('"Oslo"}'), CallEnd())

OPEN = ["response.created", "response.in_progress"]
TEXT = ["output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done"]
REASONING = [
    "output_item.added",
    "content_part.added",
    "reasoning_text.delta",
    "reasoning_text.done",
    "content_part.done",
    "output_item.done",
]
FUNCTION = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]

# Every key of Open Responses' schema: none may be absent.
KEYS = (  # noqa: SIM905 - a list would be a page long
    "id object created_at completed_at status incomplete_details error model output previous_response_id instructions "
    "tools tool_choice parallel_tool_calls truncation text temperature top_p presence_penalty frequency_penalty "
    "top_logprobs reasoning max_output_tokens max_tool_calls store background service_tier metadata user "
    "safety_identifier prompt_cache_key usage"
).split()
NUMBERS = ("temperature", "top_p", "presence_penalty", "frequency_penalty", "top_logprobs")


def ask(fake: FakeService, method: str, path: str, body: Any = None, query: Any = None) -> tuple[int, Any]:
    content = b"" if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    request = Request(method, path, "req_1", headers, query or {}, body=content)

    async def call() -> tuple[int, Any]:
        return await read(await dispatch(fake.service, request))

    answer = asyncio.run(call())
    assert fake.host.leases == 0
    assert fake.engine.running == 0
    return answer


def respond(engine: ScriptedEngine, **fields: Any) -> tuple[int, Any]:
    return ask(fake_service(engine), "POST", "/v1/responses", {"input": "Hello", **fields})


def pieces(*items: str | Event) -> ScriptedEngine:
    """Return an engine with room for tools: it has a token for each byte of the prompt."""
    return ScriptedEngine(pieces=items, card=replace(CARD, n_ctx=8192))


def events(stream: str) -> list[Any]:
    """Return the data of each frame. Its event line names its type, and the numbers rise from 0."""
    data = []
    for frame in stream.split("\n\n"):
        if not frame or frame.startswith(":"):
            continue
        name, _, rest = frame.partition("\n")
        event = json.loads(rest.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        data.append(event)
    assert [event["sequence_number"] for event in data] == list(range(len(data)))
    return data


def streamed(engine: ScriptedEngine, **fields: Any) -> list[Any]:
    status, stream = respond(engine, stream=True, **fields)
    assert status == 200
    assert "[DONE]" not in stream
    return events(stream)


def kinds(data: list[Any]) -> list[str]:
    """Return the types of events, with one delta for several in a row."""
    types = [event["type"].removeprefix("response.") for event in data]
    return [kind for at, kind in enumerate(types) if not (kind.endswith("delta") and types[at - 1] == kind)]


def test_a_response_has_every_key_and_numbers() -> None:
    """OpenAI's client and Open Responses' schema read it."""
    engine = ScriptedEngine("Good day to you.", cached_tokens=3)
    status, body = respond(engine, temperature=0.5, metadata={"a": "b"}, user="u", instructions="Be kind.")

    prompt = len(engine.requests[0].prompt)
    assert status == 200
    OpenAIResponse.model_validate(body)
    assert set(body) == set(KEYS)
    assert all(isinstance(body[name], int | float) for name in NUMBERS)
    assert (body["temperature"], body["top_p"], body["metadata"], body["user"]) == (0.5, 1.0, {"a": "b"}, "u")
    assert (body["status"], body["object"], body["model"]) == ("completed", "response", "fake-1b")
    assert (body["store"], body["instructions"]) == (False, "Be kind.")
    assert body["id"].startswith("resp_")
    assert isinstance(body["completed_at"], int)
    assert body["output"][0].pop("id").startswith("msg_")
    assert body["output"] == [
        {
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "Good day to you.", "annotations": [], "logprobs": []}],
        }
    ]
    assert body["usage"] == {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0},
        "output_tokens": 4,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + 4,
    }


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (("Hi ", "there"), [*TEXT, "output_item.done"]),
        ((Reasoning("Hm. "), Reasoning("So."), "Hi"), [*REASONING, *TEXT, "output_item.done"]),
        (CALL, FUNCTION),
        ((*CALL, *CALL), [*FUNCTION, *FUNCTION]),
        (("Let me see.", *CALL), [*TEXT, "output_item.done", *FUNCTION]),
        ((Reasoning("Hm."), *CALL, "Done."), [*REASONING, *FUNCTION, *TEXT, "output_item.done"]),
        ((Reasoning("Hm."),), [*REASONING, *TEXT[:2], *TEXT[3:], "output_item.done"]),
    ],
    ids=["text", "reasoning and text", "call", "two calls", "text and call", "all", "reasoning alone"],
)
def test_events_come_in_order(script: Any, expected: list[str]) -> None:
    """Items do not interleave. Their indices and ids are the same in all their events and in the whole response."""
    data = streamed(pieces(*script))

    assert kinds(data) == ["created", "in_progress", *expected, "completed"]
    response = data[-1]["response"]
    assert {event["response"]["id"] for event in data if "response" in event} == {response["id"]}
    done = [event for event in data if event["type"] == "response.output_item.done"]
    assert [event["output_index"] for event in done] == list(range(len(done)))
    assert [event["item"] for event in done] == response["output"]
    added = [event["item"] for event in data if event["type"] == "response.output_item.added"]
    for before, after in zip(added, response["output"], strict=True):
        assert [before.get(key) for key in ("id", "type", "call_id", "name")] == [
            after.get(key) for key in ("id", "type", "call_id", "name")
        ]
        assert before["status"] == "in_progress"
    for event in data:
        if "item_id" in event:
            assert event["item_id"] == response["output"][event["output_index"]]["id"]


def test_deltas_add_up() -> None:
    """To the text, the reasoning and the arguments that the done events and the items have."""
    data = streamed(pieces(Reasoning("Hm. "), Reasoning("So."), "Hi ", "there", *CALL))

    reasoning, message, call = data[-1]["response"]["output"]
    for kind, whole, field in (
        ("reasoning_text", reasoning["content"][0]["text"], "text"),
        ("output_text", message["content"][0]["text"], "text"),
        ("function_call_arguments", call["arguments"], "arguments"),
    ):
        deltas = [event["delta"] for event in data if event["type"] == f"response.{kind}.delta"]
        done = next(event for event in data if event["type"] == f"response.{kind}.done")
        assert "".join(deltas) == whole == done[field]
        assert len(deltas) == 2
    assert json.loads(call["arguments"]) == {"city": "Oslo"}
    assert next(e for e in data if e["type"] == "response.function_call_arguments.done")["name"] == "weather"


def test_the_whole_response_is_that_of_the_stream() -> None:
    """Except for ids and times."""
    script = (Reasoning("Hm."), "Hi", *CALL)
    _, body = respond(pieces(*script))
    last = streamed(pieces(*script))[-1]["response"]

    def comparable(response: Any) -> Any:
        text = json.dumps({**response, "id": "", "created_at": 0, "completed_at": 0})
        for item in response["output"]:
            for key in ("id", "call_id"):
                text = text.replace(item.get(key, "\0"), "")
        return json.loads(text)

    assert comparable(body) == comparable(last)


def test_a_cut_text_is_incomplete() -> None:
    """The item, the response and the reason say so."""
    data = streamed(ScriptedEngine("one two three"), max_output_tokens=2)

    response = data[-1]["response"]
    assert data[-1]["type"] == "response.incomplete"
    assert (response["status"], response["completed_at"]) == ("incomplete", None)
    assert response["incomplete_details"] == {"reason": "max_output_tokens", "finish_cause": "max_tokens"}
    assert [item["status"] for item in response["output"]] == ["incomplete"]


def test_a_cut_call_is_not_in_the_output() -> None:
    """Its item ends as incomplete in the stream, without an event that says that its arguments are whole."""
    script = ("Let me see.", *CALL)
    data = streamed(pieces(*script), max_output_tokens=3)

    assert kinds(data)[-4:] == ["output_item.added", "function_call_arguments.delta", "output_item.done", "incomplete"]
    assert data[-2]["item"]["status"] == "incomplete"
    assert [item["type"] for item in data[-1]["response"]["output"]] == ["message"]
    assert data[-1]["response"]["output"][0]["status"] == "completed"


def test_logprobs_come_with_their_text() -> None:
    """With `include`, in deltas, in done events and in the part. Without it there are none."""
    include = ["message.output_text.logprobs"]
    fields: dict[str, Any] = {"top_logprobs": 2, "include": include}
    request = pieces("a", "b")
    data = streamed(request, **fields)

    assert request.requests[0].top_logprobs == 2
    assert data[-1]["response"]["top_logprobs"] == 2
    without = pieces("a")
    respond(without, top_logprobs=2)
    assert without.requests[0].top_logprobs is None


def test_encrypted_reasoning_is_read_back() -> None:
    """Agents that store nothing replay it."""
    status, body = respond(pieces(Reasoning("Hm, grün."), "Hi"), include=["reasoning.encrypted_content"])
    item = body["output"][0]
    replayed = {"type": "reasoning", "summary": [], "content": None, "encrypted_content": item["encrypted_content"]}

    from core.wire.responses.request import InputItem
    from core.wire.responses.translation import reasoning_text

    assert status == 200
    assert item["content"] == [{"type": "reasoning_text", "text": "Hm, grün."}]
    assert item["summary"] == []
    assert reasoning_text(InputItem(**replayed)) == "Hm, grün."
    assert reasoning_text(InputItem(type="reasoning", encrypted_content="gAAAAAB")) == ""
    assert reasoning_text(InputItem(type="reasoning", encrypted_content="slm1.%")) == ""


def test_an_error_after_the_first_byte_ends_the_stream_as_failed() -> None:
    """One event is valid for readers of the flat and of the nested form. The numbers and the response go on."""

    class Failing(ScriptedEngine):
        def generate(self, request: Any) -> Any:
            generation = super().generate(request)
            step = generation.__anext__

            async def fail() -> Any:
                if len(generation._todo) == 1:
                    generation.cancel()
                    raise ModelUnavailable("The engine failed.")
                return await step()

            generation.__class__ = type("Generation", (type(generation),), {"__anext__": lambda _: fail()})
            return generation

    data = streamed(Failing("one two three"))

    assert kinds(data) == ["created", "in_progress", *TEXT, "output_item.done", "error", "failed"]
    error, failed = data[-2:]
    assert (error["code"], error["message"], error["param"]) == ("model_unavailable", "The engine failed.", None)
    assert error["error"] == {
        "type": "server_error",
        "code": "model_unavailable",
        "message": "The engine failed.",
        "param": None,
    }
    response = failed["response"]
    assert (response["status"], response["id"]) == ("failed", data[0]["response"]["id"])
    assert response["error"] == {"code": "model_unavailable", "message": "The engine failed."}
    assert [item["status"] for item in response["output"]] == ["incomplete"]


def test_an_error_after_the_status_and_before_the_first_event_is_a_whole_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """OpenAI's client wants response.created first, whatever happens."""
    monkeypatch.setattr(generate, "PATIENCE_S", 0.0)
    data = streamed(ScriptedEngine(error=ModelUnavailable("No room."), delay=0.05))

    assert kinds(data) == ["created", "in_progress", "error", "failed"]
    assert data[-1]["response"]["model"] == "fake-1b"


def test_an_error_before_the_status_is_a_status() -> None:
    """With OpenAI's envelope, streamed or not."""
    for stream in (False, True):
        status, body = respond(ScriptedEngine(error=ModelUnavailable("No room.")), stream=stream)
        assert status == 503
        assert body["error"]["code"] == "model_unavailable"
