"""pydantic-ai, over chat completions, Responses and Anthropic's messages."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from pydantic_ai import Agent, NativeOutput, RunContext, ToolOutput
from pydantic_ai.capabilities import AbstractCapability
from pydantic_ai.models import Model
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.profiles import ModelProfile
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings
from weather import MODEL, QUESTION, REPORT, Calls, City, Weather

MakeModel = Callable[[], Model]
SETTINGS = ModelSettings(temperature=0, max_tokens=100)


@pytest.fixture(params=["chat", "responses", "messages"])
def make_model(request: pytest.FixtureRequest, server: str) -> MakeModel:
    """Return a function, because a client belongs to one event loop."""
    if request.param == "messages":
        profile = ModelProfile(supports_json_schema_output=True)  # for a model whose name is not Claude
        return lambda: AnthropicModel(
            MODEL, provider=AnthropicProvider(base_url=server, api_key="none"), profile=profile
        )
    kind = OpenAIChatModel if request.param == "chat" else OpenAIResponsesModel
    return lambda: kind(MODEL, provider=OpenAIProvider(base_url=f"{server}/v1", api_key="none"))


class CallsAToolFirst(AbstractCapability[None]):
    """Demand a tool call in the first step only."""

    def get_model_settings(self) -> Callable[[RunContext[None]], ModelSettings]:
        return lambda context: ModelSettings(tool_choice="required" if context.run_step == 1 else "none")


async def run(agent: Agent[None, object], prompt: str, streamed: bool) -> object:
    if not streamed:
        return (await agent.run(prompt)).output
    async with agent.run_stream(prompt) as result:
        pieces = [piece async for piece in result.stream_output(debounce_by=None)]
        assert len(pieces) > 1
        return await result.get_output()


@pytest.mark.parametrize("streamed", [False, True])
def test_a_tool_is_called(make_model: MakeModel, calls: Calls, streamed: bool) -> None:
    """The first answer must call the tool, the second one must not."""

    async def go() -> object:
        agent = Agent(make_model(), model_settings=SETTINGS, capabilities=[CallsAToolFirst()])

        @agent.tool_plain
        def get_weather(city: City) -> str:
            """Get the weather in a city."""
            return calls.get_weather(city)

        return await run(agent, QUESTION, streamed)

    output = asyncio.run(go())

    assert calls
    assert isinstance(output, str)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("output_type", [NativeOutput(Weather), ToolOutput(Weather)], ids=["native", "tool"])
def test_a_structured_output_is_parsed(make_model: MakeModel, output_type: object, streamed: bool) -> None:
    """It comes as text that a schema constrains, or as the arguments of a tool that must be called."""

    async def go() -> object:
        agent = Agent(make_model(), output_type=output_type, model_settings=SETTINGS)
        return await run(agent, REPORT, streamed)

    assert isinstance(asyncio.run(go()), Weather)
