"""The stock `openai` client works with the real server and a real model."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import httpx2 as httpx
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

MODEL = "SmolLM2-135M-Instruct.Q4_1"


def create(client: OpenAI, content: str, **fields: Any) -> Any:
    fields = {"max_tokens": 8, "temperature": 0, **fields}
    return client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": content}], **fields)


def engine(server: str) -> dict[str, Any]:
    return dict(httpx.get(f"{server}/health", timeout=60).json()["engine"])


def idle(server: str) -> dict[str, Any]:
    """Wait until no request runs and return the engine's counters."""
    for _ in range(600):
        stats = engine(server)
        if stats["sequences"]["running"] == 0 and stats["queued"] == 0:
            return stats
        time.sleep(0.05)
    raise AssertionError(stats)


def test_a_chat_is_answered(client: OpenAI) -> None:
    """The client parses the answer into its own types."""
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "developer", "content": "You are a helpful assistant."},
            {"role": "user", "content": [{"type": "text", "text": "What is 2 + 2?"}]},
        ],
        max_completion_tokens=8,
        temperature=0,
        user="somebody",
        metadata={"a": "b"},
    )

    assert answer.model == MODEL
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_input_tokens_are_those_of_the_usage(client: OpenAI, server: str) -> None:
    """Counting a chat and answering it give the same number, and /tokenize lists as many tokens."""
    body = {"messages": [{"role": "user", "content": "What does <|im_end|> mean?"}], "max_tokens": 1}
    usage = client.chat.completions.create(model=MODEL, **body).usage  # type: ignore[call-overload]

    counted = httpx.post(f"{server}/v1/chat/completions/input_tokens", json=body, timeout=60).json()
    tokens = httpx.post(f"{server}/tokenize", json=body, timeout=60).json()["tokens"]

    assert counted["input_tokens"] == usage.prompt_tokens == len(tokens)


def test_a_stream_equals_the_complete_answer(client: OpenAI) -> None:
    """The deltas add up to the complete answer. Usage comes last."""
    whole = create(client, "Name a colour.")
    chunks = list(create(client, "Name a colour.", stream=True, stream_options={"include_usage": True}))

    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


class Weather(BaseModel):
    city: Literal["Paris", "Rome", "Oslo"]
    degrees: int
    sunny: bool


def test_structured_output_is_parsed(client: OpenAI) -> None:
    """`parse` returns an instance of a pydantic model, even with a model of 135M parameters."""
    answer = client.chat.completions.parse(
        model=MODEL,
        messages=[{"role": "user", "content": "It is 21 degrees and sunny in Rome. Weather as JSON."}],
        response_format=Weather,
        max_tokens=100,
        temperature=0,
    )

    assert isinstance(answer.choices[0].message.parsed, Weather)
    assert answer.choices[0].finish_reason == "stop"


def test_json_object_gives_an_object(client: OpenAI) -> None:
    """The answer may be cut, but it is never prose."""
    answer = create(client, "Give me a JSON object.", response_format={"type": "json_object"}, max_tokens=24)

    assert answer.choices[0].message.content.startswith("{")


def test_choices_logprobs_and_stop_strings_work(client: OpenAI) -> None:
    """With n=2, each choice has logprobs with alternatives. A stop string never leaks."""
    answer = create(client, "Count to five.", n=2, logprobs=True, top_logprobs=3, temperature=1, seed=1, max_tokens=6)

    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        tokens = choice.logprobs.content
        assert b"".join(bytes(token.bytes) for token in tokens).decode().startswith(choice.message.content)
        assert all(len(token.top_logprobs) == 3 for token in tokens)
        assert all(token.logprob <= 0 for token in tokens)
    words = create(client, "Name a colour.", max_tokens=12).choices[0].message.content
    stop = words[2:6]
    cut = create(client, "Name a colour.", max_tokens=12, stop=[stop]).choices[0]
    assert cut.message.content == words[: words.index(stop)]
    assert cut.finish_reason == "stop"


@pytest.mark.parametrize(
    ("fields", "error", "code"),
    [
        ({"temperature": 9}, openai.BadRequestError, None),
        ({"messages": []}, openai.BadRequestError, None),
        ({"model": "gpt-4o"}, openai.NotFoundError, "model_not_found"),
        (
            {"messages": [{"role": "user", "content": "word " * 9000}]},
            openai.BadRequestError,
            "context_length_exceeded",
        ),
        ({"logit_bias": {"49152": 1}}, openai.BadRequestError, None),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}},
            openai.BadRequestError,
            None,
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_become_the_clients_exceptions(
    client: OpenAI, fields: dict[str, Any], error: type[openai.APIStatusError], code: str | None, stream: bool
) -> None:
    """An invalid request raises the SDK's exception with param, code and request id, streamed or not."""
    request: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "stream": stream}

    with pytest.raises(error) as caught:
        client.chat.completions.create(**(request | fields))

    assert caught.value.code == code
    assert caught.value.param
    assert caught.value.request_id


def test_models_are_listed(client: OpenAI) -> None:
    """The client's `models` lists and retrieves the model by its name."""
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).created > 0


def test_abandoned_streams_leave_nothing_running(client: OpenAI, server: str) -> None:
    """Twenty clients that disconnect after a chunk cost few tokens, and the next chat is answered."""
    before = idle(server)
    for index in range(20):
        stream = create(client, f"Tell me story number {index}.", stream=True, max_tokens=1000, logit_bias={"2": -100})
        next(iter(stream))
        stream.close()

    after = idle(server)
    assert after["completion_tokens"] - before["completion_tokens"] < 20 * 500
    assert create(client, "Hi").choices[0].message.content


def test_an_abandoned_request_is_cancelled(server: str) -> None:
    """A client that disconnects while it waits for a complete answer frees its sequence, too."""
    body = {
        "messages": [{"role": "user", "content": "Go on."}],
        "max_tokens": 3000,
        "logit_bias": {"2": -100, "0": -100},
    }
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server}/v1/chat/completions", json=body, timeout=1.0)

    idle(server)


EMOJI = {"type": "string", "pattern": "^[😀-🙏一-龥]{10,12}$"}


@pytest.mark.parametrize("seed", range(3))
def test_every_delta_has_whole_characters(client: OpenAI, seed: int) -> None:
    """Emoji and CJK characters arrive whole, although each takes several tokens of this model."""
    schema = {"type": "json_schema", "json_schema": {"name": "emoji", "schema": EMOJI}}
    stream = create(
        client, "Answer in emoji.", stream=True, response_format=schema, temperature=1.5, seed=seed, max_tokens=100
    )
    deltas = [chunk.choices[0].delta.content or "" for chunk in stream]

    assert not [delta for delta in deltas if "\ufffd" in delta]
    text = "".join(deltas)
    assert len(text.strip('"')) >= 10
    assert all("😀" <= character <= "🙏" or "一" <= character <= "龥" for character in text.strip('"'))
    assert sum(map(bool, deltas)) > 5


def test_a_seed_reproduces_the_text(client: OpenAI) -> None:
    """A seed gives the same text with a cold and a cached prompt. Another seed gives another text."""
    question = f"Tell me a story about {time.time_ns()}."  # not in the cache yet
    answers = [create(client, question, temperature=1, seed=7, max_tokens=16) for _ in range(5)]
    other = create(client, question, temperature=1, seed=8, max_tokens=16)

    assert len({answer.choices[0].message.content for answer in answers}) == 1
    assert answers[-1].usage.prompt_tokens_details.cached_tokens > answers[0].usage.prompt_tokens_details.cached_tokens
    assert other.choices[0].message.content != answers[0].choices[0].message.content


def test_a_conversation_reuses_its_prefix(client: OpenAI) -> None:
    """The second turn finds the prompt and answer of the first one in the cache."""
    messages: list[Any] = [{"role": "user", "content": "Remember the number 4711 and say it. " * 4}]
    first = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=16, temperature=0)
    messages += [
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "Again."},
    ]
    second = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=4, temperature=0)

    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    assert (second.usage.prompt_tokens_details.cached_tokens or 0) >= first.usage.prompt_tokens


def test_clients_share_decode_calls(client: OpenAI, server: str) -> None:
    """Four clients with 64 tokens each take fewer than 160 decode calls instead of 256."""
    before = idle(server)["decode_calls"]
    barrier = threading.Barrier(4)

    def write(index: int) -> int:
        barrier.wait()
        answer = create(client, f"Write about the number {index}.", max_tokens=64, logit_bias={"2": -100, "0": -100})
        return int(answer.usage.completion_tokens)

    with ThreadPoolExecutor(4) as pool:
        counts = list(pool.map(write, range(4)))

    assert counts == [64, 64, 64, 64]
    assert idle(server)["decode_calls"] - before < 160


INVOICE = {
    "type": "object",
    "properties": {
        "customer": {"type": "string", "maxLength": 40},
        "total": {"type": "number", "minimum": 0},
        "paid": {"type": "boolean"},
    },
    "required": ["customer", "total", "paid"],
    "additionalProperties": False,
}


def test_extract_fills_a_schema(server: str) -> None:
    """A document becomes JSON that is valid for the schema."""
    body = {"text": "Invoice for Ann Smith: 31.50 EUR, paid.", "schema": INVOICE, "max_tokens": 100}
    answer = httpx.post(f"{server}/v1/extract", json=body, timeout=180).json()

    assert answer["valid"] is True
    assert answer["finish_reason"] == "stop"
    assert list(answer["data"]) == ["customer", "total", "paid"]


def test_a_batch_of_documents_shares_its_prefix(server: str) -> None:
    """The second document finds task, schema and instructions in the cache."""
    body = {"schema": INVOICE, "instructions": "Amounts in EUR.", "max_tokens": 8}
    usages = [
        httpx.post(f"{server}/v1/extract", json={**body, "text": f"Invoice {number}."}, timeout=180).json()["usage"]
        for number in (1, 2)
    ]

    assert usages[1]["prompt_tokens_details"]["cached_tokens"] > usages[1]["prompt_tokens"] * 0.7


def test_control_tokens_in_a_message_are_text(client: OpenAI) -> None:
    """A spelled control token takes more tokens than the one that it names."""
    plain = create(client, "x", max_tokens=1).usage.prompt_tokens
    spelled = create(client, "x<|im_end|>", max_tokens=1).usage.prompt_tokens

    assert spelled >= plain + 3


def test_a_hostile_body_is_a_400(server: str) -> None:
    """Bodies are long runs of one character, digits, white space or control tokens."""
    for content in (
        "a" * 300_000,
        "1" * 300_000,
        " " * 300_000,
        "\u0301" * 100_000,
        "🦊" * 50_000,
        "<|im_end|>" * 9_000,
    ):
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
        answer = httpx.post(f"{server}/v1/chat/completions", json=body, timeout=180)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert idle(server)["sequences"]["running"] == 0
