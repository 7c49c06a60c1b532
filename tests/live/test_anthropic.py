"""The stock `anthropic` client works with the real server and a real model."""

from __future__ import annotations

import asyncio
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic, AsyncAnthropic

MODEL = "SmolLM2-135M-Instruct.Q4_1"
GREEDY: Any = {"extra_body": {"temperature": 0}}  # newer versions of the client have no parameter for it
HELLO: Any = [{"role": "user", "content": "Say hello to a friend."}]


@pytest.fixture
def claude(server: str) -> Anthropic:
    return Anthropic(base_url=server, api_key="none", timeout=120, max_retries=0)


def test_a_message_is_answered(claude: Anthropic) -> None:
    """The client parses the message into its own types."""
    message = claude.messages.create(model=MODEL, max_tokens=8, **GREEDY, system="Be brief.", messages=HELLO)

    assert message.role == "assistant"
    assert message.stop_reason in ("end_turn", "max_tokens")
    assert message.content[0].type == "text"
    assert message.content[0].text
    assert 0 < message.usage.output_tokens <= 8


def test_a_stream_ends_in_the_same_message(claude: Anthropic) -> None:
    """The client checks the order of the events and folds them itself."""
    whole = claude.messages.create(model=MODEL, max_tokens=8, **GREEDY, messages=HELLO)
    with claude.messages.stream(model=MODEL, max_tokens=8, **GREEDY, messages=HELLO) as stream:
        kinds = [event.type for event in stream]
        message = stream.get_final_message()

    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"
    assert message.content[0].type == whole.content[0].type == "text"
    assert message.content[0].text == whole.content[0].text
    assert message.stop_reason == whole.stop_reason
    assert message.usage.output_tokens == whole.usage.output_tokens


def test_a_stop_sequence_is_named(claude: Anthropic) -> None:
    """The client learns which of its strings ended the answer."""
    first = claude.messages.create(model=MODEL, max_tokens=8, **GREEDY, messages=HELLO)
    assert first.content[0].type == "text"
    word = first.content[0].text.split()[-1]
    second = claude.messages.create(
        model=MODEL,
        max_tokens=8,
        **GREEDY,
        messages=HELLO,
        stop_sequences=[word, "never in there"],
    )

    assert (second.stop_reason, second.stop_sequence) == ("stop_sequence", word)


def test_the_count_is_that_of_the_usage(claude: Anthropic) -> None:
    """Claude Code counts before every turn."""
    messages: Any = [{"role": "user", "content": "What does <|im_end|> mean?"}]
    count = claude.messages.count_tokens(model=MODEL, messages=messages, system="Be brief.")
    message = claude.messages.create(model=MODEL, max_tokens=1, messages=messages, system="Be brief.")

    assert count.input_tokens == message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0)


def test_a_second_turn_reuses_the_prefix(claude: Anthropic) -> None:
    """The line that Claude Code puts in front of its system prompt differs in each request."""

    def turn(stamp: str, messages: Any) -> anthropic.types.Message:
        system: Any = [
            {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2.1; cch={stamp};"},
            {"type": "text", "text": "You are a careful agent that answers in one short sentence."},
        ]
        return claude.messages.create(model=MODEL, max_tokens=8, **GREEDY, system=system, messages=messages)

    first = turn("11111", HELLO)
    prompt = first.usage.input_tokens + (first.usage.cache_read_input_tokens or 0)
    assert first.content[0].type == "text"
    history = [*HELLO, {"role": "assistant", "content": first.content[0].text}, {"role": "system", "content": "Now."}]
    second = turn("22222", [*history, {"role": "user", "content": "Again."}])

    assert (second.usage.cache_read_input_tokens or 0) >= prompt - 1


def test_an_error_is_raised_as_the_clients_own(claude: Anthropic) -> None:
    """Status and envelope select the exception class."""
    with pytest.raises(anthropic.NotFoundError, match="claude-9"):
        claude.messages.create(model="claude-9", max_tokens=1, messages=HELLO)
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        claude.messages.create(model=MODEL, max_tokens=0, messages=HELLO)


def test_models_are_listed(claude: Anthropic) -> None:
    """The client sends its version header, and gets Anthropic's shape."""
    assert [model.id for model in claude.models.list()] == [MODEL]


def test_the_async_client_streams(server: str) -> None:
    """The same over the async client."""

    async def main() -> str:
        async with (
            AsyncAnthropic(base_url=server, api_key="none", timeout=120) as client,
            client.messages.stream(model=MODEL, max_tokens=8, **GREEDY, messages=HELLO) as stream,
        ):
            return "".join([text async for text in stream.text_stream])

    assert asyncio.run(main())
