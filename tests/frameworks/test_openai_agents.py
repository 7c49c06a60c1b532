"""openai-agents, over chat completions and over Responses."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import agents
import pytest
from agents import Agent, Model, ModelSettings, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner
from openai import AsyncOpenAI
from weather import MODEL, QUESTION, REPORT, Calls, City, Weather

agents.set_tracing_disabled(True)  # it would send traces to OpenAI

MakeModel = Callable[[], Model]


@pytest.fixture(params=[OpenAIChatCompletionsModel, OpenAIResponsesModel])
def make_model(request: pytest.FixtureRequest, url: str) -> MakeModel:
    """Return a function, because a client belongs to one event loop."""
    return lambda: request.param(MODEL, AsyncOpenAI(base_url=url, api_key="none", max_retries=0))


async def run(agent: Agent, prompt: str, streamed: bool) -> tuple[object, list[str]]:
    """Return the final output and the types of the streamed events."""
    if not streamed:
        return (await Runner.run(agent, prompt)).final_output, []
    result = Runner.run_streamed(agent, prompt)
    names = [event.data.type async for event in result.stream_events() if event.type == "raw_response_event"]
    return result.final_output, names


@pytest.mark.parametrize("streamed", [False, True])
def test_a_tool_is_called(make_model: MakeModel, calls: Calls, streamed: bool) -> None:
    """The first answer must call the tool. The framework then sets the tool choice back to "auto"."""

    @agents.function_tool
    def get_weather(city: City) -> str:
        """Get the weather in a city."""
        return calls.get_weather(city)

    async def go() -> tuple[object, list[str]]:
        settings = ModelSettings(temperature=0, max_tokens=256, tool_choice="required", parallel_tool_calls=False)
        agent = Agent("a", instructions="Be brief.", model=make_model(), tools=[get_weather], model_settings=settings)
        return await run(agent, QUESTION, streamed)

    output, names = asyncio.run(go())

    assert calls
    assert isinstance(output, str)
    assert ("response.function_call_arguments.delta" in names) == streamed
    assert ("response.output_text.delta" in names) == streamed


@pytest.mark.parametrize("streamed", [False, True])
def test_a_structured_output_is_parsed(make_model: MakeModel, streamed: bool) -> None:
    async def go() -> tuple[object, list[str]]:
        settings = ModelSettings(temperature=0, max_tokens=100)
        agent = Agent("a", instructions="Be brief.", model=make_model(), output_type=Weather, model_settings=settings)
        return await run(agent, REPORT, streamed)

    output, names = asyncio.run(go())

    assert isinstance(output, Weather)
    assert ("response.output_text.delta" in names) == streamed
