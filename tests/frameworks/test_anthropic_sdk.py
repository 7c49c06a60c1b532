"""Anthropic's own client: its tool runner and `parse`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from anthropic import Anthropic, beta_tool
from weather import MODEL, QUESTION, REPORT, Calls, City, Weather


@pytest.fixture
def client(server: str) -> Iterator[Anthropic]:
    with Anthropic(base_url=server, api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("streamed", [False, True])
def test_the_tool_runner_calls_a_tool(client: Anthropic, calls: Calls, streamed: bool) -> None:
    """Every answer must call the tool, so the runner is stopped after two."""

    @beta_tool
    def get_weather(city: City) -> str:
        """Get the weather in a city."""
        return calls.get_weather(city)

    runner = client.beta.messages.tool_runner(
        model=MODEL,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=64,
        extra_body={"temperature": 0},  # newer models do not take it
        tools=[get_weather],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        max_iterations=2,
        stream=streamed,
        thread=False,  # the server keeps no message threads
    )
    messages = [turn.get_final_message() if streamed else turn for turn in runner]

    assert [message.stop_reason for message in messages] == ["tool_use", "tool_use"]
    assert calls


def test_parse_returns_the_structured_output(client: Anthropic) -> None:
    answer = client.messages.parse(
        model=MODEL, messages=[{"role": "user", "content": REPORT}], max_tokens=100, output_format=Weather
    )

    assert isinstance(answer.parsed_output, Weather)
