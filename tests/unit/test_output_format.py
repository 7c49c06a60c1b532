"""How a request's answer is written and read: the model's dialect, the grammar, the parser and the prompt's end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from msgspec.structs import replace

from core.conversation import Conversation, ReasoningOptions, Tool, ToolChoice, builder
from core.engine.interface import Arguments, Call, CallEnd, Delta, GenerationRequest, Sampling, Text
from core.engine.llama import Llama
from core.engine.output.dialect import dialect_of
from core.errors import InvalidRequest
from tests import chat_templates
from tests.fakes import ScriptedEngine, fake_service
from tests.unit.test_tool_prompts import MarkingEngine

WEATHER = Tool(
    "weather",
    None,
    {"type": "object", "properties": {"city": {"type": "string", "maxLength": 5}}, "required": ["city"]},
)
TIME = Tool("time", "Tell the time", {"type": "object", "properties": {}})
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}


def request(engine: Any, **fields: Any) -> GenerationRequest:
    conversation = Conversation([{"role": "user", "content": "Hi"}], **fields)
    return builder(fake_service(ScriptedEngine()).service, conversation)(engine)


def prompt_of(engine: MarkingEngine, **fields: Any) -> str:
    return engine.shown(request(engine, **fields).prompt)


def test_a_dialect_knows_which_markers_are_tokens() -> None:
    engine = MarkingEngine(chat_templates.HERMES, ("<tool_call>", "</tool_call>", "<|im_end|>"))
    dialect = dialect_of(engine)

    assert dialect.family.name == "hermes"
    assert dialect.texts == {"<tool_call>", "</tool_call>"}
    assert dialect.think is not None
    assert dialect_of(engine) is dialect


def test_a_model_that_does_not_reason_needs_no_parser() -> None:
    """A plain chat's tokens are text."""
    engine = MarkingEngine(chat_templates.SMOLLM_2)

    assert dialect_of(engine).think is None
    assert request(engine).output is None
    assert request(MarkingEngine(chat_templates.HERMES)).output is not None


def test_a_required_call_is_constrained_from_the_first_token() -> None:
    made = request(MarkingEngine(chat_templates.HERMES), tools=(WEATHER, TIME), tool_choice=ToolChoice("required"))

    assert made.grammar is not None
    assert "weather" in made.grammar
    assert made.output is not None
    assert made.output.call_grammar is None


def test_another_call_is_constrained_from_its_opener_on() -> None:
    made = request(MarkingEngine(chat_templates.HERMES), tools=(WEATHER, TIME), parallel=False)

    assert made.grammar is None
    assert made.output is not None
    assert made.output.call_grammar is not None
    assert made.output.end_after_call


def test_allowed_tools_stay_in_the_prompt() -> None:
    """Only the grammar narrows, so that the prompt's prefix stays the same."""
    engine = MarkingEngine(chat_templates.HERMES)
    narrowed = request(engine, tools=(WEATHER, TIME), tool_choice=ToolChoice("auto", ("time",)))

    assert narrowed.prompt == request(engine, tools=(WEATHER, TIME)).prompt
    assert narrowed.output is not None
    assert "weather" not in (narrowed.output.call_grammar or "")


def test_tools_that_must_not_be_called_are_not_shown() -> None:
    text = prompt_of(MarkingEngine(chat_templates.HERMES), tools=(WEATHER,), tool_choice=ToolChoice("none"))

    assert "weather" not in text


def test_calls_or_json_may_answer() -> None:
    made = request(MarkingEngine(chat_templates.HERMES), tools=(WEATHER,), schema=SCHEMA)

    assert made.grammar is not None
    assert "weather" in made.grammar
    assert "boolean" in made.grammar


def test_harmony_answers_with_json_in_its_final_channel() -> None:
    made = request(MarkingEngine(chat_templates.HARMONY), schema=SCHEMA)

    assert made.grammar is not None
    assert "<|channel|>final<|message|>" in made.grammar


@pytest.mark.parametrize(
    ("fields", "end"),
    [
        ({}, "<think>\n"),
        ({"reasoning": ReasoningOptions(enabled=False)}, "</think>\n\n"),
        ({"schema": SCHEMA}, "</think>\n\n"),
        ({"tools": (TIME,), "tool_choice": ToolChoice("required")}, "</think>\n\n"),
        ({"tools": (TIME,)}, "<think>\n"),
        ({"schema": SCHEMA, "reasoning": ReasoningOptions(enabled=True)}, "<think>\n"),
    ],
)
def test_a_constrained_answer_skips_reasoning_unless_asked_for(fields: dict[str, Any], end: str) -> None:
    """The template opens the reasoning; where nothing is constrained, it stays open."""
    engine = MarkingEngine(chat_templates.DEEPSEEK_R1)
    made = request(engine, **fields)

    assert engine.shown(made.prompt).endswith(end)
    assert made.output is not None
    assert made.output.parser().reasoning is end.startswith("<think>")
    assert bool(made.output.closer) is end.startswith("<think>")


def test_reasoning_options_reach_the_template() -> None:
    hermes = MarkingEngine(chat_templates.HERMES)
    harmony = MarkingEngine(chat_templates.HARMONY)

    assert prompt_of(hermes, reasoning=ReasoningOptions(enabled=False)).endswith("</think>\n\n")
    assert prompt_of(hermes, reasoning=ReasoningOptions(variables={"enable_thinking": False})).endswith("</think>\n\n")
    assert "Reasoning: low" in prompt_of(harmony, reasoning=ReasoningOptions(effort="minimal"))
    assert "Reasoning: medium" in prompt_of(harmony, reasoning=ReasoningOptions(effort="none"))


def test_a_strict_tool_that_cannot_be_enforced_is_refused_with_its_place() -> None:
    odd = replace(WEATHER, parameters={"type": "object", "properties": {"a": {"not": {}}}}, strict=True)
    with pytest.raises(InvalidRequest, match=r"tool 'weather'.*'not'") as caught:
        request(MarkingEngine(None), tools=(TIME, odd), tools_field="tools[{}].parameters")
    assert caught.value.param == "tools[1].parameters"


@pytest.mark.parametrize("parallel", [False, True])
def test_a_model_with_random_weights_makes_required_calls(tiny_engine: Callable[..., Llama], parallel: bool) -> None:
    """Its vocabulary has the family's markers as tokens."""
    engine = tiny_engine("control", n_ctx=2048)
    made = request(
        engine,
        tools=(WEATHER, TIME),
        tool_choice=ToolChoice("required"),
        parallel=parallel,
        sampling=Sampling(seed=7),
        max_tokens=200,
    )
    assert dialect_of(engine).texts >= {"<tool_call>", "</tool_call>"}

    async def deltas() -> list[Delta]:
        return [delta async for delta in engine.generate(made)]

    answer = asyncio.run(deltas())
    events = [event for delta in answer for event in delta.events]

    assert [event for event in events if isinstance(event, Text) and event.text.strip()] == []
    calls = [event.name for event in events if isinstance(event, Call)]
    assert calls
    assert set(calls) <= {"weather", "time"}
    if not parallel:
        assert answer[-1].finish_reason == "tool_calls"
        assert len(calls) == sum(isinstance(event, CallEnd) for event in events) == 1
        arguments = json.loads("".join(event.text for event in events if isinstance(event, Arguments)))
        assert arguments == {} or len(arguments["city"]) <= 5
