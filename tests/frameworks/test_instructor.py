"""instructor. It demands an older `openai` than the others, so it has an environment of its own."""

from __future__ import annotations

from collections.abc import Iterator

import instructor
import pytest
from instructor import Mode
from openai import OpenAI
from weather import MODEL, REPORT, Weather

MESSAGES = [{"role": "user", "content": REPORT}]
MODES = [Mode.TOOLS, Mode.JSON_SCHEMA, Mode.RESPONSES_TOOLS]


@pytest.fixture
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("mode", MODES)
def test_a_structured_output_is_parsed(client: OpenAI, mode: Mode) -> None:
    """It is the arguments of a tool, or text that a schema constrains. Nothing is asked for twice."""
    answers = []
    structured = instructor.from_openai(client, mode=mode)
    structured.on("completion:response", answers.append)
    weather = structured.create(
        model=MODEL, messages=MESSAGES, response_model=Weather, temperature=0, max_tokens=100, max_retries=1
    )

    assert isinstance(weather, Weather)
    assert len(answers) == 1


@pytest.mark.parametrize("mode", [Mode.TOOLS, Mode.JSON_SCHEMA])
def test_a_structured_output_is_streamed(client: OpenAI, mode: Mode) -> None:
    """Each piece has the fields so far. The last one is complete."""
    structured = instructor.from_openai(client, mode=mode)
    pieces = list(
        structured.create_partial(model=MODEL, messages=MESSAGES, response_model=Weather, temperature=0, max_tokens=100)
    )

    assert len(pieces) > 1
    Weather.model_validate(pieces[-1].model_dump())


def test_an_invalid_answer_is_asked_for_again(client: OpenAI) -> None:
    """The validation error goes back as the result of the call, in a message with the role `tool`."""
    requests = []

    class Cold(Weather):
        """The weather on a cold day."""

        def model_post_init(self, context: object) -> None:
            requests.append(self)
            if len(requests) == 1:
                raise ValueError("Say that again.")

    structured = instructor.from_openai(client, mode=Mode.TOOLS)
    weather = structured.create(
        model=MODEL, messages=MESSAGES, response_model=Cold, temperature=0, max_tokens=100, max_retries=2
    )

    assert isinstance(weather, Cold)
    assert len(requests) == 2
