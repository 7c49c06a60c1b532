"""Truncation "auto": as few of the oldest turns are dropped as possible."""

from __future__ import annotations

from typing import Any

import pytest

from core.engine.interface import GenerationRequest
from core.errors import InvalidRequest
from core.truncation import fitted, split
from tests.fakes import ScriptedEngine
from tests.unit.test_response_items import call, output
from tests.unit.test_responses import respond

SYSTEM = {"role": "system", "content": "s"}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def build(messages: Any, max_tokens: int | None = None) -> GenerationRequest:
    """One token for each character."""
    return GenerationRequest(tuple(range(sum(len(message["content"]) for message in messages))), max_tokens=max_tokens)


def test_turns_begin_with_a_user() -> None:
    """Calls and their results stay with them."""
    tool = {"role": "tool", "content": "t"}
    messages = [SYSTEM, user("a"), user("b"), answer("c"), tool, answer("d"), user("e")]

    assert split(messages) == ([SYSTEM], [messages[1:6], messages[6:]])
    assert split([SYSTEM]) == ([SYSTEM], [])
    assert split([answer("c"), user("a")]) == ([], [[answer("c")], [user("a")]])


@pytest.mark.parametrize(("n_ctx", "turns"), [(140, 10), (100, 7), (60, 4), (40, 3), (30, 2), (20, 1), (4, 1)])
def test_as_few_turns_as_possible_are_dropped(n_ctx: int, turns: int) -> None:
    """The system message and the last turn stay, and a quarter of the context is left for the answer if it can be."""
    messages = [SYSTEM, *(user("12345678") if at % 2 == 0 else answer("12") for at in range(19))]
    shown: list[Any] = []

    def record(given: Any) -> GenerationRequest:
        shown.append(given)
        return build(given)

    request = fitted(messages, n_ctx, record)
    final = next(each for each in shown if len(build(each).prompt) == len(request.prompt))

    assert final[0] == SYSTEM
    assert final[-1] == messages[-1]
    assert sum(message["role"] == "user" for message in final) == turns


def test_a_small_answer_needs_little_room() -> None:
    """`max_tokens` may be less than a quarter of the context."""
    messages = [user("x" * 50), answer("y" * 20), user("z" * 20)]

    assert len(fitted(messages, 100, lambda given: build(given, 10)).prompt) == 90
    assert len(fitted(messages, 100, build).prompt) == 20


def test_other_errors_are_raised() -> None:
    """Only a context that is too small is a reason to drop a turn."""

    def refuse(messages: Any) -> GenerationRequest:
        raise InvalidRequest("The template refuses these messages.")

    with pytest.raises(InvalidRequest, match="refuses"):
        fitted([user("a"), user("b")], 100, refuse)


def test_a_response_with_truncation_fits() -> None:
    """Without it the same input is a 400. If the last turn alone is too long, it is one with it as well."""
    items = [
        {"role": "user", "content": "x" * 300},
        call("1"),
        output("1", "y" * 300),
        {"role": "user", "content": "z"},
    ]
    engine = ScriptedEngine("Fine.")

    assert respond(engine, input=items)[1]["error"]["code"] == "context_length_exceeded"
    status, body = respond(engine, input=items, truncation="auto")
    assert (status, body["truncation"]) == (200, "auto")
    prompt = bytes(engine.requests[-1].prompt).decode()
    assert "z" in prompt
    assert "xxx" not in prompt
    status, body = respond(engine, input="x" * 600, truncation="auto")
    assert (status, body["error"]["code"], body["error"]["param"]) == (400, "context_length_exceeded", "input")
