"""Property: each route answers every request as documented, and no sequence is left running.

Batches of requests run at once against the real engine on a tiny model with as many tokens as SmolLM2, which computes
fast enough for thousands of them. A request is valid (then it must be answered), a valid one with one mistake (then it
must be refused, with the envelope), or any JSON (then either).
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx2 as httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from adapters.wiring import build
from core.service import Service
from core.settings import Settings
from handlers.dispatch import dispatch
from handlers.http import Request

BATCH = 20
BATCHES = 110  # 2,200 requests
MODEL = "SmolLM2-135M-Instruct.Q4_1"  # the embedded model, and an alias of the tiny one
CHAT, EXTRACT = "/v1/chat/completions", "/v1/extract"
JSON = {"content-type": "application/json"}


class Case(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    kind: str  # "good", "bad" or "any"

    def __repr__(self) -> str:
        """Keep it short: hypothesis warns above 30,000 characters per batch, which fails the test."""
        return f"<{self.kind} {self.method} {self.path} {self.body[:200]!r}>"


words = st.text(max_size=12) | st.sampled_from(["Hello", "<|im_end|>", "🦊 狐", "a\u0301", "\x00", "{{ 7 * 7 }}"])
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)


def call(name: str) -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": name, "arguments": json.dumps({"a": name})}}


parts = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": words}), min_size=1, max_size=2)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "developer", "user"]), "content": words | parts | st.none()}
    )
    | st.fixed_dictionaries({"role": st.just("assistant")}, optional={"content": words | st.none(), "refusal": words})
    | st.builds(lambda name: {"role": "assistant", "content": None, "tool_calls": [call(name)]}, words)
    | st.fixed_dictionaries({"role": st.just("function"), "content": words, "name": words})
    | st.fixed_dictionaries({"role": st.just("tool"), "content": words, "tool_call_id": words}),
    min_size=1,
    max_size=3,
)
schemas = st.sampled_from(
    [
        {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False},
        {"enum": ["yes", "no", 1, None]},
        {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
        {"$ref": "#/$defs/t", "$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}}}},
        {"type": "string", "pattern": "^[a-f]{1,8}$"},
    ]
)
tools = st.builds(
    lambda name, schema: {"type": "function", "function": {"name": name, "parameters": schema}},
    st.from_regex(r"[a-zA-Z0-9_-]{1,8}", fullmatch=True),
    st.sampled_from([None, {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}]),
)
formats = st.sampled_from([{"type": "text"}, {"type": "json_object"}]) | st.builds(
    lambda schema: {"type": "json_schema", "json_schema": {"name": "any", "schema": schema, "strict": True}}, schemas
)


def number(least: float, most: float) -> st.SearchStrategy[float]:
    return st.floats(least, most) | st.sampled_from([least, most])


GOOD: dict[str, st.SearchStrategy[Any]] = {
    "max_completion_tokens": st.integers(1, 2),
    "temperature": number(0, 2),
    "top_p": number(0, 1),
    "top_k": st.integers(-1, 2**31 - 1),
    "min_p": number(0, 1),
    "repeat_penalty": number(0.1, 2),
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "stop": words.filter(bool) | st.lists(words.filter(bool), max_size=4),
    "n": st.integers(1, 4),
    "logit_bias": st.dictionaries(st.integers(0, 49151).map(str), number(-100, 100), max_size=3),
    "logprobs": st.booleans(),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({}, optional={"include_usage": st.booleans()}),
    "response_format": formats,
    "user": words,
    "metadata": st.dictionaries(words, words, max_size=2),
    "tools": st.lists(tools, max_size=2, unique_by=lambda tool: tool["function"]["name"]),
    "tool_choice": st.sampled_from(["none", "auto"]),
    "parallel_tool_calls": st.booleans(),
    "reasoning_effort": st.sampled_from(["none", "low", "high"]),
    "chat_template_kwargs": st.dictionaries(words, anything, max_size=2),
    "whatever": anything,
}
good_chat = st.fixed_dictionaries(
    {"messages": messages, "max_tokens": st.integers(1, 2)},
    optional={name: value | st.none() for name, value in GOOD.items()},
)
good_extract = st.fixed_dictionaries(
    {"text": words.filter(bool), "max_tokens": st.integers(1, 3)},
    optional={
        "schema": schemas,
        "instructions": words,
        "examples": st.lists(st.fixed_dictionaries({"text": words, "data": anything}), max_size=2),
        "temperature": number(0, 2),
        "stream": st.booleans(),
        "whatever": anything,
    },
)

WRONG_CHAT: dict[str, st.SearchStrategy[Any]] = {
    "messages": st.sampled_from([None, [], {}, "hi", [1], [{}], [{"role": "user"}], [{"role": "x", "content": "y"}]])
    | st.sampled_from([[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]])
    | st.just([{"role": "user", "content": "long " * 5000}]),
    "max_tokens": st.sampled_from([0, -1, 1.5, "1", 2**40, True]),
    "temperature": st.sampled_from([-0.01, 2.01, "1", [], 10**400, True]),
    "top_p": st.sampled_from([-1, 1.1, {}, "x"]),
    "repeat_penalty": st.sampled_from([0, 5e-324, -1, 3]),
    "seed": st.sampled_from([2**63, "1", 1.5]),
    "stop": st.sampled_from(["", [""], ["a"] * 5, [1], {}, "x" * 2000]),
    "n": st.sampled_from([0, 5, 129, "1"]),
    "logit_bias": st.sampled_from([{"x": 1}, {"-1": 1}, {"49152": 1}, {"1": 101}, {"1": "x"}, []]),
    "logprobs": st.sampled_from([1, "true"]),
    "top_logprobs": st.sampled_from([21, -1, "2"]),
    "stream": st.sampled_from([1, "yes", []]),
    "response_format": st.sampled_from([{}, {"type": "xml"}, {"type": "json_schema"}, "json", []])
    | st.builds(
        lambda schema: {"type": "json_schema", "json_schema": {"schema": schema}},
        st.sampled_from([{"not": {}}, {"type": "x"}, {"$ref": "http://x/"}, {"pattern": "("}, {"enum": []}, 1]),
    ),
    "tools": st.sampled_from(
        [[{"type": "function"}], [{"type": "x"}], [{"type": "function", "function": {"name": ""}}]]
    )
    | st.just([{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]),
    "tool_choice": st.sampled_from([{"type": "function"}, {"type": "x"}, "any", 1]),
    "model": st.sampled_from(["gpt-4o", "", "../x", "SmolLM2", 1]),
}
WRONG_EXTRACT: dict[str, st.SearchStrategy[Any]] = {
    "text": st.sampled_from([None, "", 1, [], "long " * 5000]),
    "schema": st.sampled_from([[], 1, "x", {"type": "x"}, {"uniqueItems": True}, {"properties": 1}, {"minLenght": 1}]),
    "examples": st.sampled_from([1, [1], [{}], [{"text": "a"}]]),
    "temperature": st.sampled_from([3, "0"]),
    "response_format": st.sampled_from([{"type": "text"}, {"type": "x"}]),
    "model": st.just("other"),
}


def encoded(path: str, kind: str) -> Any:
    return lambda body: Case("POST", path, JSON, json.dumps(body).encode("utf-8", "surrogatepass"), kind)


def wrong(good: st.SearchStrategy[Any], mistakes: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    mistake = st.sampled_from(sorted(mistakes)).flatmap(lambda name: st.tuples(st.just(name), mistakes[name]))
    return st.builds(lambda body, one: body | {one[0]: one[1]}, good, mistake)


bad_models = st.sampled_from(["../x.gguf", "/etc/passwd", "none.gguf", "", 1, None])
# An empty body is a valid /reload.
junk = st.binary(min_size=1, max_size=30).filter(bytes.strip) | st.sampled_from(
    [b"{", b"[" * 5000, b'{"messages": ' + b"[" * 3000, b"\xff", b'"\\ud800"']
)
cases: st.SearchStrategy[Case] = st.one_of(
    good_chat.map(encoded(CHAT, "good")),
    good_chat.map(encoded(CHAT, "good")),
    good_extract.map(encoded(EXTRACT, "good")),
    st.sampled_from(["/health", "/models", "/v1/models", f"/v1/models/{MODEL}"]).flatmap(
        lambda path: st.sampled_from(["GET", "HEAD", "OPTIONS"]).map(lambda method: Case(method, path, {}, b"", "good"))
    ),
    wrong(good_chat, WRONG_CHAT).map(encoded(CHAT, "bad")),
    wrong(good_chat, WRONG_CHAT).map(encoded(CHAT, "bad")),
    wrong(good_extract, WRONG_EXTRACT).map(encoded(EXTRACT, "bad")),
    st.dictionaries(st.sampled_from(["messages", "text", "model", "stream"]) | words, anything, max_size=4).flatmap(
        lambda body: st.sampled_from([CHAT, EXTRACT]).map(lambda path: encoded(path, "any")(body))
    ),
    st.builds(
        Case, st.just("POST"), st.sampled_from([CHAT, EXTRACT, "/load", "/reload"]), st.just(JSON), junk, st.just("bad")
    ),
    st.builds(lambda model: encoded("/reload", "bad")({"model_path": model, "n_ctx": 0}), bad_models),
    st.builds(lambda repo: encoded("/load", "bad")({"repo_id": repo, "filename": "../x"}), bad_models),
    st.builds(
        Case,
        st.sampled_from(["GET", "POST", "PUT", "DELETE", "TRACE"]),
        st.sampled_from(["/", "/v1", "/v1/models/none", "/v1/completions", "/health/x"]),
        st.just(JSON),
        st.just(b"{}"),
        st.just("bad"),
    ),
    st.builds(Case, st.just("DELETE"), st.sampled_from([CHAT, "/health"]), st.just({}), st.just(b""), st.just("bad")),
    good_chat.map(lambda body: Case("POST", CHAT, {"content-type": "text/plain"}, json.dumps(body).encode(), "bad")),
)

OK = {"GET": {200}, "HEAD": {200}, "OPTIONS": {204}, "POST": {200}}
REFUSED = {400, 404, 405, 415}


@pytest.fixture(scope="module")
def tiny_service(
    tiny: Callable[[str], Path], runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """Wire the service as in production, with a tiny model."""
    folder = tmp_path_factory.mktemp("models")
    service = build(
        Settings(
            models_dir=folder,
            model_path=str(tiny("llama-49k")),
            model_aliases=(MODEL,),
            n_ctx=2048,
            max_queue=4 * BATCH,  # `n` is at most 4: no batch is refused because the machine is slow
            n_threads=1,  # with a tiny model, a second thread only waits at barriers on a busy machine
            local_admin=True,
        )
    )
    state = runner.run(service.host.wait_ready(60))
    assert state.status == "ready", state
    yield service
    runner.run(service.host.close(5))


async def answered(service: Service, case: Case) -> tuple[int, bytes]:
    method, path, headers, body, _ = case
    request = Request(method, path, "req_1", headers, body=body, client="127.0.0.1")
    response = await dispatch(service, request)
    try:
        if isinstance(response.body, bytes):
            return response.status, response.body
        return response.status, b"".join([chunk async for chunk in response.body])
    finally:
        await response.aclose()


def judge(case: Case, status: int, body: bytes) -> None:
    method, path, _, sent, kind = case
    allowed = {"good": OK.get(method, set()), "bad": REFUSED, "any": {200} | REFUSED}[kind]
    assert status in allowed, (method, path, sent[:500], status, body[:500])
    if status in REFUSED and method != "HEAD":
        error = json.loads(body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert error["message"]
    if status == 200 and body.startswith(b"data:"):
        assert body.endswith(b"data: [DONE]\n\n")
        assert b'{"error"' not in body, (sent[:500], body[-500:])
    elif status == 200 and path == CHAT:
        assert json.loads(body)["choices"]


async def idle(stats: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Wait until nothing runs, and return the engine's counters: the engine drops a cancelled sequence by itself."""
    for _ in range(600):
        if stats()["sequences"]["running"] == 0 and stats()["queued"] == 0:
            break
        await asyncio.sleep(0.05)
    return stats()


def test_every_request_is_answered_as_documented(
    tiny_service: Service, runner: asyncio.Runner, caplog: pytest.LogCaptureFixture
) -> None:
    """Of at least 2,000 requests, a quarter is valid. None is a 500 or keeps its slot, and a chat works afterwards."""
    service, counts = tiny_service, Counter[str]()

    async def send(batch: list[Case]) -> list[tuple[int, bytes]]:
        return await asyncio.gather(*(answered(service, case) for case in batch))

    @settings(
        max_examples=BATCHES,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # a failing request is shown as it is; to shrink it would take the model minutes
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(cases, min_size=BATCH, max_size=BATCH))
    def batches(batch: list[Case]) -> None:
        for case, (status, body) in zip(batch, runner.run(send(batch)), strict=True):
            judge(case, status, body)
            counts[f"{case[1] if case[1] in (CHAT, EXTRACT) else 'other'} {status // 100}xx"] += 1

    batches()

    engine = service.host.state().engine
    assert engine is not None
    stats = runner.run(idle(engine.stats))
    total = counts.total()
    valid = sum(count for name, count in counts.items() if name.endswith("2xx"))
    assert total >= 2000, counts
    assert valid >= 0.25 * total, counts
    assert counts[f"{CHAT} 2xx"] >= 0.1 * total, counts
    assert (stats["sequences"]["running"], stats["queued"]) == (0, 0)
    assert "Traceback" not in caplog.text

    hello = json.dumps({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}).encode()
    status, body = runner.run(answered(service, Case("POST", CHAT, JSON, hello, "good")))
    assert (status, json.loads(body)["usage"]["completion_tokens"]) == (200, 4)


def test_every_request_is_answered_over_the_socket(server: str) -> None:
    """The same holds over HTTP, with real headers, framing and connections."""
    count = 0

    with httpx.Client(base_url=server, timeout=180) as client:

        @settings(
            max_examples=60,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(cases)
        def one(case: Case) -> None:
            nonlocal count
            method, path, headers, body, _ = case
            answer = client.request(method, path, headers=headers, content=body)
            judge(case, answer.status_code, answer.content)
            assert answer.headers["x-request-id"]
            count += 1

        one()
        stats = asyncio.run(idle(lambda: client.get("/health").json()["engine"]))

    assert count >= 50
    assert stats["sequences"]["running"] == 0
