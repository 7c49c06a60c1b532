"""The stock `openai` client's legacy completions against the real server and a real model."""

import asyncio

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

MODEL = "SmolLM2-135M-Instruct.Q4_1"


def test_a_completion_and_its_stream_say_the_same(client: OpenAI) -> None:
    """Synchronously: text, logprobs with offsets, and usage."""
    whole = client.completions.create(
        model=MODEL,
        prompt="The capital of France is",
        max_tokens=12,
        temperature=0,
        logprobs=2,
        stop=["\n\n", "Berlin"],
    )
    chunks = list(
        client.completions.create(
            model=MODEL,
            prompt="The capital of France is",
            max_tokens=12,
            temperature=0,
            logprobs=2,
            stop=["\n\n", "Berlin"],
            stream=True,
            stream_options={"include_usage": True},
        )
    )

    choice = whole.choices[0]
    assert "Paris" in choice.text
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert choice.logprobs.text_offset is not None
    for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
        assert choice.text[offset:].startswith(token)
    assert "".join(part.text for chunk in chunks for part in chunk.choices) == choice.text
    offsets = [
        offset
        for chunk in chunks
        for part in chunk.choices
        for offset in (part.logprobs and part.logprobs.text_offset) or []
    ]
    assert offsets == choice.logprobs.text_offset
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_several_prompts_are_continued_together(client: OpenAI) -> None:
    """Each gets what it would get alone."""
    prompts = ["One, two, three,", "The colour of the sky is", "Water freezes at"]
    together = client.completions.create(model=MODEL, prompt=prompts, max_tokens=4, temperature=0, echo=True)

    assert [choice.index for choice in together.choices] == [0, 1, 2]
    for prompt, choice in zip(prompts, together.choices, strict=True):
        assert choice.text.startswith(prompt)
        assert len(choice.text) > len(prompt)


def test_the_asynchronous_client(server: str) -> None:
    """Whole and streamed, at once."""

    async def go() -> tuple[str, str]:
        async with AsyncOpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=180) as client:

            async def whole() -> str:
                answer = await client.completions.create(model=MODEL, prompt="Once upon", max_tokens=8, temperature=0)
                return answer.choices[0].text

            async def streamed() -> str:
                stream = await client.completions.create(
                    model=MODEL, prompt="Once upon", max_tokens=8, temperature=0, stream=True
                )
                return "".join([part.text async for chunk in stream for part in chunk.choices])

            return await whole(), await streamed()

    whole, streamed = asyncio.run(go())
    assert whole
    assert whole == streamed


def test_a_prompt_that_is_too_long_is_a_bad_request(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="word " * 9000)

    assert caught.value.code == "context_length_exceeded"


def test_a_prompt_is_scored(client: OpenAI) -> None:
    """As evaluation tools do it: the likelier continuation has the higher sum of logprobs."""

    def score(continuation: str) -> float:
        prompt = "The capital of France is"
        answer = client.completions.create(
            model=MODEL, prompt=prompt + continuation, max_tokens=0, echo=True, logprobs=1
        )
        choice = answer.choices[0]
        assert choice.text == prompt + continuation
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs is not None
        assert choice.logprobs.text_offset is not None
        assert choice.logprobs.token_logprobs[0] is None
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 0
        return sum(
            logprob
            for logprob, offset in zip(choice.logprobs.token_logprobs, choice.logprobs.text_offset, strict=True)
            if offset >= len(prompt)
        )

    assert score(" Paris.") > score(" Banana.") + 3
