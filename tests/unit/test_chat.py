import asyncio
import dataclasses
import json
from typing import Any

import pytest
from msgspec.structs import replace

from core.engine.interface import Delta, GenerationRequest, Sampling, Text, TokenLogprob
from core.errors import ModelUnavailable
from core.loader import Loading
from handlers import generate, sse
from handlers.dispatch import dispatch
from handlers.http import Request, Response, collect_log_fields
from tests.fakes import CARD, FakeHost, FakeService, ScriptedEngine, ScriptedGeneration, fake_service

HELLO = [{"role": "user", "content": "Hello"}]


def chat_request(**fields: Any) -> Request:
    body = json.dumps({"messages": HELLO, **fields}).encode()
    return Request("POST", "/v1/chat/completions", "req_1", {"content-type": "application/json"}, body=body)


async def read(response: Response) -> tuple[int, Any]:
    try:
        if isinstance(response.body, bytes):
            return response.status, json.loads(response.body)
        data = b"".join([chunk async for chunk in response.body]).decode()
        return response.status, data
    finally:
        await response.aclose()


def post(fake: FakeService, **fields: Any) -> tuple[int, Any]:
    async def call() -> tuple[int, Any]:
        return await read(await dispatch(fake.service, chat_request(**fields)))

    status, body = asyncio.run(call())
    assert fake.host.leases == 0
    assert fake.engine.running == 0
    return status, body


def events(stream: str) -> list[Any]:
    frames = [frame for frame in stream.split("\n\n") if frame and not frame.startswith(":")]
    assert all(frame.startswith("data: ") for frame in frames)
    return [frame if frame == "data: [DONE]" else json.loads(frame[6:]) for frame in frames]


def test_a_completion_has_openais_shape() -> None:
    """A non-streaming answer has every field that OpenAI's client reads, and usage that adds up."""
    fake = fake_service(ScriptedEngine("Good day to you.", cached_tokens=3))

    status, body = post(fake)

    assert status == 200
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert body["model"] == "fake-1b"
    assert body["system_fingerprint"].startswith("fp_")
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Good day to you.", "refusal": None, "annotations": []},
            "finish_reason": "stop",
            "logprobs": None,
        }
    ]
    prompt_tokens = len(fake.engine.requests[0].prompt)
    assert body["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 4,
        "total_tokens": prompt_tokens + 4,
        "prompt_tokens_details": {"cached_tokens": 3},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def test_usage_counts_every_choice() -> None:
    """With n > 1 completion_tokens is the sum over the choices, and each choice has its own text."""
    fake = fake_service(ScriptedEngine("a b c"))

    _, body = post(fake, n=3)

    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert {choice["message"]["content"] for choice in body["choices"]} == {"a b c"}
    assert body["usage"]["completion_tokens"] == 9


def test_a_stream_has_openais_chunks() -> None:
    """The role comes first, then text, an empty delta with finish_reason and [DONE]. All chunks share one id."""
    fake = fake_service(ScriptedEngine("one two"))

    status, stream = post(fake, stream=True)

    *chunks, done = events(stream)
    assert status == 200
    assert done == "data: [DONE]"
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": "", "refusal": None},
        {"content": "one "},
        {"content": "two"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)


def test_a_completion_adds_up_from_its_chunks() -> None:
    """With n choices and logprobs, the completion equals the fold of the stream's chunks."""
    fields: dict[str, Any] = {"n": 2, "logprobs": True, "max_tokens": 2, "stream_options": {"include_usage": True}}
    _, body = post(fake_service(ScriptedEngine("one two three")), **fields)
    _, stream = post(fake_service(ScriptedEngine("one two three")), stream=True, **fields)

    *chunks, usage, _ = events(stream)
    for choice in body["choices"]:
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
        assert choice["message"]["content"] == "".join(part["delta"].get("content", "") for part in parts)
        assert choice["message"]["role"] == parts[0]["delta"]["role"]
        assert choice["logprobs"]["content"] == [
            token for part in parts if part["logprobs"] for token in part["logprobs"]["content"]
        ]
        assert (choice["finish_reason"], choice["finish_cause"]) == ("length", "max_tokens")
        assert (parts[-1]["finish_reason"], parts[-1]["finish_cause"]) == ("length", "max_tokens")
    assert body["usage"] == usage["usage"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_complete_answer_has_no_finish_cause(stream: bool) -> None:
    """`finish_cause` extends OpenAI's shape, so it is absent unless the answer was cut."""
    _, body = post(fake_service(), stream=stream)

    assert "finish_cause" not in json.dumps(body)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/extract"])
def test_the_log_line_says_why_an_answer_ended(path: str, stream: bool) -> None:
    """Every answer has finish_reason; an answer that was cut also has finish_cause."""
    fields = {"messages": HELLO} if path.endswith("completions") else {"text": "Hello"}

    async def call(max_tokens: int) -> dict[str, object]:
        log_fields = collect_log_fields()
        body = json.dumps({**fields, "stream": stream, "max_tokens": max_tokens}).encode()
        request = Request("POST", path, "req_1", {"content-type": "application/json"}, body=body)
        await read(await dispatch(fake_service(ScriptedEngine("one two three")).service, request))
        return log_fields

    cut, whole = asyncio.run(call(2)), asyncio.run(call(9))
    assert (cut["finish_reason"], cut["finish_cause"], cut["completion_tokens"]) == ("length", "max_tokens", 2)
    assert (whole["finish_reason"], whole.get("finish_cause")) == ("stop", None)


@pytest.mark.parametrize(
    ("stream", "expected"),
    [(False, "queue;dur=1.0, prefill;dur=2.0, decode;dur=3.0"), (True, "queue;dur=1.0, prefill;dur=2.0")],
)
def test_server_timing_has_the_times_that_are_final(stream: bool, expected: str) -> None:
    """The header of a stream is sent before decoding ends."""

    async def call() -> dict[str, str]:
        response = await dispatch(fake_service().service, chat_request(stream=stream))
        await response.aclose()
        return dict(response.headers)

    assert asyncio.run(call())["server-timing"] == expected


@pytest.mark.usefixtures("impatient")
def test_server_timing_is_absent_before_the_first_token() -> None:
    """A 200 that is sent while the request waits does not have its times yet."""

    async def call() -> dict[str, str]:
        response = await dispatch(fake_service(GatedEngine("one")).service, chat_request(stream=True))
        await response.aclose()
        return dict(response.headers)

    assert "server-timing" not in asyncio.run(call())


def test_sampling_defaults_are_those_of_the_engine() -> None:
    """`Sampling` defines them, and a request without sampling fields changes none."""
    fake = fake_service()

    post(fake)

    assert fake.engine.requests[0].sampling == Sampling()


def test_include_usage_adds_a_last_chunk() -> None:
    """The last chunk has the usage and no choices; the others have `"usage": null`."""
    fake = fake_service(ScriptedEngine("one two"))

    _, stream = post(fake, stream=True, stream_options={"include_usage": True})

    *chunks, last, _ = events(stream)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 2


def test_streamed_choices_have_an_index() -> None:
    """With n > 1 every choice has its own text and finish chunk."""
    fake = fake_service(ScriptedEngine("one two"))

    _, stream = post(fake, stream=True, n=2)

    choices = [event["choices"][0] for event in events(stream)[:-1]]
    for index in (0, 1):
        own = [choice for choice in choices if choice["index"] == index]
        assert "".join(choice["delta"].get("content", "") for choice in own) == "one two"
        assert own[-1]["finish_reason"] == "stop"


class LogprobEngine(ScriptedEngine):
    """Emit half of a character in the first token and the rest in the second."""

    def generate(self, request: Any) -> ScriptedGeneration:
        generation = super().generate(request)
        top = ((b"\xc3", -0.1), (b"x", -2.5))
        generation._todo = [
            Delta(0, (), 1, (TokenLogprob(b"\xc3", -0.1, top),)),
            Delta(0, (Text("é"),), 1, (TokenLogprob(b"\xa9", -0.2),), "stop"),
        ]
        return generation


def test_logprobs_have_bytes_and_alternatives() -> None:
    """Every token has its logprob and exact bytes, also half a character."""
    _, body = post(fake_service(LogprobEngine()), logprobs=True, top_logprobs=2)

    content = body["choices"][0]["logprobs"]["content"]
    assert [token["bytes"] for token in content] == [[0xC3], [0xA9]]
    assert [token["logprob"] for token in content] == [-0.1, -0.2]
    assert content[0]["top_logprobs"][1] == {"token": "x", "logprob": -2.5, "bytes": [120]}


def test_streamed_logprobs_cover_every_token() -> None:
    """With logprobs, a token without a whole character still gets a chunk."""
    _, stream = post(fake_service(LogprobEngine()), logprobs=True, stream=True)

    logprobs = [event["choices"][0]["logprobs"] for event in events(stream)[:-1]]
    assert [token["bytes"] for entry in logprobs if entry for token in entry["content"]] == [[0xC3], [0xA9]]


def test_sampling_fields_reach_the_engine() -> None:
    """The engine gets the client's values; max_completion_tokens takes precedence over max_tokens."""
    fake = fake_service()

    post(
        fake,
        temperature=0.5,
        top_p=0.9,
        top_k=-1,
        min_p=0.1,
        repeat_penalty=1.1,
        presence_penalty=1,
        frequency_penalty=-1,
        seed=7,
        stop=["END", "\n\n"],
        logit_bias={"5": -100},
        max_tokens=9,
        max_completion_tokens=3,
        logprobs=True,
        response_format={"type": "json_object"},
    )

    request = fake.engine.requests[0]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 0, 0.1)
    assert (sampling.repeat_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.1, 1.0, -1.0)
    assert (sampling.seed, dict(sampling.logit_bias)) == (7, {5: -100.0})
    assert request.stop[:2] == ("END", "\n\n")
    assert request.max_tokens == 3
    assert request.top_logprobs == 0
    assert request.grammar is not None


@pytest.mark.parametrize(("temperature", "expected"), [(5e-324, 0.0), (0, 0.0), (1e-4, 1e-4), (2, 2.0)])
def test_a_tiny_temperature_is_zero(temperature: float, expected: float) -> None:
    """A temperature that a 32-bit float cannot divide by means greedy sampling."""
    fake = fake_service()

    post(fake, temperature=temperature)

    assert fake.engine.requests[0].sampling.temperature == expected


@pytest.mark.parametrize("seed", [-1, 0, 4294967295, -(2**63), 2**63 - 1])
def test_any_64_bit_seed_is_valid(seed: int) -> None:
    """No seed maps to llama.cpp's value for a random seed."""
    fake = fake_service()

    post(fake, seed=seed)

    sent = fake.engine.requests[0].sampling.seed
    assert sent is not None
    assert 0 <= sent < 0xFFFF_FFFF


def test_null_and_unknown_fields_are_ignored() -> None:
    """An explicit null is an absent field."""
    names = "model max_tokens max_completion_tokens temperature top_p top_k min_p seed stop n logit_bias logprobs "
    names += "top_logprobs stream stream_options response_format tools tool_choice presence_penalty"
    fake = fake_service()

    status, _ = post(fake, **dict.fromkeys(names.split()), user="u", metadata={"a": "b"}, store=True, whatever=[1])

    assert status == 200
    assert fake.engine.requests[0].sampling.temperature == 1.0


def test_max_tokens_has_a_default_bound() -> None:
    """MAX_TOKENS limits requests that set no limit; with 0 the context is the limit."""
    default, own, off = fake_service(), fake_service(max_tokens=77), fake_service(max_tokens=0)

    for fake in (default, own, off):
        post(fake)
        post(fake, max_tokens=5000)

    bounds = [[request.max_tokens for request in fake.engine.requests] for fake in (default, own, off)]
    assert bounds == [[2048, 5000], [77, 5000], [None, 5000]]


@pytest.mark.parametrize(
    ("field", "value", "instead"),
    [
        ("continue_final_message", True, "leave it out"),
        ("add_generation_prompt", False, "leave it out"),
        ("guided_json", {"type": "object"}, "use 'response_format'"),
        ("repetition_penalty", 1.3, "use 'repeat_penalty'"),
        ("max_new_tokens", 10, "use 'max_tokens'"),
        ("min_tokens", 3, "leave it out"),
        ("stop_token_ids", [1], "leave it out"),
    ],
)
def test_fields_that_would_change_the_answer_are_refused(field: str, value: Any, instead: str) -> None:
    """Ignoring them would answer a different request."""
    fake = fake_service()

    status, body = post(fake, **{field: value})

    assert (status, body["error"]["param"]) == (400, field)
    assert body["error"]["message"] == (f"'{field}' is not supported and would change the answer; {instead}.")
    assert fake.engine.requests == []


def test_unsupported_fields_pass_with_neutral_values() -> None:
    """Clients send their defaults, for example `parallel_tool_calls` without tools."""
    neutral = {"repetition_penalty": 1.0, "best_of": 1, "typical_p": 1.0, "min_tokens": 0}
    neutral |= {"add_generation_prompt": True, "verbosity": "medium", "grammar": ""}
    fake = fake_service()

    status, _ = post(fake, **neutral, parallel_tool_calls=False, prompt_cache_key="k")

    assert status == 200


def test_all_roles_and_kinds_of_content_are_rendered() -> None:
    """The developer role becomes system, parts are joined and null is empty. Calls and results are text in ChatML."""
    fake = fake_service()
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}

    status, _ = post(
        fake,
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "3"},
            {"role": "assistant"},
            {"role": "function", "name": "add", "content": "4"},
        ],
    )

    assert status == 200
    assert bytes(fake.engine.requests[0].prompt).decode() == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\none\ntwo<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"temperature": 9}, "temperature", "from 0 to 2"),
    ({"temperature": -0.1}, "temperature", "from 0 to 2"),
    ({"temperature": "hot"}, "temperature", "'hot'"),
    ({"top_p": 1.5}, "top_p", "from 0 to 1"),
    ({"min_p": -1}, "min_p", "from 0 to 1"),
    ({"top_k": -2}, "top_k", "got -2"),
    ({"repeat_penalty": 0}, "repeat_penalty", "2"),
    ({"presence_penalty": 3}, "presence_penalty", "from -2 to 2"),
    ({"frequency_penalty": -3}, "frequency_penalty", "from -2 to 2"),
    ({"seed": 2**70}, "seed", "a whole number"),
    ({"max_tokens": 0}, "max_tokens", "1"),
    ({"max_completion_tokens": -5}, "max_completion_tokens", "-5"),
    ({"n": 0}, "n", "got 0"),
    ({"n": 5}, "n", "from 1 to 4 (N_PARALLEL), got 5"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "4 items"),
    ({"stop": ""}, "stop", "1 to 1024 characters"),
    ({"stop": [""]}, "stop[0]", "1"),
    ({"logit_bias": {"5": 101}}, "logit_bias[...]", "from -100 to 100"),
    ({"logit_bias": {"cat": 1}}, "logit_bias", "'cat'"),
    ({"logit_bias": {"256": 1}}, "logit_bias", "from 0 to 255"),
    ({"logprobs": 3}, "logprobs", "true or false"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
    ({"top_logprobs": 2}, "top_logprobs", "'logprobs'"),
    ({"stream": "yes"}, "stream", "true or false"),
    ({"stream_options": 1}, "stream_options", "object"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema", "missing"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}},
        "response_format",
        "'not'",
    ),
    ({"modalities": ["text", "audio"]}, "modalities", "audio"),
    ({"tool_choice": "required"}, "tool_choice", "'none'"),
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": "hi"}, "messages", "array"),
    ({"messages": None}, "messages", "null"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "'robot'"),
    ({"messages": [{"content": "x"}]}, "messages[0].role", "missing"),
    ({"messages": [*HELLO, {"role": "user"}]}, "messages[1].content", "missing"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "5"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[0].type",
        "only reads text",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", "missing"),
    ({"messages": [{"role": "user", "content": [{"type": "smell"}]}]}, "messages[0].content[0].type", "'smell'"),
    (
        {
            "messages": [
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 99 + "]" * 99}}]}
            ]
        },
        "messages[0].tool_calls[0].function.arguments",
        "64",
    ),
]


@pytest.mark.parametrize(("fields", "param", "words"), BAD, ids=lambda value: json.dumps(value)[:50])
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_value_is_a_400_that_names_it(fields: dict[str, Any], param: str, words: str, stream: bool) -> None:
    """The error has `param` and what is allowed, streamed or not, before any token is generated."""
    fake = fake_service()

    status, body = post(fake, **{"stream": stream, **fields})

    assert status == 400
    assert body["error"]["type"] == "invalid_request_error"
    assert body["error"]["param"] == param
    assert words in body["error"]["message"]
    assert fake.engine.requests == []


def test_an_unknown_model_is_a_404_that_lists_the_models() -> None:
    """No other model answers under an unknown name."""
    status, body = post(fake_service(model_aliases=("small",)), model="gpt-4o")

    assert status == 404
    assert body["error"]["code"] == "model_not_found"
    assert "'fake-1b', 'small'" in body["error"]["message"]


@pytest.mark.parametrize(("aliases", "name"), [(("small",), "small"), (("*",), "gpt-4o"), ((), "fake-1b"), ((), None)])
def test_the_served_name_and_its_aliases_are_accepted(aliases: tuple[str, ...], name: str | None) -> None:
    """A request may use an alias, any name with `*`, the real name or none. The answer has the real name."""
    status, body = post(fake_service(model_aliases=aliases), model=name)

    assert (status, body["model"]) == (200, "fake-1b")


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_over_the_context_is_a_400(stream: bool) -> None:
    """The code is context_length_exceeded, also for a stream."""
    status, body = post(fake_service(), stream=stream, messages=[{"role": "user", "content": "x" * 1000}])

    assert status == 400
    assert body["error"]["code"] == "context_length_exceeded"
    assert "512" in body["error"]["message"]
    assert body["error"]["param"] == "messages"


@pytest.mark.parametrize("stream", [False, True])
def test_without_a_model_a_request_is_a_503(stream: bool) -> None:
    """A stream is refused with a status, too."""
    fake = fake_service(host=FakeHost(None))

    status, body = post(fake, stream=stream)

    assert status == 503
    assert body["error"]["code"] == "model_unavailable"


@pytest.mark.parametrize("stream", [False, True])
def test_an_unexpected_error_is_logged_and_not_sent(stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    """The client gets a 500 without the exception's text."""
    status, body = post(fake_service(ScriptedEngine(error=RuntimeError("secret inside"))), stream=stream)

    assert status == 500
    assert "secret" not in json.dumps(body)
    assert "secret inside" in caplog.text


class BreakingEngine(ScriptedEngine):
    """An engine that fails after some pieces."""

    def generate(self, request: Any) -> ScriptedGeneration:
        generation = super().generate(request)

        async def anext_(self: ScriptedGeneration) -> Delta:
            if len(self._todo) < 3:
                raise ModelUnavailable("The model is gone.")
            return self._todo.pop(0)

        generation.__class__ = type("Breaking", (ScriptedGeneration,), {"__anext__": anext_})
        return generation


def test_a_late_error_is_an_event_before_done() -> None:
    """A failure after the first byte is sent as one error event, then [DONE]."""
    status, stream = post(fake_service(BreakingEngine("a b c d")), stream=True)

    *_, error, done = events(stream)
    assert status == 200
    assert error["error"]["code"] == "model_unavailable"
    assert done == "data: [DONE]"


class LoadingHost(FakeHost):
    """A host that loads until `loaded` is set and then returns its engine or fails."""

    def __init__(self, engine: ScriptedEngine, error: Exception | None = None) -> None:
        super().__init__(engine, status="available")
        self.loading = Loading("download", "fake-1b", 42, 100)
        self.loaded = asyncio.Event()
        self.failure = error

    async def lease(self, deadline: float | None = None) -> Any:
        await self.loaded.wait()
        if self.failure is not None:
            raise self.failure
        return await super().lease(deadline)


def stream_while_loading(host: LoadingHost) -> tuple[int, str]:
    """Stream a chat; the load ends once the stream has begun."""
    fake = fake_service(host.engine, host=host)

    async def call() -> tuple[int, str]:
        response = await dispatch(fake.service, chat_request(stream=True))
        async with asyncio.timeout(30):
            first = await anext(aiter(response.body))  # type: ignore[arg-type]
        host.loaded.set()
        status, rest = await read(response)
        return status, first.decode() + rest

    status, stream = asyncio.run(call())
    assert host.leases == 0
    return status, stream


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "GRACE_S", 0.01)
    monkeypatch.setattr(generate, "PATIENCE_S", 0.01)
    monkeypatch.setattr(generate, "WAITING_S", 0.02)


@pytest.mark.usefixtures("impatient")
def test_a_stream_reports_the_progress_of_a_load() -> None:
    """While the model loads, the open stream holds comments with the progress. Then it continues as usual."""
    status, stream = stream_while_loading(LoadingHost(ScriptedEngine("one two")))

    assert status == 200
    assert stream.startswith(": loading 42%\n\n")
    assert [event["choices"][0]["delta"].get("content") for event in events(stream)[:-1]] == ["", "one ", "two", None]


@pytest.mark.usefixtures("impatient")
def test_a_load_that_fails_late_is_an_error_event() -> None:
    """After the 200 was sent, a failed load becomes an error event and [DONE]."""
    status, stream = stream_while_loading(LoadingHost(ScriptedEngine(), ModelUnavailable("No space left.")))

    error, done = events(stream)
    assert (status, error["error"]["message"], done) == (200, "No space left.", "data: [DONE]")


def test_a_load_that_fails_at_once_is_a_503() -> None:
    """Before the 200 was sent, a failed load has its own status, also for a stream."""
    engine = ScriptedEngine()
    host = LoadingHost(engine, ModelUnavailable("No."))
    host.loaded.set()

    status, _ = post(fake_service(engine, host=host), stream=True)

    assert status == 503


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("chunks", [0, 1])
def test_a_disconnect_while_loading_leaves_nothing_running(chunks: int) -> None:
    """Closing a stream whose model is still loading cancels the wait."""
    engine = ScriptedEngine()
    fake = fake_service(engine, host=LoadingHost(engine))

    async def leave() -> None:
        response = await dispatch(fake.service, chat_request(stream=True))
        for _ in range(chunks):
            await anext(aiter(response.body))  # type: ignore[arg-type]
        await response.aclose()
        await response.aclose()
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(leave())
    assert fake.host.leases == 0


@pytest.mark.parametrize("chunks", [0, 1, 3])
def test_an_abandoned_stream_releases_the_model(chunks: int) -> None:
    """Closing a stream, started or not, cancels its generation and releases the lease."""
    fake = fake_service(ScriptedEngine("a b c d", endless=True, delay=0.001))

    async def leave() -> None:
        response = await dispatch(fake.service, chat_request(stream=True))
        assert (fake.host.leases, fake.engine.running) == (1, 1)
        for _ in range(chunks):
            await anext(aiter(response.body))  # type: ignore[arg-type]
        await response.aclose()
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(leave())
    assert (fake.host.leases, fake.engine.running) == (0, 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_before_the_first_token_releases_the_model(stream: bool) -> None:
    """Cancelling the handler while it waits for the first token leaves neither a lease nor a generation."""
    fake = fake_service(ScriptedEngine("a b", delay=60))

    async def leave() -> None:
        task = asyncio.create_task(dispatch(fake.service, chat_request(stream=stream)))
        while not fake.engine.running:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    assert (fake.host.leases, fake.engine.running) == (0, 0)


def test_a_silent_stream_sends_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    """`: ping` stops proxies from closing the connection."""
    monkeypatch.setattr(sse, "SILENCE_S", 0.02)
    fake = fake_service(ScriptedEngine("a b", delay=0.1))

    _, stream = post(fake, stream=True)

    assert ": ping\n\n" in stream
    assert [event["choices"][0]["delta"].get("content") for event in events(stream)[:-1]] == ["", "a ", "b", None]


def test_the_engine_ends_before_the_platforms_deadline() -> None:
    """The engine's deadline is DEADLINE_MARGIN_S before the platform's."""
    fake = fake_service(deadline_margin_s=2.0)

    async def call() -> None:
        await read(await dispatch(fake.service, dataclasses.replace(chat_request(), deadline=1e9)))

    asyncio.run(call())
    assert fake.engine.requests[0].deadline == 1e9 - 2


def test_keys_do_not_share_prefixes() -> None:
    """Each key is a tenant of its own, named by a digest."""
    from core.settings import keys

    fake = fake_service(api_keys=keys("one,two"))

    async def call(key: str) -> None:
        request = chat_request()
        await read(
            await dispatch(fake.service, dataclasses.replace(request, headers={**request.headers, "x-api-key": key}))
        )

    for key in ("one", "two"):
        asyncio.run(call(key))
    first, second = (request.tenant for request in fake.engine.requests)
    assert first != second
    assert "one" not in first


def test_a_model_without_a_template_stops_at_chatml_marks() -> None:
    """They are stop strings, because the model may not have them as tokens."""
    fake = fake_service(ScriptedEngine(card=replace(CARD, chat_template=None)))

    post(fake, stop="x")

    assert fake.engine.requests[0].stop == ("x", "<|im_end|>", "<|im_start|>")


@pytest.mark.usefixtures("impatient")
def test_a_stream_sends_comments_before_its_first_token() -> None:
    """While a request is queued or in prefill, the 200 and comments are sent."""

    async def main() -> None:
        engine = GatedEngine("one two")
        fake = fake_service(engine)
        response = await dispatch(fake.service, chat_request(stream=True))
        assert response.status == 200
        assert await anext(aiter(response.body)) == b": waiting\n\n"  # type: ignore[arg-type]
        engine.gate.set()
        status, stream = await read(response)
        contents = [event["choices"][0]["delta"].get("content") for event in events(stream)[:-1]]
        assert (status, contents) == (200, ["", "one ", "two", None])

    asyncio.run(main())


def test_the_first_comment_comes_within_five_seconds() -> None:
    """This includes requests that are queued."""
    assert max(generate.PATIENCE_S, generate.GRACE_S) + generate.WAITING_S <= 5


class GatedEngine(ScriptedEngine):
    """An engine that generates nothing until `gate` is set."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.gate = asyncio.Event()

    def generate(self, request: GenerationRequest) -> ScriptedGeneration:
        super().generate(request)
        return GatedGeneration(self, request)


class GatedGeneration(ScriptedGeneration):
    def __init__(self, engine: GatedEngine, request: GenerationRequest) -> None:
        super().__init__(engine, request)
        self._gate = engine.gate

    async def __anext__(self) -> Delta:
        await self._gate.wait()
        return await super().__anext__()


class SwappingHost(FakeHost):
    """A host that swaps its model while a request waits for it."""

    async def lease(self, deadline: float | None = None) -> Any:
        self.engine = ScriptedEngine("Hello", card=replace(CARD, name="another-2b"))
        return await super().lease(deadline)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/extract"])
@pytest.mark.parametrize("model", ["fake-1b", "alias", "another-2b", None])
def test_a_named_model_is_never_replaced_by_another(path: str, model: str | None) -> None:
    """The name is checked again after the lease. An alias or no name means the served model."""
    engine = ScriptedEngine("{}")
    host = SwappingHost(engine)
    fake = fake_service(engine, host=host, model_aliases=("alias",))
    fields = {"messages": HELLO} if path.endswith("completions") else {"text": "Hello"}
    body = json.dumps({"model": model, **fields}).encode()
    request = Request("POST", path, "req_1", {"content-type": "application/json"}, body=body)

    async def main() -> tuple[int, Any]:
        return await read(await dispatch(fake.service, request))

    status, answer = asyncio.run(main())
    if model in ("fake-1b", "another-2b"):  # the second was not served yet when the request arrived
        assert (status, answer["error"]["code"]) == (404, "model_not_found")
    else:
        assert (status, answer["model"]) == (200, "another-2b")
    assert host.leases == 0


def test_a_slow_reader_does_not_hold_the_model() -> None:
    """The lease ends with the last token, however slowly the client reads the stream."""

    async def main() -> None:
        fake = fake_service(ScriptedEngine("one two"))
        response = await dispatch(fake.service, chat_request(stream=True))
        async with asyncio.timeout(10):
            while fake.host.leases:
                await asyncio.sleep(0.001)
        status, stream = await read(response)
        assert (status, events(stream)[-1]) == (200, "data: [DONE]")

    asyncio.run(main())
