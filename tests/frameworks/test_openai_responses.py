"""OpenAI's own client on Responses: `parse`, `stream` and its tool runner, which checks every item and event."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest
from openai import OpenAI, pydantic_responses_function_tool
from openai.lib.responses_tool_runner import RegisteredFunction, ResponsesToolRunner
from pydantic import BaseModel
from weather import MODEL, QUESTION, REPORT, Calls, City, Weather


class GetWeather(BaseModel):
    """Get the weather in a city."""

    city: City


TOOL = pydantic_responses_function_tool(GetWeather, name="get_weather")


@pytest.fixture
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def test_parse_returns_the_structured_output(client: OpenAI) -> None:
    answer = client.responses.parse(
        model=MODEL, input=REPORT, text_format=Weather, temperature=0, max_output_tokens=100
    )

    assert isinstance(answer.output_parsed, Weather)


def test_stream_returns_the_structured_output(client: OpenAI) -> None:
    with client.responses.stream(
        model=MODEL, input=REPORT, text_format=Weather, temperature=0, max_output_tokens=100
    ) as stream:
        events = [event.type for event in stream]
        answer = stream.get_final_response()

    assert isinstance(answer.output_parsed, Weather)
    assert events[0] == "response.created"
    assert events[-1] == "response.completed"


@pytest.mark.parametrize("streamed", [False, True])
def test_the_tool_runner_calls_a_tool(client: OpenAI, calls: Calls, streamed: bool) -> None:
    """Every answer must call the tool, so the runner is stopped after two."""
    function = RegisteredFunction.from_tool(TOOL, execute=lambda arguments: calls.get_weather(arguments.city))
    runner = ResponsesToolRunner(functions=[function])
    turns = runner.iterate(
        client,
        {
            "model": MODEL,
            "input": QUESTION,
            "temperature": 0,
            "max_output_tokens": 64,
            "tools": [{"type": "web_search"}],  # the runner takes "required" only with a tool that it does not run
            "tool_choice": "required",
            "parallel_tool_calls": False,
        },
        stream=streamed,
    )
    with closing(turns):
        first, second = next(turns), next(turns)

    assert [item.type for item in first.response.output] == ["function_call"]
    assert second.response.status == "completed"
    assert len(calls) == 1
