"""langchain-openai."""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import Any

import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage
from langchain_core.tools import BaseTool, tool
from langchain_openai import ChatOpenAI
from weather import MODEL, QUESTION, REPORT, Calls, City, Weather


@pytest.fixture(params=[False, True], ids=["chat", "responses"])
def model(request: pytest.FixtureRequest, url: str) -> ChatOpenAI:
    return ChatOpenAI(
        model=MODEL,
        base_url=url,
        api_key="none",
        temperature=0,
        max_tokens=100,
        max_retries=0,
        use_responses_api=request.param,
    )


@pytest.fixture
def get_weather(calls: Calls) -> BaseTool:
    @tool
    def get_weather(city: City) -> str:
        """Get the weather in a city."""
        return calls.get_weather(city)

    return get_weather


def ask(model: Any, messages: list[Any], streamed: bool) -> AIMessage:
    """Return the answer, or the sum of its streamed chunks."""
    if not streamed:
        return model.invoke(messages)
    chunks: list[AIMessageChunk] = list(model.stream(messages))
    assert len(chunks) > 1
    return reduce(add, chunks)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("choice", ["any", "get_weather"])
def test_a_tool_is_called(model: ChatOpenAI, get_weather: BaseTool, calls: Calls, choice: str, streamed: bool) -> None:
    """The model must call the tool, whose result message goes back."""
    messages: list[Any] = [HumanMessage(QUESTION)]
    answer = ask(model.bind_tools([get_weather], tool_choice=choice, parallel_tool_calls=False), messages, streamed)
    (call,) = answer.tool_calls
    messages += [answer, get_weather.invoke(call)]
    answer = ask(model.bind_tools([get_weather], tool_choice="none"), messages, streamed)

    assert calls
    assert answer.text
    assert answer.tool_calls == []


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_a_structured_output_is_parsed(model: ChatOpenAI, method: str) -> None:
    answer = model.with_structured_output(Weather, method=method).invoke(REPORT)

    assert isinstance(answer, Weather)


def test_a_structured_output_is_streamed(model: ChatOpenAI) -> None:
    *_, last = model.with_structured_output(Weather, method="json_schema").stream(REPORT)

    assert isinstance(last, Weather)
