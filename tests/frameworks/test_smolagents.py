"""smolagents."""

from __future__ import annotations

import pytest
from smolagents import LogLevel, OpenAIModel, ToolCallingAgent, tool
from weather import MODEL, QUESTION, REPORT, Calls, Weather


@pytest.fixture
def model(url: str) -> OpenAIModel:
    return OpenAIModel(
        MODEL, api_base=url, api_key="none", temperature=0, max_tokens=100, client_kwargs={"max_retries": 0}
    )


@pytest.mark.parametrize("streamed", [False, True])
def test_a_tool_is_called(model: OpenAIModel, calls: Calls, streamed: bool) -> None:
    """Every step must call a tool and has stop strings. After the last step the agent asks for a text."""

    @tool
    def get_weather(city: str) -> str:
        """Get the weather in a city.

        Args:
            city: The city.
        """
        calls.append(city)
        return "It is 21 degrees and sunny."

    agent = ToolCallingAgent([get_weather], model, max_steps=1, stream_outputs=streamed, verbosity_level=LogLevel.OFF)
    answer = agent.run(QUESTION)

    (step,) = [step for step in agent.memory.steps if getattr(step, "tool_calls", None)]
    assert step.error is None or "max steps" in str(step.error)
    assert calls
    assert isinstance(answer, str)


def test_a_structured_output_is_parsed(model: OpenAIModel) -> None:
    schema = {"name": "weather", "schema": Weather.model_json_schema()}
    messages = [{"role": "user", "content": [{"type": "text", "text": REPORT}]}]
    answer = model.generate(messages, response_format={"type": "json_schema", "json_schema": schema})

    assert isinstance(answer.content, str)
    Weather.model_validate_json(answer.content)
