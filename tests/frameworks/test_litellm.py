"""litellm, over chat completions and Anthropic's messages."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from weather import MODEL, QUESTION, REPORT, Calls, Weather

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # read on import: it would download a list of prices

import litellm

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": Weather.model_json_schema()["properties"]["city"]},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


class Client:
    """litellm with the arguments of a route."""

    def __init__(self, provider: str, url: str) -> None:
        self.route = {"model": f"{provider}/{MODEL}", "api_base": url, "api_key": "none", "num_retries": 0}

    def ask(self, messages: list[Any], streamed: bool, **fields: Any) -> Any:
        """Return the message. The chunks of a stream are put together by litellm."""
        fields = {"temperature": 0, "max_tokens": 100, **self.route, **fields}
        answer = litellm.completion(messages=messages, stream=streamed, **fields)
        if streamed:
            chunks = list(answer)
            assert len(chunks) > 1
            answer = litellm.stream_chunk_builder(chunks, messages=messages)
        return answer.choices[0].message


@pytest.fixture(params=["openai", "anthropic"])
def client(request: pytest.FixtureRequest, server: str) -> Client:
    return Client(request.param, f"{server}/v1" if request.param == "openai" else server)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_tool_is_called(client: Client, calls: Calls, choice: Any, streamed: bool) -> None:
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    answer = client.ask(messages, streamed, tools=[TOOL], tool_choice=choice)
    call = answer.tool_calls[0]
    result = calls.get_weather(**json.loads(call.function.arguments))
    messages += [answer.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": result}]
    answer = client.ask(messages, streamed, tools=[TOOL], tool_choice="none")

    assert answer.content
    assert not answer.tool_calls


@pytest.mark.parametrize("streamed", [False, True])
def test_a_structured_output_is_parsed(client: Client, streamed: bool) -> None:
    answer = client.ask([{"role": "user", "content": REPORT}], streamed, response_format=Weather)

    Weather.model_validate_json(answer.content)
